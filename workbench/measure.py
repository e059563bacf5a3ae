"""Metrics, divergences, paired bootstrap and nulls: plain functions on arrays."""

from __future__ import annotations

import numpy as np
import torch

# metrics: logits [prompt, d_vocab] with answer and foil ids [prompt] -> [prompt]


def logit_diff(logits, answer, foil):
    """How much does the model prefer the answer? logit[answer] - logit[foil], in nats of log-odds."""
    return _pick(logits, answer) - _pick(logits, foil)


def log_prob(logits, answer, foil=None):
    """Log-probability of the answer, in nats."""
    return _pick(logits.log_softmax(-1), answer)


def prob(logits, answer, foil=None):
    """Probability of the answer."""
    return _pick(logits.softmax(-1), answer)


def accuracy(logits, answer, foil=None):
    """1 where the answer is the most probable token, else 0."""
    return (logits.argmax(-1) == answer.to(logits.device)).float()


def gap(logits, answer, foil):
    """How uneven are the odds of answer and foil, whichever is ahead? |logit_diff|, in nats."""
    return logit_diff(logits, answer, foil).abs()


def mass(logits, answer, foil):
    """Probability of answer and foil together."""
    return prob(logits, answer) + prob(logits, foil)


METRICS = {f.__name__: f for f in (logit_diff, log_prob, prob, accuracy, gap, mass)}


def metric(which):
    """A metric by name, or any function (logits, answer, foil) -> [prompt].

    Raises:
        ValueError: for an unknown name.
    """
    if callable(which):
        return which
    if which not in METRICS:
        raise ValueError(f"metric={which!r} is unknown; choose {', '.join(METRICS)}, or pass a function of "
                         "(logits, answer, foil).")  # fmt: skip
    return METRICS[which]


def kl(before, after):
    """How far did the prediction move? KL(before || after) in nats, over the last axis of two logit tensors."""
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _pick(values, ids):
    return values.gather(-1, ids.to(values.device)[:, None])[:, 0]


# resampling

ENOUGH = 20  # clusters that can be resampled alone


def bootstrap_weights(n: int, draws: int, seed: int) -> np.ndarray:
    """Resampling n things with replacement, as weights [draw, n] that sum to 1."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) / n


def mean_interval(values, clusters=None, level: float = 0.95, draws: int = 2000, seed: int = 0):
    """What is the mean, and how sure are we? Percentile bootstrap over prompts (or clusters of prompts).

    For a before/after comparison pass the paired differences.

    Args:
        values: [prompt] or [prompt, ...].
        clusters: a label for each prompt (its entity), or a list of several such labelings (entities and templates): each
            is then resampled by itself and a prompt weighs the product (the pigeonhole bootstrap, Owen 2007). A labeling
            with a single label is left out, and beside one of many labels one that says little more (see `_codes`).
    Returns:
        (mean, low, high); the interval is NaN for fewer than two clusters.
    """
    values = np.asarray(values, float)
    mean, nothing = values.mean(0), np.full_like(values.mean(0), np.nan)
    codes = _codes(len(values), clusters)
    if not codes:
        return mean, nothing, nothing
    if len(codes) == 1:  # sums by cluster: quick also for a hundred thousand tokens
        k = codes[0].max() + 1
        sums, counts = np.zeros((k, *values.shape[1:])), np.bincount(codes[0], minlength=k).astype(float)
        np.add.at(sums, codes[0], values)
        weights = bootstrap_weights(k, draws, seed)
    else:
        weights = _product(codes, draws, seed)
        sums, counts = values, np.ones(len(values))
    drawn = np.tensordot(weights, sums, 1) / (weights @ counts).reshape(-1, *[1] * (values.ndim - 1))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return mean, low, high


def cluster_weights(n: int, clusters, draws: int, seed: int) -> np.ndarray | None:
    """As `bootstrap_weights`, with clusters of things resampled as in `mean_interval`: [draw, n], rows summing to 1.

    Returns:
        None for fewer than two clusters. Draws that hit nothing are left out.
    """
    counts = cluster_counts(n, clusters, draws, seed)
    return None if counts is None else counts / counts.sum(1, keepdims=True)


def cluster_counts(n: int, clusters, draws: int, seed: int) -> np.ndarray | None:
    """As `cluster_weights`, as how often each thing is drawn: whole numbers."""
    codes = _codes(n, clusters)
    if not codes:
        return None
    return np.rint(_product(codes, draws, seed) * np.prod([one.max() + 1.0 for one in codes])).astype(int)


def _codes(n: int, clusters) -> list[np.ndarray]:
    """Each labeling of n things as numbers [thing].

    Left out: those with a single label; and, beside one of at least `ENOUGH` labels, those within whose groups it lies or
    that name nearly every thing apart (over three quarters as many labels as things): resampled too, these would count
    the noise of single things once more. Beside fewer labels they stay, for few clusters alone make intervals too narrow.
    """
    several = clusters is not None and len(clusters) > 0 and isinstance(clusters[0], (list, tuple, np.ndarray))
    labelings = [np.arange(n)] if clusters is None else clusters if several else [clusters]
    codes = [np.unique(np.asarray(one), return_inverse=True)[1] for one in labelings]
    kept: list[np.ndarray] = []
    for one in sorted((one for one in codes if one.max() > 0), key=lambda one: one.max()):  # coarsest first
        size, coarse = one.max() + 1, [other for other in kept if other.max() + 1 >= ENOUGH]
        within = any(len(np.unique(one + size * other)) == size for other in coarse)
        if not (within or (coarse and size > 0.75 * n)):
            kept.append(one)
    return kept


def _product(codes: list[np.ndarray], draws: int, seed: int) -> np.ndarray:
    """What each thing weighs when every labeling is resampled by itself, [draw, thing]."""
    weights = np.ones((draws, len(codes[0])))
    for i, one in enumerate(codes):
        weights *= bootstrap_weights(one.max() + 1, draws, seed + i)[:, one]
    return weights[weights.sum(1) > 0]


def share_bound(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Between which shares does the truth lie, when `count` of `n` were seen? Clopper-Pearson, two-sided."""
    from scipy.stats import binomtest

    found = binomtest(int(count), int(n)).proportion_ci(level)
    return float(found.low), float(found.high)


def ratio_of_means(numerator, denominator, clusters=None, level: float = 0.95, draws: int = 1000, seed: int = 0):
    """mean(numerator) / mean(denominator) with a bootstrap interval over prompts, resampled together.

    A mean of ratios would be ruled by prompts whose denominator is near zero (Miller et al. 2024).

    Args:
        numerator: [component, prompt]; denominator: [prompt]. clusters: as for `mean_interval`.
    Returns:
        (ratio, low, high), each [component]; the interval is NaN for fewer than two clusters.
    """
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    ratio = numerator.mean(1) / denominator.mean()
    weights = cluster_weights(len(denominator), clusters, draws, seed)
    if weights is None:
        return ratio, np.full_like(ratio, np.nan), np.full_like(ratio, np.nan)
    drawn = (numerator @ weights.T) / (weights @ denominator)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=1)
    return ratio, low, high


def null_threshold(effects, level: float = 0.95, together: int = 1) -> np.ndarray:
    """What does |mean effect| reach in `level` of further draws of the null?

    A further draw meets the same prompts, and prompts differ more from each other than two draws for one prompt do. So the
    spread is taken within prompts; the mean of the draws and of the further one both vary by it (a prediction interval).
    Bootstrapping the prompts of a single draw instead lets 2 to 3 % through where the null is centred at zero, and 12 %
    where it is not.

    Here 5 % exceed it where the null's centre is two or more of its standard deviations away from zero. Nearer to zero the
    two signs share one threshold, and what the centre is cannot be told from few draws: at zero 0.9 % exceed it with two
    draws, 2 % with four. Shrinking the centre towards zero would mend that at the price of up to 8 % in between, so it is
    left on the careful side: components that disturb without a direction of their own pass too rarely, never too often.

    Where a further draw means other prompts (other facts), each prompt is a draw: effects [prompt,
    component, 1], with `together` as many as the score is a mean of.

    Args:
        effects: [draw, component, prompt], at least two draws. together: the score is a mean over so many draws.
    Returns:
        [component].
    """
    from scipy.stats import t

    effects = np.asarray(effects, float)
    draws, _, n = effects.shape
    centre = np.abs(effects.mean((0, 2)))
    spread = np.sqrt(effects.var(0, ddof=1).mean(1) / n * (1 / together + 1 / draws))
    degrees, scale = n * (draws - 1), np.where(spread > 0, spread, 1)
    low, high = centre.copy(), centre + t.ppf((1 + level) / 2, degrees) * spread
    for _ in range(40):  # bisection: the share of |centre + spread * t| below the middle
        middle = (low + high) / 2
        below = t.cdf((middle - centre) / scale, degrees) - t.cdf((-middle - centre) / scale, degrees)
        low, high = np.where(below < level, middle, low), np.where(below < level, high, middle)
    return np.where(spread > 0, high, centre)


def unit(tensor: torch.Tensor) -> torch.Tensor:
    """A vector of length 1 in the same direction."""
    return tensor / tensor.norm()
