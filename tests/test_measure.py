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
    assert torch.allclose(measure.prob(LOGITS, ANSWER).log(), measure.log_prob(LOGITS, ANSWER, FOIL))
    assert measure.gap(LOGITS, ANSWER, FOIL).tolist() == [3.0, 2.0]
    third = torch.tensor([1, 2])  # all that is neither answer nor foil
    assert torch.allclose(measure.mass(LOGITS, ANSWER, FOIL), 1 - measure.prob(LOGITS, third, FOIL))
    assert torch.allclose(measure.unit(torch.tensor([3.0, -4.0])), torch.tensor([0.6, -0.8]))
    with pytest.raises(ValueError, match="choose logit_diff"):
        measure.metric("diff")


def test_kl_is_zero_only_for_the_same_prediction():
    assert measure.kl(LOGITS, LOGITS + 5).abs().max() < 1e-6
    assert (measure.kl(LOGITS, LOGITS.flip(-1)) > 0).all()
    before, after = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert float(measure.kl(before, after)) == pytest.approx(np.log(2) / 2 + np.log(2 / 3) / 2)  # nats, from before


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


def test_a_cluster_weighs_as_many_prompts_as_it_has():
    """Of nine prompts and one, half of the draws take both clusters: their mean is 0.9, as over prompts, and not 0.5."""
    mean, low, high = measure.mean_interval([1.0] * 9 + [0.0], ["a"] * 9 + ["b"], level=0.0)
    assert mean == low == high == pytest.approx(0.9)


def test_one_prompt_has_no_interval():
    assert np.isnan(measure.mean_interval([3.0])[1])
    assert np.isnan(measure.ratio_of_means([[1.0]], [2.0])[1]).all()
    assert np.isnan(measure.mean_interval([1.0, 2.0], ["a", "a"])[1])


def test_ratio_of_means_is_not_a_mean_of_ratios():
    ratio, low, high = measure.ratio_of_means([[1.0, 1.0, 1.0, 1.0]], [2.0, 2.0, 2.0, 0.001])
    assert ratio[0] == pytest.approx(4 / 6.001) and low[0] <= ratio[0] <= high[0]
    x = np.random.default_rng(0).normal(1, 2, 40)
    _, low, high = measure.ratio_of_means([3 * x], x)  # both sides are drawn together
    assert (low[0], high[0]) == (pytest.approx(3), pytest.approx(3))
    assert measure.ratio_of_means([x], np.full(40, 2.0)) == pytest.approx(measure.mean_interval(x / 2, draws=1000))


@pytest.mark.parametrize("draws, together", [(2, 1), (4, 1), (10, 10)])
def test_five_percent_of_further_draws_exceed_it(draws, together):
    """Prompts differ far more than draws do; a bootstrap over prompts of one draw would let less than 2 % through."""
    rng, exceed = np.random.default_rng(0), []
    for _ in range(25):
        prompts = rng.normal(0.5, 2, (60, 30)) * rng.exponential(1, (60, 1))
        seen = prompts + rng.normal(0, 1, (draws, 60, 30))
        further = (prompts + rng.normal(0, 1, (together, 60, 30)).mean(0)).mean(1)
        exceed.append(np.abs(further) > measure.null_threshold(seen, together=together))
    assert 0.03 <= np.mean(exceed) <= 0.07


@pytest.mark.parametrize("draws, together", [(2, 1), (60, 60)])
def test_nulls_around_zero_are_exceeded_less_often(draws, together):
    """|mean| folds there; from two deviations on it is 5 %, and nowhere more. With prompts as draws, too."""
    for centre, low, high in ((0.0, 0.0, 0.02), (4.0, 0.04, 0.06)):
        rng, per = np.random.default_rng(0), 30 if draws == 2 else 1
        seen = rng.normal(0, 1, (draws, 4000, per)) + centre * (together * per) ** -0.5
        further = rng.normal(0, 1, (together, 4000, per)).mean((0, 2)) + centre * (together * per) ** -0.5
        assert low <= (np.abs(further) > measure.null_threshold(seen, together=together)).mean() <= high


def test_what_never_varies_is_its_own_threshold():
    assert measure.null_threshold(np.zeros((2, 3, 5))).tolist() == [0, 0, 0]
    assert measure.null_threshold(np.full((2, 1, 5), -0.3)) == pytest.approx([0.3])


def test_a_null_without_a_direction_is_exceeded_on_either_side():
    """Two draws that cancel: of what varies around zero with deviation s, 5 % lie beyond the two-sided t quantile."""
    x = np.random.default_rng(0).normal(size=8)
    deviation = (2 * x**2).mean() ** 0.5 * (3 / 2 / 8) ** 0.5  # of a further mean of 8, beside that of two draws
    assert measure.null_threshold([[x], [-x]]) == pytest.approx([stats.t.ppf(0.975, 8) * deviation])


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


def test_labelings_of_one_size_are_drawn_independently():
    """A grid of what rows add and columns take: drawn alike, the two would cancel in every draw."""
    effect = np.arange(10.0)
    row, column = np.repeat(range(10), 10), np.tile(range(10), 10)
    _, low, high = measure.mean_interval(effect[row] - effect[column], [row.tolist(), column.tolist()])
    _, low1, high1 = measure.mean_interval(effect)
    assert high - low == pytest.approx(2**0.5 * (high1 - low1), rel=0.15)


def test_clusters_widen_a_ratio_too():
    """Every cluster twenty times over: the interval is that of the clusters, and counts are whole numbers."""
    rng = np.random.default_rng(0)
    gap, effects, entity = rng.normal(2, 0.5, 15), rng.normal(1, 1, (3, 15)), np.repeat(range(15), 20)
    once = measure.ratio_of_means(effects, gap)
    again = measure.ratio_of_means(effects.repeat(20, 1), gap.repeat(20), entity)
    assert all(a == pytest.approx(b) for a, b in zip(once, again))
    assert (
        again[2] - again[1] > 3 * np.subtract(*measure.ratio_of_means(effects.repeat(20, 1), gap.repeat(20))[:0:-1])
    ).all()
    counts = measure.cluster_counts(300, [entity, np.arange(300) % 3], 50, 0)
    weights = measure.cluster_weights(300, [entity, np.arange(300) % 3], 50, 0)
    assert counts.dtype.kind == "i" and np.allclose(counts / counts.sum(1, keepdims=True), weights)
    assert measure.cluster_weights(3, ["a"] * 3, 10, 0) is None


def test_bound_of_a_share():
    assert measure.share_bound(0, 120)[1] == pytest.approx(1 - 0.025 ** (1 / 120))
    low, high = measure.share_bound(60, 120)
    assert low == pytest.approx(1 - high) and 0.4 < low < 0.5


def test_labelings_that_say_nothing_more_do_not_widen_the_interval():
    """Beside thirty templates, a name for nearly every row, or a finer grouping: the templates' interval."""
    rng = np.random.default_rng(0)
    values, template = rng.standard_normal(120), np.repeat(np.arange(30), 4).astype(str).tolist()
    wanted = measure.mean_interval(values, template)
    each, finer = [str(i) for i in range(120)], [f"{t} {i % 2}" for i, t in enumerate(template)]
    assert measure.mean_interval(values, [each, template]) == wanted == measure.mean_interval(values, [template, finer])
    (_, low, high), (_, low1, high1) = measure.mean_interval(values, [each, each[::-1]]), measure.mean_interval(values)
    assert high - low == pytest.approx(high1 - low1, rel=0.1)
    twice = [str(i % 60) for i in range(120)]  # names of two rows each, in two templates, do say more
    (_, low, high), (_, low1, high1) = (measure.mean_interval(np.tile(values[:60], 2), some)
                                        for some in ([twice, template], twice))  # fmt: skip
    assert high - low > 0.9 * (high1 - low1)


def test_few_clusters_do_not_make_the_interval_narrower_than_single_rows_do():
    """Two templates of equal means: resampling them alone would give no interval at all."""
    values = np.tile([0.0, 1.0], 60)
    template, entity = np.repeat(["a", "b"], 60).tolist(), [str(i) for i in range(120)]
    _, low, high = measure.mean_interval(values, [entity, template])
    _, low1, high1 = measure.mean_interval(values)
    assert high - low > 0.95 * (high1 - low1)
