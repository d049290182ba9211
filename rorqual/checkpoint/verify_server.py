"""A server with OpenAI's API as the peer of `rorqual verify`.

There is no common way to ask for the log-probabilities of a prompt, so the known ones are tried in order with the first
prompt, and the first that answers is kept. Prompts go as token ids wherever that is possible: then both sides read the
same, whatever the server's tokenizer does.

1. vLLM: `prompt_logprobs` on /completions; the choice carries a list with one object for each prompt token, keyed by
   token id, with `logprob` and `rank`.
2. SGLang: /generate with `return_logprob` and `logprob_start_len` 0; `meta_info.input_token_logprobs` holds triples of
   log-probability, id and text, `input_top_logprobs` lists of such.
3. `echo` with `logprobs` on /completions, OpenAI's old form: parallel lists over prompt and completion. With text in
   place of ids where ids are refused; `return_tokens_as_token_ids` makes vLLM name tokens by id.
4. Neither: the server continues the prompt greedily, and the log-probabilities it reports for its own tokens are
   compared: /completions with ids (llama-server), then /chat/completions with the texts as messages (any server with
   `logprobs`, rorqual's among them). That says less, about as many tokens as it writes, and is named in the notes.

A server that offers /tokenize is asked for the ids of the texts too.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from rorqual.checkpoint.verify import Scores
from rorqual.checkpoint.verify_prompts import Prompt, Words
from rorqual.errors import BackendUnavailable, ConfigError

NEW_TOKENS = 32
"""Tokens asked for where a server tells only about its own."""
MAX_ANSWER_BYTES = 1 << 28
_BY_ID = "token_id:"


class _NotOffered(Exception):
    """This server does not do it this way; the text says what it answered."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET, and a key would go where it was not meant for."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class ServerPeer:
    """See the module. A connection for each request; no proxy, since the environment is not read and the server is most
    often on this machine; redirects are refused."""

    kind = "server"

    def __init__(
        self, url: str, words: Words, *, api_key: str | None = None, model: str | None = None, timeout_s: float = 120
    ) -> None:
        """url: with or without /v1. model: None takes the first of /v1/models. timeout_s: for each answer.

        Raises ConfigError for what is no http address, BackendUnavailable where nobody answers.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url} is no http address", remedy="for instance http://127.0.0.1:8000/v1")
        self._root = url.rstrip("/").removesuffix("/v1")
        self._words, self._key, self._timeout_s = words, api_key, timeout_s
        self._open = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({})).open
        self._ways: list[tuple[str, Callable[[Prompt], Scores]]] = [
            ("prompt_logprobs", self._prompt_logprobs),
            ("SGLang's /generate", self._native),
            ("echo", self._echo),
            ("greedy /completions", self._continuation),
            ("greedy /chat/completions", self._conversation),
        ]
        self._tokenises = True
        self.notes: list[str] = []
        self._model = model or self._first_model()
        self.name = f"{self._model} at {url}"

    # ---- what the comparison asks -------------------------------------------------------------------------------

    def score(self, prompt: Prompt) -> Scores:
        reasons = []
        for i, (name, way) in enumerate(self._ways):
            try:
                scores = way(prompt)
            except _NotOffered as error:
                reasons.append(f"{name}: {error}")
                continue
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                reasons.append(f"{name}: the answer is malformed ({error!r})")
                continue
            if len(self._ways) > 1:
                self._ways = self._ways[i : i + 1]
                self.notes.append(f"log-probabilities by {name}")
                if scores.first > 1:
                    self.notes.append("the server gives none of prompt tokens: its greedy continuations were compared")
            return scores
        raise BackendUnavailable(
            f"{self._root} gives no log-probabilities for {prompt.name!r} ({'; '.join(reasons)})",
            remedy="needed is prompt_logprobs or echo on /v1/completions, or logprobs on /v1/chat/completions",
        )

    def tokenise(self, text: str) -> list[int] | None:
        """vLLM and SGLang read `prompt`, llama-server `content`; each ignores the other's."""
        if not self._tokenises:
            return None
        body = {
            "model": self._model, "prompt": text, "content": text, "add_special_tokens": False, "add_special": False,
        }  # fmt: skip
        try:
            ids = self._post("/tokenize", body).get("tokens")
        except _NotOffered:
            ids = None
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            self._tokenises = False
            return None
        return ids

    def close(self) -> None:
        """Nothing is held open."""

    # ---- ways ---------------------------------------------------------------------------------------------------

    def _prompt_logprobs(self, prompt: Prompt) -> Scores:
        body = {"prompt": list(prompt.ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        entries = self._choice("/v1/completions", body).get("prompt_logprobs")
        if not isinstance(entries, list):
            raise _NotOffered("the answer has no prompt_logprobs")
        _same_length(len(entries), prompt)
        logprobs, top = [], []
        for token, entry in zip(prompt.ids[1:], entries[1:], strict=True):
            values = {int(key): (_number(v["logprob"]), v.get("rank")) for key, v in entry.items()}
            if token not in values:
                raise _NotOffered(f"the answer speaks of other tokens than {token}")
            logprobs.append(values[token][0])
            first = [key for key, (_, rank) in values.items() if rank == 1]
            top.append(first[0] if first else max(values, key=lambda key: values[key][0]))
        return _scores(prompt.ids, 1, logprobs, top)

    def _native(self, prompt: Prompt) -> Scores:
        body = {
            "input_ids": list(prompt.ids), "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1,
        }  # fmt: skip
        facts = self._post("/generate", body).get("meta_info")
        entries = facts.get("input_token_logprobs") if isinstance(facts, dict) else None
        if not isinstance(facts, dict) or not isinstance(entries, list):
            raise _NotOffered("the answer has no meta_info.input_token_logprobs")
        _same_length(len(entries), prompt)
        if [entry[1] for entry in entries] != list(prompt.ids):
            raise _NotOffered("the answer speaks of other tokens")
        best = facts.get("input_top_logprobs") or [None] * len(entries)
        top = [row[0][1] if row else -1 for row in best[1:]]
        return _scores(prompt.ids, 1, [_number(entry[0]) for entry in entries[1:]], top)

    def _echo(self, prompt: Prompt) -> Scores:
        body = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
        try:
            choice = self._choice("/v1/completions", body | {"prompt": list(prompt.ids)})
        except _NotOffered:
            if prompt.text is None:
                raise
            choice = self._choice("/v1/completions", body | {"prompt": prompt.text})
        found = choice.get("logprobs")
        if not isinstance(found, dict) or not isinstance(found.get("token_logprobs"), list):
            raise _NotOffered("the answer has no logprobs")
        n, names, values = len(prompt.ids), found.get("tokens") or [], found["token_logprobs"]
        if len(values) not in (n, n + 1):
            raise _NotOffered(f"the answer has {len(values)} tokens for a prompt of {n}")
        if any(name != f"{_BY_ID}{i}" for name, i in zip(names, prompt.ids, strict=False) if name.startswith(_BY_ID)):
            raise _NotOffered("the answer speaks of other tokens")
        best = found.get("top_logprobs") or [None] * len(values)
        logprobs = [_number(value) for value in values[1:n]]
        top = [
            self._best(row, token, value) for row, token, value in zip(best[1:n], prompt.ids[1:], logprobs, strict=True)
        ]
        return _scores(prompt.ids, 1, logprobs, top)

    def _best(self, row: dict[str, float] | None, token: int, logprob: float) -> int:
        """Id of the likeliest of an object token -> log-probability; -1 where its name is no one token's."""
        if not row:
            return -1
        name = max(row, key=lambda key: row[key])
        return token if row[name] <= logprob else self._by_name(name)

    def _continuation(self, prompt: Prompt) -> Scores:
        body = {
            "prompt": list(prompt.ids), "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        found = self._choice("/v1/completions", body).get("logprobs")
        entries = found.get("content") if isinstance(found, dict) else None
        if entries is None and isinstance(found, dict) and isinstance(found.get("tokens"), list):
            pairs = zip(found["tokens"], found.get("token_logprobs") or [], strict=False)
            entries = [{"token": token, "logprob": value} for token, value in pairs]
        return self._generated(prompt.ids, entries)

    def _conversation(self, prompt: Prompt) -> Scores:
        tokenizer, template = self._words.tokenizer, self._words.template
        if tokenizer is None or template is None:
            raise _NotOffered("the model directory has no tokenizer and template to write messages with")
        messages = list(prompt.messages or ({"role": "user", "content": prompt.text or ""},))
        ids = template.encode(tokenizer, messages)
        body: dict[str, Any] = {
            "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": True, "top_logprobs": 1,
        }  # fmt: skip
        if template.supports_thinking and not template.starts_in_thinking(False):
            body |= {"thinking": {"type": "disabled"}, "chat_template_kwargs": {"thinking": False}}
        answer = self._post("/v1/chat/completions", body | {"model": self._model})
        said = (answer.get("usage") or {}).get("prompt_tokens")
        if isinstance(said, int) and said != len(ids):
            raise _NotOffered(
                f"the server's template makes {said} tokens of a conversation, this directory's {len(ids)}"
            )
        found = _first_choice(answer).get("logprobs") or {}
        return self._generated(ids, found.get("reasoning_content") or found.get("content"))

    def _generated(self, prompt: Sequence[int], entries: Any) -> Scores:
        """Greedy tokens, up to the first that cannot be told from others of the same spelling."""
        if not isinstance(entries, list):
            raise _NotOffered("the answer has no logprobs")
        ids, logprobs = [], []
        for entry in entries:
            token = self._token(entry)
            if token < 0:
                break
            ids.append(token)
            logprobs.append(_number(entry.get("logprob")))
        if entries and not ids:
            raise _NotOffered("the tokens it names are not in this directory's tokenizer")
        return _scores((*prompt, *ids), len(prompt), logprobs, ids)

    def _token(self, entry: dict[str, Any]) -> int:
        if isinstance(entry.get("id"), int):
            return int(entry["id"])
        if isinstance(raw := entry.get("bytes"), list) and not str(entry.get("token")).startswith(_BY_ID):
            return self._by_bytes.get(bytes(raw), -1)
        return self._by_name(str(entry.get("token")))

    def _by_name(self, name: str) -> int:
        if name.startswith(_BY_ID):
            return int(name.removeprefix(_BY_ID))
        return self._by_bytes.get(name.encode("utf-8"), -1)

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        """Ids by spelling, where only one token is spelt so."""
        tokenizer = self._words.tokenizer
        if tokenizer is None:
            return {}
        found: dict[bytes, int] = {}
        for i in range(tokenizer.vocab_size):
            raw = tokenizer.token_bytes(i)
            found[raw] = -1 if raw in found else i
        return {raw: i for raw, i in found.items() if raw and i >= 0}

    # ---- HTTP ---------------------------------------------------------------------------------------------------

    def _first_model(self) -> str:
        try:
            return str(self._request("/v1/models")["data"][0]["id"])
        except (_NotOffered, KeyError, IndexError, TypeError) as error:
            raise BackendUnavailable(
                f"{self._root} names no model at /v1/models ({error})", remedy="name one with --model"
            ) from None

    def _choice(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return _first_choice(self._post(path, {**body, "model": self._model}))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._request(path, json.dumps(body).encode())

    def _request(self, path: str, body: bytes | None = None) -> dict[str, Any]:
        """Raises _NotOffered for an HTTP error and for what is no JSON object, BackendUnavailable where no answer comes
        or the key is not good enough."""
        request = urllib.request.Request(self._root + path, body, {"Content-Type": "application/json"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with self._open(request, timeout=self._timeout_s) as response:
                raw = response.read(MAX_ANSWER_BYTES)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise BackendUnavailable(
                    f"{self._root}{path} answered {error.code} {error.reason}", remedy="give its key with --api-key"
                ) from None
            raise _NotOffered(f"{error.code} {_message(error) or error.reason}") from None
        except TimeoutError:
            raise self._late(path) from None
        except (OSError, ValueError) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise self._late(path) from None
            raise BackendUnavailable(
                f"{self._root} cannot be reached: {getattr(error, 'reason', error)}", remedy="is the server running?"
            ) from None
        try:
            answer = json.loads(raw)
        except ValueError:
            raise _NotOffered("the answer is no JSON") from None
        if not isinstance(answer, dict):
            raise _NotOffered("the answer is no object")
        return answer

    def _late(self, path: str) -> BackendUnavailable:
        return BackendUnavailable(
            f"{self._root}{path} did not answer within {self._timeout_s:g} s", remedy="raise --timeout"
        )


def _first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _NotOffered("the answer has no choices")
    return choices[0]


def _same_length(found: int, prompt: Prompt) -> None:
    if found != len(prompt.ids):
        raise _NotOffered(f"the answer has {found} tokens for a prompt of {len(prompt.ids)}")


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise _NotOffered(f"a log-probability is {value!r}")
    return float(value)


def _scores(ids: Sequence[int], first: int, logprobs: list[float], top: Sequence[int]) -> Scores:
    return Scores(tuple(ids), first, np.array(logprobs, dtype=np.float64), np.array(top, dtype=np.int64))


def _message(error: urllib.error.HTTPError) -> str:
    """The message of OpenAI's error object, vLLM's flat one, or the start of the body."""
    try:
        text = error.read(2000).decode("utf-8", "replace")
    except OSError:
        return ""
    try:
        body = json.loads(text)
        inner = body.get("error", body)
        said = inner.get("message", text) if isinstance(inner, dict) else inner
    except (ValueError, AttributeError):
        said = text
    return " ".join(str(said).split())[:160]
