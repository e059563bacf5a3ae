"""Controls: recipes that do the same at random, so that what any change would do is told from what this one does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from workbench.component import Component
from workbench.intervention import Add, Delta, Intervention, ProjectOut, Replace
from workbench.recipe import Recipe
from workbench.task import Task

STREAM = ("embed", "resid_pre", "resid_mid", "resid_post")


def random_controls(model, recipe: Recipe, target: Task, shortest: int, draws: int, seed: int) -> dict[str, Recipe]:
    """The best of `draws` random recipes of each kind, by what they do to the target.

    "random direction": every vector replaced by a random one of equal norm, every difference of weights by a random one of
    equal norm in the same entries. "random components": every place replaced by a random other one of its kind; for the
    stream, which every layer shares, by another position of the prompt.

    Args:
        target: the rows that the best draw is chosen by; shortest: tokens of the shortest prompt that it must act on.
    Returns:
        Label -> recipe; a kind that does not apply is left out.
    """
    rng, found = np.random.default_rng(seed), {}
    for label, make in (("random direction", _direction), ("random components", _components)):
        made = [make(model, recipe, rng, shortest) for _ in range(draws)]
        made = [one for one in made if one is not None]
        if made:
            best = max(made, key=lambda one: target.score(model, one).mean())
            found[f"{label} (best of {len(made)})"] = best
    return found


def _like(old: torch.Tensor, rng) -> torch.Tensor:
    """Random numbers of the same norm, where the old ones are not zero."""
    new = torch.as_tensor(rng.standard_normal(old.shape), dtype=old.dtype) * (old != 0)
    return new * (old.norm() / new.norm().clamp(min=1e-12))


def _direction(model, recipe: Recipe, rng, shortest: int) -> Recipe | None:
    made, changed = [], False
    for one in recipe:
        if isinstance(one, Delta):
            full = {name: one.difference(name) for name in one.names}
            one, changed = replace(one, weights={n: _like(x, rng) for n, x in full.items()}, strength=1.0), True
        name = {Add: "vector", ProjectOut: "direction"}.get(type(one))
        if name:
            old = getattr(one, name)
            new = torch.as_tensor(rng.standard_normal(old.shape), dtype=old.dtype)
            one, changed = replace(one, **{name: new / new.norm() * old.norm()}), True
        made.append(one)
    return Recipe(tuple(made)) if changed else None


def _components(model, recipe: Recipe, rng, shortest: int) -> Recipe | None:
    made, changed = [], False
    for one in recipe:
        places = []
        for at in one.at:
            others = [x for x in _others(model, one, at, shortest) if x not in one.at and x not in places]
            changed |= bool(others)
            places.append(others[rng.integers(len(others))] if others else at)
        made.append(replace(one, at=tuple(places)) if one.at else one)
    return Recipe(tuple(made)) if changed else None


def _others(model, one: Intervention, at: Component, shortest: int) -> list[Component]:
    """Where else the same change could be made."""
    if isinstance(one, Replace):  # its values belong to this place
        return []
    if at.kind in STREAM:  # positions that every prompt has, counted from the end
        return [at.at(p) for p in range(-shortest, 0)] if at.position is not None else []
    if at.is_family:
        return []
    wild = {name: "*" for name in ("layer", "index") if getattr(at, name) is not None}
    found = model.names.expand([replace(at, **wild)])
    return found if one.gate is None else [other for other in found if one.gate.before(other)]
