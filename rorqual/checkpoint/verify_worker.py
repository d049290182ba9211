"""llama.cpp behind a pipe: a script for a Python that has llama-cpp-python and numpy, and needs nothing of rorqual.

A process of its own because llama.cpp ends the process where it cannot go on, and because it is often built in another
environment than torch. Lines of JSON in and out; logits go through files, since one prompt's may be a hundred megabytes.

    argv   model.gguf context threads
    out    {"vocabulary": 6144, "version": "0.3.36"}           once the model is loaded
    in     {"ids": [0, 17, …], "to": "/tmp/…/logits.npy"}      float32 [tokens, vocabulary]
    out    {"tokens": 23}
    in     {"text": "…"}
    out    {"ids": [17, …]}                                     null where the file holds no vocabulary
    out    {"error": "…"}                                       instead of an answer

fp32 cache, no flash attention, one batch for the whole prompt, everything on the CPU.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

GGML_TYPE_F32 = 0


def load(path: str, context: int, threads: int) -> tuple[Any, str]:
    """The model and the version of llama-cpp-python."""
    llama_cpp = importlib.import_module("llama_cpp")
    model = llama_cpp.Llama(
        model_path=path, n_ctx=context, n_batch=context, n_ubatch=context, n_threads=threads, n_threads_batch=threads,
        n_gpu_layers=0, logits_all=True, flash_attn=False, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False,
    )  # fmt: skip
    return model, str(llama_cpp.__version__)


def answer(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """One request's answer."""
    numpy: Any = importlib.import_module("numpy")
    if "text" in request:
        try:
            return {"ids": model.tokenize(request["text"].encode("utf-8"), add_bos=False, special=False)}
        except (RuntimeError, ValueError):
            return {"ids": None}
    ids = request["ids"]
    model.reset()
    model.eval(ids)
    numpy.save(request["to"], model.scores[: len(ids)])
    return {"tokens": len(ids)}


def serve(arguments: list[str]) -> None:
    """Answers until standard input ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the library prints must not stand between the lines

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        model, version = load(arguments[0], int(arguments[1]), int(arguments[2]))
        say({"vocabulary": model.n_vocab(), "version": version})
        for line in sys.stdin:
            say(answer(model, json.loads(line)))
    except Exception as error:  # the other side shows it
        say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    serve(sys.argv[1:])
