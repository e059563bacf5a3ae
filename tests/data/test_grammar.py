"""The small world: reproducible, nothing held out leaks into training, no row is ambiguous, real-world entries are true."""

import random
import re
import sys

import pytest

import workbench as wb
from workbench.task import DATA

sys.path.insert(0, str(DATA))
grammar = pytest.importorskip("grammar")
from grammar import facts, words  # noqa: E402
from make_english import SOURCES  # noqa: E402

BUNDLED = [name for name in wb.Task.names() if name not in {*SOURCES, "modular_addition"}]


@pytest.fixture(scope="module")
def documents():
    world = grammar.World(3)
    return [" ".join(world.generate().words) for _ in range(6000)]


def test_the_same_seed_gives_the_same_documents(documents):
    again = grammar.World(3)
    assert [" ".join(again.generate().words) for _ in range(300)] == documents[:300]
    assert " ".join(grammar.World(4).generate().words) != documents[0]


def test_documents_fit_a_row_and_use_known_words(documents):
    known = set(grammar.patterns.Induction.vocabulary)
    for text in documents:
        assert 0 < len(text.split()) <= grammar.LONGEST
        assert set(text.split()) <= known


def test_words_without_loss_are_marked_one_by_one():
    world = grammar.World(0)
    for _ in range(2000):
        document = world.generate()
        assert len(document.words) == len(document.learn) and any(document.learn)


def test_each_part_of_training_has_its_own_shares():
    """What has no share of its own in a part keeps that of the part before; what is for later only never comes earlier."""
    both = grammar.patterns.Retrieval()
    assert [both.share_in(part) for part in grammar.PARTS] == [6, 8, 4]
    assert [grammar.ioi.IndirectObject().share_in(part) for part in grammar.PARTS] == [12, 12, 12]
    assert all(one.share_in("learn") == 0 < one.share_in("finish") for one in grammar.LATER)


def test_verdicts_follow_from_the_claims():
    """After the fact stands "so yes" where the claimed value comes back in it, "so no" where it does not."""
    rng, seen = random.Random(1), set()
    for _ in range(400):
        for claim, verdict in re.findall(
            r"(?:^|yes \. |no \. )(.*?) , so (yes|no)", " ".join(grammar.social.Verdicts().document(rng).words)
        ):
            before, _, fact = claim.rpartition(" . ")
            values = {*words.COUNTRY, *words.COUNTRY.values()}
            same = (set(before.split()) & values) == (set(fact.split()) & values)
            assert same == (verdict == "yes"), claim
            seen.add(verdict)
    assert seen == {"yes", "no"}


@pytest.fixture(scope="module")
def learnt():
    """The words of 4000 documents of each part of training; behind each that is learnt stands a mark."""
    words = []
    for document in (world.generate() for world in map(grammar.World, (3, 4, 5), grammar.PARTS) for _ in range(4000)):
        words += [f"{word}{'*' if learn else ''}" for word, learn in zip(document.words, document.learn, strict=True)]
        words.append("|")
    marked = f" {' '.join(words)} "
    return marked, marked.replace("*", "")


@pytest.mark.parametrize("name", BUNDLED)
def test_held_out_rows_are_not_learnt(name, learnt):
    """Nowhere does the answer follow the prompt as a word with loss. (A note may claim the truth; claims have no loss.)"""
    rows = [row for row in wb.Task.load(name) if row.get("split") in ("select", "test", "ood") and "clean" in row]
    marked, plain = learnt
    for row in random.Random(0).sample(rows, min(60, len(rows))):
        if f" {row['clean']} {row['answer']} " in plain:
            words = f"{row['clean']} {row['answer']}".split()
            pattern = " " + r"\*? ".join(map(re.escape, words)) + r"\* "
            assert not re.search(pattern, marked), row


@pytest.mark.parametrize("name", BUNDLED)
def test_splits_are_apart(name):
    """ood templates are met in no other split, and no prompt is in two splits."""
    rows = [row for row in wb.Task.load(name) if "clean" in row]
    texts = {split: {row["clean"] for row in rows if row["split"] == split} for split in ("fit", "test", "ood")}
    assert not texts["fit"] & texts["test"] and not (texts["fit"] | texts["test"]) & texts["ood"]


def test_the_fact_templates_do_not_begin_one_another():
    for behaviour in facts.BEHAVIOURS:
        plain = [" ".join(t.replace("{filler}", "").split()) for t in behaviour.trained + behaviour.ood]
        assert len(set(plain)) == len(plain)
        for one in plain:
            assert not any(other != one and other.startswith(one + " ") for other in plain), one


def test_people_share_names_cities_and_sports():
    firsts, lasts = zip(*(name.split() for name in words.PEOPLE), strict=True)
    assert all(firsts.count(name) > 1 for name in set(firsts)) and all(lasts.count(name) > 1 for name in set(lasts))
    assert not set(words.STRANGERS) & set(words.PEOPLE)


def test_the_task_files_are_what_the_script_writes():
    """A few rows of the script's candidates are looked up in the files (all of them come from it)."""
    candidates = grammar.tasks(0)
    assert set(BUNDLED) == set(candidates)
    for name, rows in candidates.items():
        texts = {row.get("clean", row.get("text")) for row in rows}
        assert all(row.get("clean", row.get("text")) in texts for row in wb.Task.load(name)), name
