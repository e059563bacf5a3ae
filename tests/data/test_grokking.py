"""The grokking model: true sums, and checkpoints that know the trained pairs by heart long before the others."""

import csv

import pytest

import workbench as wb
from workbench.task import DATA

TASK = wb.Task.load("modular_addition")


def right(revision, split):
    model = wb.load("grokking", revision=revision)
    return TASK.split(split).score(model, metric="accuracy").mean().item()


def test_the_sums_are_true_and_no_pair_is_in_two_splits():
    pairs = {}
    for row in TASK:
        a, b = (int(word) for word in row["clean"].split() if word.isdigit())
        assert int(row["answer"]) == (a + b) % 59
        pairs.setdefault(frozenset((a, b)), set()).add(row["split"])
    assert all(len(splits) == 1 for splits in pairs.values())


def test_it_memorises_first_and_understands_later():
    steps = wb.revisions("grokking")
    assert [int(step[4:]) for step in steps] == sorted(int(step[4:]) for step in steps) and len(steps) >= 6
    assert right(steps[0], "fit") < 0.5
    assert right(steps[1], "fit") == 1 and right(steps[1], "test") < 0.1
    assert right(None, "fit") == 1 and right(None, "test") >= 0.99


def test_the_curve_has_its_progress_measures():
    with open(DATA / "grokking" / "progress.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    first, last = rows[0], rows[-1]
    assert float(last["fourier_keys"]) > 2 * float(first["fourier_keys"])
    assert float(last["fourier_gini"]) > 2 * float(first["fourier_gini"])


def test_a_revision_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"'grokking' has no revision 'step1'. It has: step20, step80"):
        wb.load("grokking", revision="step1")
