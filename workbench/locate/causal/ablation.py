"""Ablation: what the answer loses without one component, or without several at once."""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench import measure
from workbench.component import Component, components
from workbench.locate.causal.joint import Joint
from workbench.locate.causal.null import as_far, draws_of, matched
from workbench.locate.causal.patching import name_of, reader, refuse_not_finite
from workbench.locate.causal.places import batches, cells_of
from workbench.locate.causal.pool import METHODS, Pool
from workbench.model.sweep import Cell, bar, capture, sweep
from workbench.scores import Scores
from workbench.task import Task


def ablate(model, task: Task, at, method: str = "mean", *, positions=None, metric="logit_diff", reference=None,
           draws: int = 4, null=True, seed: int = 0, progress: bool = True) -> Scores:  # fmt: skip
    """Which components does the answer need? What the metric loses when one is replaced by something that says nothing.

    Scores are m_clean - m_ablated, in units of the metric: above 0 the component helps. "mean" puts in the average over
    matched prompts, per position and template; "resample" another matched prompt's activation, `draws` times; "zero" puts
    in 0, which the model has never met: it overstates. "optimal" fits the constant that changes the prediction least (the
    KL divergence), so what is lost then, no constant can give; it is slow. None sees a component that another can stand
    in for (`joint_ablation`).

    The null moves the same component as far in a random direction: is it what was taken away, or only how much was changed?

    Args:
        task: pairs; their clean prompts are ablated. at, positions, metric: as for `patch`.
        method: "mean", "resample", "zero" or "optimal" (of z, neuron, attn_out, mlp_out, q, k, v, expert, router).
        reference: a task whose prompts (both sides of pairs, or texts) the means and activations come from, for example
            the fit split; None takes the pairs themselves. Prompts that fewer than 8 others share the template with are
            matched by length, and then by distance from the end; `why` says how many.
        draws: of "resample", how often. null: False for none, True for two draws, or their number.
    Returns:
        Scores; the column `share` is the score as a share of m_clean - m_corrupted. A prompt that finds nothing to put in
        (no other of its length in `reference`) has NaN in `per_prompt` and is in no mean; `why` says how many.
    Raises:
        ValueError: for an unknown method, a component that cannot be changed, activations or a metric that are not
            finite, or when fewer than half of the prompts find something to put in.
    Source:
        Wang et al. 2022 (means per template), Chan et al. 2022 (resampling); Li and Janson 2024 (optimal, and what zero
        and mean overstate).
    """
    began = time.perf_counter()
    _refuse(method, draws)
    task, drawn = Task.of(task), draws_of(null)
    pairs = task.on(model)
    found, cells, labels = cells_of(model, pairs, at, positions)
    pool = Pool(model, pairs, reference, found, method, seed, cells)
    n, used = len(pairs.clean), pool.used
    runs = _Runs(model, pairs, pool, found, metric, draws if method == "resample" else 1)
    under = np.zeros((drawn, len(cells), n))
    with bar(len(cells) * n * (runs.draws + drawn), progress) as show:
        effects = runs.effects(cells, show.update)
        if drawn:
            for draw in range(drawn):
                under[draw] = runs.effects(cells, show.update, as_far_from=seed + 1 + draw)
    refuse_not_finite(effects[:, used], metric)
    mean, low, high = measure.mean_interval(effects[:, used].T, pairs.task.clusters(used), seed=seed)
    limit = measure.null_threshold(under[..., used]) if drawn else np.full(len(cells), np.nan)
    clean, corrupted = (float(side[used].mean()) for side in (runs.clean, runs.corrupted))
    gap = clean - corrupted
    why = " ".join(part for part in (pool.note, "" if drawn else "No null was asked for.") if part)
    return Scores(found, mean, low, high, limit, effects, f"causal.ablate.{method}", name_of(metric), clean, corrupted, "",
                  "the same component moved as far in a random direction", labels, task.name, float(runs.cost + pool.cost), time.perf_counter() - began, seed, why,
                  {"share": mean / gap if gap else np.full(len(mean), np.nan)})  # fmt: skip


def joint_ablation(model, task: Task, at, *, onward: bool = False, method: str = "mean", metric="logit_diff", reference=None,
                   random: int = 20, draws: int = 4, seed: int = 0, progress: bool = True) -> Joint:  # fmt: skip
    """What does the answer lose without all of these at once, compared with the sum of what it loses without each?

    More than the sum: others stand in for a component that is taken out alone (redundancy, self-repair). Less: they share
    one path, or work against each other. The null takes out as many random components of the same kinds and layers, as
    long as there are any.

    Args:
        at: components or families ("z.5.3", ["z.5.3", "z.0.*"], "mlp_out"), each with a position if it has one.
        onward: one row per layer, for all of `at` from that layer on.
        method, metric, reference, draws: as for `ablate` (also for prompts that find nothing to put in). random: how many
            random sets.
    Returns:
        Joint, with a row per set: joint effect with interval, sum of single effects, null, p (share of random sets that
        reach the joint effect).
    Source:
        Wang et al. 2022 (backup heads), McGrath et al. 2023 (self-repair).
    """
    began = time.perf_counter()
    _refuse(method, draws)
    task = Task.of(task)
    pairs = task.on(model)
    found, cells, _ = cells_of(model, pairs, list(components(at)))
    if method == "optimal":
        raise ValueError(
            "Optimal constants are fitted for one component at a time; choose 'mean', 'resample' or 'zero'."
        )
    if any(one.kind == "feature" for one in found):
        raise ValueError(
            "Features are ablated one at a time: several of one SAE change the same stream. Use ablate(...)."
        )
    layers = sorted({one.layer for one in found})
    sets = (
        [[i for i, one in enumerate(found) if one.layer >= layer] for layer in layers]
        if onward
        else [[*range(len(found))]]
    )
    names = [f"layer {layer} on" for layer in layers] if onward else [", ".join(map(str, found))]
    everything = model.names.expand([Component(one.kind, "*", None if one.index is None else "*") for one in found])
    others = [matched(model, [found[i] for i in some], everything, random, seed) for some in sets]
    flat = [cell for some in others for cell in some]
    _, drawn, _ = cells_of(model, pairs, list({one: None for some in flat for one in some}) or found[:1], None)
    by_name = {one: cell.parts[one] for cell in drawn for one in cell.parts}
    joint = [Cell({one: positions for i in some for one, positions in cells[i].parts.items()}) for some in sets]
    controls = [Cell({one: by_name[one] for one in some}) for some in flat]
    pool = Pool(model, pairs, reference, [*found, *by_name], method, seed, [*cells, *drawn])
    runs = _Runs(model, pairs, pool, [*found, *by_name], metric, draws if method == "resample" else 1)
    with bar((len(cells) + len(joint) + len(controls)) * len(pairs.clean) * runs.draws, progress) as show:
        effects = runs.effects([*joint, *cells, *controls], show.update)
    used = pool.used
    refuse_not_finite(effects[:, used], metric)
    single, control = effects[len(joint) : len(joint) + len(cells)], effects[len(joint) + len(cells) :]
    sums = np.stack([single[some].sum(0) for some in sets])
    split = np.split(control, np.cumsum([len(some) for some in others])[:-1])
    why = "" if all(others) else "Some sets have no null: too few other components of their kind."
    return Joint(names, [[found[i] for i in some] for some in sets], effects[: len(joint)], sums,
                 [part[:, used].mean(1) for part in split], single, found, f"causal.joint_ablation.{method}", name_of(metric),
                 float(runs.clean[used].mean()), float(runs.corrupted[used].mean()), task.name, float(runs.cost + pool.cost),
                 time.perf_counter() - began, seed, " ".join(part for part in (pool.note, why) if part),
                 pairs.task.clusters())  # fmt: skip


def _refuse(method: str, draws: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose {', '.join(map(repr, METHODS))}.")
    if int(draws) != draws or draws < 1:
        raise ValueError(f"draws={draws!r}: give a whole number from 1 of other prompts to resample from; 4 is usual.")


class _Runs:
    """Effects of ablating cells on the clean prompts of a task, batch by batch."""

    def __init__(self, model, pairs, pool: Pool, found, metric, draws: int):
        self.model, self.pairs, self.pool, self.found, self.draws = model, pairs, pool, found, draws
        self.read, self.cost = reader(pairs, metric), 2.0
        n = len(pairs.clean)
        self.clean, self.corrupted = np.zeros(n), np.zeros(n)
        for group in batches(pairs):
            for side in ("clean", "corrupted"):
                logits = model.logits([getattr(pairs, side)[i] for i in group])
                getattr(self, side)[group] = self.read(group)(logits, torch.arange(len(group))).numpy()

    def effects(self, cells: list[Cell], progress, as_far_from: int | None = None) -> np.ndarray:
        """[cell, prompt]: what the metric loses, averaged over draws; with a seed, of changes as far in random directions.

        NaN for prompts for which the pool has nothing to put in.
        """
        n = len(self.clean)
        found = np.zeros((len(cells), n))
        for group in batches(self.pairs, 1):
            base = capture(self.model, [self.pairs.clean[i] for i in group], self.found)
            self.cost += len(group) / n
            mine, of = [cell.of(group) for cell in cells], self.read(group)
            draws = 1 if as_far_from is not None else self.draws
            for source, donors in self.pool.sources(base, group, draws):
                if as_far_from is not None:
                    source = as_far(self.model.names, base, source, donors, as_far_from + 1000 * group[0])
                values, spent = sweep(self.model, base, source, donors, mine, of, progress)
                found[:, group] += (self.clean[group] - values.numpy()) / draws
                self.cost += spent * len(group) / n
        found[:, np.setdiff1d(np.arange(n), self.pool.used)] = np.nan
        return found
