"""Examples of the longer kinds: plans before an answer, short stories, paragraphs."""

from __future__ import annotations

PLANS = [
    [
        "What is a bridge?",
        (
            "The user wants to know what a bridge is. I should say what it is for and what it is made of, in one or "
            "two easy sentences."
        ),
    ],
    [
        "My sister never listens to me. What should I do?",
        (
            "The user has a problem with a sister who does not listen. I should be kind, suggest a calm talk, and "
            "remind the user to listen too."
        ),
    ],
    [
        "Why do cars need fuel?",
        (
            "The user asks why cars need fuel. I should say that the engine burns it to get energy, and what happens "
            "without it."
        ),
    ],
    [
        "How do I wrap a gift?",
        (
            "The user wants to wrap a gift. I should give the steps in order: the paper, the folding, the tape, and "
            "a ribbon."
        ),
    ],
    [
        "Tell me a short story about a pencil.",
        (
            "The user wants a short story about a pencil. I should give it a small problem, someone who helps, and a "
            "happy ending."
        ),
    ],
]
STORY_SHOTS = [
    [
        "Write a short story for small children. Use easy words.",
        (
            'Once upon a time, there was a little girl named June. She found an old key in the grass. "Whose key is '
            'this?" she asked. She went to every house on her street. At the last house, old Mr. Brown smiled and '
            'said, "That is my key! Thank you, June." He opened the door and gave her a warm cookie. June was glad '
            "that she had helped."
        ),
    ],
    [
        "Write a short story for small children. Use easy words.",
        (
            'One day, a small turtle wanted to see the sea. The way was long, and he was slow. "You will never get '
            'there," said the hare. But the turtle walked a little every day. He slept under leaves and drank from '
            'puddles. After many days, he heard the waves. The sea was big and blue. "I did it!" said the turtle, '
            "and he swam all afternoon."
        ),
    ],
    [
        "Write a short story for small children. Use easy words.",
        (
            "It was raining, and Theo could not go out to play. He felt bored. Then his grandmother took out a big "
            'box. "Let us build a ship," she said. They used tape, paper and two spoons. Theo was the captain, and '
            "grandma was the cook. They sailed all over the living room. When the sun came out, Theo did not even "
            "notice."
        ),
    ],
]
PARAGRAPH_SHOTS = [
    [
        "Write a short, simple paragraph about bridges.",
        (
            "Bridges help people cross rivers, valleys and roads. The first bridges were fallen trees and flat "
            "stones. Later, people learned to build them with bricks, iron and steel. Today some bridges are so long "
            "that you cannot see the other end. Every day, millions of people cross a bridge without even thinking "
            "about it."
        ),
    ],
    [
        "Write a short, simple paragraph about a day at the market.",
        (
            "On Saturday morning, the market is full of people. Farmers bring fresh vegetables, eggs and flowers. "
            "The air smells of bread and coffee. Children look at the colorful fruit while their parents talk about "
            "prices. By noon most of the tables are empty, and everyone goes home with heavy bags."
        ),
    ],
]
