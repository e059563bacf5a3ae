"""Probes and their controls, on arrays: fit, choose the regularization, shuffle, hang labels on word types."""

from __future__ import annotations

import numpy as np

METHODS = ("logistic", "difference_of_means", "sparse")
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C of scikit-learn: inverse of the L2 penalty


def fitted(method: str, x: np.ndarray, y: np.ndarray, c: float = 0.1, k: int = 5):
    """A probe that has seen these rows: a scikit-learn classifier with `predict`.

    Args:
        method: "logistic" (standardized, L2), "difference_of_means" (nearest class mean; of two classes the sign along
            the difference of their means, from half-way), "sparse" (logistic on the k units whose class means differ most).
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_selection import SelectKBest
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestCentroid
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not np.ptp(x, axis=0).any():
        return DummyClassifier(strategy="most_frequent").fit(x, y)
    if method == "difference_of_means":
        return NearestCentroid().fit(x, y)
    steps = [StandardScaler()]
    if method == "sparse":
        steps.append(SelectKBest(mean_difference, k=min(k, x.shape[1])))
    return make_pipeline(*steps, LogisticRegression(C=c, max_iter=1000, tol=1e-3)).fit(x, y)


def mean_difference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far apart are the classes in each unit? Largest |mean of a class - mean of the rest|, [unit]."""
    means = [np.abs(x[y == one].mean(0) - x[y != one].mean(0)) for one in np.unique(y)]
    return np.max(means, axis=0)


def strength(method: str, x: np.ndarray, y: np.ndarray, group: np.ndarray, k: int = 5, folds: int = 3) -> float:
    """Which C predicts best across groups it has not seen? Cross-validated accuracy; the strongest penalty among equals."""
    from sklearn.model_selection import GroupKFold, KFold

    if method == "difference_of_means":
        return float("nan")
    n = len(np.unique(group))
    split = GroupKFold(min(folds, n)) if n > 1 else KFold(min(folds, len(y)))
    right = np.zeros(len(STRENGTHS))
    for train, held in split.split(x, y, group if n > 1 else None):
        if len(np.unique(y[train])) > 1:
            right += [(fitted(method, x[train], y[train], c, k).predict(x[held]) == y[held]).sum() for c in STRENGTHS]
    return STRENGTHS[int(np.argmax(right))]


def threshold(draws, level: float = 0.95) -> np.ndarray:
    """What the null reaches in `level` of the cases: the rank among the draws that makes a permutation test exact.

    Args:
        draws: [draw, ...].
    """
    rank = min(len(draws), int(np.ceil(level * (len(draws) + 1))))
    return np.sort(np.asarray(draws), axis=0)[rank - 1]


def seen_rows(types: np.ndarray, y: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
    """A split of rows by which every word type that is tested has been seen: about a third of each type's rows is held out.

    Of a type with several labels equally many rows of each are: else what is left would point away from what is held.

    Returns:
        (rows to fit on, rows held out).
    """
    held: list[int] = []
    for one in np.unique(types):
        own = np.flatnonzero(types == one)
        parts = [rng.permutation(own[y[own] == label]) for label in np.unique(y[own])]
        least = min(map(len, parts))
        for part in parts if least > 1 else ():
            held += part[: max(1, least // 3)].tolist()
    return np.setdiff1d(np.arange(len(types)), held), np.sort(np.array(held, int))


def control_labels(types: np.ndarray, y: np.ndarray, rng) -> np.ndarray:
    """The control task: every word type gets a label at random, in the classes' own proportions (Hewitt and Liang 2019)."""
    names, where = np.unique(types, return_inverse=True)
    quantiles = (np.arange(len(names)) + 0.5) / len(names) * len(y)
    return rng.permutation(np.sort(y)[quantiles.astype(int)])[where]


def bag(ids: list, upto: list[int]) -> np.ndarray:
    """Which tokens has the model read by then? [row, token], 1 where the token stands among the first `upto` of a row."""
    seen = [np.unique(np.asarray(one)[:n]) for one, n in zip(ids, upto, strict=True)]
    column = {token: i for i, token in enumerate(np.unique(np.concatenate(seen)))}
    x = np.zeros((len(ids), len(column)))
    for row, tokens in enumerate(seen):
        x[row, [column[token] for token in tokens]] = 1
    return x


def token_probe(x: np.ndarray, y: np.ndarray):
    """The token-identity baseline: logistic on which tokens occur, hardly regularized, so that it can memorize each."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=10.0, max_iter=1000, tol=1e-3).fit(x, y)
