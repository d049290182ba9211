"""What is kept of the teacher's answers: cleaned, whole, on the topic, and in nobody else's name.

A weak teacher stutters, loops, copies the examples and takes itself for another model. Every answer passes here, on the
CPU, while the GPU works; so the tests are substrings and sets on the lowered text, cheaper than large expressions.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from words import phrases, words

FANCY = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " ", "•": "-"})
# Plain substring and set tests on the lowered text: regular expressions with many branches cost more than the GPU's
# share of an answer.
OTHER_SELVES = phrases("""
smollm|smol lm|huggingface|hugging face|openai|open ai|chatgpt|gpt-|anthropic|gemini|alexa|as an ai|an ai |
ai assistant|ai model|ai language|ai system|ai chatbot|ai-|artificial intelligence|digital assistant|
virtual assistant
""")
JUNK_PHRASES = phrases("""
http|www.|```|user:|assistant:|plan:|ladies and gentlemen|dear diary|math homework|creative writing|
i'm sorry, but|i cannot provide|i cannot help|i cannot assist|i can't provide|i can't assist|i'm not able to|
i'm unable to|misunderstanding|confusion|couldn't find|end the answer|sorry for any|sorry for the|this answer|
feel free to ask|here is a possible|here's a possible|here is the revised|prompt|this paragraph|this sentence|
the sentence|my training|your loss|great answer
""")
UNSAFE_WORDS = set(
    words("""
bitch claude cocaine fuck fucked fucking genocide gpt heroin murder murdered murderer murders nazi nazis nigger
porn rape raped rapist sex sexual sexually sexy shit siri slut smollm suicidal suicide terrorism terrorist whore
""")
)
ODD_SIGNS = re.compile(r"[{}\\|#_=~^<>\[\]`@]")
SENTENCE_END = re.compile(r"[.!?][\"')]?(?=\s|$)")
WORD = re.compile(r"[a-z']+")


def stutters(words: list[str]) -> bool:
    """Whether one, two or three words come three times in a row."""
    for n in (1, 2, 3):
        run = 0
        for same in map(str.__eq__, words, words[n:]):
            run = run + 1 if same else 0
            if run >= 2 * n:
                return True
    return False


def loops(low: str, words: list[str]) -> bool:
    """Whether a text repeats itself: four words three times, a sentence or line twice, few distinct words."""
    grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    if grams and max(grams.values()) > (2 if len(words) < 150 else 3):
        return True
    sentences = [s.strip() for s in re.split(r"[.!?\n]+", low) if s.count(" ") > 3]
    if len(set(sentences)) < len(sentences) or stutters(words):
        return True
    return len(words) > 40 and len(set(words)) < 0.42 * min(len(words), 120)


def unwanted(low: str, words: list[str]) -> str:
    """What else is wrong with a lowered text, or ""."""
    if any(p in low for p in OTHER_SELVES):
        return "identity"
    if ODD_SIGNS.search(low) or any(p in low for p in JUNK_PHRASES):
        return "junk"
    if not UNSAFE_WORDS.isdisjoint(words):
        return "unsafe"
    return "loop" if loops(low, words) else ""


def cut_at_sentence(text: str) -> str:
    """An unfinished text up to its last full sentence; empty where less than half would remain."""
    ends = [m.end() for m in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends and ends[-1] > 0.5 * len(text) else ""


def clean(reply: str, ended: bool) -> tuple[str, str]:
    """(text, "") or ("", why it is rejected): what holds for every text the teacher writes."""
    text = reply.translate(FANCY).replace("**", "").strip()
    text = re.sub(r"[ \t]+\n", "\n", re.sub(r"\n{3,}", "\n\n", text))
    if not ended:
        text = cut_at_sentence(text).strip()
        if len(text) < 60:
            return "", "unfinished"
    if len(text) < 2:
        return "", "empty"
    if not text.isascii():
        return "", "not ascii"
    if text[0] in ",.;:)?!" or text[-1] in ",;:-(" or text.count('"') % 2:
        return "", "broken start or end"
    low = text.lower()
    reason = unwanted(low, WORD.findall(low))
    return ("", reason) if reason else (text, "")


def alike(a: str, b: str) -> bool:
    """Whether two texts share most of their three-word phrases."""
    grams = [set(zip(w, w[1:], w[2:], strict=False)) for w in (WORD.findall(a.lower()), WORD.findall(b.lower()))]
    return a == b or len(grams[0] & grams[1]) > 0.35 * max(1, min(len(g) for g in grams))


def stem(word: str) -> str:
    """Crude: enough to see whether 'volcanoes' is about 'volcano'."""
    return word[: max(3, len(word) - 2)] if len(word) > 4 else word[:3]


def off_topic(text: str, topic: str) -> bool:
    return bool(topic) and not any(stem(w) in text.lower() for w in topic.split() if w not in {"the", "a", "an", "and"})


COMMON = set(
    words("""
about best better between child could difference does easily easy explain feel find from give going good have
help learned like make many more name need never only people play poem reach really reasons remember says
sentence short should someone something story tell that their there things think this three tips today want wear
week what when where which with word would write your
""")
)


EXAMPLE_NAMES = re.compile(r"\b(Theo|June|Luke|Nora|Mr\. Brown)\b")


def leaks(text: str, job: dict[str, Any], turns: list[str]) -> bool:
    """Whether the answer speaks of what the examples asked about (a bridge, a shoe) and the user did not."""
    asked = set(WORD.findall(" ".join(turns).lower()))
    examples = {w for shot in job["shots"] for said in shot[::2] for w in WORD.findall(said.lower()) if len(w) > 3}
    return not (examples - asked - COMMON).isdisjoint(WORD.findall(text.lower())) or bool(EXAMPLE_NAMES.search(text))
