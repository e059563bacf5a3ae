"""Interventions and reads laid out along one forward pass, over a padded batch of prompts."""

from __future__ import annotations

from typing import NamedTuple

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


class Change(NamedTuple):
    """What one intervention does to one tensor: to several components at once where it acts on the same columns.

    `components` says for each which place of `intervention.at` names it; columns: [row], those it acts on in the prompt.
    """

    components: dict[Component, int]
    intervention: Intervention
    columns: list[list[int]]

    @property
    def first(self) -> Component:
        return next(iter(self.components))


class Edits:
    """Interventions and reads laid out along one forward pass, for a batch of prompts.

    Raises:
        ValueError: before anything runs, for a component or position that is not there, or a recipe made for another
            model.
    """

    def __init__(self, names: Names, interventions, prompts: Prompts, read=()):
        self.names, self.prompts, self.read, self.tracked = names, prompts, list(read), None
        self.gates, self.opened = [], {}
        stops: dict[tuple[str, int | None], list] = {}
        features: dict[str, list] = {}
        for one in flatten(interventions):
            one = one.on(prompts)
            self._add_gate(one)
            places: dict = {}
            for which, family in enumerate(one.at):
                for component in names.expand([family]):
                    if component.position not in places:
                        places[component.position] = [prompts.columns(component, i) for i in range(len(prompts.ids))]
                    columns = places[component.position]
                    if component.kind in INSIDE and one.phase == "generation" and not one.grows:
                        raise ValueError(f"{component} can be changed in the prompt only: give phase='prompt'.")
                    if component.kind == "feature" and not one.does_nothing:
                        _join(features.setdefault(component.name, []), component, one, which, columns)
                    elif not one.does_nothing:
                        _join(stops.setdefault(_stop(component), []), component, one, which, columns)
        for gate, _ in self.gates:
            stops.setdefault(_stop(gate.at), [])
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
            value = given = place.get()
            if step == 0:
                self._read_gates((kind, layer), value, pre)
            for change in sorted(edits, key=lambda one: RANK[one.first.canonical.kind]):
                mask = self._mask(change, value, step)
                if mask is not None:
                    value = self._changed(value, pre, change, mask, step)
            value, changed = self.features.visit((kind, layer), value, pre, step, self._mask)
            if (
                self.tracked is not None and kind != "mlp_in"
            ):  # what is set is what flows on, so that gradients arrive at it
                value = value if value.requires_grad else value.detach().requires_grad_(True)
                self.tracked[kind, layer] = value
            if value is not given or changed or (self.tracked is not None and kind != "mlp_in"):
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

    def _changed(self, value, pre, change: Change, mask, step: int) -> torch.Tensor:
        component, intervention, which = change.first, change.intervention.after(step), list(change.components.values())
        if component.index is not None:
            value = value.clone()  # once for all components
            parts = value.unflatten(-1, (self.names.size(component.kind), -1))
            index = [one.index for one in change.components]
            x = parts[..., index, :]
            parts[..., index, :] = torch.where(mask[..., None], intervention.changes(x, which).to(x.dtype), x)
            return value
        x = self._view(value, pre, component)
        new = torch.where(mask, intervention.change(x, which[0]).to(x.dtype), x)
        return torch.where(mask, new - pre, value) if component.kind == "resid_mid" else new

    def _mask(self, change: Change, value, step) -> torch.Tensor | None:
        """[row, column, 1], true where the intervention acts in this pass; None where it does not act at all."""
        component, intervention, columns = change.first, change.intervention, change.columns
        prompts, phase, width = self.prompts, intervention.phase, value.shape[1]
        if step > 0 and component.kind in INSIDE and not intervention.grows:
            return None
        cached = step > 0 and width == 1
        if cached:
            every = torch.ones(1, 1, 1, dtype=torch.bool, device=value.device)
            return None if phase == "prompt" else self._let_through(intervention, every)
        mask = torch.zeros(len(prompts.ids), width, 1, dtype=torch.bool)
        for row, own in enumerate(columns):
            if phase != "generation":
                mask[row, own] = True
            if phase != "prompt":
                mask[row, prompts.pads[row] + prompts.lengths[row] :] = True
        return self._let_through(intervention, mask.to(value.device)) if mask.any() else None

    def _add_gate(self, one: Intervention) -> None:
        """Note where an intervention's gate is read, and refuse one that could not decide in time."""
        if one.gate is None or one.does_nothing:
            return
        self.names.validate(one.gate.at)
        columns = [self.prompts.columns(one.gate.at, row) for row in range(len(self.prompts.ids))]
        acting = [
            self.names.saes[c.name].at if c.kind == "feature" and c.name in self.names.saes else c for c in one.at
        ]
        now = one.phase != "generation" or any(map(len, self._generated()))
        late = [c for c in acting if now and not one.gate.before(c)]
        if late:
            raise ValueError(f"{one.gate.at} is read after {late[0]} has gone by, so it cannot gate it in this pass. Read the gate "
                             "at the same place or earlier.")  # fmt: skip
        if all(one.gate is not gate for gate, _ in self.gates):
            self.gates.append((one.gate, columns))

    def _generated(self) -> list:
        """What of each prompt counts as generated."""
        return [ids[length:] for ids, length in zip(self.prompts.ids, self.prompts.lengths, strict=True)]

    def _read_gates(self, site, value, pre) -> None:
        """Which rows do the gates at this site let through? Kept for the whole generation."""
        for i, (gate, columns) in enumerate(self.gates):
            if _stop(gate.at) == site:
                x = self._view(value, pre, gate.at).detach()
                self.opened[i] = gate.open(torch.stack([x[row, own].mean(0) for row, own in enumerate(columns)]))

    def _let_through(self, intervention: Intervention, mask: torch.Tensor) -> torch.Tensor | None:
        if intervention.gate is None:
            return mask
        which = next(i for i, (gate, _) in enumerate(self.gates) if gate is intervention.gate)
        mask = mask & self.opened[which].to(mask.device)[:, None, None]
        return mask if mask.any() else None


def _join(changes: list[Change], component: Component, intervention, which: int, columns) -> None:
    """Add a component to the last change where it can take part in it, else as a new one."""
    last = changes[-1] if changes and component.index is not None else None
    together = last is not None and last.intervention is intervention and last.columns is columns
    if together and last.first.kind == component.kind and component not in last.components:
        last.components[component] = which
    else:
        changes.append(Change({component: which}, intervention, columns))


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
    elif isinstance(interventions, Recipe) and interventions.fingerprint not in (
        "",
        *model.made_from,
        model.fingerprint,
    ):
        raise ValueError(f"The recipe {interventions.name!r} was made for model {interventions.fingerprint}, this one is "
                         f"{model.fingerprint}. To use it anyway: wb.Recipe(list(recipe)).")  # fmt: skip
