"""Edges by learning: a gate on every edge, trained to keep the behaviour with few gates open."""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench import measure
from workbench.locate.circuit.attribution import all_edges, both
from workbench.locate.circuit.graph import Circuit
from workbench.model.edges import mixed, wiring
from workbench.model.sweep import bar
from workbench.task import Task

LOW, HIGH, HEAT = -0.1, 1.1, 2 / 3  # the stretched interval and the temperature of Louizos et al.


def masks(model, task: Task, *, price: float = 0.001, steps: int = 150, lr: float = 0.3, batch: int = 8, seed: int = 0,
          progress: bool = True) -> Circuit:  # fmt: skip
    """Which few edges, together, keep the model's prediction? Learned edge masks with hard-concrete gates.

    All gates are trained at once on the divergence from the clean prediction plus a price for every open gate: an edge
    stays if it saves more nats than that. Edges that stand in for each other compete, and another seed may find a rival
    circuit.

    Args:
        task: pairs, or the name of a bundled task.
        price: of one open gate, in nats.
        steps, lr, batch: of the training (Adam); `batch` pairs per step.
    Returns:
        All edges with the probability that their gate is open; `found.only(found.scores > 0.5)` is the circuit.
    Source:
        Bhaskar et al. 2024, "Finding transformer circuits with edge pruning"; Louizos et al. 2018 for the gates.
    """
    began, task, wired = time.perf_counter(), Task.of(task), wiring(model)
    if not price > 0:
        raise ValueError(
            f"price={price!r}: give a positive number of nats per edge, such as 0.001; the higher, the fewer edges."
        )
    pairs, rng, random = task.on(model), np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    count = int(wired.exists.sum())
    log_odds = torch.full((count,), 2.0, requires_grad=True)
    adam = torch.optim.Adam([log_odds], lr)
    lengths: dict[int, list[int]] = {}
    for i, ids in enumerate(pairs.clean):
        lengths.setdefault(len(ids), []).append(i)
    weights = np.array([len(same) for same in lengths.values()]) / len(pairs.clean)
    device = model.hf.device
    with bar(steps, progress) as show:
        for _ in range(steps):
            same = list(lengths.values())[rng.choice(len(weights), p=weights)]
            group = rng.choice(same, min(batch, len(same)), replace=False).tolist()
            clean, corrupted = both(model, wired, pairs, group)
            noise = torch.rand(count, generator=random).clamp(1e-6, 1 - 1e-6)
            gates = torch.sigmoid((noise.logit() + log_odds) / HEAT) * (HIGH - LOW) + LOW
            mask = torch.zeros(wired.exists.shape).masked_scatter(wired.exists, gates.clamp(0, 1))
            logits = mixed(model, wired, clean, corrupted, mask.to(device), torch.arange(len(group)))
            expected = _open(log_odds)
            loss = measure.kl(clean.logits, logits).mean().cpu() + price * expected.sum()
            (log_odds.grad,) = torch.autograd.grad(loss, log_odds)
            adam.step()
            with torch.no_grad():
                log_odds.clamp_(-9, 9)
            show.update(1)
    return Circuit(all_edges(wired), _open(log_odds.detach().double()).numpy(), wired.sizes, count, "circuit.masks", "kl",
                   task.name, cost=5.0 * steps * min(batch, len(pairs.clean)) / len(pairs.clean),
                   seconds=time.perf_counter() - began, seed=seed,
                   why="Gates are trained together: compare seeds, and random circuits of the size.")  # fmt: skip


def _open(log_odds: torch.Tensor) -> torch.Tensor:
    """The probability that a gate is not zero."""
    return torch.sigmoid(log_odds - HEAT * float(np.log(-LOW / HIGH)))
