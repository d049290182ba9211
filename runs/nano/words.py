"""Word lists for the teacher's prompts: what to ask about, in words that a small child knows.

They stand as running text, a dozen to a line, because they are read and weeded far more often than they are indexed.
The order counts: `prompts.py` draws from it by a seed.
"""

from __future__ import annotations


def words(text: str) -> list[str]:
    return text.split()


def phrases(text: str) -> list[str]:
    """Apart by |, over as many lines as it takes."""
    return text.strip().replace("\n", "").split("|")


ANIMALS = words("""
dog cat horse cow pig sheep goat rabbit mouse rat squirrel fox wolf bear lion tiger elephant giraffe zebra
monkey gorilla kangaroo koala panda penguin owl eagle parrot duck goose chicken swan robin crow pigeon sparrow
frog toad snake lizard turtle tortoise crocodile shark whale dolphin seal octopus crab lobster jellyfish
starfish salmon goldfish bee ant butterfly spider fly beetle ladybug grasshopper dragonfly snail worm bat
hedgehog deer moose camel donkey hamster otter beaver raccoon skunk leopard cheetah hippo rhino ostrich flamingo
peacock seagull
""")
FOODS = words("""
bread rice pasta pizza soup salad cheese butter yogurt honey jam chocolate cake pie cookie pancake waffle apple
banana orange lemon grape strawberry cherry peach pear mango pineapple watermelon tomato potato carrot onion
garlic cucumber lettuce spinach broccoli pumpkin corn bean pea mushroom egg fish chicken beef sausage sandwich
burger omelet porridge tea coffee milk juice lemonade popcorn peanut walnut cinnamon pepper salt sugar vinegar
oatmeal
""")
THINGS = words("""
chair table lamp clock window door key book pencil notebook computer telephone camera radio television bicycle
car bus train airplane boat ship bridge road house tent ladder hammer umbrella hat coat shoe sock glove scarf
pillow blanket mirror candle cup plate spoon fork knife bottle basket box bag suitcase map compass telescope
microscope magnet battery kite balloon doll ball guitar piano drum violin flute garden fence lighthouse library
museum hospital school castle tower farm mill oven fridge kettle toaster broom soap towel toothbrush comb needle
button coin stamp letter newspaper calendar thermometer robot rocket satellite elevator engine wheel clay paint
brush glass paper rope
""")
NATURE = words("""
sun moon star planet comet sky cloud rain snow ice wind storm thunder lightning rainbow fog frost hurricane
tornado earthquake volcano mountain hill valley river lake ocean sea beach island desert forest jungle cave
waterfall glacier tree flower leaf seed root rose tulip cactus grass moss sand stone soil mud shadow echo fire
smoke season spring summer autumn winter tide wave sunrise sunset dew
""")
SCIENCE = phrases("""
gravity|electricity|light|sound|heat|energy|air|water|oxygen|evaporation|photosynthesis|migration|hibernation|
recycling|friction|magnetism|sleep|memory|blood|digestion|pollution|climate|medicine|metal|plastic|steam|
temperature|time|matter|speed|pressure|breathing|growth|balance|color|taste|smell|vision|hearing|hunger|thirst|
exercise|the seasons|day and night|the water cycle|the food chain|the solar system|the weather|the heart|
the brain|the skin|the moon|the sun|a fossil|a germ|an atom|a magnet|a rainbow|the tide
""")
JOBS = words("""
teacher doctor nurse farmer baker cook firefighter pilot sailor carpenter plumber painter writer singer dancer
actor scientist engineer gardener librarian mechanic dentist vet driver builder tailor fisherman judge lawyer
astronaut photographer musician waiter
""")
FEELINGS = words("""
sad lonely tired bored nervous worried angry happy excited scared stressed proud jealous confused grateful
homesick shy embarrassed calm hopeful disappointed sleepy overwhelmed frustrated cheerful
""")
HOBBIES = phrases("""
reading|painting|drawing|singing|dancing|swimming|running|hiking|cycling|cooking|baking|gardening|fishing|
knitting|sewing|camping|skating|chess|photography|pottery|yoga|writing|birdwatching|dancing|juggling|sailing|
climbing|journaling|origami|playing the guitar|playing the piano|playing football|learning a language|
collecting stamps
""")
PLACES = phrases("""
the beach|the mountains|a big city|a small village|a farm|the zoo|a museum|the forest|a lake|an island|Paris|
London|Rome|New York|Tokyo|Spain|Italy|Greece|Japan|Egypt|Canada|Norway|the desert|a castle|the park|the library
""")
PROBLEMS = phrases("""
I can't sleep at night|my friend is angry with me|I have a test tomorrow|I keep forgetting things|
I am always late|I moved to a new town|my dog barks too much|I don't like my job|I want to save money|
I eat too much sugar|I have nothing to do this weekend|I am afraid of speaking in front of people|
my room is messy|I had a fight with my brother|I lost my keys|I feel too lazy to exercise|my plants keep dying|
I spend too much time on my phone|I want to make new friends|my cat won't eat|I caught a cold|
I broke my mother's vase|I have a job interview on Monday|I can't focus on my homework|I miss my grandmother|
I didn't get the job|it has been raining all week|I am learning to cook|I want to read more books|
my neighbour is very loud|I forgot my friend's birthday|I have too much work|I want to wake up earlier|
my bike is broken|my best friend is moving away|I am going on a long trip|I want to learn to swim|
I feel left out at school|I am starting a new school|I got a bad grade|my baby sister cries a lot|
I am nervous about flying
""")
GOOD_NEWS = phrases("""
I passed my exam|I got a puppy|today is my birthday|I made a new friend|I baked my first cake|
I am going on holiday tomorrow|I finished a long book|I learned to ride a bike|my team won the game|
I got a new job|I planted a tree|my sister had a baby|I cleaned my whole house|I cooked dinner for my family|
I saw a rainbow today|I ran five miles today|we are getting a kitten|I finally slept well|it is snowing outside|
my grandma is visiting
""")
TASKS = phrases("""
make a cup of tea|boil an egg|clean a window|plant a seed|wash a dog|make a paper airplane|learn new words|
fall asleep faster|save water|write a letter|make a sandwich|take care of a cat|grow tomatoes|tie a shoe|
make pancakes|study for a test|stay warm in winter|keep cool in summer|pack a suitcase|clean my room|
stay healthy|make a new friend|be a good friend|say sorry|train a puppy|start running|cook rice|draw a cat|
remember names|choose a good book|plan a birthday party|brush my teeth|take better photos|feel less stressed|
spend less money|wake up early|make a salad|build a snowman|set the table|be polite|read faster|learn to swim|
write a short story|bake bread|care for a houseplant|make lemonade|organise my desk|get to know my neighbours|
be more patient|stop worrying
""")
WHYS = phrases("""
is the sky blue|do birds sing|do leaves change color|do we sleep|do we dream|is the sea salty|do cats purr|
do dogs wag their tails|does ice float|do we need water|do stars twinkle|does the moon change shape|
do bees make honey|do people laugh|is exercise good for us|do plants need light|do we have seasons|
do onions make us cry|is snow white|do we yawn|do people keep pets|is reading good for you|do birds fly south|
does it rain|do we brush our teeth|do spiders make webs|do we get hungry|is honesty important|
are friends important|do we have to go to school|does bread rise|do wolves howl|do fish live in water|
do we get goosebumps|is the sun hot|do clocks tick|do we shake hands|do trees lose their leaves|
is breakfast important|do people like music|do camels have humps|do we celebrate birthdays|is it dark at night|
do magnets stick to metal|do we need bones|do babies cry|do zebras have stripes|does soap clean|does wood burn|
do flowers smell nice|is kindness important
""")
PAIRS = words("""
cats|dogs tea|coffee summer|winter books|films cars|bicycles apples|oranges city|village frogs|toads
butterflies|moths morning|evening pencils|pens trains|airplanes gold|silver rivers|lakes bread|rice piano|guitar
football|tennis soup|salad wolves|dogs sun|moon rain|snow milk|juice forests|deserts letters|emails
crocodiles|alligators rabbits|hares running|swimming cooking|baking salt|sugar breakfast|dinner chess|checkers
teachers|doctors
""")
NAMES = words("""
Mia Tom Anna Ben Lily Sam Lucy Max Emma Jack Sara Leo Nina Tim Ella Noah Rosa Oscar Ruby Finn Clara Hugo Ivy
Paul Zoe Peter Maya Adam Grace Felix Alice Oliver Daisy Henry Molly George Ada Will Kate
""")
ADJECTIVES = words("""
little brave kind old shy clever lazy curious hungry sleepy lonely happy tiny grumpy gentle funny quiet young
clumsy cheerful
""")
STORY_THINGS = phrases("""
a lost key|a red balloon|a magic stone|a broken toy|a big storm|a hidden door|a warm coat|a tall tree|
a small boat|a secret garden|a golden egg|a missing hat|a strange sound|a kind stranger|a new friend|
a dark cave|a birthday cake|a long journey|a shiny coin|an old map|a deep well|a paper kite|a noisy drum|
a bag of seeds|a blue bird|a snowy night|a school play|a lost puppy|a wooden bridge|a wise owl|a funny mistake|
a race|a promise|a picnic
""")
SUBJECTS = phrases("""
friendship|the sea|the moon|autumn|rain|a cat|a dog|the stars|home|my mother|winter|a tree|the wind|summer|
a river|the night sky|a flower|hope|love|snow|morning|a train|music|sleep|an old clock|a bird|sunshine|
the forest
""")
SENTENCES = phrases("""
The dog ran across the street.|She is very happy about her new house.|The weather is bad today.|
He did not go to school because he was sick.|We ate a big dinner and then we went home.|
The movie was very good.|I am going to the store to buy milk.|The little boy was scared of the dark.|
My mother makes the best soup.|They walked for a long time in the forest.|The cat is sleeping on the chair.|
It was a cold night and the wind was strong.|The teacher told us a funny story.|
I like to drink tea in the morning.|The old man sat by the window.|She forgot her umbrella and got wet.|
The children are playing in the garden.|He works hard every day.|The train was late again.|
We saw many stars in the sky.|The bird built a nest in the tree.|I want to learn how to swim.|
The baby laughed when she saw the puppy.|He lost his keys and looked for them everywhere.
""")
LISTED = phrases("""
animals|farm animals|wild animals|birds|fruits|vegetables|colors|drinks|countries|big cities|sports|games|
musical instruments|tools|flowers|trees|insects|things in a school|things in a bedroom|things you can wear|jobs|
hobbies|things that are red|things that are round|things that can fly|things that are cold|planets|
seas and oceans|breakfast foods|desserts|good habits|kinds of weather|ways to say hello|
things to do on a rainy day|gifts for a friend|pets|board games|things you need for school|foods that are sweet|
animals that live in water|reasons to smile|kinds of vehicles|shapes
""")

# Said without an article.
UNCOUNTED = set(
    words("""
autumn beef bread broccoli butter cheese chicken chocolate cinnamon clay coffee corn dew fire fish fog frost
garlic glass grass honey ice jam juice lemonade lettuce lightning milk moss mud oatmeal paint paper pasta pepper
pizza popcorn porridge rain rice rope salad salt sand smoke snow soap soil soup spinach spring sugar summer tea
thunder vinegar wind winter yogurt
""")
)

# No child needs these, and a weak teacher makes something bad of them.
BLOCKED = set(
    words("""
abortion abuse allah anus ass assassin assault bastard bitch bomb bombus booze bosom bottom bowel bra breast
brothel bullet buttocks cancer cannabis catholic christ cigar cigarette cocaine cock coon corpse crap cripple
damn dead death diarrhea drug dwarf dyke erotic execution fag faggot feces gallows gay genocide god groin gun
hangover harlot hell heroin hooker hostage idiot imbecile incest jesus jew killer lesbian liquor loins lunatic
lynching marijuana massacre midget molester moron moslem murder murderer nazi negro nigger noose nude opium
orgasm panties penis pervert pimp piss pistol prostitute protestant pussy racism rape reb rectum redskin retard
rifle rump savage semen sex shit slave slavery slut southerner squaw stripper suicide syphilis teat terrorist
tit tobacco torture tumor underwear urine vagina virgin virginity vodka vomit war weapon whiskey whisky whore
womb yankee
""")
)

# WordNet's lexicographer files -> how often a sense must have been seen to be common; things, then ideas.
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
