"""Arithmetic with weights: what training added, added again, taken away, or merged with what another training added."""

from __future__ import annotations

import math

import torch

from workbench.operations import Delta


def task_vector(base, tuned) -> Delta:
    """What did fine-tuning add? The difference of two models' weights, parameter by parameter.

    `v` makes the base model the tuned one, `-v` takes away what was learnt, `0.5 * v` goes half-way, and `v + w` adds two.

    Args:
        base, tuned: two models of one architecture, or two checkpoints of one.
    Returns:
        Delta with the parameters that differ.
    Raises:
        ValueError: for models whose parameters differ in name or shape, or not at all.
    Source:
        Ilharco et al. 2023, "Editing models with task arithmetic".
    """
    old, new = (dict(one.hf.named_parameters()) for one in (base, tuned))
    unlike = [
        name for name in {**old, **new} if getattr(old.get(name), "shape", 0) != getattr(new.get(name), "shape", 0)
    ]
    if unlike:
        raise ValueError(f"The two models differ in the shape or presence of {unlike[0]!r} ({len(unlike)} parameters in all). A task "
                         "vector needs one architecture: a model and its fine-tuned version, or two checkpoints.")  # fmt: skip
    weights = {name: new[name].detach().float().cpu() - value.detach().float().cpu() for name, value in old.items()}
    weights = {name: difference for name, difference in weights.items() if difference.any()}
    if not weights:
        raise ValueError("The two models have the same weights, so there is no difference to add.")
    return Delta(weights=weights)


def ties(deltas, *, keep: float = 0.2) -> Delta:
    """How can several differences be merged without blurring each other? Trim, elect signs, merge (TIES).

    Of each difference the largest entries are kept; each entry's sign is the one with more mass behind it; the mean is taken
    over those that have this sign.

    Args:
        deltas: several, each at its strength. keep: the share of entries kept, over all parameters of a difference together.
    Returns:
        Delta with strength 1.
    Source:
        Yadav et al. 2023, "TIES-merging", section 3, algorithm 1.
    """
    deltas = _several(deltas)
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}: give a share above 0, up to 1.")
    shapes = {name: delta.difference(name).shape for delta in deltas for name in delta.names}
    flat = torch.stack([_trimmed(delta, shapes, keep) for delta in deltas])
    mass = flat.sum(0)
    sign = torch.where(
        mass == 0, mass.sum().sign(), mass.sign()
    )  # as the authors' code does where signs cancel exactly
    agree = (flat.sign() == sign) & (flat != 0)
    merged = (flat * agree).sum(0) / agree.sum(0).clamp(min=1)
    parts = merged.split([math.prod(shape) for shape in shapes.values()])
    return Delta(weights={name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)})


def dare(delta: Delta, *, drop: float = 0.9, seed: int = 0) -> Delta:
    """How much of a difference is needed? Entries are dropped at random and the rest enlarged by 1 / (1 - drop) (DARE).

    On average over draws it is the difference itself. Large differences do not survive it; small ones, as fine-tuning makes
    them, mostly do. Several can then be added (`a + b`) or merged (`ties`) with fewer collisions.

    Args:
        delta: at its strength. drop: the share dropped, from 0 to below 1.
    Returns:
        Delta with strength 1.
    Source:
        Yu et al. 2024, "Language models are super Mario", section 3.
    """
    (delta,) = _several([delta])
    if not 0 <= drop < 1:
        raise ValueError(f"drop={drop}: give a share from 0 to below 1.")
    rng, weights = torch.Generator().manual_seed(seed), {}
    for name in delta.names:
        value = delta.difference(name)
        weights[name] = value * (torch.rand(value.shape, generator=rng) >= drop) / (1 - drop)
    return Delta(weights=weights)


def _several(deltas) -> list[Delta]:
    deltas = [deltas] if isinstance(deltas, Delta) else list(deltas)
    for one in deltas:
        if not isinstance(one, Delta):
            raise TypeError(
                f"Only differences of weights (wb.Delta, for example of task_vector) merge; got {type(one).__name__}."
            )
    if not deltas:
        raise ValueError("No difference was given.")
    return deltas


def _trimmed(delta: Delta, shapes: dict, keep: float) -> torch.Tensor:
    """All entries in one row, zero where a parameter is not in it or an entry is not among the largest."""
    own = set(delta.names)
    flat = torch.cat(
        [delta.difference(n).flatten() if n in own else torch.zeros(math.prod(s)) for n, s in shapes.items()]
    )
    inside = sum(math.prod(shapes[name]) for name in own)
    limit = flat.abs().topk(math.ceil(keep * inside)).values[-1]
    return flat * (flat.abs() >= limit)
