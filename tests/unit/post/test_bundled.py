"""The recipe of the bundled model in miniature: its own script, run files and evaluation, on a tiny source."""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rorqual.checkpoint import load_model
from rorqual.config import load_toml
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
    for name, tensor in load_model(out / "shipped").state_dict().items():
        assert torch.equal(tensor, load_model(joined).state_dict()[name]), name


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


@pytest.mark.parametrize("name", ["heal", "mtp"])
def test_run_files_are_valid(name: str) -> None:
    cfg = load_toml(RunConfig, RUNS / f"{name}.toml")
    assert cfg.distill is not None and cfg.quantise.to == "int4"
