"""Which layer, position and strength? Candidates measured on split "select", kept within limits on what else they change."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench import measure
from workbench.component import components
from workbench.gate import Gate
from workbench.intervention import Intervention
from workbench.model import Prompts
from workbench.operations import Add, ProjectOut
from workbench.steer.vector.means import WRITES, difference_of_means, set_to_mean
from workbench.task import Task

# how: (what is made of the difference of means fitted at a place, the side of the pairs it acts on)
HOW = {
    "add": (lambda push, model, task, at: push, "corrupted"),
    "subtract": (lambda push, model, task, at: -push, "clean"),
    "ablate": (lambda push, model, task, at: ProjectOut(WRITES, push.vector), "clean"),
    "set": (lambda push, model, task, at: set_to_mean(model, task, at), "clean"),
}


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen, and among which candidates.

    Attributes:
        best: the intervention (or gate) chosen.
        frame: a line for each candidate, the chosen one marked; see the function that made it.
        why: how it was chosen, in a sentence.
    """

    best: Intervention | Gate
    frame: object
    why: str

    def __repr__(self) -> str:
        return f"Choice({self.best!r}, of {len(self.frame)} candidates)"


def choose(model, task: Task, at, how="add", *, strengths=(0.5, 1.0, 1.5, 2.0, 3.0), prompt: str | None = None,
           metric="accuracy", kl: float = 0.1, background="background", guards=(), drop: float = 0.02, induce: bool = True,
           depth: float = 0.8, rows: int = 64, split: str = "select") -> Choice:  # fmt: skip
    """At which place and strength does a direction do its work without breaking anything else?

    Directions are fitted on split "fit", candidates measured on `split`. On corrupted prompts the metric is to rise, on clean
    ones to fall. Candidates that break a limit drop out; of the others, the place with the largest effect is taken (of equals
    the one with the largest margin), and there the smallest strength whose effect is within one standard error of that.

    Columns: effect (the change of the metric in the wanted direction, mean over prompts, with its standard error `se`),
    after (the metric then), margin (as effect, in logits of answer against foil); kl_background (nats per token of plain texts, the first third of each being the prompt); kl_other
    (at the last token of the other side of the pairs, where `how` is not "add"); drop (the largest loss of accuracy among
    the guards); induced (the logit difference on corrupted prompts when the same direction is added there); limit (what it
    broke).

    Args:
        task: pairs. at: places with a position, or a list, for example "resid_post.*@-1".
        how: "add" the difference of means to corrupted prompts; "subtract" it from clean ones; "ablate" it from all that is
            written; "set" clean prompts to the corrupted ones' mean along it; or a function (model, task, place) that
            gives an intervention.
        strengths: for interventions that have one (Add), in its own units.
        prompt: for a function, the side it acts on, "clean" or "corrupted".
        metric: as for `Task.score`. Accuracy has an end, so that the smallest sufficient strength can be told; a logit
            difference grows with the strength for ever, and the largest wins.
        kl: limit for both kl columns. background: a task of texts, or None.
        guards: tasks of pairs whose accuracy must not fall by more than `drop`.
        induce: whether a direction that is taken away must also, when added, bring the behaviour about (induced > 0).
        depth: places must lie in this share of the layers, from the first. rows: of each task, to save time.
    Returns:
        Choice; `best` is the intervention.
    Raises:
        ValueError: when no candidate keeps within the limits, saying which limits they broke.
    Source:
        Arditi et al. 2024, section C (of ablations the lowest refusal score with induced > 0, KL < 0.1, layer < 0.8 L).
    """
    import pandas as pd

    task = Task.of(task)
    named = isinstance(how, str) and how in HOW
    make, side = HOW[how] if named else (how, prompt)
    if not callable(make) or side not in ("clean", "corrupted"):
        raise ValueError(f"how={how!r}: choose {', '.join(map(repr, HOW))}, or give a function (model, task, place) and "
                         "prompt='clean' or 'corrupted', the side it acts on.")  # fmt: skip
    if task.kind != "pairs":
        raise ValueError(
            f"Choosing needs a task of pairs, to see the behaviour; {task.name!r} holds {task.kind} texts."
        )
    pairs, of, sign = _held(task, split, rows).on(model), measure.metric(metric), 1 if side == "corrupted" else -1
    prompts = {name: Prompts(getattr(pairs, name), spans=pairs.spans) for name in ("clean", "corrupted")}
    other = "clean" if side == "corrupted" else "corrupted"

    def score(name, *changes):
        """The metric and the margin, each [prompt]."""
        logits = model.logits(prompts[name], *changes)
        return torch.stack([m(logits, pairs.answer, pairs.foil) for m in (of, measure.logit_diff)])

    before, aside = score(side), model.logits(prompts[other])
    texts = None if background is None else _Background(model, _held(Task.of(background), split, rows // 2))
    guards = [_held(Task.of(one), split, rows) for one in ([guards] if isinstance(guards, (str, Task)) else guards)]
    right = [one.score(model, metric="accuracy").mean() for one in guards]
    lines, made = [], []
    for place in model.names.expand(components(at)):
        try:
            push = difference_of_means(model, task, place) if named else None
            found = make(push, model, task, place) if named else make(model, task, place)
        except ValueError as error:
            if "do not differ" not in str(error):
                raise
            continue
        induced = float(score("corrupted", push)[1].mean()) if named and induce and sign < 0 else float("nan")
        for strength in strengths if isinstance(found, Add) else (1.0,):
            one = strength * found if isinstance(found, Add) else found
            after = score(side, one)
            change, margin = sign * (after - before)
            line = {
                "at": str(place), "strength": strength if isinstance(found, Add) else float("nan"),
                "effect": float(change.mean()), "se": float(change.std() / len(change) ** 0.5), "after": float(after[0].mean()), "margin": float(margin.mean()),
                "kl_background": float("nan") if texts is None or isinstance(place.position, str) else texts.kl(one),
                "kl_other": float(measure.kl(aside, model.logits(prompts[other], one)).mean()) if sign < 0 else float("nan"),
                "drop": max((float(was - task.score(model, one, metric="accuracy").mean())
                             for was, task in zip(right, guards, strict=True)), default=float("nan")),
                "induced": induced,
            }  # fmt: skip
            late = place.layer is not None and place.layer >= depth * model.names.n_layers
            line["limit"] = _broken(line, kl, drop, late)
            lines.append(line)
            made.append(one)
    if not lines:
        raise ValueError(f"The two sides of task {task.name!r} do not differ at any of these places.")
    frame = pd.DataFrame(lines)
    chosen = _chosen(frame)
    frame["chosen"] = frame.index == chosen
    why = (f"{(frame.limit == '').sum()} of {len(frame)} candidates keep within the limits; the place with the largest effect, and "
           "there the smallest strength within one standard error.")  # fmt: skip
    if not any(task.column("split")):
        why += " The task has no splits: directions were fitted on the rows that they were chosen by."
    return Choice(made[chosen], frame, why)


def _broken(line: dict, kl: float, drop: float, late: bool) -> str:
    """The limits that a candidate breaks, by name."""
    broken = [name for name in ("kl_background", "kl_other") if line[name] > kl]
    broken += ["drop"] if line["drop"] > drop else []
    broken += ["induced"] if line["induced"] <= 0 else []
    broken += ["effect"] if not line["effect"] > 0 else []
    return ", ".join(broken + (["depth"] if late else []))


def _chosen(frame) -> int:
    """The row to take.

    Raises:
        ValueError: when all break a limit.
    """
    fine = frame[frame.limit == ""]
    if not len(fine):
        counts = frame.limit.str.split(", ").explode().value_counts()
        said = ", ".join(f"{name} ({n})" for name, n in counts.items())
        best = frame.loc[frame.effect.idxmax()]
        raise ValueError(f"None of {len(frame)} candidates keeps within the limits. Broken: {said}. The largest effect, "
                         f"{best.effect:.2f} at {best['at']}, has KL {best.kl_background:.3f} on background. Allow more (kl=, "
                         "drop=, depth=, induce=False), or try other places or smaller strengths.")  # fmt: skip
    best = fine.sort_values(["effect", "margin"], ascending=False, kind="stable").iloc[0]
    near = fine[(fine["at"] == best["at"]) & (fine.effect >= best.effect - best.se)]
    return int(near.strength.abs().idxmin()) if near.strength.notna().any() else int(best.name)


def _held(task: Task, split: str, rows: int) -> Task:
    """Some rows of a split, or of the whole task where it has no splits, spread over it."""
    task = task.split(split) if any(task.column("split")) else task
    return task[:: max(1, len(task) // rows)][:rows]


class _Background:
    """Plain texts, the first third of each as a prompt: how far does an intervention move what the model expects next?"""

    def __init__(self, model, task: Task):
        self.model = model
        ids = [model.ids(text) for text in task.column("text" if task.kind != "pairs" else "clean")]
        self.prompts = Prompts(ids, [max(1, len(one) // 3) for one in ids])
        self.before = self._logits()

    def _logits(self, *changes) -> torch.Tensor:
        found = self.model.logits(self.prompts, *changes, positions="all")
        return torch.cat([x[length - 1 : -1] for x, length in zip(found, self.prompts.lengths, strict=True)])

    def kl(self, change: Intervention) -> float:
        """Mean KL(before || after) in nats per token."""
        return float(measure.kl(self.before, self._logits(change)).mean())
