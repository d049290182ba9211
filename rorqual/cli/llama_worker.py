"""llama.cpp as a benchmark peer: reads tasks as JSON lines, answers with seconds. Run by path with a Python that has
llama-cpp-python (`make interop` builds one in .peers); nothing of rorqual is imported here.

    {"batch": 1, "prompt": 512, "new": 64, "seed": 1}  ->  {"prefill": 0.31, "decode": 0.30, "rss_mb": 150}

Greedy, through the low-level API, flash attention as llama.cpp chooses, all cores but no more threads than asked for.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time

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

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
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
