"""Controls: recipes that do the same at random, so that what any change would do is told from what this one does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from workbench.component import SINGLE, Component
from workbench.intervention import Intervention
from workbench.operations import Add, Affine, Delta, Mean, ProjectOut, Replace
from workbench.recipe import Recipe
from workbench.report import AIMS, Aim
from workbench.steer.vector.reading import both_sides, states
from workbench.task import Task

ROWS = 64  # of the target, for means at other places
STREAM = ("embed", "resid_pre", "resid_mid", "resid_post")


def random_controls(model, recipe: Recipe, target: Task, shortest: int, draws: int, seed: int,
                    aim: Aim = AIMS["answer"]) -> dict[str, Recipe]:  # fmt: skip
    """The best of `draws` random recipes of each kind, by what they do to the target.

    "random direction": every vector replaced by a random one of equal norm, every difference of weights by a random one of
    equal norm in the same entries; an affine map moves the target's mean as far, and what differs from it as much, in
    directions turned at random. "random components": every place replaced by a random other one of its kind (means by the
    means there); for the stream, which every layer shares, by another position of the prompt. "shuffled labels": differences
    of means fitted again on the same states, as if their labels meant nothing.

    Args:
        target: the rows that the best draw is chosen by; shortest: tokens of the shortest prompt that it must act on.
        aim: what "best" means: the largest mean logit difference, or the smallest mean gap.
    Returns:
        Label -> recipe; a kind that does not apply is left out.
    """
    rng, found = np.random.default_rng(seed), {}
    means = _Means(model, target[:ROWS])
    for label, make in (
        ("random direction", _direction),
        ("random components", _components),
        ("shuffled labels", _shuffled),
    ):
        made = [make(model, recipe, rng, shortest, means) for _ in range(draws)]
        made = [one for one in made if one is not None]
        if made:
            best = max(made, key=lambda one: aim.better * target.score(model, one, metric=aim.moved).mean())
            found[f"{label} (best of {len(made)})"] = best
    return found


def tuning_controls(recipe: Recipe, given=()) -> tuple[dict[str, Recipe], dict[str, str]]:
    """The recipe with its tuned weights tuned again elsewhere: whatever `controls` the tuning brought with it.

    Args:
        given: names that are there already; these are not trained again.
    Returns:
        Label -> recipe, and label -> why, for a tuning that did not succeed, or several in one recipe.
    """
    tuned = [one for one in recipe if getattr(one, "controls", None)]
    names = dict.fromkeys(name for one in tuned for name in one.controls if name not in given)
    if len(tuned) > 1:  # all weights tuned twice, or half of what is tested beside a random half, would be no control
        why = f"{len(tuned)} changes of this recipe were tuned; tune them elsewhere together and give that as controls="
        return {}, dict.fromkeys(names, why)
    found, missing = {}, {}
    for name in names:
        try:
            found[name] = Recipe(tuple(one.controls[name]() if one is tuned[0] else one for one in recipe))
        except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
            missing[name] = f"{error} (retrain=False leaves tuning controls out)"
    return found, missing


class _Means:
    """Mean activations over both sides of the target, read once for each family."""

    def __init__(self, model, target: Task):
        self.model, self.target, self.known = model, target, {}

    def at(self, places) -> torch.Tensor:
        """[place, width]"""
        for one in places:
            if one not in self.known:
                found = states(self.model, both_sides(self.model, self.target), [one, *_family(self.model, one)])
                self.known |= {place: x.mean(0).float().cpu() for place, x in found.items()}
        return torch.stack([self.known[one] for one in places])


def _family(model, at: Component) -> list[Component]:
    """Every component of this kind, at the same position; of the stream only this one."""
    wild = {name: "*" for name in ("layer", "index") if getattr(at, name) is not None}
    return [at] if at.kind in STREAM else model.names.expand([replace(at, **wild)])


def _turned(one: Affine, means: _Means, rng) -> Affine:
    """x + M x + b with its effect on the target's mean m, and on what differs from it, turned by a random rotation Q:
    x + Q (M Q' (x - m) + M m + b)."""
    matrices, biases = [], []
    which = [(i, place) for i, family in enumerate(one.at) for place in means.model.names.expand([family])]
    places = tuple(place for _, place in which)
    for (i, _), m in zip(which, means.at(places).double(), strict=True):
        change = (one.matrix if one.matrix.dim() == 2 else one.matrix[i]).cpu().double() - torch.eye(len(m)).double()
        shift = change @ m + (one.bias if one.bias.dim() == 1 else one.bias[i]).cpu().double()
        turn = torch.linalg.qr(torch.as_tensor(rng.standard_normal((len(m), len(m))))).Q
        around = turn @ change @ turn.T
        matrices.append(torch.eye(len(m)) + around.to(one.matrix.dtype))
        biases.append((turn @ shift - around @ m).to(one.bias.dtype))
    return replace(one, at=places, matrix=torch.stack(matrices), bias=torch.stack(biases))


def _like(old: torch.Tensor, rng) -> torch.Tensor:
    """Random numbers of the same norm, where the old ones are not zero."""
    new = torch.as_tensor(rng.standard_normal(old.shape), dtype=old.dtype) * (old != 0)
    return new * (old.norm() / new.norm().clamp(min=1e-12))


def _direction(model, recipe: Recipe, rng, shortest: int, means: _Means) -> Recipe | None:
    made, changed = [], False
    for one in recipe:
        if isinstance(one, Delta):
            full = {name: one.difference(name) for name in one.names}
            one, changed = replace(one, weights={n: _like(x, rng) for n, x in full.items()}, strength=1.0), True
        if isinstance(one, Affine):
            one, changed = _turned(one, means, rng), True
        name = {Add: "vector", ProjectOut: "direction"}.get(type(one))
        if name:
            old = getattr(one, name)
            new = torch.as_tensor(rng.standard_normal(old.shape), dtype=old.dtype)
            one, changed = replace(one, **{name: new / new.norm() * old.norm()}), True
        made.append(one)
    return Recipe(tuple(made)) if changed else None


def _shuffled(model, recipe: Recipe, rng, shortest: int, means: _Means) -> Recipe | None:
    """Not made as long as the recipe's: states of one side differ most by how much they hold of the same direction, so at
    equal length this would often be the recipe itself. Random directions are as long."""
    made, changed = [], False
    for one in recipe:
        if hasattr(one, "fitted_on"):
            states, positive = one.fitted_on
            order = torch.as_tensor(rng.permutation(len(states)))
            new = states[order[:positive]].mean(0) - states[order[positive:]].mean(0)
            one, changed = replace(one, vector=new.to(one.vector)), True
        made.append(one)
    return Recipe(tuple(made)) if changed else None


def _components(model, recipe: Recipe, rng, shortest: int, means: _Means) -> Recipe | None:
    made, changed = [], False
    for one in recipe:
        places = []
        for at in one.at:
            others = [x for x in _others(model, one, at, shortest) if x not in one.at and x not in places]
            changed |= bool(others)
            places.append(others[rng.integers(len(others))] if others else at)
        if isinstance(one, Mean) and tuple(places) != one.at:
            values = means.at(places).to(one.values.dtype)
            made.append(replace(one, at=tuple(places), values=values[:, 0] if places[0].kind in SINGLE else values))
        else:
            made.append(replace(one, at=tuple(places)) if one.at else one)
    return Recipe(tuple(made)) if changed else None


def _others(model, one: Intervention, at: Component, shortest: int) -> list[Component]:
    """Where else the same change could be made."""
    if type(one) is Replace or (isinstance(one, Mean) and at.kind in STREAM):  # its values belong to this place
        return []
    if isinstance(one, Mean) and any(place.is_family for place in one.at):  # one value for places that stay
        return []
    if at.kind in STREAM:  # positions that every prompt has, counted from the end
        return [at.at(p) for p in range(-shortest, 0)] if at.position is not None else []
    if at.is_family:
        return []
    found = _family(model, at)
    return found if one.gate is None else [other for other in found if one.gate.before(other)]
