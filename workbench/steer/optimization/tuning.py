"""Fine-tuning of located weights, and LoRA beside it."""

from __future__ import annotations

from workbench.intervention import Intervention
from workbench.model.plan import check_recipe
from workbench.operations import Delta
from workbench.recipe import Recipe, flatten
from workbench.steer.optimization.learning import Keep, LowRank, Masked, check_settings, train_weights
from workbench.steer.optimization.masks import matrices, random_masks, weight_masks
from workbench.steer.optimization.rows import Rows, forward
from workbench.task import Task


def finetune(model, task, at, *, keep=("background",), keep_weight: float = 1.0, budget: float = 0.05, steps: int = 200,
             lr: float = 1e-3, decay: float = 0.0, batch: int = 16, every: int = 20, patience: int = 4, enough: float = 0.01,
             during=(), seed: int = 0, progress: bool = True) -> Delta:  # fmt: skip
    """What do these weights have to become for this behaviour, all others staying as they are? Located fine-tuning.

    The loss is -log p of the answers + keep_weight * KL from the untouched model on what is to stay. Gradients, Adam's
    moments and decay are masked, so that weights outside the mask keep every bit. Compare with `random_masks` of the same
    size, with `lora`, and with at="all"; `improve.evaluate` does the first and the last by itself.

    Args:
        task: pairs (answers, or whole completions where rows have them), or texts; trained on rows of split "fit", chosen
            on rows of split "select" where it has them.
        at: components (see `weight_masks`), "all", "bias", or masks.
        keep: tasks, or their names, whose predictions are to stay: rows of "fit" are held, rows of "select" measured.
        budget: the largest KL (nats per token) on the measured rows, for the worst of these tasks.
        lr, decay: of Adam; decay pulls the weights towards what they were.
        every, patience, enough: a check every so many steps; it ends after `patience` checks without progress, or when the
            loss on the held-out rows is `enough` within the budget.
        during: an intervention or a recipe that acts while the task's rows are learnt and checked, and is no part of the
            result. With a persona vector this is preventative steering: what the vector already says need not be learnt.
            What is to stay is held without it.
    Returns:
        Delta of the best check; `history` is a table of all checks, `controls` the same tuning of other weights, to be
        called by name: "random mask" (`random_masks`) and "full tuning" (all weights). Neither is saved or copied with it;
        until then they hold on to the model.
    Raises:
        ValueError: when no check is within the budget; for components without weights; for a change of weights `during`, or a recipe
            made for another model.
    Source:
        Masked gradients as in Chen et al. 2024 ("Finding safety neurons" and "From yes-men to truth-tellers", pinpoint
        tuning); `during` as in Chen et al. 2025, "Persona vectors", section 5.2.
    """
    check_settings(steps=steps, every=every, batch=batch, patience=patience)
    settings = {"budget": budget, "steps": steps, "lr": lr, "decay": decay, "every": every, "patience": patience,
                "enough": enough, "progress": progress}  # fmt: skip
    how = {"keep": keep, "keep_weight": keep_weight, "batch": batch, "during": during, "seed": seed, **settings}
    change = Masked(model, weight_masks(model, at))
    made = _train(model, task, change, keep, keep_weight, seed, batch, during, what="fine-tuning", **settings)
    others = {"random mask": lambda: finetune(model, task, random_masks(model, at, seed), **how),
              "full tuning": lambda: finetune(model, task, "all", **how)}  # fmt: skip
    object.__setattr__(made, "controls", {} if at == "all" else others)
    return made


def lora(model, task, at=("attn_out.*", "mlp_out.*"), *, rank: int = 4, alpha: float | None = None, keep=("background",),
         keep_weight: float = 1.0, budget: float = 0.05, steps: int = 200, lr: float = 2e-3, decay: float = 0.0, batch: int = 16,
         every: int = 20, patience: int = 4, enough: float = 0.01, seed: int = 0, progress: bool = True) -> Delta:  # fmt: skip
    """Which change of low rank brings this behaviour? W + (alpha / rank) B A for each matrix of these blocks.

    Written out here rather than through `peft`, which puts modules of its own into the model: the model is not changed.
    `wb.Recipe([delta]).to_peft(model, folder)` writes the result as an adapter for peft.

    Args:
        at: whole blocks, such as "mlp_out.3" or "attn_out.*"; all by default.
        rank, alpha: alpha is twice the rank by default.
        The rest as for `finetune`.
    Returns:
        Delta, every difference as two factors; `history` is a table of all checks, `controls` has "full tuning" (`finetune`
        of all weights, with the same settings), for `improve.evaluate`.
    Source:
        Hu et al. 2022, "LoRA", with its beginning (B = 0, A uniform).
    """
    check_settings(rank=rank, steps=steps, every=every, batch=batch, patience=patience)
    settings = {"budget": budget, "steps": steps, "lr": lr, "decay": decay, "every": every, "patience": patience,
                "enough": enough, "progress": progress}  # fmt: skip
    how = {"keep": keep, "keep_weight": keep_weight, "batch": batch, "seed": seed, **settings}
    change = LowRank(model, matrices(model, at), rank, 2.0 * rank if alpha is None else alpha, seed)
    made = _train(model, task, change, keep, keep_weight, seed, batch, what="LoRA", **settings)
    object.__setattr__(made, "controls", {"full tuning": lambda: finetune(model, task, "all", **how)})
    return made


def _train(model, task, change, keep, keep_weight, seed, batch, during=(), **settings) -> Delta:
    check_recipe(model, during)
    rows, held = fit_and_held(model, task)
    acting = list(flatten([during] if isinstance(during, (Intervention, Recipe)) else during))
    staying = Keep(model, keep, keep_weight)

    def lost(part, weights):
        return part.nll(forward(model, part.prompts(), weights, during=acting))

    def loss(weights, rng):
        return lost(rows.draw(batch, rng), weights) + staying.loss(weights, batch, rng)

    def check(weights):
        parts = [(float(lost(part, weights)), len(part)) for part in held.parts()]
        return {"target": sum(x * n for x, n in parts) / len(held), "collateral": staying.collateral(weights)}

    return train_weights(change, loss, check, seed, **settings)


def fit_and_held(model, task) -> tuple[Rows, Rows]:
    """The rows to train on, and those to choose by: split "select" where there is one, else the same."""
    task = Task.of(task)
    rows = Rows.of(model, task, "fit")
    return rows, Rows.of(model, task, "select") if "select" in task.column("split") else rows
