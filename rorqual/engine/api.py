"""The engine as everything above it sees it: requests in, outputs out, no torch.

The engine speaks token ids only. Text, templates and stop strings belong to whoever holds a tokenizer
(`engine.llm` offline, `serve` over HTTP), so that one engine core serves both and can live in a process of its own.

Life of a request: `generate(request)` yields `Output`s as tokens appear. Exactly one of them, the last, carries a
`finish_reason`. Closing the iterator early aborts the request and frees what it held within one step.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

if TYPE_CHECKING:
    from rorqual.engine.stats import EngineStats


PAGE_SIZE = 64
"""Tokens of a page of the latent cache: prefixes are shared in whole pages."""


class FinishReason(StrEnum):
    """Why a request ended. `STOP` and `LENGTH` are OpenAI's; the others never reach a well-behaved client's text."""

    STOP = "stop"  # an end-of-sequence or stop token (a stop string, seen from above)
    LENGTH = "length"  # max_tokens or the context is used up
    ABORT = "abort"  # the caller went away
    ERROR = "error"  # the engine failed; `Output.error` says how


GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the generated text must match. kind "json_object" takes no text; "json_schema" a JSON schema, "regex" a
    regular expression, "lark" a Lark grammar. Compiled by `engine.grammar`.

    after: token ids; the constrained text begins behind the first of them that is drawn (the end of a thought, the
    beginning of tool calls), and everything before it is free. Empty: it begins at once. optional: whether the text may
    end without one of them; if not, its end is forbidden until then.
    """

    kind: GrammarKind
    text: str = ""
    after: tuple[int, ...] = ()
    optional: bool = False


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. `engine.sampler` says in which order the fields act.

    temperature: 0 is greedy; top_p in (0, 1]; top_k: 0 considers every token; min_p: of the best token's probability,
    what another must have at least; max_tokens: None means up to the context's end; stop: strings that end the text
    and are cut from it; stop_token_ids: further ids that end it; min_tokens: no end or stop token is drawn before;
    seed: None draws one from the engine; a seed and a position give the same draw whatever else is in the batch;
    ignore_eos: run to max_tokens (benchmarks); logprobs: None, or how many alternatives (0 to 20) to report beside
    the chosen token's log-probability, taken from the raw distribution (before anything below, temperature and
    truncation).

    repetition_penalty: divides positive logits and multiplies negative ones of every token in prompt or completion;
    presence_penalty, frequency_penalty: subtracted from a logit once, and per occurrence, of a token in the completion;
    logit_bias: (token id, what is added to its logit) pairs, or a mapping; bad_token_ids: sequences that the completion
    never contains; bad_words: the same as strings, for whoever holds a tokenizer (see `spelled`); grammar: what the
    completion must match.

    n: how many completions to make of one prompt, for whoever turns prompts into requests: a request is one completion.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    min_p: float = 0.0
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    bad_words: tuple[str, ...] = ()
    grammar: Grammar | None = None
    n: int = 1

    def __post_init__(self) -> None:
        """Raises RequestError naming the field that is out of range."""
        from rorqual.errors import RequestError

        def require(ok: bool, field_name: str, rule: str) -> None:
            if not ok:
                raise RequestError(f"{field_name} must be {rule}, not {getattr(self, field_name)!r}", param=field_name)

        def normalise(field_name: str, convert: Callable[[Any], tuple[Any, ...]], rule: str) -> None:
            try:
                object.__setattr__(self, field_name, convert(getattr(self, field_name) or ()))
            except (TypeError, ValueError):
                require(False, field_name, rule)

        for strings in ("stop", "bad_words"):  # one string is welcome where the type asks for several
            normalise(strings, lambda s: (s,) if isinstance(s, str) else tuple(s), "a list of strings")
            ok = all(isinstance(s, str) and s for s in getattr(self, strings))
            require(ok, strings, "a list of non-empty strings")
        normalise("stop_token_ids", tuple, "a list of token ids")
        normalise("logit_bias", _bias_pairs, "token ids with numbers")
        normalise("bad_token_ids", lambda many: tuple(tuple(int(t) for t in ids) for ids in many), "lists of token ids")
        require(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        require(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        require(self.top_k >= 0, "top_k", "0 (off) or positive")
        require(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        require(0 <= self.min_tokens <= (self.max_tokens or self.min_tokens), "min_tokens", "between 0 and max_tokens")
        require(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "between 0 and 20")
        require(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "above 0 and at most 100")
        require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        require(all(-100.0 <= b <= 100.0 for _, b in self.logit_bias), "logit_bias", "biases between -100 and 100")
        require(all(self.bad_token_ids), "bad_token_ids", "non-empty sequences")
        require(self.grammar is None or self.grammar.kind in get_args(GrammarKind), "grammar", "of a known kind")
        require(1 <= self.n <= 128, "n", "between 1 and 128")

    def spelled(self, encode: Callable[[str], Sequence[int]]) -> SamplingParams:
        """With every one of `bad_words` as `bad_token_ids`: as `encode` spells it at the start of a text and after a
        space. Other spellings of the same letters (piece by piece) are not found: a model rarely has another."""
        if not self.bad_words:
            return self
        # Only a space before the word is the word's own: " a" and "a" are one entry.
        words = [word.removeprefix(" ") or word for word in self.bad_words]
        spellings = [tuple(encode(text)) for word in words for text in (word, f" {word}")]
        return replace(self, bad_words=(), bad_token_ids=tuple(dict.fromkeys((*self.bad_token_ids, *spellings))))

    def stop_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """The ids that end a completion and are no part of its text. A completion whose grammar is complete ends without
        one."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos_token_ids))


def _bias_pairs(bias: Mapping[Any, Any] | Iterable[tuple[Any, Any]]) -> tuple[tuple[int, float], ...]:
    """Keys may be strings, as JSON has them."""
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    return tuple((int(token), float(value)) for token, value in pairs)


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to produce. `prompt` is token ids, beginning-of-sequence included where the model wants it.

    priority: lower numbers go first, equal ones by arrival; salt: cached pages are shared only with requests of the same
    salt, so that one tenant cannot learn from timing what another has asked.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of the chosen token, and the `top` alternatives as (token id, log-probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Where a request's time and memory went. Seconds: waiting (again after a preemption), reading the prompt, and
    decoding. cached_tokens: prompt tokens found in memory, disk_tokens: those among them that came from disk;
    pages: the most it held at once; drafted and accepted: tokens proposed by speculation, and those that stood."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    steps: int = 0
    preemptions: int = 0
    cached_tokens: int = 0
    disk_tokens: int = 0
    pages: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Output:
    """News of one request: the tokens since the last news.

    cached_tokens: how many prompt tokens came from the prefix cache (known from the first output on).
    The end-of-sequence token that stopped a request is included in `token_ids` (`SamplingParams.stop_ids`). stats come
    with the last output.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    stats: RequestStats | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine serves: limits for checks above it, and facts for the models list. bandwidth: bytes/s that this
    machine reads, as measured at the start (0: not measured); deterministic: see `EngineSettings`."""

    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    cache_tokens: int
    device: str = "cpu"
    dtype: str = "float32"
    bandwidth: float = field(default=0.0, compare=False)  # of this run, no two are equal
    deterministic: bool = False


class Engine(Protocol):
    """What serve/ drives. Implemented by `engine.process.EngineProcess`, `engine.scripted.ScriptedEngine`, and around
    either by `engine.supervisor.SupervisedEngine`."""

    @property
    def info(self) -> EngineInfo: ...

    def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Yields outputs until one has a finish reason. Raises RequestError at once if the request cannot run.
        Closing the iterator (or cancelling the task that reads it) aborts the request."""
        ...

    async def start(self) -> None:
        """Returns when the engine can take requests. Raises the engine's own error if it cannot."""
        ...

    async def stop(self) -> None:
        """Ends every request and frees the engine. Safe to call twice."""
        ...

    @property
    def alive(self) -> bool:
        """Whether requests will be answered, if not at once then after a restart that is under way."""
        ...

    @property
    def ready(self) -> bool:
        """Whether requests are taken up now."""
        ...

    @property
    def stats(self) -> EngineStats:
        """As of the last output."""
        ...


def check_request(request: Request, info: EngineInfo) -> None:
    """The checks every engine makes before it takes a request.

    Raises RequestError for an empty prompt, ids outside the vocabulary or bad words that nobody has spelled,
    PromptTooLong when prompt and max_tokens do not fit, CapacityError never (a queue's own matter).
    """
    from rorqual.errors import PromptTooLong, RequestError

    n, params = len(request.prompt), request.params
    if n == 0:
        raise RequestError("the prompt is empty", remedy="send at least one token of text", param="prompt")
    named = {
        "prompt": request.prompt,
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": [token for token, _ in params.logit_bias],
        "bad_token_ids": [token for sequence in params.bad_token_ids for token in sequence],
    }
    for param, ids in named.items():
        bad = next((t for t in ids if not 0 <= t < info.vocab_size), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside the vocabulary of {info.vocab_size}", param=param)
    if params.bad_words:
        raise RequestError("the engine knows no words", remedy="give bad_token_ids", param="bad_words")
    want = params.max_tokens
    total = n + (want or 1)
    if total > info.max_model_len:
        asked = f"{total} tokens ({n} in the messages, {want or 1} in the completion)"
        raise PromptTooLong(
            f"This model's maximum context length is {info.max_model_len} tokens. However, you requested {asked}.",
            remedy="Please reduce the length of the messages or completion",
            param="messages",
        )
