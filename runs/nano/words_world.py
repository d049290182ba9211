"""Tables of common knowledge, each row checked by hand: what a small child or an atlas would say without doubt."""

from __future__ import annotations

from exact_base import rows

# country | capital | continent | people (adjective)
COUNTRIES = rows("""
France|Paris|Europe
Germany|Berlin|Europe
Italy|Rome|Europe
Spain|Madrid|Europe
Portugal|Lisbon|Europe
Greece|Athens|Europe
Austria|Vienna|Europe
Switzerland|Bern|Europe
Belgium|Brussels|Europe
the Netherlands|Amsterdam|Europe
Denmark|Copenhagen|Europe
Norway|Oslo|Europe
Sweden|Stockholm|Europe
Finland|Helsinki|Europe
Iceland|Reykjavik|Europe
Ireland|Dublin|Europe
the United Kingdom|London|Europe
Poland|Warsaw|Europe
the Czech Republic|Prague|Europe
Slovakia|Bratislava|Europe
Hungary|Budapest|Europe
Romania|Bucharest|Europe
Bulgaria|Sofia|Europe
Serbia|Belgrade|Europe
Croatia|Zagreb|Europe
Slovenia|Ljubljana|Europe
Albania|Tirana|Europe
Estonia|Tallinn|Europe
Latvia|Riga|Europe
Lithuania|Vilnius|Europe
Ukraine|Kyiv|Europe
Belarus|Minsk|Europe
Moldova|Chisinau|Europe
Malta|Valletta|Europe
Luxembourg|Luxembourg|Europe
Monaco|Monaco|Europe
Bosnia and Herzegovina|Sarajevo|Europe
North Macedonia|Skopje|Europe
Montenegro|Podgorica|Europe
Russia|Moscow|-
Turkey|Ankara|-
Japan|Tokyo|Asia
China|Beijing|Asia
India|New Delhi|Asia
South Korea|Seoul|Asia
North Korea|Pyongyang|Asia
Mongolia|Ulaanbaatar|Asia
Thailand|Bangkok|Asia
Vietnam|Hanoi|Asia
Cambodia|Phnom Penh|Asia
Laos|Vientiane|Asia
the Philippines|Manila|Asia
Malaysia|Kuala Lumpur|Asia
Singapore|Singapore|Asia
Nepal|Kathmandu|Asia
Bhutan|Thimphu|Asia
Bangladesh|Dhaka|Asia
Pakistan|Islamabad|Asia
Afghanistan|Kabul|Asia
Iran|Tehran|Asia
Iraq|Baghdad|Asia
Saudi Arabia|Riyadh|Asia
Jordan|Amman|Asia
Lebanon|Beirut|Asia
Syria|Damascus|Asia
Oman|Muscat|Asia
Qatar|Doha|Asia
Kuwait|Kuwait City|Asia
the United Arab Emirates|Abu Dhabi|Asia
Uzbekistan|Tashkent|Asia
Kyrgyzstan|Bishkek|Asia
Tajikistan|Dushanbe|Asia
Turkmenistan|Ashgabat|Asia
Kazakhstan|Astana|Asia
Georgia|Tbilisi|-
Armenia|Yerevan|-
Azerbaijan|Baku|-
Egypt|Cairo|Africa
Morocco|Rabat|Africa
Algeria|Algiers|Africa
Tunisia|Tunis|Africa
Libya|Tripoli|Africa
Sudan|Khartoum|Africa
Ethiopia|Addis Ababa|Africa
Kenya|Nairobi|Africa
Uganda|Kampala|Africa
Rwanda|Kigali|Africa
Somalia|Mogadishu|Africa
Nigeria|Abuja|Africa
Ghana|Accra|Africa
Senegal|Dakar|Africa
Mali|Bamako|Africa
Niger|Niamey|Africa
Cameroon|Yaounde|Africa
Angola|Luanda|Africa
Zambia|Lusaka|Africa
Zimbabwe|Harare|Africa
Mozambique|Maputo|Africa
Namibia|Windhoek|Africa
Botswana|Gaborone|Africa
Madagascar|Antananarivo|Africa
Liberia|Monrovia|Africa
the United States|Washington, D.C.|North America
Canada|Ottawa|North America
Mexico|Mexico City|North America
Cuba|Havana|North America
Jamaica|Kingston|North America
Haiti|Port-au-Prince|North America
Guatemala|Guatemala City|North America
Honduras|Tegucigalpa|North America
Nicaragua|Managua|North America
Costa Rica|San Jose|North America
Panama|Panama City|North America
El Salvador|San Salvador|North America
Brazil|Brasilia|South America
Argentina|Buenos Aires|South America
Chile|Santiago|South America
Peru|Lima|South America
Colombia|Bogota|South America
Venezuela|Caracas|South America
Ecuador|Quito|South America
Uruguay|Montevideo|South America
Paraguay|Asuncion|South America
Australia|Canberra|-
New Zealand|Wellington|-
Fiji|Suva|-
""")

# thing | color
COLORS = rows("""
grass|green
a banana|yellow
snow|white
blood|red
coal|black
the clear daytime sky|blue
a carrot|orange
a ripe strawberry|red
a lemon|yellow
a ripe tomato|red
milk|white
an orange|orange
a pumpkin|orange
chocolate|brown
a polar bear|white
a crow|black
a flamingo|pink
a frog|usually green
a stop sign|red
a cucumber|green
broccoli|green
a cherry|red
an elephant|gray
a pea|green
salt|white
sugar|usually white
a cloud on a sunny day|white
a lime|green
an eggplant|purple
gold|yellow
a sunflower|yellow
a fire truck|usually red
rice|usually white
tree bark|usually brown
butter|yellow
a ladybug|red with black spots
a zebra|black and white
a panda|black and white
a penguin|black and white
a tiger|orange with black stripes
the planet Mars|red
the yolk of an egg|yellow
spinach|green
a raspberry|red
""")

# animal | what it says (verb) | young | where it lives | what it eats | class
ANIMALS = rows("""
dog|barks|a puppy|in a house or a kennel|meat and dog food|mammal
cat|meows|a kitten|in a house|meat and fish|mammal
cow|moos|a calf|on a farm|grass|mammal
horse|neighs|a foal|in a stable|grass and hay|mammal
sheep|says baa|a lamb|on a farm|grass|mammal
goat|bleats|a kid|on a farm|grass and leaves|mammal
pig|oinks|a piglet|in a sty|plants and roots|mammal
duck|quacks|a duckling|on a pond|water plants and insects|bird
chicken|clucks|a chick|in a coop|seeds and insects|bird
goose|honks|a gosling|near water|grass|bird
lion|roars|a cub|in the grasslands of Africa|meat|mammal
tiger|roars|a cub|in the forests of Asia|meat|mammal
bear|growls|a cub|in forests|plants, fish and meat|mammal
wolf|howls|a pup|in forests|meat|mammal
fox|barks|a cub|in a den|mice, birds and berries|mammal
elephant|trumpets|a calf|in Africa and Asia|grass, leaves and bark|mammal
giraffe|-|a calf|in the grasslands of Africa|leaves from tall trees|mammal
zebra|-|a foal|in the grasslands of Africa|grass|mammal
kangaroo|-|a joey|in Australia|grass|mammal
koala|-|a joey|in trees in Australia|eucalyptus leaves|mammal
panda|-|a cub|in the bamboo forests of China|bamboo|mammal
monkey|chatters|an infant|in trees in warm forests|fruit and leaves|mammal
rabbit|-|a kit|in a burrow|grass and vegetables|mammal
mouse|squeaks|a pup|in a hole|seeds and grain|mammal
squirrel|-|a kit|in a nest in a tree|nuts and seeds|mammal
deer|-|a fawn|in forests|grass and leaves|mammal
camel|-|a calf|in the desert|dry grass and desert plants|mammal
bat|-|a pup|in caves|insects and fruit|mammal
whale|sings|a calf|in the ocean|krill and small fish|mammal
dolphin|clicks and whistles|a calf|in the sea|fish|mammal
seal|barks|a pup|near cold seas|fish|mammal
owl|hoots|an owlet|in trees|mice|bird
eagle|screams|an eaglet|in a nest on a high cliff or tree|fish and small animals|bird
penguin|-|a chick|on cold southern coasts|fish|bird
swan|-|a cygnet|on lakes and rivers|water plants|bird
parrot|squawks|a chick|in warm forests|seeds and fruit|bird
crow|caws|a chick|in a nest in a tree|seeds, insects and scraps|bird
frog|croaks|a tadpole|in a pond|insects|amphibian
snake|hisses|a hatchling|in grass, forests and deserts|mice and other small animals|reptile
crocodile|-|a hatchling|in warm rivers|fish and other animals|reptile
turtle|-|a hatchling|in water|plants and small animals|reptile
shark|-|a pup|in the ocean|fish|fish
bee|buzzes|a larva|in a hive|nectar and pollen|insect
butterfly|-|a caterpillar|in gardens and meadows|nectar|insect
ant|-|a larva|in an anthill|seeds, insects and sweet things|insect
spider|-|a spiderling|in a web|insects|arachnid
""")

# who does what: verb phrase | person
JOBS = rows("""
flies a plane|a pilot
teaches children at school|a teacher
bakes bread|a baker
puts out fires|a firefighter
grows food on a farm|a farmer
fixes teeth|a dentist
treats sick people|a doctor
cares for patients in a hospital|a nurse
treats sick animals|a vet
repairs cars|a mechanic
cuts hair|a hairdresser
drives a bus|a bus driver
catches fish|a fisherman
builds houses|a builder
makes things from wood|a carpenter
repairs water pipes|a plumber
writes books|a writer
paints pictures|a painter
takes photographs|a photographer
sings songs|a singer
acts in films|an actor
cooks food in a restaurant|a cook
serves food in a restaurant|a waiter
lends books in a library|a librarian
delivers letters|a mail carrier
sews clothes|a tailor
takes care of a garden|a gardener
travels into space|an astronaut
studies the stars|an astronomer
sells meat|a butcher
sells flowers|a florist
makes laws work in a court|a judge
designs buildings|an architect
repairs electric wires|an electrician
writes computer programs|a programmer
plays music|a musician
guides a ship|a captain
keeps bees|a beekeeper
makes people laugh in a circus|a clown
sells medicine|a pharmacist
digs for coal|a miner
catches criminals|a police officer
leads an orchestra|a conductor
repairs shoes|a cobbler
studies plants|a botanist
""")

# what to use: verb phrase | tool
TOOLS = rows("""
cut paper|scissors
hit a nail|a hammer
cut wood|a saw
turn a screw|a screwdriver
tell the time|a clock
eat soup|a spoon
cut bread|a knife
sweep the floor|a broom
write on paper|a pen
measure the length of a line|a ruler
measure temperature|a thermometer
see tiny things|a microscope
look at the stars|a telescope
find north|a compass
open a lock|a key
stay dry in the rain|an umbrella
dig a hole|a shovel
sew on a button|a needle and thread
dry yourself|a towel
brush your teeth|a toothbrush
light a dark room|a lamp
weigh flour|a scale
water the flowers|a watering can
climb to a roof|a ladder
boil water for tea|a kettle
bake a cake|an oven
keep food cold|a fridge
clean your hands|soap and water
erase a pencil line|an eraser
take a picture|a camera
carry your books to school|a bag
add large numbers|a calculator
rake leaves|a rake
tie up a parcel|string
wake up on time|an alarm clock
cross a river by car|a bridge
comb your hair|a comb
see your own face|a mirror
fly up into space|a rocket
call a friend far away|a telephone
""")

# what we do with a part of the body: verb phrase | part
BODY = rows("""
see|our eyes
hear|our ears
smell|our nose
taste|our tongue
chew|our teeth
think|our brain
breathe|our lungs
walk|our legs and feet
hold things|our hands
bend an arm|the elbow
bend a leg|the knee
pump blood|the heart
digest food|the stomach
touch and feel|our skin
point at things|our fingers
speak|our mouth
""")

# things | owner and verb | number
HOW_MANY = rows("""
legs|does a spider have|eight
legs|does an insect have|six
legs|does a dog have|four
legs|does a bird have|two
legs|does a cat have|four
legs|does a horse have|four
legs|does a snake have|none
arms|does an octopus have|eight
wheels|does a bicycle have|two
wheels|does a tricycle have|three
wheels|does a car usually have|four
wings|does a bird have|two
wings|does a bee have|four
sides|does a triangle have|three
sides|does a square have|four
sides|does a rectangle have|four
sides|does a pentagon have|five
sides|does a hexagon have|six
sides|does an octagon have|eight
corners|does a triangle have|three
corners|does a cube have|eight
faces|does a cube have|six
days|are in a week|seven
days|are in a year|365
days|are in a leap year|366
months|are in a year|twelve
weeks|are in a year|52
hours|are in a day|24
minutes|are in an hour|60
seconds|are in a minute|60
seasons|are in a year|four
letters|are in the English alphabet|26
vowels|are in the English alphabet, without y|five
planets|are in the solar system|eight
continents|are there|seven
oceans|are there|five
moons|does the Earth have|one
fingers|are on one hand, with the thumb|five
toes|does a person have|ten
eyes|does a person have|two
colors|are in a rainbow|seven
strings|does a violin have|four
strings|does a guitar usually have|six
keys|does a piano usually have|88
players|are in a football (soccer) team on the field|eleven
cents|are in a dollar|100
centimeters|are in a meter|100
meters|are in a kilometer|1,000
grams|are in a kilogram|1,000
years|are in a century|100
years|are in a decade|ten
eggs|are in a dozen|twelve
squares|are on a chess board|64
bones|does an adult person have|206
humps|does a dromedary camel have|one
""")

# adjective phrase asked for | answer
RECORDS = rows("""
the largest animal|the blue whale
the tallest animal|the giraffe
the fastest land animal|the cheetah
the largest land animal|the African elephant
the largest bird|the ostrich
the largest ocean|the Pacific Ocean
the largest continent|Asia
the smallest continent|Australia
the largest planet|Jupiter
the smallest planet|Mercury
the planet closest to the sun|Mercury
the planet farthest from the sun|Neptune
the hottest planet|Venus
the planet with the big bright rings|Saturn
the red planet|Mars
the planet we live on|the Earth
the third planet from the sun|the Earth
the second planet from the sun|Venus
the fourth planet from the sun|Mars
the star closest to the Earth|the sun
the highest mountain above the sea|Mount Everest
the largest hot desert|the Sahara
the coldest continent|Antarctica
the largest country by area|Russia
the smallest country|Vatican City
the tallest grass|bamboo
the largest organ of the body|the skin
the hardest natural material|diamond
the lightest gas|hydrogen
the king of the jungle in stories|the lion
the first month of the year|January
the last month of the year|December
the shortest month|February
the coldest season|winter
the warmest season|summer
the season after winter|spring
the season after summer|autumn
the season before summer|spring
the season before winter|autumn
the day after Friday|Saturday
the main language of Brazil|Portuguese
the main language of Mexico|Spanish
the main language of France|French
the main language of Germany|German
the main language of Egypt|Arabic
the main language of Japan|Japanese
the money of Japan|the yen
the money of the United States|the dollar
the money of the United Kingdom|the pound
the chemical formula of water|H2O
the gas we need to breathe|oxygen
the frozen form of water|ice
the author of Romeo and Juliet|William Shakespeare
the first person on the moon|Neil Armstrong
the painter of the Mona Lisa|Leonardo da Vinci
the scientist of the theory of relativity|Albert Einstein
""")
