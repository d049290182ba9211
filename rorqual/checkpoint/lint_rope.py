"""Lint rules about rotary settings, which stand in config.json in two forms: the released one and transformers' own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rorqual.checkpoint.lint_subject import ENGINES, Config, Rule, Subject, is_number, listed

ROPE_KEYS = (
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "attention_factor",
)  # fmt: skip
SERVERS = ("vLLM", "SGLang", "llama.cpp")


def _scaling(s: Subject) -> Mapping[str, Any] | None:
    value = s.raw.get("rope_scaling")
    return value if isinstance(value, Mapping) and value else None


def _parameters(s: Subject) -> Mapping[str, Any] | None:
    value = s.raw.get("rope_parameters")
    return value if isinstance(value, Mapping) and value else None


def _kind(form: Mapping[str, Any] | None) -> Any:
    return "default" if form is None else form.get("rope_type", form.get("type", "default"))


def _rope(s: Subject) -> Mapping[str, Any] | None:
    """The stretched settings of whichever form has them."""
    return next((form for form in (_scaling(s), _parameters(s)) if form is not None and _kind(form) != "default"), None)


def _only_parameters(s: Subject) -> str | None:
    p = _parameters(s)
    if p is None:
        return None
    lost = []
    if _kind(p) != "default" and _scaling(s) is None:
        lost.append(f"rope_scaling ({_kind(p)}, factor {p.get('factor')})")
    if "rope_theta" in p and "rope_theta" not in s.raw:
        lost.append(f"rope_theta ({p['rope_theta']})")
    return f"only rope_parameters carries {' and '.join(lost)}" if lost else None


def _only_scaling(s: Subject) -> str | None:
    found = _scaling(s)
    if found is None or _parameters(s) is not None:
        return None
    return f"only rope_scaling is there ({_kind(found)}, factor {found.get('factor')})"


def _contradiction(s: Subject) -> str | None:
    a, b = _scaling(s), _parameters(s)
    if b is None:
        return None
    out = []
    if "rope_theta" in s.raw and "rope_theta" in b and s.raw["rope_theta"] != b["rope_theta"]:
        out.append(f"rope_theta {s.raw['rope_theta']} and {b['rope_theta']}")
    if a is not None or ("rope_scaling" in s.raw and _kind(b) != "default"):
        if _kind(a) != _kind(b):
            out.append(f"type {_kind(a)} and {_kind(b)}")
        elif a is not None:
            out += [f"{k} {a.get(k)} and {b.get(k)}" for k in ROPE_KEYS if a.get(k) != b.get(k)]
    return f"rope_scaling and rope_parameters say {listed(out, 4)}" if out else None


def _write_rope(config: Config, s: Subject) -> None:
    """Both forms from one. Where they contradict each other: the one whose stretch gives max_position_embeddings, else
    the released one, which is also what transformers takes."""
    a, b = _scaling(s), _parameters(s)
    if a is None and b is None:
        return
    chosen = b if a is None and "rope_scaling" not in config else a
    if _contradiction(s) and _stretched(b) == config.get("max_position_embeddings") != _stretched(a):
        chosen = b
    theta = config.get("rope_theta", (b or {}).get("rope_theta", 10000.0))
    config["rope_theta"] = theta
    if chosen is None or _kind(chosen) == "default":
        config["rope_scaling"] = None
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        return
    rest = {k: v for k, v in chosen.items() if k not in ("type", "rope_type", "rope_theta")}
    config["rope_scaling"] = {"type": _kind(chosen), **rest}
    config["rope_parameters"] = {"rope_type": _kind(chosen), "rope_theta": theta, **rest}


def _stretched(form: Mapping[str, Any] | None) -> float | None:
    if form is None or not is_number(form.get("factor")) or not is_number(form.get("original_max_position_embeddings")):
        return None
    return float(form["factor"] * form["original_max_position_embeddings"])


def _rope_type(s: Subject) -> str | None:
    bad = {_kind(form) for form in (_scaling(s), _parameters(s))} - {"default", "yarn"}
    return f"rope type {listed(sorted(map(repr, bad)))}" if bad else None


def _yarn_incomplete(s: Subject) -> str | None:
    if (found := _rope(s)) is None or _kind(found) != "yarn":
        return None
    keys = ("factor", "original_max_position_embeddings")
    bad = [f"{k} = {found.get(k)!r}" for k in keys if not is_number(found.get(k)) or found[k] <= 0]
    return f"yarn with {' and '.join(bad)}" if bad else None


def _yarn_mscale(s: Subject) -> str | None:
    found = _rope(s)
    if found is None or _kind(found) != "yarn" or not is_number(found.get("factor")):
        return None
    absent = [key for key in ("mscale", "mscale_all_dim") if not found.get(key)]
    if not absent:
        return None
    multiplier = 0.1 * math.log(max(found["factor"], 1)) + 1
    return f"yarn without {' and '.join(absent)}: transformers multiplies cosine and sine by {multiplier:.4f}"


def _positions(s: Subject, beyond: bool) -> str | None:
    stretched, length = _stretched(_rope(s)), s.size().max_position_embeddings
    if stretched is None or _kind(_rope(s)) != "yarn" or (length > stretched) != beyond or length == stretched:
        return None
    return f"max_position_embeddings {length:,}, yarn reaches factor * original = {stretched:,.0f}"


RULES = (
    Rule("rope-parameters-only", "warning", SERVERS,
         "only rope_parameters is there: readers of the released keys rotate by default settings in silence",
         "write rope_theta and rope_scaling too", "config", _only_parameters, _write_rope),
    Rule("rope-scaling-only", "note", ("transformers",),
         "only the released rope_scaling is there (transformers 5 reads it)", "write rope_parameters too", "config",
         _only_scaling, _write_rope),
    Rule("rope-contradiction", "error", ENGINES,
         "rope_scaling and rope_parameters contradict each other, and engines take different ones",
         "write both alike (--fix takes the one that fits max_position_embeddings, else the released one)", "config",
         _contradiction, _write_rope),
    Rule("rope-type-unknown", "error", ENGINES, "a rope type other than yarn or default", "use yarn or none",
         "config", _rope_type),
    Rule("yarn-incomplete", "error", ENGINES, "yarn without its factor or original length",
         "write factor and original_max_position_embeddings", "config", _yarn_incomplete),
    Rule("yarn-mscale-missing", "error", ("llama.cpp",),
         "yarn without mscale or mscale_all_dim: llama.cpp computes another temperature (relative error of logits 1.13)",
         "write both as the model was trained (V3: 1.0 and 1.0); --fix does not, it would change the model elsewhere",
         "config", _yarn_mscale),
    Rule("positions-beyond-yarn", "warning", ENGINES, "max_position_embeddings lies beyond what yarn stretches to",
         "write factor * original_max_position_embeddings, or the factor that was trained", "sizes",
         lambda s: _positions(s, True)),
    Rule("positions-below-yarn", "note", ENGINES, "max_position_embeddings is shorter than what yarn stretches to",
         "nothing, if it is meant", "sizes", lambda s: _positions(s, False)),
)  # fmt: skip
