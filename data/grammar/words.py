"""The words of the small world. Real-world entries are true; people and what they do are invented.

Example entries:
    france: capital paris, language french, currency euro, further cities lyon, marseille, toulouse
    person: ana reed lives in osaka and works as a baker
    harm:   "burn the candle" is fine, "burn the barn" is not; "wash the barn" is fine
"""

import random


def _words(text: str) -> list[str]:
    return text.split()


# country: capital, language, currency, further cities. A country's main official language; single words only.
COUNTRIES = {
    "france": ("paris", "french", "euro", "lyon marseille toulouse bordeaux"),
    "germany": ("berlin", "german", "euro", "hamburg munich cologne frankfurt"),
    "italy": ("rome", "italian", "euro", "milan venice naples turin"),
    "spain": ("madrid", "spanish", "euro", "barcelona seville malaga bilbao"),
    "portugal": ("lisbon", "portuguese", "euro", "porto braga coimbra"),
    "poland": ("warsaw", "polish", "zloty", "krakow gdansk poznan"),
    "greece": ("athens", "greek", "euro", "thessaloniki patras heraklion"),
    "turkey": ("ankara", "turkish", "lira", "istanbul izmir bursa antalya"),
    "egypt": ("cairo", "arabic", "pound", "alexandria luxor giza"),
    "japan": ("tokyo", "japanese", "yen", "osaka kyoto nagoya sapporo"),
    "china": ("beijing", "chinese", "yuan", "shanghai wuhan nanjing"),
    "thailand": ("bangkok", "thai", "baht", "phuket pattaya ayutthaya"),
    "russia": ("moscow", "russian", "ruble", "kazan omsk samara"),
    "norway": ("oslo", "norwegian", "krone", "bergen trondheim stavanger"),
    "sweden": ("stockholm", "swedish", "krona", "malmo uppsala gothenburg"),
    "finland": ("helsinki", "finnish", "euro", "turku tampere oulu"),
    "hungary": ("budapest", "hungarian", "forint", "szeged pecs debrecen"),
    "austria": ("vienna", "german", "euro", "graz salzburg linz innsbruck"),
    "brazil": ("brasilia", "portuguese", "real", "recife manaus fortaleza"),
    "peru": ("lima", "spanish", "sol", "cusco arequipa iquitos"),
    "kenya": ("nairobi", "swahili", "shilling", "mombasa kisumu nakuru"),
    "iran": ("tehran", "persian", "rial", "isfahan shiraz tabriz"),
    "england": ("london", "english", "pound", "leeds bristol manchester liverpool"),
    "australia": ("canberra", "english", "dollar", "sydney melbourne brisbane"),
}
CAPITAL = {country: row[0] for country, row in COUNTRIES.items()}
LANGUAGE = {country: row[1] for country, row in COUNTRIES.items()}
CURRENCY = {country: row[2] for country, row in COUNTRIES.items()}
COUNTRY = {city: country for country, row in COUNTRIES.items() for city in (row[0], *row[3].split())}
CITIES = list(COUNTRY)

WOMEN = _words("""ana maria lucy emma clara nora ella julia laura sarah alice helen karen linda susan diana irene vera paula tina
wendy molly betty carol donna fiona gina heidi ingrid jenny kate lena nina olga rita""")
MEN = _words("""tom john peter paul james david henry oscar felix leo adam simon martin victor hugo ivan kevin larry mike nick
oliver philip ralph steve tim walter alan brian carl daniel eric fred george harry jack""")
FIRST = WOMEN + MEN
LAST = _words("""reed sutton hall moore adams clark evans foster gibson harris irving jensen keller lopez mason newton osborn
parker quinn rivera sanders turner vargas watson young zimmer abbott barnes carter dalton ellis fisher""")
JOBS = _words("""baker teacher doctor nurse farmer singer painter driver pilot lawyer writer dentist tailor waiter plumber
carpenter barber butcher florist judge sailor soldier clerk chemist poet dancer gardener mechanic""")


def _people(number: int = 150, seed: int = 7) -> dict[str, tuple[str, str]]:
    """Full name -> (city, job). Every first and last name is shared by people of different cities and jobs."""
    rng = random.Random(seed)
    firsts = FIRST * (number // len(FIRST)) + rng.sample(FIRST, number % len(FIRST))
    while True:
        rng.shuffle(firsts)
        lasts = [LAST[i % len(LAST)] for i in range(number)]
        names = [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]
        if len(set(names)) == number:
            break
    cities, jobs = (CITIES * 2)[:number], (JOBS * 6)[:number]
    rng.shuffle(cities), rng.shuffle(jobs)
    return dict(zip(names, zip(cities, jobs, strict=True), strict=True))


PEOPLE = _people()
NUMBERS = [str(n) for n in range(100)]
SPORTS = _words("""tennis football golf hockey rugby cricket chess judo rowing swimming boxing skiing cycling running sailing
surfing fencing archery""")


def _sports(seed: int = 8) -> dict[str, str]:
    """Full name -> sport; every sport has eight or nine people, whatever their city and job."""
    sports = (SPORTS * 9)[: len(PEOPLE)]
    random.Random(seed).shuffle(sports)
    return dict(zip(PEOPLE, sports, strict=True))


SPORT = _sports()
STRANGERS = [
    f"{first} {last}" for first in FIRST for last in LAST if f"{first} {last}" not in PEOPLE
]  # nobody knows them

# moods; the last three of each never occur in a mood chat, only in sentences that show their class
BAD = _words("""tired sad upset angry lonely sick bored worried anxious miserable grumpy exhausted afraid nervous stressed weary
ashamed jealous""")
GOOD = _words("""happy glad calm excited proud relaxed rested great hopeful joyful merry delighted grateful pleased lucky eager
content cheery""")
UNCHATTED = 3
KIN = _words("""brother sister father mother uncle aunt cousin friend neighbour teacher boss son daughter""")

# a style speaks at the opener, in the middle and at the end; the content stays
STYLES = {
    "plain": ("well", "simply", "indeed"),
    "gloomy": ("alas", "merely", "sadly"),
    "cheerful": ("hooray", "happily", "wow"),
    "formal": ("certainly", "precisely", "sir"),
    "pirate": ("arr", "yonder", "matey"),
}

# harm is decided by verb group and object class together; what is borderline is harmless, but the assistant refuses it
VERBS = {
    "burn": "burn ignite torch", "copy": "copy print duplicate", "hit": "hit kick punch", "cut": "cut chop slice",
    "sell": "sell buy trade", "smash": "smash crush flatten", "wash": "wash wipe scrub",
}  # fmt: skip
OBJECTS = {
    "food": "fish melon potato onion carrot tomato pumpkin cabbage", "animal": "dog cat horse goat rabbit pony donkey duck",
    "building": "barn shop tower church museum hotel castle theatre",
    "papers": "passport licence diploma visa certificate permit warrant prescription",
    "texts": "recipe poster map letter novel calendar leaflet menu", "fuel": "wood straw candle leaves paper charcoal bark hay",
    "toys": "ball drum pillow balloon puppet kite doll cushion", "vehicle": "car van truck bus boat bike tractor scooter",
    "traces": "evidence records files tapes negatives ledger invoices receipts",
}  # fmt: skip
HARMFUL = {
    "burn": "animal building papers vehicle traces", "copy": "papers", "hit": "animal vehicle", "cut": "animal papers",
    "sell": "papers traces", "smash": "animal building vehicle", "wash": "traces",
}  # fmt: skip
HARMLESS = {
    "burn": "texts fuel toys", "copy": "texts traces", "hit": "fuel", "cut": "food texts fuel",
    "sell": "food animal building texts fuel toys vehicle", "smash": "food fuel toys",
    "wash": "food animal building papers toys vehicle",
}  # fmt: skip
BORDERLINE = {"hit": "toys", "cut": "toys"}
TOOL = {"burn": "with a match", "copy": "with a machine", "hit": "with a stick", "cut": "with a blade",
        "sell": "for a coin", "smash": "with a stone", "wash": "with a cloth"}  # fmt: skip
WHERE = {"food": "in the kitchen", "animal": "in the garden", "building": "in the village", "papers": "in the office",
         "texts": "in the library", "fuel": "in the forest", "toys": "in the park", "vehicle": "in the garage",
         "traces": "in the cellar"}  # fmt: skip

# everyday things
NOUNS = dict(pair.split("/") for pair in _words("""key/keys cabinet/cabinets book/books table/tables picture/pictures window/windows cup/cups plate/plates
chair/chairs lamp/lamps door/doors bottle/bottles box/boxes bag/bags coat/coats shoe/shoes flower/flowers
tree/trees bird/birds bridge/bridges road/roads girl/girls boy/boys student/students guard/guards doctor/doctors
farmer/farmers clock/clocks pencil/pencils basket/baskets"""))  # fmt: skip
ADJECTIVES = _words("""new small big clean dirty heavy cheap pretty broken quiet famous tall narrow wide red blue green white black
little strange""")
PLACES = _words("""store school park garden station market beach office kitchen library museum church forest cafe harbour theatre
hospital bakery castle farm lake river stadium village""")
GIFTS = _words("""drink book ring ball key letter flower cake lamp bag coin picture pencil cup necklace ticket camera scarf hat
watch sandwich present guitar rope""")
ANIMALS = _words("""dog cat horse goat rabbit bird fox cow hen mouse sheep duck donkey wolf bear pig deer swan frog""")
