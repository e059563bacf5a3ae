"""Amplitude manipulation: silence, replace, scale or hold what a component does.

`at` is a component, its printed form, a list of either (what clicking cells gives), or `Scores`, of which the components
above their null are taken, or with `k` the k strongest.
"""

from __future__ import annotations

import numpy as np
import torch

from workbench.attend import Attend
from workbench.component import SINGLE, Component, components
from workbench.intervention import Intervention
from workbench.locate.causal.null import matched
from workbench.locate.circuit import Circuit, Edge
from workbench.locate.magnitude import contrast
from workbench.operations import Clamp, Mean, Replace, Scale, Zero
from workbench.recipe import Recipe
from workbench.scores import Scores
from workbench.steer.vector.reading import both_sides, states
from workbench.task import Task


def chosen(at, k: int | None = None) -> tuple[Component, ...]:
    """Which components are meant?

    Raises:
        ValueError: for scores none of which is above its null, without `k`; for `k` beside components.
    """
    if not isinstance(at, Scores):
        if k is not None:
            raise ValueError(f"k={k} chooses among Scores; components are taken as they are given.")
        return components(at)
    found = at.above_null() if k is None else at.top(k)
    if not found:
        raise ValueError(f"No component of {at!r} is above its null. To take the strongest all the same, give k=.")
    return tuple(found)


def zero(at, k: int | None = None, *, phase: str | None = None) -> Zero:
    """What happens without these components? Off the data's distribution: it overstates what they matter (see `mean`)."""
    return Zero(chosen(at, k), phase=phase)


def mean(model, task: Task, at, k: int | None = None, *, phase: str | None = None) -> Mean | Recipe:
    """What happens when these components say what they say on average? Mean ablation.

    The mean is over the task's prompts (both sides of pairs; split "fit" where there is one), at the component's position,
    or over all tokens where it has none. For means matched prompt by prompt see `locate.causal.ablate`.

    Returns:
        Mean; for components of several kinds a Recipe with one for each.
    """
    return _valued(Mean, model, task, chosen(at, k), lambda x: x.mean(0), phase)


def resample(
    model, task: Task, at, k: int | None = None, *, phase: str | None = None, seed: int = 0
) -> Replace | Recipe:
    """What happens when these components say what they say on another prompt? Resample ablation, from one prompt of the task
    drawn by seed, the same for all components.

    Args:
        task: matched prompts, of the kind that the components are changed on; split "fit" where there is one.
    """
    row = np.random.default_rng(seed).integers(len(both_sides(model, task).ids))
    return _valued(Replace, model, task, chosen(at, k), lambda x: x[row], phase)


def scale(at, factor: float, k: int | None = None, *, phase: str | None = None) -> Scale:
    """What happens with more or less of these components? Of a stream that a norm reads, scaling all of it does little."""
    return Scale(chosen(at, k), factor, phase=phase)


def clamp(at, value: float, k: int | None = None, *, phase: str | None = None) -> Clamp:
    """What happens when these neurons, features or experts (their routing weights) are held at a value, whatever the prompt?

    Raises:
        ValueError: for components that are no single numbers.
    """
    at = chosen(at, k)
    _refuse_vectors(at)
    return Clamp(at, float(value), phase=phase)


def clamp_to_max(
    model, task: Task, at, times: float = 1.0, k: int | None = None, *, phase: str | None = None
) -> Replace:
    """What happens when these neurons or features are held at `times` the most they reach on a task's prompts?

    A value below 0 pushes against what a feature stands for, which switching it off (0) often does not.

    Source:
        Templeton et al. 2024, "Scaling monosemanticity" (clamping in units of the maximal activation).
    """
    at = chosen(at, k)
    _refuse_vectors(at)
    prompts, wanted = both_sides(model, task), model.names.expand(at)
    most = {one: -torch.inf for one in wanted}
    for length in sorted({len(ids) for ids in prompts.ids}):  # so that no padding counts
        rows = [row for row, ids in enumerate(prompts.ids) if len(ids) == length]
        spans = [prompts.spans[row] for row in rows]
        for one, x in model.activations([prompts.ids[row] for row in rows], wanted, spans=spans).items():
            most[one] = max(most[one], float(x.max()))
    return Replace(wanted, torch.tensor([times * most[one] for one in wanted]), phase=phase)


def suppress(model, task: Task, at="neuron.*.*", *, share: float = 1.0, statistic: str = "max", positive: str | None = None,
             phase: str | None = None) -> Scale:  # fmt: skip
    """What happens when each neuron is turned down as far as it is selective for one kind of prompts? n -> (1 - g) n with
    g = 2 (AUROC - 1/2); neurons that are not selective, or for the other kind, stay as they are.

    Args:
        task: pairs (clean against corrupted) or labelled texts (`positive`), split "fit" where there is one; or Scores of
            `locate.magnitude.contrast` instead of it, for `at` to be left out.
        at: neurons, experts of a mixture (`expert.*.*`, by their routing weights), or heads (`z.*.*`, by their norms).
        share: times g, at most 1. statistic: over a prompt's tokens, as for `contrast`; the paper takes "max".
    Returns:
        Scale with one factor for each neuron that changes.
    Raises:
        ValueError: when nothing is selective, or for scores without an AUROC.
    Source:
        Suau et al. 2024, "Whispering experts: neural interventions for toxicity mitigation" (AurA), eq. 3-4.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: give a share above 0, up to 1.")
    if isinstance(task, Scores):
        scores = task
    else:
        task = Task.of(task)
        task = task.split("fit") if "fit" in task.column("split") else task
        scores = contrast(model, task, at, statistic=statistic, positive=positive, null=False, draws=2)
    if "auroc" not in scores.columns:
        raise ValueError(f"{scores!r} has no column 'auroc'. locate.magnitude.contrast makes scores that have one.")
    gains = np.clip(2 * (np.asarray(scores.columns["auroc"]) - 0.5), 0, 1)
    some = np.flatnonzero(gains > 0)
    if not len(some):
        raise ValueError(
            "None of these components responds more to the positive side, so there is nothing to turn down."
        )
    return Scale([scores.components[i] for i in some], 1 - share * gains[some], phase=phase)


def attend(at, keys, factor: float = 0.0, k: int | None = None, *, query=None, phase: str | None = None) -> Attend:
    """What happens when heads look more, less or not at all at these tokens? The rest of their attention adjusts.

    Args:
        at: heads (z.4.2, attn_scores.4.2), families (z.*.*), or Scores of heads.
        keys: a position of the prompt, a span, or a list of these; factor: 0 hides them, 100 is PASTA's emphasis.
        query: the position or span that looks; None for every token of the prompt.
    Source:
        Zhang et al. 2024 (PASTA); Geva et al. 2023 (knockout, measured by `locate.causal.knockout`).
    """
    heads = chosen(at, k)
    wrong = [one for one in heads if one.kind not in ("z", "q", "attn_scores", "pattern")]
    if wrong:
        raise ValueError(f"{wrong[0]} does not attend; give heads, for example 'z.4.2'.")
    places = [Component("attn_scores", one.layer, one.index, one.position if query is None else query) for one in heads]
    return Attend(places, keys, factor, phase=phase)


def skip(layers, *, phase: str | None = None) -> Zero:
    """What happens without these blocks? What their attention and FFN write is set to zero; the stream goes on as it came.

    Args:
        layers: a layer's number, or several.
    """
    layers = [layers] if isinstance(layers, int) else list(layers)
    return Zero([Component(kind, layer) for layer in layers for kind in ("attn_out", "mlp_out")], phase=phase)


# circuits


def keep(model, task: Task, circuit: Circuit, *, phase: str | None = None) -> Mean | Recipe:
    """What happens with the nodes of a circuit alone? All other heads and FFNs are set to their means over the task.

    Edges are between two components, an intervention acts at one: this keeps all that the circuit's nodes exchange, more
    than its edges. `locate.circuit.faithfulness` runs the edges alone.

    Raises:
        ValueError: for edges instead of a circuit, or when the circuit runs through every node.
    """
    inside = _nodes(circuit)
    rest = [one for one in _every_node(model) if one not in inside]
    if not rest:
        raise ValueError("This circuit runs through every head and FFN, so there is nothing to take out. Cut it down first: "
                         "circuit.top(0.05).")  # fmt: skip
    return mean(model, task, rest, phase=phase)


def cut(model, task: Task, circuit: Circuit, *, phase: str | None = None) -> Mean | Recipe:
    """What happens without the nodes of a circuit? Its heads and FFNs are set to their means over the task.

    Raises:
        ValueError: for edges instead of a circuit, or a circuit without a head or FFN.
    """
    inside = _nodes(circuit)
    found = [one for one in _every_node(model) if one in inside]
    if not found:
        raise ValueError("This circuit has no head and no FFN to cut: its edges go from the embedding to the logits.")
    return mean(model, task, found, phase=phase)


def random_like(at, model, seed: int = 0, k: int | None = None) -> list[Component]:
    """The control: as many other components, of the same kinds and layers (the nearest, where a layer has too few others),
    at the same positions.

    Raises:
        ValueError: where the model has too few others.
    """
    given = list(model.names.expand(chosen(at, k)))
    wild = {Component(one.kind, "*" if one.layer is not None else None, "*" if one.index is not None else None, None, one.name)
            for one in given}  # fmt: skip
    drawn = matched(model, given, model.names.expand(sorted(wild)), 1, seed)
    if not drawn or any(one.layer is None and one.kind != "feature" for one in given):
        raise ValueError(f"There are not as many other components like {', '.join(map(str, given[:3]))} to draw from.")
    return drawn[0]


# parts


def _valued(op, model, task, at, value, phase) -> Intervention | Recipe:
    """One intervention with a value for each component, or a recipe of one for each kind."""
    at = model.names.expand(at)
    found = states(model, both_sides(model, task), at)
    kinds = {one.kind: [other for other in at if other.kind == one.kind] for one in at}
    made = []
    for kind, own in kinds.items():
        values = torch.stack([value(found[one]) for one in own])
        made.append(op(own, values[:, 0] if kind in SINGLE else values, phase=phase))
    return made[0] if len(made) == 1 else Recipe(tuple(made))


def _refuse_vectors(at) -> None:
    for one in at:
        if one.kind not in SINGLE:
            raise ValueError(f"{one} is a vector; only neurons, experts and features, which are numbers, are held at a value. See "
                             "mean, scale, or wb.Replace(at, values).")  # fmt: skip


def _every_node(model) -> list[Component]:
    return model.names.expand([Component("z", "*", "*"), Component("mlp_out", "*")])


def _nodes(circuit) -> set[Component]:
    if isinstance(circuit, (str, Edge)) or not isinstance(circuit, Circuit):
        raise ValueError(f"{circuit!r} is no circuit. An edge is between two components and an intervention acts at one, so a single "
                         "edge cannot be cut by one: measure it with locate.circuit.faithfulness or locate.causal.path_patch, or make "
                         "a circuit of edges with locate.circuit.Circuit.of(model, edges).")  # fmt: skip
    nodes = set(circuit.nodes)
    features = sorted(one for one in nodes if one.kind == "feature")
    if features:
        raise ValueError(f"{features[0]} is a feature; this acts on heads and FFNs. locate.circuit.keep runs features and their error "
                         "terms alone.")  # fmt: skip
    return nodes
