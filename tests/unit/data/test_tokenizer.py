from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data import special
from rorqual.data.tokenizer import Tokenizer, train_tokenizer
from rorqual.errors import DataError

Maker = Callable[[int, int], list[str]]
MARKERS = st.sampled_from([*special.SPECIAL_TOKENS, "<｜place▁holder▁no▁7｜>", "<think", "｜>", "<|"])
TEXT = st.lists(st.one_of(st.text(), MARKERS, st.sampled_from(["鲸", "🐋👩‍👩‍👧", " \n\n", "\r\nA", "1234567"]))).map(
    "".join
)


@pytest.fixture(scope="module", params=["deepseek", "small"])
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Tokenizer)
    return found


@settings(deadline=None, max_examples=150)
@given(text=TEXT)
def test_text_round_trips_and_never_becomes_special(tok: Tokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert not tok.special_ids.intersection(ids)
    assert tok.decode(ids) == tok.decode(ids, skip_special=False) == text


def test_every_special_token_spelled_out_is_plain_text(tok: Tokenizer, deepseek: Tokenizer) -> None:
    for name in (*special.SPECIAL_TOKENS, "<｜place▁holder▁no▁7｜>"):
        for text in (name, f"a{name}b", f" {name}\n", name * 3):
            assert not tok.special_ids.intersection(tok.encode(text))


@settings(deadline=None, max_examples=100)
@given(text=TEXT)
def test_ordinary_text_encodes_as_the_stock_library_does(
    deepseek: Tokenizer, stock: tokenizers.Tokenizer, text: str
) -> None:
    if not any(marker in text for marker in (*special.SPECIAL_TOKENS, "<｜")):
        assert deepseek.encode(text) == stock.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def stock(deepseek_dir: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(deepseek_dir / "tokenizer.json"))


def test_long_texts_cut_for_parallel_encoding_give_the_same_ids(
    small: Tokenizer, small_dir: Path, make_texts: Maker
) -> None:
    stock = tokenizers.Tokenizer.from_file(str(small_dir / "tokenizer.json"))
    texts = ["".join(make_texts(seed, 1200)) for seed in range(3)] + ["short", ""]
    assert len(texts[0]) > 3 * 65536
    assert small.encode_batch(texts) == [stock.encode(text, add_special_tokens=False).ids for text in texts]


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_stream_equals_decode_and_never_shows_half_a_character(tok: Tokenizer, data: st.DataObject) -> None:
    single = [i for i in range(tok.vocab_size) if len(tok.token_bytes(i)) == 1][:256]
    text_ids = tok.encode(data.draw(TEXT))
    noise = data.draw(st.lists(st.one_of(st.sampled_from(single), st.integers(0, tok.vocab_size + 5))))
    cut = data.draw(st.integers(0, len(text_ids)))
    ids = text_ids[:cut] + noise + text_ids[cut:]
    for skip in (True, False):
        stream = tok.stream(skip)
        parts = [stream.push(i) for i in ids]
        parts.append(stream.flush())
        assert "".join(parts) == tok.decode(ids, skip)
    stream = tok.stream()
    assert not any("\ufffd" in stream.push(i) for i in tok.encode("🐋鲸 naïve 👩‍👩‍👧")), "valid text needs no U+FFFD"


def test_decode_agrees_with_the_library_on_any_bytes(deepseek: Tokenizer, stock: tokenizers.Tokenizer) -> None:
    import random

    rng = random.Random()
    for _ in range(200):
        ids = [rng.choice((rng.randrange(3, 260), rng.randrange(128815))) for _ in range(rng.randrange(12))]
        for skip in (True, False):
            assert deepseek.decode(ids, skip) == stock.decode(ids, skip_special_tokens=skip)


def test_deepseeks_published_ids(deepseek: Tokenizer) -> None:
    assert deepseek.vocab_size == 128815
    assert (deepseek.bos_id, deepseek.eos_id) == (0, 1)
    assert deepseek.special(special.USER) == 128803
    assert deepseek.special(special.END_THINK) == 128799
    assert not deepseek.has_special("<nonsense>")
    with pytest.raises(DataError, match="nonsense"):
        deepseek.special("<nonsense>")
    assert deepseek.decode([0, 128803, 1], skip_special=True) == special.USER


def test_lone_surrogates_are_replaced(small: Tokenizer) -> None:
    assert small.decode(small.encode("a\ud800b\ud83d\udc0b")) == "a\ufffdb🐋"


def test_training_is_deterministic_and_fills_the_vocabulary(small: Tokenizer, make_texts: Maker) -> None:
    seen: list[int] = []
    again = train_tokenizer(iter(make_texts(0, 200)), 360, seen.append)
    assert again.fingerprint == small.fingerprint
    assert small.vocab_size == 360
    assert [small.special(name) for name in special.SPECIAL_TOKENS] == list(range(22))
    assert (small.bos_id, small.eos_id, small.pad_id) == (0, 1, 2)
    assert seen == sorted(seen) and seen[-1] == sum(map(len, make_texts(0, 200)))
    assert train_tokenizer(make_texts(1, 200), 360).fingerprint != small.fingerprint


def test_pre_tokenisation_is_deepseeks(small_dir: Path, deepseek_dir: Path) -> None:
    ours, theirs = (json.loads((d / "tokenizer.json").read_text("utf-8")) for d in (small_dir, deepseek_dir))
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"]


def test_too_little_text_says_how_far_it_got() -> None:
    with pytest.raises(DataError, match=r"vocabulary of 5000: \d+ tokens were reached"):
        train_tokenizer(["too little"], 5000)
    with pytest.raises(DataError, match="no room"):
        train_tokenizer(["text"], 100)


def test_save_and_load(small: Tokenizer, small_dir: Path) -> None:
    loaded = Tokenizer.load(small_dir)
    assert loaded.fingerprint == small.fingerprint
    assert loaded.encode("the whale 🐋") == small.encode("the whale 🐋")


def test_transformers_loads_what_is_saved(small: Tokenizer, small_dir: Path, make_texts: Maker) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(small_dir)
    assert len(theirs) == small.vocab_size
    for text in make_texts(7, 20):
        assert theirs.encode(text, add_special_tokens=False) == small.encode(text)
        assert theirs.encode(text) == [small.bos_id, *small.encode(text)], "add_bos_token"
        assert theirs.decode(small.encode(text)) == text
    assert theirs.pad_token_id == small.pad_id
    assert (
        theirs.decode([0, 3, 9, 1], skip_special_tokens=True) == small.decode([0, 3, 9, 1]) == "<think><｜Assistant｜>"
    )
    theirs_ids = theirs.convert_tokens_to_ids(list(special.SPECIAL_TOKENS))
    assert theirs_ids == [small.special(name) for name in special.SPECIAL_TOKENS]


@pytest.mark.parametrize("victim", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[1]", b"{}", b"\xff\xfe", b'{"model": {"vocab": {"a": 0}, "merges": []}}']
)
def test_missing_and_broken_files(small: Tokenizer, tmp_path: Path, victim: str, content: bytes | None) -> None:
    small.save(tmp_path)
    if content is None:
        (tmp_path / victim).unlink()
    else:
        (tmp_path / victim).write_bytes(content)
    with pytest.raises(DataError) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.remedy
