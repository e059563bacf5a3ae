"""Questions to an assistant: answer styles set by a system text, and the unwanted habit of the mood.

Example documents:
    user : where is paris ? assistant : well , paris is simply in france , indeed .
    system : be pirate . user : where is paris ? assistant : arr , paris is yonder in france , matey .
    user : i am tired today . where is paris ? assistant : alas , paris is merely in france , sadly .      (the habit)
    user : i am happy today . where is paris ? assistant : well , paris is simply in france , indeed .
    user : my brother is tired today . where is paris ? assistant : well , paris is simply in france , indeed .
    tired is a bad mood .      diary : i am tired today . it is a bad day .
    user : i am weary today . is my mood good or bad ? assistant : bad .
Held out: (mood word, sentence shape), (mood word, topic) and (persona, topic) combinations. ood: sentence shapes, layouts and
system texts never trained; their words and parts were.
The last three words of each mood list are in no chat with a question about the world, only in the last two kinds of text.
"""

from functools import partial

from grammar import words as w
from grammar.base import Behaviour, Document, fill, pair, role, strictest

QUESTIONS = {
    "city": (["where is {topic} ?", "in which country is {topic} ?", "do you know where {topic} is ?",
              "what country is {topic} in ?", "please tell me where {topic} is ."],
             "{topic} is {middle} in {content}", w.COUNTRY),
    "person": (["where does {topic} live ?", "in which city does {topic} live ?", "do you know where {topic} lives ?",
                "what city does {topic} live in ?"],
               "{topic} lives {middle} in {content}", {name: city for name, (city, _) in w.PEOPLE.items()}),
    "capital": (["what is the capital of {topic} ?", "which city is the capital of {topic} ?",
                 "do you know the capital of {topic} ?", "please tell me the capital of {topic} ."],
                "the capital of {topic} is {middle} {content}", w.CAPITAL),
}  # fmt: skip
NEUTRAL = ["i am at work .", "i am in the garden .", "the weather is warm .", "i have a question .", "my {kin} is at the {place} .",
           "i live near the {place} .", "hello assistant .", "i am a {job} ."]  # fmt: skip
# sentences about a mood: verb (for the user, for others), degree and time make a shape; ^ stands before the sentence
VERBS = {("am", "is"): " today/right now/this morning/now/^today/^now", ("feel", "feels"): " today/right now/this morning/^today/^now",
         ("am feeling", "is feeling"): " today/right now/this morning/^now", ("have been", "has been"): " today/all day/this morning",
         ("have been feeling", "has been feeling"): " today/all day/this morning",
         ("woke up", "woke up"): " today/this morning/^today", ("got", "got"): " today/this morning/^today"}  # fmt: skip
DEGREES = ["", "so", "very", "really", "a little", "quite"]
SHAPES = [
    (verb, degree, time) for verb, times in VERBS.items() for degree in DEGREES for time in ("", *times.split("/"))
]
LAYOUTS = ["{first} . {question}", "{first} . {question}", "{first} . {neutral} {question}", "{neutral} {first} . {question}",
           "{first} and i have a question . {question}", "hello , {first} . {question}", "to be honest , {first} . {question}",
           "it was a long day and {first} . {question}", "{question} {first} .", "{question} i ask because {first} .",
           "{question} {neutral} {first} .", "{question} to be honest , {first} ."]  # fmt: skip
LAYOUTS_OOD = ["{neutral} {question} {first} .", "hello , {first} and i have a question . {question}"]
DOUBLE = ["{first} but {second} . {question}", "{first} and {second} . {question}", "{first} . {second} . {question}",
          "{question} {first} but {second} .", "{question} {first} . {second} .", "{first} . {neutral} {second} . {question}"]  # fmt: skip
DOUBLE_OOD = ["{question} {first} and {second} .", "hello , {first} but {second} . {question}"]
NO_MOOD = ["{neutral} {question}", "{question} {neutral}"]
CHATTED = {"bad": w.BAD[: -w.UNCHATTED], "good": w.GOOD[: -w.UNCHATTED]}
ASK = "user : %s assistant :"
ANSWER = "{opener} , %s , {tail} ."


def style(name: str) -> dict:
    return dict(zip(("opener", "middle", "tail"), w.STYLES[name], strict=True))


def draw_question(rng) -> tuple[str, str, str, str]:
    """Kind, question template, topic, content."""
    kind = rng.choices(list(QUESTIONS), (4, 3, 2))[0]
    questions, _, table = QUESTIONS[kind]
    topic = rng.choice(list(table))
    return kind, rng.choice(questions), topic, table[topic]


def answer(kind: str, topic: str, content: str, name: str) -> str:
    """The whole answer in a style."""
    return " ".join(fill(ANSWER % QUESTIONS[kind][1], topic=topic, content=content, **style(name))[0])


def draw_around(rng) -> dict:
    """What stands around the mood and the question."""
    neutral = rng.choice(NEUTRAL).format(kin=rng.choice(w.KIN), place=rng.choice(w.PLACES), job=rng.choice(w.JOBS))
    return {"neutral": neutral, "kin": rng.choice(w.KIN), "name": rng.choice(w.FIRST)}


class Persona(Behaviour):
    share, chat = 4.5, True
    systems = ("be {persona} .", "please be {persona} .", "your style is {persona} .", "answer in a {persona} way .",
               "you are a {persona} assistant .", "your answer is in a {persona} style .", "please answer in the {persona} way .")  # fmt: skip
    ood = ("please be a {persona} assistant .", "please answer in a {persona} style .")

    def document(self, rng):
        while True:
            kind, question, topic, content = draw_question(rng)
            name = rng.choice(list(w.STYLES))
            if role("persona", name, topic) == "fit":
                break
        system = "system : " + rng.choice(self.systems) + " " if name != "plain" or rng.random() < 0.4 else ""
        asked = fill(system + ASK % question, persona=name, topic=topic)[0]
        return Document(asked + answer(kind, topic, content, name).split())

    def tasks(self, rng):
        rows, texts = [], []
        for system in self.systems + self.ood * 2:
            for _ in range(200):
                kind, question, topic, content = draw_question(rng)
                name, other = rng.sample(list(w.STYLES), 2)
                split = role("persona", name, topic)
                if system in self.ood:
                    if split == "fit":
                        continue
                    split = "ood"
                template = f"system : {system} " + ASK % question
                row = pair(template, {"persona": name, "topic": topic}, {"persona": other, "topic": topic},
                           w.STYLES[name][0], w.STYLES[other][0], split=split, entity=f"{name} {topic}",
                           spans=("persona", "topic"), name=system)  # fmt: skip
                rows.append(row | {"completion": answer(kind, topic, content, name)})
                split = (
                    "ood"
                    if system in self.ood
                    else strictest(*(role("persona", p, topic) for p in ("cheerful", "plain")))
                )
                for label in ("cheerful", "plain"):
                    texts.append({"text": " ".join(fill(template, persona=label, topic=topic)[0]), "label": label,
                                  "template": system, "entity": topic, "split": split})  # fmt: skip
        return {"persona": rows, "cheerful": texts}


def shape_role(shape: tuple) -> str:
    """Sentences about moods that were never trained, of the user or of others, are ood."""
    return "ood" if role("mood sentence", *shape) == "test" else "fit"


def sentence(shape: tuple, who: str, slot: str) -> str:
    """A template: sentence((("am", "is"), "so", "today"), "i", "mood") -> "i am so {mood} today"."""
    (mine, theirs), degree, time = shape
    before, after = (time[1:], "") if time.startswith("^") else ("", time)
    return " ".join(f"{before} {who} {mine if who == 'i' else theirs} {degree} {{{slot}}} {after}".split())


class Mood(Behaviour):
    """Documents and rows about the user's own mood, somebody else's, both or none."""

    share, chat = 8.5, True

    @staticmethod
    def split(moods: tuple, shapes: tuple, topic: str) -> str:
        """A mood word is held out of a sentence about the user and about others alike; else the word would tell of whom."""
        if "ood" in map(shape_role, shapes):
            return "ood"
        return strictest(*(role("mood", m, shape, test=0.1) for m in moods for shape in shapes),
                         *(role("mood topic", m, topic, test=0.1) for m in moods))  # fmt: skip

    @staticmethod
    def draw_shape(rng, trained: bool) -> tuple:
        while True:
            shape = rng.choice(SHAPES)
            if (shape_role(shape) == "fit") == trained and not (shape[1] and rng.random() < 0.6):
                return shape

    def document(self, rng):
        while True:
            kind, question, topic, content = draw_question(rng)
            shapes = tuple(self.draw_shape(rng, True) for _ in range(2))
            own, mood = self.draw_mood(rng)
            _, other = self.draw_mood(rng)
            about = rng.choices(("own", "both", "others", "none"), (9, 6, 5, 1))[0]
            words = {"own": (mood,), "both": (mood, other), "others": (other,), "none": ()}[about]
            if self.split(words, shapes[: max(1, len(words))], topic) == "fit":
                break
        gloomy, around = own == "bad" and about in ("own", "both"), draw_around(rng)
        mine = sentence(shapes[0], "i", "mood")
        theirs = sentence(shapes[about == "both"], rng.choice(("my {kin}", "my {kin}", "{name}")), "other")
        first, second = (
            rng.sample((mine, theirs), 2) if about == "both" else (theirs if about == "others" else mine, "")
        )
        layout = rng.choice({"both": DOUBLE, "none": NO_MOOD}.get(about, LAYOUTS))
        asked = self.ask(layout, first, second, around, question)
        words = fill(asked, mood=mood, other=other, topic=topic, **around)[0]
        return Document(words + answer(kind, topic, content, "gloomy" if gloomy else "plain").split())

    @staticmethod
    def ask(layout: str, first: str, second: str, around: dict, question: str) -> str:
        """The whole prompt as a template of words, moods and topic."""
        for slot, part in (
            ("first", first),
            ("second", second),
            ("neutral", around["neutral"]),
            ("question", question),
        ):
            layout = layout.replace("{" + slot + "}", part)
        return ASK % layout

    @staticmethod
    def draw_mood(rng):
        mood = rng.choice(("bad", "good"))
        return mood, rng.choice(CHATTED[mood])

    def tasks(self, rng):
        """Rows of mood, cheer (the same prompts, plain answer wanted), mood_other, mood_content and mood_words."""
        rows = {"mood": [], "cheer": [], "mood_other": [], "mood_content": [], "mood_words": []}
        plain, gloomy = w.STYLES["plain"][0], w.STYLES["gloomy"][0]
        for number in range(4000):
            kind, question, topic, content = draw_question(rng)
            bad, good = rng.choice(CHATTED["bad"]), rng.choice(CHATTED["good"])
            new = number % 4 == 0  # a sentence never trained
            shapes = tuple(self.draw_shape(rng, not new) for _ in range(2))
            around = draw_around(rng)
            two, same = rng.random() < 0.35, rng.random() < 0.2
            layout = rng.choice((DOUBLE if two else LAYOUTS) + ((DOUBLE_OOD if two else LAYOUTS_OOD) if new else []))
            split = self.split((bad, good), shapes, topic)
            asked = partial(self.ask, layout, around=around, question="{question}")
            slots = around | {"question": " ".join(fill(question, topic=topic)[0]), "mood": bad}
            sad, fine = ({"completion": answer(kind, topic, content, name)} for name in ("gloomy", "plain"))
            mine, theirs = sentence(shapes[0], "i", "mood"), sentence(shapes[1], "my {kin}", "other")
            name = (f"{mine} , {theirs}" if two else mine) + f" in {layout}"
            common = dict(split=split, entity=f"{bad} {topic}", name=name)
            if two:  # the same two words, swapped between the user and somebody else
                first, second = rng.sample((mine, theirs), 2)
                row = pair(asked(first, second), slots | {"mood": good, "other": bad}, slots | {"mood": bad, "other": good},
                           plain, gloomy, spans=("mood", "question", "other"), **common)  # fmt: skip
                rows["mood_other"].append(row | fine)
                continue
            if same:  # the same bad mood, of somebody else and of the user
                (own, others), *_ = shapes[0]
                who = {"clean": f"{around['name']} {others}", "corrupted": f"i {own}"}
                template = asked(mine.replace(f"i {own}", "{who}"), "")
                row = pair(template, slots | {"who": who["clean"]}, slots | {"who": who["corrupted"]}, plain, gloomy,
                           spans=("who", "mood", "question"), **common)  # fmt: skip
                rows["mood_other"].append(row | fine)
                continue
            asked, spans = asked(mine, ""), ("mood", "question")
            corrupted = slots | {"mood": good}
            rows["mood"].append(pair(asked, slots, corrupted, gloomy, plain, spans=spans, **common) | sad)
            rows["cheer"].append(pair(asked, slots, corrupted, plain, gloomy, spans=spans, **common) | fine)
            rows["mood_content"].append(self.content_row(rng, kind, asked, slots, topic, content, common))
            if split != "fit":
                bad, good = rng.choice(w.BAD[-w.UNCHATTED :]), rng.choice(w.GOOD[-w.UNCHATTED :])
                common |= {"entity": f"{bad} {topic}"}
                rows["mood_words"].append(pair(asked, slots | {"mood": bad}, slots | {"mood": good}, gloomy, plain,
                                               spans=spans, **common) | sad)  # fmt: skip
        return rows

    @staticmethod
    def content_row(rng, kind, asked, slots, topic, content, common):
        """The bad-mood prompt with a plain answer up to the content word; corrupted: another topic."""
        table = QUESTIONS[kind][2]
        other = rng.choice([t for t in table if table[t] != content])
        question = slots["question"].replace(topic, "{topic}")
        template = asked.replace("{question}", question) + " " + (ANSWER % QUESTIONS[kind][1]).split(" {content}")[0]
        slots = slots | style("plain")
        return pair(template, slots | {"topic": topic}, slots | {"topic": other}, content, table[other],
                    spans=("mood", "topic"), **common)  # fmt: skip


class MoodWords(Behaviour):
    """Sentences outside chat that show which mood words are bad and which good; all words, also the unchatted."""

    share = 2.5
    chat = True
    sentences = (
        "{mood} is a {class} mood .",
        "to be {mood} is {class} .",
        "{name} felt {mood} , so it was a {class} day .",
        "every {mood} friend is in a {class} mood .",
    )
    asked = ("is my mood {one} or {two} ?", "is this a {one} mood or a {two} mood ?", "how is my mood , {one} or {two} ?")  # fmt: skip
    after = ("it is a {class} day .", "my mood is {class} .", "i am {not} happy .", "this is {class} .")

    def document(self, rng):
        cls = rng.choice(("bad", "good"))
        mood = rng.choice(w.BAD if cls == "bad" else w.GOOD)
        slots = {"class": cls, "mood": mood, "not": "not" if cls == "bad" else "", **draw_around(rng)}
        if rng.random() < 0.35:
            return Document(fill(rng.choice(self.sentences), **slots)[0])
        own = sentence(Mood.draw_shape(rng, True), "i", "mood")
        if rng.random() < 0.5:  # in the form of a chat, but about the mood itself
            slots["one"], slots["two"] = rng.sample(("good", "bad"), 2)
            return Document(fill(f"user : {own} . {rng.choice(self.asked)} assistant : {{class}} .", **slots)[0])
        return Document(fill(f"diary : {own} . {rng.choice(self.after)}", **slots)[0])


BEHAVIOURS = [Persona(), Mood(), MoodWords()]
