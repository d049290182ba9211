"""Whatever allowed tokens are chosen, the text that ends matches; masks along a draft are the masks met on the way."""

from __future__ import annotations

import builtins
import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rorqual.data.tokenizer import train_tokenizer
from rorqual.data.tools import shape
from rorqual.engine.api import Grammar
from rorqual.engine.grammar import GrammarCompiler, Matcher
from rorqual.errors import BackendUnavailable, DataError, RequestError

ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = train_tokenizer([file.read_text(encoding="utf-8") for file in sorted(ROOT.glob("docs/*.md"))], 3072)
FOLDER = tempfile.TemporaryDirectory()
TOKENIZER.save(Path(FOLDER.name))
FILE = Path(FOLDER.name) / "tokenizer.json"
PADDING = 37
VOCAB = TOKENIZER.vocab_size + PADDING
EOS = TOKENIZER.eos_id
CLOSING = {EOS, *(t for t in range(VOCAB) if any(c in TOKENIZER.token_bytes(t) for c in b'"]})'))}
HOLE = TOKENIZER.special("<｜fim▁hole｜>")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["whale", "鲸鱼", 'say "hi"\n']},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
        "parent": {"anyOf": [{"$ref": "#/$defs/who"}, {"type": "null"}]},
    },
    "required": ["name", "kind", "age", "tags", "parent"],
    "additionalProperties": False,
    "$defs": {"who": {"type": "object", "properties": {"id": {"type": "number"}}, "required": ["id"]}},
}
REGEX = r"([0-9]{4}-[0-9]{2}|[a-zäöü]{2,20}|日本*)(, [A-F0-9]{3}){0,3}"
LARK = """
start: sum
sum: term (" + " term)*
term: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
"""


COMPILER = GrammarCompiler(FILE, VOCAB, (EOS, HOLE))


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return COMPILER


def allowed(mask: NDArray[np.uint32]) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def choose(options: list[int], length: int) -> int:
    """A random token; the longer the text, the rather one that brings it to an end."""
    closing = CLOSING.intersection(options)
    return random.choice(sorted(closing) if closing and random.random() < length / 60 else options)


def walk(matcher: Matcher) -> list[int]:
    """Random allowed tokens up to the end of sequence, which is not included."""
    tokens: list[int] = []
    while len(tokens) < 2000:
        options = allowed(matcher.masks()[0])
        assert options and max(options) < VOCAB - PADDING
        # Neither padding nor a marker stands in a text that must match.
        assert not (set(options) & TOKENIZER.special_ids) - {EOS, HOLE}
        tokens.append(choose(options, len(tokens)))
        matcher.accept(tokens[-1])
        if tokens[-1] in (EOS, HOLE):
            assert matcher.stopped
            return tokens[:-1]
    raise AssertionError("a walk that does not end")


def text_of(tokens: list[int]) -> str:
    return b"".join(TOKENIZER.token_bytes(t) for t in tokens).decode("utf-8")  # strictly: no half characters


def test_json_objects_parse(compiler: GrammarCompiler) -> None:
    for _ in range(20):
        assert isinstance(json.loads(text_of(walk(compiler.matcher(Grammar("json_object"))))), dict)


def test_schemas_are_kept(compiler: GrammarCompiler) -> None:
    for _ in range(20):
        value = json.loads(text_of(walk(compiler.matcher(Grammar("json_schema", json.dumps(SCHEMA))))))
        jsonschema.validate(value, SCHEMA)


VALUES = st.one_of(st.integers(-9, 9), st.text(max_size=5), st.none())
LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "maxLength": 6}, {"type": "number"}]),
    st.integers(-50, 50).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 99}),
    st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
)


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    properties = draw(st.dictionaries(st.text(max_size=6), inner, max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, inner, st.integers(0, 3)),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(SCHEMAS)
def test_any_drawn_schema_is_kept_in_any_walk(schema: dict[str, Any]) -> None:
    text = text_of(walk(COMPILER.matcher(Grammar("json_schema", json.dumps(schema)))))
    jsonschema.validate(json.loads(text), schema)


ODD_NAMES = ("type", "enum", "items", "properties", "required", "anyOf", "oneOf", "format", "pattern", "$ref", "not")
ODD = st.dictionaries(
    st.sampled_from(ODD_NAMES),
    st.one_of(VALUES, st.lists(VALUES, max_size=2), st.dictionaries(st.text(max_size=2), LEAVES, max_size=2), SCHEMAS),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(st.one_of(SCHEMAS, ODD))
def test_the_shape_of_any_schema_can_be_kept(schema: dict[str, Any]) -> None:
    """Also of one that is none."""
    kept = shape(schema)
    text = text_of(walk(COMPILER.matcher(Grammar("json_schema", json.dumps(kept)))))
    jsonschema.validate(json.loads(text), kept)


def test_expressions_match(compiler: GrammarCompiler) -> None:
    for _ in range(40):
        assert re.fullmatch(REGEX, text_of(walk(compiler.matcher(Grammar("regex", REGEX)))))


def test_lark_grammars_are_followed(compiler: GrammarCompiler) -> None:
    for _ in range(20):
        text = text_of(walk(compiler.matcher(Grammar("lark", LARK))))
        assert re.fullmatch(r"[0-9+() ]+", text)
        assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", text)), int)


@pytest.mark.parametrize(
    "value",
    [
        {"": 'a "quoted" \\ back / slash'},
        {"naïve 鲸鱼 🐋": "line\nbreak\ttab \x01"},
        {"x": [1, -2.5e-3, True, None, {"y": []}]},
    ],
)
@pytest.mark.parametrize("indent", [None, 4])
def test_any_json_is_accepted(compiler: GrammarCompiler, value: Any, indent: int | None) -> None:
    """In one line and indented, as the tokenizer spells it."""
    matcher = compiler.matcher(Grammar("json_object"))
    for token in TOKENIZER.encode(json.dumps(value, ensure_ascii=False, indent=indent)):
        assert token in allowed(matcher.masks()[0])
        matcher.accept(token)
    assert set(allowed(matcher.masks()[0])) == {EOS, HOLE} and matcher.stopped


def test_blanks_do_not_go_on_for_ever(compiler: GrammarCompiler) -> None:
    """One between two parts, or a new line and the indentation of 16 levels."""
    matcher = compiler.matcher(Grammar("json_object"))
    blank = TOKENIZER.encode(" ")
    for begin, most in (("{", 1), ("{\n", 64)):
        tokens = [*TOKENIZER.encode(begin), *blank * 200]
        taken = sum(bool(allowed(mask)) for mask in matcher.masks(tokens)) - 1 - len(TOKENIZER.encode(begin))
        assert taken == most, begin


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", json.dumps(SCHEMA)),
        Grammar("json_object"),
        Grammar("regex", REGEX),
        Grammar("lark", LARK),
    ],
)
def test_masks_along_a_draft_are_those_met_on_the_way(compiler: GrammarCompiler, grammar: Grammar) -> None:
    for _ in range(5):
        tokens = [*walk(compiler.matcher(grammar)), EOS, HOLE]
        drafter, walker = compiler.matcher(grammar), compiler.matcher(grammar)
        at = 0
        while at < len(tokens):
            drafts = tokens[at : at + random.randrange(6)]
            along = [mask.copy() for mask in drafter.masks(drafts)]
            assert len(along) == len(drafts) + 1
            assert (drafter.masks()[0] == along[0]).all()  # it has not moved
            assert drafter.stopped == walker.stopped
            for mask, token in zip(along, [*drafts, None], strict=True):
                assert (mask == walker.masks()[0]).all()
                if token is not None:
                    walker.accept(token)
                    drafter.accept(token)
            at += len(drafts)
        assert set(allowed(drafter.masks()[0])) == {EOS, HOLE}


def test_behind_a_forbidden_draft_nothing_is_allowed(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar("regex", "[ab]{3}"))
    a, c = TOKENIZER.encode("a"), TOKENIZER.encode("c")
    for drafts, good in ((a + c + a, 2), (c + a, 1), ([EOS, *a], 1), (a * 3 + [EOS] + a, 5), ([VOCAB - 1, *a], 1)):
        masks = [allowed(mask) for mask in matcher.masks(drafts)]
        assert all(masks[:good]) and not any(masks[good:])
        assert masks[0] == allowed(matcher.masks()[0]) and not matcher.stopped


def test_matchers_of_one_grammar_are_separate(compiler: GrammarCompiler) -> None:
    grammar = Grammar("regex", "[ab]{2}")
    first, second = compiler.matcher(grammar), compiler.matcher(grammar)
    before = allowed(second.masks()[0])
    for token in TOKENIZER.encode("b") * 2:
        first.accept(token)
    assert first.stopped and not second.stopped
    assert allowed(second.masks()[0]) == before == allowed(compiler.matcher(grammar).masks()[0])


@pytest.mark.parametrize(
    ("grammar", "param", "said"),
    [
        (Grammar("json_schema", '{"type": "strin"}'), "response_format", "strin"),
        (Grammar("json_schema", '{"type": '), "response_format", "not JSON"),
        (Grammar("json_schema", "[" * 100_000), "response_format", "not JSON"),
        (Grammar("json_schema", '{"type": "array", "items": ' * 400 + "{}" + "}" * 400), "response_format", "limit"),
        (Grammar("json_schema", "[1]"), "response_format", "object"),
        (Grammar("json_schema", '{"type": "array", "uniqueItems": true}'), "response_format", "uniqueItems"),
        (Grammar("json_schema", "false"), "response_format", "object"),
        (
            Grammar("json_schema", '{"type": "object", "properties": {"a": false}, "required": ["a"]}'),
            "response_format",
            "a",
        ),
        (Grammar("json_schema", '{"type":"string"}}], "x": [{'), "response_format", "not JSON"),
        (Grammar("regex", "(a"), "grammar", "unclosed"),
        (Grammar("regex", r"[^\s\S]"), "grammar", "no text"),
        (Grammar("lark", "start: foo"), "grammar", "foo"),
        (Grammar("lark", ""), "grammar", "Lark"),
    ],
)
def test_what_cannot_be_used_is_refused(compiler: GrammarCompiler, grammar: Grammar, param: str, said: str) -> None:
    for _ in range(2):  # a refusal is not remembered as a success
        with pytest.raises(RequestError) as caught:
            compiler.matcher(grammar)
        assert caught.value.param == param and said in str(caught.value) and "<state>" not in str(caught.value)


def test_a_grammar_of_the_empty_text(compiler: GrammarCompiler) -> None:
    assert walk(compiler.matcher(Grammar("regex", ""))) == []


def test_a_parser_that_gives_up_says_so(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar("regex", "[ab]{5}"))
    with pytest.raises(RequestError, match="satisfy the grammar"):
        matcher.accept(TOKENIZER.encode("c")[0])
    with pytest.raises(RequestError, match="satisfy the grammar"):
        matcher.masks(TOKENIZER.encode("a"))


def test_a_missing_package_and_a_useless_file_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        GrammarCompiler(tmp_path / "tokenizer.json", VOCAB, (EOS,))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError):
        GrammarCompiler(tmp_path / "tokenizer.json", VOCAB, (EOS,))
    with pytest.raises(DataError):
        GrammarCompiler(FILE, 100, (EOS,))

    found = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("llguidance"):
            raise ImportError(name)
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendUnavailable) as caught:
        GrammarCompiler(FILE, VOCAB, (EOS,))
    assert "pip install" in str(caught.value)


END_THINK = TOKENIZER.special("</think>")
CALLS = TOKENIZER.special("<｜tool▁calls▁begin｜>")


@pytest.mark.parametrize("optional", [False, True])
def test_a_late_grammar_begins_behind_its_token_and_at_no_spelling_of_it(
    compiler: GrammarCompiler, optional: bool
) -> None:
    late = Grammar("regex", REGEX, after=(END_THINK, CALLS), optional=optional)
    thought = TOKENIZER.encode("anything: {, 鲸, </think> in letters")
    for marker in late.after:
        matcher = compiler.matcher(late)
        for token in [*thought, marker]:
            ends = {EOS, HOLE}
            assert set(allowed(matcher.masks()[0])) == set(range(VOCAB)) - (set() if optional else ends)
            assert not matcher.stopped
            matcher.accept(token)
        assert re.fullmatch(REGEX, text_of(walk(matcher)))  # type: ignore[arg-type]


@pytest.mark.parametrize("optional", [False, True])
def test_masks_of_a_late_grammar_along_a_draft(compiler: GrammarCompiler, optional: bool) -> None:
    late = Grammar("regex", "[ab]{3}", after=(END_THINK,), optional=optional)
    a, c = TOKENIZER.encode("a"), TOKENIZER.encode("c")
    tokens = [*c, *a, END_THINK, *a, *a]
    drafter, walker = compiler.matcher(late), compiler.matcher(late)
    for at in range(len(tokens)):
        along = [mask.copy() for mask in drafter.masks(tokens[at:])]
        ahead = compiler.matcher(late)
        for token in tokens[:at]:
            ahead.accept(token)
        for mask, token in zip(along, [*tokens[at:], None], strict=True):
            assert (mask == ahead.masks()[0]).all()
            if token is not None:
                ahead.accept(token)
        drafter.accept(tokens[at])
        walker.accept(tokens[at])
        assert (drafter.masks()[0] == walker.masks()[0]).all()
    matcher = compiler.matcher(late)
    counts = [len(allowed(mask)) for mask in matcher.masks([*a, EOS, *a])]
    assert (counts[2] > 0) == optional  # nothing follows an end that was not allowed


def test_special_tokens_of_a_grammar_are_ids(compiler: GrammarCompiler) -> None:
    sep = TOKENIZER.special("<｜tool▁sep｜>")
    matcher = compiler.matcher(Grammar("lark", f'start: "f" <[{sep}]> %json {{"type": "object"}}'))
    for token in [*TOKENIZER.encode("f"), sep, *TOKENIZER.encode("{}")]:
        assert token in allowed(matcher.masks()[0])
        matcher.accept(token)
    assert matcher.stopped
