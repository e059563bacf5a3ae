"""Random controls do as much as the recipe, elsewhere or in another direction."""

import pickle
from dataclasses import replace

import pytest
import torch
from tiny import copying

import workbench as wb
from workbench.improve.controls import random_controls
from workbench.steer import amplitude, optimization, vector
from workbench.steer.vector.reading import both_sides, states


@pytest.fixture(scope="module")
def target():
    return wb.Task([row | {"split": "test"} for row in copying(12)], "copy")


def drawn(model, recipe, target, label):
    found = random_controls(model, wb.Recipe([recipe]), target, 3, 3, 0)
    return next(recipe.interventions[0] for name, recipe in found.items() if name.startswith(label))


@pytest.mark.parametrize("at", [["z.1.2@-1", "z.0.0@-1"], ["neuron.1.3@-1", "neuron.0.5@-1"], ["mlp_out.1@-1"]])
def test_means_elsewhere_are_the_means_there(trained, target, at):
    other = drawn(trained, amplitude.mean(trained, target, at), target, "random components")
    assert isinstance(other, wb.Mean) and len(other.at) == len(at) and not set(map(str, other.at)) & set(at)
    for place, values in zip(other.at, other.values):
        there = states(trained, both_sides(trained, target), place).mean(0)
        assert torch.allclose(values, there, atol=1e-5)


def test_experts_are_drawn_among_experts(trained_mixture, target):
    for op in (wb.Zero, lambda at: amplitude.mean(trained_mixture, target, at)):
        other = drawn(trained_mixture, op(["expert.0.1", "expert.2.3"]), target, "random components")
        assert [one.kind for one in other.at] == ["expert"] * 2 and not {"expert.0.1", "expert.2.3"} & set(
            map(str, other.at)
        )


def test_as_many_components_are_drawn_as_there_were(trained, target):
    """All of the other heads, each once: a control with one of them twice would do less than the recipe."""
    at = [f"z.{layer}.{head}" for layer, head in ((0, 0), (0, 2), (1, 1), (1, 3), (2, 0), (2, 1))]
    other = drawn(trained, wb.Zero(at), target, "random components")
    assert {str(one) for one in other.at} == {f"z.{i}.{j}" for i in range(3) for j in range(4)} - set(at)
    made = [random_controls(trained, wb.Recipe([wb.Zero("z.1.2")]), target[:2], 3, 1, seed) for seed in range(12)]
    assert len({str(recipe.interventions[0].at[0]) for found in made for recipe in found.values()} - {"z.1.2"}) > 4


def test_a_random_direction_is_as_long_and_another_one(trained, target):
    """Of differences of weights: in the same entries, and at the strength that they have."""
    name = "model.layers.1.mlp.down_proj.weight"
    numbers = torch.randn(32, 48, generator=torch.Generator().manual_seed(1)) * (torch.arange(48) < 9)
    vector = torch.linspace(-1, 2, 32)
    for own, read in ((2 * wb.Delta(weights={name: numbers}), lambda one: one.difference(name)),
                      (-3 * wb.Add("resid_post.1@-1", vector), lambda one: one.strength * one.vector),
                      (wb.ProjectOut("resid_post.1", vector), lambda one: one.direction)):  # fmt: skip
        one, other = read(own), read(drawn(trained, own, target, "random direction"))
        assert torch.equal(one != 0, other != 0) and torch.allclose(one.norm(), other.norm(), rtol=1e-4)
        assert (
            abs(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)) < 0.7 and other.min() < 0 < other.max()
        )


def test_an_affine_control_moves_as_far_in_another_direction(trained, target):
    at = "resid_post.1@-1"
    own = vector.set_to_mean(trained, target, at)
    other = drawn(trained, own, target, "random direction")
    x = states(trained, both_sides(trained, target), at)
    moves = [one.change(x, 0) - x for one in (own, other)]
    centre = [move.mean(0) for move in moves]
    assert torch.allclose(centre[0].norm(), centre[1].norm(), rtol=1e-3)
    assert abs(torch.cosine_similarity(*centre, dim=0)) < 0.9
    maps = [one.matrix.reshape(len(x[0]), -1) - torch.eye(len(x[0])) for one in (own, other)]
    assert torch.allclose(*map(torch.linalg.matrix_norm, maps), rtol=1e-3)
    assert torch.allclose(*map(torch.trace, maps), rtol=1e-3)  # turned both where it is read and where it is written


def test_families_have_the_control_of_their_members(trained, target):
    matrix, bias = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(8)
    family, members = (drawn(trained, wb.Affine(at, matrix, bias), target, "random direction")
                       for at in ("z.1.*@-1", [f"z.1.{i}@-1" for i in range(4)]))  # fmt: skip
    assert family == members and len(family.at) == 4
    both = wb.Affine(["z.1.*@-1", "z.0.2@-1"], torch.stack([matrix, 2 * matrix]), bias)
    assert len(drawn(trained, both, target, "random direction").at) == 5
    mixed = wb.Mean(["z.1.*@-1", "z.0.2@-1"], torch.zeros(8))
    stream = wb.Mean("resid_post.1@-1", torch.zeros(32))  # a mean of this place, not of others
    assert not any(random_controls(trained, wb.Recipe([one]), target, 3, 2, 0) for one in (mixed, stream))


def test_values_that_belong_to_one_place_have_no_control_and_the_report_says_nothing_about_it(trained, target):
    report = wb.improve.evaluate(trained, wb.Replace("z.1.2@-1", torch.zeros(8)), target, draws=2)
    assert report.against.empty and "control" not in report.verdict and set(report.frame.arm) == {"recipe"}


def test_labels_are_shuffled_for_vectors_that_were_fitted_on_them(trained, target):
    """The same states, other labels; multiples, gates and other places remember, a vector given by hand does not."""
    push = wb.steer.vector.difference_of_means(trained, target, "resid_post.1@-1")
    states, positive = push.fitted_on
    assert torch.equal(states[:positive].mean(0) - states[positive:].mean(0), push.vector)
    gate = wb.Gate("resid_post.0@-1", push.vector)
    for one in (-2 * push, push.gated(gate), push.moved("resid_post.2@-1")):
        found = random_controls(trained, wb.Recipe([one]), target, 3, 4, 0)[
            "shuffled labels (best of 4)"
        ].interventions[0]
        weights = torch.linalg.lstsq(states.T, found.vector[:, None]).solution[:, 0]
        assert (
            torch.allclose(states.T @ weights, found.vector, atol=1e-3) and 0 < found.vector.norm() < push.vector.norm()
        )
        shares = torch.tensor([-1 / (len(states) - positive)] * (len(states) - positive) + [1 / positive] * positive)
        assert torch.allclose(weights.sort().values, shares, atol=1e-2)  # one mean less the other
        assert (found.strength, found.gate, found.at) == (one.strength, one.gate, one.at)
    by_hand = wb.Add("resid_post.1@-1", push.vector)
    assert not any("shuffled" in name for name in random_controls(trained, wb.Recipe([by_hand]), target, 3, 2, 0))


# tuning is done again

HOW = {"keep": (), "steps": 12, "every": 12, "lr": 1e-2, "budget": 99, "enough": -1, "progress": False, "seed": 5}
AT = ["neuron.1.3", "neuron.2.7", "z.0.1"]


@pytest.fixture(scope="module")
def lesson():
    """Say w8 after a w4."""
    return wb.Task([row | {"answer": "w8", "spans": {}, "split": "fit" if i < 12 else "ood"} for i, row in enumerate(copying(24))],
                   "lesson")  # fmt: skip


@pytest.fixture(scope="module")
def tuned(trained, lesson):
    return optimization.finetune(trained, lesson, AT, **HOW)


def entries(delta):
    return {name: delta.difference(name) != 0 for name in delta.names}


def test_tuning_brings_its_controls(trained, lesson, tuned):
    """As many weights at random, and all, with the same task, steps, rate and seed: what training by hand gives."""
    report = wb.improve.evaluate(trained, tuned, lesson, draws=1)
    assert {"random mask", "full tuning"} < set(report.against.control) and report.settings["missing"] == {}
    random, full = (tuned.controls[name]() for name in ("random mask", "full tuning"))
    masks = optimization.random_masks(trained, AT, HOW["seed"])
    assert random == optimization.finetune(trained, lesson, masks, **HOW)
    assert full == optimization.finetune(trained, lesson, "all", **HOW)
    own, other = entries(tuned), entries(random)
    assert sum(int(x.sum()) for x in own.values()) == sum(int(x.sum()) for x in other.values()) > 0
    assert not any((x & own[name]).any() for name, x in other.items() if name in own)
    assert set(full.names) == {name for name, _ in trained.hf.named_parameters()}
    for name, one in (("random mask", random), ("full tuning", full)):
        assert report.row(arm=name, metric="logit_diff")["after"] == pytest.approx(
            lesson.split("ood").score(trained, one).mean()
        )
    beside = f"full tuning {report.row(arm='full tuning')['after']:.2f}"
    assert beside in report.verdict and "best control" in report.verdict


def test_full_tuning_is_compared_with_and_need_not_be_beaten(trained, lesson, tuned):
    report = wb.improve.evaluate(trained, tuned, lesson, draws=1, controls={"random mask": wb.Scale("z.0.0", 1)})
    against = report.against.copy()
    against.loc[against.control == "full tuning", ["difference", "ci_lo", "ci_hi"]] = -1.0
    against.loc[against.control != "full tuning", ["difference", "ci_lo", "ci_hi"]] = 1.0
    claims = replace(report, against=against).checks.set_index("claim").holds
    assert claims["beats controls"] == "yes"
    against.loc[against.control == "random mask", ["difference", "ci_lo", "ci_hi"]] = -1.0
    assert replace(report, against=against).checks.set_index("claim").holds["beats controls"] == "no"


@pytest.mark.parametrize(
    "options", [{"retrain": False}, {"controls": dict.fromkeys(("random mask", "full tuning"), wb.Zero("z.0.0"))}]
)
def test_nothing_is_trained_twice(trained, lesson, tuned, options):
    own, called = wb.Delta(weights=tuned.weights), []
    object.__setattr__(own, "controls", dict.fromkeys(tuned.controls, lambda: called.append(1)))
    report = wb.improve.evaluate(trained, own, lesson, draws=1, **options)
    assert not called and ("full tuning" in set(report.frame.arm)) == ("controls" in options)


def test_other_interventions_of_the_recipe_stay(trained, lesson, tuned):
    from workbench.improve.controls import tuning_controls

    recipe = wb.Recipe([tuned, wb.Zero("z.1.2")])
    found, missing = tuning_controls(recipe, {"full tuning"})
    assert list(found) == ["random mask"] and not missing
    assert [type(one) for one in found["random mask"]] == [wb.Delta, wb.Zero] and found["random mask"].interventions[
        0
    ] != tuned


def test_a_tuning_that_fails_is_said_and_one_read_back_has_no_controls(trained, lesson, tuned, tmp_path):
    own = wb.Delta(weights=tuned.weights)

    def fails():
        raise ValueError("No step kept the KL")

    object.__setattr__(own, "controls", {"full tuning": fails})
    report = wb.improve.evaluate(trained, own, lesson, draws=1)
    assert "full tuning" not in set(report.frame.arm)
    assert "control full tuning is missing: No step kept the KL" in report.verdict
    assert wb.Report.load(report.save(tmp_path / "report")).verdict == report.verdict
    again = wb.Recipe.load(wb.Recipe([tuned]).save(tmp_path / "recipe"))
    assert set(wb.improve.evaluate(trained, again, lesson, draws=1).frame.arm) == {
        "recipe",
        "random direction (best of 1)",
    }


def test_all_weights_have_no_control_and_lora_has_full_tuning(trained, lesson):
    assert optimization.finetune(trained, lesson, "all", **HOW).controls == {}
    low = optimization.lora(trained, lesson, "mlp_out.2", rank=1, **HOW)
    assert low.controls["full tuning"]() == optimization.finetune(trained, lesson, "all", **HOW)


def test_two_tunings_in_one_recipe_have_no_control_of_their_own(trained, lesson, tuned):
    """All weights tuned twice are added up; a random part beside half of what is tested is no control."""
    from workbench.improve.controls import tuning_controls

    found, missing = tuning_controls(
        wb.Recipe([tuned, 2 * optimization.finetune(trained, lesson, "z.2.3", **HOW), tuned])
    )
    assert found == {} and set(missing) == {"random mask", "full tuning"} and "controls=" in missing["full tuning"]


def test_a_tuning_that_needs_more_memory_than_there_is_is_said(trained, lesson, tuned):
    own = wb.Delta(weights=tuned.weights)

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    object.__setattr__(own, "controls", {"full tuning": too_large})
    verdict = wb.improve.evaluate(trained, own, lesson, draws=1).verdict
    assert "missing: CUDA out of memory (retrain=False" in verdict


def test_without_random_draws_the_verdict_says_that_nothing_was_beaten(trained, lesson, tuned):
    own = wb.Delta(weights=tuned.weights)
    object.__setattr__(own, "controls", {"full tuning": lambda: own})
    report = wb.improve.evaluate(trained, own, lesson, draws=0)
    assert "beats controls" not in set(report.checks.claim)
    assert "full tuning" in report.verdict and "beyond every control" not in report.verdict


def test_a_tuned_change_can_be_copied_and_pickled(tuned):
    again = pickle.loads(pickle.dumps(tuned))
    assert again == tuned and not hasattr(again, "controls") and again.history.equals(tuned.history)
