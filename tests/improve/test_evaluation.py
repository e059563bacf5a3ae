"""Evaluation: a change that helps is told from one that does not, with intervals rebuilt by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
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


def test_every_interval_follows_from_the_table_of_examples(report):
    """All of the recipe's intervals on pairs, rebuilt with numpy and scipy alone; entities and templates are resampled."""
    from scipy.stats import bootstrap

    each = report.examples[report.examples.arm == "recipe"]
    for (task, split, metric), part in each[each.task != "texts"].groupby(["task", "split", "metric"]):
        change, row = (part.after - part.before).to_numpy(), report.row(task, split, metric)
        assert row["change"] == pytest.approx(change.mean(), rel=1e-6) and part.template.nunique() == 1
        if np.ptp(change) == 0:
            assert row["ci_lo"] == row["ci_hi"] == pytest.approx(change.mean())
            continue
        again = bootstrap((change,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2))
        wanted = [again.confidence_interval.low, again.confidence_interval.high]
        assert [row["ci_lo"], row["ci_hi"]] == pytest.approx(wanted, abs=0.12 * change.std())


def checks(report, claim, task=None):
    found = report.checks[(report.checks.claim == claim) & ((task is None) | (report.checks.task == task))]
    return dict(zip(found.split, found.holds, strict=True))


def test_a_true_claim_is_accepted(report):
    assert checks(report, "helps") == {"test": "yes", "ood": "yes"} == checks(report, "beats controls")
    assert "no" not in set(report.checks[report.checks.task == "kept"].holds)
    assert report.verdict.startswith("It helps, beyond every control.")


def test_a_recipe_that_helps_on_fit_only_is_caught(trained, target):
    """It puts another word where the cause stands in fit; in ood the cause stands one place later."""
    rows = []
    for row in target.rows:
        if row["split"] == "ood":
            later = {
                side: " ".join([row[side].split()[-1], *row[side].split()[:-1]]) for side in ("clean", "corrupted")
            }
            row = row | later | {"spans": {}}
        rows.append(row)
    embed = trained.weight("W_E")
    swap = wb.Add("resid_pre.0@2", embed[5] - embed[4])
    found = wb.improve.evaluate(trained, swap, wb.Task(rows, "flip"), splits=("fit", "ood"), draws=2)
    assert checks(found, "helps")["fit"] == "yes" and checks(found, "helps")["ood"] != "yes"
    assert not found.accepted and "NOT shown to help" in found.verdict and "helps on flip (ood)" in found.verdict


def test_one_no_better_than_a_random_direction_is_caught(trained, target):
    vector = np.random.default_rng(8).standard_normal(32) * 20
    found = wb.improve.evaluate(trained, wb.Add("resid_post.1@-1", vector), target)
    assert "yes" not in checks(found, "beats controls").values() and not found.accepted
    assert "NOT clear of its controls" in found.verdict and "beats controls on flip" in found.verdict


def test_a_guard_at_its_ceiling_that_loses_margin_is_caught(trained, target, guards):
    away = trained.weight("W_U")
    push = wb.Add("resid_post.2@-1", away[:, 6] - away[:, 7])
    helped = wb.Task([row | {"answer": "w6", "foil": "w7"} for row in target.rows], "more w6")
    size = next(f for f in np.arange(0.05, 5, 0.05) if helped_margin(trained, f * push, guards[0]) < 0.7)
    found = wb.improve.evaluate(trained, size * push, helped, guards[:1], draws=2)
    assert found.row("kept", "all")["after"] == 1 == found.row("kept", "all")["before"]
    assert checks(found, "keeps margin", "kept") == {"all": "no"} and not found.accepted
    assert "It HARMS kept (in margin)." in found.verdict


def helped_margin(model, push, guard):
    return guard.score(model, push).mean() / guard.score(model).mean()


def test_whole_replies_prompts_and_further_controls(trained, target, guards):
    """ "exact" is 1 where decoding gives the whole completion; a prompt and a named recipe are controls as well."""
    said = [row | {"completion": trained.generate(row["clean"], max_new_tokens=3)} for row in target.rows]
    said = [row for row in said if len(row["completion"].split()) == 3]
    assert len(said) > 8
    push = wb.steer.vector.difference_of_means(trained, target, "resid_post.1@-1")
    found = wb.improve.evaluate(
        trained, -push, wb.Task(said, "said"), prompt="w9 w10", controls={"half": -0.5 * push}, draws=2
    )
    for split in ("test", "ood"):
        assert found.row(split=split, metric="exact")["before"] == 1 > found.row(split=split, metric="exact")["after"]
    assert {"half", "prompt: w9 w10"} <= set(found.against.control)
    with pytest.raises(ValueError, match="half does not fit task 'said'"):
        wb.improve.evaluate(trained, push, wb.Task(said, "said"), controls={"half": wb.Zero("z.0.0@nowhere")})
    with pytest.raises(ValueError, match="no tolerance 'speed'"):
        wb.improve.evaluate(trained, push, target, tolerances={"speed": 1})


def test_background_is_added_where_the_model_can_read_it(trained, target):
    assert "background" not in set(wb.improve.evaluate(trained, wb.Zero("z.0.0"), target, draws=1).frame.task)
    assert "no background text" in wb.improve.evaluate(trained, wb.Zero("z.0.0"), target, draws=1).verdict


def test_one_file_that_needs_no_network(report, tmp_path):
    text = report.html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in text and report.verdict.splitlines()[0] in text
    assert "http:" not in text and "https:" not in text and "<script" not in text


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


def test_a_picture_of_many_controls(report):
    more = [report.frame[report.frame.arm == "recipe"].assign(arm=f"control {i}") for i in range(12)]
    many = replace(report, frame=pd.concat([report.frame, *more]))
    (legend,) = (ax.get_legend() for ax in many.plot().axes)
    assert {f"control {i}" for i in range(12)} <= {text.get_text() for text in legend.get_texts()}


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


def test_background_is_left_out_where_texts_are_longer_than_the_model_reads(course):
    from workbench.improve.evaluation import _background

    lengths = [len(course.ids(row["text"])) for row in wb.Task.load("background")]
    assert len(_background(course)[0]) == len(lengths)
    before = course.hf.config.max_position_embeddings
    try:
        course.hf.config.max_position_embeddings = int(np.median(lengths))
        assert 0 < len(_background(course)[0]) < len(lengths)
        course.hf.config.max_position_embeddings = 3
        assert _background(course) == []
    finally:
        course.hf.config.max_position_embeddings = before
