"""Text in, text out: the offline engine over a saved tiny model, and the same model behind a process border."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rorqual.checkpoint import save_model
from rorqual.config import ModelConfig
from rorqual.data.template import ChatTemplate
from rorqual.data.tokenizer import Tokenizer, train_tokenizer
from rorqual.engine.api import FinishReason, Grammar, Request, SamplingParams
from rorqual.engine.llm import LLM, Completion
from rorqual.engine.process import EngineProcess
from rorqual.engine.settings import EngineSettings
from rorqual.errors import CheckpointError, ConfigError, DataError, PromptTooLong, RequestError
from rorqual.model.transformer import Transformer

WORDS = ["the", "whale", "takes", "in", "a", "whole", "ocean", "naïve", "鲸鱼", "クジラ", "🐋", "12", "don't"]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


def text(words: int) -> str:
    return " ".join(random.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-model")
    tokenizer = train_tokenizer([text(30) for _ in range(200)], 320)
    cfg = ModelConfig.load("test").replace(vocab_size=tokenizer.vocab_size, initializer_range=0.15)
    save_model(Transformer(cfg), path)
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory, dtype="float32", threads=1)


def test_text_ids_and_usage_belong_together(llm: LLM) -> None:
    prompts = [text(random.randint(1, 30)) for _ in range(5)]
    for prompt, out in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
        ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode(prompt)]
        assert out == llm.generate([ids], GREEDY)[0] or out.usage.cached_tokens == 0
        assert out.text == llm.tokenizer.decode(out.token_ids)
        assert out.finish_reason is FinishReason.LENGTH and out.logprobs is None
        assert (out.usage.prompt_tokens, out.usage.completion_tokens) == (len(ids), 40)


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    prompts = [text(3) for _ in range(40)]
    params = [SamplingParams(max_tokens=n + 1, ignore_eos=True, logprobs=2 if n % 2 else None) for n in range(40)]
    outs = llm.generate(prompts, params, progress=True)
    assert [len(o.token_ids) for o in outs] == list(range(1, 41))
    assert [o.logprobs is None for o in outs] == [n % 2 == 0 for n in range(40)]
    assert all(o.logprobs is None or [lp.token_id for lp in o.logprobs] == list(o.token_ids) for o in outs)
    with pytest.raises(RequestError):
        llm.generate(prompts, params[:3])


def test_more_prompts_than_the_queue_holds(directory: Path) -> None:
    small = LLM(directory, threads=1, max_num_seqs=2, max_waiting=3)
    outs = small.generate([text(2) for _ in range(20)], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert [len(o.token_ids) for o in outs] == [3] * 20


def test_a_stop_string_ends_the_text_and_is_cut(llm: LLM) -> None:
    prompt = text(5)
    whole = llm.generate([prompt], GREEDY)[0]
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    out = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=(stop,)))[0]
    assert out.text == whole.text[: whole.text.index(stop)]
    assert out.finish_reason is FinishReason.STOP
    assert out.token_ids == whole.token_ids[: len(out.token_ids)] and len(out.token_ids) < 40


def test_a_stop_token_is_counted_but_not_text(llm: LLM) -> None:
    prompt = text(5)
    whole = llm.generate([prompt], GREEDY)[0]
    stop = whole.token_ids[20]
    at = whole.token_ids.index(stop)
    out = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=(stop,)))[
        0
    ]
    assert out.token_ids == whole.token_ids[: at + 1] and out.finish_reason is FinishReason.STOP
    assert out.text == llm.tokenizer.decode(out.token_ids[:-1])


def test_n_completions_of_a_prompt_follow_each_other(llm: LLM) -> None:
    prompts = [text(4), text(7)]
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=random.getrandbits(60), n=3)
    outs = llm.generate(prompts, params)
    assert [o.index for o in outs] == [0, 1, 2] * 2
    for i, out in enumerate(outs):
        alone = replace(params, n=1, seed=(params.seed or 0) + i % 3)
        assert out.token_ids == llm.generate([prompts[i // 3]], alone)[0].token_ids
    assert len({o.token_ids for o in outs[:3]}) == 3
    mixed = llm.generate(prompts, [replace(params, n=2, seed=None), params])
    assert [o.index for o in mixed] == [0, 1, 0, 1, 2] and mixed[0].token_ids != mixed[1].token_ids
    assert [o.index for o in llm.chat([{"role": "user", "content": "a"}], params)] == [0, 1, 2]
    with pytest.raises(RequestError):
        llm.stream(prompts[0], params)


def test_bad_words_do_not_appear(llm: LLM) -> None:
    prompt = text(5)
    tokens = llm.generate([prompt], GREEDY)[0].token_ids
    # Words that are one token, bare or after a space, so that no other spelling is likelier.
    words = {llm.tokenizer.decode([t]).strip() for t in tokens[:10]} - {""}
    words = {w for w in words if len(llm.tokenizer.encode(w)) == 1 and "\ufffd" not in w}
    out = llm.generate([prompt], replace(GREEDY, bad_words=tuple(words)))[0]
    banned = {ids for w in words for ids in (tuple(llm.tokenizer.encode(w)), tuple(llm.tokenizer.encode(f" {w}")))}
    assert not any(out.token_ids[i : i + len(b)] == b for b in banned for i in range(len(out.token_ids)))
    assert not words or out.token_ids != tokens


def test_the_token_that_completes_a_grammar_is_text(llm: LLM) -> None:
    """It stops the request as an end of sequence does, and unlike one it belongs to the answer."""
    params = SamplingParams(temperature=0, max_tokens=40, grammar=Grammar("regex", "[a-z]{3}"))
    out = llm.generate([text(3)], params)[0]
    assert out.finish_reason is FinishReason.STOP and len(out.text) == 3
    assert out.text == llm.tokenizer.decode(out.token_ids)


def test_penalties_and_bias_reach_the_draw(llm: LLM) -> None:
    prompt = text(5)
    three = replace(GREEDY, logit_bias={9: 90.0, 11: 90.0, 13: 90.0})
    assert set(llm.generate([prompt], three)[0].token_ids) <= {9, 11, 13}
    # A token that came 20 times is 40 below one that did not come.
    assert set(llm.generate([prompt], replace(three, frequency_penalty=2.0))[0].token_ids) == {9, 11, 13}
    assert set(llm.generate([prompt], replace(GREEDY, logit_bias={9: 100.0}))[0].token_ids) == {9}
    with pytest.raises(RequestError):
        llm.generate([prompt], replace(GREEDY, logit_bias={llm.info.vocab_size: 1.0}))


def test_streams_equal_the_whole_and_may_interleave(llm: LLM) -> None:
    prompts = [text(8) for _ in range(2)]
    whole = llm.generate(prompts, GREEDY)
    first, second = (llm.stream(p, GREEDY) for p in prompts)
    pieces = [next(first)]
    other = list(second)
    pieces += list(first)
    for deltas, out in ((pieces, whole[0]), (other, whole[1])):
        assert "".join(d.text for d in deltas) == out.text
        assert [d.completion is None for d in deltas] == [True] * (len(deltas) - 1) + [False]
        last = deltas[-1].completion
        assert last and (last.text, last.token_ids, last.finish_reason) == (out.text, out.token_ids, out.finish_reason)


def test_a_closed_stream_is_aborted(llm: LLM) -> None:
    stream = llm.stream(text(3), SamplingParams(max_tokens=400, ignore_eos=True))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    begin = llm.generate([text(3)], SamplingParams(max_tokens=1))[0]
    assert begin.usage.completion_tokens == 1


def test_chat_separates_thought_from_answer(llm: LLM, directory: Path) -> None:
    messages = [{"role": "user", "content": text(4)}]
    plain = llm.chat(messages, GREEDY)[0]
    thought = llm.chat([messages, messages], GREEDY, thinking=True)
    think, end = llm.tokenizer.special("<think>"), llm.tokenizer.special("</think>")
    for out, inside in ((plain, False), *((o, True) for o in thought)):
        sides: dict[bool, list[int]] = {True: [], False: []}
        for token in out.token_ids:
            if token in (think, end):
                inside = token == think
            else:
                sides[inside].append(token)
        if not {think, end} & set(out.token_ids):
            assert out.reasoning == llm.tokenizer.decode(sides[True])
            assert out.text == llm.tokenizer.decode(sides[False])
        assert out.usage.reasoning_tokens == len(sides[True])
    assert thought[0].token_ids == thought[1].token_ids
    streamed = list(llm.stream_chat(messages, GREEDY, thinking=True))
    assert "".join(d.reasoning for d in streamed) == thought[0].reasoning
    without = LLM.around(
        Transformer(ModelConfig.load("test").replace(vocab_size=320)), llm.tokenizer, ChatTemplate("v3")
    )
    with pytest.raises(DataError):
        without.chat(messages, GREEDY, thinking=True)


def test_errors_come_before_anything_is_computed(llm: LLM, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptTooLong):
        llm.generate([[5], [5] * 600], GREEDY)
    with pytest.raises(RequestError):
        llm.generate([[]], GREEDY)
    with pytest.raises(ConfigError):
        LLM(tmp_path / "nowhere")
    with pytest.raises(ConfigError):
        LLM(directory, max_num_seqs=0)


def test_generation_config_may_name_further_ends(llm: LLM, directory: Path, tmp_path: Path) -> None:
    prompt = text(6)
    stop = llm.generate([prompt], GREEDY)[0].token_ids[10]
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in directory.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "generation_config.json").write_text(f'{{"eos_token_id": [1, {stop}]}}')
    out = LLM(copy, threads=1).generate([prompt], SamplingParams(temperature=0, max_tokens=40))[0]
    assert out.finish_reason is FinishReason.STOP and len(out.token_ids) <= 11
    (copy / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError):
        LLM(copy, threads=1)


def test_the_process_gives_the_same_tokens_with_the_real_model(llm: LLM, directory: Path) -> None:
    prompts = [tuple(llm.tokenizer.encode(text(20))) for _ in range(4)]
    want: list[Completion] = llm.generate(prompts, GREEDY)

    async def run() -> None:
        engine = EngineProcess(EngineSettings(str(directory), dtype="float32", device="cpu"))
        await engine.start()
        try:
            assert engine.info == llm.info

            async def collect(id: str, prompt: tuple[int, ...]) -> list[int]:
                async with aclosing(engine.generate(Request(id, prompt, GREEDY))) as outputs:
                    return [t async for o in outputs for t in o.token_ids]

            answers = await asyncio.gather(*(collect(str(n), p) for n, p in enumerate(prompts)))
            assert [tuple(a) for a in answers] == [c.token_ids for c in want]
        finally:
            await engine.stop()

    asyncio.run(run())


def test_start_raises_the_checkpoints_error(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())

    async def run() -> None:
        with pytest.raises(CheckpointError):
            await EngineProcess(EngineSettings(str(tmp_path))).start()

    asyncio.run(run())


def test_a_model_in_memory_and_a_model_of_another_dtype(llm: LLM) -> None:
    torch.manual_seed(random.randrange(1000))
    cfg = ModelConfig.load("test").replace(vocab_size=llm.tokenizer.vocab_size)
    half = LLM.around(Transformer(cfg, dtype=torch.bfloat16), llm.tokenizer)
    assert half.info.dtype == "bfloat16" and llm.info.dtype == "float32"
    assert len(half.generate(["a"], GREEDY)[0].token_ids) == 40
    assert isinstance(half.tokenizer, Tokenizer)
