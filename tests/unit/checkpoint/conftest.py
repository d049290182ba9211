"""Checkpoints that are small, ragged and of every storage; readers and writers of them that share no code with rorqual."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual.checkpoint import save_model
from rorqual.checkpoint.convert import convert
from rorqual.config import ModelConfig
from rorqual.model.transformer import Transformer
from tests.parity import build, draw

Header = dict[str, Any]


# ---- models --------------------------------------------------------------------------------------------------------


def ragged(seed: int, **changes: Any) -> ModelConfig:
    """A drawn configuration whose matrices span several 128-blocks and end in the middle of one: the stacked key-value
    projection is 144 rows, as the released one is 576. One width (130) fits no group of 32. MTP for two seeds of three,
    a tied embedding for odd ones, and more than ten experts, so that names and numbers sort differently."""
    base = draw(seed)
    return base.replace(
        **{
            "hidden_size": 192, "kv_lora_rank": 130, "qk_rope_head_dim": 14, "moe_intermediate_size": 160,
            "intermediate_size": 288, "num_hidden_layers": 2, "n_routed_experts": 12 if base.n_group < 4 else 16,
            "first_k_dense_replace": min(base.first_k_dense_replace, 1),
            "num_nextn_predict_layers": int(seed % 3 > 0), **changes,
        }
    )  # fmt: skip


def drawn(seed: int, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Transformer:
    return build(ragged(seed, **changes), seed, dtype=dtype)


SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "intermediate_size": 64,
    "moe_intermediate_size": 32, "n_routed_experts": 12, "num_experts_per_tok": 2, "num_nextn_predict_layers": 1,
    "initializer_range": 0.08, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """made(storage, seed, **changes): a read-only model directory, written once in a session. seed -1 is `SMALL`."""
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def make(storage: str, seed: int, changes: tuple[tuple[str, Any], ...]) -> Path:
        name = "-".join([storage, str(seed), *(f"{k}{v}" for k, v in changes)])
        if storage == "bf16":
            cfg = ModelConfig(**{**SMALL, **dict(changes)}) if seed < 0 else ragged(seed, **dict(changes))
            save_model(build(cfg, seed, dtype=torch.bfloat16), root / name)
        else:
            to, _, scale_fmt = storage.partition("+")
            convert(make("bf16", seed, changes), root / name, to, scale_fmt=scale_fmt or None)
        return root / name

    return lambda storage, seed, **changes: make(storage, seed, tuple(sorted(changes.items())))


@pytest.fixture
def copied(made: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """The same, as a copy that a test may damage."""

    def copy(storage: str, seed: int = -1, **changes: Any) -> Path:
        target = tmp_path / f"copy-{storage}"
        shutil.copytree(made(storage, seed, **changes), target)
        return target

    return copy


# ---- files, read and written without rorqual ------------------------------------------------------------------------


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def set_config(directory: Path, *without: str, **changes: Any) -> None:
    config = {k: v for k, v in config_of(directory).items() if k not in without}
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def tensors_of(directory: Path) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        out.update(load_file(file))
    return out


def put_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """One file and no index."""
    for old in [*directory.glob("*.safetensors"), *directory.glob("*.index.json"), *directory.glob("SHA256SUMS")]:
        old.unlink()
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, directory / "model.safetensors")


def same_bytes(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:5]
    for name, value in a.items():
        other = b[name]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        assert value.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8)), name


def read_raw(file: Path) -> tuple[Header, bytes]:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(file: Path, header: Header | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


# ---- independent readings of the formats ----------------------------------------------------------------------------


def e4m3_table() -> Tensor:
    """The value of each of the 256 codes: sign, four bits of exponent (bias 7), three of mantissa; 0x7f is NaN."""
    values = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        value = float("nan") if code & 0x7F == 0x7F else value
        values.append(-value if code & 0x80 else value)
    return torch.tensor(values)


def expand_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """Code times the scale of its 128 x 128 block."""
    out, width = codes.shape
    assert scale.shape == (-(-out // 128), -(-width // 128))
    spread = scale.float().repeat_interleave(128, 0)[:out].repeat_interleave(128, 1)[:, :width]
    return e4m3_table()[codes.view(torch.uint8).long()] * spread


def expand_packed(packed: Tensor, scale: Tensor, shape: Tensor, bits: int) -> Tensor:
    """By compressed-tensors' own unpacking."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    codes = unpack_from_int32(packed, bits, torch.Size(shape.tolist())).float()
    return codes * scale.float().repeat_interleave(codes.shape[1] // scale.shape[1], 1)


def expanded(directory: Path) -> dict[str, Tensor]:
    """Every logical weight of a directory in fp32."""
    stored = tensors_of(directory)
    groups = (config_of(directory).get("quantization_config") or {}).get("config_groups") or {}
    bits = next((g["weights"]["num_bits"] for g in groups.values()), 0)
    out: dict[str, Tensor] = {}
    for name, value in stored.items():
        base, _, suffix = name.rpartition(".")
        if suffix == "weight_packed":
            out[f"{base}.weight"] = expand_packed(
                value, stored[f"{base}.weight_scale"], stored[f"{base}.weight_shape"], bits
            )
        elif suffix in ("weight_scale_inv", "weight_scale", "weight_shape"):
            continue
        elif value.dtype == torch.float8_e4m3fn:
            out[name] = expand_fp8(value, stored[f"{name}_scale_inv"])
        else:
            out[name] = value.float()
    return out


def plain_twin(directory: Path, target: Path) -> Any:
    """transformers' fp32 model of a directory's expanded weights, through a plain directory written here."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = config_of(directory)
    layers = config["num_hidden_layers"]
    beyond = tuple(f"model.layers.{i}." for i in range(layers, layers + 4))
    target.mkdir()
    weights = {k: v for k, v in expanded(directory).items() if not k.startswith(beyond)}
    save_file({k: v.contiguous() for k, v in weights.items()}, target / "model.safetensors", {"format": "pt"})
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return transformers.AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


# ---- the demo's directory --------------------------------------------------------------------------------------------

DEMO_KEYS = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size", "n_layers": "num_hidden_layers", "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads", "n_routed_experts": "n_routed_experts", "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok", "n_expert_groups": "n_group", "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor", "score_func": "scoring_func", "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim", "qk_rope_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim",
    "rope_theta": "rope_theta",
}  # fmt: skip
DEMO_NAMES: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0), "input_layernorm": ("attn_norm", None), "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0), "q_a_proj": ("wq_a", None), "q_a_layernorm": ("q_norm", None), "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None), "kv_a_layernorm": ("kv_norm", None), "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1), "gate": ("gate", None), "gate_proj": ("w1", 0), "down_proj": ("w2", 1), "up_proj": ("w3", 0),
    "norm": ("norm", None), "lm_head": ("head", 0),
}  # fmt: skip


def demo_tensors(stored: Mapping[str, Tensor], layers: int, experts: int, ranks: int) -> Iterator[dict[str, Tensor]]:
    """What DeepSeek's inference/convert.py puts into each rank's file."""
    for rank in range(ranks):
        out: dict[str, Tensor] = {}
        for name, value in stored.items():
            if name.startswith(f"model.layers.{layers}."):
                continue
            words = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn").split(".")
            words[-1] = {"weight_scale_inv": "scale", "e_score_correction_bias": "bias"}.get(words[-1], words[-1])
            words[-2], dim = DEMO_NAMES[words[-2]]
            if "experts" in words:
                if int(words[words.index("experts") + 1]) // (experts // ranks) != rank:
                    continue
            elif dim is not None:
                assert value.shape[dim] % ranks == 0, (name, value.shape)
                value = value.chunk(ranks, dim)[rank]
            out[".".join(words)] = value.contiguous()
        yield out


def write_demo(directory: Path, target: Path, ranks: int) -> None:
    """A released directory in the demo's naming."""
    config, stored = config_of(directory), tensors_of(directory)
    target.mkdir()
    files = demo_tensors(stored, config["num_hidden_layers"], config["n_routed_experts"], ranks)
    for rank, tensors in enumerate(files):
        save_file(tensors, target / f"model{rank}-mp{ranks}.safetensors")
    out = {demo: config[released] for demo, released in DEMO_KEYS.items()}
    out["q_lora_rank"] = config["q_lora_rank"] or 0
    out["dtype"] = "fp8" if config.get("quantization_config") else "bf16"
    if scaling := config["rope_scaling"]:
        out |= {
            "original_seq_len": scaling["original_max_position_embeddings"], "rope_factor": scaling["factor"],
            "beta_fast": scaling["beta_fast"], "beta_slow": scaling["beta_slow"], "mscale": scaling["mscale"],
        }  # fmt: skip
    else:
        out["max_seq_len"] = 4096
    (target / "config.json").write_text(json.dumps(out))
