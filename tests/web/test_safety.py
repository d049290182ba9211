"""Nothing that a model, a page of the web or a file name says becomes a script, and everyone can use the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.web.steps import ask, choose
from tests.web.world import SECRET, World, running

AXE = Path(__file__).resolve().parents[2] / "web" / "node_modules" / "axe-core" / "axe.min.js"
NASTY = "<script>window.hit=30</script><img src=x onerror=window.hit=31>"


def test_no_payload_runs(page: Page, world: World) -> None:
    first, second, third = world.found
    world.found = [
        replace(first, title=NASTY),
        replace(second, content=second.content + NASTY),
        replace(third, url="javascript:window.hit=32"),
    ]
    page.get_by_test_id("search-toggle").click()
    files = [{"name": f"{NASTY}.txt", "mimeType": "text/plain", "buffer": NASTY.encode()}]
    page.get_by_test_id("file-input").set_input_files(files)
    expect(page.get_by_test_id("file-chip")).to_contain_text("tokens")
    answer = ask(page, "xss " + NASTY)
    choose(page.get_by_test_id("open-sources"))
    for link in answer.get_by_role("link").all():
        assert (link.get_attribute("href") or "").startswith(("http:", "https:")), link.get_attribute("href")
    assert answer.locator("script, iframe, object, embed, [onerror], [onload], [onclick], [ontoggle]").count() == 0
    hrefs = page.get_by_test_id("sources").get_by_role("link").evaluate_all("links => links.map(l => l.protocol)")
    assert set(hrefs) <= {"https:", "http:"}, hrefs
    for preview in answer.get_by_test_id("preview").all():
        preview.click()
        expect(page.get_by_test_id("preview-panel")).to_be_visible()
    page.get_by_test_id("chat").first.hover()
    page.wait_for_timeout(500)  # whatever would run has run
    assert page.evaluate("window.hit") is None


def test_what_the_model_writes_loads_nothing(page: Page) -> None:
    answer = ask(page, "markdown, please").get_by_test_id("answer-text")
    expect(answer.locator("img, script, iframe")).to_have_count(0)
    expect(answer).to_contain_text("<img src=x onerror=alert(1)>")
    link = answer.get_by_role("link", name="link", exact=True)
    expect(link).to_have_attribute("rel", "noopener noreferrer")
    expect(link).to_have_attribute("target", "_blank")


def test_the_page_can_load_nothing_from_elsewhere(browser: Browser, page_server: str) -> None:
    page = browser.new_page(base_url=page_server)
    page.goto("/")
    violated = "new Promise(done => { document.addEventListener('securitypolicyviolation', e => done(e.blockedURI));"
    assert "example.org" in page.evaluate(violated + "new Image().src = 'https://example.org/x.png' })")
    assert "example.org" in page.evaluate(violated + "fetch('https://example.org/').catch(() => 0) })")
    assert page.evaluate(violated + "const s = document.createElement('script'); s.textContent = 'window.hit = 1';"
                         "document.body.append(s) })") == "inline"  # fmt: skip
    page.context.close()


def seriously_wrong(page: Page, rule: str | None = None) -> list[str]:
    """What axe-core finds, minor and moderate findings aside."""
    if not AXE.is_file():
        pytest.fail("axe-core is not installed: run `npm ci` in web/.")
    page.evaluate(AXE.read_text())
    # Base UI's guards at the ends of a menu can be focused and are hidden on purpose: they hand the focus on.
    only = f", runOnly: {{ type: 'rule', values: ['{rule}'] }}" if rule else ""
    context = "{ exclude: ['[data-base-ui-focus-guard]'] }"
    found = page.evaluate(f"axe.run({context}, {{ resultTypes: ['violations'] {only} }}).then(r => r.violations)")
    return [
        f"{v['id']} ({v['impact']}): {node['target']} {node['html'][:200]} {node['failureSummary']}"
        for v in found
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"]
    ]


def settled(page: Page, shown: str) -> None:
    """Waits for what has been opened, and for the end of its transition: half-faded text has no contrast."""
    expect(page.get_by_test_id(shown).first).to_be_visible()
    ends = "document.getAnimations().filter(a => a.effect.getComputedTiming().endTime < Infinity).map(a => a.finished)"
    page.evaluate(f"Promise.allSettled({ends})")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
    rule = "color-contrast" if scheme == "dark" else None  # in the dark only the colours differ
    wrong = seriously_wrong(page, rule)
    ask(page, "markdown, please")
    ask(page, "maths")
    ask(page, "diagram")
    page.get_by_test_id("deepthink").click()
    page.get_by_test_id("search-toggle").click()
    ask(page, "search for whales")
    page.get_by_test_id("thinking-toggle").click()
    choose(page.get_by_test_id("citation").first)
    wrong += seriously_wrong(page, rule)
    page.get_by_test_id("panel-close").click()
    for opener, shown in (
        ("parameters-button", "parameters"),
        ("cost-price", "price"),
        ("settings-button", "theme-light"),
        ("model", "model-choice"),
    ):
        page.get_by_test_id(opener).click()
        settled(page, shown)
        wrong += seriously_wrong(page, rule)
        page.keyboard.press("Escape")
        expect(page.get_by_test_id(shown)).to_have_count(0)
    for key, shown in (("Control+k", "palette"), ("Control+/", "keys")):
        page.keyboard.press(key)
        settled(page, shown)
        wrong += seriously_wrong(page, rule)
        page.keyboard.press("Escape")
    assert not wrong, "\n".join(wrong)


def test_everything_has_a_name_and_the_end_is_spoken(page: Page) -> None:
    ask(page, "markdown")
    names = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, select, a')].filter(el =>
             !(el.textContent.trim() || el.ariaLabel || el.labels?.length || el.hidden)).map(el => el.outerHTML)"""
    )
    assert names == []
    expect(page.locator(".thread [role=status]")).to_contain_text("Answer: The blue whale")


def test_a_server_that_wants_a_key_gets_it(browser: Browser) -> None:
    with running(key=SECRET) as world:
        page = browser.new_page(base_url=world.url, locale="en-GB")
        page.goto("/")
        dialog = page.get_by_test_id("key-dialog")
        expect(dialog).to_be_visible()
        page.get_by_test_id("key-input").fill("sk-wrong")
        page.get_by_test_id("key-save").click()
        expect(dialog).to_contain_text("did not accept")
        page.get_by_test_id("key-input").fill(SECRET)
        page.get_by_test_id("key-save").click()
        expect(dialog).to_be_hidden()
        ask(page, "hello")
        page.reload()
        expect(page.get_by_test_id("answer")).to_have_attribute("data-status", "done")
        page.get_by_test_id("settings-button").click()
        page.get_by_test_id("forget-key").click()
        expect(dialog).to_be_visible()
        page.context.close()
