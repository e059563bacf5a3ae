"""Pictures of the values, in matplotlib. Layers run upwards, as the stream does; blue is positive, red negative."""

from __future__ import annotations

import numpy as np

INK, FAINT, BLUE, RED, GREY = "#222831", "#8a919c", "#2166ac", "#b2182b", "#9aa3ad"


def layout(scores) -> tuple[np.ndarray, list, list, list[str]]:
    """Scores as a grid: (values [row, column], layers, columns, column labels); NaN where nothing was scored.

    Columns are heads for kinds with an index, else positions.
    """
    headed = any(one.index is not None for one in scores.components)
    of = (lambda one: one.index) if headed else (lambda one: one.position)
    layers = sorted({one.layer for one in scores.components})
    columns = list(dict.fromkeys(of(one) for one in scores.components))
    if all(isinstance(c, int) for c in columns):
        columns.sort()
    values = np.full((len(layers), len(columns)), np.nan)
    for one, value in zip(scores.components, scores.values, strict=True):
        values[layers.index(one.layer), columns.index(of(one))] = value
    if headed:
        return values, layers, columns, [str(c) for c in columns]
    labels = [f"{scores.labels[c]} {c}" if c in scores.labels else "all" if c is None else str(c) for c in columns]
    return values, layers, columns, labels


def grid(scores, ax=None):
    """Scores as a heat map; cells within their null are marked with a dot. Returns the Figure."""
    from matplotlib.figure import Figure

    values, layers, columns, labels = layout(scores)
    if ax is None:
        figure = Figure(figsize=(max(3.6, 0.55 * len(columns) + 2.2), max(2.4, 0.42 * len(layers) + 1.5)), dpi=110,
                        layout="constrained")  # fmt: skip
        ax = figure.add_subplot()
    limit = np.nanmax(np.abs(values)) or 1.0
    image = ax.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    headed = scores.components[0].index is not None
    for one, value, null in zip(scores.components, scores.values, scores.null_p95, strict=True):
        x, y = columns.index(one.index if headed else one.position), layers.index(one.layer)
        if abs(value) <= null:
            ax.plot(x, y, ".", color=FAINT, markersize=3)
        elif len(columns) <= 20 and abs(value) > 0.1 * limit:
            ink = "white" if abs(value) > 0.6 * limit else INK
            ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    upright = headed or max(map(len, labels)) <= 3
    ax.set_xticks(
        range(len(columns)), labels, rotation=0 if upright else 60, ha="center" if upright else "right", fontsize=8
    )
    ax.set_yticks(range(len(layers)), layers, fontsize=8)
    ax.set_ylabel("layer")
    ax.set_xlabel("head" if headed else "position")
    ax.set_title(f"{scores.kind}   ({scores.title})", fontsize=8.5, loc="left", color=INK)
    colours = ax.figure.colorbar(image, ax=ax, pad=0.02)
    colours.set_label(f"{scores.direction or 'score'}, 1 = all of {scores.metric}", fontsize=8)
    colours.ax.tick_params(labelsize=7)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    return ax.figure


def forest(report):
    """Every task of a report: the change in accuracy with its interval, recipe above controls. Returns the Figure."""
    from matplotlib.figure import Figure

    table = report.frame[report.frame.metric == "accuracy"]
    groups = list(table.groupby(["role", "task", "split"], sort=False))
    arms = list(dict.fromkeys(table.arm))
    figure = Figure(figsize=(7.2, 0.9 + 0.22 * len(groups) * (len(arms) + 0.8)), dpi=110, layout="constrained")
    ax = figure.add_subplot()
    y, ticks, names = 0.0, [], []
    for (role, task, split), part in groups:
        ticks.append(y - (len(part) - 1) / 2)
        names.append(f"{task}\n{role}, {split}, n={int(part.n.iloc[0])}")
        for _, row in part.iterrows():
            own = row.arm == "recipe"
            colour = (BLUE if role == "target" else INK) if own else GREY
            spread = np.array([[row.change - row.ci_lo], [row.ci_hi - row.change]])
            ax.errorbar(row.change, y, xerr=np.nan_to_num(spread), fmt="o" if own else "|", color=colour,
                        markersize=5 if own else 7, capsize=2.5, linewidth=1.4)  # fmt: skip
            y -= 1
        y -= 0.8
    for i, arm in enumerate(arms):
        ax.plot([], [], "o" if i == 0 else "|", color=BLUE if i == 0 else GREY, label=arm)
    ax.axvline(0, color=FAINT, linewidth=0.8)
    ax.set_yticks(ticks, names, fontsize=8)
    ax.set_xlabel("change in accuracy (after minus before), 95 % interval", fontsize=8)
    ax.set_title(report.name, loc="left", fontsize=9, color=INK)
    ax.legend(fontsize=7, frameon=False, loc="best")
    ax.tick_params(labelsize=8, length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    return figure
