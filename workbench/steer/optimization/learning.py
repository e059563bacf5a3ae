"""The loop that learns, and what it learns: masked differences or factors of low rank, beside weights that stay as they are."""

from __future__ import annotations

import math
from numbers import Integral

import torch

from workbench.operations import Delta
from workbench.steer.optimization.rows import Rows, forward, kl_from, predictions, steps_bar
from workbench.task import Task

CLIP = 1.0  # norm of the gradient


class Masked:
    """Differences of some weights, zero outside their masks: gradient, Adam's moments and decay never leave a mask."""

    def __init__(self, model, masks: dict[str, torch.Tensor], start: Delta | None = None):
        weights = dict(model.hf.named_parameters())
        self.masks = {name: mask.to(weights[name].device) for name, mask in masks.items()}
        self.base = {
            name: _base(weights[name], name, start) for name in {**masks, **dict.fromkeys(start.names if start else ())}
        }
        self.differences = {n: torch.zeros_like(weights[n], dtype=torch.float32, requires_grad=True) for n in masks}
        self.dtypes = {name: weights[name].dtype for name in self.base}
        self.leaves = list(self.differences.values())

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights as they are now, with gradients to the differences."""
        return {name: (base + self.differences[name] if name in self.differences else base).to(self.dtypes[name])
                for name, base in self.base.items()}  # fmt: skip

    def keep_inside(self, gradients) -> list[torch.Tensor]:
        return [gradient * mask for gradient, mask in zip(gradients, self.masks.values(), strict=True)]

    def delta(self) -> Delta:
        return Delta(weights={name: difference * self.masks[name] for name, difference in self.differences.items()})


class LowRank:
    """Differences left @ right of whole matrices, times alpha / rank; left begins at zero (Hu et al. 2022)."""

    def __init__(self, model, names: list[str], rank: int, alpha: float, seed: int):
        weights, rng = dict(model.hf.named_parameters()), torch.Generator().manual_seed(seed)
        self.base, self.scale, self.factors = {name: weights[name].detach() for name in names}, alpha / rank, {}
        for name, base in self.base.items():
            rows, width = base.shape
            if rank > min(rows, width):
                raise ValueError(f"rank={rank} is more than {name} {list(base.shape)} can have.")
            turned = not isinstance(model.hf.get_submodule(name.removesuffix(".weight")), torch.nn.Linear)
            left, right = torch.zeros(rows, rank), torch.zeros(rank, width)
            inner = left if turned else right  # the side that reads; Conv1D keeps [in, out]
            inner.uniform_(-1, 1, generator=rng).mul_(1 / math.sqrt(rows if turned else width))
            self.factors[name] = [side.to(base.device).requires_grad_(True) for side in (left, right)]
        self.leaves = [side for pair in self.factors.values() for side in pair]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: (base.float() + self.scale * left @ right).to(base.dtype)
                for (name, base), (left, right) in zip(self.base.items(), self.factors.values(), strict=True)}  # fmt: skip

    def keep_inside(self, gradients) -> list[torch.Tensor]:
        return list(gradients)

    def delta(self) -> Delta:
        sides = {name: (self.scale * left, right) for name, (left, right) in self.factors.items()}
        return Delta(
            weights={
                f"{name}.{side}": one for name, pair in sides.items() for side, one in zip(("left", "right"), pair)
            }
        )


class Keep:
    """What is to stay: rows whose predictions are held to the untouched model's, and held-out rows that measure it.

    Args:
        keep: tasks or their names. Rows of split "fit" are held, rows of "select" measured (all rows of a task without
            splits).
        run: (rows, weights) -> logits. at: for changes of activations: rows without a span that is named here are left
            out, because nothing acts on them; of plain texts the first third counts as prompt.
    """

    def __init__(self, model, keep, weight: float, run=None, at=()):
        keep = [keep] if isinstance(keep, (str, Task)) else list(keep or [])
        self.weight, self.run = weight, run or (lambda rows, weights: forward(model, rows.prompts(), weights))
        wanted = {one.position for one in at if isinstance(one.position, str)}
        sides = []
        for split in ("fit", "select"):
            found = [Rows.of(model, task, split, begun=1 / 3 if at else 0.0) for task in keep]
            found = [rows.take([i for i, own in enumerate(rows.spans) if wanted <= set(own)]) for rows in found]
            sides.append([rows for rows in found if len(rows)])
        self.held, self.measured = sides
        self.before = [predictions(model, rows) for rows in self.held]
        self.measured_before = [predictions(model, rows) for rows in self.measured]

    def loss(self, weights, size: int, rng) -> torch.Tensor | float:
        """weight * mean KL over some rows of each task."""
        total = 0.0
        for rows, before in zip(self.held, self.before, strict=True):
            which = torch.randperm(len(rows), generator=rng)[:size].tolist()
            part = rows.take(which)
            total = total + kl_from(part, self.run(part, weights), [before[i] for i in which]) / len(self.held)
        return self.weight * total

    @torch.no_grad()
    def collateral(self, weights) -> float:
        """Mean KL on the rows that measure, in nats per token; the largest over the tasks."""
        found = [0.0]
        for rows, before in zip(self.measured, self.measured_before, strict=True):
            done, parts = 0, []
            for part in rows.parts():
                parts.append(float(kl_from(part, self.run(part, weights), before[done : done + len(part)])) * len(part))
                done += len(part)
            found.append(sum(parts) / len(rows))
        return max(found)


def check_settings(**settings) -> None:
    """Refuse numbers of steps and rows with which nothing would be learnt, before anything is read.

    Raises:
        ValueError: naming the first that is no whole number from 1.
    """
    for name, value in settings.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: give a whole number from 1.")


def learn(leaves, gradients, check, *, steps: int, lr: float, decay: float = 0.0, every: int = 20, patience: int = 4,
          budget: float, enough: float, what: str, progress: bool):  # fmt: skip
    """Adam on `leaves`, in place; at the end they are those of the best step: least target with collateral within budget.

    Args:
        gradients: step -> (loss, gradients of the leaves). check: () -> {"target": lower is better, "collateral": KL}.
        decay: of the leaves towards zero, which is to say of weights towards what they were.
        every: steps between checks; after `patience` checks without progress, or with target <= enough, it stops.
    Returns:
        A table with one row per check.
    Raises:
        ValueError: when no step was within the budget; for a loss that is no number.
    """
    adam, best, waited, table = torch.optim.Adam(leaves, lr), None, 0, []
    loss = float("nan")
    with steps_bar(steps, what, progress) as bar:
        for step in range(steps + 1):
            if step and (step % every == 0 or step == steps):
                figures = check()
                table.append({"step": step, "loss": loss, **figures})
                fits = figures["collateral"] <= budget
                if fits and (best is None or figures["target"] < best[0] - 1e-4):
                    best, waited = (figures["target"], [one.detach().clone() for one in leaves], step), 0
                else:
                    waited += 1
                if (fits and figures["target"] <= enough) or waited >= patience:
                    break
            if step == steps:
                break
            value, found = gradients(step)
            loss = float(value)
            if not math.isfinite(loss):
                raise ValueError(
                    f"The loss became {loss} at step {step}; nothing was changed. Try a smaller lr than {lr:g}."
                )
            norm = torch.stack([one.norm() for one in found]).norm()
            for leaf, one in zip(leaves, found, strict=True):
                leaf.grad = one * min(1.0, CLIP / float(norm + 1e-12))
            adam.step()
            if decay:
                with torch.no_grad():
                    for leaf in leaves:
                        leaf.mul_(1 - lr * decay)
            bar.update(1)
    if best is None:
        least = min(row["collateral"] for row in table)
        raise ValueError(f"No step kept the KL on what is to stay within budget={budget:g} (least {least:.3g}), so nothing was "
                         f"changed. Try a smaller lr than {lr:g}, a larger keep_weight, other components, or a larger budget.")  # fmt: skip
    with torch.no_grad():
        for leaf, one in zip(leaves, best[1], strict=True):
            leaf.copy_(one)
    import pandas as pd

    found = pd.DataFrame(table)
    found["kept"] = found["step"] == best[2]
    return found


def train_weights(change, loss, check, seed: int, **settings) -> Delta:
    """`learn` on changes of weights: loss(weights, rng) and check(weights) see the changed weights."""
    rng = torch.Generator().manual_seed(seed)

    def gradients(step):
        with torch.enable_grad():
            value = loss(change.weights(), rng)
            found = torch.autograd.grad(value, change.leaves, allow_unused=True)
        return value.detach(), change.keep_inside([torch.zeros_like(leaf) if one is None else one
                                                   for one, leaf in zip(found, change.leaves, strict=True)])  # fmt: skip

    @torch.no_grad()
    def checked():
        return check(change.weights())

    history = learn(change.leaves, gradients, checked, **settings)
    made = change.delta()
    object.__setattr__(made, "history", history)
    return made


def _base(weight, name: str, start: Delta | None) -> torch.Tensor:
    base = weight.detach().float()
    return base + start.difference(name).to(base) if start is not None and name in start.names else base
