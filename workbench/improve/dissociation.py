"""Tasks by recipes: does each change only what it is for?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from workbench import measure
from workbench.improve import evaluation
from workbench.recipe import Recipe
from workbench.task import Task


@dataclass(frozen=True, eq=False)
class Dissociation:
    """A table of tasks by recipes.

    Attributes:
        frame: recipe, task, before, after, change, ci_lo, ci_hi, n, of `metric` on `split`.
        metric, split: what was measured, on which rows.
    """

    frame: pd.DataFrame
    metric: str
    split: str

    @property
    def table(self) -> pd.DataFrame:
        """Change by recipe (rows) and task (columns)."""
        names = {axis: list(dict.fromkeys(self.frame[axis])) for axis in ("recipe", "task")}
        return self.frame.pivot(index="recipe", columns="task", values="change").loc[names["recipe"], names["task"]]

    @property
    def specificity(self) -> float:
        """Mean |change| where a recipe meets its own task (the diagonal), less that everywhere else; needs as many
        recipes as tasks, in the same order.

        Raises:
            ValueError: when recipes and tasks are not equally many.
        """
        sizes = self.table.abs().to_numpy()
        if sizes.shape[0] != sizes.shape[1] or len(sizes) < 2:
            raise ValueError(f"Specificity needs one task for each recipe, and two of each; this table is {sizes.shape[0]} recipes "
                             f"by {sizes.shape[1]} tasks.")  # fmt: skip
        own = np.eye(len(sizes), dtype=bool)
        return float(sizes[own].mean() - sizes[~own].mean())

    def __repr__(self) -> str:
        square = self.table.shape[0] == self.table.shape[1] > 1
        tail = f", specificity {self.specificity:+.2f}" if square else ""
        return f"Dissociation(change of {self.metric} on {self.split}{tail})\n{self.table.round(2)}"


def dissociation(model, recipes: dict, tasks, *, split: str = "ood", metric="accuracy", seed: int = 0) -> Dissociation:
    """Does each recipe change its own task and leave the others alone?

    If removing the circuit of one task hurts another as much, the circuit is not specific, whatever its faithfulness.

    Args:
        recipes: name -> intervention or recipe; tasks: of pairs, in the order of the recipes that they belong to.
        split: of all tasks that have it; others are used whole.
    Returns:
        Dissociation.
    Raises:
        ValueError: for a task that is not of pairs.
    """
    tasks, rows = [Task.of(one) for one in tasks], []
    for task in tasks:
        if task.kind != "pairs":
            raise ValueError(f"A dissociation compares tasks of pairs; {task!r} holds {task.kind} texts.")
        _, part = evaluation._parts(model, task, (split,))[0]
        groups = evaluation._clusters(part.column("entity"), part.column("template"))
        before = part.score(model, metric=metric)
        for name, one in recipes.items():
            after = part.score(model, one if isinstance(one, Recipe) else Recipe([one]), metric=metric)
            change, low, high = measure.mean_interval(after - before, groups, seed=seed)
            rows.append({"recipe": name, "task": task.name, "before": before.mean(), "after": after.mean(), "change": change,
                         "ci_lo": low, "ci_hi": high, "n": len(before)})  # fmt: skip
    return Dissociation(pd.DataFrame(rows), getattr(metric, "__name__", metric), split)
