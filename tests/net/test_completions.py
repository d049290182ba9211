"""Completions, holes and token routes through OpenAI's client."""

from __future__ import annotations

import random

import httpx
import openai
import pytest
from openai.types import Completion

from rorqual.engine.scripted import Script
from tests.net.harness import Harness, some_text


def test_text_goes_on(server: Harness, rng: random.Random) -> None:
    answer, prompt = some_text(rng), some_text(rng, 4)
    ids = server.script(answer)
    whole = server.client().completions.create(model="tiny", prompt=prompt, echo=True)
    assert whole.choices[0].text == prompt + answer and whole.choices[0].finish_reason == "stop"
    sent = [server.tokenizer.bos_id, *server.tokenizer.encode(prompt)]
    assert list(server.engine.seen[-1].prompt) == sent
    assert whole.usage.prompt_tokens == len(sent) and whole.usage.completion_tokens == len(ids) + 1
    chunks = list(
        server.client().completions.create(
            model="tiny", prompt=prompt, echo=True, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == prompt + answer
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens == len(ids) + 1


def test_several_prompts_and_choices(server: Harness, rng: random.Random) -> None:
    tokenizer = server.tokenizer
    server.engine.scripts[:] = [Script(tokens=lambda prompt: prompt[1:])]  # says what it was told
    texts = [some_text(rng, 3) for _ in range(3)]
    whole = server.client().completions.create(model="tiny", prompt=texts, n=2)
    assert [c.text for c in whole.choices] == [t for t in texts for _ in range(2)]
    assert [c.index for c in whole.choices] == list(range(6))
    assert whole.usage.prompt_tokens == sum(len(tokenizer.encode(t)) + 1 for t in texts)
    ids = [[5, *tokenizer.encode(t)] for t in texts]
    whole = server.client().completions.create(model="tiny", prompt=ids)
    assert [c.text for c in whole.choices] == texts
    assert server.client().completions.create(model="tiny", prompt=ids[0]).choices[0].text == texts[0]


def test_a_hole_is_marked(server: Harness) -> None:
    server.script(" return 1\n")
    body = {"model": "tiny", "prompt": "def f():\n<｜fim▁hole｜>", "suffix": "\nprint(f())"}
    reply = httpx.post(f"{server.url}/beta/completions", json=body).json()
    Completion.model_validate(reply, strict=True)
    assert reply["choices"][0]["text"] == " return 1\n"
    t = server.tokenizer
    assert list(server.engine.seen[-1].prompt) == [
        t.bos_id, t.special("<｜fim▁begin｜>"), *t.encode(body["prompt"]), t.special("<｜fim▁hole｜>"),
        *t.encode(body["suffix"]), t.special("<｜fim▁end｜>"),
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_lists_side_by_side(server: Harness, rng: random.Random, stream: bool) -> None:
    answer = "".join(rng.choice("abc de") for _ in range(30)) + "."
    server.script(answer)
    asked = server.client().completions.create(model="tiny", prompt="x", logprobs=2, stream=stream)
    tokens, offsets, top = [], [], []
    for piece in asked if stream else [asked]:
        lists = piece.choices[0].logprobs
        tokens, offsets, top = tokens + lists.tokens, offsets + lists.text_offset, top + lists.top_logprobs
        assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs)
    assert "".join(tokens) == answer and all(answer[o:].startswith(t) for o, t in zip(offsets, tokens, strict=True))
    assert all(len(alternatives) == 2 for alternatives in top)


def test_markers_mean_nothing(server: Harness) -> None:
    think = [server.tokenizer.special("<think>"), *server.tokenizer.encode("hm"), server.tokenizer.special("</think>")]
    server.engine.scripts[:] = [Script(tokens=think)]
    assert server.client().completions.create(model="tiny", prompt="x").choices[0].text == "<think>hm</think>"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": {}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [1], "suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_wrong_is_named(server: Harness, fields: dict[str, object], param: str) -> None:
    reply = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "x"} | fields)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param
    with pytest.raises(openai.NotFoundError):
        server.client().completions.create(model="other", prompt="x")


def test_tokens_there_and_back(server: Harness, rng: random.Random) -> None:
    text = some_text(rng) + "<｜User｜>"
    told = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert told["tokens"] == [server.tokenizer.bos_id, *server.tokenizer.encode(text)] and told["max_model_len"] == 512
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    plain = httpx.post(f"{server.url}/v1/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": plain["tokens"], "model": "tiny"}).json()
    assert back == {"prompt": text}
    chat = [{"role": "user", "content": "hi"}]
    told = httpx.post(f"{server.url}/tokenize", json={"messages": chat, "thinking": {"type": "enabled"}}).json()
    assert told["tokens"] == server.template.encode(server.tokenizer, chat, True)
    for wrong in ({}, {"prompt": "x", "messages": chat}, {"prompt": 1}):
        assert httpx.post(f"{server.url}/tokenize", json=wrong).status_code == 400
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": ["x"]}).status_code == 400
