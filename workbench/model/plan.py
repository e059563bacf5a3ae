"""Interventions and reads laid out along one forward pass, over a padded batch of prompts."""

from __future__ import annotations

import torch

from workbench.component import RANK, Component
from workbench.intervention import Intervention
from workbench.model.features import Features
from workbench.model.names import INSIDE, Names
from workbench.recipe import Recipe, flatten

SAME_PLACE = {"resid_mid": "attn_out"}  # kinds that live in another kind's tensor
TOKENS_PER_PASS = 8192


class Prompts:
    """Token ids of several prompts, left-padded, with what is needed to find a position again.

    Attributes:
        ids: list of 1-D LongTensors; lengths: how many of each are prompt (the rest counts as generated).
        spans: for each prompt, span name -> list of positions.
    """

    def __init__(self, ids, lengths=None, spans=None):
        self.ids = [torch.as_tensor(one, dtype=torch.long) for one in ids]
        self.lengths = list(lengths) if lengths is not None else [len(one) for one in self.ids]
        self.spans = spans or [{}] * len(self.ids)
        self.width = max(map(len, self.ids))
        self.pads = [self.width - len(one) for one in self.ids]

    def chunks(self, budget: int = TOKENS_PER_PASS):
        step = max(1, budget // self.width)
        for start in range(0, len(self.ids), step):
            part = slice(start, start + step)
            yield Prompts(self.ids[part], self.lengths[part], self.spans[part])

    def columns(self, component: Component, row: int) -> list[int]:
        """The columns of one prompt that a component's position names (all prompt columns without one).

        Raises:
            ValueError: for a position out of range, or a span nobody named.
        """
        length, at = self.lengths[row], component.position
        if at is None:
            return list(range(self.pads[row], self.pads[row] + length))
        if isinstance(at, str):
            if at not in self.spans[row]:
                known = f"Spans here: {', '.join(self.spans[row])}." if self.spans[row] else "Spans come with a task."
                raise ValueError(f"{component}: there is no span {at!r}. {known} Or give a number, such as @-1.")
            return [self.pads[row] + p for p in self.spans[row][at]]
        if not -length <= at < length:
            raise ValueError(f"{component}: position {at} is out of range; prompt {row} has {length} tokens "
                             f"(0 to {length - 1}, or -1 to {-length}).")  # fmt: skip
        return [self.pads[row] + at % length]


class Edits:
    """Interventions and reads laid out along one forward pass, for a batch of prompts.

    Raises:
        ValueError: before anything runs, for a component or position that is not there, or a recipe made for another
            model.
    """

    def __init__(self, names: Names, interventions, prompts: Prompts, read=()):
        self.names, self.prompts, self.read, self.tracked = names, prompts, list(read), None
        stops: dict[tuple[str, int | None], list] = {}
        features: dict[str, list] = {}
        for one in flatten(interventions):
            for which, family in enumerate(one.at):
                for component in names.expand([family]):
                    columns = [prompts.columns(component, row) for row in range(len(prompts.ids))]
                    if component.kind in INSIDE and one.phase == "generation":
                        raise ValueError(f"{component} can be changed in the prompt only: give phase='prompt'.")
                    if component.kind == "feature" and not one.does_nothing:
                        features.setdefault(component.name, []).append((component, one, which, columns))
                    elif not one.does_nothing:
                        stops.setdefault(_stop(component), []).append((component, one, which, columns))
        for component in self.read:
            names.validate(component)
            stops.setdefault(self._stop(component), [])
        self.features = Features(names, features, self.read)
        for name in self.features.indices:
            for place in (names.saes[name].source, names.saes[name].at):
                stops.setdefault(_stop(place), [])
        for kind, layer in list(stops):
            if kind == "attn_out":  # resid_mid is resid_pre + attn_out
                stops.setdefault(_stop(Component("resid_pre", layer)), [])
        self.stops = dict(sorted(stops.items(), key=_order))

    def visit(self, step: int = 0) -> dict[Component, torch.Tensor]:
        """Inside a trace: read and change every site in forward order; returns what was asked to be read.

        Args:
            step: of a generation; 0 is the pass over the prompt.
        """
        found, pre = {}, None
        for (kind, layer), edits in self.stops.items():
            place = self.names.place(kind, layer, len(self.prompts.ids))
            value = place.get()
            for component, intervention, which, columns in sorted(edits, key=lambda e: RANK[e[0].canonical.kind]):
                mask = self._mask(component, intervention, columns, value, step)
                if mask is not None:
                    value = self._changed(value, pre, component, intervention, which, mask)
            value, changed = self.features.visit((kind, layer), value, pre, step, self._mask)
            if (
                self.tracked is not None and kind != "mlp_in"
            ):  # what is set is what flows on, so that gradients arrive at it
                value = value if value.requires_grad else value.detach().requires_grad_(True)
                self.tracked[kind, layer] = value
            if edits or changed or (self.tracked is not None and kind != "mlp_in"):
                place.set(value)
            if kind in ("resid_pre", "resid_post"):
                pre = value
            for component in self.read:
                if self._stop(component) == (kind, layer):
                    found[component] = self._view(value, pre, component).clone()
        return found

    def visit_gradients(self, metric) -> tuple:
        """Inside a trace: visit every site, and the metric's gradient at what is to be read.

        Returns:
            (metric [row], component -> activation, component -> gradient), both as `visit` returns activations.
        """
        with torch.enable_grad():
            self.tracked = {}
            found = self.visit()
            value = metric(self.names.nn.output.logits[:, -1].float())
            sites = list(self.tracked)
            grads = torch.autograd.grad(value.sum(), [self.tracked[site] for site in sites], allow_unused=True)
        grads = {s: torch.zeros_like(self.tracked[s]) if g is None else g for s, g in zip(sites, grads, strict=True)}
        # the stream between attention and FFN is reached through what attention writes
        slopes = {one: self.features.slope(grads[self._stop(one)], one) if one.kind == "feature" else
                  self._view(grads[_stop(one)], 0, one).clone() for one in self.read}  # fmt: skip
        self.tracked = None
        return value.detach(), {one: x.detach() for one, x in found.items()}, slopes

    def visit_logits(self) -> torch.Tensor:
        """Inside a trace: visit every site, then the logits [row, position, d_vocab]."""
        self.visit()
        return self.names.nn.output.logits.clone()

    def _stop(self, component: Component) -> tuple[str, int | None]:
        return _stop(self.names.saes[component.name].at if component.kind == "feature" else component)

    def _view(self, value, pre, component: Component) -> torch.Tensor:
        if component.kind == "feature":
            return self.features.value(component)
        if component.kind == "resid_mid":
            return pre + value
        size = self.names.size(component.kind)
        if size is None:
            return value
        width = value.shape[-1] // size
        return value[..., component.index * width : (component.index + 1) * width]

    def _changed(self, value, pre, component, intervention: Intervention, which: int, mask) -> torch.Tensor:
        x = self._view(value, pre, component)
        new = torch.where(mask, intervention.change(x, which).to(x.dtype), x)
        if component.kind == "resid_mid":
            return torch.where(mask, new - pre, value)
        if component.index is not None:
            value = value.clone()
            self._view(value, pre, component).copy_(new)
            return value
        return new

    def _mask(self, component, intervention, columns, value, step) -> torch.Tensor | None:
        """[row, column, 1], true where the intervention acts in this pass; None where it does not act at all."""
        prompts, phase, width = self.prompts, intervention.phase, value.shape[1]
        if step > 0 and component.kind in INSIDE:
            return None
        cached = step > 0 and width == 1
        if cached:
            return None if phase == "prompt" else torch.ones(1, 1, 1, dtype=torch.bool, device=value.device)
        mask = torch.zeros(len(prompts.ids), width, 1, dtype=torch.bool)
        for row, own in enumerate(columns):
            if phase != "generation":
                mask[row, own] = True
            if phase != "prompt":
                mask[row, prompts.pads[row] + prompts.lengths[row] :] = True
        return mask.to(value.device) if mask.any() else None


def _stop(component: Component) -> tuple[str, int | None]:
    one = component.canonical
    return SAME_PLACE.get(one.kind, one.kind), one.layer


def _order(item) -> Component:
    (kind, layer), _ = item
    return Component("router" if kind == "mlp_in" else kind, layer)  # what the FFN is given: after the stream's middle


def check_recipe(model, interventions) -> None:
    """Was this recipe made for this model?

    Raises:
        ValueError: naming both fingerprints.
    """
    if isinstance(interventions, (list, tuple)):
        for one in interventions:
            check_recipe(model, one)
    elif isinstance(interventions, Recipe) and interventions.fingerprint not in ("", model.fingerprint):
        raise ValueError(f"The recipe {interventions.name!r} was made for model {interventions.fingerprint}, this one is "
                         f"{model.fingerprint}. To use it anyway: wb.Recipe(list(recipe)).")  # fmt: skip
