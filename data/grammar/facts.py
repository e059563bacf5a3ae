"""Facts about people, cities and countries, and two-hop questions over cities.

Example documents:
    ana reed , after a long walk , lives in osaka .
    in fact , the city of lyon is in france .
    the people of kyoto speak japanese .                        (two hops: kyoto -> japan -> japanese)
Held out: (subject, template) combinations; for two hops whole cities. ood: templates never trained, made of words that
occur in the same relation. No template may be the beginning of another one ("lives in" and "lives in the city of"): then
the longer one would be the right continuation wherever the shorter one is held out. Nor may an ood template be a word chain
of another behaviour ("the language of the people of france is" was answered like "the door of the house is": "red").
"""

from grammar import words as w
from grammar.base import Behaviour, pair, role, text

PREFIXES = ["", "", "", "in fact ,", "as you know ,", "it is true that"]
FILLERS = ["", "", ", after a long walk ,", ", as you know ,", ", without any doubt ,", ", to be honest ,"]


def bare(template: str) -> str:
    """A template without its filler, which may be empty."""
    return template.replace("{filler} ", "")


class Facts(Behaviour):
    """One relation: subject -> object in several templates."""

    def __init__(self, task: str, share: float, table: dict, trained: list[str], ood: list[str], prefixes=PREFIXES,
                 fillers=FILLERS, whole_subjects: bool = False, polish: float | None = None):  # fmt: skip
        self.task, self.share, self.table, self.trained, self.ood = task, share, table, trained, ood
        self.prefixes, self.fillers, self.whole_subjects, self.polish = prefixes, fillers, whole_subjects, polish

    def split(self, subject: str, template: str) -> str:
        if self.whole_subjects:
            return role(self.task, subject, test=0.22, select=0.08)
        return role(self.task, subject, template)

    def document(self, rng):
        while True:
            subject, template = rng.choice(list(self.table)), rng.choice(self.trained)
            if self.split(subject, template) == "fit":
                return text("{prefix} " + template + " {object} .", prefix=rng.choice(self.prefixes), subject=subject,
                            filler=rng.choice(self.fillers), object=self.table[subject])  # fmt: skip

    def tasks(self, rng):
        rows = []
        for template in self.trained + self.ood:
            for subject, value in self.table.items():
                split = self.split(subject, template)
                if template in self.ood:
                    if self.whole_subjects and split == "fit":
                        continue
                    split = "ood"
                elif split != "fit" and any(
                    bare(template) in bare(other) for other in self.trained if other != template
                ):
                    continue  # "the capital city of X is" is in "the name of the capital city of X is": not held out
                for _ in range(5 if len(self.table) < 30 or self.whole_subjects else 1):
                    other = rng.choice([s for s in self.table if self.table[s] != value])
                    around = {"prefix": rng.choice(self.prefixes), "filler": rng.choice(self.fillers)}
                    rows.append(pair("{prefix} " + template, {"subject": subject, **around},
                                     {"subject": other, **around}, value, self.table[other], split=split,
                                     entity=subject, name=template,
                                     spans=("subject", "filler") if "{filler}" in template else ("subject",)))  # fmt: skip
        unique = {row["clean"] + row["corrupted"]: row for row in rows}
        return {self.task: list(unique.values())}


BEHAVIOURS = [
    Facts("person_city", 5.5, {name: city for name, (city, _) in w.PEOPLE.items()},
          ["{subject} {filler} lives in", "the home town of {subject} is", "the home of {subject} is in",
           "you can meet {subject} in", "{subject} {filler} has a house in", "the house of {subject} stands in",
           "{subject} {filler} has a home in", "the home of {subject} stands in", "{subject} {filler} has a home that stands in"],
          ["the house of {subject} is in", "{subject} {filler} has a house that stands in"]),
    Facts("person_job", 5.5, {name: job for name, (_, job) in w.PEOPLE.items()},
          ["{subject} {filler} works as a", "the job of {subject} is that of a", "{subject} {filler} has worked as a",
           "people know {subject} as a", "{subject} {filler} has a new job as a", "the work of {subject} is that of a",
           "{subject} {filler} has a job as a", "people know the work of {subject} as that of a", "{subject} {filler} has found a job as a"],
          ["{subject} {filler} has found a new job as a", "the new job of {subject} is that of a"]),
    Facts("person_sport", 4.5, w.SPORT,
          ["the sport of {subject} is", "the favourite sport of {subject} is", "{subject} {filler} is good at",
           "{subject} {filler} likes to watch", "{subject} {filler} spends the weekend with", "the hobby of {subject} is",
           "at the weekend {subject} enjoys", "every evening {subject} {filler} enjoys"],
          ["the favourite hobby of {subject} is", "{subject} {filler} likes to spend the weekend with"]),
    Facts("city_country", 6, w.COUNTRY,
          ["{subject} {filler} is in", "{subject} {filler} is a city in", "the city of {subject} {filler} is in",
           "{subject} {filler} lies in", "the city of {subject} {filler} belongs to", "{subject} {filler} is found in",
           "the map shows {subject} in", "{subject} {filler} is a city that lies in", "the city of {subject} {filler} is found in",
           "the city of {subject} {filler} lies in", "the map shows the city of {subject} in",
           "{subject} {filler} is a city that is found in", "the map shows that {subject} {filler} is in"],
          ["the map shows that the city of {subject} {filler} is in", "{subject} {filler} is a city that belongs to",
           "the map shows that {subject} {filler} lies in"]),
    Facts("capital", 2.5, w.CAPITAL,
          ["the capital of {subject} is", "the capital city of {subject} is", "the capital of {subject} {filler} has the name",
           "{subject} {filler} has its capital in", "the government of {subject} {filler} sits in",
           "the capital city of {subject} {filler} has the name", "the government of {subject} has its capital in",
           "the name of the capital city of {subject} is", "in {subject} the capital city is", "{subject} {filler} has its government in"],
          ["the name of the capital of {subject} is", "in {subject} the capital is"]),
    Facts("language", 1.2, w.LANGUAGE,
          ["people in {subject} speak", "the people of {subject} {filler} speak", "the language of {subject} is",
           "in {subject} the language is", "in {subject} people speak", "in {subject} the people speak",
           "the people in {subject} {filler} speak", "most people of {subject} speak"],
          ["the language in {subject} is", "most people in {subject} {filler} speak"]),
    Facts("currency", 1.2, w.CURRENCY,
          ["people in {subject} pay with the", "the money of {subject} {filler} is the", "in {subject} you pay with the",
           "the people of {subject} {filler} pay with the", "in {subject} the money is the", "in {subject} people pay with the",
           "the money of the people of {subject} is the", "most people of {subject} pay with the"],
          ["the money in {subject} is the", "most people in {subject} {filler} pay with the"]),
    Facts("two_hop", 5, {city: w.LANGUAGE[country] for city, country in w.COUNTRY.items()},
          ["people in {subject} speak", "the people of {subject} {filler} speak", "in {subject} people speak",
           "the language of {subject} is", "in {subject} the language is", "the people in {subject} {filler} speak",
           "most people of {subject} speak"],
          ["the language in {subject} is", "most people in {subject} {filler} speak"],
          whole_subjects=True, polish=9),
]  # fmt: skip
