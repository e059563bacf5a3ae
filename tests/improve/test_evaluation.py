"""Evaluation: a change that helps is told from one that does not, with intervals rebuilt by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
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
    kinds = ("random direction", "random components", "shuffled labels")
    assert set(report.frame.arm) == {"recipe", *(f"{one} (best of 3)" for one in kinds)}
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
    found = wb.improve.evaluate(trained, size * push, helped, guards[:1], draws=0, tolerances={"margin": 0.9})
    assert checks(found, "keeps margin", "kept") == {"all": "yes"}


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
        part, row = wb.Task(said, "said").split(split), found.row(split=split, metric="logit_diff")
        first = [part.score(trained, *change).mean() for change in ((), (-push,))]  # of the completion's first token
        assert [row["before"], row["after"]] == pytest.approx(first, rel=1e-4)
        asked = wb.Task(
            [
                one | {"clean": f"w9 w10 {one['clean']}", "corrupted": f"w9 w10 {one['corrupted']}", "spans": {}}
                for one in part
            ]
        )
        asking = found.row(split=split, metric="logit_diff", arm="prompt: w9 w10")
        assert asking["after"] == pytest.approx(asked.score(trained).mean(), rel=1e-4)
    other = [row | {"completion": " ".join([*row["completion"].split()[:2], "w4" if row["completion"][-3:] != " w4" else "w5"])}
             for row in said]  # fmt: skip
    spoilt = wb.improve.evaluate(trained, wb.Scale("z.0.0", 1), wb.Task(other, "spoilt"), draws=0)
    assert spoilt.row(metric="exact")["before"] == 0  # the last word counts, too
    assert {"half", "prompt: w9 w10"} <= set(found.against.control)
    with pytest.raises(ValueError, match="half does not fit task 'said'"):
        wb.improve.evaluate(trained, push, wb.Task(said, "said"), controls={"half": wb.Zero("z.0.0@nowhere")})
    with pytest.raises(ValueError, match="no tolerance 'speed'"):
        wb.improve.evaluate(trained, push, target, tolerances={"speed": 1})


def test_background_is_added_where_the_model_can_read_it(trained, target):
    assert "background" not in set(wb.improve.evaluate(trained, wb.Zero("z.0.0"), target, draws=1).frame.task)
    assert "no background text" in wb.improve.evaluate(trained, wb.Zero("z.0.0"), target, draws=1).verdict


def test_background_is_added_where_no_guard_is_a_text(course, monkeypatch):
    load = wb.Task.load
    monkeypatch.setattr(wb.Task, "load", lambda name: load(name)[:3])
    few, texts = wb.Task.load("ioi"), wb.Task(wb.Task.load("background").rows, "own texts")
    for guards, wanted in (((), "background"), ((texts,), "own texts")):
        found = wb.improve.evaluate(course, wb.Zero("z.0.0"), few, guards, draws=0)
        assert (
            set(found.frame[found.frame.metric == "kl"].task) == {wanted} and "no background text" not in found.verdict
        )


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


def test_a_recipe_of_another_model_is_refused_before_anything_runs(trained, target):
    change = wb.Delta(weights={"lm_head.weight": torch.ones_like(trained.hf.lm_head.weight)})
    object.__setattr__(change, "controls", {"full tuning": lambda: pytest.fail("trained")})
    with pytest.raises(ValueError, match="was made for model 0123"):
        wb.improve.evaluate(trained, wb.Recipe([change], "", "0123"), target)


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
        for few in (3, int(np.quantile(lengths, 0.1))):  # no texts, or too few to say anything
            course.hf.config.max_position_embeddings = few
            assert _background(course) == []
    finally:
        course.hf.config.max_position_embeddings = before


# aim="even"


@pytest.fixture(scope="module")
def uneven():
    """w6 after a w4, w7 after a w5, both ways round: the odds of w6 and w7 lean either way."""
    rows = []
    for i, row in enumerate(copying(48)):
        row |= {"split": "test" if i < 24 else "ood", "spans": {}}
        back = {
            "clean": row["corrupted"],
            "corrupted": row["clean"],
            "answer": "w7",
            "foil": "w6",
        }
        rows += [row, row | back]
    return wb.Task(rows, "uneven")


@pytest.fixture(scope="module")
def evener(trained):
    """What tells w6 from w7 leaves the stream before the last norm: their logits are exactly the same."""
    differ = trained.weight("W_U")[:, 6] - trained.weight("W_U")[:, 7]
    return wb.ProjectOut("resid_post.2", differ * trained.hf.model.norm.weight.detach())


@pytest.fixture(scope="module")
def even(trained, uneven, evener):
    others = wb.Task([row | {"answer": "w30", "foil": "w31"} for row in copying(30, 8)], "others")
    return wb.improve.evaluate(trained, evener, uneven, aim="even", still=others, prompt="w9 w10", draws=3,
                               controls={"nothing": wb.Scale("ln_final", 1)})  # fmt: skip


def test_equal_odds_are_accepted(even):
    for split in ("test", "ood"):
        row = even.row(split=split)
        assert row["metric"] == "gap" and row["before"] > 5 and row["after"] == pytest.approx(0, abs=1e-4)
        assert row["relative"] == pytest.approx(-1, abs=1e-4) and row["wrong_way"] == 0
    for claim in ("narrows the gap", "beats controls", "moves the right way", "keeps mass"):
        assert checks(even, claim) == {"test": "yes", "ood": "yes"}
    assert checks(even, "keeps probability") == {"all": "yes"} and even.row("others", "all")["metric"] == "prob"
    assert even.accepted and even.verdict.startswith("It narrows the gap, beyond every control. No guard is broken.")
    assert "ood gap 6." in repr(even) and "relative -100%" in even.verdict
    assert set(even.against.control) == {"random direction (best of 3)", "nothing", "prompt: w9 w10"}


def test_the_gap_and_its_intervals_follow_from_the_table_of_examples(even, trained, uneven, evener):
    """Mean |logit difference|, its change, its relative change and what is beyond a control, with numpy and scipy alone."""
    from scipy.stats import bootstrap

    part = uneven.split("ood")
    each = even.examples[
        (even.examples.task == "uneven") & (even.examples.split == "ood") & (even.examples.metric == "gap")
    ]
    own, other = (each[each.arm == arm] for arm in ("recipe", "prompt: w9 w10"))
    assert own.before.to_numpy() == pytest.approx(np.abs(part.score(trained)), abs=1e-4)
    assert own.after.to_numpy() == pytest.approx(np.abs(part.score(trained, evener)), abs=1e-4)

    def rebuilt(values, statistic):
        found = bootstrap(values, statistic, paired=True, n_resamples=4000, method="percentile", vectorized=False,
                          rng=np.random.default_rng(3)).confidence_interval  # fmt: skip
        return [found.low, found.high]

    before, after, row = own.before.to_numpy(), own.after.to_numpy(), even.row()
    assert [row["ci_lo"], row["ci_hi"]] == pytest.approx(rebuilt((after - before,), np.mean), abs=0.05)
    share = rebuilt((after - before, before), lambda x, y: x.mean() / y.mean())
    assert [row["relative_lo"], row["relative_hi"]] == pytest.approx(share, abs=0.01)
    beyond = even.against[(even.against.control == "prompt: w9 w10") & (even.against.split == "ood")]
    beyond = beyond[beyond.metric == "gap"].iloc[0]
    paired = after - other.after.to_numpy()
    assert beyond.difference == pytest.approx(paired.mean())
    assert [beyond.ci_lo, beyond.ci_hi] == pytest.approx(
        rebuilt((paired,), np.mean), abs=float(0.15 * paired.std()) + 1e-3
    )


def test_dividing_all_logits_is_caught(trained, uneven):
    found = wb.improve.evaluate(trained, wb.Scale("ln_final", 1 / 8), uneven, aim="even", still=[still_sure()], draws=1)
    assert checks(found, "narrows the gap")["ood"] == "yes"
    assert set(checks(found, "keeps mass").values()) == {"no"} and not found.accepted
    assert found.row(metric="mass")["after"] < 0.5 * found.row(metric="mass")["before"]
    assert "NOT shown to help: keeps mass on uneven" in found.verdict and "sure (in probability)" in found.verdict


def test_a_split_is_a_name_and_has_to_be_there(trained, target):
    """A misspelt split must not become the whole task, rows that were fitted on included."""
    one = wb.improve.evaluate(trained, wb.Scale("z.0.0", 1), target, splits="ood", draws=0)
    assert set(one.frame.split) == {"ood"}
    with pytest.raises(ValueError, match="splits fit, ood, test, none of oood"):
        wb.improve.evaluate(trained, wb.Scale("z.0.0", 1), target, splits=("oood",), draws=0)
    whole = wb.improve.evaluate(trained, wb.Scale("z.0.0", 1), target.split("fit"), draws=0)
    assert set(whole.frame.split) == {"all"}


def test_a_small_mass_that_is_lost_is_caught(trained):
    """Where answer and foil have a hundredth of the probability, both can be lost within an absolute tolerance."""
    rare = wb.Task([row | {"answer": "w30", "foil": "w31", "spans": {}} for row in copying(24)], "rare")
    toward = trained.activations(rare.column("clean"), "ln_final@-1").mean(0).flatten()
    away = torch.zeros_like(trained.hf.lm_head.weight)
    away[30] = away[31] = -6 * toward / toward.square().sum()  # six nats less for both
    found = wb.improve.evaluate(trained, wb.Delta(weights={"lm_head.weight": away}), rare, aim="even", draws=0)
    row = found.row(metric="mass", split="all")
    assert row["before"] < 0.02 and row["after"] < 0.1 * row["before"]
    assert checks(found, "keeps mass") == {"all": "no"} and not found.accepted


def test_words_of_the_prompt_are_read_before_anything_runs(trained, uneven, evener):
    change = wb.Delta(weights={"lm_head.weight": torch.ones_like(trained.hf.lm_head.weight)})
    object.__setattr__(change, "controls", {"full tuning": lambda: pytest.fail("trained")})
    with pytest.raises(ValueError, match="vocabulary"):
        wb.improve.evaluate(trained, change, uneven, prompt="please be fair")


def test_a_bias_turned_round_is_caught(trained, uneven):
    weight = trained.hf.lm_head.weight.detach()
    turn = torch.zeros_like(weight)
    turn[6], turn[7] = weight[7] - weight[6], weight[6] - weight[7]
    found = wb.improve.evaluate(trained, wb.Delta(weights={"lm_head.weight": turn}), uneven, aim="even", draws=1)
    assert found.row(metric="logit_diff")["after"] == pytest.approx(-found.row(metric="logit_diff")["before"], rel=1e-4)
    assert "yes" not in checks(found, "narrows the gap").values() and not found.accepted


def still_sure():
    """What has nothing to do with fairness, and is known for sure."""
    return wb.Task([row | {"spans": {}} for row in copying(30, 9)], "sure")


def test_what_should_be_still_is_seen_moving_either_way(trained, uneven, evener):
    up = wb.Task([row | {"answer": "w7", "foil": "w6"} for row in still_sure()], "unlikely")
    found = wb.improve.evaluate(trained, evener, uneven, aim="even", still=[still_sure(), up], draws=1)
    assert checks(found, "keeps probability", "sure") == checks(found, "keeps probability", "unlikely") == {"all": "no"}
    assert found.row("sure", "all")["change"] < -0.4 and found.row("unlikely", "all")["change"] > 0.4
    assert not found.accepted and "It HARMS sure, unlikely (in probability)" in found.verdict


@pytest.mark.parametrize("low, change, high, holds", [(-0.01, 0, 0.01, "yes"), (-0.3, -0.2, -0.1, "no"), (0.1, 0.2, 0.3, "no"),
                                                      (-0.05, 0, 0.05, "unclear"), (0.01, 0.015, 0.03, "unclear")])  # fmt: skip
def test_still_means_within_the_tolerance_on_both_sides(even, low, change, high, holds):
    frame = even.frame.copy()
    frame.loc[frame.metric == "prob", ["ci_lo", "change", "ci_hi"]] = low, change, high
    assert checks(replace(even, frame=frame), "keeps probability") == {"all": holds}


def test_pulls_that_cancel_in_the_mean_are_named(trained, uneven, evener):
    """A wrong word is made right and a right one wrong, so that the mean stays."""
    mixed = [dict(row, answer="w6", foil="w7", split=None) for row in uneven[:24]]
    found = wb.improve.evaluate(trained, evener, uneven, aim="even", still=[wb.Task(mixed, "mixed")], draws=1)
    assert abs(found.row("mixed", "all")["change"]) < 0.02
    assert "single prompts by 0.50" in found.verdict


def test_the_control_is_the_draw_with_the_smallest_gap(trained, uneven):
    from workbench.improve.controls import _direction, _Means, random_controls
    from workbench.report import AIMS

    push = wb.Recipe([wb.Add("resid_post.2@-1", 8 * torch.ones(32))])
    best = random_controls(trained, push, uneven, 7, 6, 0, AIMS["even"])["random direction (best of 6)"]
    rng = np.random.default_rng(0)
    drawn = [_direction(trained, push, rng, 7, _Means(trained, uneven)) for _ in range(6)]
    gaps = [np.abs(uneven.score(trained, one)).mean() for one in drawn]
    assert np.abs(uneven.score(trained, best)).mean() == pytest.approx(min(gaps)) and min(gaps) < max(gaps) - 0.01
    part, said = uneven.split("test"), "random direction (best of 6)"
    narrow, wide = (np.abs(part.score(trained, random_controls(trained, push, part, 7, 6, 0, AIMS[aim])[said])).mean()
                    for aim in ("even", "answer"))  # fmt: skip
    found = wb.improve.evaluate(trained, push, uneven, aim="even", draws=6)
    assert found.row(split="test", arm=said)["after"] == pytest.approx(narrow) and narrow < wide


def test_even_reports_are_saved_drawn_and_written(even, tmp_path):
    again = wb.Report.load(even.save(tmp_path / "r"))
    assert (again.verdict, repr(again)) == (even.verdict, repr(even))
    assert again.row() == pytest.approx(even.row(), nan_ok=True)
    (ax,) = even.plot().axes
    points = [x for line in ax.lines for x in line.get_xdata()]
    assert "relative gap or probability" in ax.get_xlabel() and min(points) == pytest.approx(-1, abs=1e-3)  # no nats
    assert "relative -100%" in even.html(tmp_path / "report.html").read_text(encoding="utf-8")


def test_unknown_aims_and_texts_that_should_be_still_are_refused(trained, uneven, guards):
    with pytest.raises(ValueError, match="aim='odd' is unknown; choose 'answer', 'even'"):
        wb.improve.evaluate(trained, wb.Zero("z.0.0"), uneven, aim="odd")
    with pytest.raises(ValueError, match="still task must be a task of pairs"):
        wb.improve.evaluate(trained, wb.Zero("z.0.0"), uneven, still=guards[1])
    with pytest.raises(ValueError, match="different names"):
        wb.improve.evaluate(trained, wb.Zero("z.0.0"), uneven, guards[0], still=guards[0])
