"""What changing features does to a task, beside controls that change as much."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from workbench import measure
from workbench.component import Component, components
from workbench.locate.features.finding import Sides, attached
from workbench.locate.features.tokens import by_token
from workbench.operations import Add, Scale
from workbench.plot import picture
from workbench.task import Task


@dataclass(frozen=True, eq=False)
class Effects:
    """A task with features changed, beside controls.

    Attributes:
        rows: one dict per arm. features: what was changed. factor: 0 is off. metric, task, n, cost, seconds, seed.
    """

    rows: list[dict]
    features: list[Component]
    factor: float
    metric: str
    task: str
    n: int
    cost: float
    seconds: float
    seed: int

    @property
    def frame(self):
        """arm, before, after, change with its interval over prompts, KL to the untouched prediction, size of the push."""
        import pandas as pd

        return pd.DataFrame(self.rows).set_index("arm")

    def __repr__(self) -> str:
        one, rest = self.rows[0], [abs(row["change"]) for row in self.rows[1:]]
        which = ", ".join(map(str, self.features[:3])) + (" ..." if len(self.features) > 3 else "")
        return (f"Effects({which} x {self.factor:g}: {self.metric} {one['before']:+.2f} -> {one['after']:+.2f} on "
                f"{self.n} prompts of {self.task or 'a task'}, largest control {max(rest):.2f})")  # fmt: skip

    def plot(self):
        """The change of the metric by arm, with intervals. Returns the Figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 0.4 * len(self.rows) + 1), layout="constrained")
        axes = figure.subplots()
        rows = self.rows[::-1]
        for place, row in enumerate(rows):
            colour = "#2166ac" if row["arm"] == "features" else "#9aa3ad"
            axes.plot([row["ci_lo"], row["ci_hi"]], [place, place], color=colour, lw=2)
            axes.plot(row["change"], place, "o", color=colour)
        axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
        axes.axvline(0, color="#8a919c", lw=0.8)
        axes.set_xlabel(f"change of {self.metric} ({self.task}, {self.n} prompts)")
        return picture(figure)


def effect(
    model, task, features, *, factor: float = 0.0, metric="logit_diff", draws: int = 5, seed: int = 0
) -> Effects:
    """What becomes of the task when these features are multiplied by a factor (0: switched off)?

    Beside it, on the same prompts: as many other features of nearly the same activation (`draws` times), and, as far as
    the features move the stream, a step against the difference of means and along a random direction.

    Args:
        task: pairs; the clean prompts are run. features: of one attached SAE, at one position ("feature.sae.3@-1").
    Returns:
        Effects; "other features" and "random direction" are the draw that changes the metric most.
    Raises:
        ValueError: for components that are no features, of several SAEs or positions, or features that never fire.
    """
    began, found, task = time.perf_counter(), list(components(features)), Task.of(task)
    places = {(one.kind, one.name, one.position) for one in found}
    # without a position features act where they fire, and a push of that length at every token would be no fair control
    if len(places) != 1 or found[0].kind != "feature" or found[0].position is None:
        raise ValueError(
            f"effect() takes features of one SAE at one position, such as ['feature.sae.3@-1']; got {found}."
        )
    sae, position = attached(model, found[0].name), found[0].position
    pairs, of, rng = task.on(model), measure.metric(metric), np.random.default_rng(seed)
    own = [one.index for one in found]
    sides = Sides.of(model, pairs.task, sae, position, None)
    if not (sides.yes[:, own] > 0).any():
        raise ValueError(f"None of {found} fires on the clean prompts of this task, so multiplying changes nothing.")
    base = model.logits(pairs.clean, spans=pairs.spans)
    before = of(base, pairs.answer, pairs.foil).double().numpy()
    given, local = by_token(model, sae, pairs.clean, position, pairs.spans), sae.to("cpu")
    moves = [local.change((factor - 1) * local.encode(x, own), x, own).norm(dim=-1).mean() for x in given]
    size = float(torch.stack(moves).mean())  # what the features move a token by, of which controls are given as much

    def arm(name: str, *change) -> dict:
        logits = model.logits(pairs.clean, *change, spans=pairs.spans)
        after = of(logits, pairs.answer, pairs.foil).double().numpy()
        mean, low, high = measure.mean_interval(after - before, pairs.task.clusters(), seed=seed)
        moved = measure.kl(base, logits).mean()
        return {"arm": name, "before": before.mean(), "after": after.mean(), "change": float(mean), "ci_lo": float(low),
                "ci_hi": float(high), "kl": float(moved)}  # fmt: skip

    def worst(arms: list[dict]) -> dict:
        return max(arms, key=lambda one: abs(one["change"]))

    rows = [arm("features", Scale(found, factor))]
    level = sides.yes.mean(0)
    alike = [_alike(level, own, rng) for _ in range(draws)]
    rows.append(
        worst([arm("other features", Scale([sae.feature(i).at(position) for i in some], factor)) for some in alike])
    )
    at = sae.at.at(position)
    x = model.activations([*pairs.clean, *pairs.corrupted], at, spans=[*pairs.spans, *pairs.spans])
    means = x[: len(pairs.clean)].mean(0) - x[len(pairs.clean) :].mean(0)
    rows.append(arm("difference of means", Add(at, -size * measure.unit(means))))
    pushes = torch.randn(draws, len(means), generator=torch.Generator().manual_seed(seed))
    rows.append(worst([arm("random direction", Add(at, size * measure.unit(push))) for push in pushes]))
    return Effects(rows, found, factor, metric if isinstance(metric, str) else getattr(metric, "__name__", "metric"),
                   task.name, len(before), 5.0 + 2 * draws, time.perf_counter() - began, seed)  # fmt: skip


def _alike(level: torch.Tensor, own: list[int], rng) -> list[int]:
    """For each feature another of nearly the same mean activation, drawn from the five nearest that are free."""
    taken = set(own)
    for one in own:
        order = [int(i) for i in (level - level[one]).abs().argsort() if int(i) not in taken][:5]
        taken.add(int(rng.choice(order)))
    return sorted(taken - set(own))
