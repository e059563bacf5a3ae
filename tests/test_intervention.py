"""Interventions as values: algebra, printing, serialization, refusals."""

import pytest
import torch

import workbench as wb
from workbench.intervention import Intervention
from workbench.operations import Affine

V = torch.tensor([3.0, 0.0, 4.0])
X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
ALL = [wb.Zero("z.0.1"), wb.Mean(["z.0.1", "z.0.2"], torch.ones(2, 3)), wb.Replace("z.0.1@-1", V),
       wb.Scale("mlp_out.0", 0.5), wb.Clamp("neuron.0.3", 2.0), wb.Add("resid_post.1@-1", V, 2.0, "norm"),
       wb.ProjectOut("resid_post.1", V, phase="generation"), Affine("resid_post.1", torch.eye(3), V)]  # fmt: skip


def test_strength_is_linear_and_reversible():
    v = wb.Add("resid_post.1", V)
    assert 2 * v == wb.Add("resid_post.1", V, 2.0)
    assert -(-v) == v
    assert (0 * v).does_nothing and wb.Scale("z.0.1", 1).does_nothing and not v.does_nothing


def test_what_each_does():
    assert wb.Zero("z.0.1").change(X, 0).abs().sum() == 0
    assert torch.equal(wb.Replace("z.0.1", V).change(X, 0), V.expand(2, 5, 3))
    assert torch.equal(wb.Mean(["z.0.1", "z.0.2"], torch.eye(3)[:2]).change(X, 1)[0, 0], torch.eye(3)[1])
    assert torch.allclose(wb.Add("resid_post.1", V, 2.0).change(X, 0), X + 2 * V)
    pushed = wb.Add("resid_post.1", V, 0.5, "norm").change(X, 0) - X
    assert torch.allclose(pushed.norm(dim=-1), 0.5 * X.norm(dim=-1), atol=1e-6)
    gone = wb.ProjectOut("resid_post.1", V).change(X, 0)
    assert (gone @ V).abs().max() < 1e-5
    assert torch.allclose(wb.ProjectOut("resid_post.1", V).change(gone, 0), gone, atol=1e-6)


def test_projecting_out_two_directions_that_are_not_orthogonal():
    two = torch.tensor([[1.0, 0, 0], [1.0, 1, 0]])
    assert (wb.ProjectOut("resid_post.1", two).change(X, 0) @ two.T).abs().max() < 1e-5


def test_dependent_directions_take_out_only_their_span():
    twice = torch.tensor([[1.0, 0, 0], [2.0, 0, 0]])
    assert torch.allclose(wb.ProjectOut("resid_post.1", twice).change(X, 0)[..., 1:], X[..., 1:], atol=1e-6)


def test_affine_maps_are_one_for_all_or_one_each():
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    assert torch.equal(Affine("resid_post.1", turn, V).change(torch.tensor([1.0, 2, 3]), 0), torch.tensor([1.0, 1, 7]))
    each = Affine(["resid_post.0", "resid_post.1"], torch.stack([torch.eye(3), turn]), torch.stack([0 * V, V]))
    assert torch.equal(each.change(X, 0), X)
    assert torch.equal(each.change(X, 1), Affine("resid_post.1", turn, V).change(X, 0))
    with pytest.raises(ValueError, match="1 components but 2"):
        Affine("resid_post.1", torch.zeros(2, 3, 3), V)
    with pytest.raises(ValueError, match="got shape \\[3, 2\\] where \\[width, width\\] belongs"):
        Affine("resid_post.1", torch.zeros(3, 2), V)
    with pytest.raises(ValueError, match="got shape \\[2\\] where \\[width\\] belongs"):
        Affine("resid_post.1", turn, V[:2])
    with pytest.raises(ValueError, match="2 numbers wide, but the given tensor is 3 wide"):
        Affine("resid_post.1", turn, V).change(X[..., :2], 0)


def test_values_are_one_for_all_or_one_row_each():
    three = ["z.0.0", "z.0.1", "z.0.2"]
    assert torch.equal(wb.Mean(three, V).change(X, 2), V.expand(2, 5, 3))
    with pytest.raises(ValueError, match="3 components but 2 values"):
        wb.Mean(three, torch.ones(2, 3))
    with pytest.raises(ValueError, match="got shape"):
        wb.Mean(three, torch.ones(3, 1, 3))


def test_neurons_and_features_take_a_number_each():
    for two in (["neuron.0.1", "neuron.0.4"], ["feature.a.1", "feature.a.4"]):
        one = wb.Replace(two, torch.tensor([2.0, 5.0]))
        assert [one.change(X[..., :1], i).unique().tolist() for i in (0, 1)] == [[2.0], [5.0]]
        with pytest.raises(ValueError, match="2 components but 3 values"):
            wb.Mean(two, torch.ones(3))


def test_several_components_at_once_get_what_each_gets_alone():
    heads, x = ["z.0.0", "z.0.1", "z.1.0"], torch.randn(2, 5, 2, 3)
    for one in (wb.Zero(heads), wb.Clamp(heads, 2.0), wb.Scale(heads, 0.3), wb.Scale(heads, [0.1, 0.2, 0.7]),
                wb.Replace(heads, V), wb.Mean(heads, torch.randn(3, 3)), wb.Add(heads, V, 2.0), wb.Add(heads, V, 0.5, "norm"),
                wb.ProjectOut(heads, V), wb.Affine(heads, torch.randn(3, 3, 3), torch.randn(3, 3))):  # fmt: skip
        both = one.changes(x, [2, 1])
        assert torch.equal(both[..., 0, :], one.change(x[..., 0, :], 2))
        assert torch.equal(both[..., 1, :], one.change(x[..., 1, :], 1))


def test_a_value_does_not_change_with_the_tensor_it_was_made_from():
    vector = torch.ones(3)
    push = wb.Add("resid_post.1", vector)
    vector.mul_(5)
    assert push.vector.tolist() == [1, 1, 1]


def test_nothing_is_changed_in_place():
    before = X.clone()
    for one in ALL:
        one.change(X[..., :1] if one.at[0].kind == "neuron" else X, 0)
    assert torch.equal(X, before)


def test_a_delta_is_linear_and_may_be_given_as_factors():
    left, right = torch.ones(4, 2), torch.arange(6.0).view(2, 3)
    whole, factors = wb.Delta(weights={"w": left @ right}), wb.Delta(weights={"w.left": left, "w.right": right})
    assert torch.equal(whole.difference("w"), factors.difference("w")) and factors.names == ("w",)
    assert 2 * whole == wb.Delta(weights={"w": left @ right}, strength=2.0) and -(-factors) == factors != whole
    assert torch.equal((2 * factors).difference("w"), 2 * left @ right)
    assert (0 * whole).does_nothing and not whole.does_nothing
    assert repr(0.5 * whole) == f"Delta(<1 weights, norm {(left @ right).norm() / 2:.3g}>, strength=0.5)"
    left.mul_(7)
    assert torch.equal(factors.difference("w"), whole.difference("w"))  # a value of its own
    for one in (2 * whole, -factors):
        assert Intervention.from_dict(*one.to_dict()) == one


def test_a_delta_comes_first_in_a_recipe_and_has_no_place():
    delta, push = wb.Delta(weights={"w": V}), wb.Add("embed", V)
    assert (push + delta).interventions == (delta + push).interventions == (delta, push)
    for given, said in ((dict(at="z.0.1"), "no place"), (dict(phase="prompt"), "no phase"), (dict(weights={}), "at least one"),
                        (dict(weights={"w": V / 0}), "NaN"), (dict(weights={"w.left": V}), "one factor of two")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            wb.Delta(**{"weights": {"w": V}} | given)


@pytest.mark.parametrize("one", ALL, ids=lambda one: type(one).__name__)
def test_serialization_round_trips(one):
    assert Intervention.from_dict(*one.to_dict()) == one


def test_a_position_means_the_prompt():
    assert wb.Zero("z.0.1@-1").phase == "prompt" and wb.Zero("z.0.1").phase == "both"
    with pytest.raises(ValueError, match="names a prompt position"):
        wb.Zero("z.0.1@-1", phase="generation")


def test_repr_is_the_line_that_makes_it():
    assert repr(wb.Scale("z.0.1", 0.5)) == "Scale(at='z.0.1', factor=0.5, phase='both')"
    assert repr(wb.Add("resid_post.1@-1", V)) == (
        "Add(at='resid_post.1@-1', vector=<3 tensor, norm 5>, strength=1, unit='raw', phase='prompt')"
    )


def test_refusals_say_what_to_do():
    with pytest.raises(TypeError, match="no strength to multiply"):
        2 * wb.Zero("z.0.1")
    with pytest.raises(ValueError, match="NaN"):
        wb.Add("resid_post.1", torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="3 numbers wide, but the given tensor is 2 wide"):
        wb.Add("resid_post.1", torch.ones(2)).change(X, 0)
    with pytest.raises(ValueError, match="phase='later'"):
        wb.Zero("z.0.1", phase="later")
    with pytest.raises(ValueError, match="unit='sd'"):
        wb.Add("resid_post.1", V, unit="sd")
    with pytest.raises(ValueError, match="not zero"):
        wb.ProjectOut("resid_post.1", torch.zeros(3))
