"""Copies and contamination against exact set arithmetic."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rorqual.cli.main import app
from rorqual.data.clean import CleanReport, clean, grams, words_of
from rorqual.errors import DataError

from .conftest import Maker


def article(seed: int, words: int = 300) -> list[str]:
    rng = random.Random(seed)
    return [rng.choice("abcdefghijklmnopqrstuvwxyz") + str(rng.randrange(200)) for _ in range(words)]


def jaccard(a: str, b: str) -> float:
    x, y = set(grams(words_of(a), 5)), set(grams(words_of(b), 5))
    return len(x & y) / len(x | y)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return path


def kept(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_copies_go_and_the_first_stays(tmp_path: Path) -> None:
    """Pairs of every similarity: those clearly above the threshold go, those clearly below stay, the first of each always
    stays, and what removed one is named."""
    texts, similarity = [], []
    for seed in range(60):
        original = article(seed)
        copy = list(original)
        for i in random.Random(seed).sample(range(300), seed):  # each change breaks up to five 5-grams
            copy[i] = "changed"
        texts += [" ".join(original), " ".join(copy).upper() + "!"]
        similarity.append(jaccard(*texts[-2:]))
    report = clean([write(tmp_path / "in.jsonl", texts)], tmp_path / "out.jsonl", near=0.7)
    left = kept(tmp_path / "out.jsonl")
    assert all(original in left for original in texts[::2])
    for copy, s in zip(texts[1::2], similarity, strict=True):
        if abs(s - 0.7) > 0.15:
            assert (copy in left) == (s < 0.7), s
    assert sum(s > 0.85 for s in similarity) >= 2 and sum(s < 0.55 for s in similarity) >= 20
    removed = [json.loads(line) for line in (tmp_path / "out.jsonl.removed.jsonl").read_text().splitlines()]
    assert len(removed) == report.near == 120 - report.kept
    for entry in removed:
        copy, original = (int(entry[k].rpartition(":")[2]) for k in ("place", "of"))
        assert entry["why"] == "near" and copy == original + 1


def test_what_an_evaluation_set_contains_goes(tmp_path: Path) -> None:
    question = "How many krill does a blue whale of ninety tonnes eat on a good day in the Antarctic summer?"
    short, tiny = "The capital of the krill is cold", "Yes it is"
    texts = [
        "Nothing of the kind stands here, and it is about something else entirely.",
        "I read: how many krill, does a BLUE whale of ninety tonnes eat on a good day... and forgot.",
        "How many krill does a blue whale of ninety tonnes eat? Twelve words are not enough.",
        f"Quoted in passing: {short.lower()}, they say.",
        "Yes it is. Such words are everywhere.",
    ]
    evals = write(tmp_path / "evals.jsonl", [question, short, tiny])
    report = clean([write(tmp_path / "in.jsonl", texts)], tmp_path / "out.jsonl", against=[evals])
    assert kept(tmp_path / "out.jsonl") == [texts[0], texts[2], texts[4]]
    assert report == CleanReport(kept=3, near=0, contaminated=2, skipped=0)
    removed = [json.loads(line) for line in (tmp_path / "out.jsonl.removed.jsonl").read_text().splitlines()]
    assert removed[0]["of"] == "how many krill does a blue whale of ninety tonnes eat on a"
    assert removed[1]["of"] == short.lower()


def test_conversations_and_packed_output(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": " ".join(article(1))}, {"role": "assistant", "content": "yes"}]}
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(chat)}\n{json.dumps(chat)}\n" + json.dumps({"text": " "}))
    assert clean([tmp_path / "in.jsonl"], tmp_path / "out.jsonl.xz") == CleanReport(1, 1, 0, 1)
    assert json.loads(lzma.decompress((tmp_path / "out.jsonl.xz").read_bytes())) == chat
    assert clean([tmp_path / "in.jsonl"], tmp_path / "all.jsonl", near=0) == CleanReport(2, 0, 0, 1)


def test_a_bad_line_leaves_no_half_file(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(DataError, match=r"in.jsonl:2: no valid JSON"):
        clean([tmp_path / "in.jsonl"], tmp_path / "out.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_from_the_command_line_to_shards(tmp_path: Path, small_dir: Path, make_texts: Maker) -> None:
    """`data clean`, then `data prepare` with the published rate of fill-in-the-middle."""
    texts = make_texts(5, 80)
    write(tmp_path / "in.jsonl", [*texts, *texts[:10]])
    runner, kept_file = CliRunner(), tmp_path / "kept.jsonl.xz"
    cleaned = runner.invoke(
        app, ["data", "clean", str(tmp_path / "in.jsonl"), "--out", str(kept_file), "--near", "0.95"]
    )
    assert cleaned.exit_code == 0 and "80 documents kept, 10 near-duplicates" in cleaned.output, cleaned.output
    options = [
        "--tokenizer",
        str(small_dir),
        "--out",
        str(tmp_path / "shards"),
        "--fim",
        "0.5",
        "--split-newlines",
        "0.5",
    ]
    prepared = runner.invoke(app, ["data", "prepare", str(kept_file), *options])
    assert prepared.exit_code == 0 and "80 documents" in prepared.output, prepared.output
    assert json.loads((tmp_path / "shards" / "prepare.json").read_text())["report"]["fim"] > 20
