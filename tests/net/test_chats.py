"""Conversations over HTTP against a scripted engine: asked, streamed, stopped, continued, branched, found, exported."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import insert

from rorqual.data.tokenizer import Tokenizer
from rorqual.serve import database
from rorqual.serve.app import Settings
from rorqual.serve.chats.shapes import title_of, utf16
from rorqual.serve.chats.store import ChatStore
from rorqual.serve.chats.tables import MESSAGES
from rorqual.serve.chats.work import Work
from rorqual.serve.database import database_url, writing
from rorqual.serve.keys import KeyStore, Limits
from tests.net.chatting import Frames, Page, heard, new
from tests.net.harness import Gate, eventually, running


@pytest.fixture(scope="module")
def shared(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Page]:
    url = pytestconfig.getoption("--database") or database_url(tmp_path_factory.mktemp("chats"))
    with (
        running(tokenizer, Settings(database_url=url, heartbeat_s=0.2), context=8192) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        yield Page(server, http)


@pytest.fixture
def page(shared: Page) -> Iterator[Page]:
    """One server for many tests; whatever they did, no answer may be left running."""
    yield shared
    assert eventually(lambda: not shared.server.engine.live)


# ---- asking and listening ---------------------------------------------------------------------------------------


def test_a_question_is_answered_and_kept(page: Page) -> None:
    page.server.script("It eats krill.", thought="What does it eat?")
    chat = page.chat(thinking=True)
    question, answer = page.ask(chat, "What does a whale eat?")
    frames = list(page.frames(chat, answer))
    assert frames[0][1]["type"] == "state"
    assert heard(frames) == ("What does it eat?", "It eats krill.")
    found = page.call("GET", f"/chats/{chat}")
    assert found["title"] == "What does a whale eat?" and found["head"] == answer
    assert [m["id"] for m in found["messages"]] == [question, answer]
    kept = found["messages"][1]
    assert (kept["status"], kept["thinking"], kept["content"]) == ("done", "What does it eat?", "It eats krill.")
    usage = kept["usage"]
    assert usage["completion_tokens"] > usage["reasoning_tokens"] == kept["thinking_tokens"] > 0
    assert usage["prompt_tokens"] > 0 and usage["requests"] == 1 and kept["thinking_s"] >= 0
    assert kept["settings"]["thinking"] and kept["model"] == "tiny"


def test_nobody_listens_and_the_answer_is_there(page: Page, gate: Gate) -> None:
    page.server.script("A whale of an answer.", gate=gate.wait)
    chat = page.chat()
    _, answer = page.ask(chat, "?")
    assert page.message(chat, answer)["status"] == "running"
    assert page.call("GET", "/chats")["chats"][0]["running"]
    early = {"id": new(), "parent": answer, "content": "?", "answer": {"id": new()}}
    assert "still being written" in page.call("POST", f"/chats/{chat}/messages", early, status=409)["error"]["message"]
    gate.open()
    assert page.ended(chat, answer)["content"] == "A whale of an answer."
    assert not page.call("GET", "/chats")["chats"][0]["running"]


class Steps:
    """Lets a script through one output at a time."""

    def __init__(self) -> None:
        self._allowed = threading.Semaphore(0)
        self.open = False

    def let(self, outputs: int) -> None:
        for _ in range(outputs):
            self._allowed.release()

    async def wait(self) -> None:
        import asyncio

        while not self.open and not self._allowed.acquire(blocking=False):
            await asyncio.sleep(0.002)


def listen(page: Page, chat: str, answer: str, into: Frames) -> threading.Thread:
    thread = threading.Thread(target=lambda: into.extend(page.frames(chat, answer)), daemon=True)
    thread.start()
    return thread


def test_two_listeners_and_one_that_left_and_came_back_hear_the_same(page: Page) -> None:
    steps = Steps()
    said = "One two three four five six seven eight nine ten."
    page.server.script(said, thought="Count, then.", gate=steps.wait)
    chat = page.chat(thinking=True)
    _, answer = page.ask(chat, "Count.")
    first: Frames = []
    second: Frames = []
    threads = [listen(page, chat, answer, first)]
    steps.let(12)
    assert eventually(lambda: any(f["type"] == "thinking" for _, f in first) or heard(first)[0])
    early: Frames = []
    for frame in page.frames(chat, answer):  # leaves in the middle
        early.append(frame)
        break
    threads.append(listen(page, chat, answer, second))
    steps.let(6)
    steps.open = True
    late = list(page.frames(chat, answer, after=early[-1][0]))
    for thread in threads:
        thread.join(20)
    assert heard(first) == heard(second) == heard(late) == ("Count, then.", said)
    for frames in (first, second, late):
        positions = [int(position) for position, _ in frames]
        assert positions == sorted(positions)
        without_end = [f for f in frames if f[1]["type"] != "end"]
        assert heard(without_end) == ("Count, then.", said), "the deltas alone must say it all"
    ended = list(page.frames(chat, answer, after="3"))
    assert [f["type"] for _, f in ended] == ["state"] and ended[0][1]["message"]["status"] == "done"


def test_what_has_ended_never_runs_again(page: Page) -> None:
    """Whoever asks just when an answer ends is told one thing by every route, and the next question sees all of it."""
    page.server.script("One two three four five six seven.")
    chat = page.chat()
    leaf = None
    for _ in range(15):
        _, answer = page.ask(chat, "?", leaf)
        while page.message(chat, answer)["status"] == "running":
            pass
        assert page.message(chat, answer)["status"] == "done"
        assert page.call("GET", f"/chats/{chat}")["messages"][-1]["status"] == "done"
        leaf = answer
    page.asked(chat, "?", leaf)
    assert page.prompt().count("One two three four five six seven.") == 15


def test_a_slow_write_in_the_middle_does_not_undo_the_end(
    page: Page, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, begun, release = Work.save, threading.Event(), threading.Event()

    def slow(self: Work, message: Any) -> str | None:
        begun.set()
        assert release.wait(20)
        return save(self, message)

    monkeypatch.setattr(Work, "save", slow)
    page.server.script("The whole of it.", gate=gate.wait)
    chat = page.chat()
    _, answer = page.ask(chat, "?")
    assert begun.wait(20)  # with nothing of the answer yet
    gate.open()
    assert eventually(lambda: not page.server.engine.live)
    release.set()
    page.ended(chat, answer)
    store: ChatStore = page.server.server.config.app.state.chats.store
    assert store.message("local", chat, answer).content == "The whole of it."
    assert eventually(lambda: store.message("local", chat, answer).status == "done")
    assert store.message("local", chat, answer).content == "The whole of it."


def test_silence_is_filled_with_pings(page: Page, gate: Gate) -> None:
    page.server.script("now", gate=gate.wait)
    chat = page.chat()
    _, answer = page.ask(chat, "?")
    with page.http.stream("GET", f"/chats/{chat}/messages/{answer}/events") as response:
        for line in response.iter_lines():
            if line == ": ping":
                break
    gate.open()
    page.ended(chat, answer)


def test_a_repeated_request_does_its_work_once(page: Page, gate: Gate) -> None:
    page.server.script("once", gate=gate.wait)
    chat = page.chat()
    before = len(page.server.engine.seen)
    question, answer = new(), new()
    body = {"id": question, "parent": None, "content": "?", "answer": {"id": answer}}
    path = f"/chats/{chat}/messages"
    with httpx.Client(base_url=page.server.url, timeout=30) as other:
        told = [client.post(path, json=body) for client in (page.http, other, page.http)]
    gate.open()
    assert {r.status_code for r in told} == {200} and len({r.json()["answer"]["id"] for r in told}) == 1
    page.ended(chat, answer)
    page.call("POST", path, body)
    page.call("POST", f"/chats/{chat}/answers", {"id": answer, "parent": question})
    assert len(page.server.engine.seen) == before + 1
    assert len(page.call("GET", f"/chats/{chat}")["messages"]) == 2
    for changed in ({"content": "!"}, {"parent": answer}):
        error = page.call("POST", path, body | changed, status=409)["error"]
        assert error["code"] == "conflict"
    page.call("POST", f"/chats/{chat}/answers", {"id": question, "parent": question}, status=409)
    assert page.call("POST", "/chats", {"id": chat})["id"] == chat  # a chat is made once, too


def test_the_same_request_many_times_at_once_does_its_work_once(page: Page) -> None:
    page.server.script("once")
    before = len(page.server.engine.seen)
    chat = new()
    body = {"id": new(), "parent": None, "content": "?", "answer": {"id": new()}}

    def send(_: int) -> tuple[int, int]:
        with httpx.Client(base_url=page.server.url, timeout=30) as http:
            made = http.post("/chats", json={"id": chat}).status_code
            return made, http.post(f"/chats/{chat}/messages", json=body).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(send, range(8))) == {(200, 200)}
    page.ended(chat, body["answer"]["id"])  # type: ignore[index]
    assert len(page.server.engine.seen) == before + 1
    assert len(page.call("GET", f"/chats/{chat}")["messages"]) == 2


def test_the_next_question_shows_the_whole_branch_and_no_thought(page: Page) -> None:
    page.server.script("Krill [citation:3].", thought="hm")
    chat = page.chat(thinking=True, system="Be brief.")
    _, first = page.asked(chat, "What?")
    page.asked(chat, "Why?", first["id"])
    assert page.prompt() == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>What?<｜Assistant｜></think>Krill .<｜end▁of▁sentence｜>"
        "<｜User｜>Why?<｜Assistant｜><think>"
    )


def test_parameters_of_the_chat_and_of_one_answer(page: Page) -> None:
    page.server.script("ok")
    chat = page.chat(temperature=0.25, top_p=0.5, max_tokens=7)
    question, _ = page.asked(chat, "?")
    params = page.server.engine.seen[-1].params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.25, 0.5, 7)
    other = page.again(chat, question, settings={"temperature": 1.5, "thinking": True})
    params = page.server.engine.seen[-1].params
    assert (params.temperature, params.top_p, params.max_tokens) == (1.5, 0.5, 7)
    assert other["settings"]["thinking"] and page.prompt().endswith("<think>")
    page.call("POST", "/chats", {"id": new(), "settings": {"temprature": 1}}, status=400)


# ---- stopping and going on --------------------------------------------------------------------------------------


def test_stopping_keeps_what_there_is_and_going_on_continues_it(page: Page) -> None:
    steps = Steps()
    page.server.script("One two three four five.", gate=steps.wait)
    chat = page.chat()
    _, answer = page.ask(chat, "Count.")
    steps.let(8)
    assert eventually(lambda: len(page.message(chat, answer)["content"]) > 3)
    stopped = page.call("POST", f"/chats/{chat}/messages/{answer}/stop", {})
    assert stopped["status"] == "stopped" and stopped["content"] and stopped["usage"]["completion_tokens"] > 0
    assert eventually(lambda: not page.server.engine.live)
    assert page.message(chat, answer) == stopped
    rest = "One two three four five."[len(stopped["content"]) :]
    page.server.script(rest)
    going = page.call("POST", f"/chats/{chat}/messages/{answer}/continue")
    assert going["id"] == answer and going["status"] == "running"
    ended = page.ended(chat, answer)
    assert (ended["status"], ended["content"]) == ("done", "One two three four five.")
    assert page.prompt().endswith("<｜Assistant｜></think>" + stopped["content"])
    assert ended["usage"]["completion_tokens"] > stopped["usage"]["completion_tokens"]
    assert ended["usage"]["requests"] == 2
    page.call("POST", f"/chats/{chat}/messages/{answer}/continue", {}, status=409)  # it is complete


def test_an_answer_cut_at_its_limit_goes_on_in_its_thought(page: Page) -> None:
    page.server.script("unheard", thought="a long thought that does not end in time")
    chat = page.chat(thinking=True, max_tokens=5)
    _, answer = page.asked(chat, "?")
    assert answer["status"] == "length" and answer["thinking"] and not answer["content"]
    page.server.script("at last", thought=" and ends")
    page.call("PATCH", f"/chats/{chat}", {"settings": {"max_tokens": None}})
    page.call("POST", f"/chats/{chat}/messages/{answer['id']}/continue", {})
    ended = page.ended(chat, answer["id"])
    assert ended["thinking"].startswith(answer["thinking"]) and page.prompt().endswith("<think>" + answer["thinking"])


def test_stop_thinking_now(page: Page) -> None:
    steps = Steps()
    thought = "the whale the whale the whale the whale"
    page.server.script("unheard", thought=thought, gate=steps.wait)
    chat = page.chat(thinking=True)
    _, answer = page.ask(chat, "?")
    frames: Frames = []
    thread = listen(page, chat, answer, frames)
    steps.let(10)
    assert eventually(lambda: len(page.message(chat, answer)["thinking"] or "") > 5)
    page.server.script("Enough.")  # what the engine says to the next request
    told = page.call("POST", f"/chats/{chat}/messages/{answer}/stop", {"thinking": True})
    assert told["status"] == "running"
    thread.join(20)
    ended = page.ended(chat, answer)
    assert ended["status"] == "done" and ended["content"] == "Enough."
    assert thought.startswith(ended["thinking"]) and heard(frames) == (ended["thinking"], "Enough.")
    assert page.prompt().endswith(f"<think>{ended['thinking']}</think>")
    assert ended["usage"]["requests"] == 2 and ended["thinking_tokens"] > 0


def test_an_edited_thought_goes_on_as_a_sibling(page: Page) -> None:
    page.server.script("It is a fish.", thought="Whales are fish.")
    chat = page.chat(thinking=True)
    question, old = page.asked(chat, "Is it a fish?")
    path = f"/chats/{chat}/messages/{old['id']}/continue"
    page.server.script("No.", thought=" So the answer is no.")
    first = page.call("POST", path, {"id": new(), "thinking": "Whales are mammals."})
    ended = page.ended(chat, first["id"])
    assert ended["parent"] == question and ended["thinking"] == "Whales are mammals. So the answer is no."
    assert ended["content"] == "No." and page.prompt().endswith("<think>Whales are mammals.")
    page.server.script("it is none.")
    second = page.call("POST", path, {"id": new(), "thinking": "Short.", "content": ""})
    assert page.ended(chat, second["id"])["content"] == "it is none."
    assert page.prompt().endswith("<think>Short.</think>")
    third = page.call("POST", path, {"id": new(), "content": "I think "})
    assert page.ended(chat, third["id"])["content"] == "I think it is none."
    assert page.prompt().endswith("<think>Whales are fish.</think>I think ")
    assert page.message(chat, old["id"]) == old, "the old answer stays as it was"
    assert page.call("POST", path, {"id": third["id"], "content": "I think "})["id"] == third["id"]
    page.call("POST", path, {"thinking": "no id"}, status=400)
    found = page.call("GET", f"/chats/{chat}")
    assert found["head"] == third["id"] and len([m for m in found["messages"] if m["parent"] == question]) == 4


def test_an_error_is_told_and_another_answer_can_be_had(page: Page) -> None:
    page.server.script("One two three", fail_after=4)
    chat = page.chat()
    question, failed = page.asked(chat, "?")
    assert failed["status"] == "error" and failed["error"]["message"] and failed["content"]
    page.server.script("fine")
    again = page.again(chat, question)
    assert again["content"] == "fine" and again["parent"] == question
    page.server.engine.scripts[:] = []
    page.call("PATCH", f"/chats/{chat}", {"settings": {"model": "gone"}})
    unknown = page.again(chat, question)
    assert unknown["status"] == "error" and unknown["error"]["code"] == "model_not_found"
    long = page.again(chat, question, settings={"model": "tiny", "max_tokens": 100_000})
    assert long["error"]["code"] == "context_length_exceeded"


def test_branches(page: Page) -> None:
    page.server.script("a")
    chat = page.chat()
    _, a = page.asked(chat, "first")
    second, b = page.asked(chat, "second")  # an edited question: a sibling of the first
    page.asked(chat, "and then?", a["id"])
    assert "first" in page.prompt() and "second" not in page.prompt()
    page.call("PATCH", f"/chats/{chat}", {"head": b["id"]})
    assert page.call("GET", f"/chats/{chat}")["head"] == b["id"]
    page.call("PATCH", f"/chats/{chat}", {"head": "nobody"}, status=400)
    page.call("POST", f"/chats/{chat}/answers", {"id": new(), "parent": b["id"]}, status=404)  # not a question
    bad = {"id": new(), "parent": second, "content": "?", "answer": {"id": new()}}
    page.call("POST", f"/chats/{chat}/messages", bad, status=404)  # a question below a question


# ---- the list ---------------------------------------------------------------------------------------------------


def test_titles_drafts_pins_and_deleting(page: Page, gate: Gate) -> None:
    page.server.script("ok")
    chat = page.chat()
    page.asked(chat, "Tell me, at length, about the baleen whales of the southern ocean and what they eat in winter")
    told = page.call("PATCH", f"/chats/{chat}", {"draft": "half a", "pinned": True})
    assert told["title"] == "Tell me, at length, about the baleen whales of the southern…" and "messages" not in told
    page.chat()
    listed = page.call("GET", "/chats")["chats"]
    assert listed[0]["id"] == chat and listed[0]["pinned"] and page.call("GET", f"/chats/{chat}")["draft"] == "half a"
    page.call("PATCH", f"/chats/{chat}", {"title": "Wale", "pinned": False})
    _, again = page.asked(chat, "another first question")
    assert page.call("GET", f"/chats/{chat}")["title"] == "Wale"
    page.server.script("never", gate=gate.wait)
    page.ask(chat, "?", again["id"])
    assert eventually(lambda: page.server.engine.live)
    page.call("DELETE", f"/chats/{chat}", status=204)
    assert eventually(lambda: not page.server.engine.live)
    page.call("GET", f"/chats/{chat}", status=404)
    page.call("GET", "/chats/x y", status=404)


def test_search_finds_titles_and_messages_by_the_beginning_of_words(page: Page) -> None:
    page.server.script("🐋 Die Blauwale fressen Qrill, 鯨魚 is deep")
    chat = page.chat()
    _, answer = page.asked(chat, "zzyzx question")
    for query in ("blauw", "QRILL", "qrill fress", "鯨魚", "鯨", "zzyz"):
        [found] = page.call("GET", f"/chats?query={query}")["chats"]
        assert found["id"] == chat
    [found] = page.call("GET", "/chats?query=qrill")["chats"]
    text, [[start, end]] = found["match"]["text"], found["match"]["ranges"]
    assert text.encode("utf-16-le")[2 * start : 2 * end].decode("utf-16-le") == "Qrill"
    assert found["match"]["message"] == answer["id"]
    for query in ("blauw nothing", '"', "*", "a AND", "%", "_______", "- - -"):
        response = page.http.get("/chats", params={"query": query})
        assert response.status_code == 200 and chat not in [c["id"] for c in response.json()["chats"]]
    page.call("PATCH", f"/chats/{chat}", {"title": "Quux"})
    [found] = page.call("GET", "/chats?query=quux")["chats"]
    assert found["match"]["message"] is None
    page.call("DELETE", f"/chats/{chat}", status=204)
    assert page.call("GET", "/chats?query=blauw")["chats"] == []


def test_the_list_comes_in_pages(page: Page) -> None:
    ids = [page.chat() for _ in range(7)]
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        told = page.call("GET", f"/chats?limit=3&before={cursor}")
        seen += [c["id"] for c in told["chats"]]
        cursor = told["next"]
    assert len(seen) == len(set(seen)) and seen[:7] == ids[::-1]
    page.call("GET", "/chats?limit=0", status=400)


# ---- out and in -------------------------------------------------------------------------------------------------


def test_export_and_import(page: Page) -> None:
    page.server.script("**Krill**.", thought="what\ndo they eat")
    chat = page.chat(thinking=True)
    question, first = page.asked(chat, "What do\nthey eat?")
    second = page.again(chat, question)
    page.call("PATCH", f"/chats/{chat}", {"head": first["id"]})
    response = page.http.get(f"/chats/{chat}/export?format=markdown")
    assert response.headers["content-disposition"] == 'attachment; filename="what-do-they-eat.md"'
    assert response.text.count("**Krill**.") == 1 and "> do they eat" in response.text
    whole = page.http.get(f"/chats/{chat}/export?format=json").json()
    assert len(whole["messages"]) == 3
    copy = page.call("POST", "/chats/import", whole)
    assert copy["id"] != chat and copy["head"] == first["id"] and copy["title"] == whole["title"]
    same = ("id", "parent", "role", "content", "thinking", "status", "usage", "model", "created", "settings")
    for before, after in zip(whole["messages"], copy["messages"], strict=True):
        assert {k: before[k] for k in same} == {k: after[k] for k in same}
    page.asked(copy["id"], "go on", second["id"])  # it is a conversation like any other
    assert copy["id"] in [c["id"] for c in page.call("GET", "/chats?query=krill")["chats"]]
    for broken in (
        {**whole, "messages": whole["messages"][::-1]},
        {**whole, "messages": whole["messages"] + whole["messages"]},
        {**whole, "head": "nobody"},
        {"messages": []},
        {**whole, "messages": [{**whole["messages"][0], "role": "system"}]},
        {**whole, "messages": [{**whole["messages"][0], "status": "fine"}]},
        {**whole, "messages": [{**whole["messages"][0], "search": {"sources": [{"url": "http://a.test"}]}}]},
        {**whole, "messages": [{**whole["messages"][0], "search": "x"}]},
        {**whole, "messages": [{**whole["messages"][0], "checks": [{"start": -1}]}]},
        {**whole, "messages": [{**whole["messages"][0], "usage": {"prompt_tokens": "many"}}]},
    ):
        page.call("POST", "/chats/import", broken, status=400)
    page.call("GET", f"/chats/{chat}/export?format=pdf", status=400)
    source = {"n": 1, "url": "javascript:alert(1)", "title": "\u0000<script>", "more": 1}
    evil = {
        **whole["messages"][0],
        "role": "assistant",
        "parent": None,
        "search": {"sources": [source]},
        "content": "[citation:1]",
    }
    told = page.call("POST", "/chats/import", {**whole, "messages": [evil], "head": None, "settings": {"newer": 1}})
    assert told["messages"][0]["search"]["sources"][0]["url"] == "" and "javascript" not in str(told)
    assert page.http.get(f"/chats/{told['id']}/export").status_code == 200


# ---- whose they are ---------------------------------------------------------------------------------------------


def test_a_key_sees_its_own_chats_only(tokenizer: Tokenizer, tmp_path: Path, gate: Gate) -> None:
    url = database_url(tmp_path)
    secrets = [KeyStore(url).create(name, Limits(concurrency=1))[1] for name in ("a", "b")] + ["fixed"]
    with running(tokenizer, Settings(database_url=url, api_keys=("fixed",)), context=4096) as server:
        pages = [
            Page(server, httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {secret}"}, timeout=30))
            for secret in secrets
        ]
        assert httpx.get(f"{server.url}/chats").status_code == 401
        server.script("mine")
        chat = pages[0].chat()
        question, answer = pages[0].asked(chat, "secret words")
        for other in pages[1:]:
            assert (
                other.call("GET", "/chats")["chats"] == [] and other.call("GET", "/chats?query=secret")["chats"] == []
            )
            message = f"/chats/{chat}/messages/{answer['id']}"
            for method, path in (
                ("GET", f"/chats/{chat}"), ("DELETE", f"/chats/{chat}"), ("GET", f"/chats/{chat}/export"),
                ("GET", message), ("GET", f"{message}/events"), ("POST", f"{message}/stop"), ("POST", f"{message}/continue"),
            ):  # fmt: skip
                other.call(method, path, status=404)
            other.call("PATCH", f"/chats/{chat}", {"title": "x"}, status=404)
            other.call("POST", f"/chats/{chat}/answers", {"id": new(), "parent": question}, status=404)
            own = other.call("POST", "/chats", {"id": chat})  # the same id is another chat for them
            assert own["messages"] == []
            assert pages[0].call("GET", f"/chats/{chat}")["title"] == "secret words"
        server.script("held", gate=gate.wait)
        _, held = pages[0].ask(chat, "?", answer["id"])
        pages[0].call(
            "POST", f"/chats/{chat}/answers", {"id": new(), "parent": question}, status=429
        )  # still answering
        stopped = pages[0].call("POST", f"/chats/{chat}/messages/{held}/stop", {})  # ... which it may stop itself
        assert stopped["status"] == "stopped"
        gate.open()
        assert eventually(lambda: not server.engine.live)
        assert pages[0].again(chat, question)["status"] == "done"
        salts = {request.salt for request in server.engine.seen}
        assert len(salts) == 1 and salts != {""}
        for page in pages:
            page.http.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200), ({"host": "localhost:1"}, 200), ({"host": "[::1]:1"}, 200), ({"origin": "http://localhost:5173"}, 200),
        ({"host": "evil.example"}, 403), ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost@evil.example"}, 403), ({"origin": "https://evil.example"}, 403), ({"origin": "null"}, 403),
        ({"origin": "http://localhost.evil.example"}, 403),
    ],
)  # fmt: skip
def test_pages_of_other_sites_read_no_conversations(page: Page, headers: dict[str, str], status: int) -> None:
    """Without keys nothing else keeps a page that somebody visits from asking this machine."""
    assert page.http.get("/chats", headers=headers).status_code == status
    assert page.http.post("/chats", json={"id": "x"}, headers=headers).status_code == status


# ---- size -------------------------------------------------------------------------------------------------------


def test_ten_thousand_messages_load(page: Page, tmp_path: Path) -> None:
    chat = page.chat()
    store: ChatStore = page.server.server.config.app.state.chats.store
    with writing(store.engine) as connection:
        number = store.chat(connection, "local", chat)["n"]
        row = {"created": 1.0, "status": "done", "model": "", "worker": "", "wish": "", "content": "whale " * 60}
        rows: list[dict[str, Any]] = [
            {**row, "chat": number, "id": f"m{i}", "parent": f"m{i - 1}" if i else None,
             "role": "assistant" if i % 2 else "user"}
            for i in range(10_000)
        ]  # fmt: skip
        connection.execute(insert(MESSAGES), rows)
    found = page.call("GET", f"/chats/{chat}")  # within the client's timeout
    assert len(found["messages"]) == 10_000
    page.call("PATCH", f"/chats/{chat}", {"draft": "x"})
    _, answer = page.asked(chat, "too long", "m9999")
    assert answer["error"]["code"] == "context_length_exceeded"
    page.call("DELETE", f"/chats/{chat}", status=204)


def test_a_locked_database_is_a_503_and_costs_nothing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else holds the file: reading goes on, what would be written can be sent again, an answer is kept as soon as
    it can be."""
    monkeypatch.setattr(database, "BUSY_MS", 50)
    gate = Gate()
    with running(tokenizer, Settings(database_url=database_url(tmp_path)), context=4096) as server:
        page = Page(server, httpx.Client(base_url=server.url, timeout=30))
        server.script("kept", gate=gate.wait)
        chat = page.chat()
        _, answer = page.ask(chat, "?")
        assert eventually(lambda: server.engine.live)
        holder = sqlite3.connect(tmp_path / "rorqual.sqlite3", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        gate.open()
        assert eventually(lambda: not server.engine.live)
        body = {"id": new(), "settings": {}}
        assert page.call("POST", "/chats", body, status=503)["error"]["code"] == "database_unavailable"
        assert page.call("GET", f"/chats/{chat}")["messages"][1]["content"] == "kept"
        holder.execute("COMMIT")
        assert page.ended(chat, answer)["content"] == "kept"
        assert page.call("POST", "/chats", body)["id"] == body["id"]
        page.http.close()


# ---- bodies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {}, {"id": "a b"}, {"id": "x" * 65}, {"id": 5}, {"id": "ok", "title": "t" * 201}, {"id": "ok", "more": 1},
        {"id": "setup"}, {"id": "import"}, {"id": "ok", "settings": {"temperature": float("1e9")}}, [],
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused(page: Page, body: Any) -> None:
    error = page.call("POST", "/chats", body, status=400)["error"]
    assert error["message"] and set(error) == {"message", "type", "param", "code"}


def test_what_no_database_takes_is_stored_without_it(page: Page) -> None:
    page.server.script("ok")
    chat = page.chat()
    raw = '{"id": "q", "content": "a\\ud800b\\u0000c", "answer": {"id": "a"}}'
    response = page.http.post(f"/chats/{chat}/messages", content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 200 and response.json()["question"]["content"] == "a?bc"
    page.ended(chat, "a")
    empty = {"id": new(), "content": "  ", "answer": {"id": new()}}
    page.call("POST", f"/chats/{chat}/messages", empty, status=400)


def test_titles_and_places() -> None:
    assert title_of("  a\n b ") == "a b" and title_of("x" * 80) == "x" * 59 + "…"
    assert utf16("🐋a", 1) == 2 and utf16("abc", 2) == 2
