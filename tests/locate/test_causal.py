"""Patching: identities, a planted cause, nulls, refusals."""

import numpy as np
import pytest
import torch
from tiny import build, copying, tokenizer

import workbench as wb
from workbench.locate.causal import patch
from workbench.locate.causal.patching import refuse_without_gap


def task(*args):
    return wb.Task(copying(*args), "copying")


def test_patching_everything_gives_the_clean_run(trained):
    scores = patch(trained, task(), "resid_pre.*", positions="all")
    assert np.allclose(scores.values, 1, atol=1e-5)
    whole = patch(trained, task(), "resid_post.2@-1")
    assert np.allclose(whole.values, 1, atol=1e-5) and np.allclose(whole.ci_lo, 1, atol=1e-4)


def test_patching_nothing_changes_nothing(trained):
    scores = patch(trained, task(), "resid_pre", direction="noising")
    before = [i for i, one in enumerate(scores.components) if one.position < 2]
    elsewhere = [i for i, one in enumerate(scores.components) if one.layer == 0 and one.position != 2]
    assert (scores.per_prompt[before] == 0).all() and (scores.per_prompt[elsewhere] == 0).all()
    same = [dict(row, corrupted=row["clean"]) for row in task()]
    with pytest.raises(ValueError, match="hardly differ"):
        patch(trained, wb.Task(same), "resid_pre")


def test_the_cause_is_found_where_it_was_put(trained):
    scores = patch(trained, task(), "resid_pre")
    assert scores["resid_pre.0@2"] == pytest.approx(1, abs=1e-5)
    assert scores.clean > 3 and scores.corrupted < -3
    assert set(scores.above_null()) <= {one for one in scores.components if one.position in range(2, 7)}
    assert scores.labels[2] == "w4/w5" and scores.labels[3] == "·" and scores.n == 12


def test_spans_name_positions(trained):
    scores = patch(trained, task(), "resid_pre.0@cause")
    assert scores.components == [wb.Component.parse("resid_pre.0@cause")] and scores.values[0] == pytest.approx(
        1, abs=1e-5
    )
    with pytest.raises(ValueError, match="names no span 'subject'; its spans: cause"):
        patch(trained, task(), "resid_pre.0@subject")


def test_prompts_of_different_length_are_compared_by_span(trained):
    long = [dict(row, clean="w11 " + row["clean"], corrupted="w11 " + row["corrupted"]) for row in task(4, 9)]
    both = wb.Task([*task(8), *long], "both")
    assert {one.position for one in patch(trained, both, "resid_pre").components} == {"cause"}
    bare = wb.Task([{k: v for k, v in row.items() if k != "spans"} for row in both])
    assert {one.position for one in patch(trained, bare, "resid_pre").components} == set(range(-7, 0))


def test_repeatable_and_free_of_side_effects(trained):
    weights = {k: v.clone() for k, v in trained.hf.state_dict().items()}
    one, two = (patch(trained, task(), "z", seed=4) for _ in range(2))
    assert np.array_equal(one.values, two.values) and np.array_equal(one.null_p95, two.null_p95)
    assert not np.array_equal(one.null_p95, patch(trained, task(), "z", seed=5).null_p95)
    assert one.seconds > 0 and len(one.components) == 12
    assert all(torch.equal(v, weights[k]) for k, v in trained.hf.state_dict().items())


def test_cost_counts_both_sides_and_every_draw_once_for_all_prompts(trained, monkeypatch):
    """Behind the last block nothing runs again; each draw of the null costs as much as any other, however prompts are batched."""
    assert patch(trained, task(), "resid_post.2@-1", null=4).cost == 2
    none, two, four = (patch(trained, task(), "z", null=null).cost for null in (False, 2, 4))
    assert four - none == pytest.approx(2 * (two - none)) and two - none > none > 2
    monkeypatch.setattr("workbench.locate.causal.patching.batches", lambda pairs: [[0, 1, 2], [*range(3, 12)]])
    assert patch(trained, task(), "z", null=False).cost == pytest.approx(none)


def test_one_prompt_has_neither_interval_nor_null(trained):
    scores = patch(trained, task(1), "resid_pre")
    assert np.isnan(scores.ci_lo).all() and np.isnan(scores.null_p95).all() and "no other pair" in scores.why
    assert scores["resid_pre.0@2"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("at, said", [("z.9.0", "layer 9"), ("z.0.7", "head 7"), ("resid_pre.0@9", "position 9"),
                                      ("resid_prr", "Did you mean"), ("logits", "cannot be patched")])  # fmt: skip
def test_bad_places(trained, at, said):
    with pytest.raises(ValueError, match=said):
        patch(trained, task(3), at)


def test_bad_arguments(trained):
    for settings, said in [({"direction": "up"}, "denoising"), ({"metric": "diff"}, "metric='diff'"),
                           ({"positions": "some"}, "positions='some'"), ({"positions": []}, r"positions=\[\]")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            patch(trained, task(3), "resid_pre", **settings)


def test_rows_of_one_entity_are_one_observation(trained):
    """The same rows four times over tell nothing new: the interval is that of the rows."""
    once, again = (
        patch(trained, wb.Task(rows), ["z.0.*", "mlp_out.1"], null=False) for rows in (copying(6), copying(6) * 4)
    )
    assert np.allclose(once.values, again.values, atol=1e-5)
    assert (
        np.allclose([once.ci_lo, once.ci_hi], [again.ci_lo, again.ci_hi], atol=1e-5) and (once.ci_lo < once.ci_hi).any()
    )
    alone = patch(
        trained, wb.Task([{**row, "entity": None} for row in copying(6) * 4]), ["z.0.*", "mlp_out.1"], null=False
    )
    assert np.ptp([alone.ci_lo, alone.ci_hi], axis=0).max() < 0.75 * np.ptp([again.ci_lo, again.ci_hi], axis=0).max()


def test_two_prompts_that_differ_much_and_unequally_are_no_reason_to_refuse(llama):
    refuse_without_gap(llama, np.array([35.0, 13.0]), np.ones(2), np.zeros(2), "logit_diff", [["a", "b"], ["x", "x"]])
    for gap in ([35.0, -13.0], [0.0, 0.0], [5.0, 0.0]):
        with pytest.raises(ValueError, match="hardly differ"):
            refuse_without_gap(llama, np.array(gap), np.ones(2), np.zeros(2), "logit_diff")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_handful_of_gaps_must_be_more_than_rounding(words, dtype):
    """The rounding of a logit: half a step of its last digit."""
    model = wb.load(build("llama").to(dtype), tokenizer=tokenizer())
    step = torch.finfo(dtype).eps * model.logits(words(6, 6, 6)).abs().max().item() / 2
    for metric, size in (("logit_diff", step), ("log_prob", step), ("prob", torch.finfo(dtype).eps)):
        gap = np.array([1.0, 2.0, 1.5]) * size
        clean = gap + np.ones(3)
        with pytest.raises(ValueError, match="hardly differ"):
            refuse_without_gap(model, gap, clean, clean - gap, metric)
        refuse_without_gap(model, 30 * gap, clean, clean - gap, metric)


def test_a_gap_is_more_than_three_of_its_standard_errors(llama):
    gap = np.random.default_rng(0).normal(size=100)
    gap = (gap - gap.mean()) / gap.std(ddof=1)  # of which a mean has a standard error of 0.1
    refuse_without_gap(llama, gap + 0.31, gap, gap, "logit_diff")
    with pytest.raises(ValueError, match="hardly differ"):
        refuse_without_gap(llama, gap - 0.29, gap, gap, "logit_diff")


def test_a_gap_that_one_entity_makes_is_refused(llama):
    gap = np.repeat([5.0, 0.1, -0.1, -0.2], 25)
    refuse_without_gap(llama, gap, gap, 0 * gap, "logit_diff")
    with pytest.raises(ValueError, match="hardly differ in logit_diff"):
        refuse_without_gap(llama, gap, gap, 0 * gap, "logit_diff", np.repeat(list("abcd"), 25))
    two = np.repeat([4.0, 1.0], 50)  # two templates, both on one side
    refuse_without_gap(llama, two, two, 0 * two, "logit_diff", np.repeat(list("ab"), 50))
