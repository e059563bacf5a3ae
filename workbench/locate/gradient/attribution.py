"""Attribution patching and its relatives: what activation patching would find, to first order, for all components at once."""

from __future__ import annotations

import time
from contextlib import nullcontext

import numpy as np
import torch

from workbench import measure
from workbench.locate.causal.null import donors, draws_of, partners
from workbench.locate.causal.patching import DIRECTIONS, name_of, reader, refuse_without_gap
from workbench.locate.causal.places import batches
from workbench.locate.gradient.attention import Attention
from workbench.locate.gradient.passes import refuse_without_slope, run, tokens_per_pass
from workbench.locate.gradient.rules import relevance_rules
from workbench.locate.gradient.sites import needs, select, slope, value
from workbench.model.plan import Prompts
from workbench.model.sweep import bar
from workbench.scores import Scores
from workbench.task import Task

DRAWS = 4
# parts of one layer
BLOCK = ("q", "k", "v", "attn_scores", "pattern", "z", "attn_out", "router", "neuron", "expert", "mlp_out")
FROM_CONSTANT = ("q", "k", "attn_scores", "pattern")  # where relevance does not go


def attribution_patch(model, task: Task, at, *, positions=None, direction: str = "denoising", metric="logit_diff",
                      qk_fix: bool = False, grad_drop: bool = False, null=True, seed: int = 0,
                      progress: bool = True) -> Scores:  # fmt: skip
    """Which components would activation patching find? Estimated for all of them from two passes forward and one back.

    To first order, putting activation a' in the place of a moves the metric by (a' - a) dm/da, the gradient being taken
    in the run that is patched: the corrupted one for denoising, the clean one for noising. Scores are in the units of
    `causal.patch` (ratios of means over prompts), so the two can be laid side by side; where they differ, patching is right.
    It is exact where the metric is linear in the component, good for heads and neurons, and poor where the change is large
    (streams, early layers), where attention is saturated, and where effects cancel. The last two have a remedy:

    - `qk_fix`: for queries and keys, recompute the softmax with the other query or key, and take the gradient from the
      pattern on: sum of (pattern' - pattern) dm/dpattern. A saturated softmax hides nothing any more.
    - `grad_drop`: go back once for each layer, each time without the gradient through that layer's attention and FFN, and
      average the |effect|. What cancels in one layer shows up without it. Scores lose their sign.

    The null is that of `causal.patch`, to the same order: activations of other pairs' prompts of the unpatched side.

    Args:
        task, at, positions, direction: as for `causal.patch`, for the same kinds.
        metric: "logit_diff", "log_prob", "prob", or a differentiable function (logits, answer, foil) -> [prompt].
        null: False for none, True for four draws per prompt (they cost no pass), or their number.
    Returns:
        Scores. Cost: 3 forward-pass equivalents, with `grad_drop` 2 plus the number of layers.
    Raises:
        ValueError: as for `causal.patch`; for a metric without gradient.
    Source:
        Nanda 2022, "Attribution patching"; Syed et al. 2024; Kramar et al. 2024 (AtP*): QK fix section 3.1, GradDrop 3.2.
    """
    return _attribute(model, task, at, positions, direction, metric, qk_fix, grad_drop, False, null, seed, progress)


def relevance_patch(model, task: Task, at, *, positions=None, direction: str = "denoising", metric="logit_diff", null=True,
                    seed: int = 0, progress: bool = True) -> Scores:  # fmt: skip
    """Which components would activation patching find, if the way back follows the rules of relevance? (RelP)

    Attribution patching with another way back: norms have a constant scale, attention a constant pattern, activation
    functions a constant ratio of output to input, and of gated products each factor gets half. The model becomes linear
    around the run, so that nothing saturates; what acts through attention patterns is left out (queries and keys get
    nothing).

    Args:
        task, at, positions, direction, metric, null: as for `attribution_patch`; not for q, k, attn_scores, pattern.
    Returns:
        Scores. Cost: 3 forward-pass equivalents.
    Raises:
        ValueError: as for `attribution_patch`; for kinds that relevance does not reach, a remote model, fused experts.
    Source:
        Rezaei Jafari et al. 2025, "RelP" (arXiv 2508.21258); Achtibat et al. 2024 and Ali et al. 2022 for the rules.
    """
    return _attribute(model, task, at, positions, direction, metric, False, False, True, null, seed, progress)


def _attribute(model, task, at, positions, direction, metric, qk_fix, grad_drop, rules, null, seed, progress) -> Scores:
    began, names = time.perf_counter(), model.names
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown; choose {' or '.join(map(repr, DIRECTIONS))}.")
    refuse_without_slope(metric)
    task, draws = Task.of(task), DRAWS if null is True else draws_of(null)
    pairs = task.on(model)
    chosen = select(model, pairs, at, positions)
    _refuse(names, chosen, qk_fix, grad_drop, rules)
    read, n, noising = reader(pairs, metric), len(pairs.clean), direction == "noising"
    acts, slopes = (set().union(*parts) for parts in zip(*(needs(names, one, qk_fix) for one in chosen.members)))
    groups = batches(pairs, 2, tokens_per_pass(names, slopes))
    ids = (pairs.clean, pairs.corrupted) if noising else (pairs.corrupted, pairs.clean)
    others, draws = others_of(pairs, ids[0], groups, draws, seed)
    base, source, moved = np.zeros(n), np.zeros(n), np.full((1 + draws, len(chosen.found), n), np.nan)
    with bar(n, progress) as show:
        for group in groups:
            of = read(group)
            batch = [Prompts([side[i] for i in group]) for side in ids]
            with relevance_rules(model) if rules else nullcontext():
                own = run(model, batch[0], acts, of, slopes=sorted(slopes), drop=grad_drop)
            other = run(model, batch[1], acts, of)
            base[group], source[group] = own.value.cpu().numpy(), other.value.cpu().numpy()
            theirs = [donors(others, group, draw) for draw in range(draws)]
            _effects(model, chosen, batch[0], group, own, other.acts, theirs, qk_fix, moved)
            show.update(len(group))
    effects, under = moved[0], moved[1:]
    clean, corrupted = (base, source) if noising else (source, base)
    gap, usable = clean - corrupted, [i for i in range(n) if others[i] is not None]
    clusters = pairs.task.clusters()
    refuse_without_gap(model, gap, clean, corrupted, metric, clusters)
    effects *= np.sign(gap.mean()) if grad_drop else -1 if noising else 1
    values, low, high = measure.ratio_of_means(effects, gap, clusters, seed=seed)
    limit, why = np.full(len(values), np.nan), "" if null else "No null was asked for."
    if draws and len(usable) >= 2:
        limit = measure.null_threshold(under[..., usable]) / abs(gap.mean())
    elif null:
        why = "No three prompts have equal length, so there is no other pair to make a null from."
    how = "relevance_patch" if rules else "attribution_patch" + ", QK fix" * qk_fix + ", GradDrop" * grad_drop
    return Scores(chosen.found, values, low, high, limit, effects, f"gradient.{how}", name_of(metric), float(clean.mean()),
                  float(corrupted.mean()), direction, "the same estimate for other pairs' prompts of the unpatched side"
                  if null else "", chosen.labels, task.name, 2.0 + (names.n_layers if grad_drop else 1),
                  time.perf_counter() - began, seed, why)  # fmt: skip


def _effects(model, chosen, prompts, group, own, other: dict, theirs: list, qk_fix: bool, into) -> None:
    """(a' - a) dm/da of every component, summed over its positions, into [draw, component, prompt].

    The first draw takes a' from the other side, the rest from other prompts of this side.
    """
    device = next(iter(own.acts.values())).device
    names, masks = model.names, chosen.masks(group, prompts, device)
    theirs = [one.to(device) for one in theirs]
    for part in chosen.members:
        kind, layer, _ = part
        mask = masks[chosen.used(part)]
        found = []
        for dropped, slopes in enumerate(own.slopes):
            if len(own.slopes) > 1 and dropped == layer and kind in BLOCK:
                continue  # without its own layer's, a part of the layer has no slope
            if kind in ("q", "k") and qk_fix:
                attention = Attention(names, own.acts, slopes["pattern", layer], layer,
                                      getattr(model.hf.config, "attn_logit_softcapping", None))  # fmt: skip
                recompute, mine = attention.query if kind == "q" else attention.key, own.acts[kind, layer]
                effect = [recompute(x, mask) for x in (other[kind, layer], *(mine[one] for one in theirs))]
                found.append(torch.stack(effect))
                continue
            if kind == "feature":
                sides = _features(names, chosen, part, own.acts, slopes, other)
            else:
                sides = [value(names, acts, kind, layer) for acts in (own.acts, other)] + [
                    slope(names, slopes, kind, layer)
                ]
                sides = [x.float().unflatten(-1, (names.size(kind) or 1, -1)) for x in sides]
            found.append(torch.einsum("dntu,pnt->dpnu", _first_order(*sides, theirs), mask))
        chosen.put(into, group, part, sum(x.abs() for x in found) / len(found) if len(own.slopes) > 1 else found[0])


def _first_order(mine, other, slopes, theirs) -> torch.Tensor:
    """Changes times slopes, [draw, row, column, unit], from activations [row, column, unit, width] of the two sides."""
    if mine.abs().max() > 1e30:  # attention scores that the causal mask has ruled out
        mine, other = (torch.where(x.abs() > 1e30, 0, x) for x in (mine, other))
    found = [((other - mine) * slopes).sum(-1)]
    if theirs and mine.shape[-1] >= 8:  # all pairs of prompts at once
        crossed = torch.einsum("ntuw,mtuw->nmtu", slopes, mine)
        rows = torch.arange(len(mine), device=mine.device)
        found += [crossed[rows, one] - crossed[rows, rows] for one in theirs]
    else:
        found += [((mine[one] - mine) * slopes).sum(-1) for one in theirs]
    return torch.stack(found)


def _features(names, chosen, part, acts, slopes, other) -> tuple:
    """Activations of the features asked for (others 0) on both sides, and their slopes, [row, column, feature, 1]."""
    sae, indices = names.saes[part[2]], sorted({index for _, index, _ in chosen.members[part]})
    reads, at = sae.source, sae.at
    sides = [value(names, some, reads.kind, reads.layer).float() for some in (acts, other)]
    slopes = sae.slope(slope(names, slopes, at.kind, at.layer), sides[0], indices)
    found = []
    for x in (*(sae.encode(side, indices) for side in sides), slopes):
        spread = x.new_zeros(*x.shape[:2], indices[-1] + 1)
        spread[..., indices] = x
        found.append(spread[..., None])
    return tuple(found)


def others_of(pairs, base, groups, draws: int, seed: int):
    """Other prompts for the null, and how many draws there are: fewer where batches have few prompts of one length."""
    best = [None] * len(base)
    for fewer in range(draws, 1, -1):
        if all(best):
            break
        others = partners(pairs, base, groups, fewer, seed)
        if sum(map(bool, others)) > 1.5 * sum(map(bool, best)):
            best, draws = others, fewer
    return best, draws if any(best) else 0


def _refuse(names, chosen, qk_fix: bool, grad_drop: bool, rules: bool) -> None:
    kinds = {kind for kind, _, _ in chosen.members}
    if rules and kinds & set(FROM_CONSTANT):
        raise ValueError(f"Relevance does not flow through attention patterns, so {', '.join(sorted(kinds & set(FROM_CONSTANT)))} "
                         "have none. Use attribution_patch(..., qk_fix=True) for queries and keys.")  # fmt: skip
    if qk_fix and not kinds & {"q", "k"}:
        raise ValueError(f"qk_fix is for queries and keys ('q', 'k'); asked for: {', '.join(sorted(kinds))}.")
    if grad_drop and names.n_layers < 2:
        raise ValueError("grad_drop leaves out one layer at a time, so it needs a model of at least two layers.")
    if qk_fix and "attn_scores" in names.refused:
        raise ValueError(f"qk_fix needs attention scores. {names.refused['attn_scores']}")
