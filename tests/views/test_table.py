"""Picture and table of any result: rows that name components can be selected; text stays text."""

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from workbench.locate.causal.joint import Joint
from workbench.locate.features.effects import Effects
from workbench.locate.features.evaluation import Quality
from workbench.locate.magnitude.outliers import Outliers


def outliers(hits=("z.1.2", "z.0.1")):
    rows = tuple({"component": one, "attention": 0.5 + k, "token": "<b>x</b>"} for k, one in enumerate(hits))
    return Outliers(
        "attention sinks", "a rule", rows, ({"layer": 0, "largest": 0.5}, {"layer": 1, "largest": 0.6}), "near", "words"
    )


def test_rows_that_name_components_are_selected_as_such(llama):
    view = wb.show(outliers())
    data = view._table.data
    assert data["columns"] == ["attention", "token"] and [row["name"] for row in data["rows"]] == ["z.1.2", "z.0.1"]
    assert [cell["text"] for cell in data["rows"][0]["cells"]] == ["0.5", "<b>x</b>"]  # as text, set by textContent
    assert (
        view.code == "outliers.frame"
        and "data:image/png" in view._picture.value
        and 'alt="Outliers(' in view._picture.value
    )
    view._table.selected = [1, 0]  # what a click does
    assert view.selected == [wb.Component.parse("z.0.1")] and view.code == '["z.0.1"]'
    assert view._table.selected == [1, 0, 1, 1]
    assert llama.logits("w4 w5", wb.Zero(at=view.selected)).shape == (1, 64)
    with pytest.raises(ValueError, match=r"z\.2\.0 is in no row"):
        view.selected = ["z.2.0"]
    assert view.figure().axes and repr(view) == f"TableView({view.value!r})"


def test_rows_that_are_sets():
    sets = [[wb.Component.parse(one) for one in some] for some in (["z.0.1"], ["z.0.1", "z.1.2"])]
    joint = Joint(["one", "both"], sets, np.ones((2, 3)), np.ones((2, 3)), [np.zeros(2)] * 2, np.ones((2, 3)), sets[1], "causal.joint",
                  "logit_diff", 2.0, -1.0, "words", 1.0, 1.0, 0)  # fmt: skip
    view = wb.show(joint)
    view._table.selected = [1, 0]
    assert view.selected == sets[1]


def test_results_without_components_are_read_only():
    rows = [
        {"arm": arm, "before": 1.0, "after": 0.5, "change": c, "ci_lo": c, "ci_hi": c, "kl": 0.1}
        for arm, c in (("features", -0.5), ("other", 0.1))
    ]
    effects = Effects(rows, [wb.Component.parse("feature.sae.1@-1")], 0.0, "logit_diff", "words", 4, 1.0, 1.0, 0)
    view = wb.show(effects)
    assert view._table.data["fixed"] and [row["name"] for row in view._table.data["rows"]] == ["features", "other"]
    assert view._table.data["rows"][0]["cells"][2]["text"] == "\u22120.5"
    view._table.selected = [0, 0]
    assert view.selected == [] and view._table.selected == []
    row = {"l0": 3.0, "explained_variance": 0.9, "loss_change": 0.1, "kl": 0.1, "dead": 0.0}
    quality = Quality(
        [{"reconstruction": name, **row} for name in ("sae", "zero")],
        np.ones(4) / 2,
        "sae",
        "mlp_out.1",
        3,
        30,
        2.0,
        1.0,
        1.0,
    )
    assert [line["name"] for line in wb.show(quality)._table.data["rows"]] == ["sae", "zero"]


def test_none_found_and_many_rows():
    assert wb.show(outliers(()))._table.data["rows"] == []
    view = wb.show(outliers([f"neuron.0.{k}" for k in range(40)]))
    assert len(view._table.data["rows"]) == 24 and view._table.data["note"] == "16 more rows are in value.frame."
    view.selected = ["neuron.0.39"]  # in a row that is not shown
    assert view._table.selected == []


def test_a_plain_table_has_no_view():
    with pytest.raises(TypeError, match="no view for DataFrame"):
        wb.show(pd.DataFrame({"a": [1]}))


@pytest.mark.parametrize("make", [
    lambda model, at: wb.locate.vocabulary.ov_circuit(model, at, draws=5),
    lambda model, at: wb.locate.vocabulary.neuron_vocabulary(model, ["neuron.0.1", "neuron.1.3"], k=3),
    lambda model, at: wb.locate.vocabulary.backward_lens(model, ["w4 w5 w6"], answers=["w7"], k=3),
])  # fmt: skip
def test_results_of_the_vocabulary(llama, make):
    value = make(llama, "z.1.2")
    view = wb.show(value)
    rows = view._table.data["rows"]
    assert 0 < len(rows) <= 24 and all(len(row["cells"]) == len(view._table.data["columns"]) for row in rows)
    assert view.value is value and view.figure().axes
