"""Takes the pictures of the chat that the documentation shows, after `make page`.

    python scripts/screenshots.py [DIR]         into docs, or DIR

For the pictures in chat/ the server is the product's own with a scripted model behind it (tests/web/world.py), so that every
picture is the same each time: they show the page, not a model's skill. chat.png shows what the bundled model says.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from playwright.sync_api import Browser, Page, sync_playwright

from tests.net.test_bundled import SERVE, serving
from tests.web.conftest import FLAGS, chromium
from tests.web.world import World, running

LARGEST = 250_000
DESKTOP = {"viewport": {"width": 1440, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
HISTORY = (
    "Which whales sing, and why?",
    "A name for a small boat",
    "Plan two days in Tadoussac",
    "Explain RoPE with one example",
)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with running() as world, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        for take in (desktop, dark, phone):
            world.reset()
            world.clear()
            take(browser, world, folder)
        with tempfile.TemporaryDirectory() as data, serving((*SERVE, "--data-dir", data)) as server:
            bundled(browser, server.url, folder.parent / "chat.png")
        browser.close()
    for picture in sorted([*folder.glob("*.png"), folder.parent / "chat.png"]):
        size = picture.stat().st_size
        print(f"{picture.name:24} {size / 1000:6.0f} kB")
        if size > LARGEST:
            sys.exit(f"{picture} is larger than {LARGEST} bytes")


def opened(browser: Browser, world: World, **options: object) -> Page:
    page = browser.new_context(base_url=world.url, locale="en-GB", **options).new_page()  # type: ignore[arg-type]
    page.goto("/")
    page.get_by_test_id("model").wait_for()
    return page


def ask(page: Page, text: str) -> None:
    answers = page.get_by_test_id("answer")
    before = answers.count()
    page.get_by_test_id("input").fill(text)
    page.get_by_test_id("send").click()
    page.locator(f"[data-testid=answer] >> nth={before}").wait_for()
    page.locator("[data-testid=answer][data-status=running]").wait_for(state="detached", timeout=120_000)


def fresh(page: Page) -> None:
    page.keyboard.press("Control+Shift+O")
    page.get_by_test_id("welcome").wait_for()


def history(page: Page) -> None:
    for text in HISTORY:
        ask(page, text)
        fresh(page)


def shoot(page: Page, folder: Path, name: str, settle_ms: int = 400) -> None:
    page.wait_for_timeout(settle_ms)  # transitions end, fonts and lazy chunks are there
    page.screenshot(path=folder / f"{name}.png")


def desktop(browser: Browser, world: World, folder: Path) -> None:
    page = opened(browser, world, **DESKTOP)
    history(page)
    shoot(page, folder, "welcome")
    ask(page, "markdown, please: which whales are rorquals?")
    shoot(page, folder, "chat")
    fresh(page)
    thinking(page, world, folder)
    searching(page, folder)
    fresh(page)
    preview(page, folder)
    fresh(page)
    ask(page, "maths of swimming: how much power does a blue whale need?")
    page.get_by_test_id("formula").first.locator(".katex").wait_for()
    ask(page, "diagram of how a rorqual feeds, please")
    page.get_by_test_id("diagram").wait_for()
    shoot(page, folder, "maths")
    page.keyboard.press("Control+K")
    page.get_by_test_id("palette").wait_for()
    shoot(page, folder, "palette")


def thinking(page: Page, world: World, folder: Path) -> None:
    page.get_by_test_id("deepthink").click()
    world.pace_s = 0.08
    page.get_by_test_id("input").fill("think: how many times does the letter r occur in rorqual?")
    page.get_by_test_id("send").click()
    page.get_by_text("Thinking… 3 s").wait_for()
    page.get_by_test_id("input").blur()
    shoot(page, folder, "thinking", 0)
    world.pace_s = 0.001
    page.locator("[data-testid=answer][data-status=done]").wait_for()
    page.get_by_test_id("deepthink").click()


def searching(page: Page, folder: Path) -> None:
    fresh(page)
    page.get_by_test_id("search-toggle").click()
    ask(page, "search: how long is the blue whale and what does it eat?")
    page.get_by_test_id("citation").nth(1).click()
    page.get_by_test_id("sources").wait_for()
    shoot(page, folder, "search")
    page.get_by_test_id("panel-close").click()
    page.get_by_test_id("search-toggle").click()


def preview(page: Page, folder: Path) -> None:
    ask(page, "page with a pond and a whale that follows the pointer, in one file")
    page.get_by_test_id("preview").click()
    page.frame_locator("[data-testid=preview-frame]").get_by_text("reached: nothing").wait_for()
    page.get_by_test_id("thread").evaluate("el => el.scrollTo(0, 0)")
    shoot(page, folder, "preview", 900)
    page.get_by_test_id("panel-close").click()


def dark(browser: Browser, world: World, folder: Path) -> None:
    page = opened(browser, world, color_scheme="dark", **DESKTOP)
    history(page)
    page.get_by_test_id("search-toggle").click()
    ask(page, "search: how long is the blue whale and what does it eat?")
    page.get_by_test_id("search-toggle").click()
    ask(page, "markdown, please: which whales are rorquals?")
    page.get_by_test_id("thread").evaluate("el => el.scrollTo(0, 0)")
    shoot(page, folder, "dark")


def phone(browser: Browser, world: World, folder: Path) -> None:
    page = opened(browser, world, **PHONE)
    history_on_phone: tuple[Callable[[], None], ...] = (
        lambda: ask(page, HISTORY[0]),
        lambda: page.locator(".header .new").click(),
        lambda: ask(page, HISTORY[1]),
        lambda: page.locator(".header .new").click(),
    )
    for step in history_on_phone:
        step()
    shoot(page, folder, "phone-welcome")
    page.get_by_test_id("search-toggle").click()
    ask(page, "search: how long is the blue whale and what does it eat?")
    shoot(page, folder, "phone")
    page.emulate_media(color_scheme="dark")
    page.get_by_test_id("menu").click()
    shoot(page, folder, "phone-dark-drawer")


def bundled(browser: Browser, url: str, picture: Path) -> None:
    """An ordinary question and an addition with its thinking open, of the bundled model, drawn greedily."""
    page = browser.new_page(base_url=url, viewport={"width": 1280, "height": 800}, locale="en-GB", color_scheme="light")
    page.goto("/")
    page.get_by_test_id("model").wait_for()
    page.get_by_test_id("parameters-button").click()
    page.get_by_test_id("temperature").fill("0")
    page.keyboard.press("Escape")
    ask(page, "What is photosynthesis?")
    page.get_by_test_id("deepthink").click()
    ask(page, "What is 47 + 38?")
    toggle = page.get_by_test_id("thinking-toggle").last
    if toggle.get_attribute("aria-expanded") == "false":
        toggle.click()
    page.get_by_test_id("input").blur()
    page.mouse.move(1200, 60)
    page.wait_for_timeout(500)
    page.screenshot(path=picture)


if __name__ == "__main__":
    main((Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs")) / "chat")
