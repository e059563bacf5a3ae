"""Numbers: sums, and years that come later or earlier.

Example documents:
    17 + 25 = 42 .   3 plus 8 is 11 .
    the war lasted from the year 17 43 to the year 17 61 .      (any later year of the century)
    the war that ended in the year 17 43 began in the year 17 20 .   (any earlier one: the same words, the other way round)
Held out: sums by a hash (by a rule over the numbers the model would learn the rule); (event, year) pairs. ood: templates never
trained. Numbers are one word each, 0 to 99.
"""

from grammar import words as w
from grammar.base import Behaviour, Document, fill, pair, role

LARGEST = 49  # of an addend; with 39 a trial learnt them more slowly


class Addition(Behaviour):
    share, polish, finish = 9, 11, 12
    trained = ("{a} + {b} =", "{a} plus {b} is", "{a} plus {b} =", "the sum of {a} and {b} is", "what is {a} + {b} ? it is",
               "if you add {a} and {b} you get")  # fmt: skip
    ood = ("what is {a} plus {b} ? it is", "{a} + {b} is", "the sum of {a} + {b} is")

    @staticmethod
    def split(a: int, b: int) -> str:
        return role("sum", *sorted((a, b)))

    def document(self, rng):
        words, template = [], rng.choice(self.trained)
        for _ in range(rng.randint(1, 5)):
            while True:
                a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
                if self.split(a, b) == "fit":
                    break
            if rng.random() < 0.3:
                template = rng.choice(self.trained)
            words += fill(template + " {c} .", a=str(a), b=str(b), c=str(a + b))[0]
        return Document(words)

    def tasks(self, rng):
        rows = []
        for template in self.trained + self.ood:
            for wanted in ("fit", "select", "test", "test") * 30:
                a = rng.randint(0, LARGEST)
                others = [b for b in range(LARGEST + 1) if self.split(a, b) == wanted]
                if len(others) < 2 or (template in self.ood and wanted == "fit"):
                    continue
                b, d = rng.sample(others, 2)
                split = "ood" if template in self.ood else wanted
                rows.append(pair(template, {"a": str(a), "b": str(b)}, {"a": str(a), "b": str(d)}, str(a + b), str(a + d),
                                 split=split, entity=f"{a} + {b}", spans=("a", "b")))  # fmt: skip
        return {"addition": rows}


class Years(Behaviour):
    """Greater-than (Hanna et al. 2023) and its mirror image, less-than."""

    share = 2.5
    events = ("war", "peace", "journey", "reign", "drought", "project", "famine", "voyage", "trade", "siege")
    later = ("the {event} lasted from the year {century} {year} to the year {century}",
             "the {event} that began in the year {century} {year} ended in the year {century}",
             "in {century} {year} the {event} began and it ended in {century}",
             "from {century} {year} the {event} went on until {century}",
             "the {event} of {century} {year} ended in {century}")  # fmt: skip
    earlier = ("the {event} that ended in the year {century} {year} began in the year {century}",
               "in {century} {year} the {event} ended and it began in {century}",
               "until {century} {year} the {event} went on from {century}")  # fmt: skip
    ood = ("the {event} that began in {century} {year} ended in {century}",
           "the {event} lasted from {century} {year} until {century}")  # fmt: skip

    def document(self, rng):
        while True:
            event, century, year = rng.choice(self.events), str(rng.randint(11, 18)), rng.randint(2, 97)
            if role("year", event, year) == "fit":
                break
        later = rng.random() < 0.6
        template = rng.choice(self.later if later else self.earlier)
        end = rng.randint(year + 1, 98) if later else rng.randint(1, year - 1)
        return Document(fill(template + " {end} .", event=event, century=century, year=str(year), end=str(end))[0])

    def tasks(self, rng):
        """clean: a late start; corrupted: an early one. The answer lies after both, the foil between them, and `right` has all
        right words after clean."""
        rows = []
        for template in self.later + self.ood:
            for wanted in ("fit", "select", "test", "test") * 40:
                event, century = rng.choice(self.events), str(rng.randint(11, 18))
                years = [y for y in range(2, 91) if role("year", event, y) == wanted]
                early, year = sorted(rng.sample(years, 2)) if len(years) > 1 else (0, 0)
                if year < 30 or year - early < 10 or (template in self.ood and wanted == "fit"):
                    continue
                split = "ood" if template in self.ood else wanted
                slots = {"event": event, "century": century}
                row = pair(template, slots | {"year": str(year)}, slots | {"year": str(early)}, str(rng.randint(year + 1, 98)),
                           str(rng.randint(early + 1, year)), split=split, entity=f"{event} {year}", spans=("year",))  # fmt: skip
                rows.append(row | {"right": w.NUMBERS[year + 1 :]})
        return {"greater_than": rows}


BEHAVIOURS = [Addition(), Years()]
