"""What the views draw in matplotlib: the still of a panel that survives reopening, and the metric against strength."""

from __future__ import annotations

import itertools
import textwrap

import numpy as np

from workbench.plot import BLUE, FAINT, GREY, INK, MARK

LIGHT = {"ink": INK, "quiet": "#5f6774", "line": BLUE, "grid": "#e3e6ea"}
DARK = {"ink": "#e6e8eb", "quiet": "#a4abb6", "line": "#5fadea", "grid": "#343a43"}


def curve(points: dict, now: float | None, colours: dict = LIGHT, ax=None):
    """How does the metric change with strength? Mean and interval; returns the Figure.

    Args:
        points: x, mean, low, high: [strength]; title, xlabel, ylabel; guards: name -> accuracy [strength], on an axis of
            its own, from 0 to 1.
        now: the present strength, marked.
    """
    from matplotlib.figure import Figure

    if ax is None:
        figure = Figure(figsize=(4.6, 2.7), dpi=110, layout="constrained")
        figure.patch.set_alpha(0)
        ax = figure.add_subplot()
        ax.patch.set_alpha(0)
    x, mean, low, high = (np.asarray(points[name]) for name in ("x", "mean", "low", "high"))
    ax.axhline(np.interp(0, x, mean), color=colours["quiet"], linewidth=0.9, linestyle=(0, (4, 3)))
    ax.fill_between(x, low, high, color=colours["line"], alpha=0.18, linewidth=0)
    ax.plot(x, mean, color=colours["line"], linewidth=2, marker="o", markersize=3.5)
    if now is not None and x[0] <= now <= x[-1]:
        ax.plot(now, np.interp(now, x, mean), "o", markersize=9, markerfacecolor="none", markeredgewidth=2.2,
                color=MARK)  # fmt: skip
    ax.set_title(points["title"], fontsize=9.5, loc="left", color=colours["ink"], parse_math=False)
    ax.set_xlabel(points["xlabel"], fontsize=9, color=colours["quiet"])
    ax.set_ylabel(points["ylabel"], fontsize=9, color=colours["quiet"])
    ax.tick_params(labelsize=8.5, length=0, colors=colours["ink"])
    ax.grid(axis="y", color=colours["grid"], linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ax.spines.values():
        side.set_visible(False)
    if points.get("guards"):
        other = ax.twinx()
        for (name, kept), dash in zip(points["guards"].items(), itertools.cycle(["--", ":", "-."])):
            other.plot(x, kept, dash, color=colours["quiet"], linewidth=1.3, label=name)
        other.set_ylim(-0.03, 1.03)
        other.set_ylabel("accuracy of the guards", fontsize=8.5, color=colours["quiet"])
        other.tick_params(labelsize=8, length=0, colors=colours["quiet"])
        other.legend(fontsize=8, frameon=False, labelcolor=colours["quiet"], loc="center left")
        for side in other.spines.values():
            side.set_visible(False)
    return ax.figure


def still(title: str, lines: list[tuple[str, str]], bars: list[dict], points: dict | None, now: float | None):
    """A panel as one figure: its texts above, its next tokens (and its curve) below."""
    from matplotlib.figure import Figure

    wrapped = [(name, textwrap.wrap(text, 120) or ["(nothing)"]) for name, text in lines]
    rows = 1 + sum(len(text) for _, text in wrapped)
    above, below = 0.24 * rows + 0.1, 0.3 * len(bars) + 0.75
    figure = Figure(figsize=(8, above + below), dpi=110)
    y = 1 - 0.2 / (above + below)
    figure.text(0.02, y, title, fontsize=9.5, color=INK, weight="bold", va="center", parse_math=False)
    for name, text in wrapped:
        for i, part in enumerate(text):
            y -= 0.24 / (above + below)
            figure.text(0.02, y, "" if i else name, fontsize=8.5, color="#5f6774", va="center")
            figure.text(0.1, y, part, fontsize=8.5, color=INK, va="center", parse_math=False)
    if not bars:
        return figure
    bottom, height = 0.5 / (above + below), (below - 0.75) / (above + below)
    ax = figure.add_axes((0.16, bottom, 0.3, height))
    place = np.arange(len(bars))[::-1]
    for side, colour, shift in (("before", GREY, 0.19), ("after", BLUE, -0.19)):
        name = {"before": "without", "after": "with"}[side]
        ax.barh(place + shift, [one[side] for one in bars], 0.34, color=colour, label=name)
    ax.set_yticks(place, [one["token"] for one in bars], fontsize=8.5, parse_math=False)
    ax.set_xlabel("probability of the next token", fontsize=8.5, color="#5f6774")
    ax.legend(fontsize=8, frameon=False, loc="best")
    ax.tick_params(labelsize=8.5, length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    if points:
        curve(points, now, ax=figure.add_axes((0.6, bottom, 0.37, height * 0.94)))
    return figure
