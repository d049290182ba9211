"""Measures the chat page in Chromium, after `make page`: sizes, first paint, scrolling, typing.

    python scripts/page_bench.py [--json benchmarks/page.json]

The server is the product's own with a scripted model (tests/web/world.py), everything on one machine and over loopback.
A task is one turn of the main thread, from Chromium's own trace, by the clock and by the processor time it took: on a
machine with other work the clock counts the others' turns too.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from playwright.sync_api import Browser, Page, sync_playwright

from tests.web.answers import MARKDOWN, MATHS
from tests.web.conftest import FLAGS, chromium
from tests.web.world import PAGE, World, running

MESSAGES = 10_000
BUDGET_BYTES = 350_000
KEYS = """() => { window.keys = [];
  new PerformanceObserver(list => list.getEntries().forEach(e => e.name === 'keydown' && window.keys.push(e.duration)))
    .observe({ type: 'event', durationThreshold: 16 }) }"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the chat page.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    told = parser.parse_args()
    load = os.getloadavg()[0]
    with running() as world, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        figures = {
            "kind": "page",
            "what": "the chat page in headless Chromium, scripted model, loopback",
            "when": time.strftime("%Y-%m-%d"),
            "hardware": {
                "cpu": _cpu(), "cores": os.cpu_count(), "browser": browser.version,
                "load_average_before": round(load, 2), "busy": load > 0.5,
            },
            "javascript": sizes(),
            "first_paint": first_paint(browser, world),
            "scroll": scroll(browser, world),
            "typing": typing(browser, world),
        }  # fmt: skip
        browser.close()
    print(json.dumps(figures, indent=2))
    if told.json:
        told.json.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["javascript"]["first_load_gzip_bytes"] > BUDGET_BYTES:  # type: ignore[index]
        sys.exit("the first load is over its budget")


def sizes() -> dict[str, Any]:
    """Bytes, gzipped: what index.html asks for, and what is fetched when it is needed."""
    first = set(re.findall(r'src="\./([^"]+\.js)"', (PAGE / "index.html").read_text()))
    files = {str(p.relative_to(PAGE)): len(gzip.compress(p.read_bytes())) for p in sorted(PAGE.rglob("*.js"))}
    lazy = {re.sub(r"^assets/|-[\w-]{8}(?=\.js)", "", name): size for name, size in files.items() if name not in first}
    styles = sum(len(gzip.compress(p.read_bytes())) for p in PAGE.glob("assets/index-*.css"))
    return {
        "first_load_gzip_bytes": sum(files[name] for name in first), "budget_gzip_bytes": BUDGET_BYTES,
        "lazy_gzip_bytes": lazy, "css_gzip_bytes": styles,
    }  # fmt: skip


def first_paint(browser: Browser, world: World, rounds: int = 5) -> dict[str, Any]:
    """From the start of the navigation, with an empty cache each time."""
    paints, usable = [], []
    for _ in range(rounds):
        page = browser.new_page(base_url=world.url)
        page.goto("/")
        page.get_by_test_id("model").wait_for()
        usable.append(page.evaluate("performance.now()"))
        paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        page.context.close()
    return {
        "first_contentful_paint_ms": round(statistics.median(paints)), "models_known_ms": round(statistics.median(usable)),
        "rounds": rounds,
    }  # fmt: skip


def long_chat(world: World) -> str:
    """A conversation of MESSAGES messages, as a person would import one."""
    exported: dict[str, Any] = _call(f"{world.url}/chats", {"id": "sample"})
    _call(f"{world.url}/chats/sample/messages", {"id": "q", "parent": None, "content": "hello", "answer": {"id": "a"}})
    while any(m["status"] == "running" for m in _call(f"{world.url}/chats/sample")["messages"]):
        time.sleep(0.05)
    exported = _call(f"{world.url}/chats/sample/export?format=json")
    question, answer = exported["messages"]
    texts = (
        "A short answer.",
        "Two paragraphs.\n\nThe second has **bold** words and `code`.",
        MARKDOWN[:900],
        MATHS[:300],
    )
    messages, parent = [], None
    for n in range(MESSAGES // 2):
        messages.append({**question, "id": f"q{n}", "parent": parent, "content": f"Question {n}: what about whales?"})
        messages.append({**answer, "id": f"a{n}", "parent": f"q{n}", "content": f"Answer {n}. {texts[n % len(texts)]}"})
        parent = f"a{n}"
    chat = {**exported, "id": "long", "title": "Ten thousand messages", "head": parent, "messages": messages}
    return str(_call(f"{world.url}/chats/import", chat)["id"])


@contextmanager
def tasks(browser: Browser, page: Page) -> Iterator[dict[str, Any]]:
    """Fills the dictionary at the end with what the page's main thread did meanwhile, in ms."""
    told: dict[str, Any] = {}
    browser.start_tracing(page=page, categories=["toplevel", "disabled-by-default-devtools.timeline"])
    try:
        yield told
    finally:
        events = json.loads(browser.stop_tracing())["traceEvents"]
        mains = {
            (e["pid"], e["tid"])
            for e in events
            if e.get("name") == "thread_name" and e["args"]["name"] == "CrRendererMain"
        }
        turns = [e for e in events if (e["pid"], e["tid"]) in mains and e["name"].endswith("RunTask") and "dur" in e]
        clock, processor = [e["dur"] / 1000 for e in turns], [e["tdur"] / 1000 for e in turns if "tdur" in e]
        told["tasks"] = len(turns)
        for name, times in (("clock", clock), ("processor", processor)):
            told[name] = {
                "longest_ms": round(max(times, default=0), 1),
                "longer_than_50_ms": sum(t > 50 for t in times),
            }


def scroll(browser: Browser, world: World) -> dict[str, Any]:
    """By the wheel through some two hundred messages, then in jumps over the whole length and back."""
    chat = long_chat(world)
    page = browser.new_page(base_url=world.url, viewport={"width": 1280, "height": 800})
    page.goto(f"/#/c/{chat}")
    page.get_by_test_id("thread").get_by_text(f"Answer {MESSAGES // 2 - 1}.").wait_for(timeout=60_000)
    opened = page.evaluate("performance.now()")
    page.wait_for_timeout(1500)
    page.get_by_test_id("thread").hover()
    with tasks(browser, page) as wheel:
        for _ in range(120):
            page.mouse.wheel(0, -400)
            page.wait_for_timeout(16)
    thread = page.get_by_test_id("thread")
    with tasks(browser, page) as jumps:
        for step in [n / 20 for n in range(20, -1, -1)] + [n / 20 for n in range(21)]:
            thread.evaluate("(el, f) => el.scrollTo(0, f * (el.scrollHeight - el.clientHeight))", step)
            page.wait_for_timeout(60)
    rows = page.locator(".row").count()
    page.context.close()
    return {
        "messages": MESSAGES, "opened_ms": round(opened), "rows_in_the_document": rows,
        "wheel": wheel, "jumps": jumps,
    }  # fmt: skip


def typing(browser: Browser, world: World) -> dict[str, Any]:
    """Keys struck every 60 ms while 200 tokens a second arrive; from the key to the frame that shows it."""
    world.pace_s = 1 / 280  # a sleep is longer than it says: 200 and more arrive
    page = browser.new_page(base_url=world.url, viewport={"width": 1280, "height": 800})
    page.goto("/")
    page.get_by_test_id("model").wait_for()
    page.get_by_test_id("input").fill("long")
    page.get_by_test_id("input").press("Enter")
    page.get_by_text("Paragraph 2:").wait_for()
    page.evaluate(KEYS)
    with tasks(browser, page) as main_thread:
        struck = _type(page, 40)
    slow = page.evaluate("window.keys")
    speed = page.get_by_test_id("cost").inner_text()
    page.context.close()
    world.reset()
    return {
        "keys": struck, "slower_than_16_ms": len(slow), "slowest_ms": max(slow, default=0),
        "median_ms": statistics.median([*slow, *[0] * (struck - len(slow))]), "tasks": main_thread,
        "shown": speed.replace("\n", " "),
    }  # fmt: skip


def _type(page: Page, keys: int) -> int:
    page.get_by_test_id("input").focus()
    for n in range(keys):
        page.keyboard.press("abcdefghij"[n % 10])
        page.wait_for_timeout(60)
    return keys


def _call(url: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=120) as answer:
        return json.load(answer)


def _cpu() -> str:
    try:
        return re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
