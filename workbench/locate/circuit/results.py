"""What an evaluation of circuits gives: one faithfulness, or a curve of sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How much of the behaviour does a circuit keep? (m(circuit) - m(no edge)) / (m(model) - m(no edge)), means over prompts.

    Attributes:
        value, ci_lo, ci_hi: 1 is the whole model, 0 the corrupted run; the interval is a bootstrap, over
            clusters as in `Scores`.
        random: the same for random circuits of as many edges.
        clean, corrupted, kept: the metric for each prompt [prompt]: in the whole model, without any edge, in the circuit.
        edges, whole: how many edges (or nodes, see `unit`) the circuit and the model have.
    """

    value: float
    ci_lo: float
    ci_hi: float
    random: np.ndarray
    clean: np.ndarray
    corrupted: np.ndarray
    kept: np.ndarray
    edges: int
    whole: int
    metric: str
    task: str
    seconds: float
    unit: str = "edges"

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        beside = f", random circuits {self.random.mean():.2f}" if len(self.random) else ""
        return (f"Faithfulness({self.value:.2f} [{self.ci_lo:.2f}, {self.ci_hi:.2f}] with {self.edges} of {self.whole} {self.unit}"
                f"{beside}; {self.task + ', ' if self.task else ''}n={len(self.kept)})")  # fmt: skip

    @property
    def frame(self):
        """One row per prompt, the least faithful first."""
        import pandas as pd

        table = pd.DataFrame({"clean": self.clean, "corrupted": self.corrupted, "circuit": self.kept})
        table["share"] = (self.kept - self.corrupted) / (self.clean - self.corrupted)
        return table.sort_values("share")

    def plot(self, **kwargs):
        """A dot per prompt: what the circuit keeps beside what the whole model does."""
        from workbench.locate.circuit.drawing import dots

        return dots(self, **kwargs)


@dataclass(frozen=True, eq=False)
class Curve:
    """How faithful are the circuits of each size?

    Attributes:
        sizes: shares of all edges that were asked for. edges: [size], how many were left after pruning, by |score|.
        by_sign, by_size: [size], faithfulness of the edges with the largest score, and with the largest |score|.
        random: [draw, size], of random rankings.
        cpr: area under `by_sign` over the sizes; the higher the better, above 1 where edges that hurt are left out.
        cmd: area between `by_size` and 1; the lower the better.
        random_cpr, random_cmd: [draw].
    """

    sizes: np.ndarray
    edges: np.ndarray
    by_sign: np.ndarray
    by_size: np.ndarray
    random: np.ndarray
    method: str
    task: str
    n: int
    seconds: float

    @property
    def cpr(self) -> float:
        return float(np.trapezoid(self.by_sign, self.sizes))

    @property
    def cmd(self) -> float:
        return float(np.trapezoid(np.abs(1 - self.by_size), self.sizes))

    @property
    def random_cpr(self) -> np.ndarray:
        return np.trapezoid(self.random, self.sizes, axis=1)

    @property
    def random_cmd(self) -> np.ndarray:
        return np.trapezoid(np.abs(1 - self.random), self.sizes, axis=1)

    def __repr__(self) -> str:
        beside = f"; random {self.random_cpr.mean():.2f}, {self.random_cmd.mean():.2f}" if len(self.random) else ""
        return f"Curve({self.method}, CPR {self.cpr:.2f}, CMD {self.cmd:.2f}{beside}; {self.task}, n={self.n})"

    @property
    def frame(self):
        """One row per size."""
        import pandas as pd

        table = pd.DataFrame(
            {"size": self.sizes, "edges": self.edges, "by_sign": self.by_sign, "by_size": self.by_size}
        )
        if len(self.random):
            table["random"] = self.random.mean(0)
        return table

    def plot(self, **kwargs):
        """The curve as a matplotlib figure, beside random rankings."""
        from workbench.locate.circuit.drawing import curve

        return curve(self, **kwargs)
