"""Every feature of the chat in a real browser, before the real server with a scripted model (world.py).

What a test, here or elsewhere, may rely on (`page.get_by_test_id(...)`):

    welcome  example                     the empty state and its example prompts
    input  send  stop  deepthink  search-toggle  attach  file-input  file-chip  remove-file   the composer
    cost  cost-price  price              tokens, cached share, speed and price, under the composer
    thread  question  answer             the conversation; `answer` has data-status = running | done | stopped |
                                         length | cut | error
    answer-text  stats  copy-answer  regenerate  continue  ending  fault  retry
    siblings  sibling-previous  sibling-next
    edit  edit-input  edit-send
    thinking  thinking-toggle  thinking-text  stop-thinking  edit-thought  thought-input  thought-go
    search  queries  open-sources  citation  sources  source  claim  verdicts
    code-block  copy-code  preview  preview-panel  preview-frame  tab-source  preview-download  panel-close
    formula  diagram  jump
    sidebar  menu  hide-sidebar  new-chat  search-chats  chat  match  chat-menu  rename  rename-input  pin
    export-markdown  export-json  delete-chat  toast  undo  more-chats  thread-menu
    model  model-choice  parameters-button  parameters  system  temperature  top_p  max-tokens
    settings-button  theme-light|dark|system  language-en|zh  import-input  shortcuts  forget-key
    palette  palette-input  palette-entry  keys
    key-dialog  key-input  key-save      asks for the API key after a 401
    notice                               above the composer: no server, no connection
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.web.answers import MARKDOWN
from tests.web.world import Killable, World


def ask(page: Page, text: str, status: str | None = "done") -> Locator:
    """Sends a message and returns its answer, once it has the status (None: as soon as it is there)."""
    answers = page.get_by_test_id("answer")
    before = answers.count()
    page.get_by_test_id("input").fill(text)
    page.get_by_test_id("input").press("Enter")
    answer = answers.nth(before)
    if status is None:
        answer.wait_for()
    else:
        expect(answer).to_have_attribute("data-status", status, timeout=20_000)
    return answer


def menu(page: Page, row: Locator, item: str) -> None:
    """Chooses from the menu of a chat in the sidebar."""
    row.hover()
    row.get_by_test_id("chat-menu").click()
    page.get_by_test_id(item).click()


# ---- a conversation


def test_an_answer_is_streamed_rendered_and_counted(page: Page, world: World) -> None:
    expect(page.get_by_test_id("welcome")).to_contain_text("rorqual")
    expect(page.get_by_test_id("example")).to_have_count(3)
    world.pace_s = 0.004
    answer = ask(page, "markdown, please", None)
    expect(answer).to_have_attribute("data-status", "running")
    expect(page.get_by_test_id("stop")).to_be_visible()
    expect(answer).to_have_attribute("data-status", "done")
    expect(answer.locator("ol > li")).to_have_count(3)
    expect(answer.locator("tbody tr")).to_have_count(3)
    expect(answer.locator("td").nth(2)).to_have_css("text-align", "right")
    expect(answer.get_by_test_id("code-block").locator(".hljs-keyword").first).to_have_text("def")
    expect(answer.get_by_test_id("stats")).to_contain_text(re.compile(r"\d+ tokens.*tokens/s"))
    expect(page.get_by_test_id("cost")).to_contain_text(
        re.compile(r"\d+ in, \d+ out.*\d+% cached.*tokens/s.*\$0\.\d+ at ")
    )
    expect(page).to_have_title("markdown, please · rorqual")
    page.get_by_test_id("cost-price").click()
    page.get_by_test_id("price").last.click()
    expect(page.get_by_test_id("cost-price")).to_contain_text("R1")


def test_formulas_are_set_and_money_is_left_alone(page: Page) -> None:
    answer = ask(page, "maths of swimming")
    expect(answer.locator(".katex")).to_have_count(5)
    expect(answer.locator(".katex-display")).to_have_count(2)
    expect(answer.locator(".katex-error")).to_have_count(0)
    expect(answer).to_contain_text("A boat ticket costs $5 or $10, and $x$ in code")
    size = answer.locator(".katex .vlist").first.evaluate("el => el.getBoundingClientRect().height")
    assert size > 5, "KaTeX's styles are blocked"


def test_stop_keeps_what_came_and_continue_goes_on_from_there(page: Page, world: World) -> None:
    answer = ask(page, "slow one", None)
    expect(answer).to_contain_text("word5 ")
    page.get_by_test_id("stop").click()
    expect(answer).to_have_attribute("data-status", "stopped")
    expect(answer.get_by_test_id("ending")).to_contain_text("Stopped")
    answer.get_by_test_id("continue").click()
    expect(answer).to_have_attribute("data-status", "running")
    expect(answer).to_contain_text("word20")
    page.keyboard.press("Escape")
    expect(answer).to_have_attribute("data-status", "stopped")
    words = re.findall(r"word\d+", answer.get_by_test_id("answer-text").inner_text())
    assert words[:15] == [f"word{n}" for n in range(15)] and len(words) == len(set(words)), "words lost or doubled"
    expect(page.get_by_test_id("answer")).to_have_count(1)


def test_answering_again_and_editing_make_branches(page: Page) -> None:
    ask(page, "first question")
    page.get_by_test_id("regenerate").click()
    expect(page.get_by_test_id("siblings")).to_contain_text("2/2")
    expect(page.get_by_test_id("answer")).to_have_attribute("data-status", "done")
    ask(page, "second question")
    page.get_by_test_id("question").last.hover()
    page.get_by_test_id("edit").last.click()
    page.keyboard.press("Escape")
    expect(page.get_by_test_id("question").last).to_contain_text("second question")
    page.get_by_test_id("input").focus()
    page.keyboard.press("ArrowUp")
    page.get_by_test_id("edit-input").fill("markdown instead")
    page.get_by_test_id("edit-send").click()
    expect(page.get_by_test_id("answer").last.locator("table")).to_be_visible()
    question = page.get_by_test_id("question").last
    expect(question.get_by_test_id("siblings")).to_contain_text("2/2")
    question.get_by_test_id("sibling-previous").click()
    expect(question).to_contain_text("second question")
    expect(page.get_by_test_id("answer").last).to_contain_text("pleated throat")
    page.reload()  # the branch that was chosen is remembered
    expect(page.get_by_test_id("question").last).to_contain_text("second question")
    page.get_by_test_id("siblings").first.get_by_test_id("sibling-previous").click()
    expect(page.get_by_test_id("question")).to_have_count(1)


def test_a_cut_answer_says_so_and_goes_on(page: Page) -> None:
    page.get_by_test_id("parameters-button").click()
    page.get_by_test_id("max-tokens").fill("20")
    page.keyboard.press("Escape")
    answer = ask(page, "cut after some words", "length")
    expect(answer.get_by_test_id("ending")).to_contain_text("token limit")
    answer.get_by_test_id("continue").click()
    expect(answer).to_contain_text(re.compile(r"word9\b"))
    expect(answer).to_have_attribute("data-status", re.compile("length|done"))


def test_settings_belong_to_the_conversation(page: Page) -> None:
    page.get_by_test_id("parameters-button").click()
    page.get_by_test_id("system").fill("Be brief.")
    page.get_by_test_id("temperature").fill("0.7")
    page.keyboard.press("Escape")
    page.get_by_test_id("model").click()
    page.get_by_test_id("model-choice").filter(has_text="mini").click()
    ask(page, "hello")
    expect(page.get_by_test_id("stats")).to_contain_text("rorqual-mini")
    page.reload()
    expect(page.get_by_test_id("model")).to_contain_text("rorqual-mini")
    page.get_by_test_id("parameters-button").click()
    expect(page.get_by_test_id("system")).to_have_value("Be brief.")
    expect(page.get_by_test_id("temperature")).to_have_value("0.7")


# ---- nothing is lost


def test_a_reload_in_mid_answer_loses_nothing(page: Page) -> None:
    answer = ask(page, "slow", None)
    expect(answer).to_contain_text("word9 ")
    page.reload()
    expect(answer).to_have_attribute("data-status", "running")
    expect(answer).to_contain_text("word30")
    page.get_by_test_id("stop").click()
    words = re.findall(r"word\d+", answer.get_by_test_id("answer-text").inner_text())
    assert words == [f"word{n}" for n in range(len(words))]


def test_a_lost_connection_is_taken_up_again(page: Page) -> None:
    page.route("**/events*", lambda route: route.abort())
    answer = ask(page, "slow", None)
    expect(page.get_by_test_id("notice")).to_contain_text("connection is lost")
    page.unroute("**/events*")
    expect(answer).to_contain_text("word12 ")
    expect(page.get_by_test_id("notice")).to_have_count(0)
    page.get_by_test_id("stop").click()
    words = re.findall(r"word\d+", answer.get_by_test_id("answer-text").inner_text())
    assert words == [f"word{n}" for n in range(len(words))]


def test_a_chat_goes_on_while_another_is_looked_at(page: Page) -> None:
    ask(page, "slow", None)
    page.get_by_test_id("new-chat").click()
    ask(page, "hello")
    page.get_by_test_id("chat").nth(1).get_by_role("link").click()
    answer = page.get_by_test_id("answer")
    expect(answer).to_have_attribute("data-status", "running")
    expect(answer).to_contain_text("word20")
    page.get_by_test_id("stop").click()


def test_a_draft_survives(page: Page) -> None:
    page.get_by_test_id("input").fill("half a thou")
    page.reload()
    expect(page.get_by_test_id("input")).to_have_value("half a thou")
    page.get_by_test_id("input").fill("")
    ask(page, "hello")
    page.get_by_test_id("input").fill("more to")
    page.get_by_test_id("new-chat").click()
    expect(page.get_by_test_id("input")).to_have_value("")
    page.get_by_test_id("chat").get_by_role("link").click()
    expect(page.get_by_test_id("input")).to_have_value("more to")


def test_an_unreachable_server_costs_no_question(page: Page) -> None:
    page.route("**/chats/**", lambda route: route.abort())
    page.route("**/chats", lambda route: route.abort())
    answer = ask(page, "do not lose me", "error")
    expect(answer.get_by_test_id("fault")).to_contain_text("cannot be reached")
    page.unroute_all()
    answer.get_by_test_id("retry").click()
    expect(answer).to_have_attribute("data-status", "done")
    expect(page.get_by_test_id("question")).to_have_count(1)


def test_a_killed_server_leaves_a_cut_answer_that_goes_on(browser: Browser, tmp_path: Path) -> None:
    server = Killable(tmp_path)
    page = browser.new_page(locale="en-GB")
    try:
        page.goto(server.start())
        answer = ask(page, "slow", None)
        expect(answer).to_contain_text("word8 ")
        server.kill()
        expect(page.get_by_test_id("notice")).to_contain_text("connection is lost")
        server.start()
        expect(answer).to_have_attribute("data-status", "cut")
        expect(answer.get_by_test_id("ending")).to_contain_text("the server stopped")
        answer.get_by_test_id("continue").click()
        expect(answer).to_contain_text("word25 ")
        page.get_by_test_id("stop").click()
        expect(answer).to_have_attribute("data-status", "stopped")
        words = re.findall(r"word\d+", answer.get_by_test_id("answer-text").inner_text())
        assert words == [f"word{n}" for n in range(len(words))]
    finally:
        page.context.close()
        server.kill()


def test_a_refused_answer_can_be_retried(page: Page, world: World) -> None:
    world.refuse = True
    answer = ask(page, "hello", "error")
    expect(answer.get_by_test_id("fault")).to_contain_text("will not answer this")
    world.refuse = False
    answer.get_by_test_id("retry").click()
    expect(page.get_by_test_id("answer")).to_have_attribute("data-status", "done")


def test_an_engine_that_fails_keeps_what_came(page: Page) -> None:
    answer = ask(page, "fault", "error")
    expect(answer.get_by_test_id("answer-text")).to_contain_text("This is")
    expect(answer.get_by_test_id("retry")).to_be_visible()


# ---- thinking


def test_thinking_is_shown_timed_counted_and_folded(page: Page, world: World) -> None:
    toggle = page.get_by_test_id("deepthink")
    expect(toggle).to_have_attribute("aria-pressed", "false")
    page.keyboard.press("Alt+t")
    expect(toggle).to_have_attribute("aria-pressed", "true")
    world.pace_s = 0.05
    answer = ask(page, "think about it", None)
    button, text = answer.get_by_test_id("thinking-toggle"), answer.get_by_test_id("thinking-text")
    expect(button).to_contain_text(re.compile(r"Thinking… [1-9]\d* s.*\d+ tokens"))
    expect(button).to_have_attribute("aria-expanded", "true")
    expect(text).to_contain_text("The question is")
    world.pace_s = 0.001
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
    world.pace_s = 0.05
    answer = ask(page, "think slowly", None)
    expect(answer.get_by_test_id("thinking-text")).to_contain_text("The question is")
    world.gate.clear()
    answer.get_by_test_id("stop-thinking").click()
    world.gate.set()
    world.pace_s = 0.001
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


# ---- search


def test_search_cites_and_checks(page: Page, world: World) -> None:
    page.get_by_test_id("search-toggle").click()
    expect(page.get_by_test_id("search-toggle")).to_have_attribute("aria-pressed", "true")
    world.gate.clear()
    answer = ask(page, "search the blue whale", None)
    strip = answer.get_by_test_id("search")
    expect(strip).to_have_attribute("data-phase", "queries")
    world.gate.set()
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
    answer.get_by_test_id("open-sources").click()
    expect(drawer).to_be_visible()


def test_a_search_that_fails_says_so_and_the_answer_comes(page: Page, world: World) -> None:
    world.search_fails = True
    page.get_by_test_id("search-toggle").click()
    answer = ask(page, "search the blue whale")
    expect(answer.get_by_test_id("search")).to_contain_text("Search failed")
    expect(answer.get_by_test_id("answer-text")).to_contain_text("blue whale")


# ---- live preview


def test_html_runs_beside_the_conversation_and_reaches_nothing(page: Page) -> None:
    answer = ask(page, "page with a pond")
    answer.get_by_test_id("preview").click()
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
    answer.get_by_test_id("preview").click()
    expect(page.frame_locator("[data-testid=preview-frame]").locator("svg")).to_be_visible()
    svg = ask(page, "svg please")
    svg.get_by_test_id("preview").click()
    expect(page.frame_locator("[data-testid=preview-frame]").locator("svg circle")).to_be_visible()


# ---- attachments


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
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    expect(page.get_by_test_id("drop")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.get_by_test_id("file-chip")).to_contain_text("dropped.txt")
    expect(page.get_by_test_id("drop")).to_have_count(0)
    page.evaluate(
        """() => { const data = new DataTransfer(); data.items.add(new File(['hello'], 'pasted.txt'));
                   const event = new ClipboardEvent('paste', { clipboardData: data, bubbles: true, cancelable: true });
                   document.querySelector('.composer textarea').dispatchEvent(event) }"""
    )
    expect(page.get_by_test_id("file-chip")).to_have_count(2)


# ---- the sidebar


def test_chats_are_found_renamed_pinned_and_deleted(page: Page) -> None:
    for text in ("Which whales sing?", "markdown", "A name for a boat"):
        ask(page, text)
        page.get_by_test_id("new-chat").click()
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


# ---- for everyone


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
    answer.get_by_test_id("copy-code").click()
    expect(answer.get_by_test_id("copy-code")).to_have_text("Copied")
    code = page.evaluate("navigator.clipboard.readText()")
    assert code.startswith("def krill_per_gulp") and code.rstrip().endswith("krill_per_litre)")
    answer.get_by_test_id("copy-answer").click()
    expect(answer.get_by_test_id("copy-answer")).to_have_attribute("aria-label", "Copied")
    assert page.evaluate("navigator.clipboard.readText()").strip() == MARKDOWN.strip()


def test_scrolling_follows_until_the_person_scrolls_up(page: Page, world: World) -> None:
    world.pace_s = 0.004
    answer = ask(page, "long", None)
    page.get_by_text("Paragraph 15").wait_for()
    distance = "el => el.scrollHeight - el.clientHeight - el.scrollTop"
    thread = page.get_by_test_id("thread")
    page.wait_for_function("() => { const el = document.querySelector('.scroll');"
                           "return el.scrollHeight - el.clientHeight - el.scrollTop < 60 }")  # fmt: skip
    expect(page.get_by_test_id("jump")).to_have_count(0)
    thread.hover()
    page.mouse.wheel(0, -300)
    expect(page.get_by_test_id("jump")).to_be_visible()
    top = thread.evaluate("el => el.scrollTop")
    page.get_by_text("Paragraph 22").wait_for(state="attached")
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
    page.get_by_test_id("new-chat").click()
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
