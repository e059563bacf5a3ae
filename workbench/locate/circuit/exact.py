"""Edges by real runs: one at a time, and ACDC."""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench import measure
from workbench.locate.causal.patching import name_of
from workbench.locate.circuit.attribution import all_edges, both, groups, scored
from workbench.locate.circuit.edge import Edge
from workbench.locate.circuit.graph import Circuit
from workbench.model.edges import FLOATS, Writes, mixed, wiring
from workbench.model.sweep import bar
from workbench.task import Task


def exact(model, task: Task, edges=None, *, metric="logit_diff", seed: int = 0, progress: bool = True) -> Circuit:
    """What does the model lose when this one edge carries the corrupted run? Edge patching by real runs, the oracle.

    All else is the clean run: the source still writes to everyone else, and what the target then does differently goes on
    through the whole network. What `eap` estimates, but one run per edge: minutes where that takes a second.

    Args:
        task: pairs, or the name of a bundled task.
        edges: which to measure; None for all of the model.
    Returns:
        A circuit of these edges, in units of the metric: m(clean) - m(edge patched), a mean over prompts.
    Raises:
        ValueError: for no edges, or one that the model does not have.
    Source:
        Goldowsky-Dill et al. 2023, "Localizing model behavior with path patching", for single edges.
    """
    began, task, of, wired = time.perf_counter(), Task.of(task), measure.metric(metric), wiring(model)
    pairs = task.on(model)
    if edges is not None:
        edges = Circuit.of(model, edges).edges  # refuses what the model does not have
        if not edges:
            raise ValueError("No edges were given to measure. Give edges such as 'z.1.2 -> logits', a circuit that has some, or "
                             "edges=None for all of the model.")  # fmt: skip
    found = {edge: np.zeros(len(pairs.clean)) for edge in (all_edges(wired) if edges is None else edges)}
    layers: dict[int, list] = {}
    for edge in found:
        layers.setdefault(model.names.n_layers if edge.target.kind == "logits" else edge.target.layer, []).append(edge)
    with bar(len(found) * len(pairs.clean), progress) as show:
        for group in groups(pairs, wired, model, 1):
            clean, corrupted = both(model, wired, pairs, group)
            own = torch.tensor(group)

            def read(logits, which):
                return (
                    of(logits, pairs.answer[which].to(logits.device), pairs.foil[which].to(logits.device)).cpu().numpy()
                )

            before = read(clean.logits, own)
            for layer, here in layers.items():
                for start in range(0, len(here), _step(model, wired, clean)):
                    part = here[start : start + _step(model, wired, clean)]
                    logits = _patched(model, wired, clean, corrupted, layer, part)
                    values = read(logits, own.repeat(len(part))).reshape(len(part), -1)
                    for edge, one in zip(part, values, strict=True):
                        found[edge][group] = before - one
                    show.update(len(part) * len(group))
    values = np.stack(list(found.values()))
    cost = sum(len(here) * (model.names.n_layers - layer) / model.names.n_layers for layer, here in layers.items())
    return scored(wired, values, None, "circuit.exact", metric, pairs.task, seed, began, 2 + cost,
                  "Exact: no null run; the interval says what the prompts leave open.", tuple(found))  # fmt: skip


def _step(model, wired, run: Writes) -> int:
    """How many edges share a call with all prompts of a run."""
    return max(1, FLOATS // (len(run.prompts.ids) * run.prompts.width * model.names.d_model * len(wired.sources)))


def _patched(model, wired, clean: Writes, corrupted: Writes, layer: int, edges) -> torch.Tensor:
    """Logits [edge * prompt, d_vocab] with one edge into this layer patched per row; what comes before is as in the clean
    run, what comes after is an ordinary run."""
    many = len(clean.prompts.ids)
    masks = wired.exists.float().repeat(len(edges), 1, 1)
    for mask, edge in zip(masks, edges, strict=True):
        mask[wired.targets.index(edge.target), wired.sources.index(edge.source)] = 0
    which = torch.arange(many).repeat(len(edges))
    known = (clean.writes - corrupted.writes)[: 1 + layer * (model.names.n_heads + 1)]
    last = layer == model.names.n_layers
    return mixed(model, wired, clean, corrupted, masks.repeat_interleave(many, 0), which, known[:, which],
                 None if last else layer + 1)  # fmt: skip


def acdc(model, task: Task, threshold: float, *, metric="kl", seed: int = 0, progress: bool = True) -> Circuit:
    """Which edges are left when every edge that can go, goes? Automated circuit discovery.

    From the logits backwards, each edge in turn is given the corrupted run, on top of those already cut; it stays cut if
    the distance to the clean run grows by less than `threshold`. The result depends on the order, and an edge that has a
    stand-in is cut.

    Args:
        task: pairs, or the name of a bundled task; a few dozen are enough, as every edge is one run.
        threshold: in nats of KL divergence to the clean prediction, or in units of the metric lost.
        metric: "kl", or a metric as for `exact`: then the distance is what the metric loses, and edges that hurt go.
    Returns:
        The edges that are left, with the distance that cutting each would have added.
    Source:
        Conmy et al. 2023, "Towards automated circuit discovery", algorithm 1.
    """
    began, task, wired = time.perf_counter(), Task.of(task), wiring(model)
    if not threshold > 0:
        raise ValueError(
            f"threshold={threshold!r}: give a positive number, such as 0.01 nats; the larger, the fewer edges."
        )
    pairs = task.on(model)
    of = None if metric == "kl" else measure.metric(metric)
    batches = [(torch.tensor(group), *both(model, wired, pairs, group)) for group in groups(pairs, wired, model, 1)]

    def distance(masks: list, layer: int) -> np.ndarray:
        """[mask], a mean over prompts."""
        total = torch.zeros(len(masks), dtype=torch.float64)
        for own, clean, corrupted in batches:
            known = (clean.writes - corrupted.writes)[: 1 + layer * (model.names.n_heads + 1)]
            which = torch.arange(len(own)).repeat(len(masks))
            rows = torch.stack(masks).repeat_interleave(len(own), 0)
            logits = mixed(model, wired, clean, corrupted, rows, which, known[:, which])
            if of is None:
                away = measure.kl(clean.logits[which], logits)
            else:
                answer, foil = (side[own].to(logits.device) for side in (pairs.answer, pairs.foil))
                n = len(masks)
                away = of(clean.logits, answer, foil).repeat(n) - of(logits, answer.repeat(n), foil.repeat(n))
            total += away.double().cpu().reshape(len(masks), -1).sum(1)
        return (total / len(pairs.clean)).numpy()

    limit = min(_step(model, wired, clean) for _, clean, _ in batches)
    mask, kept, tried = wired.exists.float(), {}, 0
    now, graph = 0.0, Circuit((), np.zeros(0), wired.sizes, int(wired.exists.sum()))
    with bar(int(wired.exists.sum()), progress) as show:
        for t in reversed(range(len(wired.targets))):
            target, waiting = wired.targets[t], list(range(wired.known[t]))
            show.update(len(waiting))
            outlets = [wired.sources.index(one) for one in graph.readers(target) if one.kind != "logits"]
            if outlets and not mask[:, outlets].any():  # nobody reads it any more
                mask[t] = 0
                continue
            layer, ahead = model.names.n_layers if target.kind == "logits" else target.layer, 4
            while waiting:
                # several steps at once, as if each cut were accepted; what follows the first refusal is tried again
                trial = [waiting[-1 - i] for i in range(min(ahead, limit, len(waiting)))]
                masks = []
                for source in trial:
                    masks.append((masks[-1] if masks else mask).clone())
                    masks[-1][t, source] = 0
                away = distance(masks, layer)
                tried += len(trial)
                growth = np.diff(np.concatenate([[now], away]))
                stop = next((i for i, more in enumerate(growth) if more >= threshold), len(trial))
                if stop:
                    mask, now = masks[stop - 1], float(away[stop - 1])
                if stop < len(trial):
                    kept[Edge(wired.sources[trial[stop]], target)] = float(growth[stop])
                    waiting = waiting[: -1 - stop]
                else:
                    waiting = waiting[: len(waiting) - stop]
                ahead = 2 * ahead if stop == len(trial) else max(1, stop + 1)
    found = Circuit(tuple(kept), np.array(list(kept.values())), wired.sizes, int(wired.exists.sum()), "circuit.acdc", name_of(metric),
                    task.name, cost=2.0 + tried, seconds=time.perf_counter() - began, seed=seed,
                    why=f"Edges are kept or cut, at threshold {threshold:g}: compare with random circuits of the size.")  # fmt: skip
    return found.pruned()
