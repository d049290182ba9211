"""A model as a directory in the Hugging Face layout: config.json, generation_config.json, *.safetensors with an index.

What is saved here, transformers, vLLM, SGLang and the GGUF converter read; what they save is read here. Quantised
weights stay as they are stored, in memory and on the way back out. On a CPU, weights of the wanted dtype are not copied
at all: they are views of a private memory map of the file, stacks of experts included where they lie side by side (as
`save_model` and `rorqual convert` write them), so loading costs what reading costs, and only when a page is used.

A directory appears whole or not at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rorqual.checkpoint.names import Place, module_path, released_places, shared_copies
from rorqual.checkpoint.shards import Planned, plan_shards, shard_names, write_index, write_json, write_shard
from rorqual.checkpoint.source import Source, layer_of
from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError
from rorqual.model.quantised import Stored
from rorqual.model.transformer import Transformer
from rorqual.ops.formats import Plain, WeightFormat
from rorqual.ops.fp8 import Fp8Blocks, Scheme

SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_BYTES = 5_000_000_000


def load_model(
    directory: str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype | None = None,
    *,
    activation_scheme: Scheme | Literal["auto"] = "auto",
    dequantize: bool = False,
    memory_map: bool = True,
    **options: Any,
) -> Transformer:
    """A Transformer in eval mode from a model directory.

    dtype: of the plain weights, and of the activations unless compute_dtype says otherwise; "auto" keeps what is stored.
    Quantised weights stay quantised unless `dequantize`. activation_scheme: how FP8 weights are multiplied
    (`ops.fp8.fp8_linear`); "auto" is weight_only on a CPU and what the config asks for on CUDA. memory_map: weights
    that need no conversion may be views of the files (CPU; changes to them stay in memory); False copies them.
    `options` go to Transformer (backends). Raises CheckpointError naming the file or tensor at fault, ConfigError
    for a config.json that is not this architecture.
    """
    device = torch.device(device)
    with _no_collection():
        source = Source.open(directory, _scheme(activation_scheme, device))
        plain = _resolve_dtype(dtype, source)
        formats = {} if dequantize else _module_formats(source)
        model = Transformer(
            source.cfg,
            dtype=plain,
            device=device,
            compute_dtype=compute_dtype,
            formats=formats.get,
            allocate=False,
            **options,
        )
        check(source, model)
        _fill(model, source, device, memory_map and device.type == "cpu")
    return model.eval()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's cyclic collector waits: the many small entries of a header set it going, there is no garbage among them,
    and one pass over all that torch has imported takes longer (0.1 s) than loading does."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _scheme(asked: Scheme | Literal["auto"], device: torch.device) -> Scheme | None:
    """None leaves it to the config."""
    if asked not in ("auto", "weight_only", "dynamic"):
        raise CheckpointError(f"activation_scheme {asked!r} is unknown", remedy="choose auto, weight_only or dynamic")
    if asked != "auto":
        return asked
    return None if device.type == "cuda" else "weight_only"


def _resolve_dtype(dtype: torch.dtype | str, source: Source) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise CheckpointError(f"dtype {dtype!r} is unknown", remedy=f"choose auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        if name in source.weights and (stored := source.dtype(name)) in DTYPES.values():
            return stored
    return DTYPES.get(str(source.cfg.extra.get("torch_dtype", source.cfg.extra.get("dtype"))), torch.bfloat16)


def _module_formats(source: Source) -> dict[str, WeightFormat]:
    """Module path -> format. Raises CheckpointError where the stacked experts of a layer are stored unlike each other."""
    formats: dict[str, WeightFormat] = {}
    if not (stored := source.formats):
        return formats
    plain_experts = {
        module_path(name, source.cfg)
        for name, weight in source.weights.items()
        if weight.form is None and ".mlp.experts." in name
    }
    for name, form in stored.items():
        if isinstance(form, Fp8Blocks) and name.endswith("embed_tokens.weight"):
            continue  # a row of a block is no block: an embedding that someone stored so is expanded
        path = module_path(name, source.cfg)
        if path in plain_experts:
            raise CheckpointError(
                f"the experts of {path} are stored partly {form.name}, partly plainly",
                remedy="load with dequantize=True",
            )
        formats[path] = form
    return formats


def check(source: Source, model: Transformer | None = None) -> None:
    """Names and shapes against the model (by default one on the meta device), before a value is read. Raises
    CheckpointError naming the tensor that is missing, misshapen, or has no place."""
    if model is None:
        model = Transformer(source.cfg, device="meta", formats=_module_formats(source).get)
    wanted = dict(released_places(model))
    have = {tensor for weight in source.weights.values() for tensor in weight.parts.values()} | set(source.weights)
    if missing := sorted(wanted.keys() - have):
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors, among them {missing[0]}",
            remedy="config.json and weights must be of one model; copy missing shards",
        )
    copies = {name for name, _ in shared_copies(model)}
    copies |= {"lm_head.weight", "lm_head.weight_packed"} if model.cfg.tie_word_embeddings else set()
    modules = {i for n in source.weights if n.endswith(".eh_proj.weight") and (i := layer_of(n)) is not None}
    own = wanted.keys() | {f"{n.rpartition('.')[0]}.weight" for n in wanted if not n.endswith(".weight")}
    for name in sorted(source.weights.keys() - own):
        parts = {name, *source.weights[name].parts.values()}
        # MTP modules that the config does not promise stay on disk; a layer it does not count is a wrong config.
        beyond = (layer := layer_of(name)) is not None and layer >= len(model.layers) and layer in modules
        leftover = name.endswith("rotary_emb.inv_freq")  # a table that some exporters wrote and the config implies
        if not parts & copies and not beyond and not leftover:
            raise CheckpointError(
                f"the checkpoint has {name}, which this config has no place for",
                remedy="config.json and weights must be of one model",
            )
    quantised = source.formats
    for name, place in wanted.items():
        expanded = name in quantised and (name not in source.pieces or place.whole.dtype in DTYPES.values())
        shape = source.shape(name) if expanded else source.stored_shape(name)
        if shape != place.shape:
            where = source.pieces[next(iter(source.weights[name].parts.values())) if name in source.weights else name]
            raise CheckpointError(
                f"{name} in {where[0].file.name} is {list(shape)}, the config makes it {list(place.shape)}",
                remedy="config.json and weights must be of one model",
            )


@torch.no_grad()
def _fill(model: Transformer, source: Source, device: torch.device, mapped: bool) -> None:
    """Give every attribute its values: a view of the file where one serves, a filled new tensor otherwise."""
    attributes: dict[tuple[int, str], list[tuple[str, Place]]] = {}
    for name, place in released_places(model):
        attributes.setdefault((id(place.module), place.attribute), []).append((name, place))
    for members in attributes.values():
        first = members[0][1]
        module, like = first.module, first.whole
        value = _view(source, [name for name, _ in members], like, stacked=bool(first.part)) if mapped else None
        if value is None:
            value = torch.empty(like.shape, dtype=like.dtype, device=device)
            for name, place in members:
                target = value[place.part] if place.part else value
                parts = isinstance(module, Stored) and not isinstance(module.form, Plain)
                target.copy_(source.raw(name) if parts else source.dense(name))
        if isinstance(like, nn.Parameter):
            value = nn.Parameter(value, requires_grad=like.requires_grad)
        setattr(module, first.attribute, value)


def _view(source: Source, names: list[str], like: Tensor, stacked: bool) -> Tensor | None:
    """`like` as a view of the files, if they hold it just so."""
    if any(name not in source.pieces for name in names):
        return None
    if stacked:
        value = source.stacked(names, like)
    else:
        name = names[0]
        same = source.entry(name).dtype == like.dtype and len(source.pieces[name]) == 1
        value = source.raw(name) if same else None
    if value is not None and names[0].endswith(("weight_scale_inv", "weight_scale")):
        for name in names:
            source.raw(name)  # refuses scales that are not finite
    return value


def save_model(
    model: Transformer,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    files_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model` as a released-format directory, replacing one that is there, all or nothing.

    dtype: of the stored plain weights (None: as they are); correction biases are fp32 always, quantised weights stay
    as they are. files_from: a directory whose tokenizer, template and generation files come along. Raises
    CheckpointError where the place cannot be written.
    """
    directory = Path(directory)
    building = directory.with_name(f".{directory.name}.writing")
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        plain = dtype or model.dtype
        stored = dict(_stored_tensors(model, dtype))
        planned = [Planned(name, _stored_dtype(name, t, dtype), tuple(t.shape)) for name, t in stored.items()]
        shards = plan_shards(planned, max_shard_bytes)
        files = dict(zip(shard_names(len(shards)), shards, strict=True))
        for file, tensors in files.items():
            write_shard(building / file, tensors, ((t.name, stored[t.name].to("cpu", t.dtype)) for t in tensors))
        write_index(building, files)
        cfg = model.cfg.replace(quantization_config=_quantization(model, planned))
        write_side_files(cfg, building, plain, files_from)
        move_into_place(building, directory)
    except OSError as error:
        raise CheckpointError(f"cannot write {directory}: {error}", remedy="check space and permissions") from error


def _stored_tensors(model: Transformer, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for name, place in (*released_places(model), *shared_copies(model)):
        yield name, place.view
        if name.endswith(".weight_packed") and isinstance(place.module, Stored):
            shape = place.module.shape[-2:]
            yield name.replace(".weight_packed", ".weight_shape"), torch.tensor(shape, dtype=torch.int64)


def _stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    keep = dtype is None or name.endswith(("e_score_correction_bias", "weight_scale_inv", "weight_scale"))
    return tensor.dtype if keep or tensor.dtype not in DTYPES.values() else dtype or tensor.dtype


def _quantization(model: Transformer, planned: list[Planned]) -> dict[str, Any] | None:
    """The block that says how the weights are stored: the one they came with, or a new one; none for plain weights."""
    forms = [m.form for m in model.modules() if isinstance(m, Stored) and not isinstance(m.form, Plain)]
    if not forms:
        return None
    if model.cfg.quantization_config is not None:
        return dict(model.cfg.quantization_config)
    return forms[0].describe(plain_modules(planned))


def plain_modules(planned: list[Planned]) -> list[str]:
    """Released module names of the matrices that are stored plainly."""
    quantised = {t.name.rpartition(".")[0] for t in planned if t.name.endswith(("_packed", "_scale_inv"))}
    matrices = [t.name.removesuffix(".weight") for t in planned if t.name.endswith(".weight") and len(t.shape) == 2]
    return [name for name in matrices if name not in quantised]


def write_side_files(cfg: ModelConfig, directory: Path, dtype: torch.dtype, files_from: str | Path | None) -> None:
    """config.json, generation_config.json, and what comes along from another directory."""
    name = str(dtype).removeprefix("torch.")
    write_json(directory / "config.json", {**cfg.to_json(), "torch_dtype": name})
    for file in SIDE_FILES:
        if files_from is not None and (source := Path(files_from) / file).is_file():
            shutil.copyfile(source, directory / file)
    if not (directory / "generation_config.json").is_file():
        ids = {"bos_token_id": cfg.bos_token_id, "eos_token_id": cfg.to_json()["eos_token_id"]}
        write_json(directory / "generation_config.json", {**ids, "do_sample": True, "temperature": 0.6, "top_p": 0.95})


def move_into_place(building: Path, directory: Path) -> None:
    """Replace a directory by a finished one."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    building.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
