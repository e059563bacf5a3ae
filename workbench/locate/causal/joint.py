"""Several components taken out at once, beside the sum of what each alone takes away."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workbench import measure, storage
from workbench.component import Component
from workbench.plot import picture


@dataclass(frozen=True, eq=False, repr=False)
class Joint:
    """What is lost without several components at once?

    Attributes:
        names: of the sets. sets: their components. effects, sums: [set, prompt], the joint effect and the sum of single
            ones, in units of the metric. controls: for each set the mean effects of random sets [draw].
        single: [component, prompt], of `components`, the single effects.
        method, metric, clean, corrupted, task, cost, seconds, seed, why: as in `Scores`. clusters: as of `Task.clusters`.
    """

    names: list[str]
    sets: list[list[Component]]
    effects: np.ndarray
    sums: np.ndarray
    controls: list[np.ndarray]
    single: np.ndarray
    components: list[Component]
    method: str
    metric: str
    clean: float
    corrupted: float
    task: str
    cost: float
    seconds: float
    seed: int
    why: str = ""
    clusters: list | None = None

    @property
    def frame(self):
        """A row per set: joint effect with interval, as a share of clean - corrupted and of clean, sum of singles, null_p95, p, n."""
        import pandas as pd

        used = np.flatnonzero(np.isfinite(self.effects).all(0))  # the rest has nothing to put in: see `why`
        clusters = None if self.clusters is None else [[one[i] for i in used] for one in self.clusters]
        mean, low, high = measure.mean_interval(self.effects[:, used].T, clusters, seed=self.seed)
        rows = []
        for i, name in enumerate(self.names):
            null = np.abs(self.controls[i])
            rows.append({
                "set": name, "components": len(self.sets[i]), "joint": mean[i], "ci_lo": low[i], "ci_hi": high[i],
                "share": mean[i] / (self.clean - self.corrupted), "of_clean": mean[i] / self.clean, "sum_of_single": self.sums[i, used].mean(),
                "null_p95": np.quantile(null, 0.95) if len(null) else np.nan,
                "p": (1 + (null >= abs(mean[i])).sum()) / (1 + len(null)) if len(null) else np.nan,
                "n": len(used),
            })  # fmt: skip
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        first = self.frame.iloc[0]
        return (f"Joint({self.method}, {first.components} components{f' and {len(self.names) - 1} more sets' if len(self.names) > 1 else ''}: "
                f"{first.joint:+.2f} together, {first.sum_of_single:+.2f} summed, null {first.null_p95:.2f}, n={first.n})")  # fmt: skip

    def plot(self):
        """Joint effects beside the sums of single effects, with what random sets reach. Returns the Figure."""
        from matplotlib.figure import Figure

        table = self.frame
        figure = Figure(figsize=(max(4.2, 0.7 * len(table) + 2), 3), dpi=110, layout="constrained")
        ax, x = figure.add_subplot(), np.arange(len(table))
        ax.bar(x - 0.2, table.joint, 0.38, color="#2166ac", label="together")
        ax.bar(x + 0.2, table.sum_of_single, 0.38, color="#9ac3e0", label="sum of one at a time")
        ax.errorbar(x - 0.2, table.joint, [table.joint - table.ci_lo, table.ci_hi - table.joint], fmt="none", ecolor="#222831",
                    capsize=2.5)  # fmt: skip
        ax.hlines(table.null_p95, x - 0.42, x + 0.42, color="#e08a00", label="95 % of random sets stay below")
        ax.axhline(self.clean - self.corrupted, color="#8a919c", linewidth=0.8, linestyle=":")
        ax.axhline(0, color="#8a919c", linewidth=0.8)
        labels = [name if len(name) < 24 else f"{len(some)} components" for name, some in zip(self.names, self.sets)]
        ax.set_xticks(x, labels, fontsize=8, rotation=30 if len(x) > 3 else 0, ha="right" if len(x) > 3 else "center")
        ax.set_ylabel(f"{self.metric} lost", fontsize=8.5)
        ax.set_title(f"{self.method} ({self.task}, {table.n[0]} prompts; dotted: clean minus corrupted)", loc="left",
                     fontsize=8.5)  # fmt: skip
        ax.legend(fontsize=7, frameon=False)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        return picture(figure)

    def save(self, folder) -> Path:
        """Write `joint.json`, `joint.csv` (the table) and `joint.safetensors`: all of it, or nothing."""
        plain = {name: getattr(self, name) for name in PLAIN}
        plain |= {
            "sets": [[str(one) for one in some] for some in self.sets],
            "components": list(map(str, self.components)),
        }
        arrays = {name: getattr(self, name) for name in ARRAYS} | {
            f"controls.{i}": c for i, c in enumerate(self.controls)
        }
        arrays = {name: np.asarray(array, dtype=np.float64) for name, array in arrays.items()}
        return storage.write(folder, {"joint.safetensors": arrays, "joint.csv": self.frame, "joint.json": plain})

    @classmethod
    def load(cls, folder) -> Joint:
        """Read it back.

        Raises:
            FileNotFoundError: when `folder` holds none.
        """
        plain = storage.read(cls, folder, "joint.json")
        arrays = storage.read_arrays(Path(folder) / "joint.safetensors")
        plain["sets"] = [[Component.parse(one) for one in some] for some in plain["sets"]]
        plain["components"] = [Component.parse(one) for one in plain["components"]]
        controls = [arrays.pop(f"controls.{i}") for i in range(len(plain["names"]))]
        return cls(**plain, **arrays, controls=controls)


ARRAYS = ("effects", "sums", "single")
PLAIN = ("names", "method", "metric", "clean", "corrupted", "task", "cost", "seconds", "seed", "why", "clusters")
