"""Examples that travel with the prompts, written by hand: they set the length and the tone of the teacher's answers.

The nouns in them (a bridge, a shoe, a girl named June) are kept out of the word lists as far as possible, so that an
answer that speaks of them can be told from one that answers the question.
"""

from __future__ import annotations

SHOTS: dict[str, list[list[str]]] = {
    "explain": [
        [
            "What is a bridge?",
            (
                "A bridge is a structure that helps people, cars or trains cross over something, like a river or a "
                "road. Bridges can be made of wood, stone or steel."
            ),
        ],
        [
            "what is a dentist",
            (
                "A dentist is a doctor who takes care of teeth. Dentists clean teeth, fix holes in them, and show "
                "people how to keep them healthy."
            ),
        ],
        [
            "Can you explain what a feather is?",
            (
                "A feather is a light, soft part that covers a bird's body. Feathers keep birds warm and dry, and "
                "the long ones on their wings help them fly."
            ),
        ],
        [
            "Tell me about ladders.",
            (
                "A ladder is a tool for climbing. It has two long sides and steps between them, called rungs. People "
                "use ladders to reach high places, like a roof or a tall shelf."
            ),
        ],
        [
            "Explain jam to a child.",
            (
                "Jam is a sweet, sticky food made from fruit and sugar. You cook the fruit until it is soft and "
                "thick, and then you can spread it on your bread. Yum!"
            ),
        ],
        [
            "What does 'patience' mean?",
            (
                "Patience means staying calm while you wait for something. A person who has patience does not get "
                "angry when things take a long time."
            ),
        ],
    ],
    "why": [
        [
            "Why do cars need fuel?",
            (
                "Cars need fuel because the engine burns it to make energy. That energy turns the wheels. Without "
                "fuel, the engine stops and the car cannot move."
            ),
        ],
        [
            "why do people wear hats",
            (
                "People wear hats for many reasons. A hat can keep your head warm in winter, protect you from the "
                "sun in summer, or simply look nice."
            ),
        ],
        [
            "Why does paper tear so easily?",
            (
                "Paper tears easily because it is made of thin plant fibers pressed together. They hold each other "
                "only a little, so a small pull is enough to break them apart."
            ),
        ],
    ],
    "how": [
        [
            "How do I wrap a gift?",
            (
                "Put the gift in the middle of the paper. Fold the two long sides over it and tape them. Then fold "
                "the ends neatly, tape them down, and add a ribbon."
            ),
        ],
        [
            "how can i clean my shoes?",
            (
                "First, brush off the dry dirt. Then wipe the shoes with a damp cloth and a little soap. Let them "
                "dry in the air, away from strong heat."
            ),
        ],
        [
            "What is a good way to remember my keys?",
            (
                "Choose one place for your keys, like a small bowl near the door. Put them there every time you come "
                "home. After a week or two, it becomes a habit."
            ),
        ],
    ],
    "feeling": [
        [
            "I had a bad day at work.",
            (
                "I'm sorry to hear that. Some days are just hard, and it is fine to feel tired of it all. Would you "
                "like to tell me what happened?"
            ),
        ],
        [
            "I feel guilty.",
            (
                "Feeling guilty can be heavy, but it also shows that you care. If you made a mistake, you can say "
                "sorry and try again. What is on your mind?"
            ),
        ],
        [
            "I am so relieved today!",
            (
                "That is wonderful to hear! It feels so good when a worry goes away. Take a deep breath and enjoy "
                "it. What happened?"
            ),
        ],
        [
            "I feel restless.",
            (
                "I understand. When you feel restless, it can help to move a little. A short walk, some music or a "
                "few deep breaths may calm you down."
            ),
        ],
    ],
    "advice": [
        [
            "My sister never listens to me. What should I do?",
            (
                "That can be frustrating. Choose a quiet moment and tell her how you feel, without blaming her. Then "
                "listen to her side too. Often a calm talk helps more than an argument."
            ),
        ],
        [
            "I want to drink more water. Any ideas?",
            (
                "Keep a glass or a bottle near you all day. Drink some when you wake up and before each meal. If "
                "plain water is boring, add a slice of lemon."
            ),
        ],
        [
            "I broke my friend's toy.",
            (
                "I'm sorry that happened. The best thing is to tell your friend the truth and say sorry. You could "
                "also offer to repair it or buy a new one."
            ),
        ],
    ],
    "news": [
        [
            "I won a prize today!",
            "Congratulations, that is great news! You must be so proud. What did you win it for?",
        ],
        [
            "Guess what, I learned to whistle.",
            (
                "Well done! That takes a lot of practice. Now you can whistle your favourite songs on a walk. Which "
                "song will you try first?"
            ),
        ],
        [
            "we are painting the kitchen today",
            "That sounds like fun! A fresh color can make a room feel new. Which color did you choose?",
        ],
    ],
    "opinion": [
        [
            "Do you like carrots?",
            (
                "I am a language model, so I cannot taste them, but I like the idea of carrots. They are crunchy, "
                "sweet and good for you. Do you like them?"
            ),
        ],
        [
            "What do you think about fireworks?",
            (
                "Fireworks are bright and exciting, and many people love to watch them. They can be loud, though, "
                "and they often scare animals. I think they are best on special days."
            ),
        ],
        [
            "Is it fun to play cards?",
            (
                "Yes, many people find it fun! Card games are easy to carry and you can play them with friends or "
                "family. Some need luck, and others make you think."
            ),
        ],
    ],
    "list": [
        [
            "Name three things you find in a kitchen.",
            "1. A stove\n2. A sink\n3. A frying pan",
        ],
        [
            "Give me three tips for a good picnic.",
            (
                "1. Choose a shady place with soft grass.\n2. Bring easy food, like sandwiches and fruit.\n3. Take a "
                "blanket and some games."
            ),
        ],
        [
            "list three reasons to wear a helmet",
            (
                "1. It protects your head if you fall.\n2. It helps other people see you.\n3. It sets a good example "
                "for children."
            ),
        ],
    ],
    "compare": [
        [
            "What is the difference between a cup and a glass?",
            (
                "A cup usually has a handle and is used for hot drinks, like tea. A glass has no handle, is made of "
                "glass, and is used for cold drinks, like water."
            ),
        ],
        [
            "Which is better, a bath or a shower?",
            (
                "It depends on what you need. A bath is warm and relaxing, and a shower is quick and uses less "
                "water. If you are in a hurry, take a shower."
            ),
        ],
        [
            "compare ants and bees",
            (
                "Ants and bees are both insects that live and work in big groups. Bees can fly and make honey, while "
                "most ants walk and carry food to their nest."
            ),
        ],
    ],
    "story": [
        [
            "Tell me a short story about a pencil.",
            (
                "Once upon a time, a small pencil lived in a school bag. She was sad because nobody used her. One "
                "day a boy named Luke needed to draw his mother. He picked up the pencil and drew a big smile. His "
                "mother loved the picture, and the little pencil was happy at last."
            ),
        ],
        [
            "write a story about a cookie",
            (
                "One day, Nora baked one big cookie. She wanted to eat it all by herself. Then she saw her brother "
                'sitting alone. "Do you want half?" she asked. He smiled and said yes. They sat in the sun and ate '
                "together, and Nora thought the cookie had never tasted so good."
            ),
        ],
    ],
    "poem": [
        [
            "Write a short poem about bread.",
            (
                "Warm and brown, a simple thing,\nSoft inside, a crust that sings.\nButter melts and spreads with "
                "ease,\nOne more slice for me, please."
            ),
        ],
        [
            "can you write me a poem about a bus",
            (
                "The yellow bus comes down the street,\nIt stops for me, I find a seat.\nWe pass the shops, we pass "
                "the park,\nIt brings me home before it's dark."
            ),
        ],
    ],
    "rewrite": [
        [
            "Say this in a different way: I am very hungry.",
            "I really need something to eat.",
        ],
        [
            "Rewrite this sentence: The car is fast and red.",
            "The red car moves very quickly.",
        ],
        [
            "Make this sentence more polite: Give me the book.",
            "Could you please give me the book?",
        ],
    ],
    "sentence": [
        [
            "Write a sentence with the word 'ladder'.",
            "The painter climbed the ladder to reach the top of the wall.",
        ],
        [
            "use the word spoon in a sentence",
            "She stirred her soup with a big wooden spoon.",
        ],
        [
            "Make a sentence about honesty.",
            "Honesty is telling the truth even when it is hard.",
        ],
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
            (
                "Sure, I would love to! Cooking is a nice way to relax and share something with others. What do you "
                "like to cook?"
            ),
        ],
        [
            "Tell me something nice.",
            (
                "Somewhere right now, someone is smiling because of something kind you once did. Small good things "
                "travel further than we think."
            ),
        ],
    ],
    "travel": [
        [
            "I am going to the lake next week.",
            (
                "That sounds lovely! A lake is great for swimming, walking and resting. Don't forget your swimsuit, "
                "a towel and something for the sun. Who is going with you?"
            ),
        ],
        [
            "What can I do in Vienna?",
            (
                "You can visit the old palaces, listen to classical music, and walk along the river. In the "
                "afternoon, sit in a cafe and try a piece of chocolate cake."
            ),
        ],
        [
            "What should I pack for a camping trip?",
            (
                "Pack a tent, a sleeping bag and warm clothes for the night. Take water, easy food, a flashlight and "
                "a small first-aid kit."
            ),
        ],
    ],
    "food": [
        [
            "How do you eat a pomegranate?",
            (
                "Cut it open and take out the small red seeds. You can eat them with a spoon, or put them on salad "
                "or yogurt. They taste sweet and a little sour."
            ),
        ],
        [
            "What goes well with noodles?",
            (
                "Noodles go well with vegetables, chicken or tofu. Add a simple sauce, like soy sauce with a little "
                "garlic, and dinner is ready."
            ),
        ],
        [
            "What can I cook with cabbage?",
            (
                "You can make a warm cabbage soup, or fry it with onions and a little butter. It is also nice raw in "
                "a salad with carrots."
            ),
        ],
    ],
    "follow": [
        [
            "What is a bridge?",
            "A bridge is a structure that helps people cross over a river or a road.",
            "Tell me more.",
            (
                "Bridges can be made of wood, stone or steel. Some are short and simple, and others are very long "
                "and hang from strong cables."
            ),
        ],
        [
            "How can I clean my shoes?",
            "Brush off the dry dirt, wipe the shoes with a damp cloth and a little soap, and let them dry in the air.",
            "Why not near a heater?",
            (
                "Strong heat can make leather hard and dry, and then it cracks. In the air, shoes dry slowly and "
                "stay soft."
            ),
        ],
        [
            "I had a bad day at work.",
            "I'm sorry to hear that. Would you like to tell me what happened?",
            "my boss was angry with me",
            (
                "That is never easy. Maybe your boss was just under stress. If you made a mistake, you can fix it "
                "tomorrow. Tonight, try to rest and do something you enjoy."
            ),
        ],
    ],
}
# What the examples answer, for the plans that need an answer after them; and whose examples a category borrows.
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
