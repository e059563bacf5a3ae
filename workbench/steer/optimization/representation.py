"""Learned changes of activations: LoReFT, added vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.component import SINGLE, components
from workbench.intervention import Intervention
from workbench.model.plan import Edits
from workbench.operations import Add, Affine
from workbench.steer.optimization.learning import Keep, check_settings, learn
from workbench.steer.optimization.rows import Rows, kl_from
from workbench.steer.optimization.tuning import fit_and_held


@dataclass(frozen=True, eq=False, kw_only=True)
class Learned(Intervention):
    """A change that is being learnt: `function(x, which)` gives the new activations, with gradients to its tensors."""

    function: object = None

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return self.function(x, which)


def loreft(model, task, at, *, rank: int = 4, keep=("background",), keep_weight: float = 1.0, budget: float = 0.05,
           phase: str | None = None, steps: int = 200, lr: float = 4e-3, batch: int = 16, every: int = 20, patience: int = 4,
           enough: float = 0.01, seed: int = 0, progress: bool = True) -> Affine:  # fmt: skip
    """Which change within a small space of the stream brings this behaviour? h + R^T (W h + b - R h), learnt.

    R has orthonormal rows. No weight changes: the result is an intervention at these components and positions. At a
    position it acts on prompts only, so that what is to stay is held where the task and `keep` both have it.

    Args:
        at: components with one place in the stream or what is added to it, such as "resid_post.3@-1" or
            ["resid_post.2@subject", "resid_post.4@-1"]; each gets a map of its own.
        rank: of the space; phase: "prompt", "generation" or "both".
        The rest as for `finetune`; tasks to keep need the spans that `at` names.
    Returns:
        Affine with A = I - R^T R + R^T W and R^T b; `history` is a table of all checks.
    Source:
        Wu et al. 2024, "ReFT: representation finetuning for language models", eq. 2.
    """
    check_settings(steps=steps, every=every, batch=batch, patience=patience)
    places, width = _places(model, at)
    if not 1 <= rank <= width:
        raise ValueError(f"rank={rank} does not fit a width of {width}: choose 1 to {width}.")
    rng = torch.Generator().manual_seed(seed)
    raw = [torch.randn(width, rank, generator=rng) for _ in places]
    spread = [torch.randn(rank, width, generator=rng) / width**0.5 * 0.1 for _ in places]
    learned = [*(torch.linalg.qr(one).Q for one in raw), *spread, *(torch.zeros(rank) for _ in places)]
    leaves = [one.to(model.hf.device).requires_grad_(True) for one in learned]
    n = len(places)

    def maps(which: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """R [rank, width], W, b; R made orthonormal from what is learnt, W being what is added to R."""
        basis = torch.linalg.qr(leaves[which]).Q.T
        return basis, basis + leaves[n + which], leaves[2 * n + which]

    def function(x, which):
        basis, new, bias = maps(which)
        return x + ((x.float() @ (new - basis).T + bias) @ basis).to(x.dtype)

    history = _train(model, task, Learned(places, phase=phase, function=function), leaves, keep, keep_weight, seed, batch,
                     steps=steps, lr=lr, every=every, patience=patience, budget=budget, enough=enough, what="LoReFT",
                     progress=progress)  # fmt: skip
    with torch.no_grad():
        found = [maps(which) for which in range(n)]
        matrix = torch.stack([torch.eye(width).to(basis) + basis.T @ (new - basis) for basis, new, _ in found])
        bias = torch.stack([bias @ basis for basis, _, bias in found])
    made = Affine(places, matrix=matrix.cpu(), bias=bias.cpu(), phase=phase)
    object.__setattr__(made, "history", history)
    return made


def steering_vector(model, task, at, *, keep=("background",), keep_weight: float = 1.0, budget: float = 0.05,
                    phase: str | None = None, steps: int = 200, lr: float = 0.1, batch: int = 16, every: int = 20,
                    patience: int = 4, enough: float = 0.01, seed: int = 0, progress: bool = True) -> Add:  # fmt: skip
    """Which one vector, added here, brings this behaviour? Learnt by gradient.

    Args:
        at: one component, such as "resid_post.3@-1" or "resid_post.3" (every token).
        lr: of Adam, in units of the root mean square of the activations there.
        The rest as for `loreft`.
    Returns:
        Add with strength 1; `history` is a table of all checks.
    Source:
        Subramani et al. 2022, "Extracting latent steering vectors"; the task's loss in place of one sentence's.
    """
    check_settings(steps=steps, every=every, batch=batch, patience=patience)
    places, width = _places(model, at)
    if len(places) > 1:
        raise ValueError(
            f"A vector is added at one component; got {', '.join(map(str, places))}. Use bias_only for several."
        )
    (made,) = _vectors(model, task, places, width, keep, keep_weight, phase, seed, batch, steps=steps, lr=lr, every=every,
                       patience=patience, budget=budget, enough=enough, what="vector", progress=progress)  # fmt: skip
    return made


def bias_only(model, task, at=("attn_out.*", "mlp_out.*"), *, keep=("background",), keep_weight: float = 1.0,
              budget: float = 0.05, phase: str | None = None, steps: int = 200, lr: float = 0.05, batch: int = 16,
              every: int = 20, patience: int = 4, enough: float = 0.01, seed: int = 0, progress: bool = True) -> list[Add]:  # fmt: skip
    """What do added vectors at several components bring, as biases would? One `Add` for each, learnt together.

    Args and Returns as for `steering_vector`, for a list: `wb.Recipe(found)` is all of them.
    Source:
        Ben Zaken et al. 2022 (BitFit); the baseline "h + b" of Wu et al. 2024.
    """
    check_settings(steps=steps, every=every, batch=batch, patience=patience)
    places, width = _places(model, at)
    return _vectors(model, task, places, width, keep, keep_weight, phase, seed, batch, steps=steps, lr=lr, every=every,
                    patience=patience, budget=budget, enough=enough, what="biases", progress=progress)  # fmt: skip


def _vectors(model, task, places, width, keep, keep_weight, phase, seed, batch, **settings) -> list[Add]:
    rows, _ = fit_and_held(model, task)
    first = rows.take(range(min(len(rows), 32)))
    scale = [_size(model, first, one) for one in places]
    leaves = [torch.zeros(width, device=model.hf.device, requires_grad=True) for _ in places]
    add = Learned(places, phase=phase, function=lambda x, which: x + (scale[which] * leaves[which]).to(x.dtype))
    history = _train(model, task, add, leaves, keep, keep_weight, seed, batch, **settings)
    made = [
        Add(one, vector=(size * leaf).detach().cpu(), phase=phase)
        for one, leaf, size in zip(places, leaves, scale, strict=True)
    ]
    for one in made:
        object.__setattr__(one, "history", history)
    return made


def _train(model, task, change: Learned, leaves, keep, keep_weight, seed, batch, **settings):
    rows, held = fit_and_held(model, task)
    rng = torch.Generator().manual_seed(seed)
    staying = Keep(model, keep, keep_weight, run=lambda part, _: _logits(model, part, change), at=change.at)

    def gradients(step):
        parts = [(rows.draw(batch, rng), None, 1.0)]
        for own, before in zip(staying.held, staying.before, strict=True):
            which = torch.randperm(len(own), generator=rng)[:batch].tolist()
            parts.append((own.take(which), [before[i] for i in which], keep_weight / len(staying.held)))
        total, found = 0.0, [torch.zeros_like(leaf) for leaf in leaves]
        for part, before, weight in parts:
            value, slopes = _slopes(model, part, change, leaves, before)
            total += weight * float(value)
            found = [old + weight * new for old, new in zip(found, slopes, strict=True)]
        return total, found

    def check():
        parts = [(float(part.nll(_logits(model, part, change))), len(part)) for part in held.parts()]
        return {"target": sum(x * n for x, n in parts) / len(held), "collateral": staying.collateral(None)}

    return learn(leaves, gradients, check, **settings)


def _slopes(model, part: Rows, change: Learned, leaves, before):
    """Loss (KL, where untouched predictions are given) and its gradients, in one pass with the change."""
    prompts = part.prompts()
    run = Edits(model.names, [change], prompts)

    def body():
        with torch.enable_grad():
            logits = run.visit_logits()
            value = part.nll(logits) if before is None else kl_from(part, logits, before)
            found = torch.autograd.grad(value, leaves, allow_unused=True)
        return value.detach(), [
            torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)
        ]

    return model.trace(model.inputs(prompts), body)


def _logits(model, part: Rows, change: Learned) -> torch.Tensor:
    prompts = part.prompts()
    return model.trace(model.inputs(prompts), Edits(model.names, [change], prompts).visit_logits)


def _places(model, at):
    """The components, and how wide they are.

    Raises:
        ValueError: for components of different widths, neurons and features, which are single numbers.
    """
    places = model.names.expand(components(at))
    if any(one.kind in (*SINGLE, "router", "attn_scores", "pattern") for one in places):
        raise ValueError(
            f"Changes of activations are learnt for vectors, such as 'resid_post.3@-1' or 'z.4.2'; got {places[0]}."
        )
    widths = {model.names.d_head if one.kind in ("q", "k", "v", "z") else model.names.d_model for one in places}
    if len(widths) > 1:
        raise ValueError("These components have different widths; learn them apart.")
    return places, widths.pop()


def _size(model, rows: Rows, one) -> float:
    """The root mean square of the activations at a component."""
    prompts = rows.prompts()
    if one.position is not None:
        return float(model.activations(prompts, one).square().mean().sqrt())
    return float(torch.cat([model.activations([ids], one)[0] for ids in prompts.ids]).square().mean().sqrt())
