"""Activation patching: between the two sides of pairs, and between two models of one architecture."""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench import measure
from workbench.locate.causal.null import as_far, donors, draws_of, partners
from workbench.locate.causal.places import batches, cells_of
from workbench.model.edit import probe
from workbench.model.sweep import bar, capture, sweep
from workbench.scores import Scores
from workbench.task import Task

DIRECTIONS = ("denoising", "noising")
HANDFUL = 5  # prompts, too few for a deviation of their gaps
STEPS = 4  # of the last digit, that rounding may move a logit by


def patch(model, task: Task, at, *, positions=None, direction: str = "denoising", metric="logit_diff", null=True,
          seed: int = 0, progress: bool = True) -> Scores:  # fmt: skip
    """Which components carry what tells the clean prompt from the corrupted one? Activation patching.

    Denoising runs the corrupted prompt and restores one component from the clean run: is it sufficient? Noising runs
    the clean prompt and takes one component from the corrupted run: is it necessary? Scores are ratios of means over
    prompts, (m_patched - m_corrupted) / (m_clean - m_corrupted) for denoising and (m_clean - m_patched) / (m_clean -
    m_corrupted) for noising: 0 changes nothing, 1 moves the metric all the way.

    The null takes the same component from other pairs' prompts of the side that is being run (corrupted ones, for
    denoising; with another word at the cause, where there are such): it disturbs, but does not carry what is traced.
    `null_p95` is what |score| reaches in 95 % of further such draws; of pairs that carry nothing, 5 % exceed it, and fewer
    where such draws move the metric in no direction of their own (`measure.null_threshold` says why).

    Args:
        task: pairs, or the name of a bundled task; they are compared position by position.
        at: a kind ("z", "resid_pre"), a component or family ("z.*.*", "resid_post.3@-1", "resid_pre.*@subject"), or
            a list of them. Kinds: resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, neuron, feature (of an attached
            SAE), q, k, v, attn_scores, pattern. For the last two a position is that of the query.
        positions: "each" for one score per position (the spans that all rows name, where prompts differ in length),
            "all" for all positions together; None means "each" for a bare kind of the stream, "all" otherwise.
        metric: "logit_diff", "log_prob", "prob", "accuracy", or a function (logits, answer, foil) -> [prompt].
        null: False for none, True for two draws per prompt (each costs as much as the sweep), or their number.
    Returns:
        Scores. With one prompt the interval and the null are NaN.
    Raises:
        ValueError: for a component that cannot be patched or is out of range, pairs of unequal token length, an answer
            that is no token, activations that are not finite, or prompts between which the metric hardly differs.
    Source:
        Vig et al. 2020; Zhang and Nanda 2024, "Towards best practices of activation patching"; Heimersheim and Nanda
        2024 on the two directions.
    """
    began = time.perf_counter()
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown; choose {' or '.join(map(repr, DIRECTIONS))}.")
    task, draws = Task.of(task), draws_of(null)
    pairs = task.on(model)
    read = reader(pairs, metric)
    found, cells, labels = cells_of(model, pairs, at, positions)
    n, groups = len(pairs.clean), batches(pairs)
    clean, corrupted, patched = np.zeros(n), np.zeros(n), np.zeros((len(cells), n))
    others = partners(pairs, pairs.corrupted if direction == "denoising" else pairs.clean, groups, draws, seed)
    shuffled, cost = np.full((draws, len(cells), n), np.nan), 0.0
    with bar(len(cells) * n * (1 + draws), progress) as show:
        for group in groups:
            half, own = len(group), torch.arange(len(group))
            both = capture(model, [side[i] for side in (pairs.clean, pairs.corrupted) for i in group], found)
            sides = both.rows(slice(0, half)), both.rows(slice(half, None))
            base, source = sides[::-1] if direction == "denoising" else sides
            of, mine = read(group), [cell.of(group) for cell in cells]
            clean[group], corrupted[group] = (of(side.logits, own).numpy() for side in sides)
            values, spent = sweep(model, base, source, own, mine, of, show.update)
            patched[:, group] = values.numpy()
            usable = [i for i in group if others[i] is not None]
            for draw in range(draws if usable else 0):
                values, more = sweep(model, base, base, donors(others, group, draw), mine, of, show.update)
                shuffled[draw][:, group], spent = values.numpy(), spent + more
            cost += (2 + spent) * half / n
    usable = [i for i in range(n) if others[i] is not None]
    gap, sign = clean - corrupted, 1 if direction == "denoising" else -1
    clusters = pairs.task.clusters()
    refuse_without_gap(model, gap, clean, corrupted, metric, clusters)
    start = corrupted if direction == "denoising" else clean
    effects = sign * (patched - start)
    values, low, high = measure.ratio_of_means(effects, gap, clusters, seed=seed)
    limit, why = np.full(len(found), np.nan), ""
    if len(set(map(len, pairs.clean))) > 1 and any(isinstance(c.position, int) and c.position < -1 for c in found):
        why = "Prompts differ in length and positions count from the end: name spans in the task to compare like with like."
    if not draws:
        why = "No null was asked for."
    elif len(usable) < 2:
        why = "No three prompts have equal length, so there is no other pair to make a null from."
    else:
        limit = measure.null_threshold((shuffled - start)[..., usable]) / abs(gap.mean())  # in the units of the score
    return Scores(found, values, low, high, limit, effects, "causal.patch", name_of(metric), float(clean.mean()),
                  float(corrupted.mean()), direction, "the same patch from other pairs' prompts of the unpatched side", labels,
                  task.name, float(cost), time.perf_counter() - began, seed, why)  # fmt: skip


def between(model, other, task: Task, at, *, positions=None, prompt: str = "clean", metric="logit_diff", null=True,
            seed: int = 0, progress: bool = True) -> Scores:  # fmt: skip
    """Which components carry what tells two models apart? Patching from one model into another, on the same prompts.

    Runs `model` and takes one component from `other` (a fine-tuned model, or another checkpoint). Scores are ratios of
    means, (m_patched - m_model) / (m_other - m_model): 1 makes the metric that of the other model.

    The null moves the same component as far in a random direction: does it matter where the other model is, or only that
    it is somewhere else?

    Args:
        model, other: of one architecture and size, with the same vocabulary.
        at, positions, metric, null: as for `patch`.
        prompt: "clean" or "corrupted", the side of the pairs that both models run.
    Returns:
        Scores; `corrupted` is the metric of `model`, `clean` that of `other`.
    Raises:
        ValueError: for models that differ in size or vocabulary, or between which the metric hardly differs.
    Source:
        Prakash et al. 2024, "Fine-tuning enhances existing mechanisms" (cross-model activation patching).
    """
    began, draws, task = time.perf_counter(), draws_of(null), Task.of(task)
    _refuse_unlike(model, other)
    if prompt not in ("clean", "corrupted"):
        raise ValueError(f"prompt={prompt!r} is unknown; choose 'clean' or 'corrupted'.")
    pairs = task.on(model)
    read, texts = reader(pairs, metric), getattr(pairs, prompt)
    found, cells, labels = cells_of(model, pairs, at, positions)
    n, cost = len(texts), 0.0
    theirs, mine, patched = np.zeros(n), np.zeros(n), np.zeros((len(cells), n))
    moved = np.zeros((draws, len(cells), n))
    with bar(len(cells) * n * (1 + draws), progress) as show:
        for group in batches(pairs, 1):
            own, of, here = torch.arange(len(group)), read(group), [cell.of(group) for cell in cells]
            base, source = (capture(one, [texts[i] for i in group], found) for one in (model, other))
            mine[group], theirs[group] = of(base.logits, own).numpy(), of(source.logits, own).numpy()
            source = source.with_acts(source.acts)
            values, spent = sweep(model, base, source, own, here, of, show.update)
            patched[:, group] = values.numpy()
            for draw in range(draws):
                elsewhere = as_far(model.names, base, source, own, seed + 1 + draw)
                values, more = sweep(model, base, elsewhere, own, here, of, show.update)
                moved[draw][:, group], spent = values.numpy(), spent + more
            cost += (2 + spent) * len(group) / n
    gap = theirs - mine
    what, clusters = "there is nothing to trace between them.", pairs.task.clusters()
    refuse_without_gap(model, gap, theirs, mine, metric, clusters, "The two models", what)
    effects = patched - mine
    values, low, high = measure.ratio_of_means(effects, gap, clusters, seed=seed)
    limit = measure.null_threshold(moved - mine) / abs(gap.mean()) if draws else np.full(len(found), np.nan)
    return Scores(found, values, low, high, limit, effects, "causal.between", name_of(metric), float(theirs.mean()),
                  float(mine.mean()), "into the first model", "the same component moved as far in a random direction", labels,
                  task.name, float(cost), time.perf_counter() - began, seed, "" if draws else "No null was asked for.")  # fmt: skip


def reader(pairs, metric):
    """group -> (logits [row, d_vocab], prompts of the group [row]) -> the metric [row], on the CPU."""
    of = measure.metric(metric)

    def read(group):
        answer, foil = pairs.answer[group], pairs.foil[group]

        def metric_of(logits, rows):
            return of(logits, answer[rows].to(logits.device), foil[rows].to(logits.device)).float().cpu()

        return metric_of

    return read


def refuse_without_gap(model, gap, clean, corrupted, metric, clusters=None, who="Clean and corrupted prompts", what=""):
    """No ratio where its denominator is no larger than its noise: over prompts, and over clusters of them. Where a handful of
    prompts all differ the same way, no resample of them has a denominator of zero, and their spread says little: then the
    noise is that of the model's rounding."""
    agree = len(gap) <= HANDFUL and ((gap > 0).all() or (gap < 0).all())
    noise = _rounding(model, clean, corrupted, metric) if agree else 3 * gap.std(ddof=1) / len(gap) ** 0.5
    if (
        clusters is not None and not agree
    ):  # as wide as 3 deviations; of two or three templates no deviation can be told
        _, low, high = measure.mean_interval(gap, clusters, level=0.9973)
        noise = np.inf if low <= 0 <= high else noise
    if not abs(gap.mean()) > noise:
        what = (
            what or "there is nothing to trace. Does the model know this task? task.score(model) shows it row by row."
        )
        raise ValueError(
            f"{who} hardly differ in {name_of(metric)} ({clean.mean():+.3f} and {corrupted.mean():+.3f}), so {what}"
        )


def _rounding(model, clean, corrupted, metric) -> float:
    """How far may two runs of one prompt differ in the metric? A few steps of the model's numbers at the size of its logits,
    or for a metric that is no difference of logits, at its own size."""
    if metric in ("logit_diff", "log_prob"):
        size = model.logits(probe(model)).abs().max().item()
    else:
        size = max(np.abs(clean).max(), np.abs(corrupted).max())
    return max(1e-6, STEPS * torch.finfo(model.hf.dtype).eps * size)


def refuse_not_finite(values, metric) -> None:
    """No mean over prompts for which the metric is no number."""
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~np.isfinite(np.asarray(values).reshape(-1, values.shape[-1])).all(0))
        raise ValueError(f"{name_of(metric)} is no finite number for {len(rows)} of {values.shape[-1]} prompts (row {rows[0]} "
                         "first). Give a metric that is finite for all of them, such as 'logit_diff'.")  # fmt: skip


def name_of(metric) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")


def _refuse_unlike(model, other) -> None:
    for what in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_mlp", "d_vocab"):
        one, two = getattr(model.names, what), getattr(other.names, what)
        if one != two:
            raise ValueError(f"The two models differ in {what}: {one} and {two}. Patching between models needs one architecture: "
                             "a model and its fine-tuned version, or two checkpoints (wb.load(name, revision=...)).")  # fmt: skip
    if model.hf.config.model_type != other.hf.config.model_type:
        raise ValueError(f"The two models are of different families: {model.hf.config.model_type} and "
                         f"{other.hf.config.model_type}.")  # fmt: skip
    if model.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise ValueError("The two models have different vocabularies, so the same prompt is not the same to both.")
