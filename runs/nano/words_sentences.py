"""Hand-written sentences, each with its word, and short sayings to repeat."""

from __future__ import annotations

_SENTENCES = """
apple|I eat a red apple every morning.
apple|The apple fell from the tree.
ball|The boy throws the ball to his dog.
banana|She puts a banana in her lunch box.
bath|The baby laughs in the bath.
beach|We build a sand castle on the beach.
bear|The bear sleeps all winter.
bed|My bed is warm and soft.
bee|A bee sits on the yellow flower.
bell|The bell rings at eight o'clock.
bicycle|I ride my bicycle to school.
bird|A small bird sings in the tree.
bird|The bird built a nest near our window.
birthday|On my birthday we eat cake.
boat|The boat moves slowly across the lake.
book|She reads a book before she sleeps.
book|This book has many pictures.
bottle|There is cold water in the bottle.
box|The cat is hiding in the box.
brave|The brave girl helped her friend.
bread|We buy fresh bread every morning.
breakfast|For breakfast I have eggs and toast.
bridge|The train crosses the old bridge.
brother|My brother plays the guitar.
bus|The bus stops in front of our house.
butter|He puts butter on his bread.
butterfly|A blue butterfly lands on my hand.
button|One button of my coat is missing.
cake|Grandma bakes a chocolate cake.
candle|We light a candle when it is dark.
car|My father washes the car on Sunday.
carrot|The rabbit eats a carrot.
castle|The king lives in a big castle.
cat|The cat sleeps on the sofa.
cat|My cat likes to sit in the sun.
chair|Please sit down on this chair.
cheese|The mouse likes cheese.
chicken|The chicken lays an egg.
child|The child plays with a red ball.
city|The city is full of lights at night.
clean|I clean my room on Saturday.
clock|The clock on the wall is slow.
cloud|A white cloud looks like a sheep.
coat|Wear your coat, because it is cold.
coffee|My mother drinks coffee in the morning.
cold|The water in the river is cold.
cook|My uncle can cook very well.
cow|The cow gives us milk.
cup|There is a cup of tea on the table.
dance|They dance when they hear music.
day|It is a beautiful day.
desk|My books are on the desk.
dinner|We eat dinner at seven.
doctor|The doctor helps sick people.
dog|The dog runs in the park.
dog|Our dog barks at the mail carrier.
door|Please close the door behind you.
dream|I had a dream about flying.
dress|She wears a green dress.
drum|He plays the drum very loudly.
duck|The duck swims on the pond.
egg|I boil an egg for five minutes.
elephant|An elephant has a long trunk.
evening|In the evening we watch the stars.
eye|The pirate covers one eye.
family|My family lives in a small house.
farm|There are many animals on the farm.
farmer|The farmer gets up early.
fast|The horse is very fast.
father|My father tells funny stories.
feather|The feather falls slowly to the ground.
fire|We sit around the fire and sing.
fish|The fish swims in clear water.
flower|She waters the flower every day.
flower|A flower grows by the road.
fog|In the fog we cannot see the road.
forest|It is quiet in the forest.
fork|I eat my salad with a fork.
fox|The fox runs through the snow.
friend|My friend always listens to me.
friend|A good friend shares with you.
frog|The green frog jumps into the pond.
funny|The clown is very funny.
game|We play a game after dinner.
garden|Tomatoes grow in our garden.
gift|He opens the gift with a smile.
girl|The girl draws a picture of her cat.
glass|The glass is full of juice.
glove|I lost one glove in the snow.
goat|The goat climbs on the rock.
grandmother|My grandmother knits warm socks.
grass|The grass is wet in the morning.
guitar|She plays the guitar by the fire.
hammer|He hits the nail with a hammer.
hand|She holds her mother's hand.
happy|I am happy when the sun shines.
happy|The happy dog wags its tail.
hat|The wind blew his hat away.
heart|My heart beats fast when I run.
help|Can you help me carry this bag?
hill|We run down the hill.
home|After school I go home.
honey|Bees make honey from flowers.
horse|The horse eats hay in the barn.
hospital|The nurse works in a hospital.
hot|The soup is still too hot.
house|Their house has a red roof.
hungry|The hungry bear looks for fish.
ice|The ice on the lake is thick.
ice cream|We eat ice cream in summer.
island|Palm trees grow on the island.
jacket|I put my jacket on the chair.
juice|She drinks a glass of orange juice.
jump|Frogs can jump very far.
key|I cannot find the key to the house.
kind|The kind man gave us water.
king|The king wears a golden crown.
kitchen|It smells good in the kitchen.
kite|The kite flies high in the sky.
kitten|The kitten plays with a ball of wool.
lake|We swim in the lake in summer.
lamp|The lamp gives a warm light.
laugh|His jokes make me laugh.
leaf|A yellow leaf falls from the tree.
lemon|A lemon tastes sour.
letter|I write a letter to my aunt.
library|We borrow books from the library.
light|Please turn off the light.
lion|The lion rests under a tree.
love|I love my little sister.
lunch|We have soup for lunch.
map|The map shows the way to the lake.
market|He sells apples at the market.
milk|The cat drinks warm milk.
mirror|She looks at herself in the mirror.
money|He saves money for a new bike.
monkey|The monkey eats a banana.
moon|The moon is bright tonight.
moon|We can see the moon above the trees.
morning|In the morning the birds sing.
mother|My mother reads me a story.
mountain|There is snow on the mountain.
mouse|The mouse hides under the bed.
museum|We saw old coins in the museum.
music|She listens to music on the train.
name|His name is Oscar.
neighbor|Our neighbor has a big garden.
nest|There are three eggs in the nest.
night|At night it is dark and quiet.
noise|What was that noise?
nose|My nose is cold.
ocean|Whales live in the ocean.
old|The old man feeds the birds.
onion|Cutting an onion makes me cry.
orange|He peels an orange for his son.
owl|The owl hunts at night.
paint|They paint the fence white.
paper|I fold the paper and make a plane.
park|Children play in the park.
party|Everyone danced at the party.
peach|This peach is sweet and soft.
pen|May I use your pen?
pencil|I draw a house with my pencil.
penguin|The penguin slides on the ice.
piano|She plays the piano every day.
picture|He hangs the picture on the wall.
pig|The pig rolls in the mud.
pillow|My head rests on a soft pillow.
pizza|We share a large pizza.
plane|The plane lands at noon.
plate|There is a cookie on the plate.
pond|Two swans swim on the pond.
potato|He peels a potato for the soup.
puppy|The puppy chews on my shoe.
queen|The queen waves to the people.
quiet|It is quiet in the library.
rabbit|The rabbit hops across the field.
rain|The rain taps on the window.
rain|Plants need rain to grow.
rainbow|After the storm we saw a rainbow.
red|She has a red bag.
rice|We eat rice with vegetables.
ring|He gave her a silver ring.
river|The river flows to the sea.
road|The road goes through the forest.
robot|The robot sweeps the floor.
rope|They tie the boat with a rope.
rose|The rose smells sweet.
run|I run every morning before work.
sad|He was sad when his friend left.
salt|The soup needs a little salt.
sand|The sand is warm under my feet.
school|The children walk to school.
sea|The sea is calm today.
sheep|The sheep eat grass on the hill.
ship|The ship sails to a far country.
shirt|He wears a blue shirt.
shoe|There is a stone in my shoe.
sing|They sing a song together.
sister|My sister is older than me.
sky|The sky is blue today.
sleep|I sleep eight hours every night.
smile|Her smile makes everyone happy.
snail|The snail carries its house.
snake|The snake lies in the warm sun.
snow|The children play in the snow.
snow|Snow covers the roofs of the village.
sock|I can only find one sock.
song|This song is easy to learn.
soup|Hot soup is good on a cold day.
spider|A spider makes a web in the corner.
spoon|He eats the soup with a spoon.
spring|In spring the flowers open.
star|One bright star shines in the sky.
stone|He throws a stone into the water.
storm|The storm broke a branch of the tree.
story|Tell me a story about a dragon.
street|The street is empty at night.
summer|In summer we swim in the lake.
sun|The sun rises in the east.
sun|We sit in the sun and drink tea.
swim|The ducks swim on the lake.
table|We sit around the table and talk.
tail|The dog wags its tail.
tea|Would you like a cup of tea?
teacher|The teacher writes on the board.
tent|We sleep in a tent by the river.
thunder|The thunder scared the dog.
tiger|The tiger has black stripes.
time|We have time for one more game.
tired|I am tired after the long walk.
tomato|She cuts a tomato for the salad.
tooth|The baby has one tooth.
train|The train leaves at nine.
train|We travel to the city by train.
tree|The children climb the old tree.
tree|Birds live in this tree.
truck|The truck carries heavy stones.
umbrella|Take an umbrella, because it may rain.
village|Only a few people live in the village.
violin|He practices the violin every evening.
wall|There is a clock on the wall.
water|Please drink some water.
water|The water in the lake is clear.
whale|The whale comes up to breathe.
wheel|The wheel of the cart is broken.
wind|The wind moves the leaves.
window|She looks out of the window.
winter|In winter it gets dark early.
wolf|The wolf howls at night.
wood|The table is made of wood.
yellow|The yellow bus is full of children.
zoo|We saw a giraffe at the zoo.
"""
SENTENCES = [tuple(line.split("|")) for line in _SENTENCES.strip().splitlines()]
assert all(word.lower() in text.lower() for word, text in SENTENCES)

SAYINGS = """Hello, world!|Good things take time.|I like to learn.|The sky is blue.|Every day is a new day.|Well done!|
I am happy today.|Practice makes perfect.|Better late than never.|Slow and steady wins the race.|One, two, three!|
Be kind to others.|The early bird catches the worm.|Home sweet home.|Two heads are better than one.|Good morning!|
Never give up.|Small steps lead far.|I can do it.|Let's go!|Have a nice day!|Peace and quiet.|No pain, no gain.|
Honesty is the best policy.|Look before you leap.|All is well.|A friend in need is a friend indeed.|Yes, we can.|
Blue whales sing.|Red apples are sweet.|My cat is black.|Time flies.|Hello there.|Have fun!|Happy birthday!|
Seven silly snakes.|The moon is round.|I love books.|See you later.|Tea or coffee?|Rain, rain, go away.""".replace(
    "\n", ""
).split("|")
