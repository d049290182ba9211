"""`rorqual verify`: equal models pass, every kind of damage fails, and peers that misbehave end in one clear line."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from rorqual.checkpoint import load_model, save_model
from rorqual.checkpoint.verify import (
    Ours,
    Scores,
    compare,
    compare_up_to_tie,
    log_softmax,
    routing_margin,
)
from rorqual.checkpoint.verify_plain import e4m3_values, from_blocks, unpacked, write_plain
from rorqual.checkpoint.verify_prompts import Words, make_prompts
from rorqual.checkpoint.verify_server import ServerPeer
from rorqual.cli.verify import verify
from rorqual.config import ModelConfig
from rorqual.data.tokenizer import Tokenizer, train_tokenizer
from rorqual.errors import BackendUnavailable, CheckpointError, ConfigError, DataError
from rorqual.model.moe import MoE
from tests.parity import build, draw

app = typer.Typer()
app.command()(verify)


def run(*words: object) -> Result:
    """The command, as typed; errors of ours surface as exceptions."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "the whale reads every text, 你好, 123 times\n" * 50
    return train_tokenizer([text], 300)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups, YaRN, MoE and a low-rank query; no tokenizer."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    save_model(build(draw(3).replace(rope_theta=10000.0, first_k_dense_replace=1), 3), folder)
    return folder


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A model with a tokenizer of its own and a chat template."""
    folder = tmp_path_factory.mktemp("worded") / "model"
    cfg = draw(1).replace(vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id, num_hidden_layers=2)
    save_model(build(cfg, 1), folder)
    tokenizer.save(folder)
    return folder


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 2, 4, 5])
def test_transformers_agrees_with_drawn_models(tmp_path: Path, seed: int) -> None:
    save_model(build(draw(seed), seed), tmp_path / "model")
    done = run(tmp_path / "model", "--against", "transformers", "--prompts", 2, "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["passed"] and found["kind"] == "verify" and found["peer_kind"] == "transformers"
    assert [row["prompt"] for row in found["rows"]] == ["random ids 1", "random ids 2"]
    assert found["total"]["tokens"] == sum(row["tokens"] for row in found["rows"]) == 254
    assert found["total"]["max_abs"] < 1e-4 and found["total"]["logits_relative"] < 1e-5
    assert found["total"]["perplexity_ours"] == pytest.approx(found["total"]["perplexity_peer"], rel=1e-5)
    assert {"hardware", "torch", "transformers", "commit", "date"} <= set(found["environment"])


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite a one-shard model."""
    (file,) = folder.glob("*.safetensors")
    values = load_file(file)
    change(values)
    save_file(values, file, metadata={"format": "pt"})


def nudge(values: dict[str, torch.Tensor]) -> None:
    """One of the smallest matrices, by a hundredth of its size."""
    weight = values["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"]
    weight += 0.01 * weight.norm() / weight.numel() ** 0.5 * torch.randn(weight.shape, generator=torch.manual_seed(0))


def forget_biases(values: dict[str, torch.Tensor]) -> None:
    for name, value in values.items():
        if name.endswith("e_score_correction_bias"):
            value.zero_()


def spoil(values: dict[str, torch.Tensor]) -> None:
    values["model.norm.weight"].fill_(float("nan"))


def lose_a_norm(values: dict[str, torch.Tensor]) -> None:
    del values["model.layers.1.input_layernorm.weight"]


def turn_slower(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 20000.0
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", ["nothing", "a tensor nudged", "biases forgotten", "rope_theta changed", "NaN"])
def test_a_damaged_copy_fails(plain: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(plain, tmp_path / "copy"))
    if damage == "a tensor nudged":
        tensors(copy, nudge)
    elif damage == "biases forgotten":
        tensors(copy, forget_biases)
    elif damage == "rope_theta changed":
        turn_slower(copy)
    elif damage == "NaN":
        tensors(copy, spoil)
    out = tmp_path / "out.json"
    done = run(copy, "--against", "transformers", "--peer-dir", plain, "--prompts", 2, "--json", out)
    assert done.exit_code == (0 if damage == "nothing" else 1), done.output
    found = json.loads(out.read_text())
    assert found["passed"] is (damage == "nothing") and bool(found["faults"]) is not found["passed"]
    assert ("NOT equal" in done.output) is (damage != "nothing")


def test_the_threshold_decides(plain: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(plain, tmp_path / "copy"))
    tensors(copy, nudge)
    options = ("--against", "transformers", "--peer-dir", plain, "--prompts", 1)
    assert run(copy, *options, "--threshold", 50).exit_code == 0
    assert run(plain, *options, "--threshold", 0).exit_code == 1, "rounding is more than nothing"


def test_a_weight_that_transformers_cannot_find_is_named(plain: Path, tmp_path: Path) -> None:
    """It would draw one at random and say so in a warning."""
    copy = Path(shutil.copytree(plain, tmp_path / "copy"))
    tensors(copy, lose_a_norm)
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"layers\.1\.input_layernorm"):
        run(plain, "--against", "transformers", "--peer-dir", copy, "--prompts", 1)


def test_kimis_name_for_the_architecture_is_translated(plain: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(plain, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "somewhere.Config"}}
    (copy / "config.json").write_text(json.dumps(config))
    assert run(copy, "--against", "transformers", "--prompts", 1).exit_code == 0


def test_without_transformers_it_says_what_to_install(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendUnavailable, match="pip install 'transformers"):
        run(plain, "--against", "transformers")


@pytest.mark.parametrize("options", [("--against", "vllm"), ("--against", "transformers", "--dtype", "int4")])
def test_unknown_words_are_refused(plain: Path, options: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="is unknown"):
        run(plain, *options)


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_built_in_prompts_begin_alike_and_are_cut(worded: Path, tokenizer: Tokenizer) -> None:
    cfg, words = ModelConfig.load(worded), Words.load(worded)
    prompts = make_prompts(cfg, words)
    assert {"English", "Python", "Chinese", "emoji", "numbers", "chat"} <= {p.name for p in prompts}
    assert all(p.ids[0] == tokenizer.bos_id and 2 <= len(p.ids) <= 256 for p in prompts)
    assert [p.ids for p in make_prompts(cfg, words, count=2, max_tokens=9)] == [p.ids[:9] for p in prompts[:2]]
    short = make_prompts(cfg.replace(max_position_embeddings=17, rope_scaling=None), words)
    assert max(len(p.ids) for p in short) == 16, "a server needs room for a token"


def test_paragraphs_of_a_file(worded: Path, plain: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    cfg, words, file = ModelConfig.load(worded), Words.load(worded), tmp_path / "text.txt"
    file.write_text("the whale\nreads\n\n\n\ntext 123\n")
    first, second = make_prompts(cfg, words, file)
    assert first.ids == (tokenizer.bos_id, *tokenizer.encode("the whale\nreads")) and second.text == "text 123"
    file.write_text(" \n\n")
    with pytest.raises(DataError, match="no text"):
        make_prompts(cfg, words, file)
    with pytest.raises(DataError, match="no tokenizer"):
        make_prompts(ModelConfig.load(plain), Words.load(plain), file)
    with pytest.raises(CheckpointError, match="rows"):
        make_prompts(cfg.replace(vocab_size=200), words)


# ---- comparison -----------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(3)


def logits(tokens: int = 70, vocabulary: int = 11) -> Any:
    return RNG.normal(size=(tokens, vocabulary)).astype(np.float32)


def test_log_softmax_sums_to_one_and_bears_large_logits() -> None:
    found = log_softmax(logits() + np.float32(1e4))
    assert np.allclose(np.exp(found).sum(-1), 1)


def test_figures_against_a_plain_loop() -> None:
    ours, theirs = logits(), logits()
    ids = tuple(RNG.integers(0, 11, 70).tolist())
    tally = compare(ours, Scores(ids, logits=theirs))
    a, b = (torch.tensor(x).double().log_softmax(-1) for x in (ours, theirs))
    d = [abs(a[t, ids[t + 1]] - b[t, ids[t + 1]]).item() for t in range(69)]
    row = tally.row("x")
    assert (
        row["tokens"] == 69 and row["max_abs"] == pytest.approx(max(d)) and row["mean_abs"] == pytest.approx(np.mean(d))
    )
    assert row["argmax_agreement"] == pytest.approx((a[:69].argmax(-1) == b[:69].argmax(-1)).double().mean().item())
    assert row["logits_relative"] == pytest.approx(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    assert row["max_abs_any_token"] == pytest.approx((a - b)[:69].abs().max().item())
    nll = -sum(b[t, ids[t + 1]].item() for t in range(69)) / 69
    assert row["perplexity_peer"] == pytest.approx(np.exp(nll))
    half = compare(ours[:30], Scores(ids[:30], logits=theirs[:30])) + compare(
        ours[29:], Scores(ids[29:], logits=theirs[29:])
    )
    assert half.row("x")["mean_abs"] == pytest.approx(row["mean_abs"]), "parts add up"


def two(gap: float, difference: float) -> tuple[Any, Scores]:
    """One place where ours prefers token 0 by `gap`; the peer prefers 1 and is `difference` off at the prompt's token."""
    ours = np.array([[gap, 0, -3], [0, 0, 0]], dtype=np.float32)
    logprob = log_softmax(ours)[0, 2] + difference
    return ours, Scores((0, 2), logprobs=np.array([logprob]), top=np.array([1]))


def test_a_near_tie_is_told_from_a_disagreement() -> None:
    """A gap of at most twice the largest difference may close; one beyond may not."""
    for gap, ties in ((0.019, 1), (0.021, 0)):
        tally = compare(*two(gap, 0.01))
        assert (tally.agreed, tally.ties, tally.row("x")["disagreements"]) == (0, ties, 1 - ties)
    assert compare(*two(0.5, 1.0), limit=0.1).ties == 0, "a difference beyond the threshold excuses nothing"
    ours, theirs = two(0.5, 0.0)
    unsaid = compare(ours, Scores(theirs.ids, logprobs=theirs.logprobs, top=np.array([-1])))
    assert unsaid.ranked == 0 and unsaid.row("x")["argmax_agreement"] is None


def test_not_a_number_is_never_within() -> None:
    ours, ids = logits(5), (1, 2, 3, 4, 5)
    broken = ours.copy()
    broken[2, 7] = np.nan
    for pair in ((ours, broken), (broken, ours)):
        assert not compare(pair[0], Scores(ids, logits=pair[1])).within(1e9)
    with pytest.raises(CheckpointError, match="one model"):
        compare(ours, Scores(ids, logits=ours[:, :9]))


def test_what_follows_a_routing_tie_is_left_out_only_if_it_is_all_that_is_wrong() -> None:
    ours, ids = logits(20), tuple(RNG.integers(0, 11, 20).tolist())
    late, early = ours.copy(), ours.copy()
    late[12:] += logits(8)
    early[3:] += logits(17)
    settled = compare_up_to_tie(ours, Scores(ids, logits=late), 1e-3, tie=12)
    assert (settled.tokens, settled.unsettled, settled.max_abs) == (12, 7, 0.0)
    whole = compare_up_to_tie(ours, Scores(ids, logits=early), 1e-3, tie=12)
    assert (whole.tokens, whole.unsettled) == (19, 0) and whole.max_abs > 0.1
    assert compare_up_to_tie(ours, Scores(ids, logits=late), 1e-3, tie=20).unsettled == 0, "no tie, no excuse"


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_the_routing_margin_is_what_it_takes_to_choose_otherwise(seed: int) -> None:
    """Against a search over all groups and experts."""
    cfg = draw(seed).replace(first_k_dense_replace=0)
    model = build(cfg, seed)
    _, routings = model.hidden(torch.randint(0, cfg.vocab_size, (1, 40)))
    gate = model.layers[0].mlp.gate
    found = routing_margin(gate, routings[0])
    for choice, margin in zip((routings[0].scores_NE + gate.e_score_correction_bias).tolist(), found, strict=True):
        size = cfg.n_routed_experts // cfg.n_group
        groups = [choice[i * size : (i + 1) * size] for i in range(cfg.n_group)]
        order = sorted(groups, key=lambda g: -sum(sorted(g)[-2:]))
        gaps = []
        if cfg.topk_group < cfg.n_group:
            at = [sum(sorted(g)[-2:]) for g in order]
            gaps.append(at[cfg.topk_group - 1] - at[cfg.topk_group])
        kept = sorted((x for g in order[: cfg.topk_group] for x in g), reverse=True)
        if len(kept) > cfg.num_experts_per_tok:
            gaps.append(kept[cfg.num_experts_per_tok - 1] - kept[cfg.num_experts_per_tok])
        assert margin.item() == pytest.approx(min(gaps), abs=1e-6)


def test_a_tied_position_is_found(tmp_path: Path) -> None:
    """Two experts with the same router row are tied wherever one of them is the last chosen."""
    cfg = draw(0).replace(first_k_dense_replace=0, num_experts_per_tok=1)
    model = build(cfg, 0)
    for layer in model.layers:
        assert isinstance(layer.mlp, MoE)
        with torch.no_grad():
            layer.mlp.gate.weight[:] = layer.mlp.gate.weight[0]
            layer.mlp.gate.e_score_correction_bias.zero_()
    save_model(model, tmp_path / "tied")
    assert Ours(tmp_path / "tied").forward([1, 2, 3])[1] == 0


# ---- quantised directories, built by hand -----------------------------------------------------------------------------

WIDE = {
    "hidden_size": 192, "kv_lora_rank": 130, "qk_rope_head_dim": 14, "moe_intermediate_size": 160,
    "intermediate_size": 288, "num_hidden_layers": 2, "n_routed_experts": 8, "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
QUANTISED = ("_proj", "kv_a_proj_with_mqa")


def value_of(code: int) -> float:
    """E4M3 by its definition."""
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if sign else size


def in_fp8(folder: Path) -> None:
    """Random codes and scales for every projection; blocks are ragged at both edges."""
    rng = np.random.default_rng(1)

    def change(values: dict[str, torch.Tensor]) -> None:
        for name in [n for n in values if n.removesuffix(".weight").endswith(QUANTISED)]:
            out, width = values[name].shape
            codes = torch.tensor(rng.integers(0, 120, (out, width)) + 128 * rng.integers(0, 2, (out, width)))
            grid = (-(-out // 128), -(-width // 128))
            values[name] = codes.to(torch.uint8).view(torch.float8_e4m3fn)
            values[f"{name}_scale_inv"] = torch.tensor(rng.uniform(1e-3, 3e-3, grid), dtype=torch.float32)

    tensors(folder, change)
    describe(
        folder, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    )


def in_integers(folder: Path, bits: int) -> None:
    """Random words and scales for every projection whose width is a multiple of the group."""
    rng = np.random.default_rng(2)

    def change(values: dict[str, torch.Tensor]) -> None:
        for name in [n for n in values if n.removesuffix(".weight").endswith(QUANTISED)]:
            out, width = values[name].shape
            if width % 32:
                continue
            del values[name]
            module = name.removesuffix(".weight")
            words = rng.integers(-(2**31), 2**31, (out, width * bits // 32))
            values[f"{module}.weight_packed"] = torch.tensor(words, dtype=torch.int32)
            scale = torch.tensor(rng.uniform(0.005, 0.02, (out, width // 32)) * 2.0 ** (4 - bits))
            values[f"{module}.weight_scale"] = scale.to(torch.bfloat16)
            values[f"{module}.weight_shape"] = torch.tensor([out, width])

    tensors(folder, change)
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    describe(folder, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups})


def describe(folder: Path, quantization: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


@pytest.fixture(scope="module", params=["fp8", "int8", "int4"])
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    save_model(build(draw(3).replace(**WIDE), 3), folder)
    in_fp8(folder) if request.param == "fp8" else in_integers(folder, int(request.param[3:]))
    return folder


def test_e4m3_codes_by_definition() -> None:
    table = e4m3_values()
    assert all(table[code] == value_of(code) for code in range(256) if code & 127 != 127)
    assert np.isnan(table[[127, 255]]).all() and table[126] == 448


def test_blocks_by_a_loop() -> None:
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 127, (150, 300)).astype(np.uint8), rng.uniform(1, 2, (2, 3)).astype(np.float32)
    found = from_blocks(codes, scale)
    for i, j in ((0, 0), (127, 127), (128, 128), (149, 299), (127, 256), (128, 255)):
        assert found[i, j] == np.float32(value_of(int(codes[i, j]))) * scale[i // 128, j // 128]
    with pytest.raises(CheckpointError, match="block scales"):
        from_blocks(codes, scale[:1])


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_by_a_loop(bits: int) -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(-(2**31), 2**31, (3, 64 * bits // 32)).astype(np.int32)
    scale = rng.uniform(1, 2, (3, 2)).astype(np.float32)
    found = unpacked(words, scale, bits, 32, 64)
    for i in range(3):
        for j in range(64):
            word = int(words[i, j * bits // 32]) & 0xFFFFFFFF
            code = (word >> (j * bits % 32)) & (2**bits - 1)
            assert found[i, j] == np.float32(code - 2 ** (bits - 1)) * scale[i, j // 32]


def test_a_quantised_directory_is_checked_by_a_second_reader(quantised: Path) -> None:
    done = run(quantised, "--against", "transformers", "--prompts", 2)
    assert done.exit_code == 0, done.output
    assert "second reader" in " ".join(done.output.split())


def test_a_misread_block_shows(quantised: Path, tmp_path: Path) -> None:
    """One scale of one block differs between what we read and what the peer reads."""
    copy = Path(shutil.copytree(quantised, tmp_path / "copy"))

    def change(values: dict[str, torch.Tensor]) -> None:
        name = next(n for n in values if "layers.0.self_attn.o_proj" in n and "scale" in n)
        name = name if values[name].ndim == 2 else "model.layers.0.mlp.gate_proj.weight_scale_inv"
        values[name][-1, -1] *= 1.5

    tensors(copy, change)
    assert run(copy, "--against", "transformers", "--peer-dir", quantised, "--prompts", 2).exit_code == 1


def test_the_plain_copy_keeps_everything_else(quantised: Path, tmp_path: Path) -> None:
    write_plain(quantised, tmp_path)
    values, (file,) = load_file(next(tmp_path.glob("*.safetensors"))), quantised.glob("*.safetensors")
    before = load_file(file)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not [n for n in values if "scale" in n or "packed" in n or "shape" in n]
    kept = [n for n in before if n in values and before[n].dtype not in (torch.float8_e4m3fn,)]
    assert len(kept) > 10 and all(torch.equal(before[n], values[n]) for n in kept)
    assert {n.replace("_packed", "") for n in before if not n.endswith(("scale", "scale_inv", "shape"))} == set(values)


# ---- servers --------------------------------------------------------------------------------------------------------


class Fake:
    """What a server knows, and how it answers: one dialect, real or wrong values."""

    def __init__(self, folder: Path, dialect: str, wrong: float = 0.0) -> None:
        self.model, self.words = load_model(folder, dtype="float32"), Words.load(folder)
        self.dialect, self.wrong, self.asked, self.keys = dialect, wrong, [], []
        self.other_tokens = False

    @torch.inference_mode()
    def distribution(self, ids: list[int]) -> torch.Tensor:
        found = self.model(torch.tensor([ids]))[0].double().log_softmax(-1)
        return found + self.wrong * torch.randn(found.shape, generator=torch.manual_seed(0))

    def greedy(self, ids: list[int], count: int) -> list[tuple[int, float]]:
        new: list[tuple[int, float]] = []
        for _ in range(count):
            best = self.distribution([*ids, *(i for i, _ in new)])[-1].max(-1)
            new.append((int(best.indices), float(best.values)))
        return new

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append((path, body))
        tokenizer = self.words.tokenizer
        assert tokenizer is not None
        if path == "/v1/models":
            return 200, {"data": [{"id": "fake"}]}
        if path == "/tokenize" and self.dialect in ("vllm", "sglang"):
            assert body["model"] == "fake" and body["add_special_tokens"] is False
            return 200, {"tokens": [*tokenizer.encode(body["prompt"]), *([5] if self.other_tokens else [])]}
        known = {
            "/v1/completions": ("vllm", "echo", "echo text", "llama", "legacy", "long", "empty"),
            "/generate": ("sglang",),
            "/v1/chat/completions": ("chat",),
        }
        if self.dialect not in known.get(path, ()):
            return 404, {"error": {"message": f"no {path} here"}}
        assert path == "/generate" or body["model"] == "fake"
        return getattr(self, "as_" + self.dialect.replace(" ", "_"))(body)

    def as_vllm(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids, entries = body["prompt"], [None]
        assert body["max_tokens"] == 1 and body["prompt_logprobs"] == 1
        for row, token in zip(self.distribution(ids), ids[1:], strict=False):
            best = int(row.argmax())
            rank = int((row > row[token]).sum()) + 1
            entry = {str(token): {"logprob": row[token].item(), "rank": rank, "decoded_token": "?"}}
            entries.append(entry | {str(best): {"logprob": row[best].item(), "rank": 1, "decoded_token": "?"}})
        return 200, {"choices": [{"text": "?", "prompt_logprobs": entries}]}

    def as_long(self, body: dict[str, Any]) -> tuple[int, Any]:
        """A server that puts a beginning-of-sequence of its own in front."""
        if "prompt_logprobs" not in body:
            return 400, {"error": {"message": "not this way"}}
        return self.as_vllm(body | {"prompt": [0, *body["prompt"]]})

    def as_empty(self, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"choices": [{"text": "nothing else"}]}

    def as_sglang(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids = body["input_ids"]
        assert body["return_logprob"] and body["logprob_start_len"] == 0
        rows, top = [[None, ids[0], None]], [None]
        for row, token in zip(self.distribution(ids), ids[1:], strict=False):
            rows.append([row[token].item(), token, None])
            top.append([[row.max().item(), int(row.argmax()), None]])
        return 200, {"text": "?", "meta_info": {"input_token_logprobs": rows, "input_top_logprobs": top}}

    def as_echo(self, body: dict[str, Any]) -> tuple[int, Any]:
        if not body.get("echo"):
            return 400, {"error": {"message": "extra fields"}}
        return 200, self.echoed(body["prompt"], lambda i: f"token_id:{i}")

    def as_echo_text(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Reads text only and names tokens by their text."""
        tokenizer = self.words.tokenizer
        assert tokenizer is not None
        if not body.get("echo") or not isinstance(body["prompt"], str):
            return 422, {"detail": "prompt must be text"}
        ids = [tokenizer.bos_id, *tokenizer.encode(body["prompt"])][:256]
        return 200, self.echoed(ids, lambda i: tokenizer.decode([i], skip_special=False))

    def echoed(self, ids: list[int], name: Callable[[int], str]) -> dict[str, Any]:
        found = self.distribution(ids)
        every = [*ids, int(found[-1].argmax())]
        logprobs = [None, *(found[t, every[t + 1]].item() for t in range(len(ids)))]
        top = [None, *({name(int(row.argmax())): row.max().item()} for row in found)]
        spelled = {"tokens": [name(i) for i in every], "token_logprobs": logprobs, "top_logprobs": top}
        return {"choices": [{"text": "?", "logprobs": spelled}]}

    def as_llama(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Refuses echo; names tokens of its own by id."""
        if body.get("echo"):
            return 400, {"error": {"message": "Only no echo is supported"}}
        new = self.greedy(body["prompt"], min(4, body["max_tokens"]))
        content = [{"id": i, "token": "?", "bytes": [63], "logprob": value} for i, value in new]
        return 200, {"choices": [{"text": "?", "logprobs": {"content": content}}]}

    def as_legacy(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("echo"):
            return 400, {"message": "no echo"}
        new = self.greedy(body["prompt"], 3)
        found = {"tokens": [f"token_id:{i}" for i, _ in new], "token_logprobs": [value for _, value in new]}
        return 200, {"choices": [{"text": "?", "logprobs": found}]}

    def as_chat(self, body: dict[str, Any]) -> tuple[int, Any]:
        tokenizer, template = self.words.tokenizer, self.words.template
        assert tokenizer and template and body["logprobs"] is True and body["temperature"] == 0
        ids = template.encode(tokenizer, body["messages"])
        new = self.greedy(ids, 3)
        content = [{"token": "?", "bytes": list(tokenizer.token_bytes(i)), "logprob": value} for i, value in new]
        usage = {"prompt_tokens": len(ids) + self.other_tokens}
        return 200, {"choices": [{"message": {}, "logprobs": {"content": content}}], "usage": usage}


@contextmanager
def serving(answer: Callable[[str, dict[str, Any]], tuple[int, Any]], keys: list[Any] | None = None) -> Iterator[str]:
    """A server whose answers a function makes; a str is sent as it is, a number of seconds is slept."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            if keys is not None:
                keys.append(self.headers.get("Authorization"))
            status, value = answer(self.path, body)
            if isinstance(value, float):
                time.sleep(value)
            raw = value.encode() if isinstance(value, str) else json.dumps(value).encode()
            self.send_response(status)
            if status in (301, 302, 307):
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            with suppress(OSError):  # who waited too long has left
                self.wfile.write(raw)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


WAYS = {
    "vllm": "prompt_logprobs", "sglang": "SGLang's /generate", "echo": "echo", "echo text": "echo",
    "llama": "greedy /completions", "legacy": "greedy /completions", "chat": "greedy /chat/completions",
}  # fmt: skip


@pytest.mark.parametrize("dialect", WAYS)
def test_a_server_is_asked_in_its_own_dialect(worded: Path, tmp_path: Path, dialect: str) -> None:
    fake, out = Fake(worded, dialect), tmp_path / "out.json"
    with serving(fake.answer) as url:
        done = run(worded, "--against", url, "--prompts", 2, "--threshold", 1e-3, "--json", out)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert f"log-probabilities by {WAYS[dialect]}" in found["notes"]
    assert found["total"]["argmax_agreement"] == 1 and found["total"]["tokens"] > 5
    assert found["total"]["max_abs"] < 1e-4 and found["total"]["logits_relative"] is None
    assert found["tokenisation"] == {"equal": 2 * (dialect in ("vllm", "sglang")), "different": 0}
    assert any("greedy continuations" in note for note in found["notes"]) is ("greedy" in WAYS[dialect])


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "echo", "llama", "chat"])
def test_wrong_values_of_a_server_fail(worded: Path, dialect: str) -> None:
    with serving(Fake(worded, dialect, wrong=0.3).answer) as url:
        done = run(worded, "--against", f"{url}/v1", "--prompts", 2)
    assert done.exit_code == 1 and "mean difference" in done.output, done.output


def test_the_loose_threshold_of_a_server_forgives_bf16(worded: Path) -> None:
    with serving(Fake(worded, "vllm", wrong=0.02).answer) as url:
        assert run(worded, "--against", url, "--prompts", 2).exit_code == 0
        assert run(worded, "--against", url, "--prompts", 2, "--threshold", 0.01).exit_code == 1


def test_every_prompt_goes_as_ids_and_only_the_first_probes(worded: Path) -> None:
    fake = Fake(worded, "sglang")
    with serving(fake.answer) as url:
        assert run(worded, "--against", url, "--prompts", 3).exit_code == 0
    paths = [path for path, _ in fake.asked]
    assert paths.count("/v1/completions") == 1 and paths.count("/generate") == 3
    prompts = make_prompts(ModelConfig.load(worded), Words.load(worded), count=3)
    assert [body["input_ids"] for path, body in fake.asked if path == "/generate"] == [list(p.ids) for p in prompts]


def test_another_tokenizer_is_no_equality(worded: Path) -> None:
    fake = Fake(worded, "vllm")
    fake.other_tokens = True
    with serving(fake.answer) as url:
        done = run(worded, "--against", url, "--prompts", 2)
    assert done.exit_code == 1 and "turns 2 of the texts into other tokens" in done.output


def test_the_key_goes_along(worded: Path) -> None:
    fake, keys = Fake(worded, "vllm"), []
    with serving(fake.answer, keys) as url:
        assert run(worded, "--against", url, "--prompts", 1, "--api-key", "sesame", "--model", "fake").exit_code == 0
    assert set(keys) == {"Bearer sesame"} and "/v1/models" not in [path for path, _ in fake.asked]


def refusal(worded: Path, url: str, **options: Any) -> str:
    """The one line in which a comparison with a server ends."""
    words = Words.load(worded)
    prompt = make_prompts(ModelConfig.load(worded), words, count=1)[0]
    with pytest.raises(BackendUnavailable) as caught:
        ServerPeer(url, words, **options).score(prompt)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("dialect", "said"), [("long", "tokens for a prompt of"), ("empty", "has no prompt_logprobs")])
def test_a_server_that_cannot_be_compared_is_told_why(worded: Path, dialect: str, said: str) -> None:
    with serving(Fake(worded, dialect).answer) as url:
        line = refusal(worded, url)
    assert said in line and "needed is prompt_logprobs or echo" in line
    assert "no /v1/chat/completions here" in line, "what was tried last is told as well"


def test_a_chat_of_another_template_is_refused(worded: Path) -> None:
    fake = Fake(worded, "chat")
    fake.other_tokens = True
    with serving(fake.answer) as url:
        assert "the server's template makes" in refusal(worded, url)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (500, {"error": {"message": "out of\nmemory"}}, "500 out of memory"),
        (401, {"error": "who are you"}, "give its key with --api-key"),
        (200, "<html>hello</html>", "no JSON"),
        (200, "[1, 2]", "no object"),
        (200, {"choices": [{"prompt_logprobs": [None, 17, 18]}]}, "prompt_logprobs: the answer has 3 tokens"),
        (302, {}, "302"),
    ],
)
def test_errors_of_a_server_are_one_clear_line(worded: Path, status: int, body: Any, said: str) -> None:
    with serving(lambda path, asked: (status, body)) as url:
        assert said in refusal(worded, url, model="fake")


def test_malformed_entries_are_no_crash(worded: Path) -> None:
    n = len(make_prompts(ModelConfig.load(worded), Words.load(worded), count=1)[0].ids)
    with serving(lambda path, asked: (200, {"choices": [{"prompt_logprobs": [17] * n}]})) as url:
        assert "prompt_logprobs: the answer is malformed" in refusal(worded, url, model="fake")


def test_a_server_that_hangs_is_left(worded: Path) -> None:
    start = time.monotonic()
    with serving(lambda path, asked: (200, 120.0)) as url:
        assert "did not answer within 0.3 s" in refusal(worded, url, model="fake", timeout_s=0.3)
        assert time.monotonic() - start < 60


def test_nobody_there_and_no_address(worded: Path) -> None:
    with serving(lambda path, asked: (200, {})) as url:
        assert "names no model" in refusal(worded, url)
    assert "cannot be reached" in refusal(worded, url)
    for address in ("ftp://host/v1", "file:///etc/passwd", "http://"):
        with pytest.raises(ConfigError, match="no http address"):
            ServerPeer(address, Words.load(worded))


# ---- llama.cpp behind its pipe --------------------------------------------------------------------------------------

LLAMA = '''
"""Stands in for llama-cpp-python: the "GGUF" holds the name of a directory that rorqual itself runs."""
import sys
sys.path.insert(0, {root!r})
print("this library talks on standard output")
import torch
from pathlib import Path
from rorqual.checkpoint import load_model
from rorqual.data.tokenizer import Tokenizer

__version__ = "9.9"


class Llama:
    def __init__(self, model_path, n_ctx, n_batch, n_ubatch, n_gpu_layers, logits_all, flash_attn, type_k, type_v, **rest):
        assert n_batch == n_ubatch == n_ctx and logits_all and not flash_attn and type_k == type_v == 0
        torch.set_num_threads(1)
        self.folder = Path(model_path).read_text()
        if self.folder == "bad":
            raise ValueError("Failed to load model from file")
        self.model, self.n_ctx = load_model(self.folder, dtype="float32"), n_ctx

    def n_vocab(self):
        return self.model.cfg.vocab_size

    def reset(self):
        self.ids = []

    def eval(self, ids):
        assert self.ids == [] and len(ids) <= self.n_ctx
        with torch.inference_mode():
            self.scores = self.model(torch.tensor([ids]))[0].numpy()

    def tokenize(self, text, add_bos, special):
        assert not add_bos and not special
        if not (Path(self.folder) / "tokenizer.json").exists():
            raise RuntimeError("no vocabulary")
        return Tokenizer.load(self.folder).encode(text.decode())
'''


@pytest.fixture(scope="module")
def llama_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has llama-cpp-python, as far as anyone can tell."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "llama_cpp.py").write_text(LLAMA.format(root=str(Path(__file__).parents[3])))
    return script(folder / "python", f'PYTHONPATH="{folder}" exec "{sys.executable}" "$@"')


def script(file: Path, line: str) -> Path:
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)
    return file


def test_the_worker_gives_logits_and_ids(worded: Path, plain: Path, llama_python: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "model.gguf", tmp_path / "out.json"
    file.write_text(str(worded))
    options = ("--against", "llama.cpp", "--gguf", file, "--peer-python", llama_python)
    done = run(worded, *options, "--prompts", 3, "--json", out)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["tokenisation"] == {"equal": 3, "different": 0} and found["total"]["max_abs"] < 1e-5
    assert found["peer"] == "llama.cpp (llama-cpp-python 9.9), model.gguf"
    file.write_text(str(plain))
    assert run(plain, *options, "--prompts", 1).exit_code == 0, "a file without a vocabulary"
    with pytest.raises(CheckpointError, match="one model"):
        run(worded, *options, "--prompts", 1)


def test_another_models_file_fails(plain: Path, llama_python: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(plain, tmp_path / "copy"))
    tensors(copy, nudge)
    (tmp_path / "m.gguf").write_text(str(copy))
    done = run(
        plain, "--against", "llama.cpp", "--gguf", tmp_path / "m.gguf", "--peer-python", llama_python, "--prompts", 1
    )
    assert done.exit_code == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("echo 'GGML_ASSERT(n_group) failed' >&2; exit 134", "ended with status 134: GGML_ASSERT"),
        ("exit 0", "ended with status 0"),
        ("echo hello", "no JSON"),
        ('echo \'{"error": "ImportError: llama_cpp"}\'', "llama.cpp: ImportError"),
        ("exec sleep 60", "did not answer within 1 s"),
    ],
)
def test_a_worker_that_fails_is_one_clear_line(plain: Path, tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "m.gguf").write_text("")
    python, timeout_s = script(tmp_path / "python", line), 1 if "sleep" in line else 60
    options = ("--gguf", tmp_path / "m.gguf", "--peer-python", python, "--timeout", timeout_s)
    with pytest.raises(BackendUnavailable, match=said) as caught:
        run(plain, "--against", "llama.cpp", *options)
    assert "\n" not in str(caught.value)


def test_what_llama_cpp_needs_is_said(plain: Path, llama_python: Path, tmp_path: Path) -> None:
    options = ("--against", "llama.cpp", "--gguf", tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="there is no file"):
        run(plain, *options, "--peer-python", llama_python)
    (tmp_path / "m.gguf").write_text("bad")
    with pytest.raises(BackendUnavailable, match="Failed to load model"):
        run(plain, *options, "--peer-python", llama_python)
    with pytest.raises(BackendUnavailable, match="cannot be run"):
        run(plain, *options, "--peer-python", tmp_path / "nowhere")


def test_without_llama_cpp_it_says_what_to_install(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="pip install llama-cpp-python"):
        run(plain, "--against", "llama.cpp")


def test_the_real_llama_cpp(worded: Path) -> None:
    """Where it is installed; the protocol above is tested everywhere."""
    pytest.importorskip("llama_cpp")
    assert run(worded, "--against", "llama.cpp", "--prompts", 3).exit_code == 0
