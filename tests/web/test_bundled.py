"""The chat page in a real browser before the real server and the bundled model: nothing is scripted here."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import ConsoleMessage, Page, expect

from rorqual.config import DEFAULT_MODEL
from tests.net.test_bundled import serving
from tests.web.world import PAGE

ANSWER_MS = 60_000


@pytest.fixture(scope="module")
def page_server() -> Iterator[str]:
    """Instead of the scripted server: `rorqual serve` with the bundled model."""
    if not (PAGE / "index.html").is_file():
        pytest.fail("The chat page is not built: run `npm ci && npm run build` in web/ (Node 20 or newer).")
    with serving() as server:
        yield server.url


@pytest.fixture
def chat(page: Page) -> Iterator[Page]:
    """The page, from its first byte on watched for complaints in the console."""
    complaints: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(f"{message.type}: {message.text}")

    page.on("console", hear)
    page.reload()
    expect(page.get_by_test_id("model")).to_have_text(DEFAULT_MODEL)
    yield page
    assert not complaints, complaints


def ask(page: Page, text: str) -> None:
    """Sends a message and waits for the end of its answer."""
    answers = page.get_by_test_id("answer")
    before = answers.count()
    page.get_by_test_id("input").fill(text)
    page.get_by_test_id("send").click()
    expect(answers).to_have_count(before + 1)
    expect(answers.last).to_have_attribute("data-status", "done", timeout=ANSWER_MS)


def test_it_answers_a_question(chat: Page) -> None:
    """A finished answer, and what it cost; no thinking unless it was asked for."""
    ask(chat, "What is the capital of France?")
    answer = chat.get_by_test_id("answer")
    expect(answer.get_by_test_id("answer-text")).to_contain_text("Paris")
    expect(answer.get_by_test_id("thinking-toggle")).to_have_count(0)
    expect(answer.get_by_test_id("stats")).to_contain_text(re.compile(r"\d+ tokens.*tokens/s"))
    expect(chat.get_by_test_id("cost")).to_contain_text(re.compile(r"\$[\d.]+ at "))


def test_it_thinks_before_it_adds(chat: Page) -> None:
    """DeepThink on: the thought is in its panel, the sum in the answer, and neither in the other's place."""
    chat.get_by_test_id("deepthink").click()
    expect(chat.get_by_test_id("deepthink")).to_have_attribute("aria-pressed", "true")
    ask(chat, "What is 12 + 35?")
    answer = chat.get_by_test_id("answer")
    expect(answer.get_by_test_id("answer-text")).to_contain_text("47")
    toggle, thought = answer.get_by_test_id("thinking-toggle"), answer.get_by_test_id("thinking-text")
    if toggle.get_attribute("aria-expanded") == "false":
        toggle.click()
    expect(thought).to_be_visible()
    expect(thought).to_contain_text(re.compile(r"\w+"))
    expect(answer).not_to_contain_text("</think>")
    expect(toggle).to_contain_text(re.compile(r"Thought for .*\d+ tokens"))


def test_a_conversation_goes_on_and_outlives_a_reload(chat: Page) -> None:
    """Two turns; after a reload they are still there and a third is answered."""
    ask(chat, "Hello!")
    ask(chat, "Tell me about whales.")
    said = chat.get_by_test_id("answer-text").all_inner_texts()
    assert len(said) == 2 and all(text.strip() for text in said)
    chat.reload()
    expect(chat.get_by_test_id("answer-text")).to_have_text(said, use_inner_text=True)
    ask(chat, "Thank you!")
    expect(chat.get_by_test_id("answer")).to_have_count(3)
