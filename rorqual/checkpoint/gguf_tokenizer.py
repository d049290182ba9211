"""A tokenizer.json as the vocabulary of a GGUF file.

llama.cpp does not read the pre-tokenizer: it knows some by name and has their patterns in its source. The name is found
here from the patterns that tokenizer.json really has; a tokenizer whose patterns have no name there would be cut
differently from what the model was trained on, in silence, so it is refused. The types say how a token behaves: control
tokens are not printed and plain text never spells them; user-defined ones are printed. Those marked as not special in
the file but written like markers (`<｜User｜>`) count as control, as in every published GGUF of this family; `<think>`
stays printed, because readers of the text look for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.config import ModelConfig
from rorqual.data.tokenizer import SPLITS, read_json
from rorqual.errors import CheckpointError, DataError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Token types of the format."""
NO_VOCABULARY = "to write the weights without a vocabulary, export a copy of the directory without tokenizer.json"
_GPT2: tuple[str, ...] = ("ByteLevel",)
_SMOLLM: tuple[str, ...] = ("Digits", "ByteLevel")
_PRE: Mapping[tuple[str, ...], str] = {SPLITS: "deepseek-v3", _GPT2: "gpt-2", _SMOLLM: "smollm"}
_MARKERS = (("<|", "|>"), ("<｜", "｜>"))


@dataclass(frozen=True)
class Vocabulary:
    """Everything under `tokenizer.` in the file. tokens and types have one entry for each row of the embedding."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos: int | None
    eos: int | None
    eot: int | None
    pad: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def read_vocabulary(directory: Path, cfg: ModelConfig) -> Vocabulary | None:
    """None where there is no tokenizer.json. Raises CheckpointError for a tokenizer llama.cpp would read otherwise."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        spec = read_json(path)
        config_path = directory / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
    except DataError as error:
        raise CheckpointError(str(error.args[0]), remedy=error.remedy) from error
    model, added = spec.get("model") or {}, spec.get("added_tokens") or []
    _check_model(path, spec, model)
    ids: dict[str, int] = {**model["vocab"], **{t["content"]: t["id"] for t in added}}
    tokens, types = _tokens(path, ids, added, cfg.vocab_size)
    bos, eos = (_named(config, f"{key}_token", ids) for key in ("bos", "eos"))
    eos = cfg.eos_token_ids[0] if eos is None and cfg.eos_token_ids else eos
    return Vocabulary(
        pre=_pre_name(path, spec.get("pre_tokenizer")),
        tokens=tokens,
        types=types,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        bos=cfg.bos_token_id if bos is None else bos,
        eos=eos,
        eot=next((i for i in cfg.eos_token_ids if i != eos), None),
        pad=_named(config, "pad_token", ids),
        add_bos=_adds(spec, config, "bos"),
        add_eos=_adds(spec, config, "eos"),
        chat_template=_chat_template(directory, config),
    )


def _check_model(path: Path, spec: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    if model.get("type", "BPE") != "BPE" or not model.get("vocab") or "merges" not in model:
        raise CheckpointError(f"{path} is no byte-level BPE tokenizer", remedy=NO_VOCABULARY)
    normalizer = spec.get("normalizer")
    if normalizer and normalizer != {"type": "Sequence", "normalizers": []}:
        raise CheckpointError(f"{path} normalises text, which llama.cpp would not do", remedy=NO_VOCABULARY)
    if model.get("ignore_merges"):
        raise CheckpointError(f"{path} ignores its merges, which llama.cpp would not do", remedy=NO_VOCABULARY)


def _tokens(path: Path, ids: Mapping[str, int], added: list[dict[str, Any]], size: int) -> tuple[list[str], list[int]]:
    """Token strings and types by id; rows of the embedding without a token are [PAD…] and unused."""
    if (highest := max(ids.values())) >= size:
        raise CheckpointError(
            f"{path} has token {highest}, the embedding only {size} rows", remedy="tokenizer and weights must match"
        )
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in ids.items():
        if types[i] != UNUSED:
            raise CheckpointError(f"{path} gives id {i} to {tokens[i]!r} and {token!r}", remedy=NO_VOCABULARY)
        tokens[i], types[i] = token, NORMAL
    for entry in added:
        text = entry["content"]
        marker = any(text.startswith(a) and text.endswith(b) for a, b in _MARKERS)
        types[entry["id"]] = CONTROL if entry.get("special") or marker else USER_DEFINED
    if len(set(tokens)) != size:
        raise CheckpointError(f"{path} has tokens spelled [PAD…] that padding needs", remedy=NO_VOCABULARY)
    return tokens, types


def _pre_name(path: Path, spec: Mapping[str, Any] | None) -> str:
    patterns = _patterns(spec)
    if patterns not in _PRE:
        raise CheckpointError(
            f"{path}: llama.cpp has no name for this pre-tokenizer; it knows those of {', '.join(_PRE.values())}",
            remedy=NO_VOCABULARY,
        )
    return _PRE[patterns]


def _patterns(spec: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The patterns of a pre-tokenizer that splits by them and then goes to bytes; empty for any other."""
    steps = (spec or {}).get("pretokenizers", [spec or {}])
    *splits, level = steps or [{}]
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space", True):
        return ()
    if level.get("use_regex", True):
        single_digits = [{"type": "Digits", "individual_digits": True}]
        return _GPT2 if not splits else _SMOLLM if splits == single_digits else ()
    if any(s.get("type") != "Split" or s.get("behavior") != "Isolated" or s.get("invert") for s in splits):
        return ()
    return tuple(s.get("pattern", {}).get("Regex", "") for s in splits)


def _named(config: Mapping[str, Any], key: str, ids: Mapping[str, int]) -> int | None:
    value = config.get(key)
    content = value.get("content") if isinstance(value, dict) else value
    return ids.get(content) if isinstance(content, str) else None


def _adds(spec: Mapping[str, Any], config: Mapping[str, Any], which: str) -> bool:
    """Whether encoding adds this token: the config's word, or else what the post-processor does."""
    if (said := config.get(f"add_{which}_token")) is not None:
        return bool(said)
    value = config.get(f"{which}_token")
    content = value.get("content") if isinstance(value, dict) else value
    template = (spec.get("post_processor") or {}).get("single") or []
    return any(step.get("SpecialToken", {}).get("id") == content for step in template if content)


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    beside = directory / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None
