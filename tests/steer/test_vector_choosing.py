"""Choosing place and strength, fitting gates: on a model whose cause is known, within limits that bite."""

import numpy as np
import pytest
import torch
from tiny import copying

import workbench as wb
from workbench.steer import vector
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
        vector.choose(trained, TASK, "resid_post.2@-1", strengths=(1.0,), background=None, depth=0.5)
    sides = {"clean": "corrupted", "corrupted": "clean", "answer": "foil", "foil": "answer"}
    guard = wb.Task(
        [{one: row[other] for one, other in sides.items()} | {"split": row["split"]} for row in ROWS], "guard"
    )
    with pytest.raises(ValueError, match=r"drop \(1\)"):  # what should stay is what the push takes away
        vector.choose(trained, TASK, "resid_post.2@-1", strengths=(2.0,), background=None, depth=1.0, guards=[guard])


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
