"""`make interop`: the same weights in rorqual, transformers and llama.cpp, logits compared engine by engine.

For drawn configurations (depth 2 to 8, low-rank query or not, groups, YaRN in three spellings, tied or not) random models
are saved, exported to GGUF and run on the same token ids; so are their FP8 and int4 conversions, dequantised. Whatever
is computed in fp32 must agree to a relative error ||a - b|| / ||b|| of 2e-3; what the 16- and 8-bit files lose is
shown beside it. Then the bundled model: the same token
ids for the same text, the same greedy continuations. llama.cpp runs in a virtual environment of its own, one process
a file, because what its loader does not like it aborts on.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rorqual.checkpoint import load_model, save_model  # noqa: E402
from rorqual.checkpoint.convert import convert  # noqa: E402
from rorqual.checkpoint.gguf import export_gguf  # noqa: E402
from rorqual.checkpoint.source import Source  # noqa: E402
from rorqual.cli.bench_report import environment  # noqa: E402
from rorqual.config import ModelConfig, resolve_model  # noqa: E402
from rorqual.data.tokenizer import Tokenizer  # noqa: E402
from rorqual.model.transformer import Transformer  # noqa: E402
from tests.parity import YARN, build, draw, twin  # noqa: E402

LLAMA = "llama-cpp-python==0.3.36"
LIMIT = 2e-3
TOKENS = 81
"""Beyond the 64 positions that the drawn YaRN models call their original context."""
BUNDLED = resolve_model()
TRICKY = (
    "Once upon a time there was a whale.",
    "  two spaces,\ttab\n\n\nthree newlines\r\nand a Windows one  ",
    "1234567890 3.14159 1,000,000 ½ ² Ⅷ",
    "don't won't I'LL we'Ve 'tis",
    "鲸鱼在海里游泳。ひらがなとカタカナ、漢字123",
    "Größe naïve Ελληνικά русский العربية हिन्दी ไทย",
    "🐋👩‍👩‍👧 e\u0301 \u200b zero width \ufeff bom",
    "def f(x):\n    return x**2 # !?%$§\n\t\tpass\n",
    "<|not a token|> < think> <｜User｜> [PAD7]",
    " ",
    "\n",
    "a" * 300,
    "!!!???...---===///\\\\\\ (a)[b]{c} https://example.org/?q=1&r=2#s",
    "\x00\x01\x7f control",
)
PROMPTS = ("Once upon a time", "The little whale", "One day, Tom and his dog", "Mia asked her mother:")

PEER = """
import ctypes, json, sys
import numpy as np
import llama_cpp as api
from llama_cpp import llama_cpp_ext as ext
from llama_cpp import Llama
from llama_cpp import llama_cpp as core

# Where there is AMX, llama.cpp keeps weights in a form of its own for it, and aborts on some of these models
# (GGML_ASSERT(*cur_backend_id != -1) in 0.3.36).
default = core.llama_model_default_params


def plain():
    params = default()
    params.use_extra_bufts = False
    return params


core.llama_model_default_params = api.llama_model_default_params = plain


def drafts(path, ids):
    # Logits of the multi-token prediction block for every token but the first, given the hidden states before them.
    params = api.llama_model_default_params()
    params.load_mtp = True
    weights = api.llama_model_load_from_file(path.encode(), params)
    def context(kind):
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = 0
        params.ctx_type, params.flash_attn_type = kind, 0
        return api.llama_init_from_model(weights, params)
    def decode(context, ids, first, h=None):
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, first + i, 1, 0, 1
        if h is not None:
            batch.embd = h.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert api.llama_decode(context, batch) == 0
    def rows(pointer, width):
        return np.ctypeslib.as_array(pointer, shape=(len(ids), width))
    width = api.llama_model_n_embd(weights)
    target, draft = context(0), context(1)
    ext.llama_set_embeddings_nextn(target, True, False)
    ext.llama_set_embeddings_nextn(draft, True, True)
    decode(target, ids, 0)
    h = rows(ext.llama_get_embeddings_nextn(target), width)[:-1].astype(np.float32).copy()
    decode(draft, ids[1:], 1, h)
    vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(weights))
    return rows(api.llama_get_logits(draft), vocab)[:-1].copy()


job = json.load(sys.stdin)
if "draft" in job:
    np.save(job["out"] + "-draft.npy", drafts(job["model"], job["draft"]))
    print("{}")
    sys.exit()
model = Llama(job["model"], n_ctx=512, n_batch=512, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1,
              type_k=0, type_v=0, flash_attn=job.get("flash", False))
out = {}
for k, ids in enumerate(job.get("ids", [])):
    model.reset()
    model.eval(ids)
    np.save(f"{job['out']}-{k}.npy", model.scores[: len(ids)].astype(np.float32))
if "texts" in job:
    out["tokens"] = [model.tokenize(t.encode(), add_bos=False, special=False) for t in job["texts"]]
if "greedy" in job:
    out["greedy"] = []
    for ids in job["greedy"]:
        model.reset()
        model.eval(ids)
        more = []
        for _ in range(job["steps"]):
            more.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(more[-1:])
        out["greedy"].append(more)
print(json.dumps(out))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", help="llama.cpp's environment, made if missing")
    parser.add_argument("--configs", type=int, default=14)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "interop.json")
    options = parser.parse_args()
    python = peer_python(options.peers)
    torch.set_grad_enabled(False)
    rows = []
    for seed in range(options.configs):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(drawn_row(python, seed, Path(folder)))
            print(f"{rows[-1]['model']}: {'failed' if rows[-1]['failed'] else 'ok'}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        rows.append(bundled_row(python, Path(folder)))
    show(rows)
    peers = {"llama-cpp-python": LLAMA.partition("==")[2]}
    result = {"kind": "interop", "limit": LIMIT, "rows": rows, "environment": environment("cpu") | peers}
    options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if failed := [f"{row['model']}: {', '.join(row['failed'])}" for row in rows if row["failed"]]:
        sys.exit("interop failed for " + "; ".join(failed))


def peer_python(directory: Path) -> Path:
    """The interpreter of llama.cpp's environment; building it takes minutes and a C++ compiler."""
    python = directory / "bin" / "python"
    if not python.is_file():
        venv.create(directory, with_pip=True)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", LLAMA], check=True)
    return python


def drawn(seed: int) -> ModelConfig:
    """Even seeds keep the parity test's odd sizes; the others have sizes that 8-bit blocks fit. Every fourth keeps all of
    its groups, which llama.cpp has no word for; every sixth has layers without experts only."""
    r, cfg = random.Random(seed), draw(seed).replace(first_k_dense_replace=0)
    scalings = (
        None,
        YARN,
        {k: v for k, v in YARN.items() if "mscale" not in k},
        {**YARN, "mscale": 0.707, "factor": 8},
    )
    cfg = cfg.replace(
        num_hidden_layers=2 + seed % 7, rope_scaling=scalings[(seed + seed // 4) % 4], tie_word_embeddings=seed % 3 == 1
    )
    cfg = cfg.replace(q_lora_rank=(None, 32)[seed // 2 % 2], num_nextn_predict_layers=int(seed % 4 == 3))
    if seed % 4 == 3:
        cfg = cfg.replace(topk_group=cfg.n_group)
    if seed % 2:
        cfg = cfg.replace(
            hidden_size=64, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
            intermediate_size=96, moe_intermediate_size=32, num_attention_heads=r.choice([2, 3, 4]),
        )  # fmt: skip
    dense = cfg.num_hidden_layers if seed % 6 == 5 else min(seed % 3, cfg.num_hidden_layers)
    return cfg.replace(first_k_dense_replace=dense)


def drawn_row(python: Path, seed: int, folder: Path) -> dict[str, Any]:
    cfg = drawn(seed)
    model = build(cfg, seed).eval()
    peer = twin(model, folder / "model")
    ids = torch.randint(0, cfg.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    ours = model(ids)[0].numpy()
    row: dict[str, Any] = {"model": f"draw {seed}", **features(cfg)}
    row["transformers"] = relative(ours, peer(ids).logits[0].numpy())
    exact = ["transformers"]
    for kind in ("f32", "bf16", "q8_0"):
        theirs = llama_logits(python, folder / "model", kind, ids[0].tolist())
        row[f"llama.cpp {kind}"] = None if theirs is None else relative(theirs, ours)
        if kind != "f32":
            row[f"{kind} median"] = None if theirs is None else typical(theirs, ours)
    for stored in ("fp8", "int4"):
        convert(folder / "model", folder / stored, stored)
        dense = load_model(folder / stored, dtype="float32", dequantize=True)
        theirs = llama_logits(python, folder / stored, "f32", ids[0].tolist())
        row[f"{stored} in llama.cpp"] = None if theirs is None else relative(theirs, dense(ids)[0].numpy())
        exact.append(f"{stored} in llama.cpp")
    if cfg.num_nextn_predict_layers and cfg.q_lora_rank:
        job = {"model": str(folder / "model-f32.gguf"), "draft": ids[0].tolist(), "out": str(folder / "mtp")}
        hs, _ = model.predict_further(model.hidden(ids[:, :-1])[0], [ids[:, 1:]])
        drafted = llama(python, job)
        row["llama.cpp mtp"] = (
            None if drafted is None else relative(np.load(folder / "mtp-draft.npy"), model.head(hs[0])[0].numpy())
        )
        exact.append("llama.cpp mtp")
    row["failed"] = [name for name in (*exact, "llama.cpp f32") if not (row[name] or 9) < LIMIT]
    row["failed"] += [name for name in ("llama.cpp bf16", "llama.cpp q8_0") if row[name] is None]
    return row


def bundled_row(python: Path, folder: Path) -> dict[str, Any]:
    """The bundled model: logits, text to tokens, greedy continuations."""
    model, tokenizer = load_model(BUNDLED, dtype="float32", dequantize=True), Tokenizer.load(BUNDLED)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in PROMPTS]
    ids = [*prompts[0], *greedy(model, prompts[0], TOKENS - len(prompts[0]))]
    ours = model(torch.tensor([ids]))[0].numpy()
    row: dict[str, Any] = {"model": BUNDLED.name, **features(model.cfg)}
    save_model(model, folder / "model", files_from=BUNDLED)
    import transformers

    peer = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    row["transformers"] = relative(ours, peer(torch.tensor([ids])).logits[0].numpy())
    for kind in ("f32", "bf16", "q8_0"):
        theirs = llama_logits(python, folder / "model", kind, ids)
        row[f"llama.cpp {kind}"] = None if theirs is None else relative(theirs, ours)
        if kind != "f32":
            row[f"{kind} median"] = None if theirs is None else typical(theirs, ours)
    job = {"model": str(folder / "model-f32.gguf"), "texts": TRICKY, "greedy": prompts, "steps": 48}
    answer = llama(python, job)
    if answer is not None:
        row["tokens_equal"] = [tokenizer.encode(t) == a for t, a in zip(TRICKY, answer["tokens"], strict=True)]
        row["greedy_equal"] = [greedy(model, p, 48) == a for p, a in zip(prompts, answer["greedy"], strict=True)]
    row["failed"] = [name for name in ("transformers", "llama.cpp f32") if not (row[name] or 9) < LIMIT]
    row["failed"] += [name for name in ("tokens_equal", "greedy_equal") if not all(row.get(name, [False]))]
    return row


def features(cfg: ModelConfig) -> dict[str, Any]:
    scaling = cfg.rope_scaling or {}
    return {
        "layers": f"{cfg.first_k_dense_replace}+{cfg.num_hidden_layers - cfg.first_k_dense_replace}",
        "q_lora_rank": cfg.q_lora_rank,
        "groups": f"{cfg.topk_group}/{cfg.n_group}",
        "yarn": f"{scaling.get('mscale', '-')}, {scaling.get('mscale_all_dim', '-')}" if scaling else None,
        "tied": cfg.tie_word_embeddings,
        "normalised": cfg.norm_topk_prob,
        "scaling": cfg.routed_scaling_factor,
        "mtp": cfg.num_nextn_predict_layers,
    }


def greedy(model: Transformer, ids: list[int], steps: int) -> list[int]:
    more: list[int] = []
    for _ in range(steps):
        more.append(int(model(torch.tensor([[*ids, *more]]))[0, -1].argmax()))
    return more


def llama_logits(python: Path, model: Path, kind: str, ids: list[int]) -> np.ndarray[Any, Any] | None:
    """[T, V] of llama.cpp from a file of this kind, or None where it does not load."""
    target = model.with_name(f"{model.name}-{kind}.gguf")
    export_gguf(Source.open(model), target, kind)
    out = model.with_name(f"{model.name}-{kind}")
    answer = llama(python, {"model": str(target), "ids": [ids], "out": str(out)})
    return None if answer is None else np.load(f"{out}-0.npy")


def llama(python: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    run = subprocess.run([python, "-c", PEER], input=json.dumps(job), capture_output=True, text=True, timeout=600)
    if run.returncode:
        print(f"llama.cpp: {run.stderr[-2000:]}", file=sys.stderr)
        return None
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answer


def relative(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def typical(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """The median over positions: in a random model a rounded router score sends a token to another expert now and then,
    and that token's logits are then others altogether."""
    return float(np.median(np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)))


def _cell(name: str, row: dict[str, Any]) -> str:
    value = row.get(name, "")
    measured = name.startswith("transformers") or name.endswith("median") or "llama.cpp" in name
    return f"{value:.1e}" if measured and value else str(value)


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Relative error of the logits, fp32 rorqual against each engine")
    names = list(dict.fromkeys(n for row in rows for n in row if n != "failed" and not n.endswith("_equal")))
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*(_cell(name, row) for name in names))
    console = Console(width=230)
    console.print(table)
    for row in rows:
        for name in ("tokens_equal", "greedy_equal"):
            if name in row:
                console.print(f"{row['model']}: {name.replace('_', ' ')} {sum(row[name])} of {len(row[name])}")


if __name__ == "__main__":
    main()
