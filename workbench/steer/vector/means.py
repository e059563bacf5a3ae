"""Differences of means: pushed along, projected out, set to a reference; and a concept erased."""

from __future__ import annotations

import torch

from workbench.locate.probing import erase
from workbench.operations import Add, Affine, ProjectOut
from workbench.steer.vector.reading import one_place, refuse_equal, sides, states
from workbench.task import Task

WRITES = ("resid_pre.0", "attn_out.*", "mlp_out.*")  # all that writes to the stream


def difference_of_means(model, task: Task, at, *, to=None, unit: str = "raw", phase: str | None = None,
                        positive: str | None = None) -> Add:  # fmt: skip
    """Which direction separates two kinds of prompts here? mean(positive) - mean(negative), as an intervention.

    Fitted on the rows of split "fit" where the task has such rows, so that held-out rows stay held out.

    Args:
        task: pairs (clean against corrupted) or texts with two labels.
        at: one component with a position, such as "resid_post.3@-1", where the means are taken; without a position
            over all positions of each prompt.
        to: where the vector acts, `at` by default. `to="resid_post.3"` acts on every token.
        unit: "raw": strength 1 adds the difference itself; "norm": strength 1 adds as much as the local stream is long;
            "angle": the strength is degrees of a turn that keeps the length.
        phase: "prompt", "generation" or "both".
        positive: for labelled texts, the label to push towards; the first row's by default.
    Returns:
        Add with strength 1. `2 * push` pushes twice as far, `-push` the other way. `fitted_on` are the states of both sides
        [row, width] and how many of them are positive: `improve.evaluate` shuffles these labels for a control. It is not saved.
    Raises:
        ValueError: for a task with one side only, a family of components, or sides that do not differ there.
    Source:
        Contrastive activation addition, Rimsky et al. 2024; Arditi et al. 2024, eq. 1-3; turning as in angular steering,
        Vu and Nguyen 2025.
    """
    at = one_place(at)
    both = [states(model, side, at) for side in sides(model, task, positive)]
    yes, no = (side.mean(0) for side in both)
    refuse_equal(yes, no, at)
    made = Add(to if to is not None else at, vector=yes - no, unit=unit, phase=phase)
    object.__setattr__(made, "fitted_on", (torch.cat(both), len(both[0])))
    return made


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
    return ProjectOut(to if to is not None else WRITES, direction, phase=phase)


def set_to_mean(model, task: Task, at, *, share: float = 0.0, to=None, phase: str | None = None,
                positive: str | None = None) -> Affine:  # fmt: skip
    """What happens when every prompt looks like the negative ones along this direction? x - (r.x - r.mu) r, with r the
    difference of means made to length 1 and mu the mean of the negative side: affine concept editing.

    Where zero lies between the two sides or far from both, projecting out leaves something that the model has never met;
    this does not.

    Args:
        task, at, positive: as for `difference_of_means`.
        share: 0 sets to the negative side's mean, 1 to the positive side's, others in between or beyond.
        to: where it is set, `at` by default.
    Returns:
        Affine.
    Source:
        Marshall et al. 2024, "Refusal in LLMs is an affine function", eq. 8 (there with alpha for `share`).
    """
    at = one_place(at)
    yes, no = (states(model, side, at).mean(0) for side in sides(model, task, positive))
    refuse_equal(yes, no, at)
    unit = (yes - no) / (yes - no).norm()
    goal = (no + share * (yes - no)) @ unit
    return Affine(
        to if to is not None else at, torch.eye(len(unit)) - torch.outer(unit, unit), goal * unit, phase=phase
    )


def leace(model, task: Task, at, *, label=None) -> Affine:
    """What happens when no linear probe can read the label here? The least change of activations that achieves it.

    Thin call of `wb.locate.probing.erase`, which also measures what the erasure does, beside random ones.

    Args:
        task: labelled texts (any number of labels) or pairs; fitted on split "fit".
        at: one component with a position, or several, erased together in forward order.
        label: what the classes are, as for `erase`.
    Source:
        Belrose et al. 2023, "LEACE: perfect linear concept erasure in closed form".
    """
    return erase(model, task, at, "leace", label=label, draws=0).intervention
