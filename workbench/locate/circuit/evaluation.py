"""Is this the circuit? Real runs in which every edge outside it carries the corrupted run."""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench import measure
from workbench.locate.causal.patching import name_of
from workbench.locate.circuit.attribution import both, groups, refuse_without_gap
from workbench.locate.circuit.graph import Circuit
from workbench.locate.circuit.results import Curve, Faithfulness
from workbench.model.edges import FLOATS, mixed, wiring
from workbench.task import Task

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def faithfulness(
    model, task: Task, circuit: Circuit, *, metric="logit_diff", random: int = 3, seed: int = 0
) -> Faithfulness:
    """Does this circuit do the task alone? Every edge outside it carries what its source wrote in the corrupted run.

    Args:
        task: pairs, or the name of a bundled task; better other ones than the circuit was found with.
        metric: "logit_diff", "log_prob", "prob", "accuracy", or a function (logits, answer, foil) -> [prompt].
        random: how many random circuits of as many edges to measure beside it (seed says which).
    Raises:
        ValueError: for a circuit of another model, or prompts between which the metric hardly differs.
    Source:
        Mueller et al. 2025, "MIB"; ratios of means after Miller et al. 2024.
    """
    began, task, wired = time.perf_counter(), Task.of(task), wiring(model)
    masks = [circuit.mask(wired), *random_masks(wired, len(circuit), random, seed)]
    clean, corrupted, kept = measured(model, task, masks, metric)
    clusters = task.on(model).task.clusters()
    shares, low, high = measure.ratio_of_means(kept - corrupted, clean - corrupted, clusters, seed=seed)
    return Faithfulness(float(shares[0]), float(low[0]), float(high[0]), shares[1:], clean, corrupted, kept[0], len(circuit),
                        circuit.whole, name_of(metric), task.name, time.perf_counter() - began)  # fmt: skip


def curve(
    model, task: Task, scores: Circuit, *, sizes=SIZES, metric="logit_diff", random: int = 2, seed: int = 0
) -> Curve:
    """How many edges does it take? Faithfulness of the strongest edges at a series of sizes, with CPR and CMD.

    CPR is the area under the faithfulness of the edges with the largest scores, CMD the area between 1 and the
    faithfulness of those with the largest |score|, both over sizes as shares of all edges. Random rankings give about 0.25
    and 0.75: they do nothing up to a half of the edges, and all edges do everything.

    Args:
        scores: all edges scored, as `eap_ig` returns them.
        sizes: shares of all edges, rising, to 1.
        random: how many random rankings to measure beside it.
    Source:
        Mueller et al. 2025, "MIB: a mechanistic interpretability benchmark", circuit track.
    """
    began, task, wired = time.perf_counter(), Task.of(task), wiring(model)
    sizes = [float(size) for size in sizes]
    if sorted(sizes) != sizes or not sizes[0] >= 0 or sizes[-1] > 1:
        raise ValueError(f"sizes={sizes}: give rising shares of the edges, from 0.0 to 1.0.")
    rankings = [scores.top(size, by) for by in ("sign", "size") for size in sizes]
    masks, rng = [one.mask(wired) for one in rankings], np.random.default_rng(seed)
    for _ in range(random):
        order = rng.permutation(int(wired.exists.sum()))
        masks += [_first(wired, order, size) for size in sizes]
    clean, corrupted, kept = measured(model, task, masks, metric)
    shares = (kept - corrupted).mean(1) / (clean - corrupted).mean()
    table = shares.reshape(2 + random, len(sizes))
    return Curve(np.array(sizes), np.array([len(one) for one in rankings[len(sizes) :]]), table[0], table[1], table[2:],
                 scores.method, task.name, len(clean), time.perf_counter() - began)  # fmt: skip


def minimality(model, task: Task, circuit: Circuit, *, metric="logit_diff", seed: int = 0) -> Circuit:
    """Which edges of the circuit does it need? Each is cut in turn, with all others of the circuit kept.

    Returns:
        The circuit with what each edge is worth: the metric it loses without it, as a share of the whole model's gap.
        Edges near 0 could be left out, at least one at a time; below 0, the circuit is better without them.
    Source:
        Wang et al. 2022, "Interpretability in the wild" (minimality), edge by edge.
    """
    began, task, wired = time.perf_counter(), Task.of(task), wiring(model)
    if not len(circuit):
        raise ValueError("This circuit has no edge that could be cut.")
    whole = circuit.mask(wired)
    places = [(wired.targets.index(edge.target), wired.sources.index(edge.source)) for edge in circuit]
    masks = [whole]
    for place in places:
        masks.append(whole.clone())
        masks[-1][place] = 0
    clean, corrupted, kept = measured(model, task, masks, metric)
    worth = (kept[:1] - kept[1:]) / (clean - corrupted).mean()
    mean, low, high = measure.mean_interval(worth.T, task.on(model).task.clusters(), seed=seed)
    return Circuit(circuit.edges, mean, circuit.sizes, circuit.whole, "circuit.minimality", name_of(metric), task.name, low,
                   high, per_prompt=worth, cost=1 + len(circuit), seconds=time.perf_counter() - began, seed=seed,
                   why="An edge outside the circuit has no effect on it, so the null is zero.")  # fmt: skip


def stability(scores: Circuit, size: int | float, *, by: str = "size", draws: int = 100, seed: int = 0) -> float:
    """Would other prompts have given the same circuit? Mean pairwise Jaccard of the strongest edges, over bootstrap samples
    of the prompts. 0.8 is a usual bar; two random circuits of a share p have about p / (2 - p).

    Args:
        scores: all edges with per-prompt scores, as `eap_ig` returns them.
        size, by: as for `Circuit.top`; edges are not pruned.
    Raises:
        ValueError: for scores without per-prompt values, or with fewer than two prompts.
    Source:
        Méloux et al. 2025, "Mechanistic interpretability as statistical estimation".
    """
    values = scores.per_prompt
    if values is None or values.shape[1] < 2:
        raise ValueError("Stability resamples prompts, and these scores have no values of several prompts (a saved circuit "
                         "keeps none). Score the edges again, with at least two pairs.")  # fmt: skip
    if by not in ("size", "sign"):
        raise ValueError(f"by={by!r} is unknown; choose 'size' or 'sign'.")
    count = round(size * scores.whole) if isinstance(size, float) else int(size)
    drawn = values @ measure.bootstrap_weights(values.shape[1], draws, seed).T
    order = np.argsort(-(np.abs(drawn) if by == "size" else drawn), axis=0, kind="stable")[:count]
    chosen = np.zeros((draws, len(values)))
    np.put_along_axis(chosen, order.T, 1, axis=1)
    both_have = (chosen @ chosen.T)[np.triu_indices(draws, 1)]
    return float((both_have / np.maximum(1, 2 * count - both_have)).mean())


# runs


def measured(model, task: Task, masks: list, metric):
    """The metric for each prompt in the clean run, the corrupted run, and under each mask [target, source].

    Returns:
        ([prompt], [prompt], [mask, prompt])
    Raises:
        ValueError: when clean and corrupted prompts hardly differ.
    """
    pairs, of, wired = task.on(model), measure.metric(metric), wiring(model)
    clean, corrupted, kept = (
        np.zeros(len(pairs.clean)),
        np.zeros(len(pairs.clean)),
        np.zeros((len(masks), len(pairs.clean))),
    )

    def read(logits, which):
        return (
            of(logits, pairs.answer[which].to(logits.device), pairs.foil[which].to(logits.device)).float().cpu().numpy()
        )

    alive = [i for i, mask in enumerate(masks) if connected(wired, mask)]
    for group in groups(pairs, wired, model, 1):
        runs, own = both(model, wired, pairs, group), torch.tensor(group)
        clean[group], corrupted[group] = (read(run.logits, own) for run in runs)
        kept[:, group] = corrupted[group]
        many = len(group)
        step = max(1, FLOATS // (many * runs[0].prompts.width * model.names.d_model * len(wired.sources)))
        for start in range(0, len(alive), step):
            part = alive[start : start + step]
            rows = torch.stack([masks[i] for i in part]).repeat_interleave(many, 0)
            which = torch.arange(many).repeat(len(part))
            logits = mixed(model, wired, *runs, masks[part[0]] if len(part) == 1 else rows, which)
            kept[np.ix_(part, group)] = read(logits, own.repeat(len(part))).reshape(-1, many)
    refuse_without_gap(model, clean, corrupted, metric, clusters=pairs.task.clusters())
    return clean, corrupted, kept


def connected(wired, mask: torch.Tensor) -> bool:
    """Does any path lead from the embedding to the logits? If none does, the run is the corrupted run."""
    mask, reached = mask.numpy() != 0, np.zeros(len(wired.sources), bool)
    reached[0] = True
    _, heads, kv_heads = wired.sizes
    for t, target in enumerate(wired.targets[:-1]):
        if (mask[t] & reached).any():
            each = heads // kv_heads if target.kind in "kv" else 1
            first = 1 + target.layer * (heads + 1) + (heads if target.kind == "mlp_out" else target.index * each)
            reached[first : first + each] = True
    return bool((mask[-1] & reached).any())


def random_masks(wired, size: int, draws: int, seed: int) -> list:
    """Masks of random circuits of as many edges."""
    rng, whole = np.random.default_rng(seed), int(wired.exists.sum())
    return [_first(wired, rng.permutation(whole), size / whole) for _ in range(draws)]


def _first(wired, order, share: float) -> torch.Tensor:
    mask = torch.zeros(wired.exists.shape)
    places = wired.exists.nonzero()[order[: round(share * len(order))]]
    mask[places[:, 0], places[:, 1]] = 1
    return mask
