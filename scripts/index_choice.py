"""Measures the two candidates for the local index, SQLite FTS5 and tantivy, on folders of this machine, and prints a table.

    pip install tantivy==0.27.0
    python scripts/index_choice.py /usr/share/doc

Both get the same passages and the same queries. Quality is known-item search, which needs no judges: a query is made of
five words that stand in one passage (at random, stop-words left out), and the document it came from should come first.
`bm25s` and `rank_bm25`, if installed, are timed as rankers of one turn's passages.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rorqual.search.extract import Document
from rorqual.search.gather import File, own_documents, read, walk
from rorqual.search.index import LocalIndex
from rorqual.search.passages import Passage, rank, split
from rorqual.search.words import STOP, spaced, words

Corpus = list[tuple[str, Document, list[Passage]]]
QUERIES = 400


def corpus(folders: Sequence[Path]) -> Corpus:
    """Every document that can be read, with its passages; copies of one text once."""
    out: dict[str, tuple[str, Document, list[Passage]]] = {}
    files = own_documents() + [File(p, p.as_uri()) for folder in folders for p in walk(folder)]
    for file in files:
        try:
            document = read(file.path)
        except Exception:  # what cannot be read is the same for both
            continue
        out.setdefault(document.text, (file.place, document, split(document.text)))
    return list(out.values())


def queries(documents: Corpus, seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    out = []
    while len(out) < QUERIES:
        place, _, passages = rng.choice(documents)
        telling = sorted(
            {w for w in words(rng.choice(passages).text) if w not in STOP and len(w) > 2 and not w.isdigit()}
        )
        if len(telling) >= 8:
            out.append((" ".join(rng.sample(telling, 5)), place))
    return out


def quality(search: Callable[[str], list[str]], asked: list[tuple[str, str]]) -> tuple[float, float, float]:
    """Share found first, mean reciprocal rank within ten, median milliseconds."""
    first, reciprocal, times = 0, 0.0, []
    for query, place in asked:
        start = time.perf_counter()
        places = list(dict.fromkeys(search(query)))[:10]
        times.append(time.perf_counter() - start)
        if place in places:
            reciprocal += 1 / (1 + places.index(place))
            first += places[0] == place
    return first / len(asked), reciprocal / len(asked), 1000 * statistics.median(times)


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def sqlite(documents: Corpus, folder: Path) -> dict[float, Callable[[str], list[str]]]:
    index = LocalIndex(folder / "index.sqlite")
    source = index.begin("corpus", "folder")
    for first in range(0, len(documents), 32):
        with index.batch():
            for place, document, _ in documents[first : first + 32]:
                index.put(source, place, "", document)
    return {2.0: lambda query: [hit.place for hit in index.search(query, 40)]}


def tantivy(documents: Corpus, folder: Path) -> dict[float, Callable[[str], list[str]]]:
    """By the weight of titles: its BM25 normalises each field by itself, which makes short titles loud."""
    import tantivy as t

    builder = t.SchemaBuilder()
    builder.add_text_field("place", stored=True, tokenizer_name="raw")
    builder.add_text_field("title", stored=True, tokenizer_name="en_stem")
    builder.add_text_field("body", stored=True, tokenizer_name="en_stem")
    index = t.Index(builder.build(), path=str(folder))
    writer = index.writer(heap_size=128_000_000, num_threads=1)
    for place, document, passages in documents:
        for p in passages:
            title = spaced(f"{document.title} {p.heading}")
            writer.add_document(t.Document(place=place, title=title, body=spaced(p.text)))
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    searcher = index.searcher()

    def search(query: str, title: float) -> list[str]:
        parsed = index.parse_query(" ".join(words(query)), ["title", "body"], field_boosts={"title": title})
        return [searcher.doc(at)["place"][0] for _, at in searcher.search(parsed, 40).hits]

    return {title: partial(search, title=title) for title in (2.0, 0.5, 0.1)}


def rankers(documents: Corpus, seed: int) -> None:
    """One turn: some 200 passages, indexed and asked once."""
    rng = random.Random(seed)
    texts = [p.text for _, _, passages in rng.sample(documents, 40) for p in passages[:5]]
    query = " ".join(rng.sample(words(texts[0]), 3))

    def timed(name: str, run: Callable[[], object]) -> None:
        run()
        start = time.perf_counter()
        for _ in range(5):
            run()
        print(f"{name}: {1000 * (time.perf_counter() - start) / 5:.1f} ms for {len(texts)} passages")

    timed("SQLite FTS5 in memory", lambda: rank([("", text) for text in texts], query))
    try:
        import bm25s
        from rank_bm25 import BM25Okapi
    except ImportError:
        return

    def with_bm25s() -> object:
        made = bm25s.BM25(k1=1.2, b=0.75)
        made.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
        return made.retrieve(bm25s.tokenize([query], show_progress=False), k=10, show_progress=False)

    timed("bm25s", with_bm25s)
    timed("rank_bm25", lambda: BM25Okapi([words(text) for text in texts]).get_scores(words(query)))


def main() -> None:
    start = time.perf_counter()
    documents = corpus([Path(name) for name in sys.argv[1:]])
    read_s = time.perf_counter() - start
    passages = sum(len(p) for _, _, p in documents)
    characters = sum(len(d.text) for _, d, _ in documents)
    print(
        f"{len(documents):,} documents, {passages:,} passages, {characters / 1e6:.1f} M characters; read in {read_s:.1f} s\n"
    )
    print(
        "| engine | index s | size MB | title weight | query ms | found first | MRR@10 |\n|---|---|---|---|---|---|---|"
    )
    asked = queries(documents, seed=1)
    for name, build in (("SQLite FTS5", sqlite), ("tantivy", tantivy)):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            searches = build(documents, Path(folder))
            took = time.perf_counter() - start
            bytes_ = size(Path(folder))
            for title, search in searches.items():
                first, mrr, ms = quality(search, asked)
                cells = f"{took:.1f} | {bytes_ / 1e6:.1f} | {title} | {ms:.1f} | {first:.3f} | {mrr:.3f}"
                print(f"| {name} | {cells} |", flush=True)
    print()
    rankers(documents, seed=2)


if __name__ == "__main__":
    main()
