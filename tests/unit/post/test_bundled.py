"""The recipe of the bundled model in miniature: its own script, run files and evaluation, on a tiny source."""

from __future__ import annotations

import json
import lzma
import os
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


def step(folder: Path, *words: str) -> str:
    env = {**os.environ, "PYTHON": sys.executable, "DATA": str(folder / "data"), "OUT_DIR": str(folder / "out")}
    done = subprocess.run([str(RUNS / "gpu.sh"), *words], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_steps_lead_from_the_source_to_files_that_load(
    tmp_path: Path, tokenizer_files: TokenizerFiles, corpus_files: list[Path]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "source").mkdir(parents=True)
    (data / "text").mkdir()
    (out / "dialogues").mkdir(parents=True)
    write_gguf(tmp_path / "whole.gguf", tokenizer_files, quantised=True)
    content = (tmp_path / "whole.gguf").read_bytes()
    (data / "source" / "part-a").write_bytes(content[:5000])
    (data / "source" / "part-b").write_bytes(content[5000:])
    for i, file in enumerate(corpus_files[:40]):
        (data / "text" / f"{i}.txt").write_text(file.read_text())
    chats = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What is {i}?"},
                    {"role": "assistant", "content": f"It is {i}."},
                ]
            }
        )
        for i in range(400)
    ]
    (out / "dialogues" / "part-0.jsonl").write_text("\n".join(chats))
    (data / "lessons.jsonl.xz").write_bytes(lzma.compress("\n".join(chats).encode()))

    sizes = ("--tokens", "1024", "--length", "64", "--rank", "32", "--routed", "3", "--width", "16", "--top-k", "2")
    assert "perplexity" in step(tmp_path, "convert", *sizes)
    step(tmp_path, "prepare", "--val-fraction", "0.2")
    small = [
        "steps=6", "batch=4", "micro_batch=2", "data.seq_len=64", "eval_rows=2", "optim.warmup_steps=1", "threads=1",
    ]  # fmt: skip
    sources = [("text", 0.5, "teacher"), ("chat", 0.4, "teacher"), ("lessons", 0.1, "data")]
    train = ",".join(f"{{path='{out}/shards/{n}/train',weight={w},target='{t}'}}" for n, w, t in sources)
    val = f"data.val=[{{path='{out}/shards/chat/val'}}]"
    heal = [*small, f"data.train=[{train}]", val, f"init_from={out}/converted", f"out={out}/heal"]
    text = (RUNS / "heal.toml").read_text().replace("out/bundled/smollm2.gguf", f"{out}/smollm2.gguf")
    heal_file = tmp_path / "heal.toml"  # the tiny source spells its special tokens in another way
    heal_file.write_text(text.replace("<|im_start|>", "<spare_6>").replace("<|im_end|>", "<spare_7>"))
    run(["distill", str(heal_file), *(x for s in heal for x in ("--set", s))])
    mtp = [*small, f"data.train=[{train.partition(',{')[0].replace(',weight=0.5', '')}]", val]
    mtp += [f"init_from={out}/heal/model", f"out={out}/mtp"]
    step(tmp_path, "mtp", *(x for s in mtp for x in ("--set", s)))
    step(tmp_path, "ship", "--max-shard-gb", "0.001")
    options = ("--run", str(heal_file), "--rows", "2", "--seq-len", "64")
    assert "shipped" in step(tmp_path, "evaluate", *options)
    table = json.loads((out / "evaluation.json").read_text())["models"]
    assert table["teacher"]["chat"]["kl"] == 0 and table["converted"]["chat"]["kl"] > 0
    assert set(table) == {"teacher", "converted", "healed", "shipped"}
    step(tmp_path, "back", "1", str(tmp_path / "back"))
    assert (tmp_path / "back" / "rest.tar.xz").is_file()
    shipped = load_model(out / "shipped")
    assert torch.isfinite(shipped(torch.zeros(1, 4, dtype=torch.int64))).all()


def run(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rorqual", *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["heal", "mtp"])
def test_run_files_are_valid(name: str) -> None:
    cfg = load_toml(RunConfig, RUNS / f"{name}.toml")
    assert cfg.distill is not None and cfg.quantise.to == "int4"
