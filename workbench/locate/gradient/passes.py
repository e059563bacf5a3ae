"""Forward passes with activations and slopes at whole sites: what first-order methods are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.component import Component
from workbench.model.names import INSIDE, Names
from workbench.model.plan import Prompts

ACTIVATIONS_PER_PASS = 2**28  # numbers that one pass with a graph may keep, about 1 GB in float32
KEPT_PER_LAYER = 30  # of them, per token and layer, in units of d_model
KEPT_PER_EXPERT = 2  # more of them, per token and expert that runs, in units of d_model + its own width

Site = tuple[str, int | None]


@dataclass
class Pass:
    """One pass over a padded batch.

    Attributes:
        value: the metric [row]. acts: site -> [row, column, width].
        slopes: one dict per backward pass, site -> gradient of the metric's sum, of that shape. A single one, or with
            `drop` one for each layer.
    """

    value: torch.Tensor
    acts: dict[Site, torch.Tensor]
    slopes: list[dict[Site, torch.Tensor]]


def tokens_per_pass(names: Names, sites=()) -> int:
    """How many tokens a pass may hold whose graph is kept for the way back, with slopes at these sites: at an expert's, all
    experts of its layer run on every token."""
    kept = KEPT_PER_LAYER * names.n_layers * names.d_model
    for layer in [layer for kind, layer in sites if kind == "expert"]:
        width = names.mixture(layer)[0]._module.down_proj.numel() // (names.n_experts * names.d_model)
        kept += KEPT_PER_EXPERT * names.n_experts * (names.d_model + width)
    return max(64, ACTIVATIONS_PER_PASS // kept)


def refuse_without_slope(metric) -> None:
    """Metrics that move in steps have no gradient."""
    if metric == "accuracy":
        raise ValueError(
            "metric='accuracy' moves in steps, so it has no gradient. Use 'logit_diff', 'log_prob' or 'prob'."
        )


def run(model, prompts: Prompts, sites, metric, *, rows=None, slopes=(), drop: bool = False, embed=None) -> Pass:
    """Run prompts once and keep what is at these sites, with the metric's slope at some of them.

    Args:
        sites, slopes: (kind, layer); of the stream between attention and FFN, name ("attn_out", layer), which has the same
            slope. metric: (logits [row, d_vocab] at the last position, prompt numbers [row]) -> [row].
        rows: [row], the prompt numbers; 0, 1, 2, ... without.
        drop: go back once for each layer, each time without what the slope gains through that layer's attention and FFN.
        embed: [row, column, d_model], token embeddings to run instead of the prompts' own.
    Raises:
        ValueError: for a metric without a slope.
    """
    order = sorted({*sites, *slopes}, key=_order)
    switches = torch.ones(model.names.n_layers, device=model.hf.device)
    layers = range(model.names.n_layers if drop else 0)
    stops = sorted({*order, *((kind, layer) for kind in ("attn_out", "mlp_out") for layer in layers)}, key=_order)
    rows = torch.arange(len(prompts.ids)) if rows is None else rows
    names, gates = model.names, switches if drop else None  # what a trace may carry away: not the model itself

    def body():
        with torch.set_grad_enabled(bool(slopes)):
            return _visit(names, rows, stops, set(order), slopes, metric, gates, embed)

    return Pass(*model.trace(model.inputs(prompts), body, logits_to_keep=1, use_cache=False))


def _visit(names: Names, rows, stops, wanted, slopes, metric, switches, embed):
    """Inside a trace, sites in forward order. What is kept is what flows on, so that slopes arrive at it."""
    kept = {}
    if embed is not None and ("embed", None) not in stops:
        names.place("embed", None, len(rows)).set(embed)
    for site in stops:
        place = names.place(*site, len(rows))
        value = place.get()
        fresh = embed if embed is not None and site == ("embed", None) else None
        if slopes and (fresh is not None or not value.requires_grad):
            value = (value if fresh is None else fresh).detach().requires_grad_(True)
            place.set(value)
        elif slopes and (site[0] in INSIDE or place.flat or place.scale != 1.0):  # a copy of what is in the model
            place.set(value)
        if switches is not None and site[0] in ("attn_out", "mlp_out"):
            value.register_hook(_gate(switches, site[1]))
            value = value * 1  # slopes are read behind the gate: at it, autograd gives one or the other
            place.set(value)
        if site in wanted:
            kept[site] = value
    value = metric(names.nn.output.logits[:, -1].float(), rows)
    if not slopes:
        return value.detach(), kept, []
    if not value.requires_grad:
        raise ValueError("This metric has no gradient with respect to the logits.")
    inputs, found = [kept[site] for site in slopes], []
    for layer in range(names.n_layers if switches is not None else 1):
        if switches is not None:
            switches.fill_(1.0)
            switches[layer] = 0.0
        last = switches is None or layer == names.n_layers - 1
        grads = torch.autograd.grad(value.sum(), inputs, allow_unused=True, retain_graph=not last)
        found.append(_named(slopes, inputs, grads))
    return value.detach(), {site: x.detach() for site, x in kept.items()}, found


def _gate(switches, layer):
    return lambda slope: slope * switches[layer]


def _named(slopes, inputs, grads) -> dict:
    return {s: torch.zeros_like(x) if g is None else g for s, x, g in zip(slopes, inputs, grads, strict=True)}


def _order(site: Site) -> Component:
    """`mlp_in`, what the FFN is given, is no component; it comes after the stream's middle."""
    return Component("router" if site[0] == "mlp_in" else site[0], site[1])
