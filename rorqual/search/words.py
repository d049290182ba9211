"""Words: one idea of them for the index, for ranking and for checking citations, in any language.

SQLite's `unicode61` folds case and accents and splits at everything that is no letter or digit, `porter` takes English
endings off. Neither knows Chinese, Japanese and Korean, where nothing stands between words: a whole sentence would be one
token. Runs of those scripts are therefore written as overlapping pairs of characters before SQLite sees them, the old
and robust way; a single character is looked for as the beginning of a pair.

Left out: a segmenter (a dictionary of tens of megabytes for a small gain over pairs) and stemmers of other languages.
"""

from __future__ import annotations

import re
import unicodedata

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_RUN = re.compile(f"[{CJK}]+")
_WORD = re.compile(f"[{CJK}]+|[^\\W_{CJK}]+")
STOP = frozenset((
    "a", "about", "after", "all", "also", "an", "and", "any", "are", "as", "at", "be", "because", "been", "before",
    "being", "between", "both", "but", "by", "can", "could", "did", "do", "does", "down", "during", "each", "for",
    "from", "further", "had", "has", "have", "having", "he", "her", "here", "him", "his", "how", "i", "if", "in",
    "into", "is", "it", "its", "just", "me", "more", "most", "my", "no", "nor", "not", "now", "of", "off", "on",
    "once", "only", "or", "other", "our", "out", "over", "own", "same", "she", "should", "so", "some", "such",
    "than", "that", "the", "their", "them", "then", "there", "these", "they", "this", "those", "through", "to",
    "too", "under", "until", "up", "very", "was", "we", "were", "what", "when", "where", "which", "while", "who",
    "why", "will", "with", "would", "you", "your",
))  # fmt: skip


def spaced(text: str) -> str:
    """Text for SQLite's tokenizer: runs of CJK characters as pairs, everything else as it is."""
    return _RUN.sub(lambda run: f" {' '.join(pairs(run[0]))} ", text)


def pairs(run: str) -> list[str]:
    return [run[i : i + 2] for i in range(max(1, len(run) - 1))]


def words(text: str) -> list[str]:
    """Words in lower case and without accents; pairs of characters in CJK."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    plain = unicodedata.normalize("NFC", plain)  # Korean syllables whole again
    found: list[str] = []
    for word in _WORD.findall(plain):
        found += pairs(word) if _RUN.match(word) else [word]
    return found


def is_cjk(text: str) -> bool:
    """Whether CJK characters are a fifth of its letters or more."""
    letters = sum(c.isalpha() for c in text)
    return sum(map(len, _RUN.findall(text))) * 5 >= max(1, letters)


def match_query(query: str) -> str:
    """An FTS5 query that asks for any of the words, so that bm25 decides; empty if there are none. Words are quoted:
    nothing in them is an operator."""
    found = list(dict.fromkeys(words(query)))[:64]
    telling = [word for word in found if word not in STOP] or found
    return " OR ".join(f'"{word}"*' if _RUN.fullmatch(word) and len(word) == 1 else f'"{word}"' for word in telling)
