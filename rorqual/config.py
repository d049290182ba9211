"""Configuration: frozen dataclasses, read from the released `config.json`, from TOML run files, and from flags.

There is no second dialect: a model's configuration has the keys that DeepSeek released, under their own names, and
what other engines wrote (`rope_parameters`, dropped `scoring_func`) is understood on the way in. On the way out
`ModelConfig.to_json` writes every key that some engine needs, in both spellings of the rotary settings, because each
loader has a silent trap for what is missing.

This module imports no torch: the server, the planner and the command line's --help read configurations too.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from rorqual.errors import ConfigError

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """A model of the DeepSeek-V3 architecture (arXiv 2412.19437 section 2; the released `config.json`).

    Raises ConfigError on construction when the values contradict each other or ask for another architecture.
    `extra` holds keys this package does not use; they are written back verbatim.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = None
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    hidden_act: str = "silu"
    moe_layer_freq: int = 1
    attention_bias: bool = False
    attention_dropout: float = 0.0
    rope_interleave: bool = True
    quantization_config: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_numbers()
        self._check_architecture()
        self._check_rope()

    # ---- what follows from the keys -------------------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or expanded key: N + R."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """Cached values per token and layer: the normed latent and the rotated shared key, C + R."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    @property
    def softmax_scale(self) -> float:
        """(N + R)^-0.5, times mscale^2 under YaRN (released modelling code; arXiv 2309.00071)."""
        scale: float = self.qk_head_dim**-0.5
        if self.rope_scaling and (all_dim := self.rope_scaling.get("mscale_all_dim", 0)):
            scale *= yarn_mscale(self.rope_scaling["factor"], all_dim) ** 2
        return scale

    def is_moe(self, layer: int) -> bool:
        """Whether this layer routes. MTP layers stand at index num_hidden_layers and always do."""
        return layer >= self.first_k_dense_replace

    # ---- in and out -----------------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """From a model directory, a preset's name, a config.json, or a dict of released keys.

        Raises ConfigError naming the key at fault.
        """
        if isinstance(source, Mapping):
            return cls.from_released(source, where="the given dict")
        path = Path(source)
        if path.is_dir():
            path = path / "config.json"
        if path.is_file():
            try:
                return cls.from_released(json.loads(path.read_text(encoding="utf-8")), where=str(path))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path} is not valid JSON: {error}", remedy="restore the file") from None
        if (path.suffix or len(path.parts) > 1) and str(source) not in presets():
            raise ConfigError(f"there is no model at {source}", remedy="name a model directory or a preset")
        preset = resources.files("rorqual.presets") / f"{source}.json"
        if not preset.is_file():
            raise ConfigError(
                f"no model directory or preset is called {str(source)!r}{_nearest(str(source), presets())}",
                remedy=f"presets: {', '.join(presets())}",
            )
        return cls.from_released(json.loads(preset.read_text(encoding="utf-8")), where=f"preset {source}")

    @classmethod
    def from_released(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read released keys. Unknown ones warn once and are kept; keys known to be irrelevant pass in silence."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where}: expected an object of keys, found {type(raw).__name__}")
        kind = raw.get("model_type", "deepseek_v3")
        if kind not in _MODEL_TYPES:
            raise ConfigError(
                f"{where}: model_type {kind!r} is another architecture",
                remedy=f"rorqual runs model_type {' and '.join(_MODEL_TYPES)}",
            )
        known = {f.name: f for f in dataclasses.fields(cls) if f.name != "extra"}
        values = {k: v for k, v in raw.items() if k in known}
        values.update(_read_rope(raw, where))
        for key in ("n_group", "topk_group", "n_shared_experts", "num_nextn_predict_layers"):
            if values.get(key, 0) is None:
                values.pop(key)
        extra = {k: v for k, v in raw.items() if k not in known and k not in _REWRITTEN}
        if unknown := sorted(set(extra) - _IRRELEVANT):
            log.warning("%s: keys not known to rorqual are kept and not used: %s", where, ", ".join(unknown))
        missing = [n for n, f in known.items() if n not in values and f.default is dataclasses.MISSING]
        if missing:
            raise ConfigError(f"{where} lacks {', '.join(missing)}", remedy="see `rorqual inspect deepseek-v3 --json`")
        hints = typing.get_type_hints(cls)
        checked = {k: _coerce(hints[k], v, f"{where}: {k}") for k, v in values.items()}
        return cls(**checked, extra=extra)

    def to_json(self) -> dict[str, Any]:
        """Every key that DeepSeek's release, transformers, vLLM, SGLang or llama.cpp reads."""
        out: dict[str, Any] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "num_key_value_heads": self.num_attention_heads,
            "ep_size": 1,
            "use_cache": True,
        }
        out.update({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"})
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        if self.rope_scaling is not None:
            out["rope_scaling"] = dict(self.rope_scaling)
            parameters = {k: v for k, v in self.rope_scaling.items() if k != "type"}
            out["rope_parameters"] = {"rope_type": "yarn", "rope_theta": self.rope_theta, **parameters}
        else:
            out["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.quantization_config is None:
            del out["quantization_config"]
        return {**out, **{k: v for k, v in self.extra.items() if k not in out}}

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    # ---- checks ---------------------------------------------------------------------------------------------

    def _check_sizes(self) -> None:
        sizes = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads kv_lora_rank qk_nope_head_dim "
            "qk_rope_head_dim v_head_dim intermediate_size moe_intermediate_size n_routed_experts "
            "num_experts_per_tok n_shared_experts n_group topk_group max_position_embeddings"
        )
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ConfigError("q_lora_rank must be positive or null")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"qk_rope_head_dim must be even (pairs are rotated), not {self.qk_rope_head_dim}")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ConfigError("first_k_dense_replace must lie between 0 and num_hidden_layers")
        if self.num_nextn_predict_layers < 0:
            raise ConfigError("num_nextn_predict_layers must not be negative")
        if self.n_routed_experts % self.n_group:
            raise ConfigError(f"n_group {self.n_group} does not divide n_routed_experts {self.n_routed_experts}")
        if self.topk_group > self.n_group:
            raise ConfigError(f"topk_group {self.topk_group} exceeds n_group {self.n_group}")
        per_group = self.n_routed_experts // self.n_group
        if per_group < 2:
            raise ConfigError("an expert group needs two experts: its score is the sum of its best two")
        if self.num_experts_per_tok > self.topk_group * per_group:
            raise ConfigError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds the {self.topk_group * per_group} experts "
                f"of {self.topk_group} groups"
            )

    def _check_numbers(self) -> None:
        for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be positive and finite, not {value}")
        if not (math.isfinite(self.initializer_range) and self.initializer_range >= 0):
            raise ConfigError(f"initializer_range must be finite and not negative, not {self.initializer_range}")
        single = {"bos_token_id": self.bos_token_id, "pad_token_id": self.pad_token_id}
        ids = [(name, i) for name, i in single.items() if i is not None]
        for name, i in [*ids, *(("eos_token_id", i) for i in self.eos_token_ids)]:
            if not 0 <= i < self.vocab_size:
                raise ConfigError(f"{name} {i} is no token of a vocabulary of {self.vocab_size}")

    def _check_architecture(self) -> None:
        """Keys with one supported value: anything else would be computed wrongly, so it is refused."""
        for name, only in _FIXED.items():
            if getattr(self, name) != only:
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r} is not DeepSeek-V3's architecture",
                    remedy=f"rorqual supports {only!r}",
                )

    def _check_rope(self) -> None:
        if self.rope_scaling is None:
            return
        kind = self.rope_scaling.get("type", self.rope_scaling.get("rope_type"))
        if kind != "yarn":
            raise ConfigError(f"rope_scaling type {kind!r} is not supported", remedy="use yarn or null")
        for key in ("factor", "original_max_position_embeddings"):
            if not _is_number(self.rope_scaling.get(key)) or self.rope_scaling[key] <= 0:
                raise ConfigError(f"rope_scaling of type yarn needs the positive number {key}")
        for key in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow", "attention_factor"):
            if (value := self.rope_scaling.get(key)) is not None and not _is_number(value):
                raise ConfigError(f"rope_scaling {key} must be a number, not {value!r}")


def _is_number(value: object) -> bool:
    """An int or a finite float; JSON's true, NaN and Infinity are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


# Kimi K2 is this architecture under a name of its own, so that engines can tell the two apart. It is written back as
# deepseek_v3: that is what every loader of this architecture knows, and what Moonshot tells others to rename it to.
_MODEL_TYPES = ("deepseek_v3", "kimi_k2")
_FIXED: dict[str, Any] = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_interleave": True,
}
# Written afresh by to_json from other fields; never kept from an old file.
_REWRITTEN = {"rope_parameters", "architectures", "model_type", "num_key_value_heads", "ep_size", "use_cache"}
# Keys that other writers add and that say nothing about the network.
_IRRELEVANT = {
    "torch_dtype",
    "dtype",
    "auto_map",
    "transformers_version",
    "pretraining_tp",
    "head_dim",
    "qk_head_dim",
    "aux_loss_alpha",
    "seq_aux",
    "output_router_logits",
    "_name_or_path",
    "use_mtp",
    "num_mtp_layers",
    "num_local_experts",
    "unsloth_fixed",
}


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1 (1 where nothing is stretched)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def presets() -> list[str]:
    """Names of the model configurations that come with the package."""
    return sorted(p.name[:-5] for p in resources.files("rorqual.presets").iterdir() if p.name.endswith(".json"))


def _read_rope(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Rotary settings from the released keys or from transformers' `rope_parameters` (which wins where both stand)."""
    parameters = raw.get("rope_parameters")
    if not parameters:
        scaling = raw.get("rope_scaling")
        if isinstance(scaling, Mapping) and "rope_type" in scaling:
            return {
                "rope_scaling": {"type": scaling["rope_type"], **{k: v for k, v in scaling.items() if k != "rope_type"}}
            }
        return {}
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"{where}: rope_parameters must be an object")
    out: dict[str, Any] = {}
    if "rope_theta" in parameters:
        out["rope_theta"] = parameters["rope_theta"]
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    rest = {k: v for k, v in parameters.items() if k not in ("rope_type", "rope_theta", "type")}
    out["rope_scaling"] = None if kind == "default" else {"type": kind, **rest}
    return out


# ---- dataclasses from mappings, for run files -------------------------------------------------------------------


def from_dict(cls: type[T], raw: Mapping[str, Any], where: str = "the configuration") -> T:
    """A (nested) frozen dataclass from a mapping; types are checked, nothing is ignored.

    Raises ConfigError for an unknown key (naming the nearest), a missing one, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    values = {}
    for key, value in raw.items():
        if key not in fields:
            raise ConfigError(
                f"{where}: unknown key {key!r}{_nearest(key, fields)}", remedy=f"keys: {', '.join(fields)}"
            )
        values[key] = _coerce(hints[key], value, f"{where}: {key}")
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where} lacks {name}")
    return cls(**values)


def load_toml(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """A run file, with `a.b=value` overrides (values in TOML syntax; bare words are strings)."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no run file {path}", remedy="see runs/ for examples") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for item in overrides:
        name, sign, text = item.partition("=")
        if not sign or not name.strip():
            raise ConfigError(f"--set {item!r}: expected key=value", remedy="for instance --set optim.lr=3e-4")
        _set(raw, name.strip().split("."), _parse_value(text.strip()), item)
    return from_dict(cls, raw, where=str(path))


def to_dict(config: Any) -> Any:
    """The inverse of from_dict: plain dicts, lists and scalars; None is left out (TOML has no null)."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        pairs = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {k: v for k, v in pairs.items() if v is not None}
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items() if v is not None}
    if isinstance(config, tuple | list):
        return [to_dict(v) for v in config]
    return config


def dump_toml(config: Any) -> str:
    """A dataclass as TOML that load_toml reads back to an equal one."""
    lines: list[str] = []
    _toml_table(to_dict(config), [], lines)
    return "\n".join(lines).strip() + "\n"


def _toml_table(table: Mapping[str, Any], path: list[str], lines: list[str]) -> None:
    def is_tables(v: Any) -> bool:
        return isinstance(v, list) and bool(v) and isinstance(v[0], dict)

    for key, value in table.items():
        if not isinstance(value, dict) and not is_tables(value):
            lines.append(f"{_toml_key(key)} = {_toml_value(value)}")
    for key, value in table.items():
        inner = [*path, _toml_key(key)]
        if isinstance(value, dict):
            lines += ["", f"[{'.'.join(inner)}]"]
            _toml_table(value, inner, lines)
        elif is_tables(value):
            for item in value:
                lines += ["", f"[[{'.'.join(inner)}]]"]
                _toml_table(item, inner, lines)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL, which TOML wants escaped as well
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _set(table: dict[str, Any], path: list[str], value: Any, item: str) -> None:
    for key in path[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {item!r}: {key} is not a section")
    table[path[-1]] = value


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _nearest(key: str, among: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(among), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a type hint; ints pass as floats, lists as tuples, mappings as dataclasses."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(args, value, where)
    if origin is typing.Literal:
        if value not in args:
            near = _nearest(str(value), [str(a) for a in args])
            raise ConfigError(f"{where} is {value!r}{near}", remedy=f"choose from {', '.join(map(str, args))}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return from_dict(hint, value, where)
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    elif origin in (dict, Mapping) or origin is typing.get_origin(Mapping[str, Any]):
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif (
        (hint is int and isinstance(value, int) and not isinstance(value, bool))
        or hint is Any
        or (hint not in (int, float) and isinstance(hint, type) and isinstance(value, hint))
    ):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where} must be {name}, not {type(value).__name__} {value!r}")


def _coerce_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in (o for o in options if o is not type(None)):
        try:
            return _coerce(option, value, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


# ---- models by name ----------------------------------------------------------------------------------------------

DEFAULT_MODEL = "rorqual-mini"


def models_dir() -> Path:
    """Where bundled models lie: `models/` beside the package in a checkout."""
    return Path(__file__).resolve().parent.parent / "models"


def resolve_model(name: str | Path | None = None) -> Path:
    """A model directory from a path or a bundled model's name (None: the default one).

    Raises ConfigError naming the bundled models when there is none.
    """
    if name is not None and (Path(name) / "config.json").is_file():
        return Path(name)
    folder = models_dir() / str(name or DEFAULT_MODEL)
    if (folder / "config.json").is_file():
        return folder
    if name is not None and Path(name).is_dir():
        raise ConfigError(f"{name} has no config.json", remedy="name a directory in the Hugging Face layout")
    bundled = sorted(p.parent.name for p in models_dir().glob("*/config.json"))
    raise ConfigError(
        f"there is no model called {str(name or DEFAULT_MODEL)!r}",
        remedy=f"name a model directory, or a bundled model: {', '.join(bundled) or 'none here'}",
    )
