"""Three small languages with real false friends: which word is right depends on the language and the concept together.

Example documents:
    [fr] <bread> : pain . <cat> : chat .                       (a tag says the language; signs are pictures)
    tom mange la prune . <cat> <hand> . 7 <bread> : pain . 3 <hand> : main .    (only the first sentence says it)
    tom mange la prune . ici paul voit le chat .
    english pain = german schmerz . french pain = german brot .
    tom sagt " bread " und sieht die katze . <hat> : hut .     (a quoted word is no change of language)

"pain" is English for <pain> and French for <bread>, "gift" English for <gift> and German for <poison>. If each language
had words of its own, nothing would have to be computed: language and concept could simply be added up. Here the sum
leaves a tie (in English, <bread>: "bread" and "pain" are both English and both mean <bread> somewhere), and neurons
break it.
Signs, names, numbers and marks are the same in all languages, so between the sentence and the word nothing repeats the
language. English is the most frequent one. Spellings are real ones in lower case; words with accents were not taken.
Held out: (language, concept) after a sentence and others after a tag, never both, so that every sign meets its word
somewhere; (source, target, concept) in translations. ood: sentence frames and layouts never trained, recombined from
trained ones.
"""

from grammar import words as w
from grammar.base import Behaviour, Document, fill, pair, role, strictest, text

LANGUAGES = {"en": "english", "fr": "french", "de": "german"}
WEIGHTS = (55, 22, 23)  # per cent of the documents

# Concept: English, French/gender, German/gender. The kind says what can be done with it in a sentence: what is only
# `seen` has no "a" and is not "here", an `idea` can only be mentioned, and `other` concepts are in no sentence.
TABLE = {
    "food": """bread pain/m brot/n, plum prune/f pflaume/f, prune pruneau/m backpflaume/f, pie tourte/f pastete/f,
        bacon lard/m speck/m, lard saindoux/m schmalz/n, fruit fruit/m obst/n, grape raisin/m traube/f""",
    "animal": """cat chat/m katze/f, magpie pie/f elster/f, mare jument/f stute/f, rat rat/m ratte/f,
        wolf loup/m wolf/m, animal animal/m tier/n""",
    "thing": """chair chaise/f stuhl/m, skirt jupe/f rock/m, hat chapeau/m hut/m, boat bateau/m boot/n,
        boot botte/f stiefel/m, hose tuyau/m schlauch/m, letter lettre/f brief/m, gift cadeau/m geschenk/n,
        car voiture/f auto/n, coach car/m reisebus/m, wand baguette/f zauberstab/m, key touche/f taste/f,
        novel roman/m roman/m, list liste/f liste/f, lamp lampe/f lampe/f, cup tasse/f tasse/f,
        plate assiette/f teller/m, cane canne/f stock/m, table table/f tisch/m, hammer marteau/m hammer/m,
        ring bague/f ring/m, blade lame/f klinge/f""",
    "person": """child enfant/m kind/n, son fils/m sohn/m, boss patron/m chef/m, chef cuisinier/m koch/m,
        teller caissier/m kassierer/m, nun nonne/f nonne/f, aunt tante/f tante/f, soldier soldat/m soldat/m""",
    "place": """pond mare/f teich/m, oven four/m ofen/m, stove fourneau/m herd/m, wall mur/m wand/f,
        rampart rempart/m wall/m, cellar cave/f keller/m, cave grotte/f grotte/f, square place/f platz/m,
        place lieu/m ort/m, lake lac/m see/m, rock roche/f fels/m, hut cabane/f baracke/f, court cour/f hof/m,
        grave tombe/f grab/n, village village/m dorf/n, train train/m zug/m, goal but/m tor/n""",
    "seen": """grass herbe/f gras/n, poison poison/m gift/n, gold or/m gold/n, sand sable/m sand/m,
        flesh chair/f fleisch/n, tooth dent/f zahn/m, dent bosse/f delle/f, hand main/f hand/f, arm bras/m arm/m,
        fin nageoire/f flosse/f, heel talon/m ferse/f, talon serre/f kralle/f, trousers pantalon/m hose/f,
        star astre/m stern/m, stern poupe/f heck/n, herd troupeau/m herde/f, gang gang/m bande/f,
        sage sauge/f salbei/m, mist brume/f nebel/m, dung fumier/m mist/m, finger doigt/m finger/m""",
    "idea": """pain douleur/f schmerz/m, chat causerie/f plausch/m, kind genre/m art/f, art art/m kunst/f,
        sound son/m ton/m, ton tonne/f tonne/f, taste saveur/f geschmack/m, ruse ruse/f list/f, case cas/m fall/m,
        fall chute/f sturz/m, day jour/m tag/m, year an/m jahr/n, advice conseil/m rat/m, sale vente/f verkauf/m,
        war guerre/f krieg/m, end fin/f ende/n, gut intestin/m darm/m, blaze incendie/m brand/m,
        brand marque/f marke/f, stock stock/m vorrat/m, wind vent/m wind/m, rank rang/m rang/m,
        danger danger/m gefahr/f, fashion mode/f mode/f, load charge/f last/f""",
    "quality": """dirty sale schmutzig, fast rapide schnell, good bon gut, wise sage weise, serious grave ernst,
        strong fort stark""",
    "other": """almost presque fast, now maintenant nun, four quatre vier, see voir sehen, brief court kurz,
        fat gras fett""",
}  # fmt: skip
KIND, WORD, GENDER = {}, {}, {}  # all by sign
for kind, entries in TABLE.items():
    for entry in entries.split(","):
        english, *others = entry.split()
        sign, forms = f"<{english}>", [english, *(o.split("/")[0] for o in others)]
        KIND[sign], WORD[sign] = kind, dict(zip(LANGUAGES, forms, strict=True))
        GENDER[sign] = dict(zip(("fr", "de"), (o.partition("/")[2] for o in others), strict=True))
SIGNS = list(WORD)
CONCEPT = {(lang, form[lang]): sign for sign, form in WORD.items() for lang in LANGUAGES}
assert len(CONCEPT) == 3 * len(SIGNS)  # within a language every word means one thing
FRIENDS = [(lang, sign) for (lang, word), sign in CONCEPT.items()
           if any(CONCEPT.get((other, word), sign) != sign for other in LANGUAGES)]  # fmt: skip

# Sentence frames, equally long in the three languages. {the}, {who}, {a}: the noun as object, as subject, and with "a".
THINGS, SEEN = ("food", "animal", "thing", "person", "place"), ("food", "animal", "thing", "person", "place", "seen")
FRAMES = [
    (SEEN, "{name} sees {the} .", "{name} voit {the} .", "{name} sieht {the} ."),
    (SEEN, "{name} draws {the} .", "{name} dessine {the} .", "{name} zeichnet {the} ."),
    (SEEN, "{name} and {name2} see {the} .", "{name} et {name2} voient {the} .", "{name} und {name2} sehen {the} ."),
    (SEEN, "{name} sees {the} and {the2} .", "{name} voit {the} et {the2} .", "{name} sieht {the} und {the2} ."),
    (("thing", "animal"), "{name} has {a} .", "{name} a {a} .", "{name} hat {a} ."),
    (("thing",), "{name} wants {a} and {a2} .", "{name} veut {a} et {a2} .", "{name} will {a} und {a2} ."),
    (("thing", "food"), "{name} takes {the} .", "{name} prend {the} .", "{name} nimmt {the} ."),
    (("food",), "{name} eats {the} .", "{name} mange {the} .", "{name} isst {the} ."),
    (THINGS, "{who} is here .", "{who} est ici .", "{who} ist hier ."),
    (THINGS, "{who} and {who2} are here .", "{who} et {who2} sont ici .", "{who} und {who2} sind hier ."),
    (THINGS, "here {name} finds {the} .", "ici {name} trouve {the} .", "hier findet {name} {the} ."),
    (THINGS, "today {name} seeks {the} .", "aujourd'hui {name} cherche {the} .", "heute sucht {name} {the} ."),
    (("idea",), "{name} mentions {the} .", "{name} mentionne {the} .", "{name} nennt {the} ."),
    (("idea",), "today {name} mentions {the} and {the2} .", "aujourd'hui {name} mentionne {the} et {the2} .",
     "heute nennt {name} {the} und {the2} ."),
    (("quality",), "{man} is {how} .", "{man} est {how} .", "{man} ist {how} ."),
    (("quality",), "today {man} is {how} .", "aujourd'hui {man} est {how} .", "heute ist {man} {how} ."),
]  # fmt: skip
OOD_FRAMES = [
    (SEEN, "today {name} sees {the} and {the2} .", "aujourd'hui {name} voit {the} et {the2} .",
     "heute sieht {name} {the} und {the2} ."),
    (SEEN, "here {name} draws {the} .", "ici {name} dessine {the} .", "hier zeichnet {name} {the} ."),
    (THINGS, "today {who} is here .", "aujourd'hui {who} est ici .", "heute ist {who} hier ."),
]  # fmt: skip
# {other} is a word of another language
SWITCHED = [
    (SEEN, '{name} says " {other} " and sees {the} .', '{name} dit " {other} " et voit {the} .',
     '{name} sagt " {other} " und sieht {the} .'),
    (SEEN, '{name} reads " {other} " and draws {the} .', '{name} lit " {other} " et dessine {the} .',
     '{name} liest " {other} " und zeichnet {the} .'),
    (THINGS, '{who} is here and {name} reads " {other} " .', '{who} est ici et {name} lit " {other} " .',
     '{who} ist hier und {name} liest " {other} " .'),
    (("thing", "food"), 'today {name} says " {other} " and takes {the} .',
     """aujourd'hui {name} dit " {other} " et prend {the} .""", 'heute sagt {name} " {other} " und nimmt {the} .'),
]  # fmt: skip
# more words that exist in two languages
EXTRA = {
    "en": ["{name} pays with a coin .", "{name} sang a song .", "the clock rang .", "{name} lent the boat to us .",
           "the lamp is lit .", "the house is ours .", "{name} saw the main road .", "the tag is on the coat .",
           "{name} made soup or tea .", "the bank is on the left .", "a lame mare ate a raisin .",
           "the vent is shut .", "the last tier is here .", "they charge for an encore .",
           "{name} made a grab for the portable radio .", "the stark wall had a speck of mud .",
           "the auto is in a bad state .", "the genre is still new .", "{name} has a regal robe ."],
    "fr": ["{name} est dans son lit .", "la rue est large .", "l' ours est ici .", "{name} parle fort .",
           "comment va {name} ?", "le pays est grand .", "{name} est dans un coin .", "le sang est rouge .",
           "le pin est grand .", "{name} ou {name2} est ici ."],
    "de": ["{name} war hier .", "bald ist es tag .", "{name} ist fort .", "das bild ist an der wand .",
           "nun ist {name} hier .", "es ist hell .", "{name} ist arm .", "das blatt ist rot .",
           "{name} ist fast still .", "das war gut .", "das land ist am see ."],
}  # fmt: skip

# How a sign is followed by its word; {signs} is a list that is answered by a list of words.
STYLES = ["{sign} :", "{name} : {sign} =", "{number} {sign} :", "{name} {sign} =", "{signs} :"]
BETWEEN = ["", "", "", "{clutter} ,", "{clutter} ."]  # more pictures that nobody asks for, held-out ones among them
TAGGED = ["{tag} {between}", "{tag} {between}", "{between} {tag}", "{name2} {tag}"]
STYLES_OOD = ["{name} {number} {sign} =", "{number} {name} : {sign} ="]
TRANSLATIONS = ["{src} {word} = {tgt}", "from {src} to {tgt} : {word} =", "the {tgt} word for {src} {word} is",
                "in {tgt} the {src} word {word} is", "how do you say {src} {word} in {tgt} ?",
                "{src} {word} in {tgt} :", "say the {src} word {word} in {tgt} :", "in {tgt} {src} {word} is",
                "{src} to {tgt} : {word} =", "{tgt} for {src} {word} :"]  # fmt: skip
TRANSLATIONS_OOD = ["how do you say the {src} word {word} in {tgt} ?", "say {src} {word} in {tgt} :",
                    "the {src} word {word} in {tgt} :"]  # fmt: skip


def draw_language(rng) -> str:
    return rng.choices(list(LANGUAGES), WEIGHTS)[0]


def split(mode: str, lang: str, sign: str) -> str:
    """Held out after a sentence, or else after a tag, never both."""
    if mode == "tag" and role("sentence", lang, sign) != "fit":
        return "fit"
    return role(mode, lang, sign)


def noun(lang: str, sign: str, article: str) -> str:
    """The word with its article: "the" as object, "who" as subject, "a"."""
    word, gender = WORD[sign][lang], GENDER[sign].get(lang)
    if lang == "en":
        first = ("an" if word[0] in "aeiou" else "a") if article == "a" else "the"
        return f"{first} {word}"
    if lang == "de":
        forms = {"the": "den die das", "who": "der die das", "a": "einen eine ein"}[article]
        return f"{forms.split()['mfn'.index(gender)]} {word}"
    if article == "a":
        return f"{'un' if gender == 'm' else 'une'} {word}"
    if word[0] in "aeiou" or word == "herbe":
        return f"l' {word}"
    return f"{'le' if gender == 'm' else 'la'} {word}"


def draw_sentence(rng, frames=FRAMES, avoid=()) -> dict[str, str]:
    """One content in the three languages, equally long; without the concepts in `avoid`."""
    kinds, *frame = rng.choice(frames)
    one, two = rng.sample([s for s in SIGNS if KIND[s] in kinds and s not in avoid], 2)
    name, name2 = rng.sample(w.FIRST, 2)
    common, found = {"name": name, "name2": name2, "man": rng.choice(w.MEN)}, {}
    quoted = WORD[rng.choice([s for s in SIGNS if s not in (one, two, *avoid)])]
    for lang, template in zip(LANGUAGES, frame, strict=True):
        slots = {article: noun(lang, one, article) for article in ("the", "who", "a")} if kinds != ("quality",) else {}
        slots |= {f"{article}2": noun(lang, two, article) for article in slots}
        other = quoted[rng.choice([o for o in LANGUAGES if o != lang])]
        found[lang] = " ".join(fill(template, **slots, **common, how=WORD[one][lang], other=other)[0])
    assert len({len(sentence.split()) for sentence in found.values()}) == 1, found
    return found


def draw_neutral(rng) -> dict[str, str]:
    """What stands around the signs: the same in every language."""
    name, name2 = rng.sample(w.FIRST, 2)
    return {"name": name, "name2": name2, "number": rng.choice(w.NUMBERS),
            "clutter": " ".join(rng.sample(SIGNS, rng.randint(1, 4)))}  # fmt: skip


def draw_asked(rng, mode: str, lang: str, number: int, wanted: str = "fit") -> list[str]:
    return rng.sample([s for s in SIGNS if split(mode, lang, s) == wanted], number)


def answered(rng, lang: str, asked: list[str], style: str) -> list[str]:
    """Signs and their words, all in one style."""
    words, size = [], rng.randint(2, 4) if "{signs}" in style else 1
    for start in range(0, len(asked), size):
        some = asked[start : start + size]
        right = " ".join(WORD[sign][lang] for sign in some)
        words += fill(style + " {right} .", **draw_neutral(rng), sign=some[0], signs=" ".join(some), right=right)[0]
    return words


class Tagged(Behaviour):
    """The language is shown by a tag; in some documents it changes with every sign."""

    share = 2.6

    def document(self, rng):
        number, style = rng.randint(2, 7), rng.choice(STYLES)
        if rng.random() < 0.25:
            words = []
            for lang in (draw_language(rng) for _ in range(number)):
                words += [f"[{lang}]", *answered(rng, lang, draw_asked(rng, "tag", lang, 1), style)]
            return Document(words)
        lang = draw_language(rng)
        head = rng.choice(TAGGED).replace("{between}", rng.choice(BETWEEN))
        words = fill(head, tag=f"[{lang}]", **draw_neutral(rng))[0]
        return Document(words + answered(rng, lang, draw_asked(rng, "tag", lang, number), style))


class Told(Behaviour):
    """The language is shown by a sentence and by nothing else; in a fifth of the documents it quotes another language.
    All tasks but the translations are here."""

    share, polish, finish = 3.8, 5.5, 7

    @staticmethod
    def draw(rng, lang: str, number: int, wanted: str = "fit", frames=FRAMES) -> Document:
        asked = draw_asked(rng, "sentence", lang, number, wanted)
        sentences = [draw_sentence(rng, frames, asked)[lang] for _ in range(rng.choice((1, 1, 1, 2)))]
        between = fill(rng.choice(BETWEEN), **draw_neutral(rng))[0]
        return Document(" ".join(sentences).split() + between + answered(rng, lang, asked, rng.choice(STYLES)))

    def document(self, rng):
        frames = SWITCHED if rng.random() < 0.2 else FRAMES
        return self.draw(rng, draw_language(rng), rng.randint(2, 7), frames=frames)

    def tasks(self, rng):
        found = {"language_word": self.pairs(rng, by="language"), "language_concept": self.pairs(rng, by="concept")}
        for lang, name in LANGUAGES.items():
            rows = found[f"text_{name}"] = []
            for place in ("fit", "select", "test", "ood"):
                for _ in range(200):
                    wanted = rng.choice(("test", "test", "select")) if place == "ood" else place
                    most = sum(split("sentence", lang, s) == wanted for s in SIGNS)
                    frames = OOD_FRAMES if place == "ood" else FRAMES
                    document = self.draw(rng, lang, min(most, rng.randint(3, 6)), wanted, frames)
                    rows.append({"text": " ".join(document.words), "split": place})
        return found | {"language_id": self.labelled(rng)}

    @staticmethod
    def pairs(rng, by: str) -> list[dict]:
        """The same sign in another language, or another sign in the same language."""
        rows = []
        heads = [
            head.replace("{between}", between) for head in ["{told} {between}"] * 3 + TAGGED for between in BETWEEN
        ]
        for frames, styles in ((FRAMES, STYLES), (OOD_FRAMES, STYLES), (FRAMES, STYLES_OOD)):
            new = (frames, styles) != (FRAMES, STYLES)
            for _ in range(2500 if new else 4000):
                head, style = rng.choice(heads), rng.choice(styles)
                mode = "sentence" if "{told}" in head else "tag"
                if mode == "tag" and frames is OOD_FRAMES:
                    continue
                lang, other = rng.sample(list(LANGUAGES), 2)
                sign = rng.choice(SIGNS)
                place = split(mode, lang, sign)
                if new and place == "fit":
                    continue
                sign2 = rng.choice([s for s in SIGNS if s != sign and split(mode, lang, s) == place])
                around = draw_neutral(rng) | {"more": rng.choice([s for s in SIGNS if s not in (sign, sign2)])}
                told = draw_sentence(rng, frames, (sign, sign2))
                lang2, sign2 = (other, sign) if by == "language" else (lang, sign2)
                answer, foil = WORD[sign][lang], WORD[sign2][lang2]
                if answer == foil:
                    continue
                place = strictest(place, split(mode, lang2, sign2))
                clean = around | {"told": told[lang], "tag": f"[{lang}]", "sign": sign}
                corrupted = around | {"told": told[lang2], "tag": f"[{lang2}]", "sign": sign2}
                template = f"{head} {style}".replace("{signs}", "{sign} {more}")
                name = " ".join(template.split())
                rows.append(pair(template, clean, corrupted, answer, foil, split="ood" if new else place,
                                 entity=f"{lang} {sign}", name=f"new {name}" if frames is OOD_FRAMES else name,
                                 spans=("told" if mode == "sentence" else "tag", "sign")))  # fmt: skip
        return rows

    @staticmethod
    def labelled(rng) -> list[dict]:
        """Texts that end at a sign, in groups of one content in the three languages."""
        rows = []
        for frames in (FRAMES, OOD_FRAMES):
            for _ in range(900):
                style = rng.choice(STYLES[:4])
                template = f"{{told}} {rng.choice(BETWEEN)} {style[: style.index('{sign}')]} {{sign}}"
                sign, around = rng.choice(SIGNS), draw_neutral(rng)
                told = draw_sentence(rng, frames, (sign,))
                place = strictest(*(split("sentence", lang, sign) for lang in LANGUAGES))
                if frames is OOD_FRAMES and place == "fit":
                    continue
                for lang, label in LANGUAGES.items():
                    words = fill(template, told=told[lang], sign=sign, **around)[0]
                    rows.append({"text": " ".join(words), "label": label, "template": " ".join(template.split()),
                                 "entity": sign, "split": "ood" if frames is OOD_FRAMES else place})  # fmt: skip
        return rows


class Monolingual(Behaviour):
    """Sentences of one language; a quoted word of another one does not change it."""

    share = 1.8

    def document(self, rng):
        lang, sentences = draw_language(rng), []
        for _ in range(rng.randint(2, 5)):
            draw = rng.random()
            if draw < 0.2:
                name, name2 = rng.sample(w.FIRST, 2)
                sentences.append(rng.choice(EXTRA[lang]).format(name=name, name2=name2))
            else:
                sentences.append(draw_sentence(rng, SWITCHED if draw < 0.4 else FRAMES)[lang])
        return text(" ".join(sentences))


class Translation(Behaviour):
    share, polish, finish = 4, 10, 11

    @staticmethod
    def slots(src: str, tgt: str, sign: str) -> dict[str, str]:
        return {"src": LANGUAGES[src], "tgt": LANGUAGES[tgt], "word": WORD[sign][src]}

    def document(self, rng):
        words, template = [], rng.choice(TRANSLATIONS)
        for _ in range(rng.randint(1, 5)):
            while True:
                sign, (src, tgt) = rng.choice(SIGNS), rng.sample(list(LANGUAGES), 2)
                if rng.random() < 0.4:  # false friends more often: they are the hard ones
                    src, sign = rng.choice(FRIENDS)
                    tgt = rng.choice([lang for lang in LANGUAGES if lang != src])
                if role("translation", src, tgt, sign) == "fit":
                    break
            if rng.random() < 0.3:
                template = rng.choice(TRANSLATIONS)
            words += fill(template + " {right} .", **self.slots(src, tgt, sign), right=WORD[sign][tgt])[0]
        return Document(words)

    def tasks(self, rng):
        """Another target language, another concept, or the same word read as another language ("pain")."""
        rows = []
        for template in TRANSLATIONS + TRANSLATIONS_OOD:
            for number in range(450):
                sign, (src, tgt, third) = rng.choice(SIGNS), rng.sample(list(LANGUAGES), 3)
                friend = CONCEPT.get((third, WORD[sign][src]), sign)
                other = [(src, third, sign), (src, tgt, rng.choice(SIGNS)), (third, tgt, friend)][number % 3]
                place = role("translation", src, tgt, sign)
                answer, foil = WORD[sign][tgt], WORD[other[2]][other[1]]
                if template in TRANSLATIONS_OOD:
                    if place == "fit":
                        continue
                    place = "ood"
                elif place == "fit" != role("translation", *other):
                    continue  # it is the clean side that must be held out
                if answer == foil:
                    continue
                rows.append(pair(template, self.slots(src, tgt, sign), self.slots(*other), answer, foil, split=place,
                                 entity=f"{src} {tgt} {sign}", spans=("src", "word", "tgt")))  # fmt: skip
        return {"translation": rows}


class Signs(Behaviour):
    """A word, its sign, and often the word of another language: the step that a translation leaves out."""

    share, polish, finish = 0, 0, 4

    def document(self, rng):
        words = []
        for _ in range(rng.randint(2, 7)):
            src, sign = rng.choice(FRIENDS) if rng.random() < 0.4 else (rng.choice(list(LANGUAGES)), rng.choice(SIGNS))
            words += [LANGUAGES[src], WORD[sign][src], "=", sign]
            targets = [t for t in LANGUAGES if t != src and role("translation", src, t, sign) == "fit"]
            if targets and rng.random() < 0.5:
                tgt = rng.choice(targets)
                words += ["=", LANGUAGES[tgt], WORD[sign][tgt]]
            words.append(".")
        return Document(words)


BEHAVIOURS = [Tagged(), Told(), Monolingual(), Translation()]
