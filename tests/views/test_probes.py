"""Probe curves without a browser: every baseline is drawn, a click is a site."""

import dataclasses

import numpy as np
import pytest

import workbench as wb


@pytest.fixture
def probed(make_scores):
    names = [f"resid_post.{layer}@{place}" for place in (-1, 2) for layer in range(4)]
    scores = make_scores(names, [0.5, 0.7, 0.9, 0.8, 0.4, 0.5, 0.6, 0.55], null=0.6, method="probing.logistic",
                         metric="accuracy", direction="", clean=np.nan, corrupted=np.nan, labels={2: "w6"})  # fmt: skip
    columns = {
        "ood": scores.values - 0.1,
        "majority": np.full(8, 0.5),
        "untrained": np.full(8, np.nan),
        "C": np.ones(8),
    }
    return dataclasses.replace(scores, columns=columns)


def test_curves_stand_over_their_nulls(probed):
    view = wb.show(probed)
    assert repr(view) == "ProbeView(probing.logistic at 8 sites, best resid_post.2@-1: 0.90)"
    data = view._lines.data
    drawn = {one["label"].split(":")[0]: one for one in data["series"]}
    assert drawn["held out"]["y"] == pytest.approx(probed.values[:4]) and drawn["held out"]["main"]
    assert [one["y"] for one in data["series"] if one.get("area")] == [[0.6] * 4]
    assert any("new forms" in one["label"] for one in data["series"]) and "majority class" in drawn
    assert not any("untrained" in one["label"] for one in data["series"])  # it was left out
    assert (
        data["labels"] == ["0", "1", "2", "3"]
        and "shuffled labels 0.60" in data["tips"][1]
        and "ood 0.60" in data["tips"][1]
    )
    assert len(view.figure().axes) == 2


def test_a_click_is_a_site_at_either_position(probed):
    view = wb.show(probed)
    view._lines.selected = [3]  # what a click does
    assert view.selected == [wb.Component.parse("resid_post.3@-1")] and view._layer.value == 3
    view.where = 1
    assert view._lines.data["names"][0] == "resid_post.0@2" and view._lines.selected == []
    view._lines.selected = [2, 0]
    assert view.code == '["resid_post.3@-1", "resid_post.2@2", "resid_post.0@2"]'
    view._toggle.click()
    assert view.code == '["resid_post.3@-1", "resid_post.2@2"]'
    view._which.value = 0
    assert view.where == 0 and view._lines.selected == [3]
    view._clear.click()
    assert view.selected == []


def test_refuses_and_leaves_other_scores_to_the_grid(probed, heads):
    with pytest.raises(ValueError, match=r"not probed.*resid_post\.0@-1 to resid_post\.3@2"):
        wb.show(probed, selected=["resid_post.9@-1"])
    with pytest.raises(ValueError, match="give 0 to 1"):
        wb.show(probed).where = 2
    assert repr(wb.show(heads)).startswith("Grid(")
    one = dataclasses.replace(probed, **{name: getattr(probed, name)[:1] for name in
                              ("components", "values", "ci_lo", "ci_hi", "null_p95", "per_prompt")}, columns={})  # fmt: skip
    assert repr(wb.show(one)).startswith("Grid(")  # a single layer is no curve
