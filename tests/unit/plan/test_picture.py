"""The picture: fresh, whole, legible, and made of the configuration's numbers."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rorqual.config import ModelConfig, presets
from rorqual.plan.picture import HEIGHT, WIDTH, big, draw

ROOT = Path(__file__).resolve().parents[3]
V3 = ModelConfig.load("deepseek-v3")
SVG = "{http://www.w3.org/2000/svg}"
CASES = {name: ModelConfig.load(name) for name in presets()} | {
    "no dense layer": V3.replace(first_k_dense_replace=0),
    "only dense layers": V3.replace(first_k_dense_replace=61),
    "no expert at all": V3.replace(first_k_dense_replace=61, num_nextn_predict_layers=0),
    "three modules": V3.replace(num_nextn_predict_layers=3),
    "many groups": V3.replace(n_group=64, topk_group=3, num_experts_per_tok=5),
    "all experts": ModelConfig.load("nano").replace(num_experts_per_tok=12),
    "many experts": V3.replace(n_group=1, topk_group=1, n_routed_experts=2048),
    "wide": V3.replace(hidden_size=1_048_576, vocab_size=16_777_216, num_attention_heads=65_536, q_lora_rank=131_072),
}


def words(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_committed_picture_is_what_the_code_draws() -> None:
    """`rorqual inspect deepseek-v3 --svg docs/architecture.svg` brings it up to date."""
    assert (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8") == draw(V3, "deepseek-v3")


def test_the_picture_has_all_the_numbers() -> None:
    """Every size in the configuration, and what follows from them, stands somewhere."""
    text = " ".join(words(draw(V3, "deepseek-v3")))
    numbers = set(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text))
    for key in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim",
        "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size", "n_routed_experts",
        "num_experts_per_tok", "q_lora_rank", "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace",
        "num_nextn_predict_layers", "max_position_embeddings",
    ):  # fmt: skip
        assert f"{getattr(V3, key):,}" in numbers, key
    # Totals, MoE layers, cache, RoPE, heads' widths, the router's scale, eh_proj, the MTP layer, operations of a pair.
    for number in ("671.0", "37.55", "58", "576", "70,272", "10,000", "40", "4,096", "24,576", "16,384", "192", "2.5",
                   "14,336", "61", "640", "2,176", "11.61", "0.1352"):  # fmt: skip
        assert number in numbers, number


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"hidden_size": 7040}, "7,040"), ({"kv_lora_rank": 448}, "448"), ({"n_routed_experts": 240}, "240"),
        ({"routed_scaling_factor": 1.75}, "1.75"), ({"intermediate_size": 18304}, "18,304"), ({"rope_theta": 123.0}, "123"),
        ({"q_lora_rank": 1408}, "1,408"), ({"num_nextn_predict_layers": 4}, "layers 61 to 64"),
        ({"tie_word_embeddings": True}, "the embedding's own"), ({"norm_topk_prob": False}, "as scored"),
    ],
)  # fmt: skip
def test_another_number_is_another_picture(changes: dict[str, object], number: str) -> None:
    text = " ".join(words(draw(V3.replace(**changes))))
    assert number in text and number not in " ".join(words(draw(V3)))


def test_what_a_model_has_not_is_not_drawn() -> None:
    moonlight = words(draw(ModelConfig.load("moonlight-16b-a3b")))
    assert "q_proj" in moonlight and "q_a_proj" not in moonlight and "eh_proj" not in moonlight
    assert not any("groups" in w or "YaRN" in w or "MTP" in w for w in moonlight)
    assert "no module in this model" in moonlight
    assert "router, fp32" not in words(draw(CASES["no expert at all"]))
    assert "dense layers" not in words(draw(CASES["no dense layer"]))


@pytest.mark.parametrize("name", CASES)
def test_every_expert_is_a_cell_and_as_many_are_filled_as_work(name: str) -> None:
    cfg = CASES[name]
    cells = [e for e in ElementTree.fromstring(draw(cfg)).iter(f"{SVG}rect") if "stroke" not in e.attrib][1:]
    if name == "no expert at all":
        assert not cells
        return
    assert len(cells) == cfg.n_routed_experts
    assert sum(c.attrib["fill"] == "#2e8056" for c in cells) == cfg.num_experts_per_tok
    for cell in cells:
        assert (
            float(cell.attrib["width"]) > 0
            and 0 < float(cell.attrib["x"]) < WIDTH
            and 0 < float(cell.attrib["y"]) < HEIGHT
        )


@pytest.mark.parametrize("name", CASES)
def test_texts_stay_on_the_sheet_and_apart(name: str) -> None:
    """By the width of an average letter: no two texts share a place, none runs over the edge."""
    boxes = []
    for e in ElementTree.fromstring(draw(CASES[name], name)).iter(f"{SVG}text"):
        size, x, y = (float(e.attrib[k]) for k in ("font-size", "x", "y"))
        width = 0.52 * size * len(e.text or "")
        left = x - width * {"start": 0, "middle": 0.5, "end": 1}[e.attrib["text-anchor"]]
        boxes.append((left, y - 0.72 * size, left + width, y + 0.1 * size, e.text))
    for left, top, right, bottom, text in boxes:
        assert left > 0 and right < WIDTH and top > 0 and bottom < HEIGHT, text
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a[4], b[4])


def test_a_name_is_escaped_and_nothing_is_fetched() -> None:
    svg = draw(V3, 'a <b> & "c"')
    assert words(svg)[0] == 'a <b> & "c"'
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "") and "<script" not in svg


@pytest.mark.parametrize(
    ("n", "shown"),
    [(7, "7"), (6144, "6.14 K"), (9_221_972, "9.22 M"), (671_026_419_200, "671.0 B"), (10**12, "1.00 T")],
)
def test_big(n: int, shown: str) -> None:
    assert big(n) == shown
