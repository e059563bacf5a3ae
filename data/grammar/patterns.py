"""Copying of repeated random words, and number agreement of subject and verb.

Example documents:
    lamp peru of tired wash lamp peru of tired wash       (no loss on the first half: it cannot be known)
    yesterday the keys near the cabinet were old .        (the nearest noun is not the subject)
Held out: pairs of nouns. ood of agreement: templates never trained; ood of induction: repeats longer than trained.
"""

from grammar import words as w
from grammar.base import Behaviour, Document, fill, pair, role

VERBS = {"today": ("is", "are"), "now": ("is", "are"), "yesterday": ("was", "were"), "last week": ("was", "were")}
TRAINED = ["{time} the {adj1} {subject}", "{time} the {adj1} {subject} near the {adj2} {attractor}",
           "{time} the {adj1} {subject} behind the {adj2} {attractor}", "{time} the {adj1} {subject} of the {adj2} {attractor}",
           "{time} the {adj1} {subject} with the {adj2} {attractor}", "{time} the {adj1} {subject} under the {adj2} {attractor}",
           "{time} the {adj1} {subject} that the {adj2} {attractor} touched", "{time} the {subject} beside the {attractor} with the {third}",
           "{time} the {subject} above the {attractor} near the {third}"]  # fmt: skip
OOD = ["{time} the {subject} behind the {attractor} near the {third}", "{time} the {subject} that the {attractor} touched near the {third}",
       "{time} the {adj1} {subject} with the {attractor} of the {third}"]  # fmt: skip


class Agreement(Behaviour):
    share = 4

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
    share = 8
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


BEHAVIOURS = [Agreement(), Induction()]
