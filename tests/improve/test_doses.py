"""Dose-response and dissociation: known slopes, and recipes that do and do not change their own task."""

import numpy as np
import pytest
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


def test_what_has_no_strength_is_refused(trained, tasks):
    with pytest.raises(ValueError, match=r"Zero\(.*has no strength"):
        wb.improve.dose_response(trained, wb.Zero("z.0.0"), tasks[0])
    with pytest.raises(ValueError, match="at least two strengths"):
        wb.improve.dose_response(trained, wb.Add("resid_post.0", np.ones(32)), tasks[0], strengths=(1,))


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
