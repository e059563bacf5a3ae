"""Which parts respond differently to two kinds of prompts? Means, maxima and frequencies, contrasted."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch

from workbench.component import KINDS, Component, components
from workbench.locate.magnitude.reading import DRAWS, matched, read, resampled, shuffles
from workbench.model.plan import Prompts
from workbench.scores import Scores
from workbench.task import Task

HEADS = ("q", "k", "v", "z")
STREAMS = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "ln_final")
ELSEWHERE = {
    "attn_scores": "pattern_scores",
    "pattern": "pattern_scores",
    "router": "expert_use",
}
UNITS = 4096  # at a time in the statistics, so that resampling a large model stays in memory
FLOOR = 4e-4  # of the whole variance counts as within a side, so that |score| stays below about 100


def contrast(model, task: Task, at="neuron.*.*", *, statistic: str = "mean", positive: str | None = None,
             null: bool = True, draws: int = DRAWS, seed: int = 0) -> Scores:  # fmt: skip
    """Which neurons, heads or directions of the stream respond differently to two kinds of prompts?

    A prompt counts as one observation: a neuron's activation (a head's norm, a dimension of the stream) is first
    summarized over its tokens, padding and BOS left out. The score is the difference of the two kinds' means over the
    pooled standard deviation (Cohen's d, at most about 100), positive where `positive` or clean prompts give more. A
    stream has one score, that of its most different dimension (column `dimension`); so has its null.

    The null deals the labels anew, within pairs or within matched rows. `null_p95` holds for one component that was
    named beforehand: of many, one in twenty exceeds it by chance. The column `null_best` is what the *largest* of all
    the scores reaches in 95 % of the dealings. A contrast shows what goes with a difference, not what causes it.

    Args:
        task: pairs (clean against corrupted) or labelled texts; the name of a bundled task.
        at: components or families: neuron, expert (its routing weight), z, q, k, v (norms of heads), embed, resid_pre, resid_mid, resid_post,
            attn_out, mlp_out, ln_final. With a position (`@-1`, `@subject`) only that token counts.
        statistic: over a prompt's tokens: "mean", "max", or for neurons and experts "frequency", the share of tokens that open the
            neuron (a gate's pre-activation above 0; without a gate an activation above 0) or go to the expert.
        positive: for labelled texts the label that stands against all others; the first of two by default.
    Returns:
        Scores with further columns: `auroc` (how often a positive prompt has the higher value; 0.5 is chance) and
        `null_auroc`; the two raw means; `null_best`; `dimension` for streams. Cost: one pass over either side, for each
        position asked for.
    Raises:
        ValueError: for a kind that is not offered, an unknown statistic or label, fewer than two prompts on a side.
    Source:
        Survey, magnitude analysis; AUROC of a neuron as a classifier as in Suau et al. 2024 (Whispering Experts).
    """
    began = time.perf_counter()
    wanted = _wanted(model, at, statistic)
    task = Task.of(task)
    sides = _sides(model, task, positive)
    labels, names, paired = sides.labels, sides.names, task.kind == "pairs"
    units, values = _activations(model, sides.prompts, wanted, statistic)
    dealt = shuffles(labels, sides.groups, draws, seed + 1).astype(float) if null else np.zeros((0, len(labels)))
    weights = resampled(len(labels), sides.clusters, draws, seed)
    # one of many draws may leave out a side altogether, where there are few prompts
    weights = weights[((weights @ labels) > 0) & ((weights @ (1 - labels)) > 0)]
    found, best = [], np.zeros(len(dealt))
    for (kind, _), x in zip(units, values, strict=True):
        score, auroc = separation(x, labels[None])
        score, auroc = score[0], auroc[0]
        under, under_auroc = separation(x, dealt)
        under, under_auroc = np.abs(under), np.abs(under_auroc - 0.5)
        best = np.maximum(best, under.max(1, initial=0))
        keep = np.arange(x.shape[1])
        if kind in STREAMS:
            keep = np.array([np.abs(score).argmax()])
            under, under_auroc = under.max(1, keepdims=True), under_auroc.max(1, keepdims=True)
        low, high = _interval(x[:, keep], labels, weights)
        side = [x[labels == which][:, keep].mean(0) for which in (1, 0)]
        found.append({
            "values": score[keep], "ci_lo": low, "ci_hi": high, "auroc": auroc[keep], f"{statistic} {names[0]}": side[0],
            f"{statistic} {names[1]}": side[1], "null_p95": _p95(under), "null_auroc": 0.5 + _p95(under_auroc),
            "dimension": keep if kind in STREAMS else np.full(len(keep), -1),
            "per_prompt": (x[labels == 1] - x[labels == 0])[:, keep].T if paired else x[:, keep].T,
        })  # fmt: skip
    order = np.argsort([i for _, index in units for i in index], kind="stable")
    columns = {key: np.concatenate([one[key] for one in found])[order] for key in found[0]}
    main = {key: columns.pop(key) for key in ("values", "ci_lo", "ci_hi", "null_p95", "per_prompt")}
    if (columns["dimension"] < 0).all():
        columns.pop("dimension")
    columns["null_best"] = np.full(len(order), np.quantile(best, 0.95) if null else np.nan)
    said = f"labels shuffled within {sides.how}, {draws} draws" if null else ""
    return Scores(wanted, **main, method="magnitude.contrast", metric=f"standardized difference of the {statistic}",
                  direction=f"{names[0]} - {names[1]}", null=said, task=task.name,
                  cost=(1.0 + paired) * len({one.position for one in wanted}), seed=seed,
                  seconds=time.perf_counter() - began, why="" if null else "No null was asked for.", columns=columns)  # fmt: skip


def separation(x: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far apart do labels set the values? For many labellings at once.

    Args:
        x: [row, unit]. sides: 1 for positive rows, else 0, [labelling, row], equally many in each.
    Returns:
        (difference of means over the pooled standard deviation, AUROC), each [labelling, unit].
    """
    from scipy.stats import rankdata

    score, auroc = (np.zeros((len(sides), x.shape[1])) for _ in range(2))
    if not len(sides):
        return score, auroc
    n = float(sides[0].sum())
    m = len(x) - n
    for start in range(0, x.shape[1], UNITS):
        part = slice(start, start + UNITS)
        centred = x[:, part].astype(np.float64)
        centred -= centred.mean(0)
        total, ones = (centred**2).sum(0), sides @ centred  # the others sum to minus that
        within = np.maximum(total - ones**2 * (1 / n + 1 / m), FLOOR * total + 1e-30) / (n + m - 2)
        score[:, part] = ones * (1 / n + 1 / m) / np.sqrt(within)
        auroc[:, part] = (sides @ rankdata(x[:, part], axis=0) - n * (n + 1) / 2) / (n * m)
    return score, auroc


def _interval(x, labels, weights) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap of the standardized difference."""
    low, high = np.full(x.shape[1], np.nan), np.full(x.shape[1], np.nan)
    n, m = labels.sum(), (1 - labels).sum()
    for start in range(0, x.shape[1], UNITS):
        part = slice(start, start + UNITS)
        centred, moments = x[:, part] - x[:, part].mean(0), []
        for side in (labels, 1 - labels):
            share = weights * side / (weights @ side)[:, None]
            mean = share @ centred
            moments.append((mean, np.maximum(share @ centred**2 - mean**2, 0)))
        (mean, variance), (other, other_variance) = moments
        pooled = (n * variance + m * other_variance) / (n + m - 2)
        drawn = (mean - other) / np.sqrt(np.maximum(pooled, FLOOR * (centred**2).mean(0) + 1e-30))
        low[part], high[part] = np.quantile(drawn, [0.025, 0.975], axis=0)
    return low, high


def _p95(under: np.ndarray) -> np.ndarray:
    return np.quantile(under, 0.95, axis=0) if len(under) else np.full(under.shape[1], np.nan)


def _wanted(model, at, statistic: str) -> list[Component]:
    if statistic not in ("mean", "max", "frequency"):
        raise ValueError(f"statistic={statistic!r} is unknown; choose 'mean', 'max' or 'frequency'.")
    for one in components(at):
        if one.kind in ELSEWHERE:
            raise ValueError(f"{one}: for this use wb.locate.magnitude.{ELSEWHERE[one.kind]}(model, ...).")
        if one.kind not in ("neuron", "expert", *HEADS, *STREAMS):
            raise ValueError(f"{one} cannot be contrasted; kinds are neuron, expert, {', '.join((*HEADS, *STREAMS))}.")
        if statistic == "frequency" and one.kind not in ("neuron", "expert"):
            raise ValueError(
                f"{one}: only neurons are open or closed, and experts chosen or not; for {one.kind} choose 'mean' or 'max'."
            )
    return sorted(model.names.expand(components(at)))


def _activations(model, prompts: Prompts, wanted: list[Component], statistic: str):
    """((kind, numbers of the components) and values [row, unit]) for each site and position."""
    blocks: dict[tuple, list[int]] = {}
    for i, one in enumerate(wanted):
        blocks.setdefault((one.position, one.kind, one.layer), []).append(i)
    units, values = [], []
    for position in dict.fromkeys(block[0] for block in blocks):
        mine = [block for block in blocks if block[0] == position]
        kinds = {"neuron": "gate"} if statistic == "frequency" else {}
        sites = [(kinds.get(kind, kind), layer) for _, kind, layer in mine]
        sites += [("resid_pre", layer) for _, kind, layer in mine if kind == "resid_mid"]

        def reduce(x, mask, kind):
            if kind in HEADS:
                x = x.unflatten(-1, (model.names.size(kind), -1)).norm(dim=-1)
            return _summary(x, mask, statistic)

        seen = read(model, prompts, sites, reduce, position)
        for block, site in zip(mine, sites):
            x = seen[site].numpy()
            index = [wanted[i].index for i in blocks[block]]
            units.append((block[1], blocks[block]))
            values.append(x if KINDS[block[1]][0] is None else x[:, index])
    return units, values


def _summary(x: torch.Tensor, mask: torch.Tensor, statistic: str) -> torch.Tensor:
    if statistic == "max":
        return x.masked_fill(~mask[..., None], -torch.inf).amax(1)
    x = (x > 0).float() if statistic == "frequency" else x
    return (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]


class Sides(NamedTuple):
    """Two kinds of prompts: ids; label (1, 0) and group to shuffle in [row]; clusters to resample, as for
    `measure.mean_interval`; their names; the groups in words."""

    prompts: Prompts
    labels: np.ndarray
    groups: np.ndarray
    clusters: object
    names: tuple[str, str]
    how: str


def _sides(model, task: Task, positive: str | None) -> Sides:
    if task.kind == "plain":
        raise ValueError(f"Task {task.name!r} holds plain texts; a contrast needs pairs (clean, corrupted, answer, foil) or "
                         "texts with labels: wb.Task([{'text': ..., 'label': ...}, ...]).")  # fmt: skip
    if task.kind == "pairs":
        if positive is not None:
            raise ValueError(f"positive={positive!r}: pairs are contrasted clean against corrupted; leave it out.")
        pairs = task.on(model)
        n = len(pairs.clean)
        prompts, number = Prompts([*pairs.clean, *pairs.corrupted], spans=pairs.spans * 2), np.tile(np.arange(n), 2)
        together = pairs.task.clusters() or [list(range(n))]
        clusters = [one * 2 for one in together]  # the two sides of a pair belong together
        sides = Sides(prompts, np.repeat([1, 0], n), number, clusters, ("clean", "corrupted"), "pairs")
    else:
        given = task.column("label")
        known = list(dict.fromkeys(given))
        positive = known[0] if positive is None and len(known) == 2 else positive
        if len(known) < 2 or positive not in known:
            raise ValueError(f"A contrast needs two kinds of texts; task {task.name!r} has the labels {known}, and "
                             f"positive={positive!r}. Name the label to set against the others.")  # fmt: skip
        labels = np.array([int(label == positive) for label in given])
        others = [label for label in known if label != positive]
        prompts = Prompts([model.ids(text) for text in task.column("text")])
        groups, clusters, how = matched(task, labels)
        sides = Sides(prompts, labels, groups, clusters, (positive, others[0] if len(others) == 1 else "others"), how)
    count = int(sides.labels.sum()), int((1 - sides.labels).sum())
    if min(count) < 2:
        raise ValueError(f"A contrast needs at least two prompts of each kind, to know how much they vary; task "
                         f"{task.name!r} has {count[0]} of {sides.names[0]!r} and {count[1]} of {sides.names[1]!r}.")  # fmt: skip
    return sides
