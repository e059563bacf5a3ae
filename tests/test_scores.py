"""Scores: order, printing, saving, pictures."""

from dataclasses import fields, replace

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


@pytest.fixture
def by_hand():
    """Four heads and an FFN: helping, hurting, without a null, below it; one of three prompts was left out."""
    values, nulls = np.array([0.2, -3.0, 2.0, 0.1, 1.0]), np.array([0.1, 0.5, np.nan, 0.3, 0.5])
    at = [wb.Component.parse(one) for one in ("z.0.0", "z.0.1", "z.1.0", "z.1.1", "mlp_out.1")]
    per_prompt = np.stack([values, values * np.nan, values], 1)
    per_prompt[0, 2] = np.nan
    columns = {"site": np.array(list("aabbc")), "auroc": np.linspace(0, 1, 5), "n_used": np.arange(5)}
    return wb.Scores(at, values, values - 1, values + 1, nulls, per_prompt, "by hand", "prob", 0.9, 0.1, "noising", "a null",
                     {2: "w4/w5"}, "task", 3.0, 4.0, 7, "why", columns)  # fmt: skip


def test_strength_is_without_sign_and_without_a_null_nothing_is_above_it(by_hand):
    assert [str(one) for one in by_hand.top(3)] == ["z.0.1", "z.1.0", "mlp_out.1"]
    assert list(by_hand.frame.component) == ["z.0.1", "z.1.0", "mlp_out.1", "z.0.0", "z.1.1"]
    assert [str(one) for one in by_hand.above_null()] == ["z.0.1", "mlp_out.1", "z.0.0"]
    assert by_hand.n == 2 and by_hand.kind == "mixed" and "+0.90 clean, +0.10 corrupted" in by_hand.title


def test_nothing_is_lost_in_a_file(by_hand, tmp_path):
    again = wb.Scores.load(by_hand.save(tmp_path / "s"))
    for field in fields(by_hand):
        np.testing.assert_equal(getattr(again, field.name), getattr(by_hand, field.name), field.name)


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
