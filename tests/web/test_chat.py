"""Conversations in a real browser, before the real server with a scripted model (world.py)."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, expect

from tests.web.steps import ask, new_chat
from tests.web.world import Killable, World


def test_an_answer_is_streamed_rendered_and_counted(page: Page, world: World) -> None:
    expect(page.get_by_test_id("welcome")).to_contain_text("rorqual")
    expect(page.get_by_test_id("example")).to_have_count(3)
    world.pause_at = 50
    answer = ask(page, "markdown, please", None)
    expect(answer).to_have_attribute("data-status", "running")
    expect(page.get_by_test_id("stop")).to_be_visible()
    expect(answer).to_contain_text("Three of its relatives")
    world.go_on()
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
    # The last one may be cut in the middle: a tokenizer may have a token for each digit.
    words = re.findall(r"word\d+(?= )", answer.get_by_test_id("answer-text").inner_text())
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


def test_what_is_pressed_while_an_answer_grows_is_what_is_released(page: Page, world: World) -> None:
    """The page follows the answer, but not from under a pressed pointer."""
    page.set_viewport_size({"width": 1280, "height": 560})
    ask(page, "first question")
    page.get_by_test_id("input").focus()
    page.keyboard.press("ArrowUp")
    page.get_by_test_id("edit-input").fill("slow one")
    page.get_by_test_id("edit-send").click()
    question, answer = page.get_by_test_id("question"), page.get_by_test_id("answer")
    expect(answer).to_contain_text("word60 ")
    world.gate.clear()  # for aiming
    page.wait_for_function("() => new Promise(done => { const el = document.querySelector('.scroll');"
                           "const top = el.scrollTop; setTimeout(() => done(el.scrollTop === top), 300) })")  # fmt: skip
    question.get_by_test_id("sibling-previous").hover()
    page.mouse.down()
    world.go_on()
    expect(answer).to_contain_text("word120 ")
    page.mouse.up()
    expect(question).to_contain_text("first question")


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
    page.get_by_test_id("model-choice").filter(has_text="another").click()
    ask(page, "hello")
    expect(page.get_by_test_id("stats")).to_contain_text("another-model")
    page.reload()
    expect(page.get_by_test_id("model")).to_contain_text("another-model")
    page.get_by_test_id("parameters-button").click()
    expect(page.get_by_test_id("system")).to_have_value("Be brief.")
    expect(page.get_by_test_id("temperature")).to_have_value("0.7")


def every_word_in_its_place(answer: Locator) -> None:
    """But for the last one, which may be cut: a tokenizer may give each digit a token."""
    words = re.findall(r"word\d+(?=\s)", answer.get_by_test_id("answer-text").inner_text())
    assert len(words) > 8 and words == [f"word{n}" for n in range(len(words))]


def test_a_reload_in_mid_answer_loses_nothing(page: Page) -> None:
    answer = ask(page, "slow", None)
    expect(answer).to_contain_text("word9 ")
    page.reload()
    expect(answer).to_have_attribute("data-status", "running")
    expect(answer).to_contain_text("word30")
    page.get_by_test_id("stop").click()
    expect(answer).to_have_attribute("data-status", "stopped")
    every_word_in_its_place(answer)


def test_a_lost_connection_is_taken_up_again(page: Page) -> None:
    page.route("**/events*", lambda route: route.abort())
    answer = ask(page, "slow", None)
    expect(page.get_by_test_id("notice")).to_contain_text("connection is lost")
    page.unroute("**/events*")
    expect(answer).to_contain_text("word12 ")
    expect(page.get_by_test_id("notice")).to_have_count(0)
    page.get_by_test_id("stop").click()
    expect(answer).to_have_attribute("data-status", "stopped")
    every_word_in_its_place(answer)


def test_a_chat_goes_on_while_another_is_looked_at(page: Page) -> None:
    ask(page, "slow", None)
    new_chat(page)
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
    new_chat(page)
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
        every_word_in_its_place(answer)
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
