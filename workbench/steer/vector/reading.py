"""What directions are fitted on: the two sides of a task, and the activations of each prompt at a place."""

from __future__ import annotations

import torch

from workbench.component import Component, components
from workbench.model import Prompts
from workbench.task import Task


def sides(model, task: Task, positive: str | None = None, split: str = "fit") -> list[Prompts]:
    """The prompts to push towards and those to push away from: clean and corrupted ones, or those of two labels.

    Only rows of `split` where the task has such rows, so that held-out rows stay held out.

    Raises:
        ValueError: for a task with one side only; for a `positive` label of pairs, which have none.
    """
    task = Task.of(task)
    if task.kind == "pairs" and positive is not None:
        raise ValueError(f"positive={positive!r} is a label, and pairs have none: their clean side is the positive one. Leave it "
                         "out; for the other side use ~gate of a gate, and -push of a vector.")  # fmt: skip
    known = list(dict.fromkeys(task.column("label"))) if task.kind == "labelled" else []
    if split in task.column("split"):
        task = task.split(split)
    if task.kind == "pairs":
        pairs = task.on(model)
        return [Prompts(side, spans=pairs.spans) for side in (pairs.clean, pairs.corrupted)]
    positive = positive if positive is not None else known[0] if known else None
    if len(known) != 2 or positive not in known:
        raise ValueError(f"A direction needs pairs, or texts with two labels one of which is positive={positive!r}; "
                         f"task {task.name!r} has labels {known}.")  # fmt: skip
    found = [[row["text"] for row in task if (row["label"] == positive) is wanted] for wanted in (True, False)]
    if not all(found):
        raise ValueError(f"Task {task.name!r} has texts of one label only in split {split!r}; a direction needs both.")
    return [Prompts([model.ids(text) for text in side]) for side in found]


def states(model, prompts: Prompts, at, *interventions) -> torch.Tensor | dict[Component, torch.Tensor]:
    """The activations of each prompt, [prompt, width]: at a position, averaged over a span, or over the whole prompt.

    Args:
        at: a component, or a list of them, for which a dict is returned (families written out).
    """
    wanted = model.names.expand(components(at))
    found = {one: [None] * len(prompts.ids) for one in wanted}
    placed = [one for one in wanted if one.position is not None]
    if placed:
        for one, x in model.activations(prompts, placed, *interventions).items():
            found[one] = list(x.reshape(len(prompts.ids), -1))
    anywhere = [one for one in wanted if one.position is None]
    for length in sorted({len(ids) for ids in prompts.ids}) if anywhere else ():  # so that no padding is averaged
        rows = [row for row, ids in enumerate(prompts.ids) if len(ids) == length]
        part = Prompts([prompts.ids[row] for row in rows], spans=[prompts.spans[row] for row in rows])
        for one, x in model.activations(part, anywhere, *interventions).items():
            for row, value in zip(rows, x.reshape(len(rows), length, -1).mean(1), strict=True):
                found[one][row] = value
    found = {one: torch.stack(rows) for one, rows in found.items()}
    return found[wanted[0]] if isinstance(at, (str, Component)) and len(wanted) == 1 else found


def one_place(at) -> Component:
    """One component, no family.

    Raises:
        ValueError: for a family.
    """
    at = Component.parse(at)
    if at.is_family:
        raise ValueError(f"{at} is a family; a direction is taken at one component, for example 'resid_post.3@-1'.")
    return at


def refuse_equal(yes: torch.Tensor, no: torch.Tensor, at: Component) -> None:
    """No direction where the two sides do not differ.

    Raises:
        ValueError: naming the place.
    """
    if torch.equal(yes, no):
        raise ValueError(f"The two sides do not differ at {at}, so there is no direction. Take it at or after the place "
                         "where they differ, for example at position -1.")  # fmt: skip


def both_sides(model, task: Task) -> Prompts:
    """All prompts of a task, of pairs both sides; only rows of split "fit" where the task has such rows."""
    task = Task.of(task)
    task = task.split("fit") if "fit" in task.column("split") else task
    if task.kind != "pairs":
        return Prompts([model.ids(text) for text in task.column("text")])
    pairs = task.on(model)
    return Prompts([*pairs.clean, *pairs.corrupted], spans=pairs.spans * 2)
