from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data import special
from rorqual.data.template import NAMES, ChatTemplate
from rorqual.data.tokenizer import Tokenizer
from rorqual.errors import DataError

ALL = pytest.mark.parametrize("name", NAMES)
HOSTILE = st.lists(st.one_of(st.text(), st.sampled_from(special.SPECIAL_TOKENS))).map("".join)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": HOSTILE}),
    min_size=1,
)
CHAT = [
    {"role": "system", "content": "Be a whale."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello", "reasoning_content": "old thought"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "so", "reasoning_content": "new thought"},
]


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special=False)


EXPECTED = {
    ("v3", False): "<｜Assistant｜>",
    ("r1", False): "<｜Assistant｜><think>\n",
    ("r1", True): "<｜Assistant｜><think>\n",
    ("v3.1", False): "<｜Assistant｜></think>",
    ("v3.1", True): "<｜Assistant｜><think>",
}


@pytest.mark.parametrize(("name", "thinking"), EXPECTED)
def test_prompts_are_the_published_ones(small: Tokenizer, name: str, thinking: bool) -> None:
    template = ChatTemplate(name)
    said = "</think>hello" if name == "v3.1" else "hello"
    history = f"{special.BOS}Be a whale.<｜User｜>hi<｜Assistant｜>{said}{special.EOS}<｜User｜>and?"
    prompt = text_of(small, template.encode(small, CHAT[:4], thinking))
    assert prompt == history + EXPECTED[name, thinking]
    assert text_of(small, template.encode(small, CHAT[:4], thinking, add_generation_prompt=False)) == history
    assert template.starts_in_thinking(thinking) == ("<think>" in EXPECTED[name, thinking])
    assert template.supports_thinking == (name != "v3")


TRAINED = {
    "v3": ("<｜Assistant｜>", "so", "hello"),
    "r1": ("<｜Assistant｜><think>\n", "new thought</think>so", "hello"),
    "v3.1": ("<｜Assistant｜><think>", "new thought</think>so", "hello"),
}


@ALL
def test_training_learns_answers_and_the_last_thought_only(small: Tokenizer, name: str) -> None:
    ids, mask = ChatTemplate(name).encode_for_training(small, CHAT)
    given_, last, first = TRAINED[name]
    learned = text_of(small, [i for i, m in zip(ids, mask, strict=True) if m])
    assert learned == f"{first}{special.EOS}{last}{special.EOS}"
    assert text_of(small, ids).endswith(f"and?{given_}{last}{special.EOS}")
    assert set(mask) == {0, 1}


@pytest.mark.parametrize(("name", "thinking"), EXPECTED)
def test_training_starts_where_generation_starts(small: Tokenizer, name: str, thinking: bool) -> None:
    template = ChatTemplate(name)
    last = CHAT[-1] if thinking or name == "r1" else {"role": "assistant", "content": "so"}
    prompt = template.encode(small, CHAT[:4], thinking)
    ids, mask = template.encode_for_training(small, [*CHAT[:4], last])
    assert ids[: len(prompt)] == prompt
    assert all(mask[len(prompt) :]) and not mask[len(prompt) - 1]


def test_an_answer_without_thought_trains_the_way_out_of_it(small: Tokenizer) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]
    for name, end in (("r1", "<think>\n</think>so"), ("v3.1", "</think>so"), ("v3", "so")):
        ids, _ = ChatTemplate(name).encode_for_training(small, chat)
        assert text_of(small, ids).endswith(f"<｜Assistant｜>{end}{special.EOS}")


def test_thinking_written_inline_is_taken_apart(small: Tokenizer) -> None:
    for name, inline in (("r1", "<think>\nnew thought</think>so"), ("v3.1", "<think>new thought</think>so")):
        template = ChatTemplate(name)
        given_ = [*CHAT[:4], {"role": "assistant", "content": inline}]
        assert template.encode_for_training(small, given_) == template.encode_for_training(small, CHAT)


@pytest.mark.parametrize(("name", "thinking"), EXPECTED)
@settings(deadline=None, max_examples=80)
@given(messages=MESSAGES)
def test_nobody_can_forge_a_marker(small: Tokenizer, name: str, thinking: bool, messages: list[dict[str, Any]]) -> None:
    template = ChatTemplate(name)
    harmless = [{**m, "content": "x"} for m in messages]

    def structure(some: list[dict[str, Any]]) -> list[int]:
        return [i for i in template.encode(small, some, thinking) if i in small.special_ids]

    assert structure(messages) == structure(harmless)


def conversations(make_texts: Callable[[int, int], list[str]], seed: int) -> list[list[dict[str, str]]]:
    rng = random.Random(seed)
    texts = iter(make_texts(seed, 400))
    chats = []
    for _ in range(15):
        chat = [{"role": "system", "content": next(texts)} for _ in range(rng.randrange(3))]
        for _ in range(rng.randrange(1, 4)):
            chat.append({"role": "user", "content": next(texts)})
            thought = rng.choice(["", "", "<think>\nhm</think>"])
            chat.append({"role": "assistant", "content": thought + next(texts)})
        chats.append(chat[: rng.choice([-1, len(chat)])])
    return chats


@pytest.mark.parametrize(("name", "thinking"), EXPECTED)
def test_the_jinja_form_gives_the_same_ids(
    small_dir: Path, small: Tokenizer, make_texts: Callable[[int, int], list[str]], name: str, thinking: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(small_dir)
    template = ChatTemplate(name)
    for chat in conversations(make_texts, random.randrange(10**6)):
        if name == "v3":  # thinking is text to V3, and stays
            chat = [{**m, "content": m["content"].replace("think>", "hm ")} for m in chat]
        for add in (True, False):
            ids = theirs.apply_chat_template(
                chat,
                chat_template=template.jinja,
                add_generation_prompt=add,
                thinking=thinking,
                return_dict=False,
            )
            assert list(ids) == template.encode(small, chat, thinking, add)
    with pytest.raises(Exception, match="tools"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}], chat_template=template.jinja)


def test_transformers_finds_the_template_in_the_directory(small_dir: Path, small: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(small_dir)
    ids = theirs.apply_chat_template(CHAT[:4], add_generation_prompt=True, thinking=True, return_dict=False)
    assert list(ids) == ChatTemplate.load(small_dir).encode(small, CHAT[:4], thinking=True)


def write_config(directory: Path, **config: Any) -> Path:
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return directory


@ALL
def test_our_templates_are_recognised(tmp_path: Path, name: str) -> None:
    source = ChatTemplate(name).jinja
    assert ChatTemplate.load(write_config(tmp_path, chat_template=source)).name == name
    assert ChatTemplate.load(write_config(tmp_path, chat_template=source + "\n{# edited #}")).name == name
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": source}]
    assert ChatTemplate.load(write_config(tmp_path, chat_template=named)).name == name
    (tmp_path / "chat_template.jinja").write_text(source, "utf-8")
    assert ChatTemplate.load(write_config(tmp_path)).name == name


def test_published_templates_are_recognised(tmp_path: Path, deepseek_dir: Path) -> None:
    assert ChatTemplate.load(deepseek_dir).name == "v3"
    published = json.loads((deepseek_dir / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    bare = "{{'<｜Assistant｜>'}}"
    assert bare in published
    r1 = published.replace(bare, "{{'<｜Assistant｜><think>\\n'}}")
    assert ChatTemplate.load(write_config(tmp_path, chat_template=r1)).name == "r1"
    v31 = published.replace(
        bare, "{{'<｜Assistant｜>'}}{%- if not thinking %}{{'</think>'}}{%- else %}{{'<think>'}}{%- endif %}"
    )
    assert ChatTemplate.load(write_config(tmp_path, chat_template=v31)).name == "v3.1"


def test_no_template_is_v3_and_a_foreign_one_is_refused(tmp_path: Path) -> None:
    assert ChatTemplate.load(write_config(tmp_path)).name == "v3"
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match=r"v3, r1, v3\.1"):
        ChatTemplate.load(write_config(tmp_path, chat_template=chatml))
    with pytest.raises(DataError, match=r"does not exist"):
        ChatTemplate.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"v3, r1, v3\.1"):
        ChatTemplate("v9")


@ALL
@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least one message"),
        ("hi", "at least one message"),
        (["hi"], "message 0"),
        ([{"role": "function", "content": "x"}], "role"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "names no function"),
        ([{"role": "assistant", "content": "", "prefix": True}, {"role": "user", "content": "x"}], "no prefix"),
        (
            [{"role": "user", "content": "x"}, {"role": "wizard", "content": "x"}],
            "message 1 has the role 'wizard'",
        ),
        ([{"role": "user", "content": None}], "message 0"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "message 0"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "assistant", "content": "x", "reasoning_content": 3}], "reasoning_content"),
    ],
)
def test_what_cannot_be_rendered_is_refused(small: Tokenizer, name: str, messages: Any, says: str) -> None:
    for call in (ChatTemplate(name).encode, ChatTemplate(name).encode_for_training):
        with pytest.raises(DataError, match=says):
            call(small, messages)


def test_training_needs_an_answer_and_v3_cannot_think(small: Tokenizer) -> None:
    with pytest.raises(DataError, match="must end with the assistant"):
        ChatTemplate("v3").encode_for_training(small, CHAT[:4])
    with pytest.raises(DataError, match="no thinking mode"):
        ChatTemplate("v3").encode(small, CHAT[:4], thinking=True)
