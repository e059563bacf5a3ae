"""Indirect objects: the sentence ends with the name that has not acted.

Example documents:
    when ana and tom went to the store , tom gave a drink to ana .          (both orders of the names)
    when ana and tom went to the store , tom , a friend of leo , gave a drink to ana .   (the last name is a third one)
    when ana and tom went to the store , leo gave a drink to tom .          (control: either name can follow)
Held out: unordered pairs of names. ood: held-out pairs after beginnings never trained.
"""

from itertools import combinations

from grammar import words as w
from grammar.base import Behaviour, Document, fill, pair, role

TRAINED = [  # beginnings
    "when {a} and {b} went to the {place} ,", "after {a} and {b} met at the {place} ,", "while {a} and {b} were at the {place} ,",
    "because {a} helped {b} at the {place} ,", "before {a} left the {place} with {b} ,", "{a} and {b} walked to the {place} and",
    "{a} waited with {b} at the {place} until", "yesterday {a} saw {b} at the {place} , so",
    "{a} had lunch with {b} at the {place} . later", "friends like {a} and {b} often go to the {place} . today",
    "{a} and {b} sat in the {place} . then", "{a} found {b} in the {place} . after that",
    "the {place} was quiet when {a} met {b} , and", "{a} invited {b} to the {place} , where",
    "at the {place} {a} talked to {b} , then", "once {a} and {b} played in the {place} , but",
]  # fmt: skip
OOD = [
    "after {a} had lunch with {b} at the {place} ,",
    "{a} met {b} in the {place} . then",
    "while {a} walked with {b} to the {place} ,",
]
ENDS = [f"{{s2}} {{friend}} {verb} {{gift}} to" for verb in (
    "gave a", "gave the", "handed a", "handed the", "sent a", "showed the", "brought a", "passed the", "offered a", "sold the",
    "threw the")]  # fmt: skip


def split(a: str, b: str) -> str:
    return role("ioi", *sorted((a, b)))


class IndirectObject(Behaviour):
    share = 16

    def draw(self, rng):
        a, b, c = rng.sample(w.FIRST, 3)
        s = rng.choice((a, b))
        slots = dict(a=a, b=b, s2=s, place=rng.choice(w.PLACES), gift=rng.choice(w.GIFTS), friend="")
        return slots, (b if s == a else a), c

    def document(self, rng):
        while True:
            template = f"{rng.choice(TRAINED)} {rng.choice(ENDS)}"
            slots, io, third = self.draw(rng)
            if {split(*two) for two in combinations((slots["a"], slots["b"], third), 2)} != {"fit"}:
                continue
            kind = rng.random()
            if kind < 0.15:
                slots["friend"] = f", a friend of {third} ,"
            elif kind < 0.23:
                slots["s2"] = third
            return Document(fill(template + " {io} .", io=io, **slots)[0])

    def tasks(self, rng):
        rows = []
        for beginning in TRAINED + OOD:
            for _ in range(300 if beginning in TRAINED else 600):
                slots, io, third = self.draw(rng)
                where = split(slots["a"], slots["b"])
                if beginning in OOD:
                    if where == "fit":
                        continue
                    where = "ood"
                if rng.random() < 0.15:
                    slots["friend"] = f", a friend of {third} ,"
                name = f"{beginning} {rng.choice(ENDS)}"
                first, second = ("io", "s1") if io == slots["a"] else ("s1", "io")
                template = name.replace("{a}", "{" + first + "}").replace("{b}", "{" + second + "}")
                slots |= {"io": io, "s1": slots["s2"]}
                row = pair(template, slots, slots | {"s2": io}, io, slots["s2"], split=where,
                           entity=f"{io} {slots['s2']}", spans=("io", "s1", "s2"), name=name)  # fmt: skip
                rows.append(row | {"order": "ABB" if first == "io" else "BAB"})
        return {"ioi": rows}


BEHAVIOURS = [IndirectObject()]
