"""Lint rules about what surrounds the weights: tokenizer, special tokens, chat template, generation settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rorqual.checkpoint.lint_subject import ENGINES, Config, Rule, Subject, listed
from rorqual.data.tokenizer import SPLITS

RELEASED_VOCABULARY = 128_000
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"


def _absent(name: str, s: Subject) -> str | None:
    return None if name in s.side else f"{name} is not there"


def _damaged(s: Subject) -> str | None:
    found = [s.problem(f"{stem}-damaged") for stem in ("tokenizer", "tokenizer-config", "generation-config")]
    return "; ".join(text for text in found if text) or None


def _vocabulary(s: Subject) -> dict[str, int]:
    """Every token of tokenizer.json, added ones included; empty where that cannot be read."""
    spec = s.side.get(TOKENIZER, {})
    model = spec.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    out = {str(t): i for t, i in vocab.items() if isinstance(i, int)} if isinstance(vocab, Mapping) else {}
    return out | _added(s)


def _added(s: Subject) -> dict[str, int]:
    tokens = s.side.get(TOKENIZER, {}).get("added_tokens") or []
    return {str(t["content"]): t["id"] for t in tokens if isinstance(t, Mapping) and isinstance(t.get("id"), int)}


def _width(s: Subject) -> int:
    """Ids run below this."""
    return 1 + max(_vocabulary(s).values(), default=-1)


def _too_large(s: Subject) -> str | None:
    width, rows = _width(s), s.size().vocab_size
    return f"the tokenizer's ids run to {width - 1:,}, vocab_size is {rows:,}" if width > rows else None


def _padded(s: Subject) -> str | None:
    width, rows = _width(s), s.size().vocab_size
    return f"{width:,} tokens, vocab_size {rows:,}: {rows - width:,} rows of padding" if 0 < width < rows else None


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))


def _beyond(s: Subject) -> str | None:
    rows, bad = s.size().vocab_size, []
    for file, content in (("config.json", s.raw), (GENERATION, s.side.get(GENERATION, {}))):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            bad += [f"{key} {i} in {file}" for i in _ids(content.get(key)) if not 0 <= i < rows]
    return f"{listed(bad)}: vocab_size is {rows:,}" if bad else None


def _token(s: Subject, key: str) -> int | None:
    """The id of bos_token or eos_token as tokenizer_config.json names it."""
    value = s.side.get(TOKENIZER_CONFIG, {}).get(key)
    content = value.get("content") if isinstance(value, Mapping) else value
    return _vocabulary(s).get(content) if isinstance(content, str) else None


def _contradict(s: Subject) -> str | None:
    out = []
    for kind in ("bos", "eos"):
        config, generation = (
            _ids(s.raw.get(f"{kind}_token_id")),
            _ids(s.side.get(GENERATION, {}).get(f"{kind}_token_id")),
        )
        token = _token(s, f"{kind}_token")
        differ = [f"config.json {_shown(config)}"] if config else []
        if config and generation and not set(config) <= set(generation):
            out.append(f"{kind}: {', '.join([*differ, f'generation_config.json {_shown(generation)}'])}")
        elif config and token is not None and token not in config:
            out.append(f"{kind}: {', '.join([*differ, f'the tokenizer {token}'])}")
    return "; ".join(out) or None


def _shown(ids: Iterable[int]) -> str:
    return " and ".join(map(str, ids))


def _write_ids(config: Config, s: Subject) -> None:
    """As the tokenizer says, else as generation_config.json does."""
    for kind in ("bos", "eos"):
        config_ids, token = _ids(config.get(f"{kind}_token_id")), _token(s, f"{kind}_token")
        generation = _ids(s.side.get(GENERATION, {}).get(f"{kind}_token_id"))
        if token is not None and token not in config_ids:
            config[f"{kind}_token_id"] = token
        elif generation and not set(config_ids) <= set(generation):
            config[f"{kind}_token_id"] = generation[0] if len(generation) == 1 else list(generation)


def _template(s: Subject) -> str | None:
    if TOKENIZER_CONFIG not in s.side or s.side[TOKENIZER_CONFIG].get("chat_template"):
        return None
    return None if (s.directory / "chat_template.jinja").is_file() else "no chat_template, no chat_template.jinja"


def _add_bos(s: Subject) -> str | None:
    content = s.side.get(TOKENIZER_CONFIG)
    return "tokenizer_config.json has no add_bos_token" if content and "add_bos_token" not in content else None


def _patterns(value: Any) -> list[str]:
    """The regexes of a pre-tokenizer, in order."""
    if not isinstance(value, Mapping):
        return []
    inner = [p for part in value.get("pretokenizers") or [] for p in _patterns(part)]
    pattern = value.get("pattern")
    return inner + ([str(pattern["Regex"])] if isinstance(pattern, Mapping) and "Regex" in pattern else [])


def _pre_tokenizer(s: Subject) -> str | None:
    if not s.side.get(TOKENIZER):
        return None
    found = _patterns(s.side[TOKENIZER].get("pre_tokenizer"))
    return None if found == list(SPLITS) else f"{len(found)} patterns in place of DeepSeek's {len(SPLITS)}"


def _own_vocabulary(s: Subject) -> str | None:
    words = len(set(_vocabulary(s)) - set(_added(s)))
    if not words or _pre_tokenizer(s) or abs(words - RELEASED_VOCABULARY) <= len(_added(s)):
        return None
    return f"{words:,} tokens under DeepSeek's own pre-tokenisation, where its vocabulary has {RELEASED_VOCABULARY:,}"


RULES = (
    Rule("tokenizer-missing", "warning", ENGINES, "no tokenizer.json: text can be neither read nor written",
         "copy the tokenizer's files beside the weights", "config", lambda s: _absent(TOKENIZER, s)),
    Rule("tokenizer-damaged", "error", ENGINES, "a file of the tokenizer or generation_config.json is no JSON object",
         "copy the file again", "nothing", _damaged),
    Rule("tokenizer-config-missing", "warning", ENGINES,
         "no tokenizer_config.json: special tokens and template are unknown", "copy it beside tokenizer.json",
         "config", lambda s: _absent(TOKENIZER_CONFIG, s) if TOKENIZER in s.side else None),
    Rule("tokenizer-too-large", "error", ENGINES, "the tokenizer has ids beyond the embedding",
         "correct vocab_size, or the tokenizer", "sizes", _too_large),
    Rule("tokenizer-padded", "note", ENGINES, "the embedding is padded beyond the tokenizer (V3's own is)", "nothing",
         "sizes", _padded),
    Rule("token-id-beyond", "error", ENGINES, "bos, eos or pad lies beyond the vocabulary", "correct the id", "sizes",
         _beyond),
    Rule("token-ids-contradict", "warning", ENGINES,
         "config.json, generation_config.json and tokenizer name different bos or eos",
         "write the tokenizer's ids everywhere", "config", _contradict, _write_ids),
    Rule("chat-template-missing", "warning", ENGINES, "no chat template: chats are refused, or formatted by guess",
         "write chat_template into tokenizer_config.json", "config", _template),
    Rule("add-bos-missing", "note", ("transformers", "vLLM", "SGLang", "llama.cpp"),
         "add_bos_token is unsaid: whether a plain prompt gets bos depends on the reader",
         "write add_bos_token true, as V3 was released", "config", _add_bos),
    Rule("pre-tokenizer", "warning", ("llama.cpp",),
         "not DeepSeek's pre-tokenisation: llama.cpp's converter knows no such hash",
         "convert with `rorqual convert --to gguf`, and name the pre-tokeniser it has", "config", _pre_tokenizer),
    Rule("tokenizer-own-vocabulary", "note", ("llama.cpp",),
         "an own vocabulary: llama.cpp's converter refuses a hash it does not know",
         "`rorqual convert --to gguf` writes deepseek-v3, which is true of it", "config", _own_vocabulary),
    Rule("generation-config-missing", "note", ("transformers", "vLLM", "SGLang"),
         "no generation_config.json: samplers fall back to their own defaults",
         "write temperature, top_p, bos and eos", "config",
         lambda s: _absent(GENERATION, s) if s.problem("generation-config-damaged") is None else None),
)  # fmt: skip
