"""More of it, less of it: target and collateral over the strength, and the prompts that are steered the wrong way."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from workbench import measure
from workbench.improve import evaluation
from workbench.operations import Add, Delta
from workbench.recipe import Recipe
from workbench.task import Task

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True, eq=False)
class Doses:
    """What does each strength do?

    Attributes:
        name: of the recipe. frame: strength, role, task, metric, value, ci_lo, ci_hi, n.
        slopes: of the target's logit difference over the strength, least squares, one number per prompt.
        split: which rows were used.
    """

    name: str
    frame: pd.DataFrame
    slopes: np.ndarray
    split: str

    @property
    def wrong_way(self) -> tuple[float, float, float]:
        """The share of prompts that more strength moves away from the answer (anti-steerable, Tan et al. 2024), and its
        Clopper-Pearson interval."""
        count = int((self.slopes < 0).sum())
        return (count / len(self.slopes), *measure.share_bound(count, len(self.slopes)))

    def __repr__(self) -> str:
        share, low, high = self.wrong_way
        own = self.frame[(self.frame.role == "target") & (self.frame.metric == "accuracy")]
        steps = ", ".join(f"{row.strength:g}: {row.value:.2f}" for _, row in own.iterrows())
        return (f"Doses({self.name} on {own.task.iloc[0]} ({self.split}): accuracy {steps}; "
                f"{share:.0%} [{low:.0%}, {high:.0%}] steered the wrong way)")  # fmt: skip

    def plot(self):
        """Target and guards by accuracy, texts by KL, over the strength, as a matplotlib figure."""
        from matplotlib.figure import Figure

        from workbench.plot import BLUE, FAINT, GREY, MARK, picture

        figure = Figure(figsize=(6.4, 3.4), dpi=110, layout="constrained")
        ax = figure.add_subplot()
        shades = iter([GREY, MARK, "#5aae61", "#762a83", "#8c510a", "#35978f"] * 3)
        for (role, task), part in self.frame[self.frame.metric == "accuracy"].groupby(["role", "task"], sort=False):
            shade = BLUE if role == "target" else next(shades)
            ax.plot(part.strength, part.value, "o-", color=shade, ms=4, lw=2.2 if role == "target" else 1.2, label=task)
            ax.fill_between(part.strength, part.ci_lo, part.ci_hi, color=shade, alpha=0.12, lw=0)
        texts = self.frame[self.frame.metric == "kl"]
        if len(texts):
            other = ax.twinx()
            for task, part in texts.groupby("task", sort=False):
                other.plot(part.strength, part.value, ":", color=FAINT, lw=1.5)
                ax.plot([], [], ":", color=FAINT, lw=1.5, label=f"{task} (KL, right)")
            other.set_ylabel("KL, nats per token", fontsize=8, color=FAINT)
            other.tick_params(labelsize=7.5, length=0)
            other.spines[["top", "right"]].set_visible(False)
        ax.set_ylim(-0.03, 1.03)
        ax.axvline(0, color=FAINT, lw=0.6)
        ax.set_xlabel("strength", fontsize=8.5)
        ax.set_ylabel("accuracy", fontsize=8.5)
        ax.set_title(f"{self.name} ({self.split}): {self.wrong_way[0]:.0%} of prompts steered the wrong way", fontsize=8.5, loc="left")  # fmt: skip
        ax.tick_params(labelsize=8, length=0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=7.5, frameon=False)
        return picture(figure)


def dose_response(
    model, recipe, target, guards=(), *, strengths=STRENGTHS, split: str = "test", seed: int = 0
) -> Doses:
    """How do target and collateral change with the strength, and which prompts does it move the wrong way?

    Args:
        recipe: an intervention or recipe of `Add` and `Delta` only, since these have a strength; each is multiplied.
        target: a task of pairs; guards: tasks of pairs (accuracy) or of texts (KL from the unchanged model).
        split: of all tasks that have it; others are used whole.
    Returns:
        Doses.
    Raises:
        ValueError: for an intervention without a strength, a recipe made for another model, or fewer than two strengths.
    Source:
        Tan et al. 2024, "Analyzing the generalization and reliability of steering vectors": slopes per prompt.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe([recipe])
    fixed = [one for one in recipe if not isinstance(one, (Add, Delta))]
    if fixed:
        raise ValueError(f"{fixed[0]!r} has no strength. A dose-response takes Add and Delta; compare other changes with "
                         "wb.improve.evaluate.")  # fmt: skip
    if len(set(strengths)) < 2:
        raise ValueError(f"A dose-response needs at least two strengths; got {list(strengths)}.")
    guards = [guards] if isinstance(guards, (str, Task)) else guards
    tasks, rows, margins = [Task.of(one) for one in (target, *guards)], [], []
    parts = [evaluation._parts(model, task, (split,))[0] for task in tasks]
    for strength in strengths:
        changed = replace(recipe, interventions=tuple(strength * one for one in recipe))  # of the same model
        for task, (_, part) in zip(tasks, parts, strict=True):
            _, after = evaluation._measure(model, part, changed)
            groups = after.pop("text", None)
            groups = (
                groups if groups is not None else evaluation._clusters(part.column("entity"), part.column("template"))
            )
            for name in ("accuracy", "logit_diff") if part.kind == "pairs" else ("kl", "loss"):
                value, low, high = measure.mean_interval(after[name], groups, seed=seed)
                rows.append({"strength": strength, "role": "target" if task is tasks[0] else "guard", "task": task.name, "metric": name,
                             "value": value, "ci_lo": low, "ci_hi": high, "n": len(after[name])})  # fmt: skip
            if task is tasks[0]:
                margins.append(after["logit_diff"])
    slopes = np.polyfit(np.asarray(strengths, float), np.stack(margins), 1)[0]
    return Doses(recipe.name or "recipe", pd.DataFrame(rows), slopes, parts[0][0])
