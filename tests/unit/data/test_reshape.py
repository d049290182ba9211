"""Fill-in-the-middle and split tokens: nothing is lost, the shares are right, and only content decides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rorqual.data import special
from rorqual.data.prepare import prepare
from rorqual.data.reshape import Reshaper
from rorqual.data.shards import Reader
from rorqual.data.tokenizer import Tokenizer
from rorqual.errors import DataError

from .conftest import Maker


def parts(ids: list[int], tokenizer: Tokenizer) -> tuple[str, str, str]:
    """(prefix, suffix, middle) of a document in the published form, its end of sentence included."""
    begin, hole, end = (tokenizer.special(m) for m in (special.FIM_BEGIN, special.FIM_HOLE, special.FIM_END))
    assert ids[0] == begin and ids[-1] == tokenizer.eos_id
    h, e = ids.index(hole), ids.index(end)
    assert h < e and all(ids.count(marker) == 1 for marker in (begin, hole, end))
    return tokenizer.decode(ids[1:h]), tokenizer.decode(ids[h + 1 : e]), tokenizer.decode(ids[e + 1 : -1])


def test_the_middle_is_moved_and_nothing_lost(small: Tokenizer, make_texts: Maker) -> None:
    always = Reshaper(small, 1.0, 0.0, 0)
    middles = []
    for text in make_texts(3, 60):
        ids = [
            i for s in always.segments(text) for i in ([small.special(s.text)] if s.special else small.encode(s.text))
        ]
        prefix, suffix, middle = parts([*ids, small.eos_id], small)
        assert prefix + middle + suffix == text
        middles.append(len(middle) / len(text))
    assert 0.2 < sum(middles) / len(middles) < 0.5  # two uniform cuts leave a third between them
    assert [s.text for s in always.segments("ab")] == ["ab"]


def test_shards_hold_a_tenth_in_that_form_whatever_the_batches(
    small: Tokenizer, small_dir: Path, tmp_path: Path, make_texts: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = make_texts(7, 1500)
    source = tmp_path / "texts.jsonl"
    source.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    report = prepare([source], tmp_path / "a", small_dir, fim=0.1, split_newlines=0.3)
    assert report.fim == pytest.approx(150, abs=40)
    reader = Reader(tmp_path / "a" / "train")
    seen = 0
    for i, text in enumerate(texts):
        ids, mask = reader.document(i)
        assert mask.all()
        if ids[0] == small.special(special.FIM_BEGIN):
            prefix, suffix, middle = parts(ids.tolist(), small)
            assert prefix + middle + suffix == text
            seen += 1
        else:
            assert small.decode(ids.tolist()) == text
    assert seen == report.fim
    monkeypatch.setattr("rorqual.data.prepare.BATCH_RECORDS", 7)
    prepare([source], tmp_path / "b", small_dir, fim=0.1, split_newlines=0.3, shard_tokens=500)
    other = Reader(tmp_path / "b" / "train")
    for i in range(len(texts)):
        assert reader.document(i)[0].tolist() == other.document(i)[0].tolist()
    with pytest.raises(DataError, match="other settings"):
        prepare([source], tmp_path / "a", small_dir, fim=0.2, split_newlines=0.3)


def test_tokens_of_punctuation_and_newlines_are_split_at_the_rate(deepseek: Tokenizer) -> None:
    """With DeepSeek's own vocabulary, where such tokens are many."""
    half = Reshaper(deepseek, 0.0, 0.5, 0)
    assert len(half.halves) > 100
    for token, pair in half.halves.items():
        assert b"".join(deepseek.token_bytes(t) for t in pair) == deepseek.token_bytes(token)
        whole = deepseek.token_bytes(token).decode()
        head = whole.rstrip("\r\n")
        assert head and head != whole and not any(c.isalnum() for c in head)
        assert pair == (*deepseek.encode(head), *deepseek.encode(whole[len(head) :]))
    text = "def f(x):\n    return [x];\n\n" * 400
    ids = deepseek.encode(text)
    candidates = sum(i in half.halves for i in ids)
    new = half.split(ids, text)
    assert deepseek.decode(new) == text
    assert candidates > 700 and len(new) - len(ids) == pytest.approx(candidates / 2, rel=0.15)
    assert half.split(ids, text) == new
    assert Reshaper(deepseek, 0.0, 0.5, 1).split(ids, text) != new
    assert Reshaper(deepseek, 0.0, 0.0, 0).split(ids, text) == ids


def test_shares_beyond_one_are_refused(small: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"lie in \[0, 1\]"):
        Reshaper(small, 1.5, 0.0, 0)
