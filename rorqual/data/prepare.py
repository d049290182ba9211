"""Corpora to token shards, in one pass that can be killed at any instant.

    files -> records -> batches -> ids (all cores) -> train/ and val/ shards -> journal

A text document becomes its tokens and an end-of-sentence, learned whole; a conversation becomes what the chat
template renders, with a mask. Order is that of the input (`packing` shuffles), a document goes to train or
val by a hash of its content, and a shard ends with the document that fills it. So the output depends on
inputs and settings alone: not on the number of cores, not on how documents were batched, and not on how often
the run was interrupted.

Resuming: when a train or val shard is full, both are closed and the journal `prepare.json` is replaced, which
is the commit. It says which shards count and which record comes next; whatever else lies there is swept away.
A run that finds a finished journal with the same settings has nothing to do; with other settings or inputs it
refuses.

Deduplication and decontamination are decisions about a corpus and not about its tokens: `data.clean` comes before. Left
out: quality filters.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rorqual.data.places import signature
from rorqual.data.reshape import Reshaper
from rorqual.data.segments import Segment
from rorqual.data.shards import FORMAT, Meta, Reader, Shard, Writer, write_atomic
from rorqual.data.sources import Record, Source, list_sources, read_records
from rorqual.data.special import FIM_BEGIN
from rorqual.data.template import ChatTemplate, encode_segments_batch
from rorqual.data.tokenizer import Tokenizer
from rorqual.errors import DataError

BATCH_CHARS = 1 << 22
BATCH_RECORDS = 4096
JOURNAL = "prepare.json"


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What went in. documents counts texts and conversations, train and val together; learned: tokens with
    mask 1; fim: texts written for fill-in-the-middle."""

    documents: int = 0
    conversations: int = 0
    characters: int = 0
    tokens: int = 0
    learned: int = 0
    val_documents: int = 0
    val_tokens: int = 0
    fim: int = 0
    empty: int = 0
    undecodable: int = 0
    bad: int = 0


Progress = Callable[[PrepareReport, str], None]
Encoded = tuple[Record, list[int], list[int] | None]


@dataclass(frozen=True, slots=True)
class _Settings:
    val_fraction: float
    shard_tokens: int
    template: str | None
    skip_bad: bool
    fim: float
    split_newlines: float
    seed: int


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    tokenizer_dir: str | Path,
    *,
    val_fraction: float = 0.0,
    shard_tokens: int = 1 << 24,
    template: str | None = None,
    fim: float = 0.0,
    split_newlines: float = 0.0,
    seed: int = 0,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes out/train and, if val_fraction > 0, out/val; goes on where an interrupted run stopped.

    fim: share of the texts written for fill-in-the-middle (DeepSeek-V3: 0.1); split_newlines: share of the texts'
    tokens of punctuation and line breaks learned as two; both drawn from `seed` (`data.reshape`).
    template: v3, r1 or v3.1 for conversations; None means the one of tokenizer_dir. skip_bad counts bad JSON
    lines and conversations that cannot be rendered instead of raising. overwrite starts anew whatever `out`
    holds of an earlier run. `progress` gets the report so far and the place reached, after every batch.
    Raises DataError for unusable inputs (with file and line) and for an `out` that holds something else.
    """
    if not 0.0 <= val_fraction < 1.0 or shard_tokens < 1:
        raise DataError(f"val_fraction must be in [0, 1) and shard_tokens positive, not {val_fraction}, {shard_tokens}")
    sources, tokenizer = list_sources(inputs), Tokenizer.load(tokenizer_dir)
    template = _template_name(Path(tokenizer_dir)) if template is None else ChatTemplate(template).name
    settings = _Settings(val_fraction, shard_tokens, template, skip_bad, fim, split_newlines, seed)
    reshaper = Reshaper(tokenizer, fim, split_newlines, seed)
    run = _Run.open(Path(out), sources, tokenizer, settings, overwrite)
    if run.complete:
        return run.report
    for batch in _batches(read_records(sources, *run.position)):
        for record, ids, mask in _encode(batch, tokenizer, Path(tokenizer_dir), template, reshaper):
            run.take(record, ids, mask, settings)
        if progress is not None:
            progress(run.report, batch[-1].place)
    run.finish()
    return run.report


class _Run:
    """The state of one output directory: two writers, a report, and the place of the next record."""

    def __init__(self, out: Path, tokenizer: Tokenizer, journal: dict[str, Any]) -> None:
        self._out = out
        self._journal = journal
        self._fim_id = tokenizer.special(FIM_BEGIN) if tokenizer.has_special(FIM_BEGIN) else None
        self.complete = bool(journal["complete"])
        self.report = PrepareReport(**journal["report"])
        self.position: tuple[int, int] = (journal["position"][0], journal["position"][1])
        meta = Meta(tokenizer.vocab_size, tokenizer.fingerprint, tokenizer.eos_id, tokenizer.pad_id)
        self._writers: dict[str, Writer] = {}
        if self.complete:
            for split in journal["splits"]:
                Reader(out / split)
        else:
            for split, shards in journal["shards"].items():
                self._writers[split] = Writer(out / split, meta, [Shard(**shard) for shard in shards])

    @classmethod
    def open(
        cls, out: Path, sources: Sequence[Source], tokenizer: Tokenizer, settings: _Settings, overwrite: bool
    ) -> _Run:
        """Begins, or continues what is there. Raises DataError if that is something else."""
        key = _key(sources, tokenizer, settings)
        path = out / JOURNAL
        if overwrite:
            path.unlink(missing_ok=True)
            for split in ("train", "val"):
                shutil.rmtree(out / split, ignore_errors=True)
        if path.is_file():
            journal = _read_journal(path)
            if journal["key"] != key or (not journal["complete"] and journal["times"] != _times(sources)):
                raise DataError(
                    f"{out} was prepared from other inputs or with other settings",
                    remedy="choose another directory, or overwrite it",
                )
            try:
                return cls(out, tokenizer, journal)
            except DataError:  # shards were lost or cut: nothing here can be built upon
                return cls.open(out, sources, tokenizer, settings, overwrite=True)
        if any((out / split).exists() for split in ("train", "val")):
            raise DataError(f"{out} holds shards without {JOURNAL}", remedy="choose another directory, or overwrite it")
        splits = ["train", *(["val"] if settings.val_fraction > 0 else [])]
        journal = {"key": key, "complete": False, "times": _times(sources), "position": [0, 0]}
        journal |= {"report": asdict(PrepareReport()), "shards": {split: [] for split in splits}}
        out.mkdir(parents=True, exist_ok=True)
        _write_journal(path, journal)
        return cls(out, tokenizer, journal)

    def take(self, record: Record, ids: list[int], mask: list[int] | None, settings: _Settings) -> None:
        """One encoded record to its split, or its reason for having none to the counts."""
        report = self.report
        if record.skip == "bad" and not settings.skip_bad:
            raise DataError(f"{record.place}: {record.problem}", remedy="mend the line, or skip bad lines")
        if record.skip is not None:
            self.report = replace(report, **{record.skip: getattr(report, record.skip) + 1})
        else:
            split = "val" if _share(record) < settings.val_fraction else "train"
            self._writers[split].add(ids, mask)
            self.report = replace(
                report,
                documents=report.documents + 1,
                fim=report.fim + (ids[0] == self._fim_id and record.messages is None),
                conversations=report.conversations + (record.messages is not None),
                characters=report.characters + record.characters,
                tokens=report.tokens + len(ids),
                learned=report.learned + (len(ids) if mask is None else sum(mask)),
                val_documents=report.val_documents + (split == "val"),
                val_tokens=report.val_tokens + (len(ids) if split == "val" else 0),
            )
        self.position = (record.file, record.number + 1)
        if any(writer.pending_tokens >= settings.shard_tokens for writer in self._writers.values()):
            self._commit()

    def finish(self) -> None:
        """Writes the indexes and closes the journal. Killed before its last line, it is simply done again."""
        self._commit()
        for writer in self._writers.values():
            writer.finish()
        kept = {key: value for key, value in self._journal.items() if key not in ("times", "shards")}
        self._journal = kept | {"complete": True, "splits": list(self._writers)}
        _write_journal(self._out / JOURNAL, self._journal)
        self.complete = True

    def _commit(self) -> None:
        for writer in self._writers.values():
            writer.close_shard()
        self._journal |= {
            "position": list(self.position),
            "report": asdict(self.report),
            "shards": {split: [asdict(s) for s in writer.shards] for split, writer in self._writers.items()},
        }
        _write_journal(self._out / JOURNAL, self._journal)


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Groups big enough to keep all cores busy. Their size shows nowhere in the output."""
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += record.characters
        if characters >= BATCH_CHARS or len(batch) >= BATCH_RECORDS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(
    batch: Sequence[Record], tokenizer: Tokenizer, directory: Path, template: str | None, reshaper: Reshaper
) -> Iterator[Encoded]:
    """Ids and mask (None: all learned) of each record, in order."""
    rendered: list[tuple[Record, list[Segment]]] = []
    for record in batch:
        if record.messages is None:
            segments = reshaper.segments(record.text)
        else:
            chat = ChatTemplate(template) if template is not None else ChatTemplate.load(directory)  # raises
            try:
                segments = chat.training_segments(record.messages)
            except DataError as error:
                record = replace(record, skip="bad", problem=str(error))
        rendered.append((record, [] if record.skip else segments))
    encoded = encode_segments_batch(tokenizer, [segments for _, segments in rendered])
    for (record, _), (ids, mask) in zip(rendered, encoded, strict=True):
        if record.skip or record.messages is not None:
            yield record, ids, mask
        else:
            yield record, [*reshaper.split(ids, record.text), tokenizer.eos_id], None


def _template_name(directory: Path) -> str | None:
    """The template of the directory; None if it is none of ours, which matters only if a conversation
    comes."""
    try:
        return ChatTemplate.load(directory).name
    except DataError:
        return None


def _share(record: Record) -> float:
    """A number in [0, 1) that depends on the content alone, so that equal documents land in the same
    split."""
    content = record.text if record.messages is None else json.dumps(record.messages, sort_keys=True)
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2.0**48


def _key(sources: Sequence[Source], tokenizer: Tokenizer, settings: _Settings) -> str:
    """Hash of all that decides the output; `skip_bad` does not, it only decides whether there is one."""
    files = [[source.name, signature(source.path)[0]] for source in sources]
    parts = [
        FORMAT,
        files,
        tokenizer.fingerprint,
        settings.val_fraction,
        settings.shard_tokens,
        settings.template,
        *([[settings.fim, settings.split_newlines, settings.seed]] if settings.fim or settings.split_newlines else []),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _times(sources: Sequence[Source]) -> str:
    """Notices inputs that were edited between two runs without changing size."""
    return hashlib.sha256(json.dumps([signature(s.path)[1] for s in sources]).encode()).hexdigest()[:32]


def _write_journal(path: Path, journal: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(journal, indent=1).encode())


def _read_journal(path: Path) -> dict[str, Any]:
    try:
        journal: dict[str, Any] = json.loads(path.read_text("utf-8"))
        _ = journal["key"], journal["complete"], journal["report"], journal["position"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error!r}", remedy="choose another directory, or overwrite it") from error
    return journal
