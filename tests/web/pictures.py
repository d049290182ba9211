"""Takes the pictures of the chat, after `npm run build` in web/.

    python -m tests.web.pictures DIR                                                 every state of the page
    python -m tests.web.pictures --url http://127.0.0.1:8000 --readme docs/chat.png  the README's, of a running server

In DIR the answers are the script's (scripted.py), not a model's: those pictures show the page. The README's picture
(1280x800, light) shows what the bundled model said when it was asked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from tests.web.conftest import FLAGS, chromium
from tests.web.scripted import ANSWERS, THOUGHTS, ScriptedApi, serve_script

QUESTION = "Markdown, please: which whales are rorquals, and how much fits into one gulp?"

GULP_THOUGHTS = "Two numbers are needed: how much water one gulp takes in, and how many krill swim in it. " * 2
GULP = """\
About **800,000**, if the whale meets a dense swarm:

| What                | How much          |
| :------------------ | :---------------- |
| Water in one gulp   | about 80,000 litres |
| Krill in that water | about 10 a litre  |

The pleats of the throat unfold like an accordion, the whale closes its mouth and presses the water out \
through its baleen. The krill stay:

```python
def krill_per_gulp(litres: float, krill_per_litre: float = 10) -> int:
    return round(litres * krill_per_litre)

krill_per_gulp(80_000)  # 800000
```
"""


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    api, server = serve_script()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        for take in (chat, dark, mobile, thinking, error, settings):
            take(browser, api, folder)
        browser.close()
    server.shutdown()


def open_page(browser: Browser, api: ScriptedApi, width: int = 1280, height: int = 800, **options: object) -> Page:
    api.reset()
    api.pace_s = 0.02
    size = {"width": width, "height": height}
    page = browser.new_context(base_url=api.url, viewport=size, **options).new_page()  # type: ignore[arg-type]
    page.goto("/")
    page.get_by_test_id("model").wait_for()
    return page


def ask(page: Page, text: str, status: str = "done") -> None:
    page.get_by_test_id("input").fill(text)
    page.get_by_test_id("input").press("Enter")
    page.locator("[data-status=streaming]").wait_for()
    page.locator("[data-status=streaming]").wait_for(state="detached")
    page.locator(f"[data-status={status}]").last.wait_for()


def history(page: Page) -> None:
    for text in ("Tell me a short story about a whale who could not sleep.", "List five animals that live in the sea."):
        ask(page, text)
        page.get_by_test_id("new-chat").click()
        page.get_by_test_id("welcome").wait_for()


def chat(browser: Browser, api: ScriptedApi, folder: Path) -> None:
    page = open_page(browser, api)
    page.screenshot(path=folder / "welcome.png")
    history(page)
    page.get_by_test_id("deepthink").click()
    ANSWERS["how"], THOUGHTS["how"] = GULP, GULP_THOUGHTS
    ask(page, "How many krill fit into one gulp of a blue whale?")
    page.mouse.move(1200, 60)
    page.screenshot(path=folder / "chat.png")


def dark(browser: Browser, api: ScriptedApi, folder: Path) -> None:
    page = open_page(browser, api, color_scheme="dark")
    page.screenshot(path=folder / "dark-welcome.png")
    history(page)
    ask(page, QUESTION)
    page.screenshot(path=folder / "dark.png")


def mobile(browser: Browser, api: ScriptedApi, folder: Path) -> None:
    page = open_page(browser, api, width=360, height=740, device_scale_factor=2, has_touch=True, is_mobile=True)
    page.screenshot(path=folder / "mobile-welcome.png")
    ask(page, QUESTION)
    page.screenshot(path=folder / "mobile.png")
    page.get_by_test_id("menu").click()
    page.wait_for_timeout(400)
    page.screenshot(path=folder / "mobile-drawer.png")


def thinking(browser: Browser, api: ScriptedApi, folder: Path) -> None:
    page = open_page(browser, api)
    page.get_by_test_id("deepthink").click()
    api.pace_s = 0.1
    page.get_by_test_id("input").fill("Think: how many times does the letter r occur in rorqual?")
    page.get_by_test_id("input").press("Enter")
    page.get_by_text("Thinking… 2 s").wait_for()
    page.screenshot(path=folder / "thinking.png")
    page.locator("[data-status=done]").wait_for()
    page.get_by_test_id("thinking-toggle").click()
    page.screenshot(path=folder / "thinking-open.png")


def error(browser: Browser, api: ScriptedApi, folder: Path) -> None:
    page = open_page(browser, api)
    ask(page, "Cut the connection.", "interrupted")
    ask(page, "Fault in the middle.", "error")
    page.screenshot(path=folder / "error.png")
    api.api_key = "sk-test"
    page.reload()
    page.get_by_test_id("key-input").wait_for()
    page.screenshot(path=folder / "key.png")


def settings(browser: Browser, api: ScriptedApi, folder: Path) -> None:
    page = open_page(browser, api)
    api.models.append({**api.models[0], "id": "rorqual-mini"})
    page.reload()
    ask(page, QUESTION)
    page.get_by_test_id("settings-button").click()
    page.get_by_test_id("temperature").fill("0.7")
    page.screenshot(path=folder / "settings.png")


def readme(url: str, picture: Path) -> None:
    """An ordinary question and an addition with its thinking open, asked of the server that runs at `url`.

    The answers are drawn greedily, so that the same weights give the same picture.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        size = {"width": 1280, "height": 800}
        page = browser.new_context(base_url=url, viewport=size, color_scheme="light").new_page()  # type: ignore[arg-type]
        page.goto("/")
        page.get_by_test_id("model").wait_for()
        page.get_by_test_id("settings-button").click()
        page.get_by_test_id("temperature").fill("0")
        page.keyboard.press("Escape")
        ask(page, "Who are you?")
        page.get_by_test_id("deepthink").click()
        ask(page, "What is 47 + 38?")
        toggle = page.get_by_test_id("thinking-toggle").last
        if toggle.get_attribute("aria-expanded") == "false":
            toggle.click()
        page.get_by_test_id("thinking-text").last.wait_for()
        page.get_by_test_id("answer").last.scroll_into_view_if_needed()
        page.get_by_test_id("input").blur()
        page.mouse.move(1200, 60)
        page.wait_for_timeout(500)  # the panel unfolds
        picture.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=picture)
        browser.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.web.pictures", description="Takes pictures of the chat.")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="where the pictures of the script go")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="a running server, for --readme")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="take the README's picture from the server at --url"
    )
    told = parser.parse_args()
    if (told.folder is None) == (told.readme is None):
        parser.error("name a DIR or --readme FILE")
    return told


if __name__ == "__main__":
    told = arguments()
    if told.readme:
        readme(told.url, told.readme)
    else:
        main(told.folder)
