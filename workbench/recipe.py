"""Interventions together, with where they came from; saved as JSON beside safetensors, never pickle."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from workbench.component import Component
from workbench.intervention import Intervention

VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Several interventions as one value: apply, evaluate, save, share.

    Interventions are kept in forward order. Two that act on the same tensor keep the order they were given in.

    Attributes:
        interventions: a list of interventions or recipes.
        name: one line for people.
        fingerprint: of the model it was made for (`model.fingerprint`); "" fits any model.
        notes: provenance, plain JSON values.
    """

    interventions: tuple[Intervention, ...]
    name: str = ""
    fingerprint: str = ""
    notes: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        made_for = {self.fingerprint, *_fingerprints(self.interventions)} - {""}
        if len(made_for) > 1:
            raise ValueError(f"These recipes were made for different models: {', '.join(sorted(made_for))}.")
        object.__setattr__(self, "fingerprint", "".join(made_for))
        object.__setattr__(self, "notes", dict(self.notes))
        flat = flatten(self.interventions)
        object.__setattr__(self, "interventions", tuple(sorted(flat, key=lambda one: min(_site(c) for c in one.at))))

    def __iter__(self):
        return iter(self.interventions)

    def __len__(self) -> int:
        return len(self.interventions)

    def __add__(self, other: Intervention | Recipe) -> Recipe:
        if not isinstance(other, (Intervention, Recipe)):
            return NotImplemented
        return replace(self, interventions=(*self.interventions, other))

    def __radd__(self, other: Intervention) -> Recipe:
        return replace(self, interventions=(other, *self.interventions))

    def __repr__(self) -> str:
        return f"Recipe([{', '.join(map(repr, self.interventions))}], name={self.name!r})"

    def for_model(self, model) -> Recipe:
        """The same recipe, stamped with the fingerprint of the model it belongs to."""
        return replace(self, fingerprint=model.fingerprint)

    def save(self, folder) -> Path:
        """Write `recipe.json` and `tensors.safetensors` into `folder`: all of it, or nothing."""
        from safetensors.torch import save_file

        folder = Path(folder)
        entries, tensors = [], {}
        for i, one in enumerate(self.interventions):
            plain, own = one.to_dict()
            entries.append(plain)
            tensors |= {f"{i}.{name}": tensor.contiguous().clone() for name, tensor in own.items()}
        about = {"version": VERSION, "name": self.name, "fingerprint": self.fingerprint, "notes": self.notes}
        text = json.dumps({**about, "interventions": entries}, indent=2) + "\n"
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".recipe-"))
        try:
            (draft / "recipe.json").write_text(text, encoding="utf-8")
            save_file(tensors, draft / "tensors.safetensors")
            folder.mkdir(exist_ok=True)
            for file in ("tensors.safetensors", "recipe.json"):
                os.replace(draft / file, folder / file)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return folder

    @classmethod
    def load(cls, folder) -> Recipe:
        """Read a recipe back.

        Raises:
            FileNotFoundError: when `folder` holds no recipe.
            ValueError: for a recipe of a newer version, or an operation this version does not know.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / "recipe.json").is_file():
            raise FileNotFoundError(f"{folder} holds no recipe.json. Recipe.load takes the folder that save() wrote.")
        about = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        if about.get("version", 0) > VERSION:
            raise ValueError(f"{folder} was written by a newer version ({about['version']}); this one reads {VERSION}.")
        tensors = load_file(folder / "tensors.safetensors")
        own = [{k.split(".", 1)[1]: t for k, t in tensors.items() if k.startswith(f"{i}.")}
               for i in range(len(about["interventions"]))]  # fmt: skip
        made = [Intervention.from_dict(plain, t) for plain, t in zip(about["interventions"], own, strict=True)]
        return cls(tuple(made), about["name"], about["fingerprint"], about["notes"])


def flatten(interventions) -> tuple[Intervention, ...]:
    """Interventions and recipes, nested or not, as a flat tuple.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(interventions, (Intervention, Recipe)):
        interventions = [interventions]
    flat = []
    for one in interventions:
        if isinstance(one, Intervention):
            flat.append(one)
        elif isinstance(one, (Recipe, list, tuple)):
            flat.extend(flatten(one.interventions if isinstance(one, Recipe) else one))
        else:
            raise TypeError(f"{one!r} is no intervention. Build one, for example wb.Zero('z.4.2').")
    return tuple(flat)


def _fingerprints(interventions) -> set[str]:
    """Of all recipes nested in it."""
    if isinstance(interventions, Recipe):
        return {interventions.fingerprint}
    if isinstance(interventions, (list, tuple)):
        return set().union(*map(_fingerprints, interventions))
    return set()


def _site(component: Component) -> Component:
    return replace(component.canonical, index=None, position=None)


# `a + b` of two interventions is a recipe; said here, because imports run from interventions to recipes only.
Intervention.__add__ = lambda self, other: Recipe((self,)) + other
