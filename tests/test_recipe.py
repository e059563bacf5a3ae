"""Recipes: sums in forward order, saved whole or not at all."""

import json

import pytest
import torch

import workbench as wb

A, B = wb.Zero("z.2.1"), wb.Add("resid_post.0@-1", torch.ones(4), 2.0)


def test_a_sum_is_a_recipe_and_does_not_depend_on_order():
    assert isinstance(A + B, wb.Recipe)
    assert (A + B).interventions == (B + A).interventions == (B, A)
    assert len(A + B + A) == 3
    weights = wb.Delta(weights={"w": torch.ones(2)})
    assert (A + weights + B).interventions == (weights, B, A)  # weights are changed first
    assert wb.Recipe([A, [B, wb.Recipe([A])]]).interventions == (B, A, A)


def test_equal_tensors_keep_the_order_given():
    first, second = wb.Scale("resid_post.0", 2), wb.Zero("resid_pre.1")  # the same tensor under two names
    assert (first + second).interventions == (first, second)
    assert (second + first).interventions == (second, first)


def test_save_and_load(tmp_path):
    recipe = wb.Recipe([A, B], "less copying", notes={"task": "ioi"})
    recipe.save(tmp_path / "r")
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["recipe.json", "tensors.safetensors"]
    assert wb.Recipe.load(tmp_path / "r") == recipe
    recipe.save(tmp_path / "r")  # over itself
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_each_of_many_gets_its_own_tensors_back(tmp_path):
    many = wb.Recipe([wb.Add(f"resid_post.{i}", torch.full((2,), float(i))) for i in range(12)])
    assert wb.Recipe.load(many.save(tmp_path / "r")) == many


def test_a_failed_save_leaves_the_old_recipe(tmp_path):
    wb.Recipe([A]).save(tmp_path / "r")
    with pytest.raises(TypeError):
        wb.Recipe([B], notes={"bad": object()}).save(tmp_path / "r")
    assert wb.Recipe.load(tmp_path / "r").interventions == (A,)


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipe\.json"):
        wb.Recipe.load(tmp_path)
    folder = wb.Recipe([A]).save(tmp_path / "r")
    plain = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(plain | {"version": 99}))
    with pytest.raises(ValueError, match="newer version"):
        wb.Recipe.load(folder)
    plain["interventions"][0]["op"] = "Explode"
    (folder / "recipe.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match="Unknown operation"):
        wb.Recipe.load(folder)
    with pytest.raises(TypeError, match="no intervention"):
        wb.Recipe(["z.0.1"])


def test_a_recipe_knows_its_model(llama, words):
    stamped = wb.Recipe([wb.Zero("z.1.1")]).for_model(llama)
    llama.logits(words(4), stamped)
    other = wb.Recipe(stamped.interventions, "made elsewhere", "0123")
    for carrier in (other, [other], wb.Recipe([other]), wb.Recipe([A]) + other):
        with pytest.raises(ValueError, match="was made for model 0123"):
            llama.logits(words(4), carrier)
    with pytest.raises(ValueError, match="different models"):
        stamped + other
    llama.logits(words(4), wb.Recipe(list(other)))
