"""The chat page in a real browser, over the real server and the bundled model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.bundled import bundled_server


@pytest.fixture(scope="module")
def real_url() -> Iterator[str]:
    with bundled_server() as (url, _):
        yield url


@pytest.fixture
def page_server(real_url: str) -> str:
    return real_url


def ask(page: Page, text: str) -> None:
    page.get_by_test_id("input").fill(text)
    page.get_by_test_id("send").click()
    expect(page.get_by_test_id("answer").last).to_have_attribute("data-status", "done", timeout=60_000)


def test_the_bundled_model_answers_in_the_page(page: Page) -> None:
    ask(page, "Who are you?")
    expect(page.get_by_test_id("answer-text").last).to_contain_text("rorqual")
    expect(page.get_by_test_id("stats").last).to_contain_text("tokens/s")


def test_deepthink_shows_its_steps(page: Page) -> None:
    page.get_by_test_id("deepthink").click()
    expect(page.get_by_test_id("deepthink")).to_have_attribute("aria-pressed", "true")
    ask(page, "What is 12 + 35?")
    toggle = page.get_by_test_id("thinking-toggle").last
    if toggle.get_attribute("aria-expanded") != "true":
        toggle.click()
    expect(page.get_by_test_id("thinking-text").last).to_contain_text("12 + 35")
    expect(page.get_by_test_id("answer-text").last).not_to_be_empty()
