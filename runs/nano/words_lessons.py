"""One-sentence lessons: simple science, and everyday words explained."""

from __future__ import annotations

from exact_base import rows

# as part of a sentence | the question | the answer
SCIENCE = rows("""
why the sky is blue|Why is the sky blue?|The sky is blue because the air scatters blue sunlight more than red sunlight.
why leaves are green|Why are leaves green?|Leaves are green because they contain chlorophyll, which catches sunlight.
why ice floats|Why does ice float on water?|Ice floats because it is less dense than liquid water.
why the sea is salty|Why is the sea salty?|The sea is salty because rivers carry salt from rocks into it.
why we have day and night|Why do we have day and night?|We have day and night because the Earth turns once every day.
why we have seasons|Why do we have seasons?|We have seasons because the Earth is tilted as it goes around the sun.
why it rains|Why does it rain?|It rains when water drops in a cloud become too heavy and fall.
how a rainbow is made|How is a rainbow made?|A rainbow appears when sunlight is split into colors by drops of rain.
what thunder is|What is thunder?|Thunder is the sound of air that lightning heats very quickly.
what lightning is|What is lightning?|Lightning is a giant electric spark in or from a cloud.
why we see lightning before thunder|Why do we see lightning before thunder?|We see it first because light is much faster than sound.
at what temperature water boils|At what temperature does water boil?|Water boils at 100 degrees Celsius at sea level.
at what temperature water freezes|At what temperature does water freeze?|Water freezes at 0 degrees Celsius.
what plants need to grow|What do plants need to grow?|Plants need light, water, air and minerals from the soil.
what photosynthesis is|What is photosynthesis?|Photosynthesis is how plants make sugar from light, water and air.
what gravity is|What is gravity?|Gravity is the force that pulls things toward each other, like an apple to the ground.
why things fall down|Why do things fall down?|Things fall down because gravity pulls them toward the Earth.
why the moon shines|Why does the moon shine?|The moon shines because it reflects the light of the sun.
why the moon changes shape|Why does the moon change its shape?|We see different parts of its sunlit side as the moon circles the Earth.
what the sun is|What is the sun?|The sun is a star, a huge ball of hot glowing gas.
why the sun is important|Why is the sun important?|The sun gives the Earth light and warmth, and plants need it to grow.
how far away the moon is|How far away is the moon?|The moon is about 384,000 kilometers from the Earth.
how long the Earth takes around the sun|How long does the Earth take to go around the sun?|The Earth takes about 365 days, one year.
how long the moon takes around the Earth|How long does the moon take to go around the Earth?|The moon takes about 27 days.
what a planet is|What is a planet?|A planet is a large round body that moves around a star.
what a star is|What is a star?|A star is a huge ball of hot gas that makes its own light.
what a comet is|What is a comet?|A comet is a ball of ice and dust that goes around the sun and can grow a tail.
why stars twinkle|Why do stars twinkle?|Stars twinkle because moving air bends their light.
why we cannot see stars in the day|Why can't we see stars during the day?|The bright daytime sky hides their weak light.
what causes the tides|What causes the tides?|Tides are caused mostly by the pull of the moon on the sea.
what a cloud is made of|What is a cloud made of?|A cloud is made of tiny drops of water or bits of ice.
what fog is|What is fog?|Fog is a cloud that touches the ground.
what wind is|What is wind?|Wind is moving air.
what causes wind|What causes wind?|Wind blows because the sun warms some places more than others, and air moves between them.
what snow is|What is snow?|Snow is frozen water that falls from clouds as small ice crystals.
what dew is|What is dew?|Dew is water from the air that collects on cool grass at night.
what evaporation is|What is evaporation?|Evaporation is when a liquid turns into a gas, like a puddle drying in the sun.
what the water cycle is|What is the water cycle?|Water rises as vapor, forms clouds, falls as rain and flows back to the sea.
what a volcano is|What is a volcano?|A volcano is an opening in the ground where hot melted rock can come out.
what lava is|What is lava?|Lava is hot melted rock that comes out of a volcano.
what causes an earthquake|What causes an earthquake?|An earthquake happens when large pieces of rock in the ground move suddenly.
what a fossil is|What is a fossil?|A fossil is what is left in stone of a plant or animal from long ago.
what dinosaurs were|What were dinosaurs?|Dinosaurs were reptiles that lived on the Earth millions of years ago.
what an atom is|What is an atom?|An atom is a tiny building block of matter.
what oxygen is|What is oxygen?|Oxygen is a gas in the air that people and animals need to breathe.
what air is made of|What is air made of?|Air is mostly nitrogen and oxygen.
what water is made of|What is water made of?|Water is made of hydrogen and oxygen.
what a magnet does|What does a magnet do?|A magnet attracts iron and some other metals.
what metals magnets attract|What do magnets attract?|Magnets attract iron, nickel and cobalt.
what electricity is|What is electricity?|Electricity is the flow of tiny charges, and it can power lamps and machines.
why metal feels cold|Why does metal feel cold?|Metal feels cold because it quickly carries heat away from your hand.
what friction is|What is friction?|Friction is the force that slows things down when they rub together.
what sound is|What is sound?|Sound is a vibration that travels through air, water or solid things.
how fast light is|How fast is light?|Light travels about 300,000 kilometers in one second.
what an echo is|What is an echo?|An echo is a sound that bounces back to you from a wall or a hill.
why we see our breath in the cold|Why can we see our breath in the cold?|The warm water vapor in our breath cools into tiny drops.
why iron rusts|Why does iron rust?|Iron rusts when it meets water and oxygen.
why wood floats|Why does wood float?|Most wood floats because it is less dense than water.
why a stone sinks|Why does a stone sink?|A stone sinks because it is denser than water.
what fire needs to burn|What does fire need to burn?|Fire needs fuel, heat and oxygen.
how a thermometer works|How does a thermometer work?|In many thermometers a liquid takes up more room when it gets warm and rises in a tube.
what steam is|What is steam?|Steam is water that has become a gas.
what the three states of matter are|What are the three common states of matter?|The three common states are solid, liquid and gas.
why we need sleep|Why do we need sleep?|We need sleep so that the body and the brain can rest and repair themselves.
why we eat|Why do we need to eat?|Food gives us energy and the material to grow.
why we drink water|Why do we need to drink water?|Our body needs water to carry food, stay cool and work well.
why we breathe|Why do we breathe?|We breathe to take in oxygen and to give off carbon dioxide.
what the heart does|What does the heart do?|The heart pumps blood through the body.
what the lungs do|What do the lungs do?|The lungs take oxygen from the air into the blood.
what the brain does|What does the brain do?|The brain controls the body and lets us think, feel and remember.
what the skin does|What does the skin do?|The skin protects the body and lets us feel touch, heat and cold.
what bones do|What do bones do?|Bones hold up the body and protect soft parts like the brain.
what muscles do|What do muscles do?|Muscles pull on bones so that we can move.
what blood does|What does blood do?|Blood carries oxygen and food to all parts of the body.
what the stomach does|What does the stomach do?|The stomach breaks down the food that we eat.
why we sweat|Why do we sweat?|We sweat because drying sweat cools the skin.
why we shiver|Why do we shiver?|We shiver because moving muscles make warmth when we are cold.
why we yawn|Why do we yawn?|We often yawn when we are tired or bored, but nobody knows the reason for certain.
why onions make us cry|Why do onions make us cry?|A cut onion gives off a gas that stings the eyes, and tears wash it away.
why we wash our hands|Why should we wash our hands?|Washing our hands removes germs that can make us sick.
why we brush our teeth|Why should we brush our teeth?|Brushing removes food and bacteria that harm the teeth.
what a germ is|What is a germ?|A germ is a tiny living thing that can make us sick.
why birds can fly|Why can birds fly?|Birds can fly because they have wings, feathers and light bones.
why some birds fly south|Why do some birds fly south in autumn?|They fly south to find food and warmth for the winter.
why birds sing|Why do birds sing?|Birds sing to find a partner and to defend their home.
how fish breathe|How do fish breathe?|Fish breathe in water with their gills.
how whales breathe|How do whales breathe?|Whales come to the surface and breathe air with lungs.
if a whale is a fish|Is a whale a fish?|No, a whale is a mammal.
if a bat is a bird|Is a bat a bird?|No, a bat is a mammal that can fly.
if a penguin can fly|Can a penguin fly?|No, penguins cannot fly, but they swim very well.
if a spider is an insect|Is a spider an insect?|No, a spider is an arachnid, because it has eight legs.
if a tomato is a fruit|Is a tomato a fruit?|Yes, for botanists a tomato is a fruit, but cooks use it as a vegetable.
if the sun is a star|Is the sun a star?|Yes, the sun is a star.
if the Earth is flat|Is the Earth flat?|No, the Earth is round, almost like a ball.
if the moon makes its own light|Does the moon make its own light?|No, the moon reflects the light of the sun.
if fish can live on land|Can fish live on land?|No, almost all fish need water to breathe.
if plants are alive|Are plants alive?|Yes, plants are living things: they grow and make seeds.
if an ostrich can fly|Can an ostrich fly?|No, an ostrich cannot fly, but it runs very fast.
if sharks are mammals|Are sharks mammals?|No, sharks are fish.
if glass is made of sand|Is glass made of sand?|Yes, glass is made mostly from melted sand.
where honey comes from|Where does honey come from?|Honey is made by bees from the nectar of flowers.
how bees make honey|How do bees make honey?|Bees collect nectar from flowers and dry it in the hive until it is honey.
where milk comes from|Where does milk come from?|Most milk that people drink comes from cows.
where wool comes from|Where does wool come from?|Wool comes from sheep.
where paper comes from|Where does paper come from?|Paper is made mostly from wood.
where eggs come from|Where do eggs come from?|Most eggs that people eat come from chickens.
what bread is made of|What is bread made of?|Bread is made of flour, water, salt and often yeast.
what cheese is made of|What is cheese made of?|Cheese is made from milk.
what butter is made of|What is butter made of?|Butter is made from cream.
what glass is made of|What is glass made of?|Glass is made mostly from melted sand.
what chocolate is made of|What is chocolate made of?|Chocolate is made from cocoa beans, usually with sugar.
what raisins are|What are raisins?|Raisins are dried grapes.
what flour is made of|What is flour made of?|Flour is usually made from ground wheat.
why bread rises|Why does bread rise?|Bread rises because yeast makes bubbles of gas in the dough.
how a caterpillar becomes a butterfly|How does a caterpillar become a butterfly?|It makes a hard case around itself and changes inside it.
what a tadpole becomes|What does a tadpole become?|A tadpole becomes a frog or a toad.
why bears sleep in winter|Why do bears sleep in winter?|Bears sleep in winter because there is little food.
what hibernation is|What is hibernation?|Hibernation is a long winter sleep of some animals.
why zebras have stripes|Why do zebras have stripes?|Stripes seem to keep biting flies away, though people still study it.
why camels have humps|Why do camels have humps?|A camel stores fat in its hump and uses it when there is no food.
why giraffes have long necks|Why do giraffes have long necks?|A long neck helps a giraffe reach leaves high in the trees.
why cats purr|Why do cats purr?|Cats often purr when they feel good, and sometimes to calm themselves.
why dogs wag their tails|Why do dogs wag their tails?|Dogs wag their tails to show feelings, often joy.
why spiders make webs|Why do spiders make webs?|Spiders make webs to catch insects.
why leaves fall in autumn|Why do leaves fall in autumn?|Many trees drop their leaves to save water and energy in winter.
why flowers smell|Why do flowers smell nice?|Their smell brings insects that carry pollen.
what pollen is|What is pollen?|Pollen is a fine powder from flowers that plants need to make seeds.
what roots do|What do roots do?|Roots hold a plant in the ground and take up water.
what seeds do|What do seeds do?|Seeds can grow into new plants.
how old trees are counted|How can you tell the age of a tree?|You can count the rings in its trunk, one for each year.
what a mammal is|What is a mammal?|A mammal is an animal that feeds its young with milk.
what a reptile is|What is a reptile?|A reptile is an animal with scaly skin, like a snake or a turtle.
what an insect is|What is an insect?|An insect is a small animal with six legs.
what a herbivore is|What is a herbivore?|A herbivore is an animal that eats plants.
what a carnivore is|What is a carnivore?|A carnivore is an animal that eats meat.
what a food chain is|What is a food chain?|A food chain shows who eats whom, like grass, rabbit, fox.
what recycling is|What is recycling?|Recycling is making new things from used ones.
what pollution is|What is pollution?|Pollution is dirt and harmful material in the air, the water or the soil.
what a desert is|What is a desert?|A desert is a very dry place with little rain.
what an island is|What is an island?|An island is land with water all around it.
what a glacier is|What is a glacier?|A glacier is a large, slow river of ice.
what the equator is|What is the equator?|The equator is an imaginary line around the middle of the Earth.
which direction the sun rises in|Where does the sun rise?|The sun rises in the east.
where the sun sets|Where does the sun set?|The sun sets in the west.
what a computer is|What is a computer?|A computer is a machine that follows instructions and works with information.
what the internet is|What is the internet?|The internet is a network that connects computers all over the world.
what a language model is|What is a language model?|A language model is a program that predicts the next piece of a text.
what a robot is|What is a robot?|A robot is a machine that can do tasks by itself.
what colors make green|What colors make green?|Blue and yellow paint make green.
what colors make orange|What colors make orange?|Red and yellow paint make orange.
what colors make purple|What colors make purple?|Red and blue paint make purple.
what colors make pink|What colors make pink?|Red and white paint make pink.
what colors make gray|What colors make gray?|Black and white paint make gray.
""")

# a thing with its article | what it is
NOUNS = rows("""
a chair|a seat with a back for one person
a table|a piece of furniture with a flat top and legs
a bed|a piece of furniture that you sleep on
a door|a part of a wall that opens so that you can go through
a window|an opening in a wall with glass that lets light in
a house|a building where people live
a school|a place where children learn
a library|a place where you can read and borrow books
a hospital|a place where sick people are treated
a museum|a place where interesting old or beautiful things are shown
a market|a place where people buy and sell things
a bakery|a place where bread and cakes are made and sold
a farm|a place where people grow food and keep animals
a garden|a piece of land where flowers or vegetables grow
a park|a green place in a town where people walk and play
a bridge|a structure that lets people cross a river or a road
a road|a long hard way for cars and people
a river|a long stream of water that flows to a sea or a lake
a lake|a large body of water with land all around
an ocean|a very large body of salt water
a mountain|a very high hill of rock
a valley|low land between hills
a forest|a large area full of trees
a beach|an area of sand or stones next to the sea
a cave|a hollow place in rock
a village|a small group of houses in the country
a city|a large place where many people live and work
a country|a land with its own government
a book|many pages of text or pictures bound together
a pencil|a thin tool for writing and drawing
a letter|a written message, or one sign of the alphabet
a newspaper|printed pages with news
a map|a drawing that shows where places are
a clock|a device that shows the time
a calendar|a table of the days, weeks and months
a lamp|a device that gives light
a mirror|a glass in which you can see yourself
a candle|a stick of wax that gives light when it burns
a blanket|a warm cover for a bed
a pillow|a soft thing for your head in bed
an umbrella|a cover on a stick that keeps you dry in the rain
a key|a small piece of metal that opens a lock
a coin|a round piece of metal money
a wallet|a small case for money
a bicycle|a vehicle with two wheels that you move with your feet
a car|a vehicle with four wheels and an engine
a bus|a large vehicle that carries many people
a train|a row of connected cars that runs on rails
a boat|a small vehicle that moves on water
an airplane|a vehicle with wings that flies
a rocket|a vehicle that can fly into space
a telephone|a device for talking with people far away
a camera|a device that takes pictures
a fridge|a machine that keeps food cold
an oven|a hot box for baking and roasting
a kettle|a pot for boiling water
a spoon|a tool for eating soup
a fork|a tool with points for eating
a hammer|a tool for hitting nails
a ladder|a tool with steps for climbing up
a shovel|a tool for digging
a needle|a thin sharp piece of metal for sewing
a ball|a round thing to play with
a kite|a light toy that flies in the wind on a string
a puzzle|a game in which you fit pieces or ideas together
a guitar|a musical instrument with strings
a piano|a large musical instrument with black and white keys
a drum|a musical instrument that you hit
a song|a short piece of music with words
a story|a telling of things that happened, real or made up
a poem|a text in short lines, often with rhymes
a joke|a short funny story or saying
a friend|a person you like and trust
a neighbor|a person who lives near you
a family|a group of people who belong together, like parents and children
a teacher|a person who helps others learn
a doctor|a person who treats sick people
a farmer|a person who grows food or keeps animals
a sandwich|two slices of bread with something between them
a salad|a dish of raw vegetables
a soup|a hot liquid food
a pancake|a thin flat cake cooked in a pan
a fruit|the sweet part of a plant that holds the seeds
a vegetable|a part of a plant that people eat as food
a flower|the colorful part of a plant that makes seeds
a leaf|a flat green part of a plant
a tree|a tall plant with a trunk of wood
a seed|a small part of a plant that can grow into a new plant
a nest|a home that a bird builds for its eggs
a feather|one of the light parts that cover a bird
a tail|the part at the back end of many animals
a pet|an animal that lives with people
a puppy|a young dog
a kitten|a young cat
a whale|a very large animal that lives in the sea and breathes air
a rorqual|a kind of whale with grooves on its throat, like the blue whale
a birthday|the day of the year on which you were born
a holiday|a day or time when people rest from work or celebrate
a gift|something that you give to someone
a promise|something you say that you will surely do
a secret|something that only a few people know
a mistake|something that was done wrong
a question|a sentence that asks something
a habit|something that you do often, almost without thinking
a dream|pictures and stories in your mind while you sleep
a hobby|something you like to do in your free time
a rule|something that says what you may or must do
""")

# a word | what it means
WORDS = rows("""
brave|not letting fear stop you
kind|friendly and helpful to others
honest|telling the truth
polite|having good manners
patient|able to wait calmly
curious|wanting to know more
lazy|not wanting to work
shy|nervous with other people
proud|pleased with something good that you did
jealous|unhappy because someone has what you want
grateful|feeling thankful
lonely|sad because you are alone
tired|needing rest or sleep
hungry|needing food
thirsty|needing a drink
angry|feeling mad about something
calm|quiet and peaceful
nervous|a little afraid of what will happen
happy|feeling glad
sad|feeling unhappy
empty|with nothing inside
heavy|hard to lift
ancient|very old
huge|very big
tiny|very small
rapid|very fast
silent|without any sound
fragile|easy to break
rare|not seen or found often
famous|known by many people
to borrow|to take something and give it back later
to lend|to give something that you will get back
to whisper|to speak very quietly
to shout|to speak very loudly
to hurry|to move or act fast
to share|to let others have a part
to forgive|to stop being angry with someone
to remember|to keep something in your mind
to forget|to lose something from your mind
to learn|to get new knowledge or skill
to explain|to make something easy to understand
to promise|to say that you will surely do something
to celebrate|to do something special on a happy day
to repair|to make a broken thing work again
to explore|to look around a new place
to imagine|to make a picture in your mind
to collect|to bring things together
to protect|to keep safe
courage|being able to do what frightens you
friendship|the bond between people who like and trust each other
patience|being able to wait calmly
kindness|being good and helpful to others
honesty|telling the truth
""")
