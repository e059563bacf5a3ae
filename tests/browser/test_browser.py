"""The first notebook in JupyterLab, in a real browser: click a cell of the grid, move the slider of the panel."""

import ast
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NAME = "00_start_here.ipynb"


@pytest.fixture
def opened(notebook, tmp_path):
    """The first notebook, with its exercises solved: open ones stop where checks are strict, as they are here."""
    whole = nbformat.read(ROOT / "notebooks" / NAME, 4)
    whole.cells = [cell for cell in whole.cells if "exercise" not in cell.metadata.get("tags", [])]
    nbformat.write(whole, tmp_path / NAME)
    opened = notebook(NAME, tmp_path)
    opened.run_all()
    return opened


def test_a_click_in_the_grid_and_a_step_of_the_slider_arrive_as_values(opened, click):
    from playwright.sync_api import expect

    page = opened.page
    table = ast.literal_eval(opened.run(
        "t = grid.value.frame; print([(c, int(l), int(p if i is None or i != i else i)) "
        "for c, l, i, p in zip(t.component, t.layer, t['index'], t.position)])"
    ))  # fmt: skip
    layers, columns = sorted({row[1] for row in table}), sorted({row[2] for row in table})
    wanted = {(layer, column): name for name, layer, column in table}
    first, second = wanted[layers[1], columns[2]], wanted[layers[-1], columns[0]]

    canvas = page.locator(".wb-grid canvas").nth(1)  # the heads; the first grid is the one pair
    opened.run("grid.selected = []")
    click(canvas, 1, 2)
    assert opened.run("print(grid.selected)") == f"[{first}]"
    click(canvas, len(layers) - 1, 0, modifiers=["Control"])
    assert opened.run("print(grid.code)") == f'["{first}", "{second}"]'

    strength = "print([one.strength for one in wb.Recipe([panel.value]) if isinstance(one, wb.Add)])"
    before = opened.run(strength)
    panel = page.locator(".wb-view", has=page.locator(".wb-strip")).last
    handle = panel.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    handle.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    after, said = (opened.run(code) for code in (
        strength, "print(model.generate(panel.prompt, panel.value, max_new_tokens=panel.max_new_tokens))"
    ))  # fmt: skip
    assert after != before
    shown = panel.locator('.wb-strip-line[data-name="with"] .wb-generated')
    expect(shown).to_have_text(said, timeout=30_000)  # the drawing follows the value
    assert said == opened.run("print(panel.text)")
