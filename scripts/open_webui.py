"""A walk through Open WebUI with a browser, for clients.py: what a person does there, and what its page asks for itself.

It is started as the guide says: on loopback, with a fresh data directory, and so that it fetches nothing. Its API gives
the models' list and a streamed answer; then the browser asks. With the scripted server the answer grows on the page, and
the chat gets its title and tags; with the bundled model a thought folds away and opens.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clients import SAID, TAG, TITLE
from playwright.sync_api import Error, Page, expect, sync_playwright

from rorqual.config import DEFAULT_MODEL
from tests.web.conftest import FLAGS, chromium

PORT = "8080"  # the guide's
START_S = 240  # it imports torch and makes its tables
ALONE = {
    "OFFLINE_MODE": "true",
    "ENABLE_VERSION_UPDATE_CHECK": "false",
    "ANONYMIZED_TELEMETRY": "false",
    "DO_NOT_TRACK": "true",
    "SCARF_NO_ANALYTICS": "true",
    "RAG_EMBEDDING_ENGINE": "openai",  # its own comes from a hub
}


def walk(command: list[str], environment: dict[str, str], scripted: bool) -> None:
    """command: a shell and the guide's snippet. Raises AssertionError."""
    try:
        with started(command, environment) as url, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
            page = browser.new_page(base_url=url, viewport={"width": 1280, "height": 800}, locale="en-GB")
            page.set_default_timeout(30_000)
            expect.set_options(timeout=30_000)
            faults: list[str] = []
            page.on("pageerror", lambda error: faults.append(str(error)))
            its_api(page)
            if scripted:
                grows(page)
                is_named(page)
            else:
                folds(page)
            assert not faults, f"errors of its page: {faults}"
            browser.close()
    except Error as error:
        raise AssertionError(str(error)) from error


@contextlib.contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[str]:
    """Its address, once it answers there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    snippet = Path(command[-1])
    snippet.write_text(snippet.read_text(encoding="utf-8").replace(PORT, port), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        own = environment | ALONE | {"DATA_DIR": folder}
        process = subprocess.Popen(command, cwd=folder, env=own, stdout=log, stderr=log, start_new_session=True)
        try:
            end = time.monotonic() + START_S
            while not healthy(port):
                late = process.poll() is not None or time.monotonic() > end
                assert not late, f"it did not start: {Path(log.name).read_text(encoding='utf-8')[-3000:]}"
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the shell and what it started; nothing of theirs is kept
            process.wait()


def healthy(port: str) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except (URLError, ConnectionError, TimeoutError):
        return False


def its_api(page: Page) -> None:
    """The models' list, and a streamed answer, as a program asks for them."""
    signed = page.request.post("/api/v1/auths/signin", data={"email": "", "password": ""})
    headers = {"Authorization": f"Bearer {signed.json()['token']}"}
    listed = page.request.get("/api/models", headers=headers).json()["data"]
    assert DEFAULT_MODEL in [model["id"] for model in listed], listed
    ask = {"model": DEFAULT_MODEL, "stream": True, "messages": [{"role": "user", "content": "Why is the sea salty?"}]}
    text = page.request.post("/api/chat/completions", headers=headers, data=ask).text()
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1] if json.loads(event)["choices"]]
    assert events[-1] == "[DONE]" and len([d for d in deltas if d.get("content")]) > 3, text[-2000:]


def ask(page: Page, model: str, text: str) -> None:
    """In a new chat."""
    page.goto(f"/?models={model}")
    news = page.get_by_role("button", name="Okay, Let's Go!")
    news.or_(page.get_by_text("Send a Message")).first.wait_for()
    if news.is_visible():  # of the version, once
        news.click()
    page.locator("#chat-input").click()
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def grows(page: Page) -> None:
    """The scripted answer, which comes word by word, is seen to."""
    ask(page, DEFAULT_MODEL, "Say slowly why the sea is salty.")
    answer, seen = page.locator("#response-content-container"), set()
    end = time.monotonic() + 30
    while SAID not in seen:
        assert time.monotonic() < end, f"only {seen}"
        seen |= {answer.inner_text().strip()} if answer.count() else set()
        time.sleep(0.05)
    assert len({text for text in seen if text and SAID.startswith(text)}) > 3, f"not bit by bit: {seen}"


def is_named(page: Page) -> None:
    """It asks for a title and tags, and shows or keeps them."""
    expect(page).to_have_title(re.compile(TITLE))
    chat = page.url.rsplit("/", 1)[-1]
    headers = {"Authorization": f"Bearer {page.evaluate('localStorage.token')}"}
    end = time.monotonic() + 30
    while TAG not in (tags := page.request.get(f"/api/v1/chats/{chat}/tags", headers=headers).text()):
        assert time.monotonic() < end, f"no tag {TAG}, but {tags}"
        time.sleep(0.2)


def folds(page: Page) -> None:
    """The bundled model's thought is one line above the answer, and opens."""
    ask(page, "deepseek-reasoner", "What is 12 + 35?")
    thought = page.get_by_role("button", name=re.compile("^Thought for"))
    expect(thought).to_have_attribute("aria-expanded", "false")
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    answer = page.locator("#response-content-container")
    said = answer.inner_text().partition("\n")[2].strip()
    assert said, "no answer under the thought"
    thought.click()
    expect(thought).to_have_attribute("aria-expanded", "true")
    opened = answer.inner_text()
    assert len(opened) > len(said) + 40, f"no thought in {opened!r}"
