"""Scores: order, printing, saving, pictures."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import copying

import workbench as wb
from workbench.plot import layout


@pytest.fixture(scope="module")
def scores(trained):
    return wb.locate.causal.patch(trained, wb.Task(copying(), "copying"), "resid_pre")


def test_the_table(scores):
    frame = scores.frame
    assert list(frame.columns) == [
        "component",
        "layer",
        "index",
        "position",
        "score",
        "ci_lo",
        "ci_hi",
        "null_p95",
        "n",
    ]
    assert frame.score.abs().is_monotonic_decreasing and len(frame) == 21
    assert [str(one) for one in scores.top(3)] == list(frame.component[:3])
    assert scores["resid_pre.0@2"] == frame[frame.component == "resid_pre.0@2"].score.iloc[0]
    with pytest.raises(KeyError, match="was not scored"):
        scores["z.0.0"]


def test_above_null_is_above_null(scores):
    table = scores.frame.set_index("component")
    for one in scores.components:
        row = table.loc[str(one)]
        assert (one in scores.above_null()) == (abs(row.score) > row.null_p95)


def test_prints_in_one_deterministic_line(scores):
    assert "\n" not in repr(scores) and "seconds" not in repr(scores)
    assert "clean" in scores.title and "copying, 12 prompts" in scores.title


def test_without_values_per_prompt_no_number_of_prompts_is_named(scores):
    whole = replace(scores, per_prompt=scores.per_prompt[:, :0])
    assert whole.title == scores.title.replace(", 12 prompts", "") and whole.title.endswith("(copying)")
    assert replace(whole, task="").title == whole.title.removesuffix(" (copying)")
    assert replace(scores, per_prompt=scores.per_prompt[:, :1]).title.endswith("(copying, 1 prompt)")


def test_round_trip(scores, tmp_path):
    again = wb.Scores.load(scores.save(tmp_path / "s"))
    assert again.components == scores.components and np.array_equal(again.per_prompt, scores.per_prompt)
    assert again.title == scores.title and again.labels == scores.labels and repr(again) == repr(scores)
    with pytest.raises(FileNotFoundError, match=r"scores\.json"):
        wb.Scores.load(tmp_path)


def test_layout_has_layers_by_positions_or_heads(scores, trained):
    place = layout(scores)
    assert place["rows"] == ["0", "1", "2"] and len(place["columns"]) == 7 and place["columns"][3] == "· 3"
    at = dict(zip(map(str, scores.components), zip(place["row"], place["column"])))
    assert at["resid_pre.1@2"] == (1, 2)
    heads = layout(wb.locate.causal.patch(trained, wb.Task(copying()), "z"))
    assert (len(heads["rows"]), len(heads["columns"]), heads["across"]) == (3, 4, "head")


def test_it_draws(scores, tmp_path):
    figure = scores.plot()
    figure.savefig(tmp_path / "grid.png")
    assert "clean" in figure.axes[0].get_title(loc="left")
