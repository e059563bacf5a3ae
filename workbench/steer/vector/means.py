"""Vector arithmetic: push the residual stream along a direction, or take a direction out of it."""

from __future__ import annotations

import torch

from workbench.component import Component
from workbench.intervention import Add, ProjectOut
from workbench.task import Task


def difference_of_means(model, task: Task, at, *, to=None, unit: str = "raw", phase: str | None = None,
                        positive: str | None = None) -> Add:  # fmt: skip
    """Which direction separates two kinds of prompts here? mean(positive) - mean(negative), as an intervention.

    Fitted on the rows of split "fit" where the task has such rows, so that held-out rows stay held out.

    Args:
        task: pairs (clean against corrupted) or texts with two labels.
        at: one component with a position, such as "resid_post.3@-1", where the means are taken; without a position
            over all positions of each prompt.
        to: where the vector acts, `at` by default. `to="resid_post.3"` acts on every token.
        unit: "raw": strength 1 adds the difference itself; "norm": strength 1 adds as much as the local stream is long.
        phase: "prompt", "generation" or "both".
        positive: for labelled texts, the label to push towards; the first row's by default.
    Returns:
        Add with strength 1. `2 * push` pushes twice as far, `-push` the other way.
    Raises:
        ValueError: for a task with one side only, a family of components, or sides that do not differ there.
    Source:
        Contrastive activation addition, Rimsky et al. 2024; Arditi et al. 2024, eq. 1-3.
    """
    task, at = Task.of(task), Component.parse(at)
    if at.is_family:
        raise ValueError(f"{at} is a family; a direction is taken at one component, for example 'resid_post.3@-1'.")
    yes, no = (_mean(model, prompts, at, spans) for prompts, spans in _sides(model, task, positive))
    if torch.equal(yes, no):
        raise ValueError(f"The two sides do not differ at {at}, so there is no direction. Take it at or after the place "
                         "where they differ, for example at position -1.")  # fmt: skip
    return Add(to if to is not None else at, vector=yes - no, unit=unit, phase=phase)


def directional_ablation(model, task: Task, at, *, to=None, phase: str | None = None, positive: str | None = None):
    """What happens when nothing can write this direction? The difference of means, projected out.

    Args:
        task, at, positive: as for `difference_of_means`.
        to: where it is projected out; by default everything that writes to the stream (the embedding, every attention
            and every FFN), at every token, which equals orthogonalizing the weights that write.
    Returns:
        ProjectOut.
    Source:
        Arditi et al. 2024, "Refusal in language models is mediated by a single direction", eq. 4.
    """
    direction = difference_of_means(model, task, at, positive=positive).vector
    return ProjectOut(to if to is not None else ["resid_pre.0", "attn_out.*", "mlp_out.*"], direction, phase=phase)


def _sides(model, task: Task, positive: str | None):
    if "fit" in task.column("split"):
        task = task.split("fit")
    if task.kind == "pairs":
        pairs = task.on(model)
        return [(pairs.clean, pairs.spans), (pairs.corrupted, pairs.spans)]
    labels = list(dict.fromkeys(task.column("label"))) if task.kind == "labelled" else []
    positive = positive if positive is not None else labels[0] if labels else None
    if len(labels) != 2 or positive not in labels:
        raise ValueError(f"A direction needs pairs, or texts with two labels one of which is positive={positive!r}; "
                         f"task {task.name!r} has labels {labels}.")  # fmt: skip
    sides = [[row["text"] for row in task if (row["label"] == positive) is wanted] for wanted in (True, False)]
    return [(side, None) for side in sides]


def _mean(model, prompts, at: Component, spans) -> torch.Tensor:
    if at.position is not None:
        return model.activations(prompts, at, spans=spans).mean(0)
    return torch.stack([model.activations([one], at)[0].mean(0) for one in prompts]).mean(0)
