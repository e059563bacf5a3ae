"""Indirect objects: the sentence ends with the name that has not acted.

Example documents:
    when ana and tom went to the store , tom gave a drink to ana .          (both orders of the names)
    when ana and tom went to the store , tom , a friend of leo , gave a drink to ana .   (the last name is a third one)
    when ana and tom went to the store , tom looked at ana and gave a drink to ana .     (the last name is the answer)
    when ana , leo and tom went to the store , tom and leo gave a drink to ana .         (two names have acted)
    when ana and tom went to the store , leo gave a drink to tom .          (control: either name can follow)
So neither "not the last name" nor "the name that came once" alone is enough, and no single head can do it all.
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
    "after {a} had lunch with {b} at the {place} ,", "{a} met {b} in the {place} . then", "while {a} walked with {b} to the {place} ,",
]  # fmt: skip
OOD = [
    "because {a} met {b} at the {place} ,",
    "while {a} talked to {b} in the {place} ,",
    "{a} and {b} had lunch in the {place} . later",
]
THREE = ["when {a} , {b} and {c} went to the {place} ,", "{a} , {b} and {c} sat in the {place} . then",
         "after {a} , {b} and {c} met at the {place} ,", "at the {place} {a} talked to {b} and {c} , then"]  # fmt: skip
GIVE = ["gave a", "gave the", "handed a", "handed the", "sent a", "showed the", "brought a", "passed the", "offered a", "sold the",
        "threw the"]  # fmt: skip
SEEN = [
    "{s2} looked at {x} and",
    "{s2} smiled at {x} and",
    "{s2} , who liked {x} ,",
    "{s2} called {x} and",
]  # the last name is the answer


def end(rng, start: str = "{s2}") -> str:
    return f"{start} {rng.choice(GIVE)} {{gift}} to"


def split(a: str, b: str) -> str:
    return role("ioi", *sorted((a, b)))


class IndirectObject(Behaviour):
    share = 12

    @staticmethod
    def draw(rng) -> tuple[dict, str, str]:
        a, b, c = rng.sample(w.FIRST, 3)
        s = rng.choice((a, b))
        return dict(a=a, b=b, s2=s, place=rng.choice(w.PLACES), gift=rng.choice(w.GIFTS)), (b if s == a else a), c

    def document(self, rng):
        while True:
            slots, io, third = self.draw(rng)
            if {split(*two) for two in combinations((slots["a"], slots["b"], third), 2)} == {"fit"}:
                break
        kind = rng.choices(("plain", "friend", "seen", "three", "stranger"), (40, 15, 20, 15, 10))[0]
        begin, start = rng.choice(TRAINED), "{s2}"
        if kind == "friend":
            start = "{s2} , a friend of {third} ,"
        elif kind == "seen":
            start = rng.choice(SEEN)
        elif kind == "three":  # the two others act together
            names = rng.sample((io, slots["s2"], third), 3)
            begin, start = rng.choice(THREE), "{s2} and {third}" if rng.random() < 0.5 else "{third} and {s2}"
            slots |= dict(zip("abc", names, strict=True))
        elif kind == "stranger":
            slots["s2"] = third
        return Document(fill(f"{begin} {end(rng, start)} {{io}} .", io=io, x=io, third=third, **slots)[0])

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
                kind = rng.choices(("plain", "friend", "seen"), (65, 15, 20))[0]
                start = {"plain": "{s2}", "friend": "{s2} , a friend of {third} ,", "seen": rng.choice(SEEN)}[kind]
                name = f"{beginning} {end(rng, start)}"
                first, second = ("io", "s1") if io == slots["a"] else ("s1", "io")
                template = name.replace("{a}", "{" + first + "}").replace("{b}", "{" + second + "}")
                slots |= {"io": io, "s1": slots["s2"], "third": third, "x": io}
                row = pair(template, slots, slots | {"s2": io, "x": slots["s2"]}, io, slots["s2"], split=where,
                           entity=f"{io} {slots['s2']}", spans=("io", "s1", "s2"), name=name)  # fmt: skip
                rows.append(row | {"order": "ABB" if first == "io" else "BAB", "kind": kind})
        return {"ioi": rows}


BEHAVIOURS = [IndirectObject()]
