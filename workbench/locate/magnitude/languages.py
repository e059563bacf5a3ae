"""Which neurons open for one language (or any one label) only? Entropy over labels."""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench.component import components
from workbench.locate.magnitude.reading import DRAWS, matched, read, resampled, shuffles
from workbench.model.plan import Prompts
from workbench.scores import Scores
from workbench.task import Task


def language_neurons(model, task: Task, at="neuron.*.*", *, signal: str = "gate", bar: float = 0.95, share: float = 0.01,
                     null: bool = True, draws: int = DRAWS, seed: int = 0) -> Scores:  # fmt: skip
    """Which neurons open for one language only, and for which? Language activation probability entropy (LAPE).

    P(neuron, label) is the share of the label's tokens, padding and BOS left out, that open the neuron. Over labels it is
    normalized to sum to 1; its entropy is 0 for a neuron of one label and log(number of labels) for one of all. The score
    is the difference from that maximum, in nats: the more, the more specific. Neurons whose P is above the `bar` quantile
    of all P for no label are hardly ever open; they are not ranked (NaN). Any labelled task works, not only languages.

    The null deals the labels anew within matched rows; `null_best` is what the most specific of all those that are ranked,
    here or in the dealing, reaches in 95 % of them.

    Args:
        task: labelled texts of at least two labels. Ten thousand tokens a label are few: P of small samples is noisy.
        signal: "gate" (a gate's pre-activation above 0) or "activation" (the neuron itself above 0); the same where
            neurons have no gate of their own.
        bar: quantile of all P that a neuron must exceed for some label.
        share: of all neurons, how many of the most specific to choose (column `chosen`).
    Returns:
        Scores with columns: `label` (where P is largest), `labels` (all whose P is above the bar, with "+"), `chosen`,
        `entropy` (nats), `P <label>` for each label, `null_best`. Of scores that are NaN the interval and null are, too.
    Raises:
        ValueError: for a task without labels or with one, a component that is no neuron, or quantiles outside 0 to 1.
    Source:
        Tang et al. 2024, "Language-specific neurons" (0.95 and 0.01 are theirs; there over 100 million tokens a language).
    """
    began, task = time.perf_counter(), Task.of(task)
    if task.kind != "labelled" or len(set(task.column("label"))) < 2:
        raise ValueError(f"Language neurons need texts with at least two labels; task {task.name!r} holds {task.kind} "
                         "texts. Make one with wb.Task([{'text': ..., 'label': 'french'}, ...]).")  # fmt: skip
    if signal not in ("gate", "activation"):
        raise ValueError(f"signal={signal!r} is unknown; choose 'gate' or 'activation'.")
    if not 0 <= bar < 1 or not 0 < share <= 1:
        raise ValueError(f"bar={bar} and share={share} are quantiles between 0 and 1, such as 0.95 and 0.01.")
    for one in components(at):
        if one.kind != "neuron":
            raise ValueError(
                f"{one} is no neuron; write 'neuron.*.*' or 'neuron.3.*'. For others see magnitude.contrast."
            )
    positions = {one.position for one in components(at)}
    if len(positions) > 1:
        raise ValueError("Give all neurons the same position, or none.")
    wanted, position = sorted(model.names.expand(components(at))), positions.pop()
    names = list(dict.fromkeys(task.column("label")))
    labels = np.array([names.index(label) for label in task.column("label")])
    groups, clusters, how = matched(task, labels)
    prompts = Prompts([model.ids(text) for text in task.column("text")])
    sites = {("gate" if signal == "gate" else "neuron", one.layer) for one in wanted}
    seen = read(model, prompts, sites, _open, position)
    numbers = {layer: [one.index for one in wanted if one.layer == layer] for _, layer in seen}
    counts = np.concatenate([x[:, numbers[layer]].numpy() for (_, layer), x in seen.items()], 1).astype(float)
    tokens = next(iter(seen.values()))[:, -1].numpy().astype(float)

    def probabilities(labels, weights):
        own = np.stack([(labels == k) * weights for k in range(len(names))])
        return (own @ counts) / np.maximum(own @ tokens, 1e-9)[:, None]

    p = probabilities(labels, 1.0)
    score, above = _specificity(p), _often(p, bar)
    ranked = above.any(0)
    under, best = np.zeros((draws if null else 0, len(wanted))), np.zeros(draws if null else 0)
    for i, dealt in enumerate(shuffles(labels, groups, len(best), seed + 1)):
        q = probabilities(dealt, 1.0)
        under[i] = _specificity(q)
        best[i] = under[i][ranked | _often(q, bar).any(0)].max(initial=0)
    often = resampled(len(labels), clusters, draws, seed)
    drawn = np.stack([_specificity(probabilities(labels, weights)) for weights in often])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    chosen = np.argsort(np.where(ranked, -score, np.inf), kind="stable")[: max(1, round(share * len(wanted)))]
    columns = {
        "label": np.array([names[k] for k in p.argmax(0)]),
        "labels": np.array(["+".join(name for name, yes in zip(names, row) if yes) for row in above.T]),
        "chosen": ranked & np.isin(np.arange(len(wanted)), chosen),
        "entropy": np.log(len(names)) - score,
        **{f"P {name}": row for name, row in zip(names, p)},
        "null_best": np.full(len(wanted), np.quantile(best, 0.95) if null else np.nan),
    }
    threshold = np.quantile(under, 0.95, axis=0) if null else np.full(len(wanted), np.nan)
    values, low, high, threshold = (np.where(ranked, x, np.nan) for x in (score, low, high, threshold))
    return Scores(wanted, values, low, high, threshold, (counts / tokens[:, None]).T, "magnitude.language_neurons",
                  "specificity (log of the number of labels - entropy), nats", direction=", ".join(names),
                  null=f"labels shuffled within {how}, {draws} draws" if null else "", task=task.name, cost=1.0,
                  seconds=time.perf_counter() - began, seed=seed, columns=columns,
                  why=f"{int((~ranked).sum())} neurons that are hardly ever open are not ranked.")  # fmt: skip


def _specificity(p: np.ndarray) -> np.ndarray:
    """log K - entropy over labels, in nats, of P [label, neuron]."""
    share = p / np.maximum(p.sum(0), 1e-12)
    return np.log(len(p)) + (share * np.log(np.maximum(share, 1e-12))).sum(0)


def _often(p: np.ndarray, bar: float) -> np.ndarray:
    """Which P are above the bar; where many are equally high (few tokens), those that reach it."""
    height = np.quantile(p, bar)
    return p > height if (p > height).any() else p >= height


def _open(x, mask, kind):
    """How many of a prompt's tokens open each neuron, and, last, how many there are."""
    return torch.cat([((x > 0) & mask[..., None]).sum(1), mask.sum(1, keepdim=True)], 1)
