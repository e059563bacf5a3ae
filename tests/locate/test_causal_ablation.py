"""Ablation and joint ablation: identities, matched means, planted redundancy."""

import numpy as np
import pytest
import torch
from tiny import copying

import workbench as wb
from workbench import measure
from workbench.component import Component
from workbench.improve.planting import plant
from workbench.locate.causal import Joint, ablate, joint_ablation, patch
from workbench.locate.causal.optimal import optimal_constants
from workbench.locate.causal.pool import Pool
from workbench.model.sweep import capture


def task(*args):
    return wb.Task(copying(*args), "copying")


def test_zero_ablation_is_the_intervention(tiny, word_pairs):
    at = [one for one in ("z.1.2", "mlp_out.0", "resid_mid.1@4", "neuron.1.5", "v.0.1", "pattern.1.1@4", "k.0.0", "expert.1.2", "expert.0.1@4", "router.1")
          if one.split(".")[0] not in tiny.names.refused]  # fmt: skip
    scores = ablate(tiny, word_pairs[:2], at, "zero", null=False)
    for one, effects in zip(scores.components, scores.per_prompt):
        slow = word_pairs[:2].score(tiny) - word_pairs[:2].score(tiny, wb.Zero(one))
        assert np.allclose(effects, slow, atol=1e-5 * max(1, np.abs(slow).max())), one


def test_means_are_per_position_template_and_length(trained):
    """By hand, for prompts of two templates and two lengths; what has too few like it is matched less closely."""
    rows = [row | {"template": "ab"[i % 2]} for i, row in enumerate(copying(14))]
    rows[3] |= {side: f"w11 {rows[3][side]}" for side in ("clean", "corrupted")}
    pairs, one = wb.Task(rows).on(trained), Component.parse("mlp_out.1")
    pool = Pool(trained, pairs, None, [one], "mean", 0)
    assert (
        pool.levels[0] == ("template", 7, "a") and pool.levels[1] == ("template", 7, "b") and pool.levels[3][0] == "end"
    )
    group = [0, 1, 3]
    base = capture(trained, [pairs.clean[i] for i in group], [one])
    ((source, _),) = pool.sources(base, group, 1)
    same = [ids for i, row in enumerate(rows) if row["template"] == "a" for ids in (pairs.clean[i], pairs.corrupted[i])]
    mean = trained.activations([ids for ids in same if len(ids) == 7], one).mean(0)
    assert torch.allclose(source.acts["mlp_out", 1][0, -7:], mean, atol=1e-5)
    last = trained.activations([*pairs.clean, *pairs.corrupted], one.at(-1)).mean(0)  # all prompts have an end
    assert torch.allclose(source.acts["mlp_out", 1][2, -1], last, atol=1e-5)
    assert pool.note.startswith("Matched: 13 of 14 by position and template; 1 of 14 by distance")


def test_a_mean_over_two_sides_of_one_pair_is_half_way(trained):
    """Without others of its kind, the pool is the pair itself: z of both sides, averaged."""
    one = task(1)
    half = ablate(trained, one, "z.0.1", "mean", null=False).per_prompt
    both = [trained.activations(getattr(one.on(trained), side), "z.0.1")[0] for side in ("clean", "corrupted")]
    change = [wb.Replace(f"z.0.1@{p}", (both[0][p] + both[1][p]) / 2) for p in range(7)]
    assert half[0] == pytest.approx(one.score(trained) - one.score(trained, *change), abs=1e-5)


def test_resampling_from_the_other_side_is_noising(trained):
    """With the corrupted prompts as the only pool and one match each, resample ablation is patching."""
    for row in task(3):
        reference = wb.Task([{"text": row["corrupted"]}])
        lost = ablate(
            trained, wb.Task([row]), ["z.0.1", "mlp_out.1"], "resample", reference=reference, draws=1, null=False
        )
        assert np.allclose(lost.per_prompt, patch(trained, wb.Task([row]), ["z.0.1", "mlp_out.1"], direction="noising").per_prompt,
                           atol=1e-5)  # fmt: skip


def test_the_optimal_constant_disturbs_least(trained):
    """Measured with plain interventions: less than the mean and than zero, for each component."""
    pairs, found = (
        task(6).on(trained),
        [wb.Component.parse(one) for one in ("z.0.1", "v.1.0", "neuron.1.5", "mlp_out.1")],
    )
    constants, cost, note = optimal_constants(trained, pairs, found, 0)
    before = trained.logits(pairs.clean)
    for one in found:
        mean = trained.activations(pairs.clean, one).flatten(0, -2 if one.kind != "neuron" else -1).mean(0)
        kl = [measure.kl(before, trained.logits(pairs.clean, wb.Replace(one, value))).mean()
              for value in (constants[one].squeeze(-1) if one.kind == "neuron" else constants[one], mean, 0 * mean)]  # fmt: skip
        assert kl[0] < min(kl[1:]), one
    assert cost > 25 and "Fitted on 6 prompts" in note
    scores = ablate(trained, task(6), found, "optimal", null=False)
    assert scores.why.startswith("Fitted on 6") and scores.method == "causal.ablate.optimal"
    for at, said in (("resid_post.1", "cannot be ablated optimally"), ("pattern.0.1", "cannot be ablated optimally")):
        with pytest.raises(ValueError, match=said):
            ablate(trained, task(3), at, "optimal")
    with pytest.raises(ValueError, match="one component at a time"):
        joint_ablation(trained, task(3), "z", method="optimal")


@pytest.mark.parametrize("method", ["mean", "resample", "zero"])
def test_repeatable_with_null_and_cost(trained, method):
    one, two = (ablate(trained, task(), ["z", "mlp_out.1"], method, seed=3) for _ in range(2))
    assert np.array_equal(one.values, two.values) and np.array_equal(one.null_p95, two.null_p95)
    assert np.isfinite(one.null_p95).all() and one.cost > 3 and one.method == f"causal.ablate.{method}"
    assert one.columns["share"] == pytest.approx(one.values / (one.clean - one.corrupted))
    assert one.above_null()  # something is needed


def test_cost_counts_every_run(trained, monkeypatch):
    """Both sides, the clean one again with what is ablated, and once more for each draw; behind the last block nothing runs."""
    for method, pool in (("zero", 0), ("mean", 1), ("resample", 4)):
        none, two = (ablate(trained, task(), "resid_post.2@-1", method, null=null).cost for null in (False, 2))
        assert none == 3 + pool and two >= none + 2
    one, four = (ablate(trained, task(), "z.1.*", "resample", draws=draws, null=False).cost for draws in (1, 4))
    assert four - 3 == pytest.approx(4 * (one - 3))
    monkeypatch.setattr("workbench.locate.causal.ablation.batches", lambda *args: [[0, 1, 2], [*range(3, 12)]])
    assert ablate(trained, task(), "z.1.*", "resample", draws=1, null=False).cost == pytest.approx(one)


def test_patterns_have_means_too(trained):
    long = [dict(row, clean="w11 " + row["clean"], corrupted="w11 " + row["corrupted"]) for row in copying(5, 9)]
    scores = ablate(trained, wb.Task([*copying(6), *long]), ["pattern.1.0", "attn_scores.0.2"])
    assert np.isfinite(scores.values).all() and np.isfinite(scores.null_p95).all()


def test_the_whole_stream_is_everything(trained):
    """Without what tells the prompts apart nothing of the preference is left, whatever stands in."""
    lost = ablate(trained, task(), "resid_post.2@-1", "mean", null=False)
    assert lost.columns["share"][0] == pytest.approx(0.55, abs=0.3)  # about half-way between the sides


def test_unknown_methods_and_places(trained):
    for arguments, said in [
        (("z", "median"), "method='median'"),
        (("embed",), "cannot be patched"),
        (("z.7.0",), "layer 7"),
    ]:
        with pytest.raises(ValueError, match=said):
            ablate(trained, task(3), *arguments)
    with pytest.raises(ValueError, match="method='all'"):
        joint_ablation(trained, task(3), "z.0.1", method="all")


def test_single_ablation_misses_a_redundant_pair_and_joint_ablation_finds_it(course):
    with plant(course, "redundant", 3) as planted:
        rows = planted.task.split("test")[:12]
        single = ablate(course, rows, list(planted.components), "zero", null=False)
        assert np.abs(single.columns["share"]).max() < 0.1
        joint = joint_ablation(course, rows, list(planted.components), method="zero", random=19)
        (table,) = joint.frame.itertuples()
        assert table.share > 0.7 and abs(table.sum_of_single) < 0.2 * table.joint
        assert table.joint > 5 * table.null_p95 and table.p == pytest.approx(0.05)


def test_copying_goes_with_its_induction_heads_and_not_with_as_many_late_ones(course):
    """Of the bundled model, in new templates: zero and mean take at least 80 % away, random late heads 20 % at most."""
    copies, scores = (
        wb.Task.load("induction").split("ood"),
        wb.locate.magnitude.pattern_scores(course, "induction", at="z"),
    )
    heads, before = scores.top(8), copies.score(course, metric="accuracy").mean()
    late = [one for one in scores.components if one.layer >= 4 and one not in scores.top(12)]
    rng = np.random.default_rng(0)
    draws = [[late[i] for i in rng.permutation(len(late))[:8]] for _ in range(3)]
    for off in (wb.Zero, lambda some: wb.steer.amplitude.mean(course, copies, some)):
        assert copies.score(course, off(heads), metric="accuracy").mean() <= 0.2 * before
        assert min(copies.score(course, off(some), metric="accuracy").mean() for some in draws) >= 0.8 * before


def test_a_cancelling_pair_is_two_effects_and_no_joint_one(course):
    with plant(course, "cancelling", 0) as planted:
        rows, (_, plus, minus) = planted.task.split("test")[:12], planted.components
        single = ablate(course, rows, [plus, minus], "zero", null=False)
        assert single.columns["share"].max() > 0.1 and single.columns["share"].min() < -0.1
        joint = joint_ablation(course, rows, [plus, minus], method="zero", random=3)
        assert abs(joint.frame.share[0]) < 0.08


def test_patching_never_picks_the_decoy(course):
    with plant(course, "decoy", 1) as planted:
        (true,), (decoy,) = planted.components, planted.decoys
        scores = patch(
            course, planted.task.split("test")[:12], [f"neuron.{true.layer}.*@-1", f"z.{true.layer}.*@-1"], null=False
        )
        assert scores.top(1) == [true.at(-1)] and abs(scores[decoy.at(-1)]) < 1e-6


def test_from_a_layer_on(trained, tmp_path):
    joint = joint_ablation(trained, task(), ["z", "mlp_out"], onward=True, method="zero", random=4)
    assert joint.names == ["layer 0 on", "layer 1 on", "layer 2 on"] and list(joint.frame.components) == [15, 10, 5]
    last = ["z.2.*", "mlp_out.2"]
    slow = task().score(trained) - task().score(trained, wb.Zero(last))
    assert np.allclose(joint.effects[2], slow, atol=1e-4)
    again = joint_ablation(trained, task(), ["z.2.0", "z.2.1"], method="zero", random=6, seed=1)
    assert len(set(np.round(again.controls[0], 6))) == 1  # only the layer's two others are left
    free = [joint_ablation(trained, task(), "z.2.0", method="zero", random=6, seed=seed).controls[0] for seed in (1, 2)]
    assert not np.array_equal(*free)
    assert joint.frame.sum_of_single[2] == pytest.approx(joint.single[-5:].sum(0).mean())
    assert np.isnan(joint.frame.null_p95[0]) and np.isfinite(joint.frame.null_p95[2]) and "no null" in joint.why
    again = Joint.load(joint.save(tmp_path / "joint"))
    assert repr(again) == repr(joint) and again.frame.equals(joint.frame) and again.sets == joint.sets
    assert "\n" not in repr(joint) and joint.plot().axes
    with pytest.raises(FileNotFoundError, match=r"joint\.json"):
        Joint.load(tmp_path)


def longer(row):
    return row | {side: f"w11 {row[side]}" for side in ("clean", "corrupted")}


def test_prompts_without_a_match_are_in_no_mean(trained):
    """With one text to resample from, each prompt of its length has one donor, and longer ones none."""
    rows, text = copying(6), wb.Task([{"text": copying(1, 9)[0]["corrupted"]}])
    settings = {"reference": text, "draws": 1}
    seven = ablate(trained, wb.Task(rows), ["z", "mlp_out.1"], "resample", **settings)
    mixed = ablate(
        trained, wb.Task([longer(row) for row in copying(2, 5)] + rows), ["z", "mlp_out.1"], "resample", **settings
    )
    assert np.isnan(mixed.per_prompt[:, :2]).all() and np.allclose(mixed.per_prompt[:, 2:], seven.per_prompt, atol=1e-5)
    assert np.allclose(mixed.values, seven.values, atol=1e-5) and (mixed.n, seven.n) == (6, 6)
    assert mixed.clean == pytest.approx(seven.clean, abs=1e-5) and np.isfinite(mixed.null_p95).all()
    assert "2 of 8 left out" in mixed.why and "left out" not in seven.why
    joint = joint_ablation(
        trained, wb.Task([longer(rows[0]), *rows]), "mlp_out.1", method="resample", random=3, **settings
    )
    assert joint.frame.joint[0] == pytest.approx(seven["mlp_out.1"], abs=1e-5) and joint.frame.n[0] == 6
    assert np.isfinite(joint.frame.null_p95[0]) and "1 of 7 left out" in joint.why
    with pytest.raises(ValueError, match="Only 2 of 6 prompts find another"):
        ablate(trained, wb.Task(rows[:2] + [longer(row) for row in rows[2:]]), "z.0.1", "resample", **settings)
    patterns = ablate(
        trained, wb.Task([longer(rows[0]), *rows]), "pattern.1.0", reference=wb.Task(copying(9, 4)), null=False
    )
    assert np.isnan(patterns.per_prompt[0, 0]) and np.isfinite(patterns.per_prompt[0, 1:]).all()
    # a mean from the end reaches as far as the reference goes
    last, all_of = (ablate(trained, wb.Task([longer(rows[0]), *rows]), at, reference=wb.Task(copying(9, 4)), null=False)
                    for at in ("mlp_out.1@-1", "mlp_out.1"))  # fmt: skip
    assert np.isfinite(last.per_prompt).all() and np.isnan(all_of.per_prompt[0, 0]) and all_of.n == 6


def test_no_prompt_is_its_own_donor(trained):
    """Of two templates with five pairs each, nine of its own ten prompts can stand in for a prompt."""
    rows = wb.Task([row | {"template": "ab"[i % 2]} for i, row in enumerate(copying(10))])
    pool = Pool(trained, rows.on(trained), rows, [Component.parse("mlp_out.0")], "resample", 0)
    own = [ids.tolist() for ids in rows.on(trained).clean]
    assert all(len(some) == 9 for some in pool.others)
    assert not any(pool.prompts[j].tolist() == own[i] for i, some in enumerate(pool.others) for j in some)
    assert all(pool.keys[j][1] == "ab"[i % 2] for i, some in enumerate(pool.others) for j in some)


def test_resampling_draws_anew_each_time_and_by_seed(trained):
    one, more, other = (
        ablate(trained, task(6), "mlp_out.1", "resample", draws=draws, seed=seed, null=False).per_prompt
        for draws, seed in ((1, 0), (3, 0), (1, 1))
    )
    for some in (more, other):
        assert np.abs(some - one).max() > 0.01 * np.abs(one).max()


def test_the_table_of_a_joint_effect_by_hand():
    """Random sets count by size; a p-value counts the set itself among them; prompts without a value count nowhere."""
    effects = np.array([[-2.0, np.nan, -1.0]])
    joint = Joint(["set"], [["z.0.0", "z.0.1"]], effects, 2 * effects, [np.array([-3.0, 1.0, 1.4, -1.6])],
                  np.zeros((2, 3)), ["z.0.0", "z.0.1"], "m", "logit_diff", 5.0, 2.0, "t", 1.0, 1.0, 0)  # fmt: skip
    (row,) = joint.frame.itertuples()
    assert (row.joint, row.sum_of_single, row.share, row.of_clean, row.n) == (-1.5, -3.0, -0.5, -0.3, 2)
    assert row.p == 3 / 5 and row.null_p95 == np.quantile([1.0, 1.4, 1.6, 3.0], 0.95)


@pytest.mark.parametrize("call", [ablate, joint_ablation])
def test_draws_and_metrics_that_give_no_number(trained, call):
    for draws in (0, -2, 1.5):
        with pytest.raises(ValueError, match=f"draws={draws}: give a whole number from 1"):
            call(trained, task(3), "z.0.1", method="resample", draws=draws)
    with pytest.raises(ValueError, match="root is no finite number for 3 of 3 prompts"):
        call(trained, task(3), "z.0.1", method="zero", metric=root)


def root(logits, answer, foil):
    """The square root of a negative number."""
    return -(measure.logit_diff(logits, answer, foil).abs().add(1) ** 0.5) + torch.nan


def test_rows_of_one_entity_are_one_observation(trained):
    once, again = (
        ablate(trained, wb.Task(rows), ["z.0.*"], "zero", null=False) for rows in (copying(6), copying(6) * 4)
    )
    assert (
        np.allclose([once.ci_lo, once.ci_hi], [again.ci_lo, again.ci_hi], atol=1e-5) and (once.ci_lo < once.ci_hi).all()
    )
    single, four = (joint_ablation(trained, wb.Task(rows), "z.0.*", method="zero", random=0).frame
                    for rows in (copying(6), copying(6) * 4))  # fmt: skip
    assert (
        np.allclose(single[["ci_lo", "ci_hi"]], four[["ci_lo", "ci_hi"]], atol=1e-5)
        and single.ci_lo[0] < single.ci_hi[0]
    )
