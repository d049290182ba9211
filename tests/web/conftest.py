"""Fixtures for the chat page: a browser, and the real server with scripted ends (world.py) for it to look at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.web.world import NotBuiltError, World, running

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("The page's tests need a browser: install chromium (Debian, Ubuntu: apt-get install chromium).")
    return path


@pytest.fixture(scope="session")
def _world() -> Iterator[World]:
    try:
        with running() as world:
            yield world
    except NotBuiltError as error:
        pytest.fail(str(error))


@pytest.fixture
def world(_world: World) -> World:
    """The two ends of the server, as they are at first, and no conversation in it."""
    _world.clear()
    _world.reset()
    return _world


@pytest.fixture
def page_server(world: World) -> str:
    """The base URL of a server that serves the page and the API."""
    return world.url


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


def watched(page: Page, url: str) -> list[str]:
    """What must not happen while the page is open: a script error, a request to any other host."""
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
    page.on(
        "request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else faults.append(f"request to {r.url}")
    )
    return faults


@pytest.fixture
def page(browser: Browser, page_server: str) -> Iterator[Page]:
    """The page, opened by someone who was never here before. A script error or a request to any other
    host fails the test."""
    context = browser.new_context(base_url=page_server, viewport={"width": 1280, "height": 800}, locale="en-GB")
    context.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    page = context.new_page()
    faults = watched(page, page_server)
    page.goto("/")
    expect(page.get_by_test_id("welcome")).to_be_visible()  # before that it hears no key
    yield page
    context.close()
    assert not faults, faults
