"""The grid without a browser: set a trait, read a trait."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import workbench as wb
from workbench.plot import layout


def chosen(grid):
    return [str(one) for one in grid.selected]


def test_it_prints_itself(heads):
    grid = wb.show(heads)
    assert repr(grid) == "Grid(z 3x5, max -0.70 at z.0.0)"
    assert repr(wb.show(heads, selected=["z.1.3"])) == repr(grid)


def test_rows_are_layers_from_the_bottom_and_columns_are_heads(heads):
    data = wb.show(heads)._canvas.data
    assert data["rows"] == ["0", "1", "2"] and data["columns"] == ["0", "1", "2", "3", "4"]
    for k, name in enumerate(data["names"]):
        assert name == f"z.{data['row'][k]}.{data['column'][k]}"
        assert data["score"][k] == pytest.approx(heads[name], abs=1e-4)
    assert (data["upward"], data["across"]) == ("layer", "head")


def test_columns_of_the_stream_are_tokens_with_their_position(places):
    data = wb.show(places)._canvas.data
    assert data["columns"] == ["when 0", "anna 1", "<img src=x onerror=alert(1)> 2", "anna 3", "$x$ 4"]
    assert data["across"] == "position" and data["tokens"][6] == "anna"


def test_limits_are_symmetric_and_scores_within_the_null_are_faint(heads):
    data = wb.show(heads)._canvas.data
    assert data["limit"] == pytest.approx(0.7)
    assert [data["names"][k] for k in np.flatnonzero(data["faint"])] == ["z.1.2", "z.1.3"]
    assert "null" in data["note"] and "+3.00 clean, -2.00 corrupted" in data["subtitle"]
    assert "logit_diff" in data["unit"] and "denoising" in data["unit"] and "z.0.0" in data["alt"]


def test_scores_of_all_prompts_together_name_no_number_of_prompts(llama, words):
    from workbench.improve.efficiency import retrieval_heads

    texts = wb.Task([{"text": text} for text in words(9, 9, 9)], "words")
    gates = retrieval_heads(llama, texts, sink=1, window=2, steps=1)
    data = wb.show(gates)._canvas.data
    assert gates.per_prompt.shape[1] == 0 and "prompt" not in data["subtitle"] + data["alt"]
    assert gates.method in data["subtitle"] and "prompt" not in gates.plot().axes[0].get_title(loc="left")


def test_a_missing_interval_is_null_in_json(make_scores):
    scores = make_scores(["z.0.0", "z.0.1"], [0.5, 0.0], null=np.nan, why="one prompt")
    data = wb.show(scores)._canvas.data
    assert json.loads(json.dumps(data, allow_nan=False))["null"] == [None, None] and data["note"] == "one prompt"


def test_selection_goes_both_ways(heads):
    grid = wb.show(heads)
    grid.selected = ["z.2.1", wb.Component.parse("z.0.4")]
    assert grid._canvas.selected == [11, 4] and grid.code == '["z.2.1", "z.0.4"]'
    grid._canvas.selected = [13]  # what a click does
    assert grid.selected == [wb.Component("z", 2, 3)] and "z.2.3" in grid._code.value
    assert (grid._row.value, grid._column.value) == (2, 3)
    assert wb.Zero(at=grid.selected).at == tuple(grid.selected)


def test_the_menus_do_what_a_click_does(heads):
    grid = wb.show(heads)
    for row, column in ((2, 3), (1, 4)):
        grid._row.value, grid._column.value = row, column
        assert grid._toggle.description == "add"
        grid._toggle.click()
    assert chosen(grid) == ["z.2.3", "z.1.4"] and grid._toggle.description == "remove"
    grid._row.value, grid._column.value = 2, 3
    grid._toggle.click()
    assert chosen(grid) == ["z.1.4"]
    grid._clear.click()
    assert chosen(grid) == [] and grid.code == "[]" and grid._canvas.selected == []


def test_what_is_not_in_the_grid_cannot_be_selected(heads):
    grid = wb.show(heads, selected=["z.1.1", "z.1.1"])
    with pytest.raises(ValueError, match=r"z\.7\.0 is not in this grid, which holds 15 .* from z\.0\.0 to z\.2\.4"):
        grid.selected = ["z.7.0"]
    with pytest.raises(ValueError, match="names no component"):
        grid.selected = ["zz.1.1"]
    assert chosen(grid) == ["z.1.1"]


def test_kinds_may_mix_and_cells_may_be_missing(make_scores):
    names = ["attn_out.0@-1", "mlp_out.0@3", "attn_out.1@-1", "attn_out.1@3", "logits@-1"]
    grid = wb.show(make_scores(names, [1, 2, 3, -4, 5]))
    data = grid._canvas.data
    assert data["rows"] == ["attn_out.0", "mlp_out.0", "attn_out.1", "logits"] and data["columns"] == ["3", "-1"]
    assert len({*zip(data["row"], data["column"], strict=True)}) == 5
    grid._row.value, grid._column.value = 0, 0
    assert grid._toggle.disabled  # attn_out.0@3 was not scored
    assert repr(grid) == "Grid(mixed 4x2, max +5.00 at logits@-1)"


def test_heads_at_positions_have_a_column_each(make_scores):
    found = layout(make_scores(["z.0.0@-1", "z.0.1@-1", "z.0.0@2"], [1, 2, 3]))
    assert found["columns"] == ["0 @2", "0 @-1", "1 @-1"] and found["across"] == "head and position"


def test_thousands_of_cells(make_scores):
    names = [f"neuron.{layer}.{i}" for layer in range(12) for i in range(512)]
    scores = make_scores(names, np.random.default_rng(0).normal(size=len(names)))
    grid = wb.show(scores, selected=scores.top(3))
    assert repr(grid).startswith("Grid(neuron 12x512") and len(grid._canvas.selected) == 3
    assert max(grid.figure().get_size_inches()) <= 10


def test_it_leaves_a_picture_beside_the_widget(places, monkeypatch):
    import base64

    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **kwargs: shown.append((data, kwargs)))
    grid = wb.show(places)
    grid._ipython_display_()
    (widget, _), (still, about) = shown
    assert widget["text/plain"] == repr(grid) and "application/vnd.jupyter.widget-view+json" in widget
    assert still["text/plain"] == f"<picture of {grid!r}>" and about["metadata"] == {"needs_background": "light"}
    picture = Image.open(io.BytesIO(base64.b64decode(still["image/png"])))
    assert picture.width > 400 and np.asarray(picture.convert("L")).std() > 20
