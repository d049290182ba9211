from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rorqual.data import prepare as module
from rorqual.data.prepare import PrepareReport, prepare
from rorqual.data.shards import Reader
from rorqual.data.template import ChatTemplate
from rorqual.data.tokenizer import Tokenizer
from rorqual.errors import DataError

CHAT = [
    {"role": "user", "content": "what feeds a whale?"},
    {"role": "assistant", "content": "the sea <｜User｜>", "reasoning_content": "krill"},
]


@pytest.fixture
def corpus(tmp_path: Path, make_texts: Callable[[int, int], list[str]]) -> Path:
    """A folder of everything that is accepted, some of it empty or undecodable."""
    root = tmp_path / "corpus"
    (root / "deep" / "er").mkdir(parents=True)
    texts = make_texts(5, 160)
    for i, text in enumerate(texts[:40]):
        (root / "deep" / f"{i:02d}.txt").write_text(text, "utf-8")
    (root / "deep" / "er" / "a.md").write_text("# whale\n", "utf-8")
    (root / "deep" / "er" / "b.rst.gz").write_bytes(gzip.compress(texts[40].encode()))
    (root / "deep" / "er" / "c.txt.xz").write_bytes(lzma.compress(texts[41].encode()))
    (root / "empty.txt").write_text(" \n")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "ignored.png").write_bytes(b"\x89PNG")
    (root / ".hidden.txt").write_text("hidden")
    lines: list[dict[str, Any]] = [{"text": text, "source": "x"} for text in texts[42:]]
    lines[3:3] = [{"messages": CHAT}, {"text": ""}]
    packed = "\n\n".join(json.dumps(line) for line in lines)
    (root / "z.jsonl.xz").write_bytes(lzma.compress(packed.encode()))
    (root / "y.jsonl").write_text(json.dumps({"messages": CHAT, "id": 3}) + "\n", "utf-8")
    return root


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def run(corpus: Path, out: Path, tokenizer_dir: Path, **more: Any) -> PrepareReport:
    settings: dict[str, Any] = {"val_fraction": 0.2, "shard_tokens": 700}
    return prepare([corpus], out, tokenizer_dir, **(settings | more))


def texts_in(directory: Path, tokenizer: Tokenizer) -> list[str]:
    reader = Reader(directory)
    return [tokenizer.decode(reader.document(i)[0].tolist(), skip_special=False) for i in range(reader.documents)]


def test_every_document_arrives_once_in_order(corpus: Path, tmp_path: Path, small: Tokenizer, small_dir: Path) -> None:
    report = run(corpus, tmp_path / "out", small_dir, val_fraction=0.0)
    assert (report.empty, report.undecodable, report.bad) == (2, 1, 0)
    assert (report.documents, report.conversations) == (163, 2)
    found = texts_in(tmp_path / "out" / "train", small)
    expected = [(corpus / "deep" / f"{i:02d}.txt").read_text("utf-8") + "<｜end▁of▁sentence｜>" for i in range(40)]
    assert found[:40] == expected
    assert found[40] == "# whale\n<｜end▁of▁sentence｜>"
    assert len(found) == 163
    assert not (tmp_path / "out" / "val").exists()
    reader = Reader(tmp_path / "out" / "train")
    assert (reader.tokens, reader.learned) == (report.tokens, report.learned)
    assert len(reader.shards) > 3
    reader.verify()


def test_conversations_carry_their_mask_and_texts_are_learned_whole(
    corpus: Path, tmp_path: Path, small: Tokenizer, small_dir: Path
) -> None:
    run(corpus, tmp_path / "out", small_dir, val_fraction=0.0)
    reader = Reader(tmp_path / "out" / "train")
    ids, mask = ChatTemplate.load(small_dir).encode_for_training(small, CHAT)
    conversations = 0
    for i in range(reader.documents):
        tokens, learn = reader.document(i)
        if tokens[0] == small.bos_id:
            conversations += 1
            assert (tokens.tolist(), learn.tolist()) == (ids, mask)
        else:
            assert learn.all() and tokens[-1] == small.eos_id and small.bos_id not in tokens
    assert conversations == 2


def test_the_template_can_be_named(corpus: Path, tmp_path: Path, small: Tokenizer, small_dir: Path) -> None:
    run(corpus, tmp_path / "out", small_dir, val_fraction=0.0, template="v3")
    chats = [t for t in texts_in(tmp_path / "out" / "train", small) if t.startswith("<｜begin")]
    assert chats and not any("think>" in chat for chat in chats)


def test_the_split_goes_by_content(corpus: Path, tmp_path: Path, small: Tokenizer, small_dir: Path) -> None:
    report = run(corpus, tmp_path / "out", small_dir)
    train, val = (texts_in(tmp_path / "out" / split, small) for split in ("train", "val"))
    assert len(val) == report.val_documents and len(train) + len(val) == report.documents
    assert 0.08 < len(val) / report.documents < 0.35
    assert not set(train) & set(val)
    (tmp_path / "half").mkdir()
    for i in range(20):  # fewer documents, in another order: each in the same split as before
        (tmp_path / "half" / f"{99 - i}.txt").write_bytes((corpus / "deep" / f"{i:02d}.txt").read_bytes())
    run(tmp_path / "half", tmp_path / "other", small_dir)
    assert set(texts_in(tmp_path / "other" / "train", small)) <= set(train)


def test_batches_show_nowhere(corpus: Path, tmp_path: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(corpus, tmp_path / "a", small_dir)
    for n, name in ((1, "b"), (7, "c")):
        monkeypatch.setattr(module, "BATCH_RECORDS", n)
        run(corpus, tmp_path / name, small_dir)
        assert contents(tmp_path / name) == contents(tmp_path / "a")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
def test_interrupted_anywhere_and_run_again_gives_the_same_bytes(
    corpus: Path, tmp_path: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch, val_fraction: float
) -> None:
    whole = run(corpus, tmp_path / "whole", small_dir, val_fraction=val_fraction)
    expected = contents(tmp_path / "whole")
    monkeypatch.setattr(module, "BATCH_RECORDS", 5)
    rng = random.Random()
    replace = os.replace
    for attempt in range(6):
        out, left = tmp_path / f"out{attempt}", rng.randint(0, 40)

        def dies(source: Any, target: Any, when: bool = bool(attempt % 2)) -> None:
            """Stops before or after some rename: the only instants at which the disk changes its meaning."""
            nonlocal left
            left -= 1
            if when and left < 0:
                raise Killed
            replace(source, target)
            if left < 0:
                raise Killed

        monkeypatch.setattr(os, "replace", dies)
        for _ in range(100):
            try:
                report = run(corpus, out, small_dir, val_fraction=val_fraction)
                break
            except Killed:
                left = rng.randint(4, 40)
        monkeypatch.setattr(os, "replace", replace)
        assert report == whole
        assert contents(out) == expected


def test_a_killed_process_is_continued(corpus: Path, tmp_path: Path, small_dir: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for i in range(15):
        (many / f"{i}.jsonl.xz").write_bytes((corpus / "z.jsonl.xz").read_bytes())
    started = time.perf_counter()
    run(many, tmp_path / "whole", small_dir, shard_tokens=3000)
    took = time.perf_counter() - started
    command = f"import rorqual.data.prepare as p; p.prepare([{str(many)!r}], {str(tmp_path / 'out')!r}, "
    command += f"{str(small_dir)!r}, val_fraction=0.2, shard_tokens=3000)"
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", command])
        deadline = time.perf_counter() + 20
        while not (tmp_path / "out" / "prepare.json").exists() and time.perf_counter() < deadline:
            time.sleep(0.01)
        time.sleep(random.random() * took)
        child.send_signal(signal.SIGKILL)
        child.wait()
    run(many, tmp_path / "out", small_dir, shard_tokens=3000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_run_is_not_done_again_and_others_are_not_overwritten(
    corpus: Path, tmp_path: Path, small_dir: Path
) -> None:
    out = tmp_path / "out"
    report = run(corpus, out, small_dir)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert run(corpus, out, small_dir) == report
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(DataError, match="other inputs or with other settings"):
        run(corpus, out, small_dir, shard_tokens=800)
    (corpus / "more.txt").write_text("more")
    with pytest.raises(DataError, match="other inputs or with other settings"):
        run(corpus, out, small_dir)
    assert run(corpus, out, small_dir, overwrite=True).documents == report.documents + 1
    (out / "prepare.json").unlink()
    with pytest.raises(DataError, match=r"without prepare.json"):
        run(corpus, out, small_dir)


def test_lost_shards_are_made_again(corpus: Path, tmp_path: Path, small_dir: Path) -> None:
    out = tmp_path / "out"
    run(corpus, out, small_dir)
    expected = contents(out)
    for harm in ("unlink", "cut"):
        victim = out / "train" / "shard-00001.tokens"
        victim.unlink() if harm == "unlink" else victim.write_bytes(b"x")
        with pytest.raises(DataError, match="data prepare"):
            Reader(out / "train")
        run(corpus, out, small_dir)
        assert contents(out) == expected


BAD = [
    "{",
    "[1]",
    '{"txt": "a"}',
    '{"text": 3}',
    '{"text": "a", "messages": []}',
    '{"messages": []}',
    '{"messages": [{"role": "user", "content": "hi"}]}',
    '{"messages": [{"role": "tool", "content": "hi"}, {"role": "assistant", "content": "hi"}]}',
    "[" * 100000,
]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_named_or_counted(tmp_path: Path, small: Tokenizer, small_dir: Path, bad: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"text": "one"}}\n\n{bad}\n{{"text": "two"}}\n')
    with pytest.raises(DataError, match=r"lines.jsonl:3: "):
        prepare([path], tmp_path / "out", small_dir)
    report = prepare([path], tmp_path / "out", small_dir, skip_bad=True)
    assert (report.documents, report.bad) == (2, 1)
    assert [t[:3] for t in texts_in(tmp_path / "out" / "train", small)] == ["one", "two"]


def test_a_bad_byte_in_a_line(tmp_path: Path, small_dir: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"lines.jsonl:1: "):
        prepare([path], tmp_path / "out", small_dir)


def test_inputs_that_cannot_be_used(tmp_path: Path, small_dir: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a"}\n' * 1000)[:-20])
    (tmp_path / "no.txt.gz").write_bytes(b"not gzip")
    (tmp_path / "none").mkdir()
    for name, says in (
        ("missing.txt", "does not exist"),
        ("a.pdf", "no known kind"),
        ("none", "no files"),
        ("cut.jsonl.xz", "cannot be read"),
        ("no.txt.gz", "cannot be read"),
    ):
        with pytest.raises(DataError, match=says) as caught:
            prepare([tmp_path / name], tmp_path / f"out-{name}", small_dir)
        assert caught.value.remedy
    with pytest.raises(DataError, match=r"tokenizer.json does not exist"):
        prepare([tmp_path], tmp_path / "out", tmp_path)
    with pytest.raises(DataError, match="val_fraction"):
        prepare([tmp_path], tmp_path / "out", small_dir, val_fraction=1.0)


def test_a_foreign_template_matters_only_to_conversations(
    corpus: Path, tmp_path: Path, small: Tokenizer, small_dir: Path
) -> None:
    small.save(tmp_path / "foreign")
    config = json.loads((small_dir / "tokenizer_config.json").read_text("utf-8"))
    config["chat_template"] = "{{ messages[0].content }}"
    (tmp_path / "foreign" / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    assert prepare([corpus / "deep"], tmp_path / "a", tmp_path / "foreign").documents == 43
    with pytest.raises(DataError, match="another family"):
        prepare([corpus], tmp_path / "b", tmp_path / "foreign", skip_bad=True)


def test_progress_is_told(corpus: Path, tmp_path: Path, small_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_RECORDS", 20)
    told: list[tuple[PrepareReport, str]] = []
    report = run(corpus, tmp_path / "out", small_dir, progress=lambda r, place: told.append((r, place)))
    assert told[-1][0] == report
    assert [r.tokens for r, _ in told] == sorted(r.tokens for r, _ in told)
    assert "z.jsonl.xz:" in told[-1][1]
    assert np.isfinite(report.characters / report.tokens)
