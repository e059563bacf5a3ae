"""What a report claims, on tables made by hand: which intervals are a yes, a no, or too wide to say."""

import pandas as pd
import pytest

import workbench as wb

AGAINST = ("control", "split", "metric", "recipe", "control_after", "difference", "ci_lo", "ci_hi")
EXAMPLES = ("arm", "role", "task", "split", "metric", "before", "after")


def line(metric, interval, before=0.5, role="guard", arm="recipe", split="ood"):
    """One line of the table: interval is (low, change, high)."""
    low, change, high = interval
    return {"arm": arm, "role": role, "task": role, "split": split, "metric": metric, "before": before, "after": before + change,
            "change": change, "ci_lo": low, "ci_hi": high, "n": 50, "wrong_way": 0.0, "p99": 0.0}  # fmt: skip


def report(*lines, aim="answer", against=(), examples=(), **settings):
    tables = (pd.DataFrame(rows, columns=names) for rows, names in ((against, AGAINST), (examples, EXAMPLES)))
    return wb.Report("made", pd.DataFrame(lines), *tables, {"aim": aim, **settings})


def holds(found) -> dict:
    return dict(zip(found.checks.claim, found.checks.holds, strict=True))


AIMS = [("answer", "accuracy", "helps", 1), ("even", "gap", "narrows the gap", -1)]
SIGNS = [((0.1, 0.2, 0.3), "yes"), ((0.0, 0.1, 0.2), "unclear"), ((-0.1, 0.1, 0.3), "unclear"), ((-0.3, -0.1, 0.1), "unclear"),
         ((-0.3, -0.2, -0.1), "no"), ((0.0, 0.0, 0.0), "no")]  # fmt: skip


def towards(interval, better):
    """An interval of something of which more is better, or less."""
    return interval if better > 0 else tuple(-x for x in reversed(interval))


@pytest.mark.parametrize("aim, metric, claim, better", AIMS)
@pytest.mark.parametrize("interval, wanted", SIGNS)
def test_a_change_helps_when_its_interval_is_clear_of_zero(aim, metric, claim, better, interval, wanted):
    found = report(line(metric, towards(interval, better), role="target"), aim=aim)
    assert holds(found)[claim] == wanted


@pytest.mark.parametrize("aim, metric, claim, better", AIMS)
@pytest.mark.parametrize("interval, wanted", SIGNS)
def test_every_control_must_be_beaten_on_the_same_split_and_metric(aim, metric, claim, better, interval, wanted):
    def control(name, interval, split="ood", of=metric):
        low, change, high = towards(interval, better)
        return (name, split, of, 0.9, 0.9 - change, change, low, high)

    clear, lost = (0.4, 0.5, 0.6), (-0.6, -0.5, -0.4)
    against = [control("far", clear), control("near", interval), control("full tuning", lost), control("full tuning", lost, "test"), control("other", lost, "test"),
               control("else", lost, of="logit_diff")]  # fmt: skip
    found = report(line(metric, towards(clear, better), role="target"), aim=aim, against=against)
    assert holds(found)[claim] == "yes" and holds(found)["beats controls"] == wanted
    assert found.accepted == (wanted == "yes") and found.verdict.count("full tuning") == 1
    assert "(near)" in found.verdict  # the best of them, not the one that is farthest behind


def test_a_target_moves_the_right_way_or_not():
    for aim, metric, better in (("answer", "logit_diff", 1), ("even", "gap", -1)):
        for change, wanted in ((0.2, "yes"), (-0.2, "no"), (0.0, "no")):
            found = report(line(metric, towards((change - 1, change, change + 1), better), role="target"), aim=aim)
            assert holds(found)["moves the right way"] == wanted


def accuracy(lost, won, n, interval):
    """A guard of n prompts of which some are lost and some won; those of another arm and metric are all lost."""
    each = [(1, 0)] * lost + [(0, 1)] * won + [(1, 1)] * (n - lost - won)
    rows = [("recipe", "guard", "guard", "ood", "accuracy", *sides) for sides in each]
    others = [("random", *row[1:5], 1, 0) for row in rows] + [(*row[:4], "logit_diff", 1, 0) for row in rows]
    others += [(*row[:3], "test", row[4], 1, 0) for row in rows]
    return report(line("accuracy", interval, before=1.0), examples=rows + others)


@pytest.mark.parametrize("lost, won, n, interval, wanted", [
    (0, 0, 100, (0, 0, 0), "yes"),  # at most 3.6 % are lost
    (0, 0, 50, (0, 0, 0), "unclear"),  # at most 7.1 %
    (2, 20, 100, (0.1, 0.18, 0.26), "unclear"),  # what was won makes up for nothing
    (20, 20, 100, (-0.12, 0, 0.12), "no"),  # at least 12.7 %
    (6, 0, 50, (-0.22, -0.12, -0.04), "no"),  # at least 4.5 % are, but the mean falls beyond doubt
    (6, 3, 50, (-0.17, -0.06, 0.04), "unclear"),
])  # fmt: skip
def test_accuracy_is_kept_when_few_prompts_can_be_lost(lost, won, n, interval, wanted):
    found = accuracy(lost, won, n, interval)
    assert holds(found) == {"keeps accuracy": wanted} and f"{lost} of {n} lost" in found.checks.why[0]


@pytest.mark.parametrize("metric, before, interval, wanted", [
    ("logit_diff", 2.0, (-0.19, -0.1, 0.0), "yes"), ("logit_diff", 2.0, (-0.21, -0.1, 0.0), "unclear"),
    ("logit_diff", 2.0, (-0.5, -0.4, -0.3), "no"), ("logit_diff", 2.0, (-0.5, -0.4, 0.1), "unclear"),
    ("logit_diff", 2.0, (-0.3, -0.1, -0.05), "unclear"), ("logit_diff", -2.0, (-1.0, -0.9, -0.8), None),  # no margin to keep
    ("loss", 2.0, (-0.1, 0.0, 0.019), "yes"), ("loss", 2.0, (-0.1, 0.0, 0.021), "unclear"),
    ("loss", 2.0, (0.01, 0.03, 0.05), "no"), ("loss", 2.0, (-0.01, 0.03, 0.05), "unclear"), ("loss", 2.0, (0.01, 0.015, 0.03), "unclear"),
])  # fmt: skip
def test_margins_and_losses_are_kept_within_their_tolerances(metric, before, interval, wanted):
    claim = {"logit_diff": "keeps margin", "loss": "keeps loss"}[metric]
    found = report(line(metric, interval, before), line("kl", (0, 0, 0), 0.0))
    assert holds(found) == ({claim: wanted} if wanted else {})
    wider = report(line(metric, interval, before), line("kl", (0, 0, 0), 0.0), tolerances={"margin": 9.0, "loss": 9.0})
    assert holds(wider) == ({claim: "yes"} if wanted else {})


@pytest.mark.parametrize("before, interval, wanted", [
    (0.5, (-0.019, -0.01, 0.0), "yes"), (0.5, (-0.021, -0.01, 0.0), "unclear"), (0.5, (-0.05, -0.03, -0.01), "no"),
    (0.5, (-0.05, -0.03, 0.01), "unclear"), (0.1, (-0.012, -0.005, 0.0), "unclear"), (0.1, (-0.015, -0.012, -0.01), "no"),
    (0.5, (0.1, 0.2, 0.3), "yes"),
])  # fmt: skip
def test_little_mass_may_go_and_of_little_mass_a_tenth(before, interval, wanted):
    assert holds(report(line("mass", interval, before, role="target"), aim="even")) == {"keeps mass": wanted}


def test_accepted_is_helped_everywhere_and_nothing_broken():
    helps = [line("accuracy", (0.1, 0.2, 0.3), role="target", split=split) for split in ("test", "ood")]
    kept, open_, broken = (line("logit_diff", x, 2.0) for x in ((0, 0, 0), (-1, 0, 1), (-1.2, -1, -0.8)))
    assert report(*helps, kept).accepted and report(*helps, open_).accepted and not report(*helps, broken).accepted
    assert not report(helps[0], line("accuracy", (-0.1, 0.2, 0.3), role="target"), kept).accepted
    other = line("logit_diff", (-1.2, -1, -0.8), 2.0, arm="random")  # what controls do is no claim
    assert report(*helps, kept, other).accepted and len(report(*helps, kept, other).checks) == 3
    assert report(*helps).row()["split"] == "ood" and report(*helps).row(split="test")["split"] == "test"
