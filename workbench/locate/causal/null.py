"""What a score reaches when nothing of what is traced is carried: other pairs' prompts, changes as large, other components."""

from __future__ import annotations

import numpy as np
import torch

from workbench.component import Component
from workbench.model.sweep import Run
from workbench.task import Pairs

DRAWS = 2


def draws_of(null) -> int:
    """How often the null is drawn: True is the default, False never.

    Raises:
        ValueError: for 1, of which no spread can be told, or less than 0.
    """
    draws = DRAWS if null is True else int(null)
    if draws == 1 or draws < 0:
        raise ValueError(f"null={null!r}: give False for none, True for {DRAWS} draws, or a number of draws from 2 on.")
    return draws


def partners(pairs: Pairs, base: list, batches: list[list[int]], draws: int, seed: int) -> list[list[int] | None]:
    """For each pair others of its batch to take the null's activations from, one per draw; None where there is no choice.

    They have the same length (so that positions agree), the same template and another word at the cause, where at least
    two such are there. Draws are independent: the spread between them is that of a further one.
    """
    rng = np.random.default_rng(seed)
    found: list[list[int] | None] = [None] * len(base)
    templates = pairs.task.column("template")
    for group in batches:
        for i in group:
            others = [j for j in group if j != i and len(base[j]) == len(base[i])]
            alike = [j for j in others if templates[j] == templates[i]]
            alike = alike if len(alike) > 1 else others
            cause = pairs.clean[i] != pairs.corrupted[i]
            differ = [j for j in alike if (base[j] != base[i])[cause].any()]
            differ = differ if len(differ) > 1 else alike
            if len(differ) > 1 and draws:
                found[i] = rng.choice(differ, draws).tolist()
    return found


def donors(others, group: list[int], draw: int) -> torch.Tensor:
    """From which place of the group each of its pairs takes its null in one draw; its own where there is no choice."""
    return torch.tensor([group.index(others[i][draw]) if others[i] else k for k, i in enumerate(group)])


def as_far(names, base: Run, source: Run, donors, seed: int) -> Run:
    """The base activations, changed as far as the source's are away, in a random direction: per component and position."""
    rng = torch.Generator().manual_seed(seed)
    donors, acts = torch.as_tensor(donors), {}
    for site, old in base.acts.items():
        if site not in source.acts:
            continue
        kind = site[0]
        units = (names.size(kind) or 1) if kind != "feature" else old.shape[-1]
        change = (source.acts[site][donors].to(old) - old).unflatten(-1, (units, -1))
        if kind == "attn_scores":  # what the causal mask has ruled out is no part of it
            change = torch.where(change.abs() < torch.finfo(old.dtype).max / 4, change, 0)
        direction = torch.randn(change.shape, generator=rng).to(old)
        length = change.norm(dim=-1, keepdim=True) / direction.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        acts[site] = old + (direction * length).flatten(-2)
    return base.with_acts(acts)


def matched(model, chosen: list[Component], pool: list[Component], draws: int, seed: int) -> list[list[Component]]:
    """Sets of components to compare a set with: as many, of the same kinds and layers, none of them chosen.

    Where a layer has too few others, the nearest layers help out.

    Returns:
        One list per draw; none where the pool has too few.
    """
    rng, found, own = np.random.default_rng(seed), [], {one.at(None) for one in chosen}
    pool = [one.at(None) for one in pool if one.at(None) not in own]
    for _ in range(draws):
        taken: dict[Component, Component] = {}
        for one in chosen:
            free = [other for other in pool if other.kind == one.kind and other not in taken]
            if not free:
                return []
            near = min(abs(other.layer - one.layer) for other in free)
            free = [other for other in free if abs(other.layer - one.layer) == near]
            other = free[rng.integers(len(free))]
            taken[other] = other.at(one.position)
        found.append(list(taken.values()))
    return found
