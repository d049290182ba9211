"""The recipe of the bundled model in miniature: its own script, run files and evaluation, on a tiny source."""

from __future__ import annotations

import importlib.util
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rorqual.checkpoint import load_model
from rorqual.config import ModelConfig, load_toml
from rorqual.post.llama_tokenizer import TokenizerFiles
from rorqual.train.config import RunConfig
from tests.unit.post.test_llama import write_gguf

ROOT = Path(__file__).resolve().parents[3]
RUNS = ROOT / "runs" / "bundled"


def environment(folder: Path) -> dict[str, str]:
    here = {
        "PYTHON": sys.executable,
        "DATA": str(folder / "data"),
        "OUT_DIR": str(folder / "out"),
        "OMP_NUM_THREADS": "1",
        "VAL": "0.2",
    }
    return {**os.environ, **here, "PYTHONPATH": str(ROOT)}


def step(folder: Path, *words: str) -> str:
    command = [str(RUNS / "gpu.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(folder), timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def chats(text: str) -> str:
    turns = [[("user", f"What is {i}?"), ("assistant", text.format(i))] for i in range(400)]
    return "\n".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in t]}) for t in turns) + "\n"


def test_the_steps_lead_from_the_source_to_files_that_load(
    tmp_path: Path, tokenizer_files: TokenizerFiles, corpus_files: list[Path]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for folder in (data / "source", data / "text", out / "written" / "chat", out / "written" / "text"):
        folder.mkdir(parents=True)
    write_gguf(tmp_path / "whole.gguf", tokenizer_files, quantised=True)
    content = (tmp_path / "whole.gguf").read_bytes()
    for i, part in enumerate("abcd"):
        piece = content[i * 5000 : (i + 1) * 5000 if i < 3 else None]
        (data / "source" / f"part-{part}.xz").write_bytes(lzma.compress(piece))
    for i, file in enumerate(corpus_files[:40]):
        (data / "text" / f"{i}.txt").write_text(file.read_text())
        (out / "written" / "text" / f"{i}.txt").write_text(file.read_text())
    prose = [json.dumps({"text": file.read_text(), "source": "books"}) for file in corpus_files[40:60]]
    (data / "text" / "prose-books.jsonl").write_text("\n".join(prose) + "\n")
    (out / "written" / "chat" / "wave-001.jsonl").write_text(chats("It is {}."))
    (out / "lessons.jsonl").write_text(chats("{}."))

    step(tmp_path, "source")
    shape = ("--drop", "0", "--shared", "3", "--routed", "3", "--width", "16", "--top-k", "2")
    assert "perplexity" in step(tmp_path, "convert", "--tokens", "1024", "--length", "64", "--rank", "32", *shape)
    step(tmp_path, "prepare")
    small = [
        "steps=6", "batch=4", "micro_batch=2", "data.seq_len=64", "eval_rows=2", "optim.warmup_steps=1", "threads=1",
    ]  # fmt: skip
    heal_file = written_for(tmp_path, "heal")
    run(["distill", str(heal_file), *(x for s in small for x in ("--set", s))])
    run(["distill", str(written_for(tmp_path, "mtp")), *(x for s in small for x in ("--set", s))])
    shutil.rmtree(out / "mtp" / "model")  # as if it had been stopped: its newest checkpoint serves
    step(tmp_path, "back")
    assert "shipped" in step(tmp_path, "evaluate", "--run", str(heal_file), "--rows", "2", "--seq-len", "64")
    table = json.loads((out / "evaluation.json").read_text())["models"]
    assert table["teacher"]["chat"]["kl"] == 0 and table["converted"]["chat"]["kl"] > 0
    assert set(table) == {"teacher", "converted", "healed", "shipped"}
    joined, back = tmp_path / "joined", out / "back"
    subprocess.run(["tar", "-C", back, "-xJf", back / "notes.tar.xz"], check=True)
    assert (back / "mtp" / "metrics.jsonl").is_file() and (back / "shards" / "chat" / "val").is_dir()
    carry = [str(RUNS / "carry.py"), "join", str(back), "--gguf", str(out / "smollm2.gguf")]
    subprocess.run([sys.executable, *carry, "--out", str(joined)], check=True, timeout=60, env=environment(tmp_path))
    before = load_model(joined).state_dict()
    for name, tensor in load_model(out / "shipped").state_dict().items():
        assert torch.equal(tensor, before[name]), name

    # Healing once more changes one file of the weights: what stays comes out of rounding as it was.
    apart = ("--set", f"init_from={joined}", *(x for s in small for x in ("--set", s)))
    run(["distill", str(written_for(tmp_path, "apart")), *apart])
    shutil.rmtree(out / "mtp")
    shutil.rmtree(back)
    step(tmp_path, "back")
    subprocess.run(["tar", "-C", back, "-xJf", back / "notes.tar.xz"], check=True)
    assert (back / "apart" / "metrics.jsonl").is_file()
    again = tmp_path / "again"
    carry = [str(RUNS / "carry.py"), "join", str(back), "--like", str(joined), "--out", str(again)]
    subprocess.run([sys.executable, *carry], check=True, timeout=60, env=environment(tmp_path))
    old, new = (script("carry").read(folder) for folder in (joined, again))
    assert old.keys() == new.keys()
    changed = {name for name, tensor in old.items() if not torch.equal(tensor, new[name])}
    layers = ModelConfig.load(str(joined)).num_hidden_layers
    where = re.compile(script("carry").APART.pattern.replace("30", str(layers)))
    # The miniature's head is not its embedding, as the real one's is, so it learns along.
    assert not {name for name in changed if not where.search(name) and not name.startswith("lm_head.")}
    assert {name.split(".")[2] for name in changed if ".layers." in name} == {str(i) for i in range(layers + 1)}


def written_for(folder: Path, name: str) -> Path:
    """A run file with the paths of the miniature, whose source spells its special tokens in another way."""
    text = (RUNS / f"{name}.toml").read_text().replace("out/bundled", str(folder / "out"))
    target = folder / f"{name}.toml"
    target.write_text(text.replace("<|im_start|>", "<spare_6>").replace("<|im_end|>", "<spare_7>"))
    return target


def run(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rorqual", *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["heal", "mtp", "apart"])
def test_run_files_are_valid(name: str) -> None:
    cfg = load_toml(RunConfig, RUNS / f"{name}.toml")
    assert cfg.distill is not None and cfg.quantise.to == "int4"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bundled_{name}", RUNS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pieces_of_two_packings_or_too_few_are_refused(tmp_path: Path) -> None:
    pieces_of = script("carry").pieces_of
    with pytest.raises(SystemExit, match="no pieces"):
        pieces_of(tmp_path)
    for i in (1, 3):
        (tmp_path / f"weights-{i}-of-3.xz").touch()
    with pytest.raises(SystemExit, match=r"weights-2-of-3\.xz missing"):
        pieces_of(tmp_path)
    (tmp_path / "weights-2-of-3.xz").touch()
    assert [p.name[8] for p in pieces_of(tmp_path)] == ["1", "2", "3"]
    (tmp_path / "weights-1-of-2.xz").touch()
    with pytest.raises(SystemExit, match="several packings"):
        pieces_of(tmp_path)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("chat", [5.2, 5.3])
def test_the_card_says_what_holds_and_what_was_missed(tmp_path: Path, again: bool, chat: float) -> None:
    """5 % of chat perplexity is the border; everything else in these records holds."""
    shared = {"perplexity": 5.0, "kl": 0.1, "same_first_choice": 0.8}
    models = {
        name: {s: dict(shared) for s in ("text", "chat", "books")}
        for name in ("teacher", "converted", "healed", "shipped")
    }
    models["shipped"]["chat"]["perplexity"] = chat
    exam = {
        "questions": 400,
        "off": [0.4, 0.05],
        "on": [0.6, 0.05],
        "teacher": [0.1, 0.03],
        "on_minus_off": [0.2, 0.04],
    }
    exam["by_kind"] = {"add": {"off": "4/10", "on": "6/10", "teacher": "1/10"}}
    held = {"prompts": 200, "max_tokens": 512, "stopped": 0.97, "repeated_8grams": 0.01, "tokens": 90.0}
    judged = {
        "exam": exam, "held_out": held, "held_out_teacher": {"stopped": 0.8, "repeated_8grams": 0.2},
        "drafts": {"drafted": 100, "acceptance": 0.6},
        "fixed": [{"prompt": "Who?", "answer": "I am\nRorqual.", "teacher": "SmolLM."}],
    }  # fmt: skip
    step = {"step": 7, "tokens": 7000, "elapsed_s": 3.0, "lm_loss": 0.5}
    back, model = tmp_path / "back", tmp_path / "rorqual-some"
    for run in ("heal", "mtp", "again", "written"):
        (back / run).mkdir(parents=True)
        (back / run / "metrics.jsonl").write_text(json.dumps(step) + "\n" if again or run != "again" else "")
    written = {"tokens": 9000, "seconds": 150.0, "conversations": 30, "texts": 4}
    for name, content in (("judged", judged), ("evaluation", {"models": models}), ("written/generate-1", written)):
        (back / f"{name}.json").write_text(json.dumps(content))
    model.mkdir()
    (model / "config.json").write_text(json.dumps(ModelConfig.load("test").to_json()))
    (model / "generation_config.json").write_text('{"temperature": 0.7}')
    (back / "power.csv").write_text("700.5\n[N/A]\n" * 60)
    run = {
        "prompt": 128,
        "engines": {"rorqual": {"tokens_per_s": 61.0}},
        "environment": {"hardware": "2 cores", "date": "2026-01-01"},
    }
    (back / "decode.json").write_text(json.dumps(run))
    text = script("card").card(back, model)
    assert ("**missed**" in text) == (chat > 5.25) and text.count("holds |") == (6 if chat > 5.25 else 7)
    assert ("Healing once more" in text) == again and "> I am\n> Rorqual." in text and "+20.0%" not in text
    assert "better with DeepThink on" in text and "12 Wh" in text and "| rorqual | 61 tokens/s |" in text

    # Healed once more, by a run that has no record of the first one: the card keeps what it said.
    (model / "README.md").write_text(text)
    (back / "heal").rename(back / "apart")
    shutil.rmtree(back / "again")
    (back / "apart" / "metrics.jsonl").write_text(json.dumps(step | {"step": 9}) + "\n")
    more = script("card").card(back, model)
    assert more.count("## Training") == 1 and more.count("## Data and licences") == 1
    first, then, second = more.partition("## Training")[2].partition("## Speed")[0].partition("Then: ")
    assert "third through rounded weights: 7 steps" in first and then and "one file of the weights" in second
    assert "9 steps" in second and second.count("The teacher wrote 9,000 tokens") == 1
    (model / "README.md").write_text(more)
    (back / "decode.json").unlink()
    assert script("card").card(back, model) == more  # made again, with the speed that it tells already


def test_the_pieces_of_a_book_are_the_book() -> None:
    documents = script("literature").documents
    for tail in (100, 3_000):  # too short for a piece of its own, or not
        book = [f"{i} " + "word " * 1_000 for i in range(9)] + ["CHAPTER II", "so it goes " * (tail // 11)]
        pieces = documents(book)
        assert "\n\n".join(pieces) == "\n\n".join(book) and len(pieces) == (3 if tail > 2_000 else 2)
        assert documents(book[:1]) == book[:1]


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("It is Paris.", 2),
        ("I'm a helpful AI assistant.", 1),
        ("My name is Elena.", 1),
        ("I am a fan of assistants.", 2),
    ],
)
def test_a_conversation_ends_where_the_teacher_says_who_it_is(answer: str, kept: int) -> None:
    turns = [("user", "Hello!"), ("assistant", "Hello there."), ("user", "And?"), ("assistant", answer)]
    row = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
    assert len(script("generate").conversation(row)) == 2 * kept
