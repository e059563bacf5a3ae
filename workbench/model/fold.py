"""Interventions turned into weights, exactly: what can be, and for the rest the reason and what to type instead."""

from __future__ import annotations

import difflib

import torch

from workbench.component import RANK, SINGLE, Component
from workbench.intervention import Intervention
from workbench.model.plan import _order, _stop
from workbench.model.writers import Step, Writer, writers_of
from workbench.operations import Add, Affine, Clamp, Delta, Mean, ProjectOut, Replace, Scale, Zero
from workbench.recipe import flatten

STREAM = ("resid_pre", "resid_mid", "resid_post")
AFFINE = (Zero, Mean, Replace, Scale, Clamp, Add, ProjectOut, Affine)


def changed_by_deltas(model, interventions) -> dict[str, torch.Tensor]:
    """The weights after all Deltas, by name. A tied weight is one weight: a difference under one of its names changes both
    sides, which stay tied; under both names it changes each side by its own difference.

    Raises:
        ValueError: for a weight the model does not have, or a difference of another shape.
    """
    weights = dict(model.hf.named_parameters(remove_duplicate=False))
    found: dict[str, torch.Tensor] = {}
    for delta in flatten(interventions):
        if not isinstance(delta, Delta) or delta.does_nothing:
            continue
        made: dict[tuple[int, str], torch.Tensor] = {}
        for name, own in reached(weights, delta).items():
            old = found.get(name, weights[name])
            if (id(old), own) not in made:  # one tensor under two names stays one
                made[id(old), own] = _sum(old.detach(), delta.difference(own))
            found[name] = made[id(old), own]
    return found


def _sum(old: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """Added in float32, or in float64 where the weight is; of half precision the sum is rounded once."""
    wide = torch.promote_types(old.dtype, torch.float32)
    return (old.to(wide) + difference.to(old.device, wide)).to(old.dtype)


def reached(weights: dict[str, torch.Tensor], delta: Delta) -> dict[str, str]:
    """Which parameters does a Delta change, and each by the difference under which name? See `changed_by_deltas`.

    Args:
        weights: the model's parameters by name, tied ones under all their names.
    Raises:
        ValueError: for a weight that is not among them, or a difference of another shape.
    """
    for name in delta.names:
        if name not in weights:
            near = difflib.get_close_matches(name, weights, 1, 0.4)
            raise ValueError(f"This model has no weight {name!r}.{f' Did you mean {near[0]!r}?' if near else ''} "
                             "model.hf.named_parameters() lists them.")  # fmt: skip
        if (shape := delta.difference(name).shape) != weights[name].shape:
            raise ValueError(f"{name} is {list(weights[name].shape)}, but its difference is {list(shape)}.")
    found: dict[str, str] = {}
    for name in delta.names:
        tied = [other for other in weights if weights[other] is weights[name]]
        given = [other for other in tied if other in delta.names]
        apart = any(not torch.equal(delta.difference(given[0]), delta.difference(other)) for other in given[1:])
        found |= {name: name} if apart else dict.fromkeys(tied, given[0])
    return found


def untied(model, weights: dict[str, torch.Tensor]) -> bool:
    """Do the two sides of tied embeddings come apart with these new weights?"""
    head, table = model.hf.get_output_embeddings(), model.hf.get_input_embeddings()
    if head is None or head.weight is not table.weight:
        return False
    names = [name for name, one in model.hf.named_parameters(remove_duplicate=False) if one is table.weight]
    return any(weights.get(name) is not weights.get(names[0]) for name in names)


class Folded:
    """What an intervention on activations becomes as weights.

    Attributes:
        weights: name -> new tensor, Deltas included; biases that the model does not have are among them.
        added: names of those biases -> the interventions that need them.
        said: one line per intervention, for people.
    Raises:
        ValueError: listing every intervention that does not fold, why, and what to type instead.
    """

    def __init__(self, model, interventions):
        self.model, self.names = model, model.names
        self.weights = changed_by_deltas(model, interventions)
        self.said = [f"{one!r}" for one in flatten(interventions) if not one.does_nothing]
        self.added: dict[str, list[str]] = {}
        self._refused: dict[tuple[int, str], tuple[Intervention, list[Component]]] = {}
        self._writers: dict[tuple[str, int | None], Writer] = {}
        self._lay_out([one for one in flatten(interventions) if not isinstance(one, Delta) and not one.does_nothing])
        if self._refused:
            raise ValueError(self._why_not())
        old = dict(model.hf.named_parameters(remove_duplicate=False))
        old = {name: self.weights.get(name, weight.detach()) for name, weight in old.items()}
        for writer in {id(one): one for one in self._writers.values()}.values():
            if writer.inputs or writer.outputs:
                new = writer.new_weights(old.get)
                steps = [step for _, step in writer.inputs] + writer.outputs
                if writer.bias in new and old.get(writer.bias) is None:
                    self.added[writer.bias] = list(dict.fromkeys(_label(s.one, [s.component]) for s in steps))
                old |= new
                self.weights |= new

    def _lay_out(self, interventions) -> None:
        """Give every writer its steps, in forward order; note what does not fold."""
        steps = []
        for one in interventions:
            for which, family in enumerate(one.at):
                steps += [Step(component, one, which) for component in self.names.expand([family])]
        if steps:
            self._writers = writers_of(self.model)
        steps.sort(key=lambda step: (_order((_stop(step.component), None)), RANK[step.component.canonical.kind]))
        for step in steps:
            reason = _always(step) or self._take_in(step)
            if reason:
                self._refused.setdefault((id(step.one), reason), (step.one, []))[1].append(step.component)

    def _take_in(self, step: Step) -> str | None:
        """Hand a step to its writer, or say why no writer can take it."""
        one = step.component.canonical
        kind, layer, writers = one.kind, one.layer, self._writers
        if kind in ("z", "neuron", "expert", "ln_final"):
            writer, widths = writers.get((kind, layer)), {"z": self.names.d_head, **dict.fromkeys(SINGLE, 1)}
            width = widths.get(kind, self.names.d_model)
            if writer is None:
                return NO_EXPERTS if kind == "expert" else "the model has no output matrix to put it into"
            start = 0 if one.index is None else one.index * width
            if kind == "expert" and step.shift(width).any():
                return "the router decides at which tokens an expert has a weight; Zero and Scale, which leave 0 at 0, fold"
            if step.shift(width).any() and not writer.constants:
                return NO_BIAS.format(writer.path)
            writer.inputs.append((slice(start, start + width), step))
            return None
        if kind in ("embed", "attn_out", "mlp_out") or (kind, layer) == ("resid_pre", 0):
            return self._to_output(step, writers.get((kind, layer)), kind)
        if kind in STREAM and isinstance(step.one, Add):
            kind = "attn_out" if kind == "resid_mid" else "mlp_out"
            return self._to_output(step, writers.get((kind, layer)), kind)
        if kind in STREAM and isinstance(step.one, ProjectOut):
            return self._project_stream(step, kind, layer)
        if kind in STREAM:
            return ("the stream there is the sum of all that was written before, and every part has been read already; only Add and "
                    "ProjectOut fold there, the others at attn_out, mlp_out, z, neuron and resid_pre.0")  # fmt: skip
        if kind == "router":
            return "what a router chooses by is not folded in this version; Zero and Scale of experts are"
        return f"{kind} is no place that weights alone decide; z, neuron, attn_out, mlp_out, embed and Add on the stream fold"

    def _to_output(self, step: Step, writer: Writer | None, kind: str) -> str | None:
        if writer is None:
            return ("what the stream begins with here is no sum of embeddings" if kind == "resid_pre" else
                    "this architecture keeps what writes there in a form of its own")  # fmt: skip
        if writer.norm and isinstance(step.one, (ProjectOut, Affine)):
            return f"a norm ({writer.path}) stands between the matrix and the stream; its weight can scale coordinates, not mix them"
        if step.shift(self.names.d_model).any() and not writer.constants:
            return NO_BIAS.format(writer.path)
        writer.outputs.append(step)
        return None

    def _project_stream(self, step: Step, kind: str, layer: int) -> str | None:
        """A projection of the stream is one of what was just written, if nothing written before has the direction."""
        last = ["attn_out"] if kind == "resid_mid" else ["attn_out", "mlp_out"] if self.names.parallel else ["mlp_out"]
        before = [("resid_pre", 0), *((out, i) for i in range(layer) for out in ("attn_out", "mlp_out"))]
        before += [("attn_out", layer)] if last == ["mlp_out"] else []
        writers = [self._writers.get(place) for place in before]
        if any(writer is None or not writer.frees(step.one._basis) for writer in writers):
            return ("what was written before still has the direction here, and has been read with it; project it out of all that "
                    "writes: at=['resid_pre.0', 'attn_out.*', 'mlp_out.*']")  # fmt: skip
        reasons = [self._to_output(step, self._writers.get((out, layer)), out) for out in last]
        return next((reason for reason in reasons if reason), None)

    def _why_not(self) -> str:
        lines = [f"- {_label(one, at)}: {reason}." for (_, reason), (one, at) in self._refused.items()]
        return ("These do not fold into the weights, so nothing was changed:\n" + "\n".join(lines) + "\nGive them to the call instead, "
                "as in model.logits(prompt, change) or model.generate(prompt, change), and fold the rest.")  # fmt: skip


NO_EXPERTS = "these experts have biases or matrices of another layout"
NO_BIAS = "it needs a constant added, and {} has no bias and can be given none"


def _always(step: Step) -> str | None:
    """Reasons that hold for every architecture."""
    one, component = step.one, step.component
    if one.gate is not None:
        return "its gate opens for some prompts only; one.gated(None) takes the gate off"
    if component.position is not None:
        return f"it acts at one position, weights act on every token; without position it is {component.at(None)}"
    if one.phase != "both":
        return f"it acts in phase {one.phase!r}, weights act on every token; write phase='both' for that"
    if component.kind == "feature":
        return "a feature's change depends on what its SAE reads; its decoder row as wb.Add(place, vector) is constant and folds"
    if isinstance(one, Add) and one.unit != "raw":
        return "what it adds follows the length of each token's stream; unit='raw' adds the same vector to all"
    if type(one) not in AFFINE:
        return f"{type(one).__name__} is no affine map of one activation, as weights are"
    return None


def _label(one: Intervention, at: list[Component]) -> str:
    more = f" and {len(at) - 1} more" if len(at) > 1 else ""
    return f"{type(one).__name__} at {at[0]}{more}"
