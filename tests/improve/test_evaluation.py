"""Evaluation: a change that helps is told from one that does not, with intervals rebuilt by hand."""

import numpy as np
import pytest
from tiny import copying

import workbench as wb


@pytest.fixture(scope="module")
def target():
    """Make the model answer w7 after a w4: the opposite of what it does."""
    rows = []
    for i, row in enumerate(copying(40)):
        split = "fit" if i < 16 else "test" if i < 28 else "ood"
        rows.append(row | {"answer": "w7", "foil": "w6", "split": split})
    return wb.Task(rows, "flip")


@pytest.fixture(scope="module")
def guards():
    kept = [row | {"clean": row["corrupted"], "corrupted": row["clean"], "answer": "w7", "foil": "w6", "spans": {}}
            for row in copying(20, 5)]  # fmt: skip
    return [wb.Task(kept, "kept"), wb.Task([{"text": row["clean"]} for row in copying(6, 6)], "texts")]


@pytest.fixture(scope="module")
def report(trained, target, guards):
    push = wb.steer.vector.difference_of_means(trained, target, "resid_post.1@-1")
    return wb.improve.evaluate(trained, wb.Recipe([-push], "flip it"), target, guards, draws=3)


def test_the_target_moves_and_the_controls_do_not(report):
    row = report.row()
    assert (row["before"], row["after"]) == (0.0, 1.0) and row["ci_lo"] > 0.9 and row["n"] == 12
    assert (report.against[report.against.metric == "accuracy"].ci_lo > 0).all()
    assert set(report.frame.arm) == {"recipe", "random direction (best of 3)", "random components (best of 3)"}
    assert "clear of every control" in report.verdict


def test_guards_and_background(report):
    assert report.row("kept", "all")["change"] == 0
    kl, loss = report.row("texts", "all", "kl"), report.row("texts", "all", "loss")
    assert kl["after"] > 0 and kl["p99"] >= kl["p95"] and loss["n"] == 6 * 5  # 7 words, the first 2 are the prompt


def test_doing_nothing_changes_nothing(trained, target, guards):
    nothing = wb.improve.evaluate(trained, wb.Scale("z.0.0", 1), target, guards, draws=1)
    own = nothing.frame[nothing.frame.arm == "recipe"]
    assert (own.change == 0).all() and "NOT clear" in nothing.verdict


def test_intervals_follow_from_the_examples(report):
    """The interval of the target's change, rebuilt from the per-prompt table by a plain bootstrap."""
    each = report.examples
    part = each[(each.arm == "recipe") & (each.task == "flip") & (each.split == "ood") & (each.metric == "logit_diff")]
    change = (part.after - part.before).to_numpy()
    rng = np.random.default_rng(1)
    drawn = rng.choice(change, (4000, len(change))).mean(1)
    row = report.row(metric="logit_diff")
    assert row["change"] == pytest.approx(change.mean())
    assert [row["ci_lo"], row["ci_hi"]] == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]), abs=float(0.15 * change.std())
    )


def test_repeatable(trained, target, guards, report):
    push = wb.steer.vector.difference_of_means(trained, target, "resid_post.1@-1")
    again = wb.improve.evaluate(trained, wb.Recipe([-push], "flip it"), target, guards, draws=3)
    assert again.frame.equals(report.frame)


def test_saving_and_drawing(report, tmp_path):
    again = wb.Report.load(report.save(tmp_path / "r"))
    assert again.verdict == report.verdict and len(again.examples) == len(report.examples)
    report.plot().savefig(tmp_path / "forest.png")
    with pytest.raises(FileNotFoundError, match=r"report\.json"):
        wb.Report.load(tmp_path)
    with pytest.raises(KeyError, match="No line for task 'nope'"):
        report.row("nope")


def test_rows_that_do_not_fit_are_left_out(trained, target):
    bad = dict(target.rows[-1], answer="w60 w61")
    small = wb.improve.evaluate(trained, wb.Zero("z.0.0"), wb.Task([*target.rows, bad], "flip"), draws=1)
    assert small.row()["n"] == 12


def test_a_recipe_that_cannot_act_on_a_guard_is_refused_first(trained, target, guards):
    with pytest.raises(ValueError, match=r"does not fit task 'kept' .*no span 'cause'"):
        wb.improve.evaluate(trained, wb.Zero("z.0.0@cause"), target, guards)


def test_tasks_need_names_to_be_told_apart(trained, target):
    with pytest.raises(ValueError, match="different names"):
        wb.improve.evaluate(trained, wb.Zero("z.0.0"), target, [target])


def test_the_target_must_be_pairs(trained, guards):
    with pytest.raises(ValueError, match="must be a task of pairs"):
        wb.improve.evaluate(trained, wb.Zero("z.0.0"), guards[1])
