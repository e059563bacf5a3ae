"""Random controls do as much as the recipe, elsewhere or in another direction."""

import pytest
import torch
from tiny import copying

import workbench as wb
from workbench.improve.controls import random_controls
from workbench.steer import amplitude, vector
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


def test_an_affine_control_moves_as_far_in_another_direction(trained, target):
    at = "resid_post.1@-1"
    own = vector.set_to_mean(trained, target, at)
    other = drawn(trained, own, target, "random direction")
    x = states(trained, both_sides(trained, target), at)
    moves = [one.change(x, 0) - x for one in (own, other)]
    centre = [move.mean(0) for move in moves]
    assert torch.allclose(centre[0].norm(), centre[1].norm(), rtol=1e-3)
    assert abs(torch.cosine_similarity(*centre, dim=0)) < 0.9
    shares = [
        torch.linalg.matrix_norm(one.matrix.reshape(len(x[0]), -1) - torch.eye(len(x[0]))) for one in (own, other)
    ]
    assert torch.allclose(*shares, rtol=1e-3)


def test_values_that_belong_to_one_place_have_no_control_and_the_report_says_nothing_about_it(trained, target):
    report = wb.improve.evaluate(trained, wb.Replace("z.1.2@-1", torch.zeros(8)), target, draws=2)
    assert report.against.empty and "control" not in report.verdict and set(report.frame.arm) == {"recipe"}
