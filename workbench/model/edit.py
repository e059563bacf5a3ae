"""Weights changed for a while, and restored bit for bit."""

from __future__ import annotations

import hashlib
import threading
from contextlib import contextmanager
from functools import wraps

import torch

from workbench.model.fold import Folded, changed_by_deltas
from workbench.model.plan import check_recipe
from workbench.operations import Delta
from workbench.recipe import Recipe, flatten

LOCK = (
    threading.RLock()
)  # one trace at a time, as nnsight has it, and none while another thread has changed the weights


@contextmanager
def edited(model, *interventions):
    """Inside `with`: the model with these interventions in its weights. Afterwards, also after an error or an interrupt,
    every bit is back.

    Deltas are added; interventions on activations are folded into the weights where that is exact (see `workbench.model.fold`).
    Tied embeddings come apart for the time being where only one side changes. `with` blocks can be nested.

    Raises:
        ValueError: before anything changes, listing what does not fold, why, and what to type instead; for a weight the
            model does not have or a difference of another shape.
    """
    check_recipe(model, interventions)
    folded = Folded(model, interventions)
    acting = [one for one in flatten(interventions) if not isinstance(one, Delta) and not one.does_nothing]
    expected = model.logits(probe(model), *flatten(interventions)) if acting else None
    with swapped(model, folded.weights):
        model.__dict__["fingerprint"] = _mark(model.made_from, folded.weights) if folded.weights else model.fingerprint
        if acting:
            refuse_unequal(model.logits(probe(model)), expected, model.hf.dtype)
        yield model


@contextmanager
def swapped(model, weights: dict[str, torch.Tensor]):
    """Inside `with`: the model with other weights, by name; a bias that is not there is added. The model's own parameters
    are put aside, not overwritten, so that what comes back is what was there."""
    if weights and model.remote not in (None, "local"):
        raise ValueError("Weights change on this machine only; set model.remote = None.")
    new, made = [], {}
    for name, value in weights.items():
        path, _, attribute = name.rpartition(".")
        module = model.hf.get_submodule(path)
        if id(value) not in made:  # one tensor under two names stays one
            made[id(value)] = torch.nn.Parameter(value, requires_grad=False)
        new.append((module, attribute, module._parameters[attribute], made[id(value)]))
    with LOCK:
        before, outer = model.made_from, model.__dict__.get("fingerprint")
        try:
            if weights:
                model.made_from = (*before, model.fingerprint)
                outer = model.__dict__.pop("fingerprint")  # cached: the edited model is another one
            for module, attribute, _, value in new:
                module._parameters[attribute] = value
            yield model
        finally:
            _put_back(model, new, before, outer)


def _put_back(model, kept, before, fingerprint) -> None:
    try:
        for module, attribute, old, _ in kept:
            module._parameters[attribute] = old
        model.made_from = before
        model.__dict__.pop("fingerprint", None)
        if fingerprint is not None:
            model.__dict__["fingerprint"] = fingerprint
    except KeyboardInterrupt:  # a second one, while this was going on
        _put_back(model, kept, before, fingerprint)
        raise


def _mark(made_from, weights) -> str:
    """A fingerprint of the edited model that shows every change; that of a loaded model looks at samples only."""
    digest = hashlib.sha256(made_from[-1].encode())
    for name, one in sorted(weights.items()):
        digest.update(f"{name} {one.double().sum():.8g} {one.double().square().sum():.8g}".encode())
    return digest.hexdigest()[:16]


def with_weights(method):
    """A method of the model that takes interventions as positional arguments: Deltas among them act for this call only."""

    @wraps(method)
    def call(self, *given, **settings):
        carrying = [one for one in given if _holds_delta(one)]
        if not carrying:
            return method(self, *given, **settings)
        check_recipe(self, [one for one in given if isinstance(one, (Recipe, list, tuple))])
        rest = []
        for one in given:
            rest += [part for part in flatten(one) if not isinstance(part, Delta)] if _holds_delta(one) else [one]
        with swapped(self, changed_by_deltas(self, carrying)):
            return method(self, *rest, **settings)

    return call


def _holds_delta(one) -> bool:
    if isinstance(one, (Recipe, list, tuple)):
        return any(_holds_delta(part) for part in one)
    return isinstance(one, Delta)


def refuse_delta(interventions) -> None:
    """For functions that run with interventions on activations only.

    Raises:
        ValueError: when a change of weights is among them.
    """
    if _holds_delta(interventions):
        raise ValueError("A Delta changes weights, which this function does not do for itself. Put the call inside "
                         "`with model.edited(delta):` and leave the Delta out of its arguments.")  # fmt: skip


def probe(model) -> list[torch.Tensor]:
    """Two short rows of token ids, spread over the vocabulary, to compare two forms of a model on."""
    size = min(8, getattr(model.hf.config, "max_position_embeddings", None) or 8)
    return list(torch.arange(2 * size).mul(7919).add(11).remainder(model.hf.config.vocab_size).view(2, size))


def refuse_unequal(got: torch.Tensor, expected: torch.Tensor, dtype=torch.float32) -> float:
    """How far apart are two forms of one model, in units of the largest logit?

    Raises:
        ValueError: when it is more than rounding.
    """
    off = ((got - expected).abs().max() / expected.abs().max()).item()
    if not off < max(1e-3, 50 * torch.finfo(dtype).eps):
        raise ValueError(f"Folded into the weights, the model does not give the same logits (off by {off:.1%}); nothing was kept. "
                         "Give the interventions to the call instead: model.logits(prompt, change).")  # fmt: skip
    return off
