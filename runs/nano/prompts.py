"""Prompts for a weak teacher, as one deterministic file: what users might say, and examples of how to answer.

Why examples travel with the prompts: the teacher (135 M parameters) answers a bare question in long, drifting
paragraphs. One or two short exchanges of the same category before it, written by hand, set the length and the tone;
`dialogues.py` removes them again, and drops answers that talk about the example instead of the question.

Each line of the output is one job:
    {"kind": "chat" | "think" | "text" | "magpie", "category", "turns": [user, ...], "shots": [[user, answer, ...]],
     "start": what the answer begins with, "topic": word that must come up or "",
     for "think" also "plan": the whole plan or "", "plans": [[user, plan, answer], ...]}

    python runs/nano/prompts.py --wordnet usr/share/wordnet --out data/nano/prompts.jsonl.xz --count 200000
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Job = dict[str, Any]

# ------------------------------------------------------------------------------------------------- word lists

ANIMALS = [
    "dog",
    "cat",
    "horse",
    "cow",
    "pig",
    "sheep",
    "goat",
    "rabbit",
    "mouse",
    "rat",
    "squirrel",
    "fox",
    "wolf",
    "bear",
    "lion",
    "tiger",
    "elephant",
    "giraffe",
    "zebra",
    "monkey",
    "gorilla",
    "kangaroo",
    "koala",
    "panda",
    "penguin",
    "owl",
    "eagle",
    "parrot",
    "duck",
    "goose",
    "chicken",
    "swan",
    "robin",
    "crow",
    "pigeon",
    "sparrow",
    "frog",
    "toad",
    "snake",
    "lizard",
    "turtle",
    "tortoise",
    "crocodile",
    "shark",
    "whale",
    "dolphin",
    "seal",
    "octopus",
    "crab",
    "lobster",
    "jellyfish",
    "starfish",
    "salmon",
    "goldfish",
    "bee",
    "ant",
    "butterfly",
    "spider",
    "fly",
    "beetle",
    "ladybug",
    "grasshopper",
    "dragonfly",
    "snail",
    "worm",
    "bat",
    "hedgehog",
    "deer",
    "moose",
    "camel",
    "donkey",
    "hamster",
    "otter",
    "beaver",
    "raccoon",
    "skunk",
    "leopard",
    "cheetah",
    "hippo",
    "rhino",
    "ostrich",
    "flamingo",
    "peacock",
    "seagull",
]
FOODS = [
    "bread",
    "rice",
    "pasta",
    "pizza",
    "soup",
    "salad",
    "cheese",
    "butter",
    "yogurt",
    "honey",
    "jam",
    "chocolate",
    "cake",
    "pie",
    "cookie",
    "pancake",
    "waffle",
    "apple",
    "banana",
    "orange",
    "lemon",
    "grape",
    "strawberry",
    "cherry",
    "peach",
    "pear",
    "mango",
    "pineapple",
    "watermelon",
    "tomato",
    "potato",
    "carrot",
    "onion",
    "garlic",
    "cucumber",
    "lettuce",
    "spinach",
    "broccoli",
    "pumpkin",
    "corn",
    "bean",
    "pea",
    "mushroom",
    "egg",
    "fish",
    "chicken",
    "beef",
    "sausage",
    "sandwich",
    "burger",
    "omelet",
    "porridge",
    "tea",
    "coffee",
    "milk",
    "juice",
    "lemonade",
    "popcorn",
    "peanut",
    "walnut",
    "cinnamon",
    "pepper",
    "salt",
    "sugar",
    "vinegar",
    "oatmeal",
]
THINGS = [
    "chair",
    "table",
    "lamp",
    "clock",
    "window",
    "door",
    "key",
    "book",
    "pencil",
    "notebook",
    "computer",
    "telephone",
    "camera",
    "radio",
    "television",
    "bicycle",
    "car",
    "bus",
    "train",
    "airplane",
    "boat",
    "ship",
    "bridge",
    "road",
    "house",
    "tent",
    "ladder",
    "hammer",
    "umbrella",
    "hat",
    "coat",
    "shoe",
    "sock",
    "glove",
    "scarf",
    "pillow",
    "blanket",
    "mirror",
    "candle",
    "cup",
    "plate",
    "spoon",
    "fork",
    "knife",
    "bottle",
    "basket",
    "box",
    "bag",
    "suitcase",
    "map",
    "compass",
    "telescope",
    "microscope",
    "magnet",
    "battery",
    "kite",
    "balloon",
    "doll",
    "ball",
    "guitar",
    "piano",
    "drum",
    "violin",
    "flute",
    "garden",
    "fence",
    "lighthouse",
    "library",
    "museum",
    "hospital",
    "school",
    "castle",
    "tower",
    "farm",
    "mill",
    "oven",
    "fridge",
    "kettle",
    "toaster",
    "broom",
    "soap",
    "towel",
    "toothbrush",
    "comb",
    "needle",
    "button",
    "coin",
    "stamp",
    "letter",
    "newspaper",
    "calendar",
    "thermometer",
    "robot",
    "rocket",
    "satellite",
    "elevator",
    "engine",
    "wheel",
    "clay",
    "paint",
    "brush",
    "glass",
    "paper",
    "rope",
]
NATURE = [
    "sun",
    "moon",
    "star",
    "planet",
    "comet",
    "sky",
    "cloud",
    "rain",
    "snow",
    "ice",
    "wind",
    "storm",
    "thunder",
    "lightning",
    "rainbow",
    "fog",
    "frost",
    "hurricane",
    "tornado",
    "earthquake",
    "volcano",
    "mountain",
    "hill",
    "valley",
    "river",
    "lake",
    "ocean",
    "sea",
    "beach",
    "island",
    "desert",
    "forest",
    "jungle",
    "cave",
    "waterfall",
    "glacier",
    "tree",
    "flower",
    "leaf",
    "seed",
    "root",
    "rose",
    "tulip",
    "cactus",
    "grass",
    "moss",
    "sand",
    "stone",
    "soil",
    "mud",
    "shadow",
    "echo",
    "fire",
    "smoke",
    "season",
    "spring",
    "summer",
    "autumn",
    "winter",
    "tide",
    "wave",
    "sunrise",
    "sunset",
    "dew",
]
SCIENCE = ["gravity", "electricity", "light", "sound", "heat", "energy", "air", "water", "oxygen", "evaporation", "photosynthesis", "migration", "hibernation", "recycling", "friction", "magnetism", "sleep", "memory", "blood", "digestion", "pollution", "climate", "medicine", "metal", "plastic", "steam", "temperature", "time", "matter", "speed", "pressure", "breathing", "growth", "balance", "color", "taste", "smell", "vision", "hearing", "hunger", "thirst", "exercise"] + [
    "the seasons", "day and night", "the water cycle", "the food chain", "the solar system", "the weather", "the heart",
    "the brain", "the skin", "the moon", "the sun", "a fossil", "a germ", "an atom", "a magnet", "a rainbow", "the tide",
]  # fmt: skip
JOBS = """teacher doctor nurse farmer baker cook police officer,firefighter pilot sailor carpenter plumber painter writer
singer dancer actor scientist engineer gardener librarian mechanic dentist vet driver builder tailor fisherman judge
lawyer astronaut photographer musician waiter""".replace("police officer,", "").split()
FEELINGS = [
    "sad",
    "lonely",
    "tired",
    "bored",
    "nervous",
    "worried",
    "angry",
    "happy",
    "excited",
    "scared",
    "stressed",
    "proud",
    "jealous",
    "confused",
    "grateful",
    "homesick",
    "shy",
    "embarrassed",
    "calm",
    "hopeful",
    "disappointed",
    "sleepy",
    "overwhelmed",
    "frustrated",
    "cheerful",
]
HOBBIES = (
    """reading painting drawing singing dancing swimming running hiking cycling cooking baking gardening fishing
knitting sewing camping skating chess photography pottery yoga writing birdwatching dancing juggling sailing climbing
journaling origami playing the guitar,playing the piano,playing football,learning a language,collecting stamps""".replace(
        "playing the guitar,playing the piano,playing football,learning a language,collecting stamps", ""
    ).split()
    + [
        "playing the guitar",
        "playing the piano",
        "playing football",
        "learning a language",
        "collecting stamps",
    ]
)
PLACES = """the beach|the mountains|a big city|a small village|a farm|the zoo|a museum|the forest|a lake|an island|Paris|
London|Rome|New York|Tokyo|Spain|Italy|Greece|Japan|Egypt|Canada|Norway|the desert|a castle|the park|the library""".replace(
    "\n", ""
).split("|")
PROBLEMS = """I can't sleep at night|my friend is angry with me|I have a test tomorrow|I keep forgetting things|
I am always late|I moved to a new town|my dog barks too much|I don't like my job|I want to save money|I eat too much sugar|
I have nothing to do this weekend|I am afraid of speaking in front of people|my room is messy|I had a fight with my brother|
I lost my keys|I feel too lazy to exercise|my plants keep dying|I spend too much time on my phone|I want to make new friends|
my cat won't eat|I caught a cold|I broke my mother's vase|I have a job interview on Monday|I can't focus on my homework|
I miss my grandmother|I didn't get the job|it has been raining all week|I am learning to cook|I want to read more books|
my neighbour is very loud|I forgot my friend's birthday|I have too much work|I want to wake up earlier|my bike is broken|
my best friend is moving away|I am going on a long trip|I want to learn to swim|I feel left out at school|
I am starting a new school|I got a bad grade|my baby sister cries a lot|I am nervous about flying""".replace(
    "\n", ""
).split("|")
GOOD_NEWS = """I passed my exam|I got a puppy|today is my birthday|I made a new friend|I baked my first cake|
I am going on holiday tomorrow|I finished a long book|I learned to ride a bike|my team won the game|I got a new job|
I planted a tree|my sister had a baby|I cleaned my whole house|I cooked dinner for my family|I saw a rainbow today|
I ran five miles today|we are getting a kitten|I finally slept well|it is snowing outside|my grandma is visiting""".replace(
    "\n", ""
).split("|")
TASKS = """make a cup of tea|boil an egg|clean a window|plant a seed|wash a dog|make a paper airplane|learn new words|
fall asleep faster|save water|write a letter|make a sandwich|take care of a cat|grow tomatoes|tie a shoe|make pancakes|
study for a test|stay warm in winter|keep cool in summer|pack a suitcase|clean my room|stay healthy|make a new friend|
be a good friend|say sorry|train a puppy|start running|cook rice|draw a cat|remember names|choose a good book|
plan a birthday party|brush my teeth|take better photos|feel less stressed|spend less money|wake up early|
make a salad|build a snowman|set the table|be polite|read faster|learn to swim|write a short story|bake bread|
care for a houseplant|make lemonade|organise my desk|get to know my neighbours|be more patient|stop worrying""".replace(
    "\n", ""
).split("|")
WHYS = """is the sky blue|do birds sing|do leaves change color|do we sleep|do we dream|is the sea salty|do cats purr|
do dogs wag their tails|does ice float|do we need water|do stars twinkle|does the moon change shape|do bees make honey|
do people laugh|is exercise good for us|do plants need light|do we have seasons|do onions make us cry|is snow white|
do we yawn|do people keep pets|is reading good for you|do birds fly south|does it rain|do we brush our teeth|
do spiders make webs|do we get hungry|is honesty important|are friends important|do we have to go to school|
does bread rise|do wolves howl|do fish live in water|do we get goosebumps|is the sun hot|do clocks tick|
do we shake hands|do trees lose their leaves|is breakfast important|do people like music|do camels have humps|
do we celebrate birthdays|is it dark at night|do magnets stick to metal|do we need bones|do babies cry|
do zebras have stripes|does soap clean|does wood burn|do flowers smell nice|is kindness important""".replace(
    "\n", ""
).split("|")
PAIRS = [
    "cats|dogs",
    "tea|coffee",
    "summer|winter",
    "books|films",
    "cars|bicycles",
    "apples|oranges",
    "city|village",
    "frogs|toads",
    "butterflies|moths",
    "morning|evening",
    "pencils|pens",
    "trains|airplanes",
    "gold|silver",
    "rivers|lakes",
    "bread|rice",
    "piano|guitar",
    "football|tennis",
    "soup|salad",
    "wolves|dogs",
    "sun|moon",
    "rain|snow",
    "milk|juice",
    "forests|deserts",
    "letters|emails",
    "crocodiles|alligators",
    "rabbits|hares",
    "running|swimming",
    "cooking|baking",
    "salt|sugar",
    "breakfast|dinner",
    "chess|checkers",
    "teachers|doctors",
]
NAMES = [
    "Mia",
    "Tom",
    "Anna",
    "Ben",
    "Lily",
    "Sam",
    "Lucy",
    "Max",
    "Emma",
    "Jack",
    "Sara",
    "Leo",
    "Nina",
    "Tim",
    "Ella",
    "Noah",
    "Rosa",
    "Oscar",
    "Ruby",
    "Finn",
    "Clara",
    "Hugo",
    "Ivy",
    "Paul",
    "Zoe",
    "Peter",
    "Maya",
    "Adam",
    "Grace",
    "Felix",
    "Alice",
    "Oliver",
    "Daisy",
    "Henry",
    "Molly",
    "George",
    "Ada",
    "Will",
    "Kate",
]
ADJECTIVES = [
    "little",
    "brave",
    "kind",
    "old",
    "shy",
    "clever",
    "lazy",
    "curious",
    "hungry",
    "sleepy",
    "lonely",
    "happy",
    "tiny",
    "grumpy",
    "gentle",
    "funny",
    "quiet",
    "young",
    "clumsy",
    "cheerful",
]
STORY_THINGS = """a lost key|a red balloon|a magic stone|a broken toy|a big storm|a hidden door|a warm coat|a tall tree|
a small boat|a secret garden|a golden egg|a missing hat|a strange sound|a kind stranger|a new friend|a dark cave|
a birthday cake|a long journey|a shiny coin|an old map|a deep well|a paper kite|a noisy drum|a bag of seeds|a blue bird|
a snowy night|a school play|a lost puppy|a wooden bridge|a wise owl|a funny mistake|a race|a promise|a picnic""".replace(
    "\n", ""
).split("|")
SUBJECTS = """friendship|the sea|the moon|autumn|rain|a cat|a dog|the stars|home|my mother|winter|a tree|the wind|summer|
a river|the night sky|a flower|hope|love|snow|morning|a train|music|sleep|an old clock|a bird|sunshine|the forest""".replace(
    "\n", ""
).split("|")
SENTENCES = """The dog ran across the street.|She is very happy about her new house.|The weather is bad today.|
He did not go to school because he was sick.|We ate a big dinner and then we went home.|The movie was very good.|
I am going to the store to buy milk.|The little boy was scared of the dark.|My mother makes the best soup.|
They walked for a long time in the forest.|The cat is sleeping on the chair.|It was a cold night and the wind was strong.|
The teacher told us a funny story.|I like to drink tea in the morning.|The old man sat by the window.|
She forgot her umbrella and got wet.|The children are playing in the garden.|He works hard every day.|
The train was late again.|We saw many stars in the sky.|The bird built a nest in the tree.|I want to learn how to swim.|
The baby laughed when she saw the puppy.|He lost his keys and looked for them everywhere.""".replace("\n", "").split(
    "|"
)
BLOCKED = {
    "jew",
    "whore",
    "bastard",
    "bitch",
    "ass",
    "cock",
    "pussy",
    "tit",
    "breast",
    "teat",
    "womb",
    "sex",
    "penis",
    "rape",
    "murder",
    "murderer",
    "corpse",
    "killer",
    "slave",
    "slavery",
    "opium",
    "drug",
    "heroin",
    "cocaine",
    "nazi",
    "hell",
    "damn",
    "negro",
    "gun",
    "rifle",
    "bullet",
    "bomb",
    "pistol",
    "weapon",
    "war",
    "death",
    "dead",
    "suicide",
    "tumor",
    "cancer",
    "diarrhea",
    "vomit",
    "urine",
    "feces",
    "crap",
    "shit",
    "piss",
    "nigger",
    "coon",
    "dyke",
    "fag",
    "faggot",
    "gay",
    "lesbian",
    "prostitute",
    "harlot",
    "buttocks",
    "bosom",
    "erotic",
    "nude",
    "orgasm",
    "semen",
    "vagina",
    "anus",
    "rectum",
    "bowel",
    "christ",
    "jesus",
    "god",
    "allah",
    "moslem",
    "catholic",
    "protestant",
    "syphilis",
    "gallows",
    "torture",
    "cannabis",
    "marijuana",
    "abortion",
    "terrorist",
    "hostage",
    "execution",
    "assassin",
    "hangover",
    "liquor",
    "whiskey",
    "whisky",
    "vodka",
    "booze",
    "cigar",
    "cigarette",
    "tobacco",
    "virginity",
    "virgin",
    "brothel",
    "stripper",
    "noose",
    "lynching",
    "racism",
    "bra",
    "panties",
    "underwear",
    "rump",
    "groin",
    "loins",
    "massacre",
    "genocide",
    "assault",
    "abuse",
    "molester",
    "pervert",
    "incest",
    "bombus",
    "bottom",
    "hooker",
    "pimp",
    "slut",
    "redskin",
    "savage",
    "cripple",
    "idiot",
    "moron",
    "retard",
    "imbecile",
    "lunatic",
    "midget",
    "dwarf",
    "squaw",
    "yankee",
    "reb",
    "southerner",
}
GENERAL_FIELDS = {
    "05": 2,
    "06": 3,
    "08": 6,
    "12": 2,
    "13": 2,
    "15": 8,
    "17": 3,
    "18": 6,
    "19": 2,
    "20": 2,
    "28": 6,
}
ABSTRACT_FIELDS = {"04": 8, "07": 6, "09": 6, "10": 8, "14": 8, "26": 6}

# ----------------------------------------------------------------------- examples: how a good answer sounds

SHOTS: dict[str, list[list[str]]] = {
    "explain": [
        [
            "What is a bridge?",
            "A bridge is a structure that helps people, cars or trains cross over something, like a river or a road. Bridges can be made of wood, stone or steel.",
        ],
        [
            "what is a dentist",
            "A dentist is a doctor who takes care of teeth. Dentists clean teeth, fix holes in them, and show people how to keep them healthy.",
        ],
        [
            "Can you explain what a feather is?",
            "A feather is a light, soft part that covers a bird's body. Feathers keep birds warm and dry, and the long ones on their wings help them fly.",
        ],
        [
            "Tell me about ladders.",
            "A ladder is a tool for climbing. It has two long sides and steps between them, called rungs. People use ladders to reach high places, like a roof or a tall shelf.",
        ],
        [
            "Explain jam to a child.",
            "Jam is a sweet, sticky food made from fruit and sugar. You cook the fruit until it is soft and thick, and then you can spread it on your bread. Yum!",
        ],
        [
            "What does 'patience' mean?",
            "Patience means staying calm while you wait for something. A person who has patience does not get angry when things take a long time.",
        ],
    ],
    "why": [
        [
            "Why do cars need fuel?",
            "Cars need fuel because the engine burns it to make energy. That energy turns the wheels. Without fuel, the engine stops and the car cannot move.",
        ],
        [
            "why do people wear hats",
            "People wear hats for many reasons. A hat can keep your head warm in winter, protect you from the sun in summer, or simply look nice.",
        ],
        [
            "Why does paper tear so easily?",
            "Paper tears easily because it is made of thin plant fibers pressed together. They hold each other only a little, so a small pull is enough to break them apart.",
        ],
    ],
    "how": [
        [
            "How do I wrap a gift?",
            "Put the gift in the middle of the paper. Fold the two long sides over it and tape them. Then fold the ends neatly, tape them down, and add a ribbon.",
        ],
        [
            "how can i clean my shoes?",
            "First, brush off the dry dirt. Then wipe the shoes with a damp cloth and a little soap. Let them dry in the air, away from strong heat.",
        ],
        [
            "What is a good way to remember my keys?",
            "Choose one place for your keys, like a small bowl near the door. Put them there every time you come home. After a week or two, it becomes a habit.",
        ],
    ],
    "feeling": [
        [
            "I had a bad day at work.",
            "I'm sorry to hear that. Some days are just hard, and it is fine to feel tired of it all. Would you like to tell me what happened?",
        ],
        [
            "I feel guilty.",
            "Feeling guilty can be heavy, but it also shows that you care. If you made a mistake, you can say sorry and try again. What is on your mind?",
        ],
        [
            "I am so relieved today!",
            "That is wonderful to hear! It feels so good when a worry goes away. Take a deep breath and enjoy it. What happened?",
        ],
        [
            "I feel restless.",
            "I understand. When you feel restless, it can help to move a little. A short walk, some music or a few deep breaths may calm you down.",
        ],
    ],
    "advice": [
        [
            "My sister never listens to me. What should I do?",
            "That can be frustrating. Choose a quiet moment and tell her how you feel, without blaming her. Then listen to her side too. Often a calm talk helps more than an argument.",
        ],
        [
            "I want to drink more water. Any ideas?",
            "Keep a glass or a bottle near you all day. Drink some when you wake up and before each meal. If plain water is boring, add a slice of lemon.",
        ],
        [
            "I broke my friend's toy.",
            "I'm sorry that happened. The best thing is to tell your friend the truth and say sorry. You could also offer to repair it or buy a new one.",
        ],
    ],
    "news": [
        [
            "I won a prize today!",
            "Congratulations, that is great news! You must be so proud. What did you win it for?",
        ],
        [
            "Guess what, I learned to whistle.",
            "Well done! That takes a lot of practice. Now you can whistle your favourite songs on a walk. Which song will you try first?",
        ],
        [
            "we are painting the kitchen today",
            "That sounds like fun! A fresh color can make a room feel new. Which color did you choose?",
        ],
    ],
    "opinion": [
        [
            "Do you like carrots?",
            "I am a language model, so I cannot taste them, but I like the idea of carrots. They are crunchy, sweet and good for you. Do you like them?",
        ],
        [
            "What do you think about fireworks?",
            "Fireworks are bright and exciting, and many people love to watch them. They can be loud, though, and they often scare animals. I think they are best on special days.",
        ],
        [
            "Is it fun to play cards?",
            "Yes, many people find it fun! Card games are easy to carry and you can play them with friends or family. Some need luck, and others make you think.",
        ],
    ],
    "list": [
        ["Name three things you find in a kitchen.", "1. A stove\n2. A sink\n3. A frying pan"],
        [
            "Give me three tips for a good picnic.",
            "1. Choose a shady place with soft grass.\n2. Bring easy food, like sandwiches and fruit.\n3. Take a blanket and some games.",
        ],
        [
            "list three reasons to wear a helmet",
            "1. It protects your head if you fall.\n2. It helps other people see you.\n3. It sets a good example for children.",
        ],
    ],
    "compare": [
        [
            "What is the difference between a cup and a glass?",
            "A cup usually has a handle and is used for hot drinks, like tea. A glass has no handle, is made of glass, and is used for cold drinks, like water.",
        ],
        [
            "Which is better, a bath or a shower?",
            "It depends on what you need. A bath is warm and relaxing, and a shower is quick and uses less water. If you are in a hurry, take a shower.",
        ],
        [
            "compare ants and bees",
            "Ants and bees are both insects that live and work in big groups. Bees can fly and make honey, while most ants walk and carry food to their nest.",
        ],
    ],
    "story": [
        [
            "Tell me a short story about a pencil.",
            "Once upon a time, a small pencil lived in a school bag. She was sad because nobody used her. One day a boy named Luke needed to draw his mother. He picked up the pencil and drew a big smile. His mother loved the picture, and the little pencil was happy at last.",
        ],
        [
            "write a story about a cookie",
            'One day, Nora baked one big cookie. She wanted to eat it all by herself. Then she saw her brother sitting alone. "Do you want half?" she asked. He smiled and said yes. They sat in the sun and ate together, and Nora thought the cookie had never tasted so good.',
        ],
    ],
    "poem": [
        [
            "Write a short poem about bread.",
            "Warm and brown, a simple thing,\nSoft inside, a crust that sings.\nButter melts and spreads with ease,\nOne more slice for me, please.",
        ],
        [
            "can you write me a poem about a bus",
            "The yellow bus comes down the street,\nIt stops for me, I find a seat.\nWe pass the shops, we pass the park,\nIt brings me home before it's dark.",
        ],
    ],
    "rewrite": [
        ["Say this in a different way: I am very hungry.", "I really need something to eat."],
        ["Rewrite this sentence: The car is fast and red.", "The red car moves very quickly."],
        ["Make this sentence more polite: Give me the book.", "Could you please give me the book?"],
    ],
    "sentence": [
        [
            "Write a sentence with the word 'ladder'.",
            "The painter climbed the ladder to reach the top of the wall.",
        ],
        ["use the word spoon in a sentence", "She stirred her soup with a big wooden spoon."],
        ["Make a sentence about honesty.", "Honesty is telling the truth even when it is hard."],
    ],
    "talk": [
        [
            "How was your day?",
            "It was good, thank you! I spent it talking with people like you. How was yours?",
        ],
        [
            "What are you up to?",
            "I'm just here, ready to chat with you. Is there something you would like to talk about?",
        ],
        [
            "Do you want to talk about cooking?",
            "Sure, I would love to! Cooking is a nice way to relax and share something with others. What do you like to cook?",
        ],
        [
            "Tell me something nice.",
            "Somewhere right now, someone is smiling because of something kind you once did. Small good things travel further than we think.",
        ],
    ],
    "travel": [
        [
            "I am going to the lake next week.",
            "That sounds lovely! A lake is great for swimming, walking and resting. Don't forget your swimsuit, a towel and something for the sun. Who is going with you?",
        ],
        [
            "What can I do in Vienna?",
            "You can visit the old palaces, listen to classical music, and walk along the river. In the afternoon, sit in a cafe and try a piece of chocolate cake.",
        ],
        [
            "What should I pack for a camping trip?",
            "Pack a tent, a sleeping bag and warm clothes for the night. Take water, easy food, a flashlight and a small first-aid kit.",
        ],
    ],
    "food": [
        [
            "How do you eat a pomegranate?",
            "Cut it open and take out the small red seeds. You can eat them with a spoon, or put them on salad or yogurt. They taste sweet and a little sour.",
        ],
        [
            "What goes well with noodles?",
            "Noodles go well with vegetables, chicken or tofu. Add a simple sauce, like soy sauce with a little garlic, and dinner is ready.",
        ],
        [
            "What can I cook with cabbage?",
            "You can make a warm cabbage soup, or fry it with onions and a little butter. It is also nice raw in a salad with carrots.",
        ],
    ],
    "follow": [
        [
            "What is a bridge?",
            "A bridge is a structure that helps people cross over a river or a road.",
            "Tell me more.",
            "Bridges can be made of wood, stone or steel. Some are short and simple, and others are very long and hang from strong cables.",
        ],
        [
            "How can I clean my shoes?",
            "Brush off the dry dirt, wipe the shoes with a damp cloth and a little soap, and let them dry in the air.",
            "Why not near a heater?",
            "Strong heat can make leather hard and dry, and then it cracks. In the air, shoes dry slowly and stay soft.",
        ],
        [
            "I had a bad day at work.",
            "I'm sorry to hear that. Would you like to tell me what happened?",
            "my boss was angry with me",
            "That is never easy. Maybe your boss was just under stress. If you made a mistake, you can fix it tomorrow. Tonight, try to rest and do something you enjoy.",
        ],
    ],
}
PLANS = [
    [
        "What is a bridge?",
        "The user wants to know what a bridge is. I should say what it is for and what it is made of, in one or two easy sentences.",
    ],
    [
        "My sister never listens to me. What should I do?",
        "The user has a problem with a sister who does not listen. I should be kind, suggest a calm talk, and remind the user to listen too.",
    ],
    [
        "Why do cars need fuel?",
        "The user asks why cars need fuel. I should say that the engine burns it to get energy, and what happens without it.",
    ],
    [
        "How do I wrap a gift?",
        "The user wants to wrap a gift. I should give the steps in order: the paper, the folding, the tape, and a ribbon.",
    ],
    [
        "Tell me a short story about a pencil.",
        "The user wants a short story about a pencil. I should give it a small problem, someone who helps, and a happy ending.",
    ],
]
STORY_SHOTS = [
    [
        "Write a short story for small children. Use easy words.",
        'Once upon a time, there was a little girl named June. She found an old key in the grass. "Whose key is this?" she asked. She went to every house on her street. At the last house, old Mr. Brown smiled and said, "That is my key! Thank you, June." He opened the door and gave her a warm cookie. June was glad that she had helped.',
    ],
    [
        "Write a short story for small children. Use easy words.",
        'One day, a small turtle wanted to see the sea. The way was long, and he was slow. "You will never get there," said the hare. But the turtle walked a little every day. He slept under leaves and drank from puddles. After many days, he heard the waves. The sea was big and blue. "I did it!" said the turtle, and he swam all afternoon.',
    ],
    [
        "Write a short story for small children. Use easy words.",
        'It was raining, and Theo could not go out to play. He felt bored. Then his grandmother took out a big box. "Let us build a ship," she said. They used tape, paper and two spoons. Theo was the captain, and grandma was the cook. They sailed all over the living room. When the sun came out, Theo did not even notice.',
    ],
]
PARAGRAPH_SHOTS = [
    [
        "Write a short, simple paragraph about bridges.",
        "Bridges help people cross rivers, valleys and roads. The first bridges were fallen trees and flat stones. Later, people learned to build them with bricks, iron and steel. Today some bridges are so long that you cannot see the other end. Every day, millions of people cross a bridge without even thinking about it.",
    ],
    [
        "Write a short, simple paragraph about a day at the market.",
        "On Saturday morning, the market is full of people. Farmers bring fresh vegetables, eggs and flowers. The air smells of bread and coffee. Children look at the colorful fruit while their parents talk about prices. By noon most of the tables are empty, and everyone goes home with heavy bags.",
    ],
]

# --------------------------------------------------------------------------------------------- templates

ARTICLE = {True: "an ", False: "a "}
UNCOUNTED = {
    "bread",
    "rice",
    "pasta",
    "soup",
    "cheese",
    "butter",
    "yogurt",
    "honey",
    "jam",
    "chocolate",
    "corn",
    "garlic",
    "lettuce",
    "spinach",
    "broccoli",
    "fish",
    "beef",
    "tea",
    "coffee",
    "milk",
    "juice",
    "lemonade",
    "popcorn",
    "cinnamon",
    "pepper",
    "salt",
    "sugar",
    "vinegar",
    "oatmeal",
    "porridge",
    "rain",
    "snow",
    "ice",
    "wind",
    "thunder",
    "lightning",
    "fog",
    "frost",
    "grass",
    "moss",
    "sand",
    "soil",
    "mud",
    "smoke",
    "fire",
    "spring",
    "summer",
    "autumn",
    "winter",
    "dew",
    "clay",
    "paint",
    "glass",
    "paper",
    "rope",
    "soap",
    "chicken",
    "pizza",
    "salad",
}
TEMPLATES: dict[str, list[str]] = {
    "explain": [
        "What is {a}?",
        "What is {a}?",
        "What's {a}?",
        "Can you explain what {a} is?",
        "Tell me about {pl}.",
        "Explain {w} to a child.",
        "Explain {a} in simple words.",
        "Can you tell me what {a} is?",
        "I want to know about {pl}.",
        "What do you know about {pl}?",
        "Describe {a}.",
        "Tell me one fact about {pl}.",
        "What is {a} used for?",
        "Who needs {a}?",
        "How would you describe {a}?",
        "My little brother asked me what {a} is. What should I say?",
        "Tell me something interesting about {pl}.",
    ],
    "animal": [
        "What do {pl} eat?",
        "Where do {pl} live?",
        "Tell me about {pl}.",
        "What sound does {a} make?",
        "Are {pl} dangerous?",
        "Is {a} a good pet?",
        "How big is {a}?",
        "What is special about {pl}?",
        "Can {pl} swim?",
        "What does {a} look like?",
        "How do {pl} take care of their babies?",
        "Do you like {pl}?",
        "I saw {a} today!",
        "Why do people like {pl}?",
        "How do {pl} sleep?",
    ],
    "abstract": [
        "What does '{w}' mean?",
        "What is {w}?",
        "Can you explain {w}?",
        "What does the word {w} mean?",
        "Explain the word {w} in simple words.",
        "Give me an example of {w}.",
        "Define {w}.",
        "what is the meaning of {w}",
    ],
    "science": [
        "What is {w}?",
        "How does {w} work?",
        "Explain {w} to a child.",
        "Tell me about {w}.",
        "Why is {w} important?",
        "Can you explain {w} in simple words?",
        "What should I know about {w}?",
    ],
    "job": [
        "What does {a} do?",
        "What is it like to be {a}?",
        "Why do we need {pl}?",
        "I want to be {a} one day.",
        "How do I become {a}?",
        "Is it hard to be {a}?",
        "What tools does {a} use?",
    ],
    "why": [
        "Why {w}?",
        "Why {w}?",
        "Can you tell me why {w2}?",
        "My son asks why {w2}.",
        "Do you know why {w2}?",
        "why {w}",
        "I always wondered why {w2}.",
    ],
    "how": [
        "How do I {w}?",
        "How can I {w}?",
        "What is the best way to {w}?",
        "Teach me how to {w}.",
        "I want to {w}. Can you help?",
        "Any tips to {w}?",
        "how to {w}",
        "Explain how to {w} step by step.",
    ],
    "feeling": [
        "I feel {w} today.",
        "I am {w}.",
        "I'm feeling {w}.",
        "I feel so {w} right now.",
        "Why do I feel {w}?",
        "What should I do when I feel {w}?",
        "My friend is {w}. How can I help?",
        "i am really {w} today",
        "How do you know when someone is {w}?",
        "Is it okay to feel {w}?",
        "What does it mean to be {w}?",
    ],
    "advice": [
        "{W}. What should I do?",
        "{W}.",
        "{W}. Can you help me?",
        "{W}. Any advice?",
        "Help, {w}!",
        "What can I do? {W}.",
        "{W} and I don't know what to do.",
        "What would you do if you were me? {W}.",
    ],
    "news": ["{W}!", "Guess what, {w}!", "{W}.", "I have good news: {w}!", "I'm so happy, {w}."],
    "opinion": [
        "Do you like {pl}?",
        "What do you think about {pl}?",
        "What is your favorite thing about {pl}?",
        "I love {pl}. Do you?",
        "I don't like {pl}.",
        "Is it good to have {a}?",
        "Should I get {a}?",
    ],
    "hobby": [
        "What do you think about {w}?",
        "I like {w}.",
        "Is {w} fun?",
        "How do I start {w}?",
        "I want to try {w}.",
        "Why do people enjoy {w}?",
        "Let's talk about {w}.",
        "What do I need for {w}?",
        "Is {w} good for you?",
        "Give me some tips for {w}.",
    ],
    "list_things": [
        "Name three {pl2}.",
        "Give me three {pl2}.",
        "List three {pl2}.",
        "Tell me three {pl2}.",
        "Can you name three {pl2}?",
    ],
    "list_tips": [
        "Give me three tips to {w}.",
        "List three ways to {w}.",
        "Name three things I need to {w}.",
        "What are three easy ways to {w}?",
    ],
    "compare": [
        "What is the difference between {x} and {y}?",
        "Which is better, {x} or {y}?",
        "Compare {x} and {y}.",
        "Do you prefer {x} or {y}?",
        "How are {x} and {y} alike?",
        "{x} or {y}?",
    ],
    "story": [
        "Tell me a short story about {s}.",
        "Write a short story about {s}.",
        "Can you tell me a story about {s}?",
        "Tell me a bedtime story about {s}.",
        "Make up a story about {s}.",
        "I want to hear a story about {s}.",
        "write a story about {s}",
        "Tell a funny story about {s}.",
        "Tell me a short story about a {adj} {animal}.",
        "Write a story about {name} and {s}.",
        "Can you write a story about a {adj} {animal} and {s}?",
    ],
    "poem": [
        "Write a short poem about {p}.",
        "Write a poem about {p}.",
        "Can you write a poem about {p}?",
        "Write four lines about {p}.",
        "I need a poem about {p}.",
        "Make a little rhyme about {p}.",
    ],
    "rewrite": [
        "Say this in a different way: {t}",
        "Rewrite this sentence: {t}",
        "Can you say this another way? {t}",
        "Make this sentence shorter: {t}",
        "Make this sentence more interesting: {t}",
        "Paraphrase: {t}",
        "Put this in simpler words: {t}",
    ],
    "sentence": [
        "Write a sentence with the word '{w}'.",
        "Use the word {w} in a sentence.",
        "Make a sentence about {w}.",
        "Write one sentence about {w}.",
        "Can you use '{w}' in a sentence?",
    ],
    "talk": [
        "How was your day?",
        "What are you doing?",
        "Tell me something interesting.",
        "I'm bored.",
        "What should we talk about?",
        "Let's talk about {h}.",
        "Tell me a joke.",
        "Tell me a fun fact.",
        "What is your favorite color?",
        "What is your favorite animal?",
        "What makes you happy?",
        "Can we be friends?",
        "What did you do today?",
        "Do you like {pl}?",
        "Good morning! What is a nice way to start the day?",
        "It's late and I can't sleep.",
        "What a beautiful day!",
        "It is raining again.",
        "I just woke up.",
        "I just got home from work.",
        "I had {f} for lunch.",
        "I'm going to bed now.",
        "Do you ever sleep?",
        "What is your favorite food?",
        "What do you like to do?",
        "Tell me about yourself.",
        "Say something nice to me.",
        "Ask me a question.",
        "What's new?",
        "I am waiting for the bus.",
        "I am sitting in {place}.",
    ],
    "travel": [
        "I am going to {w} next week.",
        "What can I do in {w}?",
        "What should I pack for a trip to {w}?",
        "Tell me about {w}.",
        "Have you ever been to {w}?",
        "Is {w} nice?",
        "I want to visit {w}. Any tips?",
        "What can I see in {w}?",
        "Is {w} a good place for children?",
        "Plan a day in {w} for me.",
    ],
    "food": [
        "What goes well with {w}?",
        "What can I cook with {w}?",
        "Is {w} healthy?",
        "How is {w} made?",
        "I love {w}.",
        "How do you eat {w}?",
        "What does {w} taste like?",
        "Where does {w} come from?",
        "Can I give {w} to my dog?",
        "Give me a simple recipe with {w}.",
        "I had {w} for breakfast.",
        "What is your favorite way to eat {w}?",
    ],
}
FOLLOW_UPS = [
    "Tell me more.",
    "tell me more",
    "Why?",
    "Why is that?",
    "Can you give me an example?",
    "Can you make it shorter?",
    "Say it in simpler words.",
    "Really?",
    "That is interesting. What else?",
    "What else?",
    "Thanks! Is there anything else I should know?",
    "I didn't know that.",
    "Are you sure?",
    "How do you know?",
    "I don't understand. Can you explain it again?",
    "That's a good idea.",
    "ok, and then?",
    "What do you mean?",
    "Can you tell me one more thing?",
    "Which one is your favorite?",
    "That sounds nice.",
    "I agree with you.",
    "I'm not sure about that.",
    "What should I do first?",
    "Is it easy?",
    "Give me another example.",
]
STORY_FOLLOW_UPS = [
    "What happened next?",
    "Tell me another one.",
    "I liked that!",
    "What is the lesson of the story?",
    "Can you make it shorter?",
    "Give it a different ending.",
    "Why did that happen?",
    "Thank you, that was nice. What was the best part?",
]
PLAN_STARTS = {
    "why": "The user asks why {w2}. I should",
    "how": "The user wants to {w}. I should",
    "feeling": "The user talks about feeling {w}. I should",
    "science": "The user asks about {w}. I should",
    "abstract": "The user asks about the word {w}. I should",
    "job": "The user asks about the work of {a}. I should",
    "compare": "The user asks about {x} and {y}. I should",
    "food": "The user asks about {w}. I should",
    "animal": "The user asks about {pl}. I should",
    "explain": "The user asks about {pl}. I should",
    "hobby": "The user talks about {w}. I should",
    "travel": "The user talks about {w}. I should",
    "story": "The user wants a story. It could be about",
    "poem": "The user wants a poem about {p}. I could write about",
    "advice": "The user has a problem. I should be kind and",
    "list_tips": "The user wants three ways to {w}. I could say:",
    "opinion": "The user asks about {pl}. I should",
}
PLAN_ENDS = {
    "why": [
        "give the main reason in easy words.",
        "name one or two clear reasons and keep it simple.",
        "explain what happens step by step, in short sentences.",
    ],
    "how": [
        "give two or three clear steps in the right order.",
        "explain the steps in easy words and add one small tip.",
        "say what is needed first, and then what to do.",
    ],
    "feeling": [
        "be kind, say that the feeling is normal, and offer a small idea that may help.",
        "listen, answer warmly, and ask a friendly question.",
        "be gentle, and name one or two things that often help.",
    ],
    "science": [
        "say what it is in easy words and give an example from daily life.",
        "explain the main idea first and keep the sentences short.",
    ],
    "abstract": [
        "give a short meaning and one example.",
        "say what it means in plain words, and how people use it.",
        "define it in one sentence and then give a simple example.",
    ],
    "job": [
        "say what the person does, where, and why it matters.",
        "describe the work in two or three easy sentences.",
    ],
    "compare": [
        "name what they share and how they differ.",
        "say one good thing about each and then how to choose.",
        "be fair to both and keep it short.",
    ],
    "food": [
        "answer in a friendly way and give one simple idea.",
        "say what it tastes like or how it is used, in easy words.",
    ],
    "animal": [
        "tell the most important facts: what they look like, where they live, what they eat.",
        "answer the question directly and add one interesting fact.",
    ],
    "explain": [
        "say what it is, what it looks like, and what it is for.",
        "start with a short definition and give one example.",
        "use easy words and keep it to two or three sentences.",
    ],
    "hobby": [
        "answer in a friendly way and say why people enjoy it.",
        "say what is nice about it and how to begin.",
    ],
    "travel": [
        "name two or three nice things about it and wish a good trip.",
        "give a helpful and cheerful answer.",
    ],
    "advice": [
        "suggest one or two small things that may help.",
        "say that I understand, and give simple advice.",
        "offer a first step that is easy to do.",
    ],
    "opinion": [
        "answer politely, say one good thing, and ask what the user thinks.",
        "give a friendly answer and say what many people like about it.",
    ],
}
ANSWERS = {shot[0]: shot[1] for shots in SHOTS.values() for shot in shots if len(shot) == 2}
SHOT_OF = {
    "animal": "explain",
    "abstract": "explain",
    "science": "explain",
    "job": "explain",
    "hobby": "opinion",
    "list_things": "list",
    "list_tips": "list",
}
LISTED = """animals|farm animals|wild animals|birds|fruits|vegetables|colors|drinks|countries|big cities|sports|games|
musical instruments|tools|flowers|trees|insects|things in a school|things in a bedroom|things you can wear|jobs|hobbies|
things that are red|things that are round|things that can fly|things that are cold|planets|seas and oceans|breakfast foods|
desserts|good habits|kinds of weather|ways to say hello|things to do on a rainy day|gifts for a friend|pets|board games|
things you need for school|foods that are sweet|animals that live in water|reasons to smile|kinds of vehicles|shapes""".replace(
    "\n", ""
).split("|")
WEIGHTS = {
    "explain": 12,
    "animal": 8,
    "abstract": 5,
    "science": 5,
    "job": 3,
    "why": 6,
    "how": 8,
    "feeling": 8,
    "advice": 8,
    "news": 4,
    "opinion": 5,
    "hobby": 5,
    "list_things": 4,
    "list_tips": 3,
    "compare": 4,
    "story": 8,
    "poem": 3,
    "rewrite": 2,
    "sentence": 4,
    "talk": 6,
    "travel": 5,
    "food": 7,
}


def plural(word: str) -> str:
    if word in UNCOUNTED:
        return word
    irregular = {"mouse": "mice", "goose": "geese", "sheep": "sheep", "deer": "deer", "fish": "fish", "wolf": "wolves", "knife": "knives",
                 "leaf": "leaves", "salmon": "salmon", "goldfish": "goldfish", "jellyfish": "jellyfish", "starfish": "starfish", "moose": "moose",
                 "octopus": "octopuses", "potato": "potatoes", "tomato": "tomatoes", "volcano": "volcanoes", "fisherman": "fishermen",
                 "child": "children", "man": "men", "woman": "women", "foot": "feet", "tooth": "teeth", "ox": "oxen", "calf": "calves",
                 "loaf": "loaves", "shelf": "shelves", "scarf": "scarves", "thief": "thieves", "wife": "wives"}  # fmt: skip
    if word in irregular:
        return irregular[word]
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    return word[:-1] + "ies" if re.search(r"[^aeiou]y$", word) else word + "s"


def with_article(word: str) -> str:
    if word in UNCOUNTED:
        return word
    if word in {"sun", "moon", "sky", "sea", "ocean", "weather"}:
        return "the " + word
    return ARTICLE[word[0] in "aeio" or word in {"umbrella", "uncle"}] + word


def wordnet_nouns(folder: Path, fields: dict[str, int]) -> list[str]:
    """Common one-word nouns whose first sense lies in one of WordNet's lexicographer files `fields` (-> least count).

    The count is how often that sense was tagged in WordNet's own corpora: it keeps the rare words out.
    """
    lex, counts = {}, Counter[tuple[str, str]]()
    for line in (folder / "data.noun").read_text("latin-1").splitlines():
        if line[0] != " ":
            offset, field = line.split(" ", 2)[:2]
            if line.split(" ", 5)[4].islower():  # no names: months, countries, languages
                lex[offset] = field
    for line in (folder / "cntlist.rev").read_text("latin-1").splitlines():
        key, _, count = line.split()
        word, rest = key.split("%")
        kind, field = rest.split(":")[:2]
        if kind == "1":
            counts[word, field] += int(count)
    nouns = []
    for line in (folder / "index.noun").read_text("latin-1").splitlines():
        parts = line.split()
        first = next((lex[p] for p in parts if len(p) == 8 and p.isdigit() and p in lex), "")
        word = parts[0] if line[0] != " " else ""
        good = re.fullmatch("[a-z]{3,11}", word) and word not in BLOCKED
        if good and first in fields and counts[word, first] >= fields[first]:
            nouns.append(word)
    return nouns


def third_person(question: str) -> str:
    """'do birds sing' -> 'birds sing', 'is the sky blue' -> 'the sky is blue': a Why turned into a clause."""
    verb, rest = question.split(" ", 1)
    if verb == "do":
        return rest
    if verb == "does":
        words = rest.split(" ")
        at = 2 if words[0] in {"the", "a"} else 1
        return " ".join([*words[:at], words[at] + "s", *words[at + 1 :]])
    for cut in [
        "the sky",
        "the sea",
        "the sun",
        "snow",
        "exercise",
        "reading",
        "honesty",
        "breakfast",
        "kindness",
        "friends",
        "it",
    ]:
        if rest.startswith(cut + " "):
            return f"{cut} {verb} {rest[len(cut) + 1 :]}"
    return rest


def pick(rng: random.Random, shots: list[list[str]], n: int) -> list[list[str]]:
    """`n` examples in their order in the list: fewer distinct prompt beginnings, which the teacher computes once."""
    return [shots[i] for i in sorted(rng.sample(range(len(shots)), n))]


def vary(rng: random.Random, text: str) -> str:
    """The small accidents of typed messages: lower case, missing marks, a please, a hello."""
    roll = rng.random()
    if roll < 0.05 and not text.lower().startswith(("hi", "hey", "hello", "good")):
        text = rng.choice(["Hi! ", "Hey, ", "Hello! ", "Hi there, "]) + text
    elif roll < 0.12 and re.match(r"(Tell|Give|Explain|Write|Name|List|Describe|Teach|Make|Define|Compare) ", text):
        text = rng.choice(["Please " + text[0].lower() + text[1:], text.rstrip(".") + ", please."])
    roll = rng.random()
    if roll < 0.18:
        text = text.lower()
    if rng.random() < 0.12:
        text = text.rstrip(".?")
    elif rng.random() < 0.04:
        text = text.rstrip(".?") + rng.choice(["??", "!", "...", " :)"])
    return text


class Prompts:
    """All jobs from one seed; `job()` draws the next."""

    def __init__(self, rng: random.Random, wordnet: Path | None) -> None:
        self.rng = rng
        self.nouns = sorted(set(wordnet_nouns(wordnet, GENERAL_FIELDS))) if wordnet else THINGS
        self.ideas = sorted(set(wordnet_nouns(wordnet, ABSTRACT_FIELDS))) if wordnet else ["courage", "trust", "hope"]

    def words(self, category: str) -> dict[str, str]:
        """The values for a category's placeholders; `topic` is what the answer must mention."""
        rng = self.rng
        pools = {
            "explain": THINGS * 2 + NATURE * 2 + self.nouns, "animal": ANIMALS, "abstract": self.ideas, "science": SCIENCE, "job": JOBS,
            "why": WHYS, "how": TASKS, "feeling": FEELINGS, "advice": PROBLEMS, "news": GOOD_NEWS, "opinion": THINGS + ANIMALS + FOODS,
            "hobby": HOBBIES, "list_tips": TASKS, "travel": PLACES, "food": FOODS, "sentence": self.nouns + self.ideas + THINGS + ANIMALS,
        }  # fmt: skip
        w = rng.choice(pools.get(category, THINGS))
        x, y = rng.choice(PAIRS).split("|")
        values = {
            "w": w, "W": w[0].upper() + w[1:], "a": with_article(w), "pl": plural(w), "x": x, "y": y, "pl2": rng.choice(LISTED),
            "s": rng.choice(STORY_THINGS), "adj": rng.choice(ADJECTIVES), "animal": rng.choice(ANIMALS), "name": rng.choice(NAMES),
            "p": rng.choice(SUBJECTS), "t": rng.choice(SENTENCES), "h": rng.choice(HOBBIES), "f": rng.choice(FOODS), "place": rng.choice(PLACES),
        }  # fmt: skip
        values["w2"] = third_person(w) if category == "why" else w
        if category in {"talk"}:
            values["pl"] = plural(rng.choice(ANIMALS + FOODS))
        return values

    def chat(self, think: bool = False) -> Job:
        rng = self.rng
        names = [c for c in WEIGHTS if not think or c in PLAN_STARTS]
        category = rng.choices(names, [WEIGHTS[c] for c in names])[0]
        values = self.words(category)
        template = rng.choice(TEMPLATES[category])
        turns = [vary(rng, template.format(**values))]
        topic = values["w"] if category in {"explain", "animal", "food", "science", "job", "hobby", "sentence"} else ""
        shots = SHOTS[SHOT_OF.get(category, category)]
        if think:
            start = PLAN_STARTS[category].format(**values)
            plan = f"{start} {rng.choice(PLAN_ENDS[category])}" if category in PLAN_ENDS and rng.random() < 0.6 else ""
            plans = [[q, p, ANSWERS[q]] for q, p in pick(rng, PLANS, 2)]
            return {"kind": "think", "category": category, "turns": turns, "shots": [], "start": start, "topic": topic,
                    "plan": plan, "plans": plans}  # fmt: skip
        if rng.random() < 0.3 and category not in {"rewrite", "sentence"}:
            follow = STORY_FOLLOW_UPS if category in {"story", "poem"} else FOLLOW_UPS
            turns.append(vary(rng, rng.choice(follow)))
            if rng.random() < 0.3:
                turns.append(vary(rng, rng.choice(follow)) if rng.random() < 0.5 else self.chat_turn())
        if len(turns) > 1:
            shots = pick(rng, SHOTS["follow"], 1) + pick(rng, shots, 1)
        else:
            shots = pick(rng, shots, 2 if rng.random() < 0.8 else 1)
        return {
            "kind": "chat",
            "category": category,
            "turns": turns,
            "shots": shots,
            "start": "",
            "topic": topic,
        }

    def chat_turn(self) -> str:
        category = self.rng.choice(["explain", "animal", "why", "how", "feeling", "talk", "food"])
        return vary(self.rng, self.rng.choice(TEMPLATES[category]).format(**self.words(category)))

    def text(self) -> Job:
        rng = self.rng
        if rng.random() < 0.3:
            pool = THINGS + NATURE + ANIMALS + FOODS + HOBBIES + self.nouns
            topic = rng.choice(pool)
            about = (
                rng.choice([plural(topic), plural(topic), f"a day with {with_article(topic)}"])
                if topic not in HOBBIES
                else topic
            )
            turns = [f"Write a short, simple paragraph about {about}."]
            return {
                "kind": "text",
                "category": "paragraph",
                "turns": turns,
                "shots": rng.sample(PARAGRAPH_SHOTS, 1),
                "start": "",
                "topic": topic,
            }
        shot = rng.choice(STORY_SHOTS)
        return {
            "kind": "text",
            "category": "story",
            "turns": [shot[0]],
            "shots": [shot],
            "start": self.opening(),
            "topic": "",
        }

    def opening(self) -> str:
        """The first words of a story: who, where, and the thing it turns on. They give the stories their variety."""
        rng = self.rng
        a, b = rng.sample(NAMES, 2)
        adj, animal, thing = rng.choice(ADJECTIVES), rng.choice(ANIMALS), rng.choice(STORY_THINGS)
        adj = ("an " if adj[0] in "aeiou" else "a ") + adj
        day = rng.choice(
            [
                "One day,",
                "One sunny morning,",
                "One cold evening,",
                "One rainy day,",
                "On Saturday,",
                "Last summer,",
                "One night,",
            ]
        )
        where = rng.choice(PLACES).replace("a big city", "the big city")
        return rng.choice([
            f"Once upon a time, there was {adj} {animal} named {a}.", f"Once upon a time, there was {adj} {animal} who loved {rng.choice(HOBBIES)}.",
            f"{day} {a} found {thing}.", f"{day} {a} and {b} went to {where}.", f"{a} was {adj} {animal}. {day}",
            f"There once was {adj} {rng.choice(JOBS)} who lived near {where}.", f"{day} {adj} {animal} met {('an ' if animal[0] in 'aeiou' else 'a ') + animal if rng.random() < 0.1 else with_article(rng.choice(ANIMALS))}.",
            f"{a} wanted to {rng.choice(TASKS).replace(' my ', ' the ')}.", f"{a} felt {rng.choice(FEELINGS)}. {day}", f"{a} had {with_article(rng.choice(THINGS))}.",
            f"{a} and {b} were best friends. {day} they saw {thing}.", f"Long ago, in a small village, there lived {adj} {rng.choice(JOBS)}.",
            f'"{rng.choice(["Look", "Wait", "Come here", "Help", "Good morning"])}!" said {a}.', f"It was the first day of {rng.choice(['school', 'spring', 'winter', 'summer', 'the holidays'])}, and {a} felt {rng.choice(FEELINGS)}.",
        ])  # fmt: skip

    def magpie(self) -> Job:
        start = self.rng.choice(
            [
                "What",
                "What is",
                "How",
                "How do I",
                "Can you",
                "Why",
                "I",
                "I want to",
                "Tell me",
                "My",
                "Is",
                "Do",
                "Could you",
                "Which",
                "When",
                "Who",
                "Please",
                "Describe",
                "Explain",
            ]
        )
        category = self.rng.choice(["explain", "how", "advice", "opinion", "why", "food", "travel"])
        return {
            "kind": "magpie",
            "category": category,
            "turns": [],
            "shots": pick(self.rng, SHOTS[category], 3),
            "start": start,
            "topic": "",
        }

    def job(self) -> Job:
        kind = self.rng.choices(["chat", "think", "text", "magpie"], [0.60, 0.14, 0.20, 0.06])[0]
        return {
            "chat": self.chat,
            "think": lambda: self.chat(think=True),
            "text": self.text,
            "magpie": self.magpie,
        }[kind]()


def distinct(prompts: Prompts, count: int) -> Iterator[Job]:
    """`count` jobs; the same prompt at most three times (each time with other examples before it)."""
    seen: Counter[str] = Counter()
    while count:
        job = prompts.job()
        key = job["kind"] + " ".join(job["turns"]) + job["start"]
        seen[key] += 1
        if job["kind"] in {"magpie"} or seen[key] <= 3:
            count -= 1
            yield job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, help="folder with data.noun, index.noun, cntlist.rev")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    prompts = Prompts(random.Random(args.seed), args.wordnet)
    print(f"{len(prompts.nouns)} nouns and {len(prompts.ideas)} abstract words")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    kinds: Counter[str] = Counter()
    with lzma.open(args.out, "wt", encoding="utf-8", preset=4) as file:
        for job in distinct(prompts, args.count):
            kinds[job["kind"] + "/" + job["category"]] += 1
            file.write(json.dumps(job) + "\n")
    print(json.dumps(kinds, indent=1), f"{args.out} {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
