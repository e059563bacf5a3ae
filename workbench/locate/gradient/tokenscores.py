"""Scores of token positions that also keep every prompt's own tokens: a table over prompts, and coloured text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from workbench import storage
from workbench.plot import picture
from workbench.scores import Scores


@dataclass(frozen=True, eq=False, repr=False)
class TokenScores(Scores):
    """Which tokens matter, on average over prompts (as `Scores`) and in each of them?

    Attributes:
        tokens: for each prompt, its tokens as text. by_token: for each prompt, [position], in units of the metric.
        gaps: [prompt], the completeness gap of integrated gradients as a share of m(prompt) - m(baseline); else NaN.
    """

    tokens: list = field(default_factory=list)
    by_token: list = field(default_factory=list)
    gaps: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __repr__(self) -> str:
        gap = (
            f", completeness gap {np.median(self.gaps):.1%}" if np.isfinite(self.gaps).all() and len(self.gaps) else ""
        )
        best = self.top(1)[0]
        return f"TokenScores({self.method}, {len(self.components)} positions, n={self.n}{gap}, top {best} {self[best]:+.2f})"

    @property
    def token_frame(self):
        """A pandas table of every token of every prompt: prompt, position, token, value."""
        import pandas as pd

        rows = [(i, j, token, value) for i, (tokens, values) in enumerate(zip(self.tokens, self.by_token))
                for j, (token, value) in enumerate(zip(tokens, values))]  # fmt: skip
        return pd.DataFrame(rows, columns=["prompt", "position", "token", "value"])

    def strip(self, prompts=3):
        """Prompts as text, each token on its colour (blue for the answer, red against it). Returns the Figure.

        Args:
            prompts: how many, from the first on, or a list of their numbers.
        """
        from matplotlib import colormaps
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure

        chosen = list(range(min(prompts, self.n))) if isinstance(prompts, int) else list(prompts)
        lines = [line for i in chosen for line in _lines(self.tokens[i], self.by_token[i])]
        limit = max(float(np.abs(self.by_token[i]).max()) for i in chosen) or 1.0
        figure = Figure(figsize=(8.5, 0.34 * len(lines) + 0.7), dpi=110, layout="constrained")
        ax = figure.add_subplot()
        ax.set_xlim(0, WIDTH)
        ax.set_ylim(len(lines) - 0.3, -0.7)
        ax.axis("off")
        colour = colormaps["RdBu"]
        for y, (line, first) in enumerate(lines):
            x = 0.0 if first else 2.0
            for token, value in line:
                shade = colour(Normalize(-limit, limit)(value))
                dark = abs(value) > 0.6 * limit
                ax.text(x + 0.3, y, token, fontsize=9, family="monospace", va="center", parse_math=False,
                        color="white" if dark else "#222831",
                        bbox={"facecolor": shade, "edgecolor": "none", "boxstyle": "square,pad=0.25"})  # fmt: skip
                x += len(token) + 1.3
        ax.set_title(
            f"{self.method}: strongest {limit:.2g} ({self.metric})", fontsize=8.5, loc="left", parse_math=False
        )
        return picture(figure)

    def files(self) -> dict:
        """As of `Scores`, and `tokens.json` beside it."""
        plain = {"tokens": self.tokens, "by_token": [[float(x) for x in one] for one in self.by_token],
                 "gaps": [None if x != x else float(x) for x in self.gaps]}  # fmt: skip
        return super().files() | {"tokens.json": plain}

    @classmethod
    def load(cls, folder) -> TokenScores:
        """Read them back."""
        scores = super().load(folder)
        plain = storage.read(cls, folder, "tokens.json")
        gaps = np.array([np.nan if x is None else x for x in plain["gaps"]])
        return replace(scores, tokens=plain["tokens"], by_token=[np.array(one) for one in plain["by_token"]], gaps=gaps)


WIDTH = 96  # characters in a line


def _lines(tokens, values) -> list:
    """[(tokens with values, whether it is the first line of its prompt)]"""
    lines, length = [[]], 0.0
    for token, value in zip(tokens, values):
        if length + len(token) + 1.3 > WIDTH - 2:
            lines.append([])
            length = 2.0
        lines[-1].append((token, value))
        length += len(token) + 1.3
    return [(line, i == 0) for i, line in enumerate(lines)]
