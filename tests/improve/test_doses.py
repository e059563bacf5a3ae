"""Dose-response and dissociation: known slopes, and recipes that do and do not change their own task."""

import numpy as np
import pytest
import torch
from tiny import copying

import workbench as wb


@pytest.fixture(scope="module")
def tasks():
    """The cause w4 makes w6 right, w5 makes w7 right: as two tasks."""
    rows = copying(16)
    turned = [row | {"clean": row["corrupted"], "corrupted": row["clean"], "answer": "w7", "foil": "w6", "spans": {}}
              for row in rows]  # fmt: skip
    return wb.Task(rows, "six"), wb.Task(turned, "seven")


def test_a_push_along_the_unembedding_has_the_slope_it_must_have(trained, tasks):
    """Without a norm in between it would be exact; with one it has the right sign for every prompt."""
    away = trained.weight("W_U")
    push = wb.Add("resid_post.2@-1", away[:, 6] - away[:, 7])
    doses = wb.improve.dose_response(trained, push, tasks[0], [tasks[1]], strengths=(-1, 0, 1))
    assert (doses.slopes > 0).all() and doses.wrong_way[0] == 0 and doses.wrong_way[2] < 0.25
    at_zero = doses.frame[(doses.frame.strength == 0) & (doses.frame.metric == "logit_diff")]
    assert at_zero.value.to_list() == pytest.approx([tasks[0].score(trained).mean(), tasks[1].score(trained).mean()])
    back = wb.improve.dose_response(trained, -push, tasks[0], strengths=(-1, 0, 1))
    assert np.allclose(back.slopes, -doses.slopes, atol=1e-4) and back.wrong_way[0] == 1
    assert "steered the wrong way" in repr(doses)
    doses.plot()


def test_a_dose_multiplies_all_of_a_recipe(trained, tasks):
    """Two strengths: the slope of each prompt is the difference of its scores, vectors and weights multiplied alike."""
    push = wb.Add("resid_post.1@-1", np.linspace(-1, 1, 32))
    head = wb.Delta(weights={"lm_head.weight": 0.3 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))})
    doses = wb.improve.dose_response(trained, wb.Recipe([push, head]), tasks[0], strengths=(0, 3))
    plain, alone, both = (tasks[0].score(trained, *changes) for changes in ((), (3 * push,), (3 * push, 3 * head)))
    assert doses.slopes == pytest.approx((both - plain) / 3, abs=1e-4)
    assert min(np.abs(both - alone).max(), np.abs(alone - plain).max()) > 0.1


def test_only_the_split_counts_and_rows_of_one_entity_count_once(trained, tasks):
    """Every row a second time tells nothing new: the intervals stay what they were."""
    splits = ["fit"] * 6 + ["test"] * 5 + ["ood"] * 5
    once = [wb.Task([row | {"split": one} for row, one in zip(task, splits)], task.name) for task in tasks]
    twice = [wb.Task([row for row in task for _ in range(2)], task.name) for task in once]
    push = wb.Add("resid_post.1@-1", np.linspace(-1, 1, 32))
    for split, run in (("ood", lambda given: wb.improve.dissociation(trained, {"push": push}, given, metric="logit_diff")),
                       ("test", lambda given: wb.improve.dose_response(trained, push, *given, strengths=(0, 1)))):  # fmt: skip
        one, two = run(once), run(twice)
        last = one.frame[one.frame.task == "seven"].iloc[-1]
        part = once[1].split(split)
        before, after = part.score(trained), part.score(trained, push)
        assert one.split == split and last.n == 5
        assert last["change" if split == "ood" else "value"] == pytest.approx(
            (after - before * (split == "ood")).mean(), abs=1e-4
        )
        assert (two.frame.n == 10).all() and (one.frame.ci_hi - one.frame.ci_lo).max() > 0.01
        assert np.allclose(one.frame[["ci_lo", "ci_hi"]], two.frame[["ci_lo", "ci_hi"]], atol=1e-4)


def test_texts_are_measured_as_in_an_evaluation(trained, tasks):
    """KL from the unchanged model: none at strength 0, that of the report at 1, whose interval resamples whole texts."""
    texts = wb.Task([{"text": " ".join([f"w{12 + i}"] * 9)} for i in range(8)], "texts")
    push = wb.Add("resid_post.1", np.linspace(-1, 1, 32))
    doses = wb.improve.dose_response(trained, push, tasks[0], texts, strengths=(0, 1))
    none, own = (row for _, row in doses.frame[doses.frame.metric == "kl"].iterrows())
    wanted = wb.improve.evaluate(trained, push, tasks[0], texts, draws=0).row("texts", "all", "kl")
    assert none.value == 0 < own.ci_lo < own.ci_hi and own.role == "guard"
    assert [own.value, own.ci_lo, own.ci_hi] == pytest.approx([wanted[name] for name in ("after", "ci_lo", "ci_hi")])


def test_what_has_no_strength_is_refused(trained, tasks):
    with pytest.raises(ValueError, match=r"Zero\(.*has no strength"):
        wb.improve.dose_response(trained, wb.Zero("z.0.0"), tasks[0])
    with pytest.raises(ValueError, match="at least two strengths"):
        wb.improve.dose_response(trained, wb.Add("resid_post.0", np.ones(32)), tasks[0], strengths=(1,))
    with pytest.raises(ValueError, match="was made for model 0123"):
        wb.improve.dose_response(trained, wb.Recipe([wb.Add("resid_post.0", np.ones(32))], "", "0123"), tasks[0])


def test_dissociation(trained, tasks):
    """Turning one cause into the other breaks its own task only."""
    embed = trained.weight("W_E")
    gate = {"w4 read as w5": wb.Add("resid_pre.0@2", embed[5] - embed[4]), "nothing": wb.Scale("z.0.0", 1)}
    found = wb.improve.dissociation(trained, gate, tasks)
    assert found.table.loc["w4 read as w5", "six"] < -0.9 and (found.table.loc["nothing"] == 0).all()
    assert found.specificity == pytest.approx((abs(found.table.iloc[0, 0]) + 0 - abs(found.table.iloc[0, 1]) - 0) / 2)
    with pytest.raises(ValueError, match="one task for each recipe"):
        _ = wb.improve.dissociation(trained, gate, tasks[:1]).specificity
    with pytest.raises(ValueError, match="tasks of pairs"):
        wb.improve.dissociation(trained, gate, [wb.Task([{"text": "w4 w5"}], "texts")])
