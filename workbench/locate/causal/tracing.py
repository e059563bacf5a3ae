"""Causal tracing: destroy what is known of the subject with noise, bring one state back."""

from __future__ import annotations

import time
from operator import attrgetter

import numpy as np
import torch

from workbench import measure
from workbench.component import Component
from workbench.locate.causal.patching import name_of, reader, refuse_without_gap
from workbench.locate.causal.places import STREAM, batches, cells_of, refuse_window, resolve, window_of
from workbench.model.sweep import Cell, bar, capture, sweep
from workbench.scores import Scores
from workbench.task import Pairs, Task


def trace(model, task: Task, at="resid_post", *, subject: str | int | None = None, noise: float = 3.0, draws: int = 10,
          window: int | None = None, positions=None, metric="prob", null: bool = True, seed: int = 0,
          progress: bool = True) -> Scores:  # fmt: skip
    """Which states hold what the model knows of the subject? Noise on its embeddings, then one clean state restored.

    Scores are indirect effects as a share of the total: (m_restored - m_noised) / (m_clean - m_noised), ratios of means over
    prompts and noise draws. Attention and FFN outputs are restored in a window of layers around the one named, for a
    single layer shows little. Noise puts the model where it has never been; patching from another prompt (`patch`) does
    not, and is worth comparing.

    The null restores the same state from the same prompt under another draw of noise, in which nothing is known either.

    Args:
        task: pairs, of which the clean prompts are traced. at, positions, metric: as for `patch`; kinds are resid_pre,
            resid_mid, resid_post, attn_out, mlp_out, z.
        subject: the span (or position) that gets the noise; None is "subject" where rows name it, else the words in
            which clean and corrupted differ.
        noise: its size, in standard deviations of the subjects' embeddings. draws: how often it is drawn.
        window: how many layers at once; None is 1 for the stream and heads, a fifth of the layers (3 at least) else.
    Returns:
        Scores; `corrupted` is the metric under noise.
    Raises:
        ValueError: for a span nobody named, noise that changes nothing, or a component that cannot be restored.
    Source:
        Meng et al. 2022 (ROME), section 2 and appendix B: 3 standard deviations, 10 draws, windows of 10 of 48 layers.
    """
    began, task = time.perf_counter(), Task.of(task)
    if noise < 0 or draws < 1:
        raise ValueError(f"noise={noise}, draws={draws}: noise is 0 or more, in standard deviations; draws 1 or more.")
    refuse_window(window)
    pairs = task.on(model)
    found, cells, labels = cells_of(model, pairs, at, positions)
    for one in found:
        if one.kind not in (*STREAM, "z"):
            raise ValueError(f"{one} cannot be traced; kinds are {', '.join(STREAM)}, z.")
    wide = [_window(model, cell, window) for cell in cells]
    places = _places(pairs, subject)
    read, n = reader(pairs, metric), len(pairs.clean)
    size = noise * _spread(model, pairs, places)
    clean, noised, restored = np.zeros(n), np.zeros((draws, n)), np.zeros((draws, len(cells), n))
    under, cost = np.zeros_like(restored), 0.0
    sites = [one for cell in wide for one in cell.parts]
    with bar(len(cells) * n * draws * (2 if null and draws > 1 else 1), progress) as show:
        for group in batches(pairs, draws + 1):
            half, ids = len(group), [pairs.clean[i] for i in group]
            source = capture(model, ids, sites)
            base = _noised(model, ids, draws, group, places, size, source, seed, sites)
            rows, of = torch.arange(half).repeat(draws), read(group)
            mine = [Cell({one: own * draws for one, own in cell.of(group).parts.items()}) for cell in wide]

            def metric_of(logits, which, of=of, rows=rows):
                return of(logits, rows[which])

            clean[group] = of(source.logits, torch.arange(half)).numpy()
            noised[:, group] = metric_of(base.logits, torch.arange(len(rows))).view(draws, half).numpy()
            values, spent = sweep(model, base, source, rows, mine, metric_of, show.update)
            restored[:, :, group] = values.view(len(cells), draws, half).transpose(0, 1).numpy()
            if null and draws > 1:
                donors = torch.arange(len(rows)).roll(-half)  # the same prompt under the next draw
                values, more = sweep(model, base, base, donors, mine, metric_of, show.update)
                under[:, :, group] = values.view(len(cells), draws, half).transpose(0, 1).numpy()
                spent += more
            cost += (1 + draws + spent * draws) * half / n
    gap, clusters = clean - noised.mean(0), pairs.task.clusters()
    refuse_without_gap(model, gap, clean, noised.mean(0), metric, clusters, "Prompts with and without noise",
                       f"noise={noise:g} on {subject or 'the subject'} hides too little. Try more noise, more prompts or draws, or another span.")  # fmt: skip
    effects = (restored - noised[:, None]).mean(0)
    values, low, high = measure.ratio_of_means(effects, gap, clusters, seed=seed)
    limit, why = (
        np.full(len(found), np.nan),
        "With one draw of noise there is no null." if null else "No null was asked for.",
    )
    if null and draws > 1:
        limit, why = measure.null_threshold(under - noised[:, None], together=draws) / abs(gap.mean()), ""
    layers = {len({one.layer for one in cell.parts}) for cell in wide}
    columns = {"first_layer": [min(one.layer for one in cell.parts) for cell in wide],
               "last_layer": [max(one.layer for one in cell.parts) for cell in wide]} if max(layers) > 1 else {}  # fmt: skip
    return Scores(found, values, low, high, limit, effects, "causal.trace", name_of(metric), float(clean.mean()),
                  float(noised.mean()), "denoising", "the same state from the same prompt under another draw of noise", labels,
                  task.name, float(cost), time.perf_counter() - began, seed, why, columns)  # fmt: skip


def _window(model, cell: Cell, window: int | None) -> Cell:
    """The cell with the layers around it: of attention or FFN outputs a fifth of all layers, of others itself."""
    ((one, positions),) = cell.parts.items()
    layers = model.names.n_layers
    wide = window or (max(3, round(layers / 5)) if one.kind in ("attn_out", "mlp_out") else 1)
    return Cell(
        {Component(one.kind, layer, one.index, one.position): positions for layer in window_of(one.layer, wide, layers)}
    )


def _places(pairs: Pairs, subject) -> list[list[int]]:
    """The positions that get noise, for each prompt."""
    if subject is None and all("subject" in spans for spans in pairs.spans):
        subject = "subject"
    if subject is not None:
        return [resolve(Component("embed", position=subject), pairs, i) for i in range(len(pairs.clean))]
    return [(a != b).nonzero()[:, 0].tolist() for a, b in zip(pairs.clean, pairs.corrupted, strict=True)]


def _spread(model, pairs: Pairs, places) -> float:
    """The standard deviation of all numbers in the embeddings of the subjects' tokens, as the module that gets the noise
    gives them: Gemma's are W_E times sqrt(d_model)."""
    tokens = torch.tensor([int(ids[p]) for ids, own in zip(pairs.clean, places, strict=True) for p in own])
    with torch.no_grad():
        return float(attrgetter(model.names.row.embed)(model.hf)(tokens.to(model.hf.device)).float().std())


def _noised(model, ids, draws, group, places, size, source, seed, sites):
    """The prompts, each `draws` times, with noise on the subject: seeded by prompt and draw, not by batch."""
    n, width, d_model = len(ids), source.ids.shape[1], source.acts["resid_pre", 0].shape[-1]
    noise, marks = torch.zeros(draws * n, width, d_model), torch.zeros(draws * n, width, dtype=torch.long)
    for draw in range(draws):
        for k, i in enumerate(group):
            columns = [p + source.pads[k] for p in places[i]]
            rng = torch.Generator().manual_seed(seed * 1_000_003 + draw * 10_007 + i)
            noise[draw * n + k, columns] = torch.randn(len(columns), d_model, generator=rng) * size
            if size > 0:
                marks[draw * n + k, columns] = 1 + draw
    like = source.acts["resid_pre", 0]
    run = capture(model, ids * draws, sites, noise=noise.to(like))
    run.marks = torch.where(marks > 0, -marks, run.ids)
    return run
