"""A Llama-family tokenizer as the two files of a Hugging Face directory, and the same with DeepSeek's chat markers.

The words stay the source's own, every id included: a converted model has the source's embedding. What changes is how
the special tokens are spelled. Beginning, end and padding take DeepSeek's spelling; special tokens the source never
uses in a conversation (`<repo_name>` and the like) become `<｜User｜>`, `<｜Assistant｜>`, `<think>` and `</think>`, and
those still spare become the bytes that the vocabulary lacks, where it lacks some, so that every text can be encoded.
The markers of tool calls, without which an engine can hold no answer to a call, take what is spare then, and where that
is too little the words learned last, the rarest: such a word is two tokens from then on.
Their embedding rows keep the values they had until training teaches them their new part.

A GGUF file names its pre-tokenizer instead of describing it; those of the Llama family are spelled out here.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from rorqual.data import special
from rorqual.data.template import ChatTemplate
from rorqual.data.tokenizer import SPLITS, begin_with, missing_bytes
from rorqual.errors import ConfigError

MARKERS = (special.USER, special.ASSISTANT, special.THINK, special.END_THINK)
TOOLS = (
    special.TOOL_CALLS_BEGIN, special.TOOL_CALLS_END, special.TOOL_CALL_BEGIN, special.TOOL_CALL_END, special.TOOL_SEP,
    special.TOOL_OUTPUT_BEGIN, special.TOOL_OUTPUT_END,
)  # fmt: skip
"""What the template of DeepSeek-V3.1 needs."""
_CONTROL = 3
"""Token type of a special token in a GGUF file."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TokenizerFiles:
    """spec: tokenizer.json; config: tokenizer_config.json, its chat_template included."""

    spec: Mapping[str, Any]
    config: Mapping[str, Any]

    def save(self, directory: Path) -> None:
        for name, content in (("tokenizer.json", self.spec), ("tokenizer_config.json", self.config)):
            text = json.dumps(content, ensure_ascii=False, indent=2)
            (directory / name).write_text(text + "\n", encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which special tokens may be spelled, as the source's own chat template does."""
        ids: list[int] = tokenizers.Tokenizer.from_str(json.dumps(self.spec)).encode(text, add_special_tokens=False).ids
        return ids


def with_markers(files: TokenizerFiles, bos: int | None, eos: int | None, pad: int | None) -> TokenizerFiles | None:
    """The tokenizer with DeepSeek's markers and template, or None where it has too few tokens to spare.

    bos, eos, pad: the ids the source's config gives. Padding that is another's token too gets one of its own if there
    is one to spare."""
    if {*MARKERS, special.BOS, special.EOS} <= {t["content"] for t in files.spec.get("added_tokens") or []}:
        return files
    spec = copy.deepcopy(dict(files.spec))
    vocab: dict[str, int] = dict(spec["model"]["vocab"])
    added = {int(t["id"]): str(t["content"]) for t in spec.get("added_tokens") or [] if t.get("special")}
    if bos is None or eos is None or bos == eos or not {bos, eos} <= added.keys():
        return None
    lacking = missing_bytes(vocab)
    spare = [i for i in sorted(added) if i not in (bos, eos)]
    new = {bos: special.BOS, eos: special.EOS}
    own = pad if pad in spare else (spare[0] if spare else None)
    if own is not None:
        new[own] = special.PAD
        spare.remove(own)
    if len(spare) < len(MARKERS) + len(lacking):
        return None
    new |= dict(zip(spare, MARKERS, strict=False))
    letters = dict(zip(spare[len(MARKERS) :], lacking, strict=False))
    free = spare[len(MARKERS) + len(letters) :][: len(TOOLS)]
    merges, words = _without_last(spec["model"]["merges"], vocab, len(TOOLS) - len(free))
    if len(free) + len(words) < len(TOOLS):
        return None
    tools = dict(zip([*free, *words.values()], TOOLS, strict=True))
    for i, name in {**new, **letters, **tools}.items():
        vocab.pop(added.get(i, ""), None)
        vocab[name] = i
    vocab = {word: i for word, i in vocab.items() if word not in words}
    spec["model"] |= {"vocab": dict(sorted(vocab.items(), key=lambda item: item[1])), "merges": merges}
    entries = [t for t in spec["added_tokens"] if int(t["id"]) not in letters]
    entries += [{**entries[0], "id": i} for i in words.values()]
    spec["added_tokens"] = [_renamed(t, (new | tools).get(int(t["id"]))) for t in entries]
    spec["post_processor"] = begin_with(special.BOS, bos)
    config = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": special.BOS, "eos_token": special.EOS,
        "pad_token": special.PAD if own is not None else special.EOS, "clean_up_tokenization_spaces": False,
        "model_max_length": files.config.get("model_max_length", 8192),
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": ChatTemplate("v3.1").jinja,
    }  # fmt: skip
    return TokenizerFiles(spec, config)


def _without_last(merges: list[Any], vocab: Mapping[str, int], count: int) -> tuple[list[Any], dict[str, int]]:
    """(merges that are left, words that go with their ids): the last words of which no other word is made."""
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in merges]
    used = Counter(part for pair in pairs for part in (*pair, "".join(pair)))
    gone: dict[str, int] = {}
    for pair in reversed(pairs):
        word = "".join(pair)
        if len(gone) < count and used[word] == 1:  # as what this merge makes
            gone[word] = vocab[word]
    return [merge for merge, pair in zip(merges, pairs, strict=True) if "".join(pair) not in gone], gone


def _renamed(entry: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """Role and thinking markers are no "special" tokens, as published: readers of the text look for them."""
    if name is None:
        return dict(entry)
    return {**entry, "content": name, "special": name in special.CONTROL}


def read_gguf_tokenizer(meta: Mapping[str, Any]) -> TokenizerFiles | None:
    """From a GGUF file's metadata; None where it holds no vocabulary. Raises ConfigError for one that is no byte-level
    BPE or whose pre-tokenizer is not known here."""
    if "tokenizer.ggml.tokens" not in meta:
        return None
    if meta.get("tokenizer.ggml.model") != "gpt2":
        raise ConfigError(
            f"the file's tokenizer is of kind {meta.get('tokenizer.ggml.model')!r}, not byte-level BPE",
            remedy="convert the model's Hugging Face directory",
        )
    pre = str(meta.get("tokenizer.ggml.pre", "default"))
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == _CONTROL
    ]
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre == "llama-bpe",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [merge.split(" ", 1) for merge in meta["tokenizer.ggml.merges"]],
    }  # fmt: skip
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(pre), "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }  # fmt: skip
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key, name in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        if (i := meta.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[key] = tokens[i]
    if template := meta.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return TokenizerFiles(spec, config)


def _pre_tokenizer(name: str) -> dict[str, Any]:
    """What llama.cpp means by a name."""
    level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if name in ("gpt-2", "default"):
        return level
    if name == "smollm":
        digits = {"type": "Digits", "individual_digits": True}
        return {"type": "Sequence", "pretokenizers": [digits, level]}
    patterns = {"llama-bpe": (_LLAMA3,), "deepseek-v3": SPLITS}.get(name)
    if patterns is None:
        raise ConfigError(
            f"the file's pre-tokenizer {name!r} is not known here", remedy="convert the model's Hugging Face directory"
        )
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    return {"type": "Sequence", "pretokenizers": [*splits, {**level, "use_regex": False}]}
