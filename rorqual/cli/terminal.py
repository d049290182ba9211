"""The conversation of `rorqual chat`: lines in, answers out, commands that begin with a slash.

It works on the same conversations as the chat page, through the same service. Each command is a method; its docstring is its
line of /help.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.cli.painting import Painter, footer, harmless, sources
from rorqual.errors import RequestError, RorqualError

if TYPE_CHECKING:
    from rich.console import Console

    from rorqual.cli.room import Room
    from rorqual.serve.callers import Caller
    from rorqual.serve.chats.shapes import ChatSettings, Message

SHOWN = 20


class Left(Exception):
    """The person is done."""


class Terminal:
    """settings: of the next conversation; owner: whose conversations."""

    def __init__(self, room: Room, console: Console, settings: ChatSettings, owner: str, caller: Caller) -> None:
        self._room, self._console, self._settings = room, console, settings
        self._owner, self._caller = owner, caller
        self._chat: str | None = None
        self._files: list[str] = []
        self._listed: list[str] = []
        self.commands: Mapping[str, Callable[[str], None]] = {
            "help": self.help, "new": self.new, "list": self.list, "open": self.open, "title": self.title,
            "delete": self.delete, "think": self.think, "search": self.search, "model": self.model, "system": self.system,
            "file": self.file, "edit": self.edit, "regenerate": self.regenerate, "retry": self.regenerate,
            "continue": self.go_on, "branch": self.branch, "export": self.export, "cost": self.cost, "exit": self.exit,
            "quit": self.exit,
        }  # fmt: skip

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def converse(self) -> None:
        """Until the person leaves. An error in one turn does not end the conversation."""
        while True:
            try:
                line = self._read()
                if line:
                    self.take(line)
            except (EOFError, Left):
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print("\n[dim]/exit leaves, Ctrl-D too[/dim]")
            except RorqualError as error:
                self._console.print(harmless(str(error)), style="red", markup=False)

    def _read(self) -> str:
        """A line; one that ends in a backslash goes on in the next."""
        lines = [self._console.input("[bold cyan]you[/bold cyan] › ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._console.input("[dim]… [/dim]"))
        return "\n".join(lines).strip()

    def take(self, line: str) -> None:
        """One line: a command or a question."""
        if not line.startswith("/"):
            self.ask(line)
            return
        name, _, rest = line[1:].partition(" ")
        command = self.commands.get(name)
        if command is None:
            raise RequestError(f"there is no command /{name}", remedy="/help shows them")
        command(rest.strip())

    # ---- answers ----------------------------------------------------------------------------------------------------

    def ask(self, question: str) -> None:
        from rorqual.serve.chats.shapes import AnswerSpec, NewQuestion

        chat = self._current()
        self._put(chat, question, self._found()["head"], AnswerSpec(id=_new()), NewQuestion)

    def _put(self, chat: str, question: str, parent: str | None, answer: Any, body: Any) -> None:
        asked = body(id=_new(), parent=parent, content=question, files=self._files, answer=answer)
        _, begun = self._room.call(self._room.chats.ask(self._owner, self._caller, chat, asked))
        self._files = []
        self._follow(begun)

    def _follow(self, message: Message) -> None:
        """Show an answer to its end. Ctrl-C ends the thought, or the answer where it has begun."""
        painter = Painter(self._console)
        place = [len(message.thinking or ""), len(message.content)]
        while True:
            try:
                ended = self._show(message, painter, place)
                break
            except KeyboardInterrupt:
                thinks = place[0] > 0 and not place[1]
                stop = self._room.chats.stop_answer(self._owner, message.chat, message.id, thinking=thinks)
                self._room.call(stop)
        painter.close()
        for line in sources(ended):
            painter.say(line)
        painter.say(footer(ended))

    def _show(self, message: Message, painter: Painter, place: list[int]) -> dict[str, Any]:
        """place: how much of thought and text has been shown; it moves."""
        last: dict[str, Any] = {}
        for frame in self._room.frames(self._owner, message.chat, message.id):
            kind = frame["type"]
            if kind in ("state", "end"):
                last = frame["message"]
                thought, text = (last["thinking"] or "")[place[0] :], last["content"][place[1] :]
            elif kind == "search":
                if frame["phase"] != "done" and frame["search"]["queries"]:
                    painter.say("searching: " + "; ".join(frame["search"]["queries"]))
                continue
            else:
                thought = frame["text"] if kind == "thinking" else ""
                text = frame["text"] if kind == "text" else ""
            if thought:
                painter.thinking(thought)
            if text:
                painter.text(text)
            place[0] += len(thought)
            place[1] += len(text)
        if last["search"] and last["search"]["failed"]:
            painter.say(f"search failed: {last['search']['failed']}")
        return last

    def edit(self, rest: str) -> None:
        """/edit TEXT      ask the last question in other words (the old ones stay as a branch)"""
        from rorqual.serve.chats.shapes import AnswerSpec, NewQuestion

        question = self._last("user")
        self._put(self._current(), _given(rest, "/edit TEXT"), question["parent"], AnswerSpec(id=_new()), NewQuestion)

    def regenerate(self, rest: str) -> None:
        """/regenerate     another answer to the last question (/retry too)"""
        from rorqual.serve.chats.shapes import NewAnswer

        body = NewAnswer(id=_new(), parent=self._last("user")["id"])
        self._follow(self._room.call(self._room.chats.answer(self._owner, self._caller, self._current(), body)))

    def go_on(self, rest: str) -> None:
        """/continue       let an answer that was cut or stopped go on"""
        from rorqual.serve.chats.shapes import Continuation

        last = self._last("assistant")["id"]
        go_on = self._room.chats.go_on(self._owner, self._caller, self._current(), last, Continuation())
        self._follow(self._room.call(go_on))

    def branch(self, rest: str) -> None:
        """/branch [N]     the other answers to the last question; N shows that one and goes on from it"""
        from rorqual.serve.chats.shapes import ChatPatch

        question = self._last("user")["id"]
        answers = [m for m in self._found()["messages"] if m["parent"] == question]
        for number, message in enumerate(answers, 1):
            self._line(f"{number}. {' '.join(message['content'].split())[:100]}")
        if rest:
            chosen = _one_of(answers, rest, "/branch N")
            self._room.chats.store.patch(self._owner, self._current(), ChatPatch(head=chosen["id"]))
            self._tell([chosen])

    # ---- settings ---------------------------------------------------------------------------------------------------

    def think(self, rest: str) -> None:
        """/think [on|off] DeepThink"""
        self._switch("thinking", rest)

    def search(self, rest: str) -> None:
        """/search [on|off] look things up before answering, and cite them"""
        if self._room.chats.searcher is None:
            raise RequestError("there is no search here", remedy="start it with --search")
        self._switch("search", rest)

    def model(self, rest: str) -> None:
        """/model [NAME]   show the models, or choose one"""
        names = [card.id for card in self._room.call(self._room.chats.voice.models())]
        if rest and rest not in names:
            raise RequestError(f"there is no model {rest}", remedy=f"there are {', '.join(names)}")
        if rest:
            self._change(model=rest)
        for name in names:
            self._line(("* " if name == (self._settings.model or names[0]) else "  ") + name)

    def system(self, rest: str) -> None:
        """/system [TEXT]  set the system prompt (nothing: remove it)"""
        self._change(system=rest)

    def _switch(self, what: str, rest: str) -> None:
        if rest not in ("", "on", "off"):
            raise RequestError("write on or off")
        value = rest == "on" if rest else not getattr(self._settings, what)
        self._change(**{what: value})
        self._line(f"{'DeepThink' if what == 'thinking' else what} is {'on' if value else 'off'}")

    def _change(self, **values: Any) -> None:
        from rorqual.serve.chats.shapes import ChatPatch, ChatSettings

        self._settings = self._settings.model_copy(update=values)
        if self._chat is not None:
            self._room.chats.store.patch(self._owner, self._chat, ChatPatch(settings=ChatSettings(**values)))

    def file(self, rest: str) -> None:
        """/file PATH      attach a text, source code or a PDF to the next question"""
        path = Path(_given(rest, "/file PATH")).expanduser()
        try:
            body = path.read_bytes()
        except OSError as error:
            raise RequestError(f"{path} cannot be read: {error.strerror}") from error
        info = self._room.call(self._room.files.add(self._owner, path.name, "", body))
        self._files.append(info.id)
        self._line(f"attached {info.name}: {info.tokens:,} tokens" + (", cut" if info.truncated else ""))

    # ---- conversations ----------------------------------------------------------------------------------------------

    def new(self, rest: str) -> None:
        """/new            begin a new conversation"""
        self._chat, self._files = None, []

    def list(self, rest: str) -> None:
        """/list [WORDS]   the last conversations, or those in which the words are"""
        found = self._room.chats.store.recent(self._owner, rest, limit=SHOWN)["chats"]
        self._listed = [chat["id"] for chat in found]
        for number, chat in enumerate(found, 1):
            mark = "*" if chat["id"] == self._chat else " "
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(chat["updated"]))
            self._line(f"{mark}{number:3}. {when}  {chat['title'] or 'untitled'}")
            if "match" in chat:
                self._line(f"        {chat['match']['text']}")
        if not found:
            self._line("none")

    def open(self, rest: str) -> None:
        """/open N|ID      go on with a conversation of /list"""
        name = _given(rest, "/open N, as /list numbers them")
        if name.isdigit() and not self._listed:
            self._listed = [c["id"] for c in self._room.chats.store.recent(self._owner, limit=SHOWN)["chats"]]
        if name.isdigit() and 1 <= int(name) <= len(self._listed):
            name = self._listed[int(name) - 1]
        found = self._room.call(self._room.chats.chat(self._owner, name))
        from rorqual.serve.chats.export import shown_branch
        from rorqual.serve.chats.shapes import ChatSettings

        self._chat, self._files = name, []
        self._settings = ChatSettings(**found["settings"])
        self._line(found["title"] or "untitled")
        branch = shown_branch(found["messages"], found["head"])
        if len(branch) > SHOWN:
            self._line(f"… {len(branch) - SHOWN} earlier messages")
        self._tell(branch[-SHOWN:])
        if branch and branch[-1]["status"] == "running":
            self._follow(self._room.call(self._room.chats.message(self._owner, name, branch[-1]["id"])))

    def title(self, rest: str) -> None:
        """/title TEXT     rename the conversation"""
        from rorqual.serve.chats.shapes import ChatPatch

        title = _given(rest, "/title TEXT")
        self._room.chats.store.patch(self._owner, self._current(), ChatPatch(title=title[:200]))

    def delete(self, rest: str) -> None:
        """/delete         delete the conversation"""
        if self._chat is None:
            raise RequestError("there is no conversation to delete")
        self._room.call(self._room.chats.delete(self._owner, self._chat))
        self.new("")
        self._line("deleted")

    def export(self, rest: str) -> None:
        """/export [PATH]  write the conversation to a file: .json whole, else the branch shown, as Markdown"""
        from rorqual.serve.chats.export import as_json, as_markdown, file_name, whole

        found = self._found()
        path = Path(rest or file_name(found["title"], "md")).expanduser()
        if path.suffix == ".json":
            texts = self._room.chats.store.file_texts(self._owner, found["id"])
            body = whole(as_json(found, texts)).decode()
        else:
            body = as_markdown(found)
        try:
            with path.open("x", encoding="utf-8") as file:  # never over a file that is there
                file.write(body)
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror}", remedy="/export PATH") from error
        self._line(f"wrote {path}")

    def cost(self, rest: str) -> None:
        """/cost           what the conversation used, and what it would cost at DeepSeek's prices"""
        from rorqual.plan.prices import DEEPSEEK

        used = [m["usage"] for m in self._found()["messages"] if m["usage"]]
        prompt, cached, new = (sum(u[k] for u in used) for k in ("prompt_tokens", "cached_tokens", "completion_tokens"))
        self._line(f"{prompt:,} prompt tokens, {cached:,} of them from the cache, {new:,} generated")
        for price in DEEPSEEK:
            self._line(f"${price.cost(prompt, cached, new):.6f}  {price.name} (from {price.since})")

    def help(self, rest: str) -> None:
        """/help           this"""
        lines = dict.fromkeys(command.__doc__ or "" for command in self.commands.values())
        for line in lines:
            self._line(line)
        self._line("A line that ends in \\ goes on. Ctrl-C ends a thought, then the answer.")

    def exit(self, rest: str) -> None:
        """/exit           leave (Ctrl-D too)"""
        raise Left

    # ---- what they share --------------------------------------------------------------------------------------------

    def _current(self) -> str:
        """The conversation, begun where there is none."""
        from rorqual.serve.chats.shapes import NewChat

        if self._chat is None:
            body = NewChat(id=_new(), settings=self._settings)
            self._chat = str(self._room.chats.store.create(self._owner, body)["id"])
        return self._chat

    def _found(self) -> dict[str, Any]:
        if self._chat is None:
            raise RequestError("there is no conversation yet", remedy="ask something, or /open one")
        return self._room.call(self._room.chats.chat(self._owner, self._chat))

    def _last(self, role: str) -> Mapping[str, Any]:
        from rorqual.serve.chats.export import shown_branch

        found = self._found()
        for message in reversed(shown_branch(found["messages"], found["head"])):
            if message["role"] == role:
                return message
        raise RequestError("nothing was asked yet")

    def _tell(self, messages: Any) -> None:
        for message in messages:
            if message["role"] == "user":
                self._console.print("[bold cyan]you[/bold cyan] › ", end="")
                self._console.print(harmless(message["content"]), markup=False)
                continue
            painter = Painter(self._console)
            painter.text(message["content"])
            painter.close()
            for line in sources(message):
                painter.say(line)

    def _line(self, text: str) -> None:
        self._console.print(harmless(text), style="dim", markup=False, soft_wrap=True)


def _new() -> str:
    return str(uuid.uuid4())


def _given(rest: str, usage: str) -> str:
    if not rest:
        raise RequestError("something is missing", remedy=usage)
    return rest


def _one_of(items: Any, rest: str, usage: str) -> Any:
    if not rest.isdigit() or not 1 <= int(rest) <= len(items):
        raise RequestError(f"there are {len(items)}", remedy=usage)
    return items[int(rest) - 1]
