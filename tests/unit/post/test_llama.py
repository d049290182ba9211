"""Reading Llama-family models: against transformers, and from GGUF against the directory."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rorqual.data.tokenizer import Tokenizer
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model.batch import Batch
from rorqual.post.llama import halve, names
from rorqual.post.llama_files import build_llama, load_llama, open_llama, save_llama
from rorqual.post.llama_tokenizer import TOOLS, TokenizerFiles, with_markers
from tests.unit.post.conftest import TINY, make_llama

TOKENS = torch.randint(0, TINY.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_those_of_transformers(tmp_path: Path, kv_heads: int, tied: bool) -> None:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(TheirConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=96, max_position_embeddings=128, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, initializer_range=0.2,
    )).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_llama(tmp_path / "theirs")
    with torch.no_grad():
        wanted = theirs(TOKENS).logits
        assert torch.allclose(ours(TOKENS), wanted, atol=1e-4, rtol=1e-4)
        save_llama(ours, tmp_path / "again", None, torch.float32)
        again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.allclose(again(TOKENS).logits, wanted, atol=1e-4, rtol=1e-4)


def test_documents_of_a_row_do_not_see_each_other() -> None:
    model = make_llama()
    documents = torch.tensor([[1] * 15 + [2] * 25])
    with torch.no_grad():
        together = model(TOKENS[:1], Batch(documents_BT=documents))
        alone = model(TOKENS[:1, 15:])
    # Rotary scores depend on distances alone, so the second document may stand anywhere.
    assert torch.allclose(together[:, 15:], alone, atol=1e-4)


def write_gguf(path: Path, files: TokenizerFiles, quantised: bool) -> None:
    """The tiny model as llama.cpp's converter would write it, embedding and feed-forward in Q8_0 where asked."""
    model, cfg = make_llama(), TINY
    parameters = dict(model.named_parameters())
    short = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_freq_base(cfg.rope_theta)
    by_id = sorted(files.spec["model"]["vocab"].items(), key=lambda item: item[1])
    added = {t["content"] for t in files.spec["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list([token for token, _ in by_id])
    writer.add_token_types([3 if token in added else 1 for token, _ in by_id])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in files.spec["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    for name, place in names(cfg):
        base = name.removesuffix(".weight")
        if base in whole:
            stored = whole[base]
        else:
            _, _, layer, part = base.split(".", 3)
            stored = f"blk.{layer}.{short[part]}"
        value = parameters[place].detach().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0
        if quantised and value.ndim == 2:
            writer.add_tensor(f"{stored}.weight", gguf.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{stored}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_directory_it_was_made_from(tmp_path: Path, tokenizer_files: TokenizerFiles) -> None:
    write_gguf(tmp_path / "plain.gguf", tokenizer_files, quantised=False)
    source, model = open_llama(tmp_path / "plain.gguf"), make_llama()
    assert source.cfg == TINY
    with torch.no_grad():
        assert torch.equal(build_llama(source)(TOKENS), model(TOKENS))
    assert source.tokenizer is not None
    text = "def rotate(x): return x  # 12,345 Grüße\n\n"
    assert source.tokenizer.encode(text) == tokenizer_files.encode(text)


def test_quantised_blocks_are_expanded(tmp_path: Path, tokenizer_files: TokenizerFiles) -> None:
    write_gguf(tmp_path / "q8.gguf", tokenizer_files, quantised=True)
    read = build_llama(open_llama(tmp_path / "q8.gguf"))
    for (name, ours), plain in zip(read.named_parameters(), make_llama().parameters(), strict=True):
        bound = plain.abs().max() / 127 if plain.ndim == 2 else 0
        assert ((ours - plain).abs() <= bound).all(), name


def test_markers_take_the_place_of_spare_special_tokens(tmp_path: Path, tokenizer_files: TokenizerFiles) -> None:
    marked = with_markers(tokenizer_files, 0, 1, 2)
    assert marked is not None
    marked.save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    text = "plain words, 1234, and <think> in letters"
    assert tokenizer.encode(text) == Tokenizer(dict(tokenizer_files.spec), dict(tokenizer_files.config)).encode(text)
    assert {"<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"} <= {
        t["content"] for t in marked.spec["added_tokens"]
    }
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.vocab_size == TINY.vocab_size


def test_bytes_a_vocabulary_lacks_get_a_spare_token(tokenizer_files: TokenizerFiles) -> None:
    spec = json.loads(json.dumps(tokenizer_files.spec))
    letter = "Ħ"  # the byte 0x04, which SmolLM2 lacks as well; no merge uses it
    gone = spec["model"]["vocab"].pop(letter)
    spec["model"]["vocab"]["unused"] = gone
    marked = with_markers(TokenizerFiles(spec, tokenizer_files.config), 0, 1, 2)
    assert marked is not None
    tokenizer = Tokenizer(dict(marked.spec), dict(marked.config))
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "a\x04b"


def test_where_special_tokens_are_few_the_last_words_make_room_for_tool_calls(
    tmp_path: Path, tokenizer_files: TokenizerFiles
) -> None:
    """Every text is still encoded and read back, by transformers as well; other words keep their ids."""
    spec = json.loads(json.dumps(tokenizer_files.spec))
    spare = spec["added_tokens"][8:]
    spec["added_tokens"] = spec["added_tokens"][:8]  # beginning, end, padding, four markers, one left
    for token in spare:
        spec["model"]["vocab"] = {word: i for word, i in spec["model"]["vocab"].items() if i != token["id"]}
    marked = with_markers(TokenizerFiles(spec, tokenizer_files.config), 0, 1, 2)
    assert marked is not None
    marked.save(tmp_path)
    before, after = Tokenizer(spec, dict(tokenizer_files.config)), Tokenizer.load(tmp_path)
    ids = [after.special(name) for name in TOOLS]
    assert len({*ids, after.special("<｜User｜>"), 0, 1, 2}) == len(TOOLS) + 4 and after.vocab_size == TINY.vocab_size
    lost = [before.token_bytes(i).decode() for i in ids if i > 255 and i != 7]
    assert len(lost) == len(TOOLS) - 1
    peer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in (*lost, (Path(__file__).parent / "test_upcycle.py").read_text()):
        got = after.encode(text)
        assert after.decode(got) == text and got == peer.encode(text, add_special_tokens=False)
        if text in lost:
            assert len(before.encode(text)) == 1 and len(got) > 1
    assert after.encode("def ") == before.encode("def ")


def test_without_spare_tokens_there_are_no_markers(tokenizer_files: TokenizerFiles) -> None:
    spec = {**tokenizer_files.spec, "added_tokens": tokenizer_files.spec["added_tokens"][:4]}
    assert with_markers(TokenizerFiles(spec, tokenizer_files.config), 0, 1, 2) is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gemma2"}, "Llama family"),
        ({"attention_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "stretched"),
        ({"sliding_window": 64}, "sliding window"),
    ],
)
def test_what_has_no_place_is_refused(tmp_path: Path, change: dict[str, object], match: str) -> None:
    save_llama(make_llama(), tmp_path / "m", None, torch.float32)
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(ConfigError, match=match):
        open_llama(tmp_path / "m")


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model"):
        open_llama(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        open_llama(tmp_path / "x.gguf")
    save_llama(make_llama(), tmp_path / "m", None, torch.float32)
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.3"):
        load_llama(tmp_path / "m")


def test_halving_undoes_interleaving() -> None:
    from rorqual.post.llama import interleave

    weight = torch.arange(2 * 8 * 3.0).view(16, 3)
    assert torch.equal(halve(interleave(weight, 8), 8), weight)
    assert interleave(weight, 8)[1].tolist() == weight[4].tolist()
