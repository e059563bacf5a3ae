"""What the drawing of a circuit needs, in plain JSON, and what is known of its faithfulness, in words."""

from __future__ import annotations

import numpy as np

from workbench.component import Component
from workbench.locate.circuit import Circuit, Curve, Faithfulness
from workbench.locate.circuit.drawing import label, meaning

COLUMNS = ("scores", "ci_lo", "ci_hi", "null_p95")


def fixed(one: Component) -> bool:
    """Can nothing be changed here? The logits, and what an SAE leaves over."""
    return one.kind == "logits" or one.index == "error"


def counted(circuit: Circuit, size: int) -> str:
    """How many edges are shown, and how many of those asked for lead nowhere."""
    left = (
        f" ({size - len(circuit)} more lie on no path from the embedding to the logits)" if size > len(circuit) else ""
    )
    return f"{len(circuit)} of {circuit.whole} edges{left}"


def drawing(value: Circuit, circuit: Circuit, places: dict, size: int) -> dict:
    """The graph: parts stand where they stand in `value`, whatever the size; edges of `circuit`, strongest first.

    Args:
        value: all scored edges. circuit: those shown. places: part -> (x, y), see `drawing.places`. size: edges asked for.
    Returns:
        nodes; edges as [source, reader, kind, score, ci_lo, ci_hi, null_p95, within the null]; layers, limit, words.
    """
    number, layers, edges = {one: k for k, one in enumerate(places)}, {}, []
    for one, (_, y) in places.items():
        name = {"embed": "", "logits": "", "feature": one.name}.get(one.kind, f"layer {one.layer}")
        low, high = layers.get(name, (y, y))
        layers[name] = (min(low, y), max(high, y))
    layers.pop("", None)
    nodes = [{"name": str(one), "label": label(one), "kind": one.kind, "x": float(x), "y": float(y), "fixed": fixed(one)}
             for one, (x, y) in places.items()]  # fmt: skip
    order, columns = np.argsort(-np.abs(circuit.scores), kind="stable"), [getattr(circuit, name) for name in COLUMNS]
    for i in order:
        edge, numbers = circuit.edges[i], [column[i] for column in columns]
        faint = bool(abs(numbers[0]) <= numbers[3])
        numbers = [None if not np.isfinite(x) else float(f"{x:.4g}") for x in numbers]
        for reader in circuit.readers(edge.target):
            edges.append([number[edge.source], number[reader], edge.target.kind, *numbers, faint])
    best = str(circuit.edges[order[0]]) if len(circuit) else "none"
    note = f"Width is the root of the score. F2 is the FFN of layer 2. {meaning(circuit)}".strip()
    note += " Pale edges are within their null." if any(edge[-1] for edge in edges) else ""
    note += f" Null: {circuit.null}." if circuit.null else ""
    if not edges:
        note = "No path leads from the embedding to the logits over so few edges: take more, or go by route."
    return {
        "nodes": nodes, "edges": edges, "limit": float(np.abs(value.scores).max()) or 1.0,
        "right": max(node["x"] for node in nodes) + 1.0, "top": max(node["y"] for node in nodes),
        "split": any(edge[2] in "qk" for edge in edges),
        "layers": [{"label": name, "from": low, "to": high} for name, (low, high) in sorted(layers.items(), key=lambda item: item[1])],
        "title": f"{circuit.method}{': ' * bool(circuit.task)}{circuit.task}", "subtitle": counted(circuit, size), "note": note,
        "alt": f"Circuit of {len(circuit)} edges in layers, upwards; strongest edge {best}. Arrow keys move between parts.",
    }  # fmt: skip


def measured(curve: Curve, value: Circuit) -> list[int]:
    """The sizes of a curve, in edges."""
    return [round(float(size) * value.whole) for size in curve.sizes]


def beside(curve: Curve, value: Circuit, circuit: Circuit, size: int, by: str) -> dict:
    """The curve as lines over the number of edges, with this size marked."""
    sizes, (by_size, by_sign) = (
        measured(curve, value),
        ([round(float(x), 5) for x in one] for one in (curve.by_size, curve.by_sign)),
    )
    mean = [round(float(x), 5) for x in curve.random.mean(0)] if len(curve.random) else []
    series = [{"label": "random rankings", "tone": "grey", "y": mean}] if mean else []
    series += [{"label": "largest |score|", "tone": "blue", "marker": "s", "dash": "5 3", "y": by_size, "main": by == "size"},
               {"label": "largest score", "tone": "orange", "marker": "o", "dash": "", "y": by_sign, "main": by == "sign"}]  # fmt: skip
    ends = [0, 1, *by_size, *by_sign, *mean]
    tips = [f"{n} edges ({share:.1%})    |score| {a:.2f}    score {b:.2f}" + (f"    random {mean[i]:.2f}" if mean else "")
            for i, (n, share, a, b) in enumerate(zip(sizes, curve.sizes, by_size, by_sign, strict=True))]  # fmt: skip
    return {
        "names": [str(n) for n in sizes], "at": sizes, "log": True, "labels": [str(n) for n in sizes], "series": series, "tips": tips,
        "ylim": [min(ends) - 0.03, max(ends) + 0.05], "mark": size, "single": True, "widest": 360, "height": 280, "note": "",
        "xlabel": "edges asked for (log scale)", "ylabel": "faithfulness", "title": "How faithful?",
        "subtitle": f"{curve.task}, {curve.n} prompts; CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f}", "hint": "Click a measured size to go there.",
        "alt": f"Faithfulness by number of edges, now {size}: {said(curve, value, circuit, size, by)}",
    }  # fmt: skip


def said(found, value: Circuit, circuit: Circuit, size: int, by: str) -> str:
    """How faithful is a circuit of this size? In words; only what was measured."""
    if found is None:
        return ""
    if isinstance(found, Faithfulness):
        others = f"; random circuits {found.random.mean():.2f}" if len(found.random) else ""
        mine = len(circuit.nodes) if found.unit == "nodes" else len(circuit)
        return (f"faithfulness {found.value:.2f} [{found.ci_lo:.2f}, {found.ci_hi:.2f}] with {found.edges} {found.unit}{others}"
                + ("" if found.edges == mine else f"; not measured with {mine}"))  # fmt: skip
    if by == "route":
        return "the curve knows no circuits by route; wb.locate.circuit.faithfulness measures one"
    sizes, line = measured(found, value), found.by_sign if by == "sign" else found.by_size
    if size in sizes:
        k = sizes.index(size)
        others = f"; random {found.random[:, k].mean():.2f}" if len(found.random) else ""
        return f"faithfulness {line[k]:.2f} with {size} edges{others}"
    near = [max((k for k, n in enumerate(sizes) if n < size), default=None),
            min((k for k, n in enumerate(sizes) if n > size), default=None)]  # fmt: skip
    return "not measured at this size; " + ", ".join(
        f"{line[k]:.2f} with {sizes[k]} edges" for k in near if k is not None
    )
