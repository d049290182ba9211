"""Keyboard, languages, appearance, narrow screens, scrolling: what everyone needs of the page."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.web.answers import MARKDOWN
from tests.web.steps import ask, choose, new_chat
from tests.web.world import World


def test_keyboard_and_palette(page: Page) -> None:
    ask(page, "hello whales")
    page.keyboard.press("Control+k")
    expect(page.get_by_test_id("palette-input")).to_be_focused()
    page.keyboard.type("dark")
    page.keyboard.press("Enter")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.keyboard.press("Control+Shift+o")
    expect(page.get_by_test_id("welcome")).to_be_visible()
    page.keyboard.press("Control+k")
    expect(page.get_by_test_id("palette-input")).to_be_focused()
    page.keyboard.type("hello")
    expect(page.get_by_test_id("palette-entry").first).to_contain_text("hello whales")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("answer")).to_be_visible()
    page.keyboard.press("Control+/")
    expect(page.get_by_test_id("keys")).to_contain_text("Stop the answer")
    page.keyboard.press("Escape")
    expect(page.get_by_test_id("keys")).to_have_count(0)
    page.keyboard.press("Control+Shift+s")
    expect(page.get_by_test_id("sidebar")).to_be_hidden()
    page.get_by_test_id("menu").click()
    page.get_by_test_id("thread").focus()
    page.keyboard.press("Shift+Escape")
    expect(page.get_by_test_id("input")).to_be_focused()


def test_a_palette_opened_while_the_last_one_fades_starts_empty(page: Page) -> None:
    page.keyboard.press("Control+k")
    page.get_by_test_id("palette").evaluate("e => { e.style.transition = 'opacity 9s' }")
    page.get_by_test_id("palette-input").fill("dark")
    page.keyboard.press("Escape")
    expect(page.get_by_test_id("palette")).to_have_attribute("data-ending-style", "")
    page.keyboard.press("Control+k")
    expect(page.get_by_test_id("palette-input")).to_have_value("")
    expect(page.get_by_test_id("palette-input")).to_be_focused()
    page.keyboard.type("light")
    page.keyboard.press("Enter")
    expect(page.locator("html")).to_have_attribute("data-theme", "light")


def test_chinese(page: Page, browser: Browser, world: World) -> None:
    page.get_by_test_id("settings-button").click()
    page.get_by_test_id("language-zh").click()
    expect(page.get_by_test_id("deepthink")).to_have_text("深度思考")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    page.reload()
    expect(page.get_by_test_id("new-chat")).to_have_text("新对话")
    other = browser.new_page(base_url=world.url, locale="zh-CN")
    other.goto("/")
    expect(other.get_by_test_id("new-chat")).to_have_text("新对话")
    other.context.close()


def test_light_dark_and_system(page: Page) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) != "rgb(255, 255, 255)", "the system's wish is not followed"
    page.get_by_test_id("settings-button").click()
    page.get_by_test_id("theme-light").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    page.reload()
    expect(page.get_by_test_id("welcome")).to_be_visible()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    assert page.evaluate(background) == "rgb(255, 255, 255)", "the choice is not remembered"


def test_enter_sends_and_shift_enter_breaks_the_line(page: Page) -> None:
    field = page.get_by_test_id("input")
    expect(page.get_by_test_id("send")).to_be_disabled()
    field.press_sequentially("one")
    field.press("Shift+Enter")
    field.press_sequentially("two")
    field.press("Enter")
    expect(page.locator(".bubble")).to_have_text("one\ntwo")
    expect(field).to_have_value("")


def test_answer_and_code_are_copied(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer = ask(page, "markdown")
    choose(answer.get_by_test_id("copy-code"))
    _says_copied(page, answer.get_by_test_id("copy-code"))
    code = page.evaluate("navigator.clipboard.readText()")
    assert code.startswith("def krill_per_gulp") and code.rstrip().endswith("krill_per_litre)")
    choose(answer.get_by_test_id("copy-answer"))
    _says_copied(page, answer.get_by_test_id("copy-answer"))
    assert page.evaluate("navigator.clipboard.readText()").strip() == MARKDOWN.strip()


def _says_copied(page: Page, button: Locator) -> None:
    """Looks in every frame: it is said for 1.6 s only."""
    page.wait_for_function("el => el.ariaLabel === 'Copied'", arg=button.element_handle(), polling="raf")


def test_scrolling_follows_until_the_person_scrolls_up(page: Page, world: World) -> None:
    world.pause_at = 300
    answer = ask(page, "long", None)
    answer.get_by_test_id("answer-text").get_by_text("Paragraph 15:").wait_for()
    distance = "el => el.scrollHeight - el.clientHeight - el.scrollTop"
    thread = page.get_by_test_id("thread")
    page.wait_for_function("() => { const el = document.querySelector('.scroll');"
                           "return el.scrollHeight - el.clientHeight - el.scrollTop < 60 }")  # fmt: skip
    expect(page.get_by_test_id("jump")).to_have_count(0)
    thread.hover()
    page.mouse.wheel(0, -300)
    expect(page.get_by_test_id("jump")).to_be_visible()
    # The page moves on for a while after the wheel.
    page.wait_for_function("() => new Promise(done => { const el = document.querySelector('.scroll');"
                           "const top = el.scrollTop; setTimeout(() => done(el.scrollTop === top), 200) })")  # fmt: skip
    top = thread.evaluate("el => el.scrollTop")
    world.go_on()
    answer.get_by_test_id("answer-text").get_by_text("Paragraph 22:").wait_for(state="attached")
    assert thread.evaluate("el => el.scrollTop") == top, "the page moved under the reader"
    page.get_by_test_id("jump").click()
    expect(page.get_by_test_id("jump")).to_have_count(0)
    expect(answer).to_have_attribute("data-status", "done")
    page.wait_for_function("() => { const el = document.querySelector('.scroll');"
                           "return el.scrollHeight - el.clientHeight - el.scrollTop < 60 }")  # fmt: skip
    assert thread.evaluate(distance) < 60


def test_finished_messages_are_not_drawn_again(page: Page) -> None:
    ask(page, "markdown")
    page.evaluate(
        """() => { window.changes = 0;
                   const seen = new MutationObserver(list => { window.changes += list.length });
                   const answer = document.querySelector('[data-testid=answer-text]');
                   seen.observe(answer, { subtree: true, childList: true, characterData: true, attributes: true }) }"""
    )
    ask(page, "long")
    assert page.evaluate("window.changes") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen(browser: Browser, world: World, scheme: str) -> None:
    context = browser.new_context(
        base_url=world.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, locale="en-GB",
        color_scheme=scheme,  # type: ignore[arg-type]
    )  # fmt: skip
    page = context.new_page()
    page.goto("/")
    ask(page, "markdown")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    sidebar = page.get_by_test_id("sidebar")
    expect(sidebar).to_be_hidden()
    page.get_by_test_id("menu").click()
    expect(sidebar).to_be_visible()
    page.keyboard.press("Escape")
    expect(sidebar).to_be_hidden()
    page.get_by_test_id("menu").click()
    new_chat(page)
    expect(sidebar).to_be_hidden()
    expect(page.get_by_test_id("welcome")).to_be_visible()
    context.close()


def test_a_corrupt_or_missing_storage_never_breaks_the_page(page: Page) -> None:
    page.evaluate(
        "() => { localStorage.setItem('rorqual.settings', '{{{'); localStorage.setItem('rorqual.drafts', '[1,2') }"
    )
    page.reload()
    expect(page.get_by_test_id("welcome")).to_be_visible()
    page.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('no') } })")
    page.reload()
    expect(ask(page, "hello")).to_contain_text("pleated throat")


def test_a_chat_that_is_not_there(page: Page) -> None:
    page.goto("/#/c/nowhere")
    expect(page.get_by_test_id("toast")).to_contain_text("not there")
    expect(page.get_by_test_id("welcome")).to_be_visible()


def test_a_long_conversation_keeps_few_rows(page: Page, world: World) -> None:
    """Three thousand messages: only what is in sight is in the document, and both ends can be reached."""
    _post(f"{world.url}/chats", {"id": "sample"})
    body = {"id": "q", "parent": None, "content": "hello", "answer": {"id": "a"}}
    _post(f"{world.url}/chats/sample/messages", body)
    page.goto("/#/c/sample")
    expect(page.get_by_test_id("answer")).to_have_attribute("data-status", "done")
    with urlopen(f"{world.url}/chats/sample/export?format=json", timeout=10) as answer:
        exported = json.load(answer)
    question, answer_ = exported["messages"]
    messages: list[dict[str, Any]] = []
    for n in range(1500):
        above = messages[-1]["id"] if messages else None
        messages.append(question | {"id": f"q{n}", "parent": above, "content": f"Question {n}?"})
        messages.append(answer_ | {"id": f"a{n}", "parent": f"q{n}", "content": f"Answer {n}. " + MARKDOWN})
    _post(f"{world.url}/chats/import", exported | {"id": "long", "head": "a1499", "messages": messages})
    page.goto("/#/c/long")
    thread = page.get_by_test_id("thread")
    expect(thread.get_by_text("Answer 1499.")).to_be_visible()
    assert page.locator(".row").count() < 40
    thread.focus()
    page.keyboard.press("Home")
    expect(thread.get_by_text("Question 0?")).to_be_visible()
    assert page.locator(".row").count() < 40
    page.get_by_test_id("jump").click()
    expect(thread.get_by_text("Answer 1499.")).to_be_visible()


def _post(url: str, body: dict[str, Any]) -> None:
    urlopen(Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}), timeout=30).close()


def test_the_first_load_is_small_and_lazy(browser: Browser, world: World) -> None:
    """Formulas, colours and diagrams are not loaded before there are any; what is loaded fits its budget."""
    page = browser.new_page(base_url=world.url)
    loaded: list[str] = []
    page.on("requestfinished", lambda r: loaded.append(r.url))
    page.goto("/")
    expect(page.get_by_test_id("model")).to_be_visible()
    scripts = [url for url in loaded if url.endswith(".js")]
    assert not [url for url in scripts if re.search("katex|highlight|mermaid", url)]
    sizes = page.evaluate(
        "performance.getEntriesByType('resource').filter(e => e.name.endsWith('.js')).map(e => e.encodedBodySize)"
    )
    assert 50_000 < sum(sizes) < 350_000, "sent gzipped, within the budget"
    page.context.close()
