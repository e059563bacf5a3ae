"""Features part by part, on arrays: resampling, controls, the training loop."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from workbench.locate.features import training
from workbench.locate.features.effects import _alike
from workbench.locate.features.finding import _difference, _interval, _separation, _shuffled


def test_pairs_stay_pairs_and_ties_count_half():
    rng = np.random.default_rng(0)
    yes = rng.normal(size=(12, 3))
    for clusters in (None, np.arange(12).tolist()):
        sides = SimpleNamespace(pairs="some", task=SimpleNamespace(clusters=lambda clusters=clusters: clusters))
        assert np.allclose(_interval(_difference, yes, yes - 1, sides, rng, 0), 1), "each pair differs by 1"
    for paired in (True, False):
        one, two = _shuffled(yes[:, [0, 0]], yes[:, [1, 1]], paired, rng)  # rows are dealt whole
        assert np.array_equal(one[:, 0], one[:, 1]) and np.array_equal(two[:, 0], two[:, 1])
        assert not np.array_equal(one[:, 0], yes[:, 0])
    assert _separation(np.zeros((4, 1)), np.zeros((6, 1)))[0] == 0
    assert _separation(np.array([[0.0], [1.0]]), np.zeros((3, 1)))[0] == pytest.approx(0.5)


def test_other_features_are_near_and_none_of_those_changed():
    level, rng = torch.arange(20.0), np.random.default_rng(0)
    assert {one for _ in range(40) for one in _alike(level, [8], rng)} <= {5, 6, 7, 9, 10, 11}
    for _ in range(9):
        assert len(set(_alike(level, [8, 9, 10], rng)) - {8, 9, 10}) == 3


def test_far_tokens_move_the_median_little():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [100.0, 0.0]])
    assert torch.allclose(training.geometric_median(points, 200), points[1], atol=1e-2)


def test_dead_features_are_those_that_have_not_fired_for_long_and_have_a_loss(monkeypatch):
    x, asked = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)), []

    def fitted(loss, steps=5):
        monkeypatch.setattr(training, "dead_loss", loss)
        return training.fit(x, d_sae=16, k=4, steps=steps, batch=64, progress=False)

    with_loss, without = fitted(lambda rest, pre, *_: pre.sum()), fitted(lambda rest, *_: rest.sum() * 0)
    assert not torch.allclose(with_loss.W_enc, without.W_enc, atol=1e-4)
    sae = fitted(lambda rest, pre, rows, dead: asked.append(int(dead.sum())) or rest.sum() * 0, 60)
    assert asked == [0] * 60 and sae.notes["dead_in_training"] == 0, "each of 16 fires every few tokens"
    low = training.largest(torch.tensor([[3.0, -1.0, 2.0], [5.0, 4.0, -2.0]]), 1, "batchtopk")
    assert low.tolist() == [[False, False, False], [True, True, False]], "the largest of the batch"
    each = training.largest(torch.tensor([[3.0, -1.0, 2.0], [5.0, 4.0, -2.0]]), 1, "topk")
    assert each.tolist() == [[True, False, False], [True, False, False]]
