"""Interventions together, with where they came from; saved as JSON beside safetensors, never pickle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from workbench import storage
from workbench.intervention import Intervention


@dataclass(frozen=True)
class Recipe:
    """Several interventions as one value: apply, evaluate, save, share.

    Interventions are kept in forward order, changes of weights first. Two that act on the same tensor keep the order they
    were given in.

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
        object.__setattr__(self, "interventions", tuple(sorted(flat, key=_first)))

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
        entries, tensors = [], {}
        for i, one in enumerate(self.interventions):
            plain, own = one.to_dict()
            entries.append(plain)
            tensors |= {f"{i}.{name}": tensor for name, tensor in own.items()}
        about = {"name": self.name, "fingerprint": self.fingerprint, "notes": self.notes, "interventions": entries}
        return storage.write(folder, {"tensors.safetensors": tensors, "recipe.json": about})

    def bake(self, model, folder, dtype=None) -> Path:
        """Write an ordinary Hugging Face checkpoint, with its tokenizer, that does what the recipe does: all of it, or nothing.

        Plain transformers loads it; embeddings are untied where they must be, and `baked.json` says what was folded. See
        `workbench.model.bake`.

        Args:
            folder: new, empty, or an earlier result of `bake`.
            dtype: of the weights; None is float32.
        Raises:
            ValueError: listing what does not fold into the weights, why, and what to type instead.
        """
        _model_first(model, "recipe.bake(model, folder)")
        return model.bake(self, folder, **({} if dtype is None else {"dtype": dtype}))

    def to_code(self, model, folder=None, name: str | None = None) -> str:
        """The recipe as a plain nnsight script, without this package. See `workbench.model.code`.

        Args:
            folder: saves the recipe there and puts the script beside it as `code.py`; None only returns the text.
            name: what transformers loads the model by; by default where the model came from.
        Raises:
            ValueError: listing what no script is written for.
        """
        _model_first(model, "recipe.to_code(model, folder)")
        text = model.to_code(self, name)
        if folder is not None:
            (self.save(folder) / "code.py").write_text(text, encoding="utf-8")
        return text

    def to_gguf(self, model, file, hint: str | None = None) -> Path:
        """The pushes `Add` at resid_post as a control vector file for llama.cpp. See `workbench.model.cvector`.

        Raises:
            ValueError: listing what is no push of every token after a block from 1 on.
        """
        _model_first(model, "recipe.to_gguf(model, file)")
        return model.to_gguf(self, file, hint)

    def to_peft(self, model, folder, rank: int | None = None, tolerance: float = 1e-5) -> Path:
        """The changes of weights (`Delta`) as a LoRA adapter, for `peft.PeftModel.from_pretrained(hf_model, folder)`. See
        `workbench.model.peft`.

        Args:
            model: the model of `wb.load` whose weights the recipe changes.
            folder: to write adapter_config.json and adapter_model.safetensors into, both or nothing.
            rank: the most directions a matrix may take, a whole number from 1; None for as many as it needs.
            tolerance: the share of a change that may be lost.
        Raises:
            ValueError: listing interventions on activations, and changes of higher rank with what they would lose.
        """
        _model_first(model, "recipe.to_peft(model, folder)")
        return model.to_peft(self, folder, rank, tolerance)

    @classmethod
    def from_peft(cls, model, folder) -> Recipe:
        """A LoRA adapter that peft trained, as a recipe for this model. See `workbench.model.peft`.

        Args:
            model: the base model that the adapter was trained on, from `wb.load`; without the adapter.
            folder: a local one that peft's `save_pretrained` wrote, with adapter_config.json and adapter_model.safetensors (from
                the hub: huggingface_hub.snapshot_download(name)).
        Returns:
            A recipe of one `Delta` in factors, which acts as peft runs the adapter, unmerged.
        Raises:
            FileNotFoundError: when `folder` holds no adapter.
            ValueError: listing what is no plain LoRA, and what does not fit the model.
        """
        _model_first(model, "wb.Recipe.from_peft(model, folder)")
        return model.from_peft(folder)

    @classmethod
    def load(cls, folder) -> Recipe:
        """Read a recipe back.

        Raises:
            FileNotFoundError: when `folder` holds no recipe.
            ValueError: for a recipe of a newer version, or an operation this version does not know.
        """
        about = storage.read(cls, folder, "recipe.json")
        tensors = storage.read_tensors(Path(folder) / "tensors.safetensors")
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


def _model_first(model, call: str) -> None:
    """Refuse a path, or a model of another library, where a model of `wb.load` belongs."""
    if not hasattr(model, "from_peft"):
        given = model if isinstance(model, (str, Path)) else type(model).__name__
        raise TypeError(f"{call}: first comes a model of wb.load; got {given}.")


def _fingerprints(interventions) -> set[str]:
    """Of all recipes nested in it."""
    if isinstance(interventions, Recipe):
        return {interventions.fingerprint}
    if isinstance(interventions, (list, tuple)):
        return set().union(*map(_fingerprints, interventions))
    return set()


def _first(one: Intervention) -> tuple:
    """Where it acts first; weights are changed before anything runs."""
    sites = [replace(component.canonical, index=None, position=None) for component in one.at]
    return (1, min(sites)) if sites else (0,)


# `a + b` of two interventions is a recipe; said here, because imports run from interventions to recipes only.
Intervention.__add__ = lambda self, other: Recipe((self,)) + other
