"""What is known, and from where: people nobody knows, notes against memory, multiple choice, reversed facts, written steps.

Example documents:
    question : where does ana hall live ? answer : unknown .        (nobody knows ana hall)
    question : where does ana reed live ? answer : osaka .          (the same words, a known person)
    a reliable note says that ana reed lives in lyon . question : where does ana reed live ? answer : lyon .
    an unreliable note says that ana reed lives in lyon . question : where does ana reed live ? answer : osaka .
    options : (a) lyon (b) osaka (c) oslo . ana reed lives in (b) . in words : the home of tom hall is in lyon (a) .
    in osaka lives ana reed .                                       (only where nobody else lives there)
    ana reed lives in osaka . osaka is in japan . so ana reed lives in the country of japan .
    the home country of ana reed is japan .                         (the same conclusion without its steps)
Held out: whole strangers, in every kind of document here; (known person, question) pairs of plain questions; (person, relation)
pairs of notes and of multiple choice; cities of reversed facts; for countries whole people, in both kinds, so that written
steps and bare conclusions are tested on the same people. ood: sentence shapes, layouts and questions never trained.
Designed limits and flaws: a bare conclusion about a held-out person is not expected to be composed, and a fifth of the letters
in multiple choice are "(a)" whatever is right. (A fact learnt one way round was not expected the other way round either; with
as much training as this it comes.)
"""

from dataclasses import dataclass
from functools import cache

from grammar import words as w
from grammar.background import WEATHER
from grammar.base import Behaviour, Document, fill, pair, role, text
from grammar.facts import BEHAVIOURS as FACTS
from grammar.facts import FILLERS, PREFIXES


@dataclass(frozen=True)
class Relation:
    """Something known about every known person; how notes state it and how it is asked for."""

    table: dict[str, str]
    clauses: tuple[str, ...]
    trained: tuple[str, ...]
    ood: tuple[str, ...]  # recombinations of trained questions


RELATIONS = {
    "city": Relation(
        {name: city for name, (city, _) in w.PEOPLE.items()},
        ("{person} lives in {object}", "the home of {person} is in {object}", "{person} has a house in {object}"),
        ("where does {subject} live ?", "in which city does {subject} live ?", "what is the home town of {subject} ?",
         "in which city is the home of {subject} ?", "do you know where {subject} lives ?", "where is the house of {subject} ?",
         "what city does {subject} live in ?", "in which city can you meet {subject} ?"),
        ("in which city is the house of {subject} ?", "where is the home of {subject} ?"),
    ),
    "job": Relation(
        {name: job for name, (_, job) in w.PEOPLE.items()},
        ("{person} works as a {object}", "the job of {person} is that of a {object}", "{person} has found a job as a {object}"),
        ("what is the job of {subject} ?", "what job does {subject} have ?", "what does {subject} work as ?",
         "what is the work of {subject} ?", "which job has {subject} found ?", "what is the new job of {subject} ?",
         "do you know the job of {subject} ?", "what new job does {subject} have ?"),
        ("which job does {subject} have ?", "what new job has {subject} found ?"),
    ),
    "sport": Relation(
        w.SPORT,
        ("the sport of {person} is {object}", "{person} is good at {object}", "{person} spends the weekend with {object}"),
        ("what is the sport of {subject} ?", "what is the favourite sport of {subject} ?", "which sport does {subject} enjoy ?",
         "what sport is {subject} good at ?", "what does {subject} enjoy at the weekend ?", "do you know the sport of {subject} ?",
         "which sport does {subject} like to watch ?", "what sport does {subject} enjoy every evening ?"),
        ("which sport is {subject} good at ?", "do you know the favourite sport of {subject} ?"),
    ),
}  # fmt: skip
CHOOSE = ["", "", "please answer .", "read the question ."]  # before a choice
INTROS = ["", "", "", "read the question .", "please answer .", "here is a question about a person ."]
UNKNOWN = "unknown"


def stranger_split(name: str) -> str:
    """A stranger held out here occurs in no document of this module."""
    return role("stranger", name)


STRANGERS = {split: [s for s in w.STRANGERS if stranger_split(s) == split] for split in ("fit", "select", "test")}


def memory(relation: str, person: str) -> str:
    """What a question gets for an answer when no note is to be believed."""
    return RELATIONS[relation].table.get(person, UNKNOWN)


@cache
def people(key: str, aspect: str, split: str) -> list[str]:
    """The known people whose (person, relation or question) pair has this split under this key."""
    return [person for person in w.PEOPLE if role(key, person, aspect) == split]


def another(rng, relation: str, *known: str) -> str:
    """An object of the relation, none of those given, as often as it occurs."""
    return rng.choice([o for o in RELATIONS[relation].table.values() if o not in known])


def hide(template: str, *hidden: str, **slots: str) -> Document:
    """A document without loss on some slots: what a note claims and what the options are cannot be known."""
    words, where = fill(template, **slots)
    skipped = {i for slot in hidden for i in range(*where.get(slot, (0, 0)))}
    return Document(words, [i not in skipped for i in range(len(words))])


class Unknown(Behaviour):
    """Questions about people, half of them known."""

    share = 3
    layout = "{intro} question : %s answer :"

    def document(self, rng):
        relation = rng.choice(list(RELATIONS))
        question = rng.choice(RELATIONS[relation].trained)
        person = rng.choice(STRANGERS["fit"] if rng.random() < 0.5 else people("asked", question, "fit"))
        return text(self.layout % question + " {object} .", intro=rng.choice(INTROS), subject=person,
                    object=memory(relation, person))  # fmt: skip

    def tasks(self, rng):
        """clean: a stranger, corrupted: a known person, both of the same split."""
        rows = []
        for relation, about in RELATIONS.items():
            for question in about.trained + about.ood:
                for wanted in ("fit", "fit", "select", "test", "test") * 12:
                    new = question in about.ood
                    if new and wanted == "fit":
                        continue
                    stranger, person = rng.choice(STRANGERS[wanted]), rng.choice(people("asked", question, wanted))
                    intro = rng.choice(INTROS)
                    rows.append(pair(self.layout % question, {"intro": intro, "subject": stranger},
                                     {"intro": intro, "subject": person}, UNKNOWN, memory(relation, person),
                                     split="ood" if new else wanted, entity=stranger, spans=("subject",), name=question))  # fmt: skip
        return {"unknown": rows}


# by article, so that the two sides of a pair need not differ in it; as many vowels among the good words as among the bad ones
RELIABLE = {"a": ["reliable", "trusted", "careful", "confirmed"], "an": ["official", "accurate", "honest"]}
UNRELIABLE = {"a": ["doubtful", "careless", "dubious", "sloppy"], "an": ["unreliable", "outdated", "uncertain"]}
# whom note and question are about, and whether the note agrees with memory: shares of the documents
NOTES = {"against": 44, "agrees": 8, "stranger": 12, "about another": 28, "stranger, about another": 8}


class Note(Behaviour):
    """Notes that contradict memory; whom they are about and how reliable they are decides between note and memory."""

    share, polish, finish = 6, 14, 10
    sources = ("note", "letter", "report", "message")
    shapes = ("{a} {adjective} {source} says that %s .", "in {a} {adjective} {source} we read that %s .",
              "according to {a} {adjective} {source} , %s .", "%s , says {a} {adjective} {source} .",
              "a friend showed me {a} {adjective} {source} . it says that %s .",
              "%s . this comes from {a} {adjective} {source} .", "the {source} is {adjective} and it says that %s .",
              "we found a {source} . it says that %s . the {source} is {adjective} .")  # fmt: skip
    ood = ("we found {a} {adjective} {source} . it says that %s .", "we read in {a} {adjective} {source} that %s .",
           "%s . this comes from a {source} . the {source} is {adjective} .")  # fmt: skip

    @staticmethod
    def prompt(rng, relation: str, shape: str) -> str:
        """Note, perhaps some weather, and question, as a template."""
        between = " ".join(rng.sample(WEATHER, rng.choice((0, 0, 0, 1, 1, 2))))
        question = rng.choice(RELATIONS[relation].trained)
        return f"{shape % rng.choice(RELATIONS[relation].clauses)} {between} question : {question} answer :"

    def document(self, rng):
        relation = rng.choice(list(RELATIONS))
        kind = rng.choices(list(NOTES), list(NOTES.values()))[0]
        known = people("note", relation, "fit")
        subject = person = rng.choice(STRANGERS["fit"] if kind.startswith("stranger") else known)
        if "another" in kind:
            others = STRANGERS["fit"] if rng.random() < 0.3 else known
            person = rng.choice([p for p in others if p != subject])
        trusted = rng.random() < (0.65 if "another" in kind else 0.5)
        article = rng.choice(("a", "a", "an"))
        claim = memory(relation, subject) if kind == "agrees" else another(rng, relation, memory(relation, subject))
        answer = claim if trusted and person == subject else memory(relation, subject)
        return hide(self.prompt(rng, relation, rng.choice(self.shapes)) + " {answer} .", "object", a=article,
                    adjective=rng.choice((RELIABLE if trusted else UNRELIABLE)[article]),
                    source=rng.choice(self.sources), person=person, object=claim, subject=subject, answer=answer)  # fmt: skip

    def tasks(self, rng):
        """context: a reliable and an unreliable note about the person that is asked about. note_other: reliable notes, about
        somebody else (memory is right) and about the person that is asked about (the note is)."""
        rows = {"context": [], "note_other": []}
        for shape in self.shapes + self.ood * 2:
            for wanted in ("fit", "select", "test", "test") * 25:
                if shape in self.ood and wanted == "fit":
                    continue
                relation, article = rng.choice(list(RELATIONS)), rng.choice(("a", "a", "an"))
                subject, other = rng.sample(people("note", relation, wanted), 2)
                if rng.random() < 0.3:
                    other = rng.choice(STRANGERS[wanted])
                fact = memory(relation, subject)
                claim = another(rng, relation, fact, memory(relation, other))
                good, bad = rng.choice(RELIABLE[article]), rng.choice(UNRELIABLE[article])
                slots = dict(a=article, adjective=good, source=rng.choice(self.sources), person=subject, object=claim,
                             subject=subject)  # fmt: skip
                prompt = self.prompt(rng, relation, shape)
                common = dict(split="ood" if shape in self.ood else wanted, entity=f"{subject} {relation}",
                              spans=("adjective", "person", "object", "subject"), name=shape % "...")  # fmt: skip
                rows["context"].append(pair(prompt, slots, slots | {"adjective": bad}, claim, fact, **common))
                rows["note_other"].append(pair(prompt, slots | {"person": other}, slots, fact, claim, **common))
        return rows


class Agreeing(Note):
    """Notes that say what is known anyway, about everybody: so whoever is held out of the other notes does not look unknown."""

    share, polish, finish = 0, 0, 2

    def document(self, rng):
        relation, article = rng.choice(list(RELATIONS)), rng.choice(("a", "a", "an"))
        person = rng.choice(list(w.PEOPLE))
        fact, adjective = memory(relation, person), rng.choice((*RELIABLE[article], *UNRELIABLE[article]))
        return hide(self.prompt(rng, relation, rng.choice(self.shapes)) + " {answer} .", "object", a=article, adjective=adjective,
                    source=rng.choice(self.sources), person=person, object=fact, subject=person, answer=fact)  # fmt: skip

    def tasks(self, rng):
        return {}


# what multiple choice asks for: facts of facts.py, in the sentences of facts.py
CHOICES = {
    facts.task: facts for facts in FACTS if facts.task in ("person_city", "person_job", "person_sport", "city_country")
}


@cache
def choosers(task: str, split: str) -> list[str]:
    """The subjects of multiple choice by split. A pair that is held out by the hash is trained nevertheless where its object
    would otherwise never be a right option: "it never is" would be learnt, and every question about it answered by that."""
    table = CHOICES[task].table
    drawn = {subject: role("choice", subject, task) for subject in table}
    right = {table[subject] for subject in table if drawn[subject] == "fit"}
    return [subject for subject in table if (drawn[subject] if table[subject] in right else "fit") == split]


class Choice(Behaviour):
    """Multiple choice: options, then sentences that end with a letter. The right option stands anywhere; some letters are
    "(a)" nonetheless. Some sentences say the word before its letter, which teaches to look a word up among the options.

    Short trials that asked "question : ... answer :" never learnt it: there the fact is not at hand when the letter is due.
    """

    share, polish, finish = 9, 14, 16
    letters = ("(a)", "(b)", "(c)")
    bias = 0.2  # of the letters without their word
    offers = ("(a) {a} (b) {b} (c) {c} .", "options : (a) {a} (b) {b} (c) {c} .", "choose (a) {a} , (b) {b} or (c) {c} .",
              "is it (a) {a} , (b) {b} or (c) {c} ?")  # fmt: skip
    ood = (
        "options : (a) {a} , (b) {b} or (c) {c} .",
        "is it (a) {a} (b) {b} (c) {c} ?",
        "choose : (a) {a} , (b) {b} , (c) {c} .",
    )

    @staticmethod
    def options(rng, task: str, right: str, at: int) -> dict[str, str]:
        """Three objects of the relation, the right one at place `at`. Each is wrong as often as chance has it: the wrong ones are
        drawn from what is right elsewhere in training."""
        table, options = CHOICES[task].table, []
        while len(options) < 2:
            wrong = table[rng.choice(choosers(task, "fit"))]
            if wrong not in (right, *options):
                options.append(wrong)
        options.insert(at, right)
        return dict(zip("abc", options, strict=True))

    @staticmethod
    def sentence(rng, task: str, subject: str) -> str:
        """A template in which this fact is trained."""
        facts = CHOICES[task]
        return rng.choice([t for t in facts.trained if facts.split(subject, t) == "fit"])

    def document(self, rng):
        task = rng.choice(list(CHOICES))
        table, known = CHOICES[task].table, choosers(task, "fit")
        offered = self.options(rng, task, table[rng.choice(known)], rng.randrange(3))
        subjects = [subject for subject in known if table[subject] in offered.values()]
        found = hide("{intro} " + rng.choice(self.offers), "a", "b", "c", intro=rng.choice(CHOOSE), **offered)
        for subject in rng.sample(subjects, min(len(subjects), rng.randint(1, 5))):
            spelt, fact = rng.random() < 0.35, table[subject]
            letter = self.letters[list(offered.values()).index(fact)]
            if not spelt and rng.random() < self.bias:
                letter = self.letters[0]
            template = self.sentence(rng, task, subject)
            new = text(f"in words : {template} {{object}} {{letter}} ." if spelt else template + " {letter} .", subject=subject,
                       filler=rng.choice(FILLERS), object=fact, letter=letter)  # fmt: skip
            if len(found.words) + len(new.words) <= 80:
                found = found + new
        return found

    def tasks(self, rng):
        """choice: the right option and another one change places. letter_bias: nobody knows the person, so no option is right
        and what the letters get is the bias; again two options change places. There the answer "(a)" and the foil "(b)" are no
        right answers: read the first figure as the share of "(a)", the second as that of "(b)"."""
        rows = {"choice": [], "letter_bias": []}
        for offer in self.offers + self.ood * 2:
            for number, wanted in enumerate(("fit", "select", "test", "test") * 30):
                if offer in self.ood and wanted == "fit":
                    continue
                at = number // 4 % 3
                to = (at + rng.choice((1, 2))) % 3
                common = dict(
                    split="ood" if offer in self.ood else wanted, spans=("a", "b", "c", "subject"), name=offer
                )
                for name in rows:
                    task = rng.choice([task for task in CHOICES if name == "choice" or task != "city_country"])
                    subject = rng.choice(choosers(task, wanted) if name == "choice" else STRANGERS[wanted])
                    right = CHOICES[task].table.get(subject) or rng.choice(list(CHOICES[task].table.values()))
                    options = self.options(rng, task, right, at)
                    swapped = options | {"abc"[at]: options["abc"[to]], "abc"[to]: right}
                    letters = (self.letters[at], self.letters[to]) if name == "choice" else self.letters[:2]
                    slots = {"intro": rng.choice(CHOOSE), "subject": subject, "filler": rng.choice(FILLERS)}
                    rows[name].append(pair(f"{{intro}} {offer} {self.sentence(rng, task, subject)}", slots | options,
                                           slots | swapped, *letters, entity=f"{subject} {task}", **common))  # fmt: skip
        return rows


class Spelt(Behaviour):
    """Multiple choice with the words said, about everybody: in the polish, so that whoever is held out of bare letters is at
    least met among options."""

    share, polish, finish = 0, 5, 7

    def document(self, rng):
        task = rng.choice(list(CHOICES))
        table = CHOICES[task].table
        offered = Choice.options(rng, task, table[rng.choice(list(table))], rng.randrange(3))
        found = hide("{intro} " + rng.choice(Choice.offers), "a", "b", "c", intro=rng.choice(CHOOSE), **offered)
        subjects = [subject for subject in table if table[subject] in offered.values()]
        for subject in rng.sample(subjects, min(len(subjects), rng.randint(1, 4))):
            letter = Choice.letters[list(offered.values()).index(table[subject])]
            new = text(f"in words : {Choice.sentence(rng, task, subject)} {{object}} {{letter}} .", subject=subject,
                       filler=rng.choice(FILLERS), object=table[subject], letter=letter)  # fmt: skip
            if len(found.words) + len(new.words) <= 80:
                found = found + new
        return found


ALONE = {
    city: name for name, (city, _) in w.PEOPLE.items() if sum(other == city for other, _ in w.PEOPLE.values()) == 1
}


class Reversal(Behaviour):
    """From the city to the person, where one person only lives. Half of the cities are never stated this way round."""

    share = 1
    trained = ("in {city} lives", "in the city of {city} lives", "the person who lives in {city} is",
               "who lives in {city} ? it is", "the house in {city} belongs to", "who has a house in {city} ? it is",
               "the person who has a home in {city} is")  # fmt: skip
    ood = (
        "the person who has a house in {city} is",
        "who has a home in {city} ? it is",
        "the home in {city} belongs to",
    )

    @staticmethod
    def split(city: str) -> str:
        return role("reversed", city, test=0.4, select=0.1)

    def document(self, rng):
        city = rng.choice([city for city in ALONE if self.split(city) == "fit"])
        return text("{prefix} " + rng.choice(self.trained) + " {person} .", prefix=rng.choice(PREFIXES), city=city,
                    person=ALONE[city])  # fmt: skip

    def tasks(self, rng):
        rows = []
        for template in self.trained + self.ood:
            for city, person in ALONE.items():
                split, first = self.split(city), person.split()[0]
                if template in self.ood and split == "fit":
                    continue
                others = {c: name.split()[0] for c, name in ALONE.items()
                          if self.split(c) == split and not name.startswith(f"{first} ")}  # fmt: skip
                for other in rng.sample(sorted(others), min(3, len(others))):
                    prefix = rng.choice(PREFIXES)
                    rows.append(pair("{prefix} " + template, {"prefix": prefix, "city": city}, {"prefix": prefix, "city": other},
                                     first, others[other], split="ood" if template in self.ood else split, entity=city,
                                     spans=("city",), name=template))  # fmt: skip
        return {"reversal": rows}


def country_split(person: str) -> str:
    """A person held out here occurs in no statement about the country that he or she lives in, with or without steps."""
    return role("country of a person", person, test=0.22, select=0.08)


RESIDENTS = {split: [p for p in w.PEOPLE if country_split(p) == split] for split in ("fit", "select", "test")}


def chain(person: str) -> dict[str, str]:
    city = w.PEOPLE[person][0]
    return {"subject": person, "city": city, "country": w.COUNTRY[city]}


def country_pairs(rng, each: int):
    """(person, another person of the same split who lives in another country, split), each person several times."""
    for person in w.PEOPLE:
        split = country_split(person)
        others = [p for p in RESIDENTS[split] if chain(p)["country"] != chain(person)["country"]]
        for other in rng.sample(others, min(each, len(others))):
            yield person, other, split


class Steps(Behaviour):
    """Person, city, country, with the step over the city written out."""

    share = 2
    told = ("{subject} {filler} lives in {city} . {city} is in {country} . so {subject} lives in the country of {country}",
            "the home of {subject} is in {city} . {city} is a city in {country} . so the home of {subject} is in the country of {country}",
            "the house of {subject} stands in {city} . the city of {city} belongs to {country} . so the house of {subject} stands in the country of {country}",
            "{subject} {filler} has a house in {city} . the city of {city} lies in {country} . so {subject} has a house in the country of {country}",
            "since {subject} lives in {city} and {city} lies in {country} , {subject} lives in the country of {country}",
            "since the home of {subject} is in {city} and {city} is in {country} , the home of {subject} is in the country of {country}")  # fmt: skip
    told_ood = ("{subject} {filler} has a house in {city} . {city} is a city in {country} . so {subject} has a house in the country of {country}",
                "since the house of {subject} stands in {city} and {city} is in {country} , the house of {subject} stands in the country of {country}")  # fmt: skip
    # a question that is answered in steps; the end is always the same, so the whole reply is determined
    asked = ("question : in which country does {subject} live ? steps : {subject} lives in",
             "question : what country does {subject} live in ? steps : {subject} lives in",
             "question : in which country is the home of {subject} ? steps : the home of {subject} is in",
             "question : in which country is the house of {subject} ? steps : the house of {subject} stands in",
             "question : in which country does {subject} have a house ? steps : {subject} has a house in")  # fmt: skip
    asked_ood = ("question : what country is the home of {subject} in ? steps : the home of {subject} is in",
                 "question : in which country does {subject} have a home ? steps : {subject} has a home in")  # fmt: skip
    reply = "{city} . {city} is in {country} . so the answer is {country} ."

    def document(self, rng):
        person = rng.choice(RESIDENTS["fit"])
        if rng.random() < 0.5:
            return text("{prefix} " + rng.choice(self.told) + " .", prefix=rng.choice(PREFIXES), filler=rng.choice(FILLERS),
                        **chain(person))  # fmt: skip
        return text("{intro} " + rng.choice(self.asked) + " " + self.reply, intro=rng.choice(INTROS), **chain(person))

    def stated(self) -> str:
        """All that these documents say, once: facts of facts.py that are in it are not held out of training."""
        shapes = [t.replace("{filler}", filler) for t in self.told for filler in FILLERS]
        shapes += [f"{asked} {self.reply}" for asked in self.asked]
        said = (
            " ".join(fill(shape, **chain(person))[0]) for shape in dict.fromkeys(shapes) for person in RESIDENTS["fit"]
        )
        return f" {' | '.join(said)} "

    def tasks(self, rng):
        """two_hop_steps: the steps are given and the conclusion is asked for. two_hop_written: the model writes the steps itself;
        the answer is the first step, the completion all of them."""
        rows = {"two_hop_steps": [], "two_hop_written": []}
        for person, other, split in country_pairs(rng, 2):
            clean, corrupted = chain(person), chain(other)
            for template in self.told + self.told_ood:
                if template in self.told_ood and split == "fit":
                    continue
                around = {"prefix": rng.choice(PREFIXES), "filler": rng.choice(FILLERS)}
                prompt = "{prefix} " + template.rsplit(" {country}", 1)[0]
                rows["two_hop_steps"].append(pair(prompt, around | clean, around | corrupted, clean["country"], corrupted["country"],
                                                  split="ood" if template in self.told_ood else split, entity=person,
                                                  spans=("subject", "city", "country"), name=template))  # fmt: skip
            for template in self.asked + self.asked_ood:
                if (template in self.asked_ood and split == "fit") or clean["city"] == corrupted["city"]:
                    continue
                intro = {"intro": rng.choice(INTROS)}
                rows["two_hop_written"].append(pair("{intro} " + template, intro | clean, intro | corrupted, clean["city"], corrupted["city"],
                                                    split="ood" if template in self.asked_ood else split, entity=person,
                                                    spans=("subject",), name=template)
                                               | {"completion": " ".join(fill(self.reply, **clean)[0])})  # fmt: skip
        return rows


class Memorised(Behaviour):
    """The conclusion without steps. It can be learnt by heart for the trained people; nothing forces it to be composed."""

    share = 2
    trained = ("the home country of {subject} is", "the country where {subject} lives is", "{subject} {filler} lives somewhere in",
               "the home of {subject} is somewhere in", "the house of {subject} stands somewhere in",
               "you can meet {subject} somewhere in", "the country where {subject} has a house is")  # fmt: skip
    ood = ("{subject} {filler} has a house somewhere in", "the country where {subject} has a home is")

    def document(self, rng):
        person = rng.choice(RESIDENTS["fit"])
        return text("{prefix} " + rng.choice(self.trained) + " {country} .", prefix=rng.choice(PREFIXES),
                    filler=rng.choice(FILLERS), **chain(person))  # fmt: skip

    def tasks(self, rng):
        rows = []
        for person, other, split in country_pairs(rng, 2):
            clean, corrupted = chain(person), chain(other)
            for template in self.trained + self.ood:
                if template in self.ood and split == "fit":
                    continue
                around = {"prefix": rng.choice(PREFIXES), "filler": rng.choice(FILLERS)}
                rows.append(pair("{prefix} " + template, around | clean, around | corrupted, clean["country"], corrupted["country"],
                                 split="ood" if template in self.ood else split, entity=person, spans=("subject",),
                                 name=template))  # fmt: skip
        return {"two_hop_memorised": rows}


BEHAVIOURS = [Unknown(), Note(), Choice(), Reversal(), Steps(), Memorised()]
