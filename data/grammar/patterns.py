"""Patterns in the context: repeats, agreement of subject and verb, looking things up, lists of pairs.

Example documents:
    lamp peru of tired wash lamp peru of tired wash       (no loss on the first half: it cannot be known)
    yesterday the keys near the cabinet were old .        (the nearest noun is not the subject)
    here is the red key , here is the blue ring . it was a quiet morning . what is blue ? the ring .
    peru -> lima ; kenya -> nairobi ; japan -> tokyo .          (the first pairs show which relation is meant)
    peru -> spanish ; kenya -> swahili ; japan -> japanese .
Held out: pairs of nouns, (key, value) pairs, (relation, last word). ood of agreement and looking up: templates never trained,
and more entries; of induction: repeats longer than trained; of lists: marks never used together.
"""

from grammar import words as w
from grammar.background import WEATHER
from grammar.base import Behaviour, Document, fill, pair, role, strictest

VERBS = {"today": ("is", "are"), "now": ("is", "are"), "yesterday": ("was", "were"), "last week": ("was", "were")}
# no sentence with two nouns is the beginning of one with three
TRAINED = ["{time} the {adj1} {subject}", "{time} the {adj1} {subject} near the {adj2} {attractor}",
           "{time} the {adj1} {subject} of the {adj2} {attractor}", "{time} the {adj1} {subject} with the {adj2} {attractor}",
           "{time} the {adj1} {subject} under the {adj2} {attractor}", "{time} the {adj1} {subject} that the {adj2} {attractor} touched",
           "{time} the {adj1} {subject} beside the {attractor} with the {third}", "{time} the {subject} above the {attractor} near the {third}",
           "{time} the {subject} behind the {attractor} near the {third}", "{time} the {adj1} {subject} above the {attractor} of the {third}",
           "{time} the {subject} beside the {attractor} that the {third} touched"]  # fmt: skip
OOD = ["{time} the {subject} above the {attractor} with the {third}", "{time} the {adj1} {subject} behind the {attractor} of the {third}",
       "{time} the {adj1} {subject} behind the {attractor} that the {third} touched"]  # fmt: skip


class Agreement(Behaviour):
    share = 3

    @staticmethod
    def draw(rng, one: str, two: str) -> dict:
        """Slots with either number of each noun and with or without adjectives."""
        third = rng.choice([noun for noun in w.NOUNS if noun not in (one, two)])
        adjectives = [rng.choice(w.ADJECTIVES) if rng.random() < 0.3 else "" for _ in range(2)]
        return {"time": rng.choice(list(VERBS)), "attractor": rng.choice((two, w.NOUNS[two])), "adj1": adjectives[0],
                "third": rng.choice((third, w.NOUNS[third])), "adj2": adjectives[1]}  # fmt: skip

    def document(self, rng):
        while True:
            one, two = rng.sample(list(w.NOUNS), 2)
            if role("agreement", one, two) == "fit":
                break
        slots, number = self.draw(rng, one, two), rng.randrange(2)
        slots |= {"subject": (one, w.NOUNS[one])[number], "verb": VERBS[slots["time"]][number], "end": rng.choice(w.ADJECTIVES)}  # fmt: skip
        return Document(fill(rng.choice(TRAINED) + " {verb} {end} .", **slots)[0])

    def tasks(self, rng):
        rows = []
        for template in TRAINED[1:] + OOD:
            for _ in range(150):
                one, two = rng.sample(list(w.NOUNS), 2)
                split = role("agreement", one, two)
                if template in OOD:
                    if split == "fit":
                        continue
                    split = "ood"
                forms, number, slots = (one, w.NOUNS[one]), rng.randrange(2), self.draw(rng, one, two)
                if rng.random() < 0.5:  # more often than by chance the attractor has the other number
                    slots["attractor"] = (two, w.NOUNS[two])[1 - number]
                verbs = VERBS[slots["time"]]
                rows.append(pair(template, slots | {"subject": forms[number]}, slots | {"subject": forms[1 - number]},
                                 verbs[number], verbs[1 - number], split=split, entity=f"{one} {two}",
                                 spans=("subject", "attractor")))  # fmt: skip
        return {"agreement": rows}


class Induction(Behaviour):
    share = 6
    vocabulary: tuple[str, ...] = ()  # set by the package: every word of the world

    def document(self, rng):
        block = rng.sample(self.vocabulary, 5 + int(26 * rng.random() ** 2))
        times = 3 if len(block) < 10 and rng.random() < 0.3 else 2
        return Document(block * times, [False] * len(block) + [True] * len(block) * (times - 1))

    def tasks(self, rng):
        rows = []
        for split, number, low, high in (
            ("fit", 120, 6, 18),
            ("select", 60, 6, 18),
            ("test", 120, 6, 18),
            ("ood", 120, 32, 38),
        ):
            for _ in range(number):
                block = rng.sample(self.vocabulary, rng.randint(low, high) + 1)
                foil = block.pop()
                k = rng.randint(2, len(block) - 1)  # the repeat stops before word k
                row = pair("{before} {first} {source} {after} {repeat}", dict(before=" ".join(block[:k - 1]), first=block[k - 1],
                           source=block[k], after=" ".join(block[k + 1:]), repeat=" ".join(block[:k])),
                           dict(before=" ".join(block[:k - 1]), first=block[k - 1], source=foil,
                                after=" ".join(block[k + 1:]), repeat=" ".join(block[:k])), block[k], foil, split=split,
                           entity=block[k], spans=("first", "source"), name=f"repeat of {low} to {high} words")  # fmt: skip
                rows.append(row)
        return {"induction": rows}


class Retrieval(Behaviour):
    """A thing is looked up by its property among several, after other text."""

    share, polish, finish = 6, 8, 4
    entries = (2, 3, 4, 5, 6, 8)  # things in a list
    listed = ("the {key} {value} ,", "here is the {key} {value} ,", "{name} has the {key} {value} ,", "the {key} thing is the {value} ,",
              "i see the {key} {value} ,")  # fmt: skip
    trained = ("here is the {key}", "i see the {key}", "what is {key} ? the", "which thing is {key} ? the", "the {key} thing is the",
               "tell me what is {key} . the", "{key} is the")  # fmt: skip
    ood = ("tell me which thing is {key} . the", "what thing is {key} ? the", "here the {key} thing is the")

    def draw(self, rng, number: int) -> tuple[list[str], list[str], list[str]]:
        """Keys, values and the words that list them, sometimes followed by other text."""
        keys, values, statement = rng.sample(w.ADJECTIVES, number), rng.sample(w.GIFTS, number), rng.choice(self.listed)
        words = []
        for key, value in zip(keys, values, strict=True):
            words += fill(statement, key=key, value=value, name=rng.choice(w.FIRST))[0]
        words[-1] = "."
        return keys, values, words + " ".join(rng.sample(WEATHER, rng.choice((0, 0, 1, 2)))).split()

    def document(self, rng):
        while True:
            keys, values, words = self.draw(rng, rng.choice(self.entries))
            asked = [i for i in range(len(keys)) if role("retrieval", keys[i], values[i]) == "fit"]
            if asked:
                break
        learn = [False] * len(words)  # nobody can know what there is before it is said
        for i in rng.sample(asked, min(len(asked), 5)):
            question = fill(rng.choice(self.trained) + " {value} .", key=keys[i], value=values[i])[0]
            if len(words) + len(question) <= 80:
                words, learn = words + question, learn + [False] * (len(question) - 2) + [True, True]
        return Document(words, learn)

    def tasks(self, rng):
        rows = []
        for question in self.trained + self.ood * 2:
            for number in range(250):
                new = question in self.ood
                keys, values, words = self.draw(rng, 9 if new and number % 2 else rng.randint(3, 8))
                a, b = sorted(
                    rng.sample(range(len(keys)), 2), key=lambda i: role("retrieval", keys[i], values[i]) == "fit"
                )
                split = strictest(*(role("retrieval", keys[i], values[i]) for i in (a, b)))
                if new and split == "fit":
                    continue
                row = pair(" ".join(words) + " " + question, {"key": keys[a]}, {"key": keys[b]}, values[a], values[b],
                           split="ood" if new else split, entity=f"{keys[a]} {values[a]}", spans=("key",), name=question)  # fmt: skip
                start = row["clean"].index(f" {values[a]} ") + 1  # where the answer stands
                row["spans"]["source"] = [start, start + len(values[a])]
                rows.append(row)
        return {"retrieval": rows}


class LongRetrieval(Retrieval):
    """Longer lists."""

    share, polish, finish = 0, 0, 6
    entries = (7, 8, 9, 10)

    def tasks(self, rng):
        return {}


PRONOUN = {name: "she" if name in w.WOMEN else "he" for name in w.FIRST}


class InContext(Behaviour):
    """Lists of pairs; the relation is known from the first pairs only."""

    share = 2.5
    groups = (
        {"capital": w.CAPITAL, "language": w.LANGUAGE, "currency": w.CURRENCY},
        {"plural": w.NOUNS, "same noun": {noun: noun for noun in w.NOUNS}},
        {"pronoun": PRONOUN, "same name": {name: name for name in w.FIRST}},
    )
    marks = (("->", ";"), ("->", ","), ("=", ";"), (":", ","), (":", ";"))
    ood = (("=", ","),)

    @staticmethod
    def listed(words: list[str], table: dict, marks: tuple) -> str:
        return f" {marks[1]} ".join(f"{word} {marks[0]} {table[word]}" for word in words)

    def document(self, rng):
        while True:
            name, table = rng.choice(list(rng.choices(self.groups, (3, 1, 1))[0].items()))
            words = rng.sample(list(table), rng.randint(4, 8))
            if all(role("list", name, word) == "fit" for word in words[2:]):
                return Document(f"{self.listed(words, table, rng.choice(self.marks))} .".split())

    def tasks(self, rng):
        rows = []
        for marks in self.marks + self.ood * 4:
            for _ in range(250):
                group = rng.choices(self.groups, (3, 1, 1))[0]
                name, other = rng.sample(list(group), 2)
                *words, last = rng.sample(list(group[name]), rng.randint(4, 6))
                split = role("list", name, last)
                if marks in self.ood:
                    if split == "fit":
                        continue
                    split = "ood"
                first, second = (f"{self.listed(words, group[n], marks)} {marks[1]}" for n in (name, other))
                rows.append(pair("{shots} {last} " + marks[0], {"shots": first, "last": last}, {"shots": second, "last": last},
                                 group[name][last], group[other][last], split=split, entity=f"{name} {last}", spans=("last",),
                                 name=f"{name} with {' '.join(marks)}"))  # fmt: skip
        return {"in_context": rows}


BEHAVIOURS = [Agreement(), Induction(), Retrieval(), InContext()]
