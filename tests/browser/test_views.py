"""The scripts of the views in a real browser: without Jupyter, and in a notebook that is opened again."""

import json

import pytest

EVIL = "<img src=x onerror=document.title='hacked'>"
TITLE = "resid_pre: residual stream before the block"


def grid_data(rows=3, columns=5):
    names = [f"resid_pre.{r}@{c}" for r in range(rows) for c in range(columns)]
    score = [(-1) ** k * k / len(names) for k in range(len(names))]
    return {
        "rows": [str(r) for r in range(rows)], "columns": [f"{EVIL if c == 1 else 'the'} {c}" for c in range(columns)],
        "row": [k // columns for k in range(len(names))], "column": [k % columns for k in range(len(names))],
        "names": names, "score": score, "lo": [s - 0.1 for s in score], "hi": [None, *[s + 0.1 for s in score[1:]]],
        "null": [0.2] * len(names), "faint": [abs(s) <= 0.2 for s in score], "limit": 0.94, "best": 0, "wide": True,
        "tokens": [EVIL if k % columns == 1 else "the" for k in range(len(names))], "title": TITLE, "subtitle": "s",
        "unit": "score (logit_diff)", "note": "faint", "alt": "all in one sentence", "upward": "layer", "across": "position",
    } | {"lo": [None, *[s - 0.1 for s in score[1:]]]}  # fmt: skip


def test_clicks_select_add_and_take_away(page, mount, click):
    read, canvas = mount("grid", grid_data()), page.locator("canvas")
    click(canvas, 0, 3)
    assert read() == ["resid_pre.0@3"]
    click(canvas, 2, 4)
    assert read() == ["resid_pre.2@4"]
    click(canvas, 1, 0, modifiers=["Shift"])
    click(canvas, 0, 3, modifiers=["Control"])
    assert read() == ["resid_pre.2@4", "resid_pre.1@0", "resid_pre.0@3"]
    click(canvas, 1, 0, modifiers=["Control"])
    assert read() == ["resid_pre.2@4", "resid_pre.0@3"]
    click(canvas, 1, 1)
    click(canvas, 1, 1)
    assert read() == []


def test_the_keyboard_does_the_same_and_a_screen_reader_hears_it(page, mount):
    read = mount("grid", grid_data())
    page.keyboard.press("Tab")
    grid = page.get_by_role("grid", name="all in one sentence")
    assert grid.evaluate("e => e === document.activeElement")
    for key in ("ArrowUp", "ArrowUp", "ArrowUp", "ArrowRight", "Enter", "ArrowDown", "Space"):
        page.keyboard.press(key)
    assert read() == ["resid_pre.2@1", "resid_pre.1@1"]
    cell = page.locator("[role=gridcell]")
    assert cell.get_attribute("aria-selected") == "true" and cell.text_content().startswith("resid_pre.1@1")
    assert grid.get_attribute("aria-activedescendant") == cell.get_attribute("id")
    assert (grid.get_attribute("aria-rowcount"), grid.get_attribute("aria-colcount")) == ("3", "5")
    page.keyboard.press("Enter")
    assert read() == ["resid_pre.2@1"]
    page.keyboard.press("Escape")
    assert read() == []


def test_pointing_reads_score_interval_and_null_and_text_stays_text(page, mount):
    mount("grid", grid_data())
    canvas = page.locator("canvas")
    g = json.loads(canvas.get_attribute("data-geometry"))
    canvas.hover(position={"x": g["left"] + 1.5 * g["cw"], "y": g["top"] + 2.5 * g["ch"]})
    said = page.locator(".wb-grid-read").text_content()
    assert said == f'resid_pre.0@1  "{EVIL}"    score \u22120.067    95 % interval [\u22120.167, +0.033]    ' \
                   "null p95 0.200, within the null"  # fmt: skip
    canvas.hover(position={"x": g["left"] + 0.5 * g["cw"], "y": g["top"] + 2.5 * g["ch"]})
    assert "no interval" in page.locator(".wb-grid-read").text_content()
    assert page.locator("img").count() == 0 and page.title() != "hacked"


def test_blue_is_positive_the_middle_is_the_paper_and_layer_0_is_below(page, mount):
    for background, darker in (("#ffffff", False), ("#111111", True)):
        mount("grid", grid_data(), background)
        colours = page.evaluate(
            """() => {
              const canvas = document.querySelector("canvas"), g = JSON.parse(canvas.dataset.geometry);
              const at = (row, column) => [...canvas.getContext("2d").getImageData(
                g.left + column * g.cw + 4, g.top + (g.rows - 1 - row) * g.ch + 4, 1, 1).data].slice(0, 3);
              return [at(2, 4), at(2, 3), at(0, 0)];
            }"""
        )
        (red, _, blue), (other_red, _, other_blue), middle = colours
        assert blue > red + 40 and other_red > other_blue + 40  # 14 is +0.93, 13 is -0.87
        assert (max(middle) < 80) == darker and (min(middle) > 200) == (not darker)


def test_thousands_of_cells_are_drawn_at_once_and_scroll(page, mount, click):
    read = mount("grid", grid_data(12, 400) | {"columns": [str(i) for i in range(400)]})
    took = page.evaluate(
        """() => { const start = performance.now();
          document.querySelector("canvas").dispatchEvent(new PointerEvent("pointerleave")); return performance.now() - start }"""
    )
    assert took < 250
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    click(page.locator("canvas"), 7, 9)
    assert read() == ["resid_pre.7@9"]


def test_the_strip_sets_tokens_as_text_and_marks_the_steered(page, mount):
    token = [{"text": EVIL, "steered": True}, {"text": " b", "steered": False}]
    row = {"name": "with", "prompt": token, "generated": token}
    bars = [{"token": EVIL, "before": 0.25, "after": 0.5}, {"token": "b", "before": 0.1, "after": 0.0}]
    mount("strip", {"rows": [row], "bars": bars, "note": "marked"})
    assert page.locator(".wb-generated").text_content() == f"{EVIL} b"
    assert page.locator(".wb-strip-line .wb-steered").count() == 3  # two tokens and the legend's sample
    widths = page.evaluate("() => [...document.querySelectorAll('.wb-bars-pair div')].map(e => e.style.width)")
    assert widths == ["50%", "100%", "20%", "0%"]
    assert page.locator("img").count() == 0 and page.title() != "hacked"


@pytest.mark.parametrize("name", ["grid", "strip", "attention"])
def test_a_closed_view_stops_listening(page, mount, name):
    mount(name, {"grid": grid_data(), "attention": attention_data()}.get(name, {"rows": []}))
    page.evaluate("() => unmount()")
    assert page.evaluate("() => Object.values(heard).flat().length") == 0


CELLS = ["""import torch, workbench as wb, numpy as np
values = np.linspace(-0.7, 0.63, 15)
names = [f"z.{layer}.{head}" for layer in range(3) for head in range(5)]
scores = wb.Scores([wb.Component.parse(one) for one in names], values, values - 0.1, values + 0.1, abs(values) / 2,
                   values[:, None], "causal.patch", "logit_diff", 3.0, -2.0, "denoising")
wb.show(scores)"""]  # fmt: skip


def test_a_picture_stands_in_when_the_notebook_is_opened_without_its_kernel(notebook, lab, page):
    opened = notebook("again.ipynb", CELLS)
    opened.run_all()
    page.locator(".wb-grid canvas").wait_for()
    still = page.locator("img.jp-needs-light-background")
    assert still.count() == 1 and not still.is_visible()
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    outputs = json.loads((lab[1] / "again.ipynb").read_text())["cells"][0]["outputs"]
    view = "Grid(z 3x5, max -0.70 at z.0.0)"
    assert ["".join(one["data"]["text/plain"]) for one in outputs] == [view, f"<picture of {view}>"]
    assert ["image/png" in one["data"] for one in outputs] == [False, True]
    page.goto("about:blank")
    type(opened)(page, lab[0], "again.ipynb")
    still.wait_for()
    assert page.locator(".wb-grid").count() == 0


def lens_data():
    cells = [[{"text": EVIL if (r, c) == (0, 1) else f"w{r}{c}", "value": r * c / 6, "tip": f"tip {r} {c}"} for c in range(4)]
             for r in range(3)]  # fmt: skip
    return {"table": True, "title": "logit lens", "subtitle": "s", "note": "n", "alt": "a lens", "corner": "", "names": [],
            "columns": ["a", "b", "c", EVIL], "rows": [{"name": f"resid_post.{r}", "cells": cells[r]} for r in range(3)]}  # fmt: skip


def test_tokens_are_read_clicked_and_walked(page, mount):
    mount("tokens", lens_data())
    rows = page.locator(".wb-tokens-table tr")
    assert rows.nth(0).locator("th").first.text_content() == "resid_post.2"  # layers run upwards
    page.get_by_role("gridcell", name="w12").or_(page.locator("td", has_text="w12")).first.click()
    assert page.evaluate("() => state.selected") == [1, 2]
    assert page.locator(".wb-tokens-read").text_content() == "tip 1 2"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert page.evaluate("() => state.selected") == [2, 2]
    page.keyboard.press("Escape")
    assert page.evaluate("() => state.selected") == []
    assert page.title() != "hacked" and page.locator(".wb-tokens img").count() == 0


def attention_data():
    n, heads = 3, [(layer, head) for layer in range(2) for head in range(2)]
    bytes_ = [255 if key == max(0, q - head) else 0 for _, head in heads for q in range(n) for key in range(n)]
    return {"tokens": ["a", EVIL, "c"], "heads": [f"pattern.{layer}.{head}" for layer, head in heads], "names": [],
            "row": [layer for layer, _ in heads], "column": [head for _, head in heads], "n_layers": 2, "n_heads": 2,
            "notes": ["note"] * 4, "title": "attention patterns", "subtitle": "s", "alt": "heads", "bytes": bytes_}  # fmt: skip


def test_attention_heads_are_chosen_and_read(page, mount):
    mount("attention", attention_data())
    small, large = page.locator("canvas").nth(0), page.locator("canvas").nth(1)
    place = json.loads(small.get_attribute("data-geometry"))
    small.click(position={"x": place["left"] + 1.5 * place["cell"], "y": place["top"] + 0.5 * place["cell"]})
    assert page.evaluate("() => state.selected") == [3]  # layer 1, the upper one
    place = json.loads(large.get_attribute("data-geometry"))
    large.hover(position={"x": place["left"] + 1.5 * place["step"], "y": place["top"] + 2.5 * place["step"]})
    assert page.locator(".wb-att-read").text_content() == f"c (2) looks at {EVIL} (1): 1.00"
    page.mouse.move(0, 0)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert page.evaluate("() => state.selected") == [3, 2]
    assert page.title() != "hacked"
