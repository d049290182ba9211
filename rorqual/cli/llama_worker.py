"""llama.cpp as a benchmark peer: reads tasks as JSON lines, answers with seconds. Run by path with a Python that has
llama-cpp-python (`make interop` builds one in .peers); nothing of rorqual is imported here.

    {"batch": 1, "prompt": 512, "new": 64, "seed": 1}    ->  {"prefill": 0.31, "decode": 0.30, "rss_mb": 150}
    {"serve": [[prompt tokens, new tokens], …], "seed": 1}  ->  {"seconds": 9.1, "steps": 420, "first_s": […], "gap_s": […]}

Greedy, through the low-level API, flash attention as llama.cpp chooses, all cores but no more threads than asked for.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time
from typing import Any

import numpy as np


def main() -> None:
    import llama_cpp as llama  # type: ignore[import-not-found]  # the peer's Python has it, ours need not

    model_file, threads, context, sequences = sys.argv[1], *map(int, sys.argv[2:5])
    silence = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silence, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(model_file.encode(), llama.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {model_file}")
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context, 512, 512, sequences
    params.n_threads = params.n_threads_batch = threads
    params.kv_unified = False
    state = llama.llama_init_from_model(model, params)
    if not state:
        sys.exit("llama.cpp cannot make a context")
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    memory = llama.llama_get_memory(state)
    batch = llama.llama_batch_init(512, 0, sequences)

    def compute(items: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted) of each."""
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if code := llama.llama_decode(state, batch):
            raise RuntimeError(f"llama_decode returned {code}")

    def best(row: int) -> int:
        return int(np.ctypeslib.as_array(llama.llama_get_logits_ith(state, row), shape=(vocab,)).argmax())

    def serve(lengths: list[list[int]], seed: int) -> dict[str, object]:
        """As its server does it: every step all sequences that decode, and prompts while the batch of 512 has room."""
        rng = np.random.default_rng(seed)
        waiting = [(rng.integers(2, vocab, n).tolist(), new) for n, new in lengths]
        free = list(range(sequences))
        # sequence -> prompt, new tokens left, position, next token (None while it is read), time of the last
        active: dict[int, list[Any]] = {}
        first_s: list[float] = []
        gap_s: list[float] = []
        steps = 0
        start = time.perf_counter()
        while waiting or active:
            while free and waiting:
                prompt, new = waiting.pop(0)
                active[free.pop()] = [prompt, new, 0, None, start]
            items = [(a[3], a[2], s, True) for s, a in active.items() if a[3] is not None]
            for s, a in active.items():
                if a[3] is None:
                    part = a[0][a[2] : a[2] + 512 - len(items)]
                    items += [(t, a[2] + i, s, a[2] + i == len(a[0]) - 1) for i, t in enumerate(part)]
            compute(items)
            steps += 1
            drawn = [(s, best(row)) for row, (_, _, s, wanted) in enumerate(items) if wanted]
            now = time.perf_counter()
            for _, position, s, _ in items:
                active[s][2] = position + 1
            for s, token in drawn:
                a = active[s]
                (first_s if a[3] is None else gap_s).append(now - a[4])
                a[1], a[3], a[4] = a[1] - 1, token, now
                if not a[1]:
                    del active[s]
                    llama.llama_memory_seq_rm(memory, s, -1, -1)
                    free.append(s)
        return {"seconds": time.perf_counter() - start, "steps": steps, "first_s": first_s, "gap_s": gap_s}

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if "serve" in task:
            llama.llama_memory_clear(memory, True)
            print(json.dumps(serve(task["serve"], task["seed"])), flush=True)
            continue
        n = task["prompt"]
        prompts = np.random.default_rng(task["seed"]).integers(2, vocab, (task["batch"], n))
        llama.llama_memory_clear(memory, True)
        start = time.perf_counter()
        tokens = []
        for sequence, prompt in enumerate(prompts.tolist()):
            for at in range(0, n, 512):
                chunk = prompt[at : at + 512]
                compute([(t, at + i, sequence, at + i == n - 1) for i, t in enumerate(chunk)])
            tokens.append(best(len(chunk) - 1))
        first = time.perf_counter()
        for step in range(task["new"] - 1):
            compute([(t, n + step, sequence, True) for sequence, t in enumerate(tokens)])
            tokens = [best(i) for i in range(len(tokens))]
        end = time.perf_counter()
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"prefill": first - start, "decode": end - first, "rss_mb": round(rss)}), flush=True)


if __name__ == "__main__":
    main()
