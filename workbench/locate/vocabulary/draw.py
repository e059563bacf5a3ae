"""Pictures of what vectors say, in matplotlib. Layers run upwards, as the stream does."""

from __future__ import annotations

import numpy as np

from workbench.plot import BLUE, FAINT, INK, RED, picture

NAMES = {"says_prob": "probability of the token shown", "prob": "probability of the answer", "entropy": "entropy (nats)",
         "kl": "KL to the final prediction (nats)"}  # fmt: skip
WIDEST = 24


def cells(words, shade, rows, columns, title: str, unit: str, limit: float | None = None):
    """A grid of words, shaded from 0 upwards; row 0 at the bottom. Returns the Figure.

    Args:
        words: text [row][column]; shade: numbers [row, column]; limit: the darkest, by default the largest number.
    """
    from matplotlib.figure import Figure

    limit = limit or float(np.nanmax(shade)) or 1.0
    size = (min(14, max(4.6, 0.72 * len(columns) + 2.2)), max(2.2, 0.3 * len(rows) + 1.3))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    ax = figure.add_subplot()
    image = ax.imshow(shade, cmap="Blues", vmin=0, vmax=limit, origin="lower", aspect="auto")
    for y, line in enumerate(words):
        for x, word in enumerate(line):
            ax.text(x, y, word[:10], ha="center", va="center", fontsize=6.5, parse_math=False,
                    color="white" if shade[y, x] > 0.6 * limit else INK)  # fmt: skip
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=7.5, parse_math=False)
    ax.set_yticks(range(len(rows)), rows, fontsize=7.5)
    ax.set_title(title, fontsize=8.5, loc="left", color=INK, parse_math=False)
    colours = figure.colorbar(image, ax=ax, pad=0.01)
    colours.set_label(unit, fontsize=7.5)
    colours.ax.tick_params(labelsize=7, length=0)
    ax.tick_params(length=0)
    for side in [*ax.spines.values(), *colours.ax.spines.values()]:
        side.set_visible(False)
    return picture(figure)


def lens(value, prompt: int, colour: str):
    """One prompt of a `Lens`. Returns the Figure."""
    if colour not in NAMES:
        raise ValueError(f"value={colour!r} is unknown; choose {', '.join(NAMES)}.")
    tokens = value.tokens[prompt][-WIDEST:]
    part = slice(-len(tokens), None)
    numbers = value.top_prob[..., 0] if colour == "says_prob" else getattr(value, colour)
    words = [[value.words[int(i)] for i in line] for line in value.top[:, prompt, part, 0]]
    title = f"{value.name}: what each stream would say next (answer {value.answers[prompt]!r})"
    return cells(words, numbers[:, prompt, part], [str(one) for one in value.components], tokens, title, NAMES[colour],
                 1.0 if "prob" in colour else None)  # fmt: skip


def curves(lines: dict, labels: list[str], title: str, unit: str, log: bool = False):
    """Named lines over components. Returns the Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.8, 3.2), dpi=110, layout="constrained")
    ax = figure.add_subplot()
    for (name, values), colour, mark in zip(lines.items(), (FAINT, BLUE, INK), "sox"):
        ax.plot(values, marker=mark, markersize=4, color=colour, label=name)
    ax.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=7.5)
    if log:
        ax.set_yscale("log")
    ax.set_ylabel(unit, fontsize=8)
    ax.set_title(title, fontsize=8.5, loc="left", color=INK, parse_math=False)
    ax.legend(fontsize=7.5, frameon=False)
    ax.tick_params(labelsize=7.5, length=2)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return picture(figure)


def eigenvalues(value):
    """The eigenvalues of a `HeadVocabulary` in the complex plane. Returns the Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 3.4), dpi=110, layout="constrained")
    ax = figure.add_subplot()
    found = value.eigenvalues
    limit = 1.1 * float(np.abs(found).max() or 1)
    ax.axhline(0, color=FAINT, linewidth=0.6)
    ax.axvline(0, color=FAINT, linewidth=0.6)
    ax.scatter(found.real, found.imag, s=14, color=[BLUE if one > 0 else RED for one in found.real])
    ax.set_xlim(-limit, limit)
    ax.set_ylim(-limit, limit)
    ax.set_title(
        f"{value.circuit} of {value.head}: score {value.score:+.2f}, null {value.null_p95:.2f}",
        fontsize=8.5,
        loc="left",
    )
    ax.set_xlabel("real part: right, a token leads to itself", fontsize=8)
    ax.set_ylabel("imaginary part", fontsize=8)
    ax.tick_params(labelsize=7)
    return picture(figure)
