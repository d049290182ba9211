"""The chat page in a real browser, against a scripted server (scripted.py).

What a test, here or elsewhere, may rely on (`page.get_by_test_id(...)`):

    welcome  example                   the empty state and its example prompts
    input  send  stop  deepthink       the composer; `deepthink` carries aria-pressed and is there only if
                                       the model's entry in /v1/models has "thinking": true
    thread  question  answer           the conversation; `answer` has data-status = streaming | done |
                                       stopped | interrupted | error
    answer-text                        the rendered answer, without thinking and buttons
    thinking  thinking-toggle  thinking-text
    stats                              tokens, speed, cached tokens, under a finished answer
    copy-answer  regenerate  edit  edit-input  edit-send  code-block  copy-code
    fault  retry                       an error in its place in the conversation
    jump                               "jump to latest"
    sidebar  menu  hide-sidebar  new-chat  chat  delete-chat  toast  undo
    model  theme  settings-button  settings  temperature  max-tokens  system  forget-key
    key-dialog  key-input  key-save    asks for the API key after a 401
    notice                             above the composer: no server, no model, no storage
"""

from __future__ import annotations

import re
import time

from playwright.sync_api import Browser, Locator, Page, expect

from tests.web.scripted import MARKDOWN, ScriptedApi


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


def test_an_answer_is_streamed_rendered_and_counted(page: Page, api: ScriptedApi) -> None:
    expect(page.get_by_test_id("welcome")).to_contain_text("rorqual")
    expect(page.get_by_test_id("example")).to_have_count(3)
    expect(page.get_by_test_id("model")).to_have_text("rorqual-nano")
    api.pace_s = 0.01
    answer = ask(page, "markdown, please", None)
    expect(answer).to_have_attribute("data-status", "streaming")
    expect(page.get_by_test_id("stop")).to_be_visible()
    expect(answer).to_have_attribute("data-status", "done")
    expect(answer.locator("ol > li")).to_have_count(3)
    expect(answer.locator("tbody tr")).to_have_count(3)
    expect(answer.locator("td").nth(2)).to_have_css("text-align", "right")
    expect(answer.get_by_test_id("code-block").locator("code")).to_contain_text("def krill_per_gulp")
    expect(answer.get_by_test_id("stats")).to_contain_text(
        re.compile(r"\d+ tokens.*tokens/s.*32 of 52 prompt tokens from cache")
    )
    body = api.requests[0]
    assert body["model"] == "rorqual-nano" and body["stream"] is True
    assert body["thinking"] == {"type": "disabled"}
    assert "temperature" not in body and "max_tokens" not in body


def test_what_the_model_writes_can_do_nothing(page: Page) -> None:
    answer = ask(page, "markdown, please").get_by_test_id("answer-text")
    expect(answer.locator("img, script, iframe")).to_have_count(0)
    expect(answer).to_contain_text("<img src=x onerror=alert(1)>")
    link = answer.get_by_role("link", name="link", exact=True)
    expect(link).to_have_attribute("rel", "noopener noreferrer")
    expect(link).to_have_attribute("target", "_blank")
    expect(answer.locator("a[href^=javascript]")).to_have_count(0)


def test_the_page_can_load_nothing_from_elsewhere(browser: Browser, page_server: str) -> None:
    page = browser.new_page(base_url=page_server)
    page.goto("/")
    violated = "new Promise(done => { document.addEventListener('securitypolicyviolation', e => done(e.blockedURI));"
    assert "example.org" in page.evaluate(violated + "new Image().src = 'https://example.org/x.png' })")
    assert "example.org" in page.evaluate(violated + "fetch('https://example.org/').catch(() => 0) })")
    page.context.close()


def test_thinking_is_shown_timed_and_folded(page: Page, api: ScriptedApi) -> None:
    toggle = page.get_by_test_id("deepthink")
    expect(toggle).to_have_attribute("aria-pressed", "false")
    toggle.click()
    expect(toggle).to_have_attribute("aria-pressed", "true")
    api.pace_s = 0.1  # a thought of some seconds, so that a busy machine sees the timer run
    begun = time.monotonic()
    answer = ask(page, "think about it", None)
    button, text = answer.get_by_test_id("thinking-toggle"), answer.get_by_test_id("thinking-text")
    expect(button).to_contain_text(re.compile(r"Thinking… \d+ s"))
    expect(button).to_have_attribute("aria-expanded", "true")
    page.get_by_text(re.compile(r"Thinking… [1-9]\d* s")).wait_for()
    expect(text).to_contain_text("The question is")
    expect(answer).to_have_attribute("data-status", "done")
    expect(button).to_contain_text(re.compile(r"Thought for \d+ s"))
    told = re.search(r"Thought for (\d+) s", button.inner_text())
    assert told and 1 <= int(told[1]) <= time.monotonic() - begun + 1
    expect(button).to_have_attribute("aria-expanded", "false")
    expect(text).to_be_hidden()
    button.click()
    expect(text).to_contain_text("No other letter is.")
    expect(answer.get_by_test_id("stats")).to_contain_text("thinking)")
    assert api.requests[0]["thinking"] == {"type": "enabled"}
    # The next request repeats the answer without the reasoning; the toggle is remembered.
    ask(page, "go on")
    assert [m["role"] for m in api.requests[1]["messages"]] == ["user", "assistant", "user"]
    assert "The question is" not in str(api.requests[1])
    page.reload()
    expect(page.get_by_test_id("deepthink")).to_have_attribute("aria-pressed", "true")


def test_a_model_that_cannot_think_offers_no_toggle(page: Page, api: ScriptedApi) -> None:
    api.models[0]["thinking"] = False
    page.reload()
    expect(page.get_by_test_id("model")).to_be_visible()
    expect(page.get_by_test_id("deepthink")).to_have_count(0)
    ask(page, "hello")
    assert "thinking" not in api.requests[-1]


def test_stop_cancels_on_the_server_and_keeps_what_came(page: Page, api: ScriptedApi) -> None:
    answer = ask(page, "slow one", None)
    expect(answer).to_contain_text("word5")
    page.get_by_test_id("stop").click()
    expect(answer).to_have_attribute("data-status", "stopped")
    assert api.broken_off.wait(5), "the server did not see the client leave"
    expect(answer).to_contain_text("word5")
    expect(page.get_by_test_id("send")).to_be_visible()
    api.broken_off.clear()
    page.get_by_test_id("regenerate").click()
    expect(page.get_by_test_id("answer")).to_have_count(1)
    expect(answer).to_contain_text("word3")
    page.keyboard.press("Escape")
    expect(answer).to_have_attribute("data-status", "stopped")
    assert api.broken_off.wait(5), "Esc did not stop the server"


def test_enter_sends_and_shift_enter_breaks_the_line(page: Page, api: ScriptedApi) -> None:
    field = page.get_by_test_id("input")
    expect(page.get_by_test_id("send")).to_be_disabled()
    field.press_sequentially("one")
    field.press("Shift+Enter")
    field.press_sequentially("two")
    field.press("Enter")
    expect(page.get_by_test_id("question")).to_have_text("one\ntwo")
    expect(field).to_have_value("")
    expect(page.get_by_test_id("answer")).to_have_attribute("data-status", "done")
    assert api.requests[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]


def test_an_error_status_is_shown_in_place_and_can_be_retried(page: Page, api: ScriptedApi) -> None:
    api.fail_once = True
    answer = ask(page, "hello", "error")
    expect(answer.get_by_test_id("fault")).to_contain_text("The server is busy, try again later.")
    answer.get_by_test_id("retry").click()
    expect(answer).to_have_attribute("data-status", "done")
    expect(answer.get_by_test_id("fault")).to_have_count(0)
    expect(page.get_by_test_id("question")).to_have_count(1)


def test_a_stream_that_fails_or_breaks_keeps_what_came(page: Page) -> None:
    fault = ask(page, "fault", "error")
    expect(fault.get_by_test_id("answer-text")).to_have_text("This is as far as")
    expect(fault.get_by_test_id("fault")).to_contain_text("the engine ran out of memory")
    cut = ask(page, "cut", "interrupted")
    expect(cut.get_by_test_id("answer-text")).to_have_text("The connection will close after these words.")
    expect(cut.get_by_test_id("retry")).to_be_visible()
    expect(fault.get_by_test_id("retry")).to_have_count(0)  # only the last one can be


def test_a_server_that_wants_a_key_gets_it(page: Page, api: ScriptedApi) -> None:
    api.api_key = "sk-right"
    ask(page, "hello", "error")
    expect(page.get_by_test_id("key-dialog")).to_be_visible()
    page.get_by_test_id("key-input").fill("sk-wrong")
    page.get_by_test_id("key-save").click()
    expect(page.get_by_test_id("key-dialog")).to_contain_text("did not accept")
    page.get_by_test_id("key-input").fill("sk-right")
    page.get_by_test_id("key-save").click()
    expect(page.get_by_test_id("key-dialog")).to_be_hidden()
    expect(page.get_by_test_id("answer")).to_have_attribute("data-status", "done")
    page.reload()
    ask(page, "hello again")
    page.get_by_test_id("settings-button").click()
    page.get_by_test_id("forget-key").click()
    expect(page.get_by_test_id("key-dialog")).to_be_visible()


def test_chats_survive_a_reload_and_can_be_deleted(page: Page) -> None:
    ask(page, "Which whales are called rorquals, and why are they called by that name?")
    page.get_by_test_id("new-chat").click()
    expect(page.get_by_test_id("welcome")).to_be_visible()
    ask(page, "markdown")
    chats = page.get_by_test_id("chat")
    expect(chats).to_have_text(["markdown", "Which whales are called rorquals, and why are…"])
    page.reload()
    expect(chats).to_have_count(2)
    expect(page.get_by_test_id("answer").locator("table")).to_be_visible()
    chats.nth(1).get_by_role("link").click()
    expect(page.get_by_test_id("answer-text")).to_contain_text("pleated throat")
    page.get_by_test_id("delete-chat").nth(1).click(force=True)
    expect(chats).to_have_text(["markdown"])
    expect(page.get_by_test_id("welcome")).to_be_visible()
    page.get_by_test_id("undo").click()
    expect(chats).to_have_count(2)
    page.get_by_test_id("delete-chat").nth(1).click(force=True)
    page.reload()
    expect(chats).to_have_text(["markdown"])


def test_a_reload_in_mid_answer_keeps_it_as_interrupted(page: Page, api: ScriptedApi) -> None:
    expect(ask(page, "slow", None)).to_contain_text("word9")
    page.reload()
    answer = page.get_by_test_id("answer")
    expect(answer).to_have_attribute("data-status", "interrupted")
    expect(answer).to_contain_text("word9")
    assert api.broken_off.wait(5)


def test_a_chat_goes_on_while_another_is_looked_at(page: Page) -> None:
    ask(page, "slow", None)
    page.get_by_test_id("new-chat").click()
    ask(page, "hello")
    page.get_by_test_id("chat").nth(1).get_by_role("link").click()
    answer = page.get_by_test_id("answer")
    expect(answer).to_have_attribute("data-status", "streaming")
    expect(answer).to_contain_text("word20")
    page.get_by_test_id("stop").click()


def test_a_corrupt_or_full_storage_never_breaks_the_page(page: Page) -> None:
    page.evaluate(
        """() => { localStorage.setItem('rorqual.settings', '{{{');
                   localStorage.setItem('rorqual.chat.x', '[1,2');
                   localStorage.setItem('rorqual.chat.y', '{"id":"y","messages":[{"role":"assistant"},null]}') }"""
    )
    page.reload()
    expect(page.get_by_test_id("welcome")).to_be_visible()
    expect(page.get_by_test_id("chat")).to_have_count(0)
    page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') } }"
    )
    expect(ask(page, "hello")).to_contain_text("pleated throat")
    expect(page.get_by_test_id("notice")).to_contain_text("storage is full")
    page.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('no') } })")
    page.reload()
    page.get_by_test_id("new-chat").click()
    expect(ask(page, "hello")).to_contain_text("pleated throat")


def test_the_last_question_can_be_edited(page: Page, api: ScriptedApi) -> None:
    ask(page, "first")
    ask(page, "second")
    expect(page.get_by_test_id("edit")).to_have_count(1)
    page.get_by_test_id("question").last.hover()
    page.get_by_test_id("edit").click()
    page.keyboard.press("Escape")
    expect(page.get_by_test_id("question").last).to_have_text("second")
    page.get_by_test_id("edit").click(force=True)
    page.get_by_test_id("edit-input").fill("markdown instead")
    page.get_by_test_id("edit-send").click()
    expect(page.get_by_test_id("answer").last.locator("table")).to_be_visible()
    expect(page.get_by_test_id("question")).to_have_text(["first", "markdown instead"])
    expect(page.get_by_test_id("answer")).to_have_count(2)
    assert [m["content"] for m in api.requests[2]["messages"]][::2] == ["first", "markdown instead"]


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


def test_scrolling_follows_until_the_person_scrolls_up(page: Page, api: ScriptedApi) -> None:
    api.pace_s = 0.006
    answer = ask(page, "long", None)
    page.get_by_text("Paragraph 15").wait_for()
    distance = "el => el.scrollHeight - el.clientHeight - el.scrollTop"
    thread = page.get_by_test_id("thread")
    page.wait_for_timeout(100)
    assert thread.evaluate(distance) < 60
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
    page.wait_for_timeout(100)
    assert thread.evaluate(distance) < 60


def test_finished_messages_are_not_drawn_again(page: Page, api: ScriptedApi) -> None:
    api.pace_s = 0.001
    ask(page, "markdown")
    page.evaluate(
        """() => { window.changes = 0;
                   const seen = new MutationObserver(list => { window.changes += list.length });
                   const answer = document.querySelector('[data-testid=answer-text]');
                   seen.observe(answer, { subtree: true, childList: true, characterData: true, attributes: true }) }"""
    )
    ask(page, "long")
    assert page.evaluate("window.changes") == 0


def test_light_and_dark(page: Page) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) != "rgb(255, 255, 255)", "the system's wish is not followed"
    page.get_by_test_id("theme").click()
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.wait_for_timeout(500)
    page.reload()
    assert page.evaluate(background) == "rgb(255, 255, 255)", "the choice is not remembered"
    page.get_by_test_id("theme").click()
    expect(page.locator("html")).not_to_have_attribute("data-theme", re.compile(".*"))


def test_settings_go_with_the_request(page: Page, api: ScriptedApi) -> None:
    api.models.append({**api.models[0], "id": "rorqual-mini"})
    page.reload()
    page.get_by_test_id("model").select_option("rorqual-mini")
    page.get_by_test_id("settings-button").click()
    page.get_by_test_id("temperature").fill("0.7")
    page.get_by_test_id("max-tokens").fill("64")
    page.get_by_test_id("system").fill("Be brief.")
    page.keyboard.press("Escape")
    expect(page.get_by_test_id("settings")).to_be_hidden()
    ask(page, "hello")
    body = api.requests[-1]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("rorqual-mini", 0.7, 64)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_server_that_is_not_there(page: Page) -> None:
    page.route("**/v1/**", lambda route: route.abort())
    page.reload()
    expect(page.get_by_test_id("notice")).to_contain_text("cannot be reached")
    answer = ask(page, "hello", "error")
    expect(answer.get_by_test_id("fault")).to_contain_text("cannot be reached")
    page.unroute("**/v1/**")
    answer.get_by_test_id("retry").click()
    expect(answer).to_have_attribute("data-status", "done")
    expect(page.get_by_test_id("notice")).to_have_count(0)


def test_a_narrow_screen(browser: Browser, page_server: str) -> None:
    context = browser.new_context(
        base_url=page_server, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True
    )
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


def test_everything_has_a_name(page: Page) -> None:
    ask(page, "markdown")
    names = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, select, a')].filter(el =>
             !(el.textContent.trim() || el.ariaLabel || el.labels?.length)).map(el => el.outerHTML)"""
    )
    assert names == []
    expect(page.get_by_role("status").first).to_contain_text("Answer: The blue whale")
