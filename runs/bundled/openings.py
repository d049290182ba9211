"""First words of texts of many kinds, for the teacher to go on from: tales, letters, news, essays, lectures, reports."""

from __future__ import annotations

import random

from words import FEELINGS, HOBBIES, JOBS, NAMES, NATURE, PLACES, SCIENCE, STORY_THINGS, SUBJECTS

OPENINGS = """CHAPTER {n}.\\n\\n|CHAPTER I.\\n\\nThe family of {N} had been settled in the county for many years, and|It was a cold evening in
November when|My dear {n1},\\n\\nI have received your letter, and|"I cannot believe it," said Mr. {N},|"Pray tell me," said Mrs. {N}, "what|The old
house stood at the end of the road, and|She had been {feeling} ever since|He was a gentleman of|The carriage stopped before|Of all the people in {place},|
There was a silence in the room.|When {n1} was a child,|The {job} looked up from his work and|In the year 18{d}{d2},|The captain stood upon the deck, and|
No one in the village knew|I was born in|The letter lay on the table.|Upon the whole,|At length the {job} arrived, and|It is generally agreed that|
Miss {N} had not expected|Sir {n1} {N}, of|"My dear sir," cried the {job}, "|The next morning, before breakfast,|To the reader.\\n\\n|The rain had
fallen all night, and|They walked in silence through {place}.|I remember very well the day when|His mother was a woman of|After dinner, the ladies|
Dear {n1},\\n\\n|From: {n1}\\nSubject:|{place2} - |By {n1} {N}\\n\\n|The city council voted on {day} to|Scientists have discovered|A new study shows that|The
president said on {day} that|Introduction\\n\\n|Abstract. We study|Lecture {n}: {science}\\n\\n|The history of {subject} begins|What is {science}?\\n\\n|In this
article, we will look at {hobby} and|Review: |The most important thing about {hobby} is|How to get started with {hobby}\\n\\n|Question: |Q: |Once upon a time|
{n1} {N} (born 19{d}{d2}) is|The Battle of|{place2} is a town in|The {nature} is|In biology,|In mathematics,|In economics,|In law,|The Roman|During the war,|
According to the {job},|Once there was a {job} who|{n1} found {thing}.|One day, {n1} and {n2}|The film tells the story of|Act I. Scene I.\\n\\n|O {nature},|The
following is a list of|# {subject}\\n\\n|## How|Step 1:|Ingredients:\\n|def |import |#include <|SELECT |Dear Editor,\\n\\n|Ladies and gentlemen,|My
fellow citizens,|It has been said that|Nothing is so|Among the|We hold|The purpose of this report is|In conclusion,|However,|The|A|I|It|In|When|If|As|This|"|He|
She|They|We|There|But|For|On|At|After|My|What|How|Many|Some|People"""
STARTS = [" ".join(x.split()).replace("\\n", "\n") for x in OPENINGS.split("|")]
FAMILIES = """Harrow|Bellamy|Thornton|Ashby|Weller|Marsh|Holloway|Pembroke|Carter|Lindley|Grey|Whitaker|Fenn|Osborne|Lockhart|Vance|
Merrill|Dale|Hargrave|Norwood""".replace("\n", "").split("|")
TOWNS = """Millbrook|Eastport|Kingsford|Northfield|Ravenna|Salem|Lyon|Bergen|Oaxaca|Nairobi|Hobart|Leeds""".replace(
    "\n", ""
).split("|")
WEEK = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]


def opening(rng: random.Random) -> str:
    first, second = rng.sample(NAMES, 2)
    return rng.choice(STARTS).format(
        n=rng.randint(1, 30), N=rng.choice(FAMILIES), n1=first, n2=second, place=rng.choice(PLACES), place2=rng.choice(TOWNS),
        d=rng.randint(0, 9), d2=rng.randint(0, 9), day=rng.choice(WEEK), job=rng.choice(JOBS), feeling=rng.choice(FEELINGS),
        hobby=rng.choice(HOBBIES), science=rng.choice(SCIENCE), subject=rng.choice(SUBJECTS), nature=rng.choice(NATURE),
        thing=rng.choice(STORY_THINGS),
    )  # fmt: skip
