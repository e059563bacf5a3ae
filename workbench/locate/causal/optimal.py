"""Optimal ablation: the constant in a component's place that changes the prediction least."""

from __future__ import annotations

import numpy as np
import torch

from workbench import measure
from workbench.component import Component
from workbench.locate.causal.places import batches, cells_of
from workbench.model.names import MIXTURE
from workbench.model.sweep import Row, capture, resume, run_rows, span, stream_at

FITTED = ("z", "neuron", "attn_out", "mlp_out", "q", "k", "v", *MIXTURE)
STEPS, PROMPTS = 25, 64


def optimal_constants(
    model, pairs, found: list[Component], seed: int
) -> tuple[dict[Component, torch.Tensor], float, str]:
    """For each component the constant, at all its positions, with the least KL(clean || ablated) of the next word.

    Adam from the mean activation on, all components side by side; the best constant met on the way is kept.

    Returns:
        (component -> [width], cost in forward-pass equivalents, one line on the fit).
    Source:
        Li and Janson 2024, "Optimal ablation for interpretability", section 2.
    """
    for one in found:
        if one.kind not in FITTED:
            raise ValueError(f"{one} cannot be ablated optimally; kinds are {', '.join(FITTED)}.")
    chosen = np.random.default_rng(seed).permutation(len(pairs.clean))[:PROMPTS].tolist()
    _, cells, _ = cells_of(model, pairs, found)
    groups = [kept for group in batches(pairs, 1) if (kept := [i for i in group if i in chosen])]
    runs = [(capture(model, [pairs.clean[i] for i in group], found), group) for group in groups]
    constants, size = {}, {}
    for one, cell in zip(found, cells, strict=True):
        own = torch.cat(
            [_own(model, run, one, cell.parts[one][i], row) for run, group in runs for row, i in enumerate(group)]
        )
        constants[one], size[one] = own.mean(0), own.std().item() + 1e-6
    leaf = torch.stack(
        [torch.nn.functional.pad(constants[one], (0, _widest(constants) - len(constants[one]))) for one in found]
    )
    best, least, first, cost = leaf.clone(), torch.full((len(found),), torch.inf), None, 0.0
    momentum, square = torch.zeros_like(leaf), torch.zeros_like(leaf)
    scale = torch.tensor([size[one] for one in found])[:, None]
    for step in range(1, STEPS + 1):
        loss, gradient = torch.zeros(len(found)), torch.zeros_like(leaf)
        for run, group in runs:
            values, slope, spent = _losses(model, run, group, found, cells, leaf)
            loss, gradient = loss + values / len(chosen), gradient + slope / len(chosen)
            cost += 3 * spent * len(group) / len(chosen)
        better = loss < least
        best[better], least = leaf[better], torch.minimum(loss, least)
        first = loss if first is None else first
        momentum, square = 0.9 * momentum + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
        direction = (momentum / (1 - 0.9**step)) / ((square / (1 - 0.99**step)).sqrt() + 1e-12)
        leaf = leaf - 0.15 * (1 - (step - 1) / STEPS) * scale * direction
    note = f"Fitted on {len(chosen)} prompts in {STEPS} steps: KL {first.mean():.3f} at the mean, {least.mean():.3f} at the best."
    return {one: best[i, : len(constants[one])] for i, one in enumerate(found)}, cost, note


def _widest(constants) -> int:
    return max(map(len, constants.values()))


def _own(model, run, one: Component, positions, row: int) -> torch.Tensor:
    """A component's activations in one prompt, [position, width]."""
    x = run.acts[one.site]
    return x[row, [p + run.pads[row] for p in positions], span(model.names, one, x.shape[-1])].float().cpu()


def _losses(model, run, group, found, cells, leaf):
    """(KL summed over prompts [component], its gradient [component, width], cost)."""
    names, (n, width) = model.names, run.ids.shape
    losses, gradient = torch.zeros(len(found), n), torch.zeros_like(leaf)
    groups: dict[tuple, list[Row]] = {}
    for c, (one, cell) in enumerate(zip(found, cells, strict=True)):
        for row, i in enumerate(group):
            columns = [p + run.pads[row] for p in cell.parts[one][i]]
            groups.setdefault((one.layer, one.kind), []).append(Row(min(columns), c, row, [(one, columns)]))

    def call(entry, start, part):
        (layer, kind), prompts = entry, torch.tensor([row.prompt for row in part])
        old, offset = run.acts[kind, layer], 0 if kind in ("k", "v") else start
        own = leaf.detach().requires_grad_(True)
        spans = [span(names, one, old.shape[-1]) for row in part for one, _ in row.parts]
        with torch.enable_grad():
            new = torch.stack([_placed(own[row.cell], where, old.shape[-1]) for row, where in zip(part, spans)])
        where = torch.zeros(len(part), width - offset, old.shape[-1], dtype=torch.bool)
        for i, (row, place) in enumerate(zip(part, spans)):
            where[i, [c - offset for c in row.parts[0][1]], place] = True
        stream, clean = stream_at(names, run, layer, "pre", prompts, start), run.logits[prompts]
        loss, slope = resume(model, run, prompts, start, layer, "pre", stream, {(kind, layer): (where, new[:, None])},
                             slope=(own, lambda logits: measure.kl(clean, logits)))  # fmt: skip
        gradient.add_(slope.cpu())
        return loss.float().cpu()

    spent = run_rows(model, run, groups, call, lambda loss, prompts: loss, losses)
    return losses.sum(1), gradient, spent


def _placed(constant: torch.Tensor, where: slice, width: int) -> torch.Tensor:
    """A component's constant among zeros, as wide as its site."""
    start, stop, _ = where.indices(width)
    return torch.nn.functional.pad(constant[: stop - start], (start, width - stop))
