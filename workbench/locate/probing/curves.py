"""Pictures: accuracy by layer with every null beside it, erasures, interchange accuracy."""

from __future__ import annotations

import textwrap

import numpy as np

from workbench.plot import BLUE, FAINT, GREY, INK, MARK, RED, picture
from workbench.scores import Scores

# column: (label, colour, dashes, marker), in the order of the legend; told apart by dash and marker too
LINES = {
    "ood": ("held out: new forms (ood)", BLUE, (4, 2), "s"),
    "untrained": ("untrained model", MARK, (1, 1), "^"),
    "tokens": ("tokens alone", RED, (5, 1, 1, 1), None),
    "control": ("control task (random label per word type)", GREY, (2, 2), "x"),
    "majority": ("majority class", FAINT, (1, 3), None),
}  # fmt: skip


def curves(scores: Scores, columns=tuple(LINES)):
    """How does what a probe reads grow from layer to layer, and what would it read anyway? The Figure.

    One panel per position (and head). The band is the interval over entities; the grey area is what shuffled labels reach
    in 95 of 100 draws.

    Args:
        scores: of `probe`, over several layers.
        columns: which baselines to draw: ood, untrained, tokens, control, majority.
    Raises:
        ValueError: for scores that are no accuracies of probes, an unknown column, or more than 12 panels.
    """
    from matplotlib.figure import Figure

    if not scores.method.startswith("probing.") or scores.metric != "accuracy":
        raise ValueError(f"curves draws the scores of probing.probe; these are {scores.method}. Use scores.plot().")
    unknown = [name for name in columns if name not in LINES]
    if unknown:
        raise ValueError(f"columns: {unknown[0]!r} is unknown; choose from {', '.join(LINES)}.")
    panels = list(dict.fromkeys((one.kind, one.index, one.position) for one in scores.components))
    if len(panels) > 12:
        raise ValueError(
            f"{len(panels)} panels are too many to read; scores.plot() draws heads and positions as a grid."
        )
    wide = min(len(panels), 3)
    high = -(-len(panels) // wide)
    size = (6.4 if wide == 1 else 3.3 * wide + 1, 3.4 * high + 0.6)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(high, wide, sharey=True, squeeze=False).flat
    for ax, panel in zip(axes, panels):
        mine = [i for i, one in enumerate(scores.components) if (one.kind, one.index, one.position) == panel]
        _panel(ax, scores, mine, columns)
        where = str(scores.components[mine[0]].at(None)).replace(f".{scores.components[mine[0]].layer}", "", 1)
        token = scores.labels.get(panel[2])
        ax.set_title(f"{where}{'' if panel[2] is None else f' @{panel[2]}'}{f' ({token})' if token not in (None, '·') else ''}", fontsize=8.5,
                     loc="left", parse_math=False)  # fmt: skip
    for ax in list(axes):
        ax.set_visible(False)
    handles = {label: handle for handle, label in zip(*figure.axes[0].get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=7.5, frameon=False)
    figure.suptitle("\n".join(textwrap.wrap(scores.title, int(size[0] * 13))), fontsize=9, x=0.01, ha="left", color=INK,
                    parse_math=False)  # fmt: skip
    return picture(figure)


def _panel(ax, scores: Scores, mine: list[int], columns) -> None:
    layers = [scores.components[i].layer for i in mine]
    x = np.arange(len(mine))
    null = scores.null_p95[mine]
    ax.fill_between(x, 0, null, color=GREY, alpha=0.25, linewidth=0, label="shuffled labels reach this (95 %)")
    ax.fill_between(x, scores.ci_lo[mine], scores.ci_hi[mine], color=BLUE, alpha=0.2, linewidth=0)
    ax.plot(
        x,
        scores.values[mine],
        color=BLUE,
        marker="o",
        markersize=4,
        linewidth=1.8,
        label="held out: new entities (test)",
    )
    for name in columns:
        if name in scores.columns:
            label, colour, dashes, marker = LINES[name]
            ax.plot(x, np.asarray(scores.columns[name], float)[mine], color=colour, dashes=dashes, marker=marker, markersize=3.5,
                    linewidth=1.2, label=label)  # fmt: skip
    ax.set_xticks(x, ["" if one is None else str(one) for one in layers], fontsize=8)
    ax.set_xlabel("layer", fontsize=8.5)
    ax.set_ylabel("accuracy", fontsize=8.5)
    ax.set_ylim(0, 1.03)
    _plain(ax)


def bars(erasure):
    """An erasure: what a probe reads and how the behaviour stands, before, after, and after random erasures."""
    from matplotlib.figure import Figure

    table = erasure.frame.set_index("erased")
    shown = {
        "probe": "new probe (ood)",
        "accuracy": f"{erasure.behaviour}, test",
        "accuracy_ood": f"{erasure.behaviour}, ood",
    }
    shown = {name: label for name, label in shown.items() if table[name].notna().any()}
    figure = Figure(figsize=(6.2, 2.9), dpi=110, layout="constrained")
    ax = figure.add_subplot()
    colours = {"nothing": FAINT, "concept": BLUE, "random": MARK}
    for i, name in enumerate(table.index):
        x = np.arange(len(shown)) + (i - (len(table) - 1) / 2) * 0.26
        label = {"nothing": "nothing erased", "concept": f"erased: {' or '.join(erasure.classes[:4])}",
                 "random": f"random, same rank (n = {len(erasure.draws)})"}[name]  # fmt: skip
        values = table.loc[name, list(shown)].to_numpy(float)
        ax.bar(
            x,
            values,
            0.24,
            color=colours[name],
            label=label,
            hatch="//" if name == "random" else None,
            edgecolor="white",
        )
        for at, value in zip(x, values, strict=True):
            ax.text(at, value + 0.015, f"{value:.2f}", ha="center", fontsize=7, color=INK)
    ax.axhline(1 / len(erasure.classes), color=FAINT, linewidth=0.8, linestyle=":")
    ax.set_xticks(np.arange(len(shown)), list(shown.values()), fontsize=8, parse_math=False)
    ax.set_ylim(0, 1.12)
    ax.set_ylabel("accuracy (dotted: guessing)", fontsize=8.5)
    ax.set_title(repr(erasure), fontsize=8, loc="left", color=INK, parse_math=False, wrap=True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7.5, frameon=False)
    _plain(ax)
    return picture(figure)


def interchange(alignment):
    """Interchange accuracy of every site: learned subspace, whole site, difference of means, random subspaces."""
    from matplotlib.figure import Figure

    scores = alignment.scores
    names, x = [str(one) for one in scores.components], np.arange(len(scores.components))
    figure = Figure(figsize=(max(4.6, 0.8 * len(names) + 3), 3.4), dpi=110, layout="constrained")
    ax = figure.add_subplot()
    spread = np.nan_to_num(np.stack([scores.values - scores.ci_lo, scores.ci_hi - scores.values])).clip(min=0)
    ax.errorbar(
        x, scores.values, yerr=spread, fmt="o", color=BLUE, capsize=2.5, label=f"learned, k = {alignment.k} (test)"
    )
    marks = {"ood": ("learned (ood)", BLUE, "s"), "full_site": ("whole site", INK, "_"),
             "difference_of_means": ("difference of means", MARK, "^")}  # fmt: skip
    for name, (label, colour, mark) in marks.items():
        if name in scores.columns:
            ax.plot(x, scores.columns[name], mark, color=colour, markersize=11 if mark == "_" else 5,
                    fillstyle="none", label=label)  # fmt: skip
    ax.bar(x, scores.null_p95, 0.5, color=GREY, alpha=0.35, label="random subspaces reach this (95 %)")
    turned = max(map(len, names)) * len(names) > 60
    ax.set_xticks(
        x, names, fontsize=8, rotation=40 if turned else 0, ha="right" if turned else "center", parse_math=False
    )
    ax.set_xlim(-0.7, len(names) - 0.3)
    ax.set_ylim(-0.03, 1.05)
    ax.set_ylabel("interchange accuracy", fontsize=8.5)
    ax.set_title(
        "\n".join(textwrap.wrap(repr(alignment), int(14 * figure.get_figwidth()))),
        fontsize=8,
        loc="left",
        color=INK,
        parse_math=False,
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize=7.5, frameon=False)
    _plain(ax)
    return picture(figure)


def _plain(ax) -> None:
    ax.tick_params(length=0, labelsize=8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
