"""Thinking, search, previews, files and the sidebar, in a real browser before the real server (world.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.web.steps import ask, choose, menu, new_chat
from tests.web.world import World


def test_thinking_is_shown_timed_counted_and_folded(page: Page, world: World) -> None:
    toggle = page.get_by_test_id("deepthink")
    expect(toggle).to_have_attribute("aria-pressed", "false")
    page.keyboard.press("Alt+t")
    expect(toggle).to_have_attribute("aria-pressed", "true")
    world.pause_at = 30
    answer = ask(page, "think about it", None)
    button, text = answer.get_by_test_id("thinking-toggle"), answer.get_by_test_id("thinking-text")
    expect(button).to_contain_text(re.compile(r"Thinking… [1-9]\d* s.*\d+ tokens"))
    expect(button).to_have_attribute("aria-expanded", "true")
    expect(text).to_contain_text("The question is")
    world.go_on()
    expect(answer).to_have_attribute("data-status", "done")
    expect(button).to_contain_text(re.compile(r"Thought for \d+ s.*\d+ tokens"))
    expect(button).to_have_attribute("aria-expanded", "false")
    expect(text).to_be_hidden()
    button.click()
    expect(text).to_contain_text("No other letter is.")
    page.reload()
    expect(page.get_by_test_id("deepthink")).to_have_attribute("aria-pressed", "true")


def test_thinking_can_be_stopped_and_its_thought_edited(page: Page, world: World) -> None:
    page.get_by_test_id("deepthink").click()
    world.pause_at = 20
    answer = ask(page, "think slowly", None)
    expect(answer.get_by_test_id("thinking-text")).to_contain_text("The question is")
    with page.expect_response("**/stop"):
        answer.get_by_test_id("stop-thinking").click()
    world.go_on()
    expect(answer).to_have_attribute("data-status", "done")
    expect(answer.get_by_test_id("answer-text")).to_contain_text("twice")
    answer.get_by_test_id("thinking-toggle").click()
    expect(answer.get_by_test_id("thinking-text")).not_to_contain_text("No other letter is.")
    answer.get_by_test_id("edit-thought").click()
    page.get_by_test_id("thought-input").fill('The question is how many times the letter *r* occurs in "rorqual".')
    page.get_by_test_id("thought-go").click()
    expect(page.get_by_test_id("siblings")).to_contain_text("2/2")
    expect(answer).to_have_attribute("data-status", "done")
    if answer.get_by_test_id("thinking-toggle").get_attribute("aria-expanded") == "false":
        answer.get_by_test_id("thinking-toggle").click()
    expect(answer.get_by_test_id("thinking-text")).to_contain_text("No other letter is.")


def test_search_cites_and_checks(page: Page, world: World) -> None:
    page.get_by_test_id("search-toggle").click()
    expect(page.get_by_test_id("search-toggle")).to_have_attribute("aria-pressed", "true")
    world.gate.clear()
    answer = ask(page, "search the blue whale", None)
    strip = answer.get_by_test_id("search")
    expect(strip).to_have_attribute("data-phase", "queries")
    world.go_on()
    expect(answer).to_have_attribute("data-status", "done")
    expect(answer.get_by_test_id("queries").locator("li")).to_have_text(
        ["blue whale length", "what do blue whales eat"]
    )
    chips = answer.get_by_test_id("citation")
    expect(chips).to_have_text(["2", "1", "3", "2", "3"])
    expect(answer.get_by_test_id("answer-text")).not_to_contain_text("citation:")
    expect(chips.nth(0)).to_have_class(re.compile("yes"))
    expect(chips.nth(2)).to_have_class(re.compile("no"))
    expect(chips.nth(0)).to_have_attribute("aria-label", "Source 2: Blue whale, found in the source")
    chips.nth(0).hover()
    expect(page.locator(".card")).to_contain_text("It reaches 29.9 metres")
    chips.nth(2).click()
    drawer = page.get_by_test_id("sources")
    expect(drawer.get_by_test_id("source")).to_have_count(3)
    expect(drawer.get_by_test_id("verdicts")).to_contain_text("2 of 4 cited sentences")
    expect(drawer.get_by_test_id("source").nth(2)).to_have_class(re.compile("current"))
    expect(drawer.get_by_test_id("source").nth(2).get_by_test_id("claim").first).to_contain_text("Not found")
    expect(drawer.get_by_test_id("source").nth(2).get_by_test_id("claim").first).to_contain_text("1,600")
    page.get_by_test_id("panel-close").click()
    expect(drawer).to_have_count(0)
    choose(answer.get_by_test_id("open-sources"))
    expect(drawer).to_be_visible()


def test_a_search_that_fails_says_so_and_the_answer_comes(page: Page, world: World) -> None:
    world.search_fails = True
    page.get_by_test_id("search-toggle").click()
    answer = ask(page, "search the blue whale")
    expect(answer.get_by_test_id("search")).to_contain_text("Search failed")
    expect(answer.get_by_test_id("answer-text")).to_contain_text("blue whale")


def test_html_runs_beside_the_conversation_and_reaches_nothing(page: Page) -> None:
    answer = ask(page, "page with a pond")
    choose(answer.get_by_test_id("preview"))
    panel = page.get_by_test_id("preview-panel")
    frame = page.frame_locator("[data-testid=preview-frame]")
    expect(frame.locator("#log")).to_have_text("reached: nothing")
    element = panel.get_by_test_id("preview-frame")
    expect(element).to_have_attribute("sandbox", "allow-scripts")
    panel.get_by_test_id("tab-source").click()
    expect(panel.locator("pre")).to_contain_text("<title>Pond</title>")
    with page.expect_download() as download:
        panel.get_by_test_id("preview-download").click()
    assert download.value.suggested_filename == "preview.html"
    assert "The pond" in Path(download.value.path()).read_text()
    page.keyboard.press("Escape")
    expect(panel).to_have_count(0)
    expect(answer.get_by_test_id("preview")).to_be_focused()


def test_the_frame_alone_has_no_origin_and_no_network(page: Page, world: World) -> None:
    page.goto("/preview.html")
    assert page.evaluate("self.origin") == "null"
    assert page.evaluate("fetch('/health').then(() => 'reached', () => 'blocked')") == "blocked"
    picture = (
        "const i = new Image(); i.onload = () => d('reached'); i.onerror = () => d('blocked'); i.src = '/mark.svg'"
    )
    assert page.evaluate(f"new Promise(d => {{ {picture} }})") == "blocked"


def test_diagrams_and_svg(page: Page) -> None:
    answer = ask(page, "diagram of feeding")
    picture = answer.get_by_test_id("diagram")
    expect(picture).to_have_attribute("src", re.compile("^data:image/svg"))
    assert picture.evaluate("el => el.decode().then(() => el.naturalWidth)") > 100
    choose(answer.get_by_test_id("preview"))
    expect(page.frame_locator("[data-testid=preview-frame]").locator("svg")).to_be_visible()
    svg = ask(page, "svg please")
    choose(svg.get_by_test_id("preview"))
    expect(page.frame_locator("[data-testid=preview-frame]").locator("svg circle")).to_be_visible()


def test_files_are_chips_and_go_with_the_question(page: Page) -> None:
    files = [
        {"name": "notes.md", "mimeType": "text/markdown", "buffer": b"# Krill\n\nThe secret number is 4711."},
        {"name": "<img src=x onerror=hit=1>.txt", "mimeType": "text/plain", "buffer": b"x"},
        {"name": "film.mp4", "mimeType": "video/mp4", "buffer": b"x"},
    ]
    page.get_by_test_id("file-input").set_input_files(files)
    chips = page.get_by_test_id("file-chip")
    expect(chips).to_have_count(3)
    expect(chips.nth(0)).to_contain_text(re.compile(r"notes\.md.*\d+ tokens"))
    expect(chips.nth(2)).to_contain_text("cannot be read")
    expect(page.get_by_test_id("send")).to_be_disabled()
    chips.nth(2).get_by_test_id("remove-file").click()
    expect(chips.nth(1)).to_contain_text("1 token")
    page.reload()  # drafts keep their files
    expect(chips).to_have_count(2)
    ask(page, "hello")
    question = page.get_by_test_id("question")
    expect(question.get_by_test_id("file-chip")).to_have_count(2)
    expect(page.get_by_test_id("input")).to_have_value("")


def test_files_can_be_dropped_and_pasted(page: Page) -> None:
    transfer = page.evaluate_handle(
        "() => { const data = new DataTransfer(); data.items.add(new File(['hello'], 'dropped.txt')); return data }"
    )
    page.evaluate(  # a browser says so over and over while something hovers
        """dataTransfer => { window.hovering = setInterval(() => document.body.dispatchEvent(
                             new DragEvent('dragover', { dataTransfer, bubbles: true, cancelable: true })), 50) }""",
        transfer,
    )
    expect(page.get_by_test_id("drop")).to_be_visible()
    page.evaluate("() => clearInterval(window.hovering)")
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.get_by_test_id("file-chip")).to_contain_text("dropped.txt")
    expect(page.get_by_test_id("drop")).to_have_count(0)
    page.evaluate(
        """() => { const data = new DataTransfer(); data.items.add(new File(['hello'], 'pasted.txt'));
                   const event = new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true });
                   document.querySelector('.composer textarea').dispatchEvent(event) }"""
    )
    expect(page.get_by_test_id("file-chip")).to_have_count(2)


def test_chats_are_found_renamed_pinned_and_deleted(page: Page) -> None:
    for text in ("Which whales sing?", "markdown", "A name for a boat"):
        ask(page, text)
        new_chat(page)
    chats = page.get_by_test_id("chat")
    expect(chats).to_have_text(["A name for a boat", "markdown", "Which whales sing?"])
    page.get_by_test_id("search-chats").fill("humpb")
    expect(chats).to_have_count(1)
    expect(chats.get_by_test_id("match").locator("mark")).to_have_text(re.compile("humpb", re.I))
    page.get_by_test_id("search-chats").fill("zzz")
    expect(page.get_by_test_id("sidebar")).to_contain_text("Nothing found")
    page.get_by_test_id("search-chats").fill("")
    menu(page, chats.nth(2), "pin")
    expect(chats.first).to_contain_text("Which whales sing?")
    menu(page, chats.nth(1), "rename")
    page.get_by_test_id("rename-input").fill("Boats & names")
    page.keyboard.press("Enter")
    expect(chats.nth(1)).to_contain_text("Boats & names")
    menu(page, chats.nth(2), "delete-chat")
    expect(chats).to_have_count(2)
    page.reload()
    expect(chats).to_have_text(["Which whales sing?", "Boats & names"])
    chats.nth(0).get_by_role("link").click()
    menu(page, chats.nth(0), "delete-chat")
    expect(page.get_by_test_id("welcome")).to_be_visible()
    page.get_by_test_id("undo").click()
    expect(chats).to_have_text(["Which whales sing?", "Boats & names"])
    chats.nth(0).get_by_role("link").click()
    expect(page.get_by_test_id("answer-text")).to_contain_text("pleated throat")


def test_a_hit_leads_to_its_message_on_its_branch(page: Page) -> None:
    ask(page, "hello")
    ask(page, "first: the narwhal")
    questions = page.get_by_test_id("question")
    questions.last.hover()
    questions.last.get_by_test_id("edit").click()
    page.get_by_test_id("edit-input").fill("second: the beluga")
    page.get_by_test_id("edit-send").click()
    expect(page.get_by_test_id("answer").last).to_have_attribute("data-status", "done")
    for _ in range(2):
        ask(page, "long")
    new_chat(page)
    for word, count in (("narwhal", 2), ("beluga", 4)):
        page.get_by_test_id("search-chats").fill(word)
        expect(page.get_by_test_id("match")).to_contain_text(word)
        page.get_by_test_id("chat").get_by_role("link").click()
        expect(questions).to_have_count(count)
        expect(questions.nth(1)).to_contain_text(word)
        expect(questions.nth(1)).to_be_in_viewport()


def test_export_and_import(page: Page, tmp_path: Path) -> None:
    ask(page, "markdown")
    page.get_by_test_id("thread-menu").click()
    with page.expect_download() as download:
        page.get_by_test_id("export-markdown").click()
    assert "krill_per_gulp" in Path(download.value.path()).read_text()
    page.get_by_test_id("thread-menu").click()
    with page.expect_download() as download:
        page.get_by_test_id("export-json").click()
    exported = tmp_path / "chat.json"
    download.value.save_as(exported)
    assert len(json.loads(exported.read_text())["messages"]) == 2
    bad = tmp_path / "bad.json"
    bad.write_text("{{{")
    page.get_by_test_id("import-input").set_input_files(bad)
    expect(page.get_by_test_id("toast")).to_contain_text("no exported conversation")
    page.get_by_test_id("import-input").set_input_files(exported)
    expect(page.get_by_test_id("chat")).to_have_count(2)
    expect(page.get_by_test_id("answer").locator("table")).to_be_visible()
