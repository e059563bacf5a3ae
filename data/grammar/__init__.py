"""The small world that the bundled model is trained on.

`World(seed).generate()` gives one training document, `tasks(seed)` all task rows. To add a behaviour, write a module with
a `Behaviour` (see base.py) and list the module here.

Example: World(0).generate().words -> ["the", "city", "of", "lyon", "is", "in", "france", "."]
"""

import random

from grammar import arithmetic, background, chat, facts, ioi, knowledge, languages, patterns, refusal, social
from grammar.base import PARTS, Behaviour, Document

__all__ = ["BEHAVIOURS", "LATER", "PARTS", "World", "tasks", "vocabulary"]

MODULES = (facts, knowledge, ioi, patterns, arithmetic, languages, chat, refusal, social, background)
LATER = [knowledge.Spelt(), knowledge.Agreeing(), patterns.LongRetrieval(), social.Verdicts(), languages.Signs()]
BEHAVIOURS: list[Behaviour] = [*(b for m in MODULES for b in m.BEHAVIOURS), *LATER]
LONGEST = 92  # words of a document
JOINED = 0.2  # share of documents that are two or three unrelated ones in a row


def vocabulary() -> list[str]:
    """Every word of the world: whatever 4,000 documents and all rows of each behaviour use, sorted."""
    found = set()
    for behaviour in BEHAVIOURS:
        if isinstance(behaviour, patterns.Induction):
            continue
        rng = random.Random(0)
        for _ in range(4000):
            found.update(behaviour.document(rng).words)
        for rows in behaviour.tasks(rng).values():
            for row in rows:
                for column in ("text", "clean", "corrupted", "answer", "foil"):
                    found.update(row.get(column, "").split())
    return sorted(found)


patterns.Induction.vocabulary = tuple(vocabulary())


class World:
    """A stream of training documents, the same for the same seed.

    Args:
        part: of training, one of `PARTS`; each has its own shares.
    """

    def __init__(self, seed: int, part: str = "learn"):
        self.rng = random.Random(seed)
        probe = random.Random(0)
        lengths = [sum(len(b.document(probe).words) + 2 for _ in range(300)) / 300 for b in BEHAVIOURS]
        shares = [b.share_in(part) for b in BEHAVIOURS]
        self.weights = [share / length for share, length in zip(shares, lengths, strict=True)]

    def generate(self) -> Document:
        document, chat = Document([]), False
        parts = self.rng.choice((2, 3)) if self.rng.random() < JOINED else 1
        for behaviour in self.rng.choices(BEHAVIOURS, self.weights, k=parts):
            if behaviour.chat and chat:
                continue
            new = behaviour.document(self.rng)
            if len(document.words) + len(new.words) <= LONGEST:
                document = document + new if document.words else new
                chat = chat or behaviour.chat
        return document


def tasks(seed: int) -> dict[str, list[dict]]:
    """Candidate rows of every task, by name."""
    found = {}
    for behaviour in BEHAVIOURS:
        for name, rows in behaviour.tasks(random.Random(f"{seed} {type(behaviour).__name__}")).items():
            found.setdefault(name, []).extend(rows)
    stated = knowledge.Steps().stated()
    for name in ("person_city", "city_country"):
        found[name] = [row for row in found[name] if row["split"] == "fit" or f" {bare(row)} " not in stated]
    return found


def bare(row: dict) -> str:
    """A fact as it is said without the words that may stand before it."""
    start = max((prefix for prefix in facts.PREFIXES if row["clean"].startswith(prefix)), key=len)
    return f"{row['clean'].removeprefix(start).strip()} {row['answer']}"
