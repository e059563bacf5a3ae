"""The scripts of results in a real browser: tokens, tables, curves and circuits; and a circuit in a notebook."""

import json

import pytest

EVIL = "<img src=x onerror=document.title='hacked'>"


def strips():
    rows = [
        ("mean", ["a", "b"], [0.5, -0.2]),
        ("prompt 0", ["x", EVIL, "z"], [0.9, -1.0, 0.0]),
        ("prompt 1", ["x", "y"], [0.1, 0.2]),
    ]
    lines = [{"name": name, "cells": [{"text": text, "value": value, "key": f"embed@{k}", "tip": f"{name} {k}", "faint": name == "mean"}
              for k, (text, value) in enumerate(zip(texts, values))]} for name, texts, values in rows]  # fmt: skip
    return {"table": False, "many": True, "title": "saliency", "subtitle": "s", "note": "n", "alt": "tokens", "names": [], "rows": lines,
            "scale": {"low": "-1", "high": "+1", "unit": "logit_diff"}}  # fmt: skip


def test_a_position_is_selected_in_every_line_and_ctrl_adds(page, mount):
    mount("tokens", strips())
    pairs = "() => state.selected.join(' ')"
    page.locator(".wb-token", has_text="z").click()
    assert page.evaluate(pairs) == "1 2"
    page.locator(".wb-token", has_text="y").click(modifiers=["Control"])
    assert page.evaluate(pairs) == "1 2 0 1 1 1 2 1" and page.locator(".wb-chosen").count() == 4
    page.locator(".wb-token", has_text=EVIL).click(modifiers=["Control"])
    assert page.evaluate(pairs) == "1 2"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert page.evaluate(pairs) == "1 2 0 1 1 1 2 1"
    page.keyboard.press("Escape")
    assert page.evaluate(pairs) == "" and page.locator(".wb-faint").count() == 2
    blue, red = (
        page.locator(".wb-token", has_text=text).first.evaluate("e => getComputedStyle(e).backgroundColor")
        for text in ("x", EVIL)
    )
    assert blue.startswith("rgba(33, 102, 172") and red.startswith("rgba(178, 24, 43")
    assert page.locator(".wb-tokens img").count() == 0 and page.title() != "hacked"


def test_a_table_reads_downwards_and_its_rows_are_selected(page, mount):
    rows = [{"name": f"z.0.{k}", "cells": [{"text": f"{k}", "value": 0, "key": f"row {k}", "tip": f"tip {k}"}, {"text": EVIL, "value": 0,
             "key": f"row {k}", "tip": "t"}]} for k in range(3)]  # fmt: skip
    mount("tokens", {"table": True, "down": True, "many": True, "title": "", "subtitle": "", "note": "", "alt": "a table", "names": [],
                     "corner": "component", "columns": ["score", "token"], "rows": rows})  # fmt: skip
    lines = page.locator("tr")
    assert [lines.nth(k).locator("th").first.text_content() for k in (0, 1, 3)] == ["component", "z.0.0", "z.0.2"]
    lines.nth(2).locator("td").first.click()
    assert page.evaluate("() => state.selected") == [1, 0, 1, 1]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.evaluate("() => state.selected") == [1, 0, 1, 1, 2, 0, 2, 1]
    assert page.locator(".wb-tokens img").count() == 0 and page.title() != "hacked"


def lines_data():
    return {"names": ["resid_post.0@-1", "resid_post.1@-1", "resid_post.2@-1"], "labels": ["0", "1", "2"], "tips": ["zero", EVIL, "two"],
            "series": [{"label": "null", "tone": "grey", "area": True, "y": [0.5, 0.5, 0.5]},
                       {"label": EVIL, "tone": "orange", "dash": "2 2", "marker": "^", "y": [0.4, None, 0.6]},
                       {"label": "test", "tone": "blue", "marker": "o", "main": True, "y": [0.5, 0.7, 0.9], "lo": [0.4, 0.6, None], "hi": [0.6, 0.8, None]}],
            "ylim": [0, 1], "xlabel": "layer", "ylabel": "accuracy", "title": "probes", "subtitle": "s", "note": "n", "alt": "all in one sentence"}  # fmt: skip


def test_a_layer_is_picked_from_a_curve(page, mount):
    read = mount("lines", lines_data())
    field, picture = page.get_by_role("application", name="all in one sentence"), page.locator(".wb-lines-field svg")
    g = json.loads(picture.get_attribute("data-geometry"))
    assert g["x"] == sorted(g["x"])
    field.hover(position={"x": g["x"][1] - 9, "y": g["top"] + 20})
    assert page.locator(".wb-lines-read").text_content() == EVIL
    field.click(position={"x": g["x"][2] + 5, "y": g["bottom"] - 9})
    assert read() == ["resid_post.2@-1"]
    for key in ("ArrowLeft", "ArrowLeft", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    assert read() == ["resid_post.2@-1", "resid_post.0@-1"]
    assert page.locator(".wb-unseen").text_content() == "zero"
    heights = page.evaluate(  # the higher the number, the higher the point
        "() => [...document.querySelectorAll('.wb-lines-field circle[r=\"3.8\"]')].map((e) => Number(e.getAttribute('cy')))"
    )
    assert heights == sorted(heights, reverse=True) and len(heights) == 3
    page.keyboard.press("Escape")
    assert read() == []
    assert page.locator("img").count() == 0 and page.title() != "hacked"


def graph_data(edges=None):
    nodes = [
        ("embed", "embed", 0.5, 0),
        ("z.0.0", "z", 0, 1),
        ("z.0.1", "z", 1, 1),
        ("mlp_out.0", "mlp_out", 2.3, 2),
        ("logits", "logits", 0.5, 3),
    ]
    edges = edges or [[0, 2, "v", 2.0, 1.5, 2.5, 0.1, False], [2, 4, "logits", -1.0, None, None, None, False], [0, 3, "mlp_out", 0.05, 0.0, 0.1, 0.2, True],
                      [3, 4, "logits", 0.5, 0.4, 0.6, 0.2, False]]  # fmt: skip
    return {"nodes": [{"name": name, "label": EVIL if name == "z.0.1" else name, "kind": kind, "x": x, "y": y, "fixed": kind == "logits"}
                      for name, kind, x, y in nodes], "names": [node[0] for node in nodes],
            "edges": edges, "limit": 2.0, "right": 3.3, "top": 3, "split": True, "layers": [{"label": "layer 0", "from": 1, "to": 2}],
            "title": "circuit", "subtitle": "s", "note": "n", "alt": "a circuit"}  # fmt: skip


@pytest.mark.parametrize("name", ["lines", "graph"])
def test_the_width_and_the_theme_are_followed_until_the_view_is_closed(page, mount, name):
    """Keys that mean nothing here are left to the notebook; those that do are not."""
    mount(name, lines_data() if name == "lines" else graph_data())
    geometry = "() => document.querySelector('[data-geometry]').dataset.geometry"
    wide, root = page.evaluate(geometry), page.locator(f".wb-{name}")
    page.evaluate("() => { document.querySelector('#here').style.width = '300px' }")
    page.wait_for_function(f"(before) => ({geometry})() !== before", arg=wide)
    page.evaluate("() => { document.body.style.background = '#111111' }")
    page.wait_for_function(f"() => document.querySelector('.wb-{name}').classList.contains('wb-dark')")
    page.evaluate("() => { window.passed = []; document.addEventListener('keydown', (e) => passed.push(e.key)) }")
    page.get_by_role("application").focus()
    for key in ("ArrowLeft", "Enter", "Escape", "Escape", "x"):
        page.keyboard.press(key)
    assert page.evaluate("() => passed") == ["x"]
    narrow = page.evaluate(geometry)
    page.evaluate("() => { unmount(); document.body.style.background = '#ffffff' }")
    page.evaluate("() => { document.querySelector('#here').style.width = '900px' }")
    page.wait_for_timeout(600)
    assert page.evaluate(geometry) == narrow and "wb-dark" in root.get_attribute("class")
    assert page.evaluate("() => Object.values(heard).flat().length") == 0


def test_a_feature_is_a_hexagon_around_its_number(page, mount):
    """Ink at the middle of its slanted end, none at the corner of the box that a rounded one would fill."""
    data = graph_data()
    data["nodes"][1] |= {"name": "feature.course.1395", "label": "1395", "kind": "feature"}
    data["edges"] = [[0, 1, "feature", 2.0, None, None, None, False], [1, 4, "logits", 1.0, None, None, None, False]]
    data["names"][1] = "feature.course.1395"
    read = mount("graph", data)
    canvas = page.locator(".wb-graph-field canvas")
    g = json.loads(canvas.get_attribute("data-geometry"))
    x, y = g["nodes"][1]
    left = page.evaluate(  # where the outline begins, on three heights
        """([x, y, r]) => {
          const canvas = document.querySelector('.wb-graph-field canvas'), s = window.devicePixelRatio || 1;
          return [-0.6, 0, 0.6].map((up) => {
            const row = canvas.getContext('2d').getImageData(0, Math.round((y + up * r) * s), Math.round(x * s), 1).data;
            for (let i = Math.round((x - 3 * r) * s); ; i++) if (row[4 * i + 3] > 120 && row[4 * i] < 120) return i / s;
          });
        }""",
        [x, y, g["r"]],
    )
    assert left[1] < left[0] - 2 and left[0] == pytest.approx(left[2], abs=1.5)
    canvas.click(position={"x": x, "y": y})
    assert read() == ["feature.course.1395"]


def test_a_part_of_a_circuit_is_selected_and_its_edges_stand_out(page, mount):
    read, canvas = mount("graph", graph_data()), page.locator(".wb-graph-field canvas")
    g = json.loads(canvas.get_attribute("data-geometry"))
    at = [{"x": x, "y": y} for x, y in g["nodes"]]
    assert at[0]["y"] > at[1]["y"] > at[3]["y"] > at[4]["y"]  # upwards
    canvas.hover(position=at[3])
    assert (
        page.locator(".wb-graph-read").text_content()
        == "mlp_out.0    1 edges in, strongest embed +0.0500    1 out, strongest logits +0.500"
    )
    canvas.click(position=at[2])
    assert read() == ["z.0.1"]
    canvas.click(position=at[3], modifiers=["Shift"])
    assert read() == ["z.0.1", "mlp_out.0"]
    canvas.click(position=at[4])  # nothing can be changed in the logits
    canvas.click(position=at[1])  # no edge of the circuit runs through this head
    assert read() == ["z.0.1", "mlp_out.0"]
    page.keyboard.press("Escape")
    page.mouse.move(0, 0)
    assert read() == []
    for key in (
        "ArrowDown",
        "ArrowDown",
        "ArrowDown",
        "Enter",
    ):  # from the logits over the FFN and the head to the embedding
        page.keyboard.press(key)
    assert read() == ["embed"] and page.locator(".wb-unseen").text_content().startswith("embed    0 edges in    2 out")
    assert page.locator("img").count() == 0 and page.title() != "hacked"


def test_edges_are_coloured_by_sign_and_read_by_pointing(page, mount):
    for background, names in (("#ffffff", ("blue", "red")), ("#111111", ("blue", "red"))):
        mount(
            "graph",
            graph_data([[0, 1, "mlp_out", 2.0, 1.5, 2.5, 0.1, False], [1, 4, "logits", -1.0, None, None, 3.0, True]]),
            background,
        )
        canvas = page.locator(".wb-graph-field canvas")
        seen = page.evaluate(
            """() => { const c = document.querySelector("canvas"), [r, b] = [[], []];
              const data = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
              for (let i = 0; i < data.length; i += 4) { if (data[i + 3] < 40) continue;
                if (data[i + 2] > data[i] + 60) b.push(i); if (data[i] > data[i + 2] + 60) r.push(i); }
              return { blue: b.length, red: r.length }; }"""
        )
        assert all(seen[name] > 20 for name in names)
    g = json.loads(canvas.get_attribute("data-geometry"))
    (x0, y0), (x1, y1) = g["nodes"][0], g["nodes"][1]
    canvas.hover(position={"x": (x0 + x1) / 2, "y": (y0 + y1) / 2})
    said = page.locator(".wb-graph-read").text_content()
    assert said == "embed \u2192 z.0.0    score +2.00    95 % interval [+1.50, +2.50]    null p95 0.100"


def test_thousands_of_edges_are_drawn_at_once(page, mount):
    many = [[0, 1 + k % 4, "qkv"[k % 3], (-1) ** k * (4000 - k) / 2000, None, None, None, False] for k in range(4000)]
    mount("graph", graph_data(many))
    took = page.evaluate(
        """() => { const start = performance.now();
          document.querySelector("canvas").dispatchEvent(new PointerEvent("pointerleave")); return performance.now() - start }"""
    )
    assert took < 1000  # a twentieth of it, unless the machine is busy


@pytest.mark.parametrize("name", ["tokens", "lines", "graph"])
def test_a_closed_result_stops_listening(page, mount, name):
    mount(name, {"tokens": strips, "lines": lines_data, "graph": graph_data}[name]())
    page.evaluate("() => unmount()")
    assert page.evaluate("() => Object.values(heard).flat().length") == 0


CELLS = ["""import numpy as np, workbench as wb
from workbench.locate.circuit import Circuit
heads = [f"z.{layer}.{head}" for layer in range(2) for head in range(3)]
edges = [f"embed -> v.{one[2:]}" for one in heads] + [f"{one} -> logits" for one in heads]
scores = Circuit(tuple(edges), np.linspace(3, 0.8, 12), (2, 3, 3), 200, "circuit.eap", "logit_diff", "words")
view = wb.show(scores, size=10)
view"""]  # fmt: skip


def test_the_slider_and_a_click_arrive_as_values(notebook, page):
    opened = notebook("circuit.ipynb", CELLS)
    opened.run_all()
    canvas = page.locator(".wb-graph-field canvas")
    canvas.wait_for()
    assert opened.run("print(view.size, len(view.circuit))") == "10 8"
    handle = page.locator(".wb-view .noUi-handle").first
    handle.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    size = int(opened.run("print(view.size)"))
    assert size > 10 and opened.run("print(view.circuit.edges == scores.top(view.size).edges)") == "True"
    page.locator(".wb-graph-sub", has_text=f"{opened.run('print(len(view.circuit))')} of 200 edges").wait_for()
    canvas.scroll_into_view_if_needed()
    x, y = json.loads(canvas.get_attribute("data-geometry"))["nodes"][1]
    canvas.click(position={"x": x, "y": y})
    name = opened.run("print([str(one) for one in view._places][1])")
    assert opened.run("print(view.selected)") == f"[{name}]"
    assert opened.run("print(wb.Zero(at=view.selected))") == opened.run(f"print(wb.Zero('{name}'))")
    page.locator(".wb-code", has_text=f'at = ["{name}"]').wait_for()
