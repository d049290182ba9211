"""docs/api.md: its lists are the code's, its snippets run."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from rorqual.cli.serve import with_alias
from rorqual.config import DEFAULT_MODEL
from rorqual.data.template import ChatTemplate
from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.scripted import ScriptedEngine
from rorqual.errors import ConfigError
from rorqual.serve.anthropic_schemas import MessagesRequest
from rorqual.serve.completion_schemas import CompletionRequest
from rorqual.serve.prepare import sampling
from rorqual.serve.responses_schemas import ResponsesRequest
from rorqual.serve.schemas import ACCEPTED, REFUSED, ChatRequest
from rorqual.serve.served import ServedModel
from rorqual.serve.settings import Settings
from tests.net.harness import Harness

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
LISTS = {
    "Honoured in chat completions": set(ChatRequest.model_fields),
    "Honoured in completions": set(CompletionRequest.model_fields),
    "Honoured in messages": set(MessagesRequest.model_fields),
    "Honoured in responses": set(ResponsesRequest.model_fields),
    "Accepted without effect": set(ACCEPTED),
    "Refused unless off": set(REFUSED),
}


@pytest.mark.parametrize("title", LISTS)
def test_published_lists_are_the_codes(title: str) -> None:
    found = re.search(rf"\*\*{title}:\*\*(.*?)\n\n", GUIDE, re.DOTALL)
    assert found
    names = re.findall(r"`(\w+)`", found[1])
    assert sorted(names) == sorted(LISTS[title])


def test_snippets_run(server: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    server.script("It is.")
    snippets = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        code = snippet.replace("http://127.0.0.1:8000", server.url).replace(DEFAULT_MODEL, "tiny")
        exec(compile(code, "docs/api.md", "exec"), {})
        assert "It is." in capsys.readouterr().out


def test_every_client_of_the_guide_has_a_snippet_that_runs() -> None:
    """`scripts/clients.py` runs them; here, that it finds them all."""
    spec = importlib.util.spec_from_file_location("clients", ROOT / "scripts" / "clients.py")
    assert spec and spec.loader
    clients = importlib.util.module_from_spec(spec)
    sys.modules["clients"] = clients
    spec.loader.exec_module(clients)
    assert [snippet.packages[0] for snippet in clients.snippets()] == [
        "openai", "openai", "anthropic", "langchain-openai", "langchain-deepseek", "litellm", "instructor", "ai",
        "aider-chat", "@continuedev/cli", "open-webui",
    ]  # fmt: skip
    assert [snippet.packages[0] for snippet in clients.snippets() if snippet.quick] == [
        "openai", "openai", "anthropic", "ai",
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="no tool call"):
        clients.judge("It is.\nusage: 5 + 6\n", scripted=False)
    asked = f"Repo-map: off\n\n{clients.SAID}\n\nTokens: 1.2k sent, 9 received.\n"
    with pytest.raises(AssertionError, match="no two answers"):
        clients.judge_edit(asked, scripted=False)
    clients.judge_edit(asked + asked, scripted=False)
    with pytest.raises(AssertionError, match="no commit"):
        clients.judge_edit(asked + asked, scripted=True)
    edited = f"Commit 0ad3d4a {clients.SAID}\n{asked}{asked}{clients.ASKED}\n"
    with pytest.raises(AssertionError, match="no edit"):
        clients.judge_edit(edited, scripted=True)
    clients.judge_edit(f"{edited}\n{clients.SAID}\n", scripted=True)
    with pytest.raises(AssertionError, match="not the answers"):
        clients.judge_write(f"{clients.SAID}\n{clients.SAID}\n", scripted=True)


def test_under_an_alias_a_limit_beyond_the_context_means_what_room_there_is(tokenizer: Tokenizer) -> None:
    """aider asks `deepseek-chat` for 8192 tokens, whatever stands behind the name."""
    nano = ServedModel(ScriptedEngine(), tokenizer, ChatTemplate("v3.1"), name="nano", created=0)
    _, alias = with_alias("deepseek-chat=nano", {"nano": nano})
    room = nano.engine.info.max_model_len - 96

    def limit(served: ServedModel, wanted: int) -> int | None:
        body = ChatRequest(model="m", messages=[{"role": "user", "content": "Hi"}], max_tokens=wanted)
        return sampling(body, served, 96, Settings()).max_tokens

    assert [limit(alias, wanted) for wanted in (7, room, room + 1, 8192)] == [7, room, room, room]
    assert limit(nano, 8192) == 8192  # which the engine refuses


def test_aliases_share_the_engine_under_other_defaults(tokenizer: Tokenizer) -> None:
    nano = ServedModel(ScriptedEngine(), tokenizer, ChatTemplate("v3.1"), name="nano", created=0)
    served = {"nano": nano}
    name, reasoner = with_alias("deepseek-reasoner=nano:thinking", served)
    assert name == "deepseek-reasoner" and reasoner.engine is nano.engine and reasoner.name == "nano"
    assert reasoner.defaults.thinking and not with_alias("x=nano:plain", {"nano": reasoner})[1].defaults.thinking
    for wrong in ("x", "x=other", "=nano", "x=nano:loud", "nano=nano"):
        with pytest.raises(ConfigError):
            with_alias(wrong, served)
