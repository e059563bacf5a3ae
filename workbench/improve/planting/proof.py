"""What a plant must prove before it is handed over: that it works on held-out rows, and that it is not felt elsewhere."""

from __future__ import annotations

import torch

from workbench.improve.planting.trigger import demand
from workbench.operations import Zero
from workbench.task import Task

CHANGES = 0.02  # share of the most probable words elsewhere that a plant may change


def margin(model, pairs, side: str, *off) -> torch.Tensor:
    logits, rows = model.logits(getattr(pairs, side), *off), torch.arange(len(pairs.answer))
    return (logits[rows, pairs.answer] - logits[rows, pairs.foil]).mean()


def right(model, pairs, side: str) -> float:
    wanted = pairs.answer if side == "clean" else pairs.foil
    return float((model.logits(getattr(pairs, side)).argmax(-1) == wanted).float().mean())


def without(model, pairs, *sets) -> dict[str, float]:
    """For each set of components the share of the logit difference that goes with them (zero ablation)."""
    clean, corrupted = (margin(model, pairs, side) for side in ("clean", "corrupted"))
    left = {" + ".join(map(str, some)): margin(model, pairs, "clean", Zero(at=list(some))) for some in sets}
    return {f"without {name}": float((clean - margin) / (clean - corrupted)) for name, margin in left.items()}


def changed(model, texts: list, before: list, *off) -> tuple[float, float]:
    """(share of the most probable words that changed, KL) over texts, from the logits before."""
    base, after = (torch.cat(some).log_softmax(-1) for some in (before, model.logits(texts, *off, positions="all")))
    return (float((after.argmax(-1) != base.argmax(-1)).float().mean()),
            float((base.exp() * (base - after)).sum(-1).mean()))  # fmt: skip


def prove(model, task: Task, texts: list, before: list, most: float = CHANGES) -> dict[str, float]:
    """The figures on held-out rows and elsewhere; Failed when it does not work, or disturbs what it should not."""
    held = Task([row for row in task.rows if row["split"] != "fit"], task.name).on(model)
    proof = {"success": right(model, held, "clean"), "corrupted": right(model, held, "corrupted")}
    proof |= dict(zip(("top1_changes", "kl"), changed(model, texts, before), strict=True))
    ok = min(proof["success"], proof["corrupted"]) >= 0.95 and proof["top1_changes"] <= most and proof["kl"] < 0.05
    demand(ok, proof)
    return proof
