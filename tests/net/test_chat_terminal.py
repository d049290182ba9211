"""`rorqual chat`: the conversations of the page, in the terminal."""

from __future__ import annotations

import io
import json
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from rorqual.cli.painting import Painter, cited, finished, harmless
from rorqual.cli.room import Room
from rorqual.cli.terminal import Terminal
from rorqual.data.special import END_THINK
from rorqual.data.template import ChatTemplate
from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.api import EngineInfo
from rorqual.engine.scripted import Script, ScriptedEngine
from rorqual.errors import RequestError
from rorqual.serve.app import ServedModel, Settings, create_app
from rorqual.serve.callers import Caller
from rorqual.serve.chats.shapes import ChatSettings
from rorqual.serve.database import database_url
from tests.net.harness import Gate, eventually, running


@dataclass
class Person:
    terminal: Terminal
    engine: ScriptedEngine
    tokenizer: Tokenizer
    out: io.StringIO
    room: Room

    def script(self, answer: str, thought: str | None = None, **how: object) -> None:
        ids = self.tokenizer.encode(answer)
        if thought is not None:
            ids = [*self.tokenizer.encode(thought), self.tokenizer.special(END_THINK), *ids]
        self.engine.scripts[:] = [Script(ids, **how)]  # type: ignore[arg-type]

    def types(self, *lines: str) -> str:
        """What is shown after these."""
        before = len(self.out.getvalue())
        for line in lines:
            self.terminal.take(line)
        return self.out.getvalue()[before:]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C, which a shell lets ignore what it starts in the background: these tests would wait for ever."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def person(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Person]:
    engine = ScriptedEngine(
        info=EngineInfo("scripted", 8192, tokenizer.vocab_size, (tokenizer.eos_id,), cache_tokens=1 << 20)
    )
    served = ServedModel(engine, tokenizer, ChatTemplate("v3.1"), name="tiny", created=7)
    app = create_app({"tiny": served, "other": served}, Settings(database_url=database_url(tmp_path)))
    out = io.StringIO()
    console = Console(file=out, width=100, highlight=False)
    with Room(app) as room:
        terminal = Terminal(room, console, ChatSettings(), "local", Caller(None, time.monotonic))
        yield Person(terminal, engine, tokenizer, out, room)


def test_a_conversation_and_its_branches(person: Person) -> None:
    person.script("It eats krill.", thought="Food, then.")
    shown = person.types("/think on", "What does it eat?")
    assert "Food, then." in shown and "It eats krill." in shown and "thought for" in shown
    person.script("Krill again.")
    assert "Krill again." in person.types("/think off", "/retry")
    shown = person.types("/branch 1")
    assert "1. It eats krill." in shown and "2. Krill again." in shown
    person.script("Because.")
    person.types("Why?")
    prompt = person.tokenizer.decode(person.engine.seen[-1].prompt)
    assert "It eats krill." in prompt and "Krill again." not in prompt
    person.types("/edit How much?")
    assert "Why?" not in person.tokenizer.decode(person.engine.seen[-1].prompt)
    assert "generated" in person.types("/cost")


def test_conversations_are_listed_opened_renamed_and_deleted(person: Person) -> None:
    person.script("one")
    person.types("first question", "/title Wale", "/new", "second question")
    listed = person.types("/list")
    assert "1." in listed and "Wale" in listed and listed.index("second question") < listed.index("Wale")
    assert "Wale" in person.types("/list wal") and "second" not in person.types("/list wal")
    person.types("/list")
    assert "first question" in person.types("/open 2")
    person.types("/delete")
    assert "Wale" not in person.types("/list")
    for line, says in (("/open 7", "no chat"), ("/open", "missing"), ("/delete", "no conversation"), ("/bogus", "/help"),
                       ("/think maybe", "on or off"), ("/model gone", "there are tiny"), ("/search", "--search"),
                       ("/file /nowhere.txt", "cannot be read")):  # fmt: skip
        with pytest.raises(RequestError, match=says):
            person.types(line)


def test_files_models_and_export(person: Person, tmp_path: Path) -> None:
    person.script("read")
    (tmp_path / "a.py").write_text("print(1)")
    person.types("/model other", "/system Be brief.", f"/file {tmp_path / 'a.py'}", "What is it?")
    prompt = person.tokenizer.decode(person.engine.seen[-1].prompt)
    assert "[file name]: a.py" in prompt and "Be brief." in prompt
    assert "* other" in person.types("/model")
    person.types(f"/export {tmp_path / 'x.md'}", f"/export {tmp_path / 'x.json'}")
    assert "## other" in (tmp_path / "x.md").read_text()
    assert json.loads((tmp_path / "x.json").read_text())["messages"][0]["files"][0]["text"] == "print(1)"
    with pytest.raises(RequestError, match="cannot be written"):
        person.types(f"/export {tmp_path / 'x.md'}")  # nothing is written over


def interrupt(when: object) -> threading.Thread:
    def wait() -> None:
        if eventually(when, 20):  # type: ignore[arg-type]
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_ctrl_c_ends_the_thought_and_then_the_answer(person: Person) -> None:
    gate = Gate()
    outputs = 0

    async def step() -> None:
        nonlocal outputs
        outputs += 1
        if outputs > 6:
            await gate.wait()

    person.terminal.take("/think on")
    person.script("unheard", thought="the whale the whale the whale", gate=step)

    def began() -> bool:
        if "the wh" not in person.out.getvalue():
            return False
        person.script("At once.")
        return True

    thread = interrupt(began)
    shown = person.types("?")
    thread.join(20)
    assert "At once." in shown and "unheard" not in shown
    outputs = 0
    person.script("One two three four five six seven.", gate=step)
    thread = interrupt(lambda: "One" in person.out.getvalue().rpartition("tokens")[2])
    shown = person.types("/think off", "count")
    thread.join(20)
    assert "/continue goes on" in shown and "seven" not in shown
    person.script(" and so on.")
    assert " and so on." in person.types("/continue")
    gate.open()


def test_the_loop_survives_errors_and_ends_at_the_end(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    person.script("fine")
    lines = iter(["/bogus", "one \\", "two", "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    person.terminal.converse()
    assert next(lines) == "never" and "no command /bogus" in person.out.getvalue()
    assert "one \ntwo" in person.tokenizer.decode(person.engine.seen[-1].prompt)


def test_the_page_sees_the_terminals_conversations_while_it_answers(person: Person, tmp_path: Path) -> None:
    """A server on the same database: it shows what the terminal writes, does not take it for lost, and can stop it."""
    gate = Gate()
    outputs = 0

    async def step() -> None:
        nonlocal outputs
        outputs += 1
        if outputs > 5:
            await gate.wait()

    person.script("One two three four five six.", gate=step)
    thread = threading.Thread(target=lambda: person.types("Count."), daemon=True)
    with running(person.tokenizer, Settings(database_url=database_url(tmp_path), heartbeat_s=0.2)) as server:
        thread.start()
        http = httpx.Client(base_url=server.url, timeout=30)
        assert eventually(lambda: http.get("/chats").json()["chats"])
        chat = http.get("/chats").json()["chats"][0]["id"]
        assert eventually(lambda: http.get(f"/chats/{chat}").json()["messages"][1]["content"], 20)
        answer = http.get(f"/chats/{chat}").json()["messages"][1]
        assert answer["status"] == "running" and "One two three four five six.".startswith(answer["content"])
        path = f"/chats/{chat}/messages/{answer['id']}"
        http.post(f"{path}/stop", json={})
        with http.stream("GET", f"{path}/events") as response:
            frames = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
        assert frames[-1]["message"]["status"] == "stopped"
        thread.join(20)
        http.close()
    assert not thread.is_alive() and "stopped" in person.out.getvalue()


# ---- painting ---------------------------------------------------------------------------------------------------


def test_blocks_are_finished_where_something_new_begins() -> None:
    assert finished("a") == finished("a\n") == finished("a\n\n") == 0 and finished("a\n\nb") == 3
    code = "```py\na\n\nb\n```\n"
    assert finished(code) == 0 and finished("x\n\n" + code) == 3 and finished(code + "\nc") == len(code) + 1
    assert finished("```\n\n~~~\n\nx") == 0, "another fence does not close this one"
    for more in ("2", "2.", "2. b", "-", "- b", "   a paragraph of it"):
        assert finished(f"1. a\n\n{more}") == 0, "a list goes on"
    assert finished("1. a\n\n20th") == 6


def test_a_terminal_obeys_nothing_that_a_model_says() -> None:
    evil = "\x1b]0;title\x07\x1b[2J\x9b31mred\u202e \x08\r text"
    assert harmless(evil) == "]0;title[2J31mred  text"
    out = io.StringIO()
    painter = Painter(Console(file=out, force_terminal=True, width=60, color_system=None, legacy_windows=False))
    for piece in (
        "# Title\n",
        "\n",
        "A **bold** [red]word[/red]",
        " [citation:3]",
        evil,
        "\n\n```py\nx = 1\n",
        "```\n",
    ):
        painter.text(piece)
    painter.close()
    plain = out.getvalue()
    assert "\x1b]0" not in plain and "\x07" not in plain and "\x9b" not in plain and "[red]word[/red]" in plain
    assert "bold" in plain and "**" not in plain and "[3]" in plain and "x = 1" in plain
    assert cited("a [citation:1,2] b") == "a [1][2] b"
