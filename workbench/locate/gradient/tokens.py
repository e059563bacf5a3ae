"""Which tokens does the answer hang on? Gradient times input, and integrated gradients, on the token embeddings."""

from __future__ import annotations

import time
import warnings
from operator import attrgetter

import numpy as np
import torch

from workbench import measure
from workbench.component import Component
from workbench.locate.causal.null import donors, draws_of
from workbench.locate.causal.patching import name_of, reader, refuse_without_gap
from workbench.locate.causal.places import batches, cells_of
from workbench.locate.gradient.attribution import others_of
from workbench.locate.gradient.passes import refuse_without_slope, run, tokens_per_pass
from workbench.locate.gradient.tokenscores import TokenScores
from workbench.model.plan import Prompts
from workbench.model.sweep import bar
from workbench.task import Pairs, Task

EMBED = ("embed", None)
BASELINES = ("corrupted", "zero", "mean")
HOWS = ("norm", "input")
DRAWS, IG_DRAWS = 4, 2
WARN = 0.05


def saliency(model, task, *, positions=None, how="norm", metric="logit_diff", baseline=None, null=True,
             seed: int = 0) -> TokenScores:  # fmt: skip
    """Which tokens does the answer hang on, to first order? One pass forward and one back.

    - "norm": |e| |dm/de|, how far the metric would move if the embedding e were turned as far as it is long, in the worst
      direction. Never negative, so it says how much a token matters, and not for which side.
    - "input": gradient times input, (e - b) dm/de: by how much the metric falls, to first order, when the embedding goes to
      the baseline b. With baseline "zero" (the original form) this is nearly nothing in models that begin with a norm,
      as a norm does not care how long its input is; "corrupted" asks about the tokens of the other side.

    Neither adds up to anything; `integrated_gradients` does, for more passes.

    The null: for "norm", the same numbers dealt anew among the tokens of each prompt; for "input", the same gradients with
    the embeddings of other prompts of the same length.

    Args:
        task: pairs (their clean side, answer against foil), another task, its name, or a list of texts (the model's
            most probable next token against the second).
        positions: as for `causal.patch`; None means each position (or span, where prompts differ in length).
        metric: "logit_diff", "log_prob", "prob", or a differentiable function (logits, answer, foil) -> [prompt].
        baseline: for "input": "corrupted" (the default for pairs), "zero" (otherwise), "mean" (over the vocabulary), or a
            vector [d_model].
    Returns:
        TokenScores in units of the metric. Cost: 2 forward-pass equivalents.
    Raises:
        ValueError: for a metric without gradient, or a baseline that is not there.
    Source:
        Simonyan et al. 2014 (norm); Shrikumar et al. 2016 (times the input).
    """
    began, rng = time.perf_counter(), np.random.default_rng(seed)
    if how not in HOWS:
        raise ValueError(f"how={how!r} is unknown; choose {' or '.join(map(repr, HOWS))}.")
    draws = DRAWS if null is True else draws_of(null)
    baseline = ("corrupted" if _is_pairs(task) else "zero") if baseline is None else baseline
    pairs, name, known = _pairs(model, task, metric, baseline)
    n, groups = len(pairs.clean), batches(pairs, 1, tokens_per_pass(model.names))
    norm, contrast = how == "norm", isinstance(baseline, str) and baseline == "corrupted"
    others, draws = ([[]] * n, draws) if norm else others_of(pairs, pairs.clean, groups, draws, seed)
    found, under, value, read = [None] * n, [[None] * n for _ in range(draws)], np.zeros(n), reader(pairs, metric)
    for group in groups:
        of, prompts = read(group), Prompts([pairs.clean[i] for i in group])
        here, start = _embedded(model, pairs, group, baseline)
        own = run(model, prompts, [], of, slopes=[EMBED], embed=here)
        slope, value[group] = own.slopes[0][EMBED], own.value.cpu().numpy()
        by_token = here.norm(dim=-1) * slope.norm(dim=-1) if norm else ((here - start) * slope).sum(-1)
        _cut(found, group, prompts, by_token)
        for draw in range(0 if norm else draws):
            theirs = here[donors(others, group, draw)]  # comes in place of the own token, or of the baseline
            _cut(under[draw], group, prompts, ((theirs - (here if contrast else start)) * slope).sum(-1))
    if norm:
        under, others = [[rng.permutation(one) for one in found] for _ in range(draws)], [[i] for i in range(n)]
        what, null_is = f"saliency, {how}", "the same numbers dealt anew among the tokens of each prompt"
    else:
        what = f"saliency, {how} from {_said(baseline)}"
        null_is = "the same gradients with the embeddings of other prompts"
    return _scores(model, pairs, name, known, positions, what, metric, found, under, others, value, None, 2.0, null, null_is,
                   seed, began)  # fmt: skip


def integrated_gradients(model, task, *, positions=None, metric="logit_diff", baseline=None, steps: int = 64, null=True,
                         seed: int = 0, progress: bool = True) -> TokenScores:  # fmt: skip
    """Which tokens does the answer hang on, so that the shares add up? Integrated gradients on the token embeddings.

    Walks from the baseline to the prompt in a straight line and sums the gradient along it: a token's score is (e - b)
    times the mean gradient. The scores of a prompt add up to m(prompt) - m(baseline), but for the error of the sum, the
    completeness gap: `gaps` has it for each prompt, and there is a warning where the median is above 5 %.

    With pairs, the baseline is the corrupted prompt, so only tokens that differ can get anything, and scores are shares of
    the difference (ratios of means, as for `causal.patch`).

    The null walks from the baseline to other prompts of the same length (of the corrupted side, with that baseline), with
    an eighth of the steps.

    Args:
        task, positions, metric: as for `saliency`.
        baseline: "corrupted" (the default for pairs), "mean" (the mean embedding; the default otherwise), "zero", or a
            vector [d_model]. The last three lie off the data.
        steps: of the midpoint rule.
    Returns:
        TokenScores. Cost: 2 forward-pass equivalents for a step.
    Raises:
        ValueError: as for `saliency`; for pairs between which the metric hardly differs.
    Source:
        Sundararajan et al. 2017, eq. 1 and 3; the corrupted prompt as baseline as in Hanna et al. 2024.
    """
    began = time.perf_counter()
    if steps < 1:
        raise ValueError(f"steps={steps} is not possible; give 1 or more, for example 64.")
    draws = IG_DRAWS if null is True else draws_of(null)
    baseline = ("corrupted" if _is_pairs(task) else "mean") if baseline is None else baseline
    pairs, name, known = _pairs(model, task, metric, baseline)
    n, groups = len(pairs.clean), batches(pairs, 1, tokens_per_pass(model.names))
    contrast = isinstance(baseline, str) and baseline == "corrupted"
    others, draws = others_of(pairs, pairs.corrupted if contrast else pairs.clean, groups, draws, seed)
    found, under, ends = [None] * n, [[None] * n for _ in range(draws)], np.zeros((2, n))
    few, read = max(1, steps // 8), reader(pairs, metric)
    with bar(n * (steps + draws * few), progress) as show:
        for group in groups:
            of, prompts = read(group), Prompts([pairs.clean[i] for i in group])
            here, start = _embedded(model, pairs, group, baseline)
            for end, embed in enumerate((here, start)):
                ends[end, group] = run(model, prompts, [], of, embed=embed).value.cpu().numpy()
            _cut(found, group, prompts, _along(model, prompts, of, start, here, steps, show))
            for draw in range(draws):
                there = (start if contrast else here)[donors(others, group, draw)]
                _cut(under[draw], group, prompts, _along(model, prompts, of, start, there, few, show))
    gap = ends[0] - ends[1]
    missing = np.abs(np.array([one.sum() for one in found]) - gap) / np.maximum(np.abs(gap), 1e-9)
    if np.median(missing) > WARN:
        warnings.warn(f"Integrated gradients miss {np.median(missing):.0%} of the difference on the median prompt: take more "
                      f"steps (now {steps}).", stacklevel=2)  # fmt: skip
    return _scores(model, pairs, name, known, positions, f"integrated_gradients from {_said(baseline)}", metric, found, under,
                   others, ends[0], ends[1] if contrast else None, 2.0 + 2 * (steps + draws * few), null,
                   f"the same walk to other {'corrupted ' if contrast else ''}prompts", seed, began, missing)  # fmt: skip


def _along(model, prompts: Prompts, of, start, end, steps: int, show) -> torch.Tensor:
    """(end - start) times the mean gradient on the straight line, midpoint rule, several steps in one pass: [row, column]."""
    n = len(prompts.ids)
    at_once = max(1, tokens_per_pass(model.names) // (n * prompts.width))
    total = torch.zeros_like(end)
    for part in torch.split((torch.arange(steps) + 0.5) / steps, at_once):
        many = Prompts(prompts.ids * len(part))
        rows = torch.arange(n).repeat(len(part))
        mixed = torch.cat([start + share * (end - start) for share in part])
        seen = run(model, many, [], of, rows=rows, slopes=[EMBED], embed=mixed)
        total += seen.slopes[0][EMBED].unflatten(0, (len(part), n)).sum(0)
        show.update(n * len(part))
    return ((end - start) * total / steps).sum(-1)


def _said(baseline) -> str:
    return baseline if isinstance(baseline, str) else "a given vector"


def _is_pairs(task) -> bool:
    return not isinstance(task, (list, tuple)) and Task.of(task).kind == "pairs"


def _pairs(model, task, metric, baseline) -> tuple[Pairs, str, bool]:
    """(prompts as pairs, a name, whether answers are the task's); of texts, the model's first and second choice."""
    refuse_without_slope(metric)
    if not isinstance(baseline, torch.Tensor) and baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r} is unknown; choose {', '.join(BASELINES)}, or a vector [d_model].")
    if isinstance(task, (list, tuple)):
        if not task:
            raise ValueError("No prompt was given: pass a task, the name of a bundled one, or a list of texts.")
        task = Task([{"text": text} for text in task], "texts")
    task = Task.of(task)
    if task.kind == "pairs":
        return task.on(model), task.name, True
    if isinstance(baseline, str) and baseline == "corrupted":
        raise ValueError("baseline='corrupted' needs pairs; for texts choose 'mean', 'zero' or a vector [d_model].")
    ids = [model.ids(text) for text in task.column("text")]
    first, second = model.logits(ids).topk(2).indices.T
    return Pairs(task, ids, ids, first, second, [{} for _ in ids], None), task.name, False


def _embedded(model, pairs, group, baseline) -> tuple[torch.Tensor, torch.Tensor]:
    """Token embeddings of the clean prompts and of the baseline, [row, column, d_model]."""
    module, device = attrgetter(model.names.row.embed)(model.hf), model.hf.device
    with torch.no_grad():
        sides = [
            module(model.inputs(Prompts([side[i] for i in group]))["input_ids"])
            for side in (pairs.clean, pairs.corrupted)
        ]
        here = sides[0]
        if isinstance(baseline, torch.Tensor):
            if baseline.shape != here.shape[-1:]:
                raise ValueError(f"The baseline must be a vector [{here.shape[-1]}]; got shape {list(baseline.shape)}.")
            return here, baseline.to(here).expand_as(here)
        if baseline == "corrupted":
            return here, sides[1]
        if baseline == "zero":
            return here, torch.zeros_like(here)
        return here, module(torch.arange(model.names.d_vocab, device=device)).mean(0).expand_as(here)


def _cut(into: list, group, prompts: Prompts, contributions: torch.Tensor) -> None:
    """[row, column] as one array [position] for each prompt."""
    for row, i in enumerate(group):
        into[i] = contributions[row, prompts.pads[row] :].double().cpu().numpy()


def _scores(model, pairs, name, known, positions, method, metric, found, under, others, value, start, cost, null, null_is,
            seed, began, gaps=None) -> TokenScores:  # fmt: skip
    one, cells, labels = cells_of(model, pairs, "resid_pre.0", positions or "each")
    where = [cell.parts[component] for component, cell in zip(one, cells, strict=True)]
    usable = [i for i in range(len(found)) if others[i]]

    def placed(values, prompts):
        return np.array([[values[i][columns[i]].sum() for i in prompts] for columns in where])

    effects, scale, clusters = placed(found, range(len(found))), 1.0, pairs.task.clusters()
    if start is not None:  # shares of what tells the two sides apart
        gap = value - start
        refuse_without_gap(model, gap, value, start, metric, clusters)
        values, low, high = measure.ratio_of_means(effects, gap, clusters, seed=seed)
        scale = abs(gap.mean())
    else:
        values, low, high = measure.mean_interval(effects.T, clusters, seed=seed)
    limit, why = np.full(len(values), np.nan), "" if null else "No null was asked for."
    if under and len(usable) >= 2:
        limit = measure.null_threshold(np.stack([placed(draw, usable) for draw in under])) / scale
    elif null:
        why = "No three prompts have equal length, so there is no other prompt to make a null from."
    asked = name_of(metric) + ("" if known else " of the model's first choice against its second")
    return TokenScores([Component("embed", position=c.position) for c in one], values, low, high, limit, effects,
                       f"gradient.{method}", asked, float(value.mean()) if start is not None else np.nan,
                       float(start.mean()) if start is not None else np.nan, "",
                       null_is if null else "", labels, name, float(cost),
                       time.perf_counter() - began, seed, why, {},
                       [[model.token(token) for token in ids] for ids in pairs.clean], found,
                       np.full(len(found), np.nan) if gaps is None else gaps)  # fmt: skip
