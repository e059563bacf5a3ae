"""Choosing place and strength, fitting gates: on a model whose cause is known, within limits that bite."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import copying

import workbench as wb
from workbench import measure
from workbench.steer import vector
from workbench.steer.vector import choosing
from workbench.steer.vector.gates import best_threshold

ROWS = [row | {"split": split} for row, split in zip(copying(40), ["fit", "fit", "select", "test"] * 10, strict=True)]
TASK = wb.Task(ROWS, "copying")
RNG = np.random.default_rng(7)
TEXTS = wb.Task(
    [{"text": " ".join(f"w{i}" for i in RNG.integers(10, 64, 9)), "split": "select"} for _ in range(8)], "texts"
)


def test_the_smallest_strength_within_one_error_of_the_best(trained):
    choice = vector.choose(
        trained,
        TASK,
        "resid_post.*@-1",
        strengths=(0.5, 1.0, 1.5, 2.0, 3.0),
        background=TEXTS,
        depth=1.0,
        kl=9,
        metric="logit_diff",
    )
    frame, best = choice.frame, choice.best
    line = frame[frame.chosen].iloc[0]
    assert frame.chosen.sum() == 1 and (str(best.at[0]), best.strength) == (line["at"], line.strength)
    fine = frame[frame.limit == ""]
    top = fine.loc[fine.effect.idxmax()]
    smaller = fine[(fine["at"] == top["at"]) & (fine.strength < line.strength)]
    assert (
        line["at"] == top["at"] and line.effect >= top.effect - top.se and (smaller.effect < top.effect - top.se).all()
    )
    assert (TASK.split("test").score(trained, best, prompt="corrupted") > 0).all()
    held = TASK.split("select")
    assert line.after == pytest.approx(held.score(trained, best, prompt="corrupted").mean(), abs=1e-4)
    assert line.effect == pytest.approx(line.after - held.score(trained, prompt="corrupted").mean(), abs=1e-4)
    assert "within one standard error" in choice.why and "candidates" in repr(choice)
    # by accuracy there is an end: the smallest strength that flips every row
    frame = vector.choose(trained, TASK, "resid_post.2@-1", strengths=(0.2, 1.5, 3.0), background=None, depth=1.0).frame
    assert frame.effect.tolist() == [0, 1, 1] and frame.chosen.tolist() == [False, True, False]


@pytest.mark.parametrize("how", ["subtract", "set", "ablate"])
def test_taking_away_makes_the_metric_fall_and_must_induce(trained, how):
    choice = vector.choose(
        trained,
        TASK,
        ["resid_post.1@-1", "resid_post.2@-1"],
        how,
        background=None,
        depth=1.0,
        kl=50,
        metric="logit_diff",
    )
    chosen = choice.frame[choice.frame.chosen].iloc[0]
    assert chosen.induced > 0 and chosen.effect > 0
    held = TASK.split("test")
    assert (held.score(trained, choice.best) < held.score(trained)).all()
    assert {"set": wb.Affine, "subtract": wb.Add, "ablate": wb.ProjectOut}[how] is type(choice.best)
    if how == "subtract":
        assert choice.best.strength < 0


def test_limits_rule_candidates_out(trained):
    def everywhere(model, task, place):
        return vector.difference_of_means(model, task, place, to=place.at(None))

    given = dict(strengths=(0.1, 3.0), prompt="corrupted", background=TEXTS, depth=1.0, metric="logit_diff")
    free = vector.choose(trained, TASK, "resid_post.1@-1", everywhere, kl=100, **given).frame
    between = float(free.kl_background.mean())
    assert free.kl_background[0] < between < free.kl_background[1]
    tight = vector.choose(trained, TASK, "resid_post.1@-1", everywhere, kl=between, **given)
    assert tight.best.strength == 0.1 and tight.frame.limit.tolist() == ["", "kl_background"]
    with pytest.raises(ValueError, match=r"None of 2 candidates.*kl_background \(2\)"):
        vector.choose(trained, TASK, "resid_post.1@-1", everywhere, kl=0.0, **given)
    with pytest.raises(ValueError, match=r"depth \(1\)"):
        vector.choose(trained, TASK, "resid_post.2@-1", strengths=(1.0,), background=None, depth=2 / 3)
    sides = {"clean": "corrupted", "corrupted": "clean", "answer": "foil", "foil": "answer"}
    guard = wb.Task(
        [{one: row[other] for one, other in sides.items()} | {"split": row["split"]} for row in ROWS], "guard"
    )
    with pytest.raises(ValueError, match=r"drop \(1\)"):  # what should stay is what the push takes away
        vector.choose(trained, TASK, "resid_post.2@-1", strengths=(2.0,), background=None, depth=1.0, guards=[guard])


def test_the_table_by_hand(trained):
    """On clean prompts the metric is to fall; the other side, plain text behind its first third and guards are to stay."""
    held = TASK.split("select")
    sides = {"clean": "corrupted", "corrupted": "clean", "answer": "foil", "foil": "answer"}
    guards = [wb.Task([{one: row[other] for one, other in sides.items()} for row in held]), held]

    def away(model, task, place):
        return -vector.difference_of_means(model, task, place, to="resid_post.2")

    found = vector.choose(trained, TASK, "resid_post.2@-1", away, prompt="clean", strengths=(0.6, 1.0), background=TEXTS,
                          guards=guards, drop=9, kl=99, depth=1.0, metric="prob").frame  # fmt: skip
    for line in found.itertuples():
        push = line.strength * away(trained, TASK, "resid_post.2@-1")
        change, margin = (
            held.score(trained, metric=m) - held.score(trained, push, metric=m) for m in ("prob", "logit_diff")
        )
        assert (line.effect, line.margin) == (
            pytest.approx(change.mean(), abs=1e-4),
            pytest.approx(margin.mean(), abs=1e-3),
        )
        assert line.se == pytest.approx(change.std(ddof=1) / len(change) ** 0.5, abs=1e-4)
        sides = [trained.logits(held.column("corrupted"), *given) for given in ([], [push])]
        assert line.kl_other == pytest.approx(float(measure.kl(*sides).mean()), abs=1e-4)
        texts = [trained.logits(TEXTS.column("text"), *given, positions="all") for given in ([], [push])]
        behind = [torch.cat([x[len(x) // 3 - 1 : -1] for x in some]) for some in texts]
        assert line.kl_background == pytest.approx(float(measure.kl(*behind).mean()), rel=1e-3)
        lost = [
            one.score(trained, metric="accuracy").mean() - one.score(trained, push, metric="accuracy").mean()
            for one in guards
        ]
        assert line.drop == max(lost)
    assert found["drop"].max() > 0.5 and min(lost) == 0
    away = vector.choose(trained, TASK, "resid_post.1@-1", "subtract", background=None, kl=99, depth=1.0).frame
    push = vector.difference_of_means(trained, TASK, "resid_post.1@-1")
    assert away.induced[0] == pytest.approx(held.score(trained, push, prompt="corrupted").mean(), abs=1e-4)


def test_each_limit_by_hand():
    fine = {"kl_background": 0.05, "kl_other": float("nan"), "drop": 0.01, "induced": 0.5, "effect": 1.0}
    assert choosing._broken(fine, 0.1, 0.02, False) == ""
    for name, value in [("kl_background", 0.2), ("kl_other", 0.2), ("drop", 0.03), ("induced", 0.0), ("effect", 0.0)]:
        assert choosing._broken(fine | {name: value}, 0.1, 0.02, False) == name
    assert choosing._broken(fine, 0.1, 0.02, True) == "depth"


def test_of_the_best_place_the_smallest_strength_within_one_error():
    lines = [("a", 2.0, 1.0, 0.1, ""), ("a", 1.0, 0.92, 0.1, ""), ("a", 0.5, 0.95, 0.1, "kl_background"), ("a", 0.2, 0.8, 0.1, ""),
             ("b", 0.1, 0.95, 0.1, ""), ("c", 3.0, 2.0, 0.1, "depth")]  # fmt: skip
    frame = pd.DataFrame(lines, columns=["at", "strength", "effect", "se", "limit"]).assign(margin=0.0)
    assert choosing._chosen(frame) == 1


def test_a_gate_is_chosen_by_rows_that_it_was_not_fitted_on(trained):
    """Fitted on, the third word tells the sides apart without exception and the fourth with one; of the others, the fourth."""
    rows = []
    for i in range(38):
        split, yes, number = ("fit" if i < 20 else "select"), i % 2 == 0, i // 2
        third, fourth = ("w4", "w6") if yes else ("w5", "w7")
        if split == "select" and number % 3 == 0:  # three of nine on either side
            third = "w5" if yes else "w4"
        rows.append(
            {"text": f"w10 w11 {third} {'w7' if i == 0 else fourth}", "label": "yes" if yes else "no", "split": split}
        )
    choice = vector.fit_gate(trained, wb.Task(rows), ["resid_pre.0@2", "resid_pre.0@3"])
    first, second = choice.frame.itertuples()
    assert first.f1_fit == 1 > second.f1_fit == pytest.approx(18 / 19) and second.chosen and not first.chosen
    assert second.f1_select == second.accuracy_select == 1
    assert (first.f1_select, first.accuracy_select) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_of_gates_that_tell_as_well_the_one_with_the_widest_gap(trained):
    places = ["resid_post.0@2", "resid_post.2@-1", "resid_post.1@-1"]
    for some in (places, places[::-1]):
        frame = vector.fit_gate(trained, TASK, some).frame
        assert (frame.f1_select == 1).all() and frame.chosen.idxmax() == frame.gap.idxmax()
    gate = vector.fit_gate(trained, TASK, "resid_post.1@-1")
    yes, no = (gate.best.reading(trained.activations(TASK.split("fit").column(side), "resid_post.1@-1"))
               for side in ("clean", "corrupted"))  # fmt: skip
    assert gate.frame.gap[0] == pytest.approx(float((yes.min() - no.max()) / torch.cat([yes, no]).std()), rel=1e-3)
    assert float(gate.frame.threshold[0]) == pytest.approx(float(yes.min() + no.max()) / 2, rel=1e-3)


def test_choosing_refuses(trained):
    with pytest.raises(ValueError, match="'subtract'"):
        vector.choose(trained, TASK, "resid_post.1@-1", "remove")
    with pytest.raises(ValueError, match="prompt='clean'"):
        vector.choose(trained, TASK, "resid_post.1@-1", vector.difference_of_means)
    with pytest.raises(ValueError, match="task of pairs"):
        vector.choose(trained, TEXTS, "resid_post.1@-1")
    with pytest.raises(ValueError, match="do not differ at any"):
        vector.choose(trained, TASK, "resid_post.1@0", background=None)


def test_the_best_threshold():
    yes, no = torch.tensor([3.0, 4.0, 5.0]), torch.tensor([0.0, 1.0, 2.0])
    assert best_threshold(yes, no) == (2.5, 1.0)
    yes, no = torch.tensor([1.5, 3.0, 4.0]), torch.tensor([0.0, 1.0, 2.0])
    threshold, f1 = best_threshold(yes, no)
    assert 1 < threshold < 1.5 and f1 == pytest.approx(6 / 7)  # 3 hits, 1 wrong
    threshold, f1 = best_threshold(no, yes)  # the wrong way round: opening for all is best
    assert threshold < 0 and f1 == pytest.approx(6 / 9)


@pytest.mark.parametrize("by", ["dot", "cosine"])
@pytest.mark.parametrize("direction", ["means", "pca", "probe"])
def test_a_fitted_gate_opens_for_one_side_of_new_prompts(trained, by, direction):
    choice = vector.fit_gate(
        trained, TASK, ["resid_post.0@2", "resid_post.1@-1", "resid_post.0@0"], by=by, direction=direction
    )
    assert len(choice.frame) == 2  # nothing differs at position 0
    line = choice.frame[choice.frame.chosen].iloc[0]
    assert line.f1_select == 1 and line.accuracy_select == 1 and line.gap > 0
    held = TASK.split("test")
    zero = wb.Zero("mlp_out.2", gate=choice.best)
    for side, opened in (("clean", True), ("corrupted", False)):
        base, full, seen = (trained.logits(held.column(side), *given) for given in ([], [zero.gated(None)], [zero]))
        assert torch.equal(seen, full if opened else base)
    flipped = vector.fit_gate(trained, wb.Task([{"text": r[s], "label": s, "split": r["split"]} for r in ROWS for s in ("clean",
              "corrupted")]), "resid_post.1@-1", by=by, direction=direction, positive="corrupted").best  # fmt: skip
    assert flipped.open(trained.activations(held.column("corrupted"), "resid_post.1@-1")).all()
    assert not flipped.open(trained.activations(held.column("clean"), "resid_post.1@-1")).any()


def test_gates_refuse_what_does_not_differ(trained):
    with pytest.raises(ValueError, match="no gate can tell them"):
        vector.fit_gate(trained, TASK, "resid_post.1@0")
    with pytest.raises(ValueError, match="'dot' or 'cosine'"):
        vector.fit_gate(trained, TASK, "resid_post.1@-1", by="length")
    with pytest.raises(ValueError, match=r"positive='clean' is a label, and pairs have none.*~gate"):
        vector.fit_gate(trained, TASK, "resid_post.1@-1", positive="clean")
