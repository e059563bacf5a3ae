"""What a locator returns: one table of components with score, interval, null and cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from workbench import storage
from workbench.component import Component


@dataclass(frozen=True, eq=False)
class Scores:
    """Which components matter, and by how much?

    Attributes:
        components: in forward order. values, ci_lo, ci_hi, null_p95: [component]. Intervals (95 %) resample the entities and
            the templates of a task's rows (`Task.clusters`), where rows name them, else prompts.
        per_prompt: [component, prompt], what the scores are made of (raw effects in units of the metric).
        method, direction, metric: how they were made, for example "causal.patch", "denoising", "logit_diff".
        clean, corrupted: the metric's mean on either prompt, the baselines of every patch.
        null: one line on what `null_p95` is.
        labels: position -> token text, where the prompts agree on it.
        cost: forward-pass equivalents (one batch of all prompts is one); seconds; seed.
        why: for a score without interval or null, the reason.
        columns: further columns of the table [component]: other nulls (`null_untrained`), other figures (`auroc`).
    """

    components: list[Component]
    values: np.ndarray
    ci_lo: np.ndarray
    ci_hi: np.ndarray
    null_p95: np.ndarray
    per_prompt: np.ndarray
    method: str
    metric: str
    clean: float = float("nan")
    corrupted: float = float("nan")
    direction: str = ""
    null: str = ""
    labels: dict = field(default_factory=dict)
    task: str = ""
    cost: float = float("nan")
    seconds: float = float("nan")
    seed: int = 0
    why: str = ""
    columns: dict = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of component, or "mixed"."""
        kinds = {one.kind for one in self.components}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def n(self) -> int:
        """Number of prompts that the scores are means of (those that are NaN throughout are not)."""
        return int((~np.isnan(self.per_prompt).all(0)).sum()) if len(self.per_prompt) else self.per_prompt.shape[1]

    @property
    def frame(self):
        """A pandas table, strongest first."""
        import pandas as pd

        table = pd.DataFrame({
            "component": [str(one) for one in self.components],
            "layer": [one.layer for one in self.components],
            "index": [one.index for one in self.components],
            "position": [one.position for one in self.components],
            "score": self.values, "ci_lo": self.ci_lo, "ci_hi": self.ci_hi, "null_p95": self.null_p95,
        })  # fmt: skip
        for name, column in self.columns.items():
            table[name] = np.asarray(column)
        table["n"] = self.n
        return table.iloc[np.argsort(-np.abs(self.values), kind="stable")].reset_index(drop=True)

    def top(self, k: int = 3) -> list[Component]:
        """The k components with the largest |score|, strongest first."""
        order = np.argsort(-np.abs(self.values), kind="stable")[:k]
        return [self.components[i] for i in order]

    def above_null(self) -> list[Component]:
        """The components whose |score| exceeds what the null reaches, strongest first."""
        clear = {one for i, one in enumerate(self.components) if abs(self.values[i]) > self.null_p95[i]}
        return [one for one in self.top(len(self.components)) if one in clear]

    def __getitem__(self, component) -> float:
        return float(self.values[self._index(component)])

    def _index(self, component) -> int:
        one = Component.parse(component)
        if one not in self.components:
            raise KeyError(f"{one} was not scored. Scored were {self.components[0]} to {self.components[-1]}.")
        return self.components.index(one)

    @property
    def title(self) -> str:
        """What was done, with the baselines, in one line."""
        how = f", {self.direction}" if self.direction else ""
        prompts = "1 prompt" if self.n == 1 else f"{self.n} prompts" if self.per_prompt.shape[1] else ""
        means = {"clean": self.clean, "corrupted": self.corrupted}
        sides = ", ".join(f"{mean:+.2f} {side}" for side, mean in means.items() if np.isfinite(mean))
        on = ", ".join(filter(None, [self.task, prompts]))
        return f"{self.method}{how}: {self.metric}{' ' * bool(sides)}{sides}{f' ({on})' if on else ''}"

    def __repr__(self) -> str:
        best = self.top(1)[0]
        how = f" {self.direction}" if self.direction else ""
        return (f"Scores({self.method}{how}, {len(self.components)} components of kind {self.kind}, "
                f"n={self.n}, top {best} {self[best]:+.2f})")  # fmt: skip

    def plot(self, **kwargs):
        """The scores as a matplotlib figure: layers by heads or by positions, layer 0 at the bottom."""
        from workbench.plot import grid

        return grid(self, **kwargs)

    def save(self, folder) -> Path:
        """Write `scores.json`, `scores.csv` (the table, for people) and `scores.safetensors`: all of it, or nothing."""
        return storage.write(folder, self.files())

    def files(self) -> dict:
        """What `save` writes, by file name."""
        plain = {name: getattr(self, name) for name in PLAIN}
        plain["components"] = [str(one) for one in self.components]
        plain["labels"] = [[k, v] for k, v in self.labels.items()]
        arrays = {name: getattr(self, name) for name in ARRAYS}
        numbers = {name: np.asarray(column) for name, column in self.columns.items()}
        plain["columns"] = {
            name: column.tolist() for name, column in numbers.items() if column.dtype.kind not in "fiub"
        }
        arrays |= {f"column.{name}": column for name, column in numbers.items() if name not in plain["columns"]}
        arrays = {name: np.asarray(array, dtype=np.float64) for name, array in arrays.items()}
        return {"scores.safetensors": arrays, "scores.csv": self.frame, "scores.json": plain}

    @classmethod
    def load(cls, folder) -> Scores:
        """Read scores back.

        Raises:
            FileNotFoundError: when `folder` holds none.
            ValueError: for scores of a newer version.
        """
        plain = storage.read(Scores, folder, "scores.json")
        plain["components"] = [Component.parse(one) for one in plain["components"]]
        plain["labels"] = dict(plain["labels"])
        arrays = storage.read_arrays(Path(folder) / "scores.safetensors")
        columns = {
            name.removeprefix("column."): arrays.pop(name) for name in list(arrays) if name.startswith("column.")
        }
        columns |= plain.get("columns", {})
        plain["columns"] = {name: columns[name] for name in plain.pop("order", columns)}
        return cls(**plain, **arrays)


ARRAYS = ("values", "ci_lo", "ci_hi", "null_p95", "per_prompt")
PLAIN = ("method", "metric", "clean", "corrupted", "direction", "null", "task", "cost", "seconds", "seed", "why")
