"""Metrics and intervals against known truth."""

import numpy as np
import pytest
import torch
from scipy import stats

from workbench import measure

LOGITS = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])
ANSWER, FOIL = torch.tensor([2, 1]), torch.tensor([0, 0])


def test_metrics_by_hand():
    assert measure.logit_diff(LOGITS, ANSWER, FOIL).tolist() == [3.0, -2.0]
    assert measure.accuracy(LOGITS, ANSWER).tolist() == [1.0, 0.0]
    assert torch.allclose(measure.prob(LOGITS, ANSWER).log(), measure.log_prob(LOGITS, ANSWER))
    with pytest.raises(ValueError, match="choose logit_diff"):
        measure.metric("diff")


def test_kl_is_zero_only_for_the_same_prediction():
    assert measure.kl(LOGITS, LOGITS + 5).abs().max() < 1e-6
    assert (measure.kl(LOGITS, LOGITS.flip(-1)) > 0).all()


def test_interval_agrees_with_the_t_interval():
    x = np.random.default_rng(0).normal(1, 2, 400)
    mean, low, high = measure.mean_interval(x)
    expected = stats.t.interval(0.95, 399, x.mean(), stats.sem(x))
    assert mean == x.mean() and np.allclose([low, high], expected, atol=0.03)


def test_clusters_widen_the_interval():
    x = np.repeat(np.random.default_rng(0).normal(size=20), 20)
    _, low, high = measure.mean_interval(x)
    _, wide_low, wide_high = measure.mean_interval(x, np.repeat(range(20), 20))
    assert wide_high - wide_low > 3 * (high - low)


def test_one_prompt_has_no_interval():
    assert np.isnan(measure.mean_interval([3.0])[1])
    assert np.isnan(measure.ratio_of_means([[1.0]], [2.0])[1]).all()
    assert np.isnan(measure.mean_interval([1.0, 2.0], ["a", "a"])[1])


def test_ratio_of_means_is_not_a_mean_of_ratios():
    ratio, low, high = measure.ratio_of_means([[1.0, 1.0, 1.0, 1.0]], [2.0, 2.0, 2.0, 0.001])
    assert ratio[0] == pytest.approx(4 / 6.001) and low[0] <= ratio[0] <= high[0]


def test_null_threshold_covers_a_new_sample_from_the_null():
    rng, gap = np.random.default_rng(0), np.ones(60)
    threshold = measure.null_threshold(rng.normal(size=(2000, 60)), gap)
    new = np.abs(rng.normal(size=(2000, 60)).mean(1))
    assert 0.01 < (new > threshold).mean() < 0.07  # near 5 %, on the careful side


def test_two_labelings_are_resampled_apart():
    """Rows that differ by template only: the interval is that of the templates' means, however many entities there are."""
    effect = np.array([0.0, 1.0, 2.0, 3.0])
    values = np.repeat(effect, 50)
    template, entity = np.repeat(list("abcd"), 50).tolist(), [str(i % 50) for i in range(200)]
    mean, low, high = measure.mean_interval(values, [entity, template])
    _, low1, high1 = measure.mean_interval(effect)
    assert mean == 1.5 and (low, high) == (pytest.approx(low1, abs=0.15), pytest.approx(high1, abs=0.15))
    _, low2, high2 = measure.mean_interval(values, entity)
    assert high2 - low2 < 1e-9
    assert measure.mean_interval(values, [entity, ["one"] * 200])[1:] == (low2, high2)


def test_bound_of_a_share():
    assert measure.share_bound(0, 120)[1] == pytest.approx(1 - 0.025 ** (1 / 120))
    low, high = measure.share_bound(60, 120)
    assert low == pytest.approx(1 - high) and 0.4 < low < 0.5
