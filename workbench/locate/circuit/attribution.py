"""Edges by gradient: what changing each edge would do to the metric, to first order, for all edges at once."""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench import measure
from workbench.locate.causal import patching
from workbench.locate.causal.null import donors, draws_of, partners
from workbench.locate.causal.places import batches
from workbench.locate.circuit.edge import every_edge
from workbench.locate.circuit.graph import Circuit
from workbench.model.edges import FLOATS, Wiring, Writes, attribution, capture, wiring
from workbench.model.plan import Prompts
from workbench.task import Pairs, Task

DRAWS = 400  # of the bootstrap: there are thousands of edges


def eap(model, task: Task, *, metric="logit_diff", null: bool = True, seed: int = 0) -> Circuit:
    """Which edges matter, to first order? Edge attribution patching, all edges from two forward and one backward pass.

    The score of an edge estimates what the metric loses when that edge alone carries the corrupted run: (what its source
    writes in the clean run - in the corrupted run) * (the metric's gradient, in the clean run, at what its target reads),
    summed over positions. It is exactly the gradient of the metric by a mask on the edge. Where attention is saturated,
    the gradient is near zero whatever the edge does: see `eap_ig`.

    Args:
        task: pairs, or the name of a bundled task.
        metric: "logit_diff", "log_prob", "prob", or a differentiable function (logits, answer, foil) -> [prompt].
        null: also score what another pair's corrupted prompt would change, for `null_p95` (seed says which).
    Returns:
        A circuit of all edges, in units of the metric; `.top(0.1)` keeps the strongest tenth.
    Source:
        Syed et al. 2023, "Attribution patching outperforms automated circuit discovery".
    """
    return _gradients("circuit.eap", model, task, [1.0], metric, null, seed)


def eap_ig(model, task: Task, *, steps: int = 5, of: str = "inputs", metric="logit_diff", null: bool = True,
           seed: int = 0) -> Circuit:  # fmt: skip
    """Which edges matter, on the way from the corrupted to the clean run? EAP with integrated gradients.

    As `eap`, with the gradient averaged over runs between the two, at the midpoints of `steps` equal parts; so an edge
    whose target is saturated in the clean run still gets a score.

    Args:
        steps: runs between corrupted and clean.
        of: "inputs" moves the embeddings, all edges in one go; "activations" moves one layer's heads, one FFN, or the
            embedding at a time, with all before it clean, and scores the edges out of it: slower by 2 * layers + 1.
    Returns:
        A circuit of all edges, in units of the metric; `completeness` says whether there were enough steps.
    Source:
        Hanna et al. 2024, "Have faith in faithfulness" (inputs); Marks et al. 2024, "Sparse feature circuits", for the
        integration over one site's activations.
    """
    if of not in ("inputs", "activations"):
        raise ValueError(f"of={of!r} is unknown; choose 'inputs' or 'activations'.")
    if int(steps) != steps or steps < 1:
        raise ValueError(f"steps={steps!r}: give a whole number from 1; 5 is usual.")
    alphas = [(i + 0.5) / steps for i in range(int(steps))]
    name = "circuit.eap_ig" + (".activations" if of == "activations" else "")
    return _gradients(name, model, task, alphas, metric, null, seed, of == "activations")


def _gradients(name, model, task, alphas, metric, null, seed, by_site=False) -> Circuit:
    began = time.perf_counter()
    task = Task.of(task)
    pairs, of, wired = task.on(model), measure.metric(metric), wiring(model)
    if of is measure.accuracy:
        raise ValueError("metric='accuracy' has no gradient: give 'logit_diff', 'log_prob' or 'prob', or use `exact`.")
    rows, sides = len(pairs.clean), np.zeros((2, len(pairs.clean)))
    draws, several = draws_of(null), groups(pairs, wired, model, len(alphas))
    tables = [torch.zeros(rows, len(wired.targets), len(wired.sources)) for _ in range(1 + draws)]
    others = partners(pairs, pairs.corrupted, several, draws, seed)
    for group in several:
        clean, corrupted = both(model, wired, pairs, group)
        deltas = [clean.writes - corrupted.writes]
        deltas += [corrupted.writes[:, donors(others, group, i)] - corrupted.writes for i in range(draws)]

        def read(logits, numbers, group=group):
            which = torch.tensor(group)[numbers]
            return of(logits, pairs.answer[which].to(logits.device), pairs.foil[which].to(logits.device))

        for side, run in zip(sides, (clean, corrupted), strict=True):
            side[group] = read(run.logits, torch.arange(len(group))).float().cpu().numpy()
        for site, part, at_clean, at_corrupted in _sites(model.names, clean, corrupted, by_site):
            values = torch.stack([at_corrupted + alpha * (at_clean - at_corrupted) for alpha in alphas])
            found = attribution(model, wired, clean.prompts, site, values, deltas, read)
            for table, one in zip(tables, found, strict=True):
                table[group, :, part] = one[..., part].float().cpu()
    refuse_without_gap(model, *sides, metric, clusters=pairs.task.clusters())
    values = [table[:, wired.exists].T.double().numpy() for table in tables]
    sites = 2 * model.names.n_layers + 1 if by_site else 1
    under, why = null_of(np.stack(values[1:]) if draws else None, others)
    gap, first = float((sides[0] - sides[1]).mean()), wired.exists.nonzero()[:, 1] == 0
    return scored(wired, values[0], under, name, metric, pairs.task, seed, began,
                  2 + 2 * len(alphas) * sites, why, completeness=float(values[0][first.numpy()].mean(1).sum()) / gap)  # fmt: skip


def _sites(names, clean: Writes, corrupted: Writes, by_site: bool):
    """What is moved from corrupted to clean: the site, the sources whose edges it scores, its two values."""
    if not by_site:
        yield ("resid_pre", 0), slice(None), clean.streams[0], corrupted.streams[0]
        return
    yield ("resid_pre", 0), slice(0, 1), clean.streams[0], corrupted.streams[0]
    for layer in range(names.n_layers):
        first = 1 + layer * (names.n_heads + 1)
        ffn = first + names.n_heads
        yield ("z", layer), slice(first, ffn), clean.heads[layer], corrupted.heads[layer]
        yield ("mlp_out", layer), slice(ffn, ffn + 1), clean.writes[ffn], corrupted.writes[ffn]


def flow(model, task: Task, *, seed: int = 0) -> Circuit:
    """Along which edges does the clean prompt's information flow? Information-flow routes, from one forward pass.

    The share of a source in what a target reads is how much nearer it brings the sum: max(0, |x| - |x - write|) in the L1
    norm, divided by the total over sources; at the last position for the logits, averaged over positions elsewhere. Needs
    no corrupted prompt and no gradient. It is not causal: it says what is large in the stream, not what matters for the
    answer. Take `top(..., by="route")`.

    Args:
        task: pairs (their clean prompts are used), or the name of a bundled task.
    Returns:
        A circuit of all edges with shares from 0 to 1; queries, keys and values of a head read one stream and share it.
    Source:
        Ferrando and Voita 2024, "Information flow routes"; over positions as in the MIB benchmark.
    """
    began = time.perf_counter()
    task = Task.of(task)
    pairs, wired = task.on(model), wiring(model)
    table = torch.zeros(len(pairs.clean), len(wired.targets), len(wired.sources))
    for group in groups(pairs, wired, model, 1):
        run = capture(model, wired, Prompts([pairs.clean[i] for i in group]))
        real = torch.zeros(len(group), run.prompts.width)
        for row, pad in enumerate(run.prompts.pads):
            real[row, pad:] = 1
        last = torch.zeros_like(real)
        last[:, -1] = 1
        for layer in range(model.names.n_layers):
            reads = wired.reads[layer]
            for part, x in ((reads, run.streams[layer]), (slice(reads.stop, reads.stop + 1), run.middles[layer])):
                known = wired.known[part.start]
                table[group, part, :known] = _shares(x, run.writes[:known], real)[:, None]
        table[group, -1] = _shares(run.last, run.writes, last)
    values = table[:, wired.exists].T.double().numpy()
    return scored(wired, values, None, "circuit.flow", "share of the stream", pairs.task, seed, began, 1,
                  "Shares are never negative: no null of zero effect applies.")  # fmt: skip


def _shares(x: torch.Tensor, writes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[row, source], averaged over positions by the weights."""
    near = torch.stack([(x.abs().sum(-1) - (x - write).abs().sum(-1)).clamp(min=0) for write in writes], -1)
    shares = near / near.sum(-1, keepdim=True).clamp(min=1e-12)
    weights = weights.to(x) / weights.sum(-1, keepdim=True).to(x)
    return (shares * weights[..., None]).sum(1).cpu()


# shared with the other ways to score edges


def all_edges(wired: Wiring) -> tuple:
    """Every edge of the model, in order."""
    return every_edge(tuple(wired.sources), tuple(wired.targets), tuple(wired.known))


def scored(wired: Wiring, per_prompt, under, method, metric, task, seed, began, cost, why="", edges=None,
           **more) -> Circuit:  # fmt: skip
    """Edges (all of the model, if not given) with the means of [edge, prompt] values, their intervals and their null.

    Args:
        task: the rows that the prompts are (`Pairs.task`).
    """
    names = dict(edges=edges or all_edges(wired), sizes=wired.sizes,
                 whole=int(wired.exists.sum()), method=method, task=task.name, seed=seed, cost=float(cost), why=why,
                 metric=patching.name_of(metric))  # fmt: skip
    low = high = threshold = None
    weights = measure.cluster_weights(per_prompt.shape[1], task.clusters(), DRAWS, seed)
    if weights is not None:
        low, high = np.quantile(per_prompt @ weights.T, [0.025, 0.975], axis=1)
    if under is not None:
        threshold = measure.null_threshold(under)
        names["null"] = "the same score for the change to another pair's corrupted prompt"
    return Circuit(scores=per_prompt.mean(1), per_prompt=per_prompt, ci_lo=low, ci_hi=high, null_p95=threshold,
                   seconds=time.perf_counter() - began, **names, **more)  # fmt: skip


def null_of(effects, others) -> tuple:
    """Effects of the null [draw, component, prompt] of the prompts that have one, or None and why there are none."""
    usable = [i for i, other in enumerate(others) if other]
    if effects is None or len(usable) > 1:
        return None if effects is None else effects[
            ..., usable
        ], "" if effects is not None else "No null was asked for."
    return None, "No three pairs have equal length, so there is no other pair to make a null from."


def refuse_without_gap(model, clean, corrupted, metric, who="Clean and corrupted prompts", clusters=None) -> None:
    """Do clean and corrupted prompts differ in the metric at all?"""
    what = "there is nothing a circuit could carry. task.score(model) shows it row by row."
    patching.refuse_without_gap(model, clean - corrupted, clean, corrupted, metric, clusters, who, what)


def both(model, wired: Wiring, pairs: Pairs, group: list[int]) -> tuple[Writes, Writes]:
    """The clean and the corrupted run of some pairs."""
    return tuple(capture(model, wired, Prompts([side[i] for i in group])) for side in (pairs.clean, pairs.corrupted))


def groups(pairs: Pairs, wired: Wiring, model, copies: int) -> list[list[int]]:
    """Pairs by length, as many in a batch as its largest tensors allow."""
    return batches(pairs, max(len(wired.sources), copies * 4 * model.names.n_layers) * model.names.d_model, FLOATS // 2)
