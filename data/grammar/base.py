"""What a behaviour of the world is: documents to train on and rows to test with.

Example document:  Document(words=["ana", "reed", "lives", "in", "osaka", "."], learn=[True, ...])
Example template:  "the home of {subject} is in", filled with subject="ana reed"
"""

import hashlib
import random
from dataclasses import dataclass, field

PARTS = ("learn", "polish", "finish")  # of training; in the later ones what is hard comes more often


@dataclass
class Document:
    """Words of one training document; the loss is taken on the words marked in `learn` (by default all)."""

    words: list[str]
    learn: list[bool] = field(default_factory=list)

    def __post_init__(self):
        self.learn = self.learn or [True] * len(self.words)

    def __add__(self, other: "Document") -> "Document":
        return Document(self.words + other.words, self.learn + other.learn)


class Behaviour:
    """One behaviour. Subclasses set the share of training tokens and say what to train on and what to test with."""

    share: float  # per cent of the training tokens
    polish: float | None = None  # its share in the second part of training, where it is another one
    finish: float | None = None  # its share in the last part, where it differs from the second
    chat: bool = False  # at most one chat goes into a joined document

    def share_in(self, part: str) -> float:
        """Its share in one of the `PARTS` of training."""
        shares = [self.share, self.polish, self.finish][: PARTS.index(part) + 1]
        return next(share for share in reversed(shares) if share is not None)

    def document(self, rng: random.Random) -> Document:
        """One training document; never a held-out combination."""
        raise NotImplementedError

    def tasks(self, rng: random.Random) -> dict[str, list[dict]]:
        """Candidate rows by task name; `make_tasks.py` draws from them."""
        return {}


def role(*key, test: float = 0.15, select: float = 0.05) -> str:
    """The fixed random split of a combination: "fit" (trained), "select" or "test" (both held out of training).

    Drawn from a hash of the key, so no rule over words or numbers can be learnt that tells what is held out.
    """
    draw = int(hashlib.sha256(repr(key).encode()).hexdigest()[:12], 16) / 16**12
    return "test" if draw < test else "select" if draw < test + select else "fit"


def strictest(*roles: str) -> str:
    """The split of a row that rests on several combinations."""
    return max(roles, key=["fit", "select", "test"].index, default="fit")


def fill(template: str, **slots: str) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The words of a filled template, and where each slot stands (first word, last word + 1)."""
    words, where = [], {}
    for part in template.split():
        if part.startswith("{"):
            new = slots[part[1:-1]].split()
            where.setdefault(part[1:-1], (len(words), len(words) + len(new)))
            words += new
        else:
            words.append(part)
    return words, where


def text(template: str, **slots: str) -> Document:
    """A document from a template."""
    return Document(fill(template, **slots)[0])


def pair(template: str, clean: dict, corrupted: dict, answer: str, foil: str, *, split: str, entity: str,
         spans: tuple[str, ...] = (), name: str = "") -> dict:  # fmt: skip
    """A row of a pair task: the same template filled in two ways, of equal length."""
    words, where = fill(template, **clean)
    other, _ = fill(template, **corrupted)
    assert len(words) == len(other) and words != other, (words, other)
    starts = [0]
    for word in words:
        starts.append(starts[-1] + len(word) + 1)
    chars = {s: [starts[where[s][0]], starts[where[s][1]] - 1] for s in spans if where[s][0] < where[s][1]}
    chars["end"] = [starts[-2], starts[-1] - 1]
    return {"clean": " ".join(words), "corrupted": " ".join(other), "answer": answer, "foil": foil,
            "template": name or template, "entity": entity, "split": split, "spans": chars}  # fmt: skip
