"""Text to token ids and back, around Hugging Face `tokenizers`.

Two promises the plain library does not make.

Text is text. `encode` never yields a special or added token, even where the text spells one, so nobody can
forge a turn or a thought by typing `<｜User｜>` or `</think>`. The stock library looks for added tokens in
every text; here the encoder is built from the same tokenizer.json with all of them removed (also those that
sit in the vocabulary, and merges that would spell one). Whoever means a special token asks for its id:
`special("<｜User｜>")`.

Streaming is exact. Byte-level BPE cuts characters anywhere, and decoding a growing list again at every step
costs O(n²). The vocabulary is a table of byte strings, so decoding is a join, and a stream is that join
through an incremental UTF-8 decoder: constant work per token, never half a character, the same text as
`decode` in the end.

Left out: tokenizers that are not byte-level BPE (SentencePiece). Every model of this family is, and bytes are
what makes both promises provable.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rorqual.data import special
from rorqual.data.template import ChatTemplate
from rorqual.errors import DataError

# DeepSeek-V3's pre-tokenisation, verbatim from its tokenizer.json.
SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    (
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
)
# Under those splits a newline followed by an ASCII letter is a border whatever stands around it, so long
# texts may be cut there and encoded in parallel with the same result.
BORDER = re.compile(r"(?<=\n)(?=[A-Za-z])")
PIECE_CHARS = 1 << 16
REMEDY = "a model directory holds tokenizer.json and tokenizer_config.json; `rorqual tokenizer train` makes both"


class Tokenizer:
    """A tokenizer.json with its tokenizer_config.json. Immutable, and safe to share between threads."""

    def __init__(self, spec: dict[str, Any], config: dict[str, Any], where: str = "tokenizer.json") -> None:
        """`spec` and `config` are the parsed files. Raises DataError if they make no byte-level BPE
        tokenizer."""
        self._spec = spec
        self._config = config
        try:
            self._added = {str(t["content"]): int(t["id"]) for t in spec.get("added_tokens") or []}
            self._control = {int(t["id"]) for t in spec.get("added_tokens") or [] if t["special"]}
            self._bytes = _byte_table(spec["model"]["vocab"], self._added)
            self._encoder = _plain_encoder(spec, set(self._added))
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            raise DataError(f"{where} is not a usable tokenizer: {error}", remedy=REMEDY) from error
        untouched = spec.get("normalizer") in (None, {"type": "Sequence", "normalizers": []})
        self._cuttable = untouched and spec.get("pre_tokenizer") == _pre_tokenizer_spec()
        self.vocab_size = len(self._bytes)
        self.bos_id = self._named("bos_token", where)
        self.eos_id = self._named("eos_token", where)
        self.pad_id = self._named("pad_token", where) if config.get("pad_token") else self.eos_id

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Reads tokenizer.json and tokenizer_config.json. Raises DataError for a missing or broken file."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        return cls(read_json(path), read_json(directory / "tokenizer_config.json"), str(path))

    def save(self, directory: str | Path) -> None:
        """Writes both files in the Hugging Face layout; `load` gives an equal tokenizer."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in (("tokenizer.json", self._spec), ("tokenizer_config.json", self._config)):
            (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no beginning-of-sentence, and never a special token whatever the text spells."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores (the work runs outside the interpreter lock)."""
        pieces: list[str] = []
        counts: list[int] = []
        for text in texts:
            parts = self._pieces(_well_formed(text))
            pieces.extend(parts)
            counts.append(len(parts))
        if len(pieces) == 1:
            return [self._encoder.encode(pieces[0], add_special_tokens=False).ids]
        encoded = iter(self._encoder.encode_batch_fast(pieces, add_special_tokens=False))
        return [[i for _ in range(count) for i in next(encoded).ids] for count in counts]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD; ids without a token (padding of the embedding)
        nothing.

        `skip_special` leaves out control tokens (begin, end, padding), as published: role, tool and thinking
        markers are kept, see `data.special`.
        """
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """The bytes one token stands for; empty for an id without a token."""
        if not 0 <= token_id < self.vocab_size or (skip_special and token_id in self._control):
            return b""
        return self._bytes[token_id]

    def stream(self, skip_special: bool = True) -> Detokenizer:
        return Detokenizer(self, skip_special)

    def special(self, name: str) -> int:
        """Id of the special token spelled `name`, e.g. `<｜User｜>`. Raises DataError if there is none."""
        if name not in self._added:
            raise DataError(
                f"this tokenizer has no special token {name!r}",
                remedy="use a tokenizer of the DeepSeek-V3 family or one made by `rorqual tokenizer train`",
            )
        return self._added[name]

    def has_special(self, name: str) -> bool:
        return name in self._added

    @property
    def special_ids(self) -> frozenset[int]:
        """All ids that plain text can never yield."""
        return frozenset(self._added.values())

    @property
    def config(self) -> dict[str, Any]:
        """A copy of tokenizer_config.json."""
        return dict(self._config)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides ids; stored with token shards."""
        parts = [self._spec.get(key) for key in ("model", "pre_tokenizer", "normalizer")]
        text = json.dumps([*parts, sorted(self._added.items()), self.bos_id, self.eos_id], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _pieces(self, text: str) -> list[str]:
        if len(text) <= PIECE_CHARS or not self._cuttable:
            return [text]
        pieces, start = [], 0
        while len(text) - start > PIECE_CHARS and (border := BORDER.search(text, start + PIECE_CHARS)):
            pieces.append(text[start : border.start()])
            start = border.start()
        return [*pieces, text[start:]]

    def _named(self, key: str, where: str) -> int:
        value = self._config.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        if not isinstance(content, str) or content not in self._added:
            raise DataError(
                f"{where}: {key} in tokenizer_config.json is {content!r}, which is not among its special tokens",
                remedy=f"set {key} to a token listed under added_tokens",
            )
        return self._added[content]


class Detokenizer:
    """Text of a growing list of ids. What `push` returned is final; `flush` returns what was held back, and a
    concatenation of all returns equals `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, self._skip_special))

    def flush(self) -> str:
        """Half a character that never got its other half becomes U+FFFD. The stream can be used again
        afterwards."""
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    progress: Callable[[int], None] | None = None,
    template: str = "v3.1",
) -> Tokenizer:
    """Trains byte-level BPE with DeepSeek's pre-tokenisation and special tokens; the same texts give the same
    ids.

    vocab_size counts everything, special tokens and the 256 bytes included. `progress` is called with the
    number of characters read so far. `template` names the chat template written into tokenizer_config.json.
    Raises DataError when vocab_size is too small for the fixed part or the text is too small to fill it.
    """
    fixed = len(special.SPECIAL_TOKENS) + 256
    if vocab_size < fixed:
        raise DataError(
            f"a vocabulary of {vocab_size} has no room for 256 bytes and {fixed - 256} special tokens",
            remedy=f"ask for at least {fixed}",
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(special.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(_pieces_for_training(texts, progress), trainer)
    reached = bpe.get_vocab_size()
    if reached != vocab_size:
        raise DataError(
            f"the text is too small for a vocabulary of {vocab_size}: {reached} tokens were reached",
            remedy=f"give more text or ask for {reached} or fewer",
        )
    spec = json.loads(bpe.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in special.CONTROL
    spec["decoder"] = json.loads(decoders.ByteLevel().__getstate__())
    spec["post_processor"] = begin_with(special.BOS, 0)
    return Tokenizer(spec, _published_config(ChatTemplate(template)))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a tokenizer directory. Raises DataError if it is missing or no such
    thing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", remedy=REMEDY) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", remedy="the file is damaged; copy it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object", remedy="the file is damaged; copy it again")
    return content


def _plain_encoder(spec: dict[str, Any], added: set[str]) -> tokenizers.Tokenizer:
    """The same tokenizer without any way to reach an added token."""
    model = dict(spec["model"])
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in added}
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    model["merges"] = [list(pair) for pair in pairs if added.isdisjoint((*pair, pair[0] + pair[1]))]
    plain = spec | {
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
        "padding": None,
        "model": model,
    }
    return tokenizers.Tokenizer.from_str(json.dumps(plain, ensure_ascii=False))


def _byte_table(vocab: dict[str, int], added: dict[str, int]) -> list[bytes]:
    """What each id stands for. Raises DataError if some byte has no token (not byte-level: text would be
    lost)."""
    byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
    if missing := missing_bytes(vocab):
        raise DataError(
            f"this is not a byte-level BPE tokenizer: {len(missing)} of the bytes of UTF-8 have no token",
            remedy="use a tokenizer of the DeepSeek-V3 family or one made by `rorqual tokenizer train`",
        )
    table = [b""] * (1 + max((*vocab.values(), *added.values())))
    for token, i in vocab.items():
        try:
            table[i] = bytes(byte_of[char] for char in token)
        except KeyError:
            table[i] = token.encode("utf-8")
    for token, i in added.items():
        table[i] = token.encode("utf-8")
    return table


def missing_bytes(vocab: Iterable[str]) -> list[str]:
    """The bytes that UTF-8 uses and a byte-level vocabulary lacks, as it would spell them. The other thirteen occur in no
    text; a vocabulary may do without."""
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    have = set(vocab)
    return [char for byte, char in enumerate(_byte_alphabet()) if byte not in never and char not in have]


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next code point from 256
    on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _well_formed(text: str) -> str:
    """Joins surrogate pairs and replaces lone ones (JSON can smuggle both in); UTF-8 has no way to write
    them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in SPLITS]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pre_tokenizer_spec() -> dict[str, Any]:
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in SPLITS
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, level]}


def _pieces_for_training(texts: Iterable[str], progress: Callable[[int], None] | None) -> Iterator[str]:
    seen = 0
    for text in texts:
        yield _well_formed(text)
        seen += len(text)
        if progress is not None:
            progress(seen)


def begin_with(bos: str, token_id: int) -> dict[str, Any]:
    """What add_bos_token means, spelled out for engines that read tokenizer.json alone: a post_processor."""
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [
        *single,
        {"SpecialToken": {"id": bos, "type_id": 1}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ]
    tokens = {bos: {"id": bos, "ids": [token_id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def _published_config(template: ChatTemplate) -> dict[str, Any]:
    """DeepSeek's tokenizer_config.json, but for the class: a name that every transformers release loads as it
    is."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": special.BOS,
        "eos_token": special.EOS,
        "pad_token": special.PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": template.jinja,
    }
