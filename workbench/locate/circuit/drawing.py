"""Pictures of circuits: the layered graph, the curve of sizes, a dot per prompt. Layers run upwards, as the stream does."""

from __future__ import annotations

import textwrap

import numpy as np

from workbench.component import Component
from workbench.plot import BLUE, FAINT, GREY, INK, MARK, RED, picture

BAND = "#f5f7f9"  # behind features
STYLES = {"q": (0, (4, 2)), "k": (0, (1, 1.5))}  # all others solid


def places(circuit) -> dict:
    """Where does each part stand? Part -> (x, y): heads in columns by their number, FFNs in a column of their own to the
    right, embed at the bottom, logits on top, features side by side in a row of their own, with room for their numbers;
    only layers and parts the circuit runs through."""
    heads, nodes = circuit.sizes[1], circuit.nodes
    levels, features = sorted({_level(node, circuit) for node in nodes}), [n for n in nodes if n.kind == "feature"]
    room = max(0.55, 0.27 + 0.08 * max((len(label(node)) for node in features), default=0))  # for the longest number
    apart = max(room, (heads - 1) / max(1, len(features) - 1))
    column = {"z": lambda node: node.index, "mlp_out": lambda node: max(heads + 0.3, apart * (len(features) - 1) + 0.8),
              "feature": lambda node: apart * features.index(node)}  # fmt: skip
    middle = max(heads - 1, apart * (len(features) - 1)) / 2
    return {node: (column.get(node.kind, lambda node: middle)(node), levels.index(_level(node, circuit)))
            for node in nodes}  # fmt: skip


def label(one: Component) -> str:
    """What is written on a part: 2.1 is head 1 of layer 2, F2 its FFN; a feature has its number."""
    return {"z": f"{one.layer}.{one.index}", "mlp_out": f"F{one.layer}",
            "feature": "err" if one.index == "error" else f"{one.index}"}.get(one.kind, one.kind)  # fmt: skip


def meaning(circuit) -> str:
    """What the hexagons are, in a sentence; "" where nothing is taken apart."""
    found = " and ".join(f"SAE {name!r} at {at}" for name, at in circuit.saes.items())
    left = any(node.index == "error" for node in circuit.nodes)
    return f"Hexagons: features of the {found}, by number{'; err is what they leave over' * left}." if found else ""


def _level(node, circuit) -> float:
    if node.kind == "feature":
        at = Component.parse(circuit.saes[node.name])
        return 2 * at.layer + (1.5 if at.kind == "resid_post" else -0.5)
    return {"embed": -1, "logits": 2 * circuit.sizes[0]}.get(
        node.kind, 2 * (node.layer or 0) + (node.kind == "mlp_out")
    )


def draw(circuit, *, edges: int = 120, labels: bool = True, title: str | None = None, ax=None):
    """A circuit as a layered graph.

    Args:
        edges: draw at most so many, the strongest.
        labels: write names on the parts. title: None for the circuit's own line.
    Returns:
        A matplotlib figure.
    """
    from matplotlib.patches import FancyArrowPatch

    shown = circuit.top(min(edges, len(circuit)), prune=False)
    where = places(shown)
    xs, ys = ([place[i] for place in where.values()] or [0] for i in (0, 1))
    features = [node for node in where if node.kind == "feature"]
    if ax is None:
        widest = max(14, min(24, 0.5 * len(features)))
        ax = _axes((min(widest, 3.5 + 0.7 * (max(xs) - min(xs))), min(11, 1.6 + 0.55 * max(ys))))
    hexagons = {node: _hexagon(ax, *where[node], 4.3 * max(map(len, map(label, features))) + 9 if labels else 8,
                               13 if labels else 7, node.index == "error") for node in features}  # fmt: skip
    for y in {where[node][1] for node in features}:
        ax.axhspan(y - 0.4, y + 0.4, color=BAND, lw=0, zorder=0)
    largest = np.abs(shown.scores).max() if len(shown) else 1
    for i in np.argsort(np.abs(shown.scores)):
        edge, score = shown.edges[i], shown.scores[i]
        for reader in shown.readers(edge.target):
            strength = (abs(score) / (largest or 1)) ** 0.5
            (x0, y0), (x1, y1) = where[edge.source], where[reader]
            bend, ends = 0.0 if y1 - y0 <= 1 else 0.12 * (1 if x0 >= x1 else -1), (edge.source, reader)
            patches, shrink = [hexagons.get(one) for one in ends], [2 if one in hexagons else None for one in ends]
            ax.add_patch(FancyArrowPatch(
                (x0, y0), (x1, y1), arrowstyle="-|>", mutation_scale=5 + 5 * strength, shrinkA=shrink[0] or 7,
                shrinkB=shrink[1] or 8, patchA=patches[0], patchB=patches[1],
                connectionstyle=f"arc3,rad={bend}", color=BLUE if score >= 0 else RED, lw=0.4 + 2.6 * strength,
                alpha=0.2 + 0.75 * strength, linestyle=STYLES.get(edge.target.kind, "solid"), zorder=1))  # fmt: skip
    for node, (x, y) in where.items():
        if node not in hexagons:
            marker = {"z": "o", "mlp_out": "s"}.get(node.kind, "D")
            ax.plot(x, y, marker, ms=13 if labels else 7, mfc="white", mec=INK, mew=0.8, zorder=2)
        if labels:
            text = node.kind[0].upper() if node.kind in ("embed", "logits") else label(node)
            ax.annotate(text, (x, y), ha="center", va="center", fontsize=6.5, color=INK, zorder=3)
    ax.set_xlim(min(xs) - 0.8, max(xs) + 0.8)
    ax.set_ylim(min(ys) - 0.6, max(ys) + 0.6)
    ax.set_axis_off()
    wide = int(13 * ax.figure.get_figwidth())
    left = f", the strongest {len(shown)} drawn" if len(shown) < len(circuit) else ""
    line = (
        f"{circuit.method}{': ' + circuit.task if circuit.task else ''}, {len(circuit)} of {circuit.whole} edges{left}"
    )
    ax.set_title("\n".join(textwrap.wrap(line if title is None else title, wide)), fontsize=9, loc="left", color=INK)
    note = ("E embedding, 2.1 head 1 of layer 2, F2 its FFN, L logits. Into heads: values solid, queries dashed, keys dotted. "
            f"Blue helps, red hurts; width by the root of the score. {meaning(shown)}".strip())  # fmt: skip
    ax.figure.supxlabel("\n".join(textwrap.wrap(note, int(1.2 * wide))), x=0.01, ha="left", fontsize=7, color=FAINT)
    return ax.figure


def _hexagon(ax, x: float, y: float, width: float, height: float, dashed: bool):
    """A hexagon around this place, its size in points, so that a number fits whatever the axes' scale."""
    from matplotlib.patches import Polygon
    from matplotlib.transforms import Affine2D, ScaledTranslation

    w, h, tip = width / 2, height / 2, height / 3.5
    corners = [(-w, 0), (tip - w, h), (w - tip, h), (w, 0), (w - tip, -h), (tip - w, -h)]
    place = Affine2D().scale(1 / 72) + ax.figure.dpi_scale_trans + ScaledTranslation(x, y, ax.transData)
    return ax.add_patch(Polygon(corners, fc="white", ec=INK, lw=0.8, ls=(0, (3, 1.5)) if dashed else "-", transform=place,
                                zorder=2))  # fmt: skip


def curve(result, *, ax=None):
    """Faithfulness by size, on a logarithmic axis."""
    ax = _axes((6, 3.4)) if ax is None else ax
    ax.axhline(1, color=FAINT, lw=0.8, ls=":")
    for drawn in result.random:
        ax.plot(100 * result.sizes, drawn, color=GREY, lw=1)
    ax.plot([], [], color=GREY, lw=1, label=f"random: CPR {result.random_cpr.mean():.2f}, CMD {result.random_cmd.mean():.2f}"
            if len(result.random) else "no random ranking")  # fmt: skip
    ax.plot(100 * result.sizes, result.by_sign, "o-", color=MARK, ms=4, label=f"largest scores: CPR {result.cpr:.2f}")
    ax.plot(
        100 * result.sizes, result.by_size, "s--", color=BLUE, ms=4, label=f"largest |scores|: CMD {result.cmd:.2f}"
    )
    ax.set_xscale("log")
    ax.set_xticks(100 * result.sizes[result.sizes > 0], [f"{100 * x:g}" for x in result.sizes if x > 0], minor=False)
    ax.minorticks_off()
    ax.set_xlabel("edges kept (% of all)")
    ax.set_ylabel("faithfulness")
    ax.set_title(f"{result.method}: {result.task}, {result.n} prompts", fontsize=9, color=INK)
    ax.legend(fontsize=7, frameon=False)
    return ax.figure


def dots(result, *, ax=None):
    """For each prompt, the metric in the circuit beside the metric in the whole model."""
    ax = _axes((4.2, 3.8)) if ax is None else ax
    ends = [min(result.clean.min(), result.kept.min()), max(result.clean.max(), result.kept.max())]
    ax.plot(ends, ends, color=FAINT, lw=0.8, ls=":")
    ax.plot(result.clean, result.kept, "o", color=BLUE, ms=4, alpha=0.6)
    ax.axhline(result.corrupted.mean(), color=GREY, lw=0.8)
    ax.annotate("nothing kept", (ends[0], result.corrupted.mean()), fontsize=7, color=FAINT, va="bottom")
    ax.set_xlabel(f"{result.metric}, whole model")
    ax.set_ylabel(f"{result.metric}, circuit")
    line = f"faithfulness {result.value:.2f} with {result.edges} of {result.whole} {result.unit}"
    ax.set_title(line, fontsize=9, color=INK)
    return ax.figure


def _axes(size: tuple[float, float]):
    """Axes of a new Figure, which a notebook shows as a picture when it is the last line of a cell."""
    from matplotlib.figure import Figure

    return picture(Figure(figsize=size, dpi=110, layout="constrained")).subplots()
