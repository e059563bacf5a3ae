"""Smaller checkpoints: what is returned is what is saved, mixtures keep their kinds of layer, and blocks are named as blocks."""

import numpy as np
import pytest
import tiny as tiny_models
import torch
from tiny import build, tokenizer

import workbench as wb
from workbench.improve import efficiency as fast


def reloaded(model, folder, **how):
    model.hf.save_pretrained(folder)
    return wb.load(folder, tokenizer=tokenizer(), **how)


def without(layer):
    return wb.Zero([f"attn_out.{layer}", f"mlp_out.{layer}"])


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_in_half_precision_the_model_returned_is_the_one_saved(architecture, words, tmp_path):
    hf = build(architecture)
    hf.config.max_position_embeddings = 256
    whole = reloaded(wb.load(hf, tokenizer=tokenizer()), tmp_path / "whole", dtype=torch.bfloat16)
    small, prompts = fast.shrink(whole, 1), words(200)
    assert {parameter.dtype for parameter in small.hf.parameters()} == {torch.bfloat16}
    back = reloaded(small, tmp_path / "small", dtype=torch.bfloat16)
    assert torch.equal(small.logits(prompts), back.logits(prompts))
    assert torch.equal(small.logits(prompts), whole.logits(prompts, without(1)))


@pytest.mark.parametrize("architecture, layer, name, says", [("qwen2_moe", 0, "mlp_only_layers", [0]), ("qwen2_moe", 1, "mlp_only_layers", []),
                                                             ("qwen2_moe", 2, "mlp_only_layers", [1]), ("deepseek_v3", 0, "first_k_dense_replace", 0),
                                                             ("deepseek_v3", 2, "first_k_dense_replace", 1), ("gpt_oss", 1, "num_local_experts", 4)])  # fmt: skip
def test_mixtures_keep_their_kinds_of_layer(architecture, layer, name, says, words, tmp_path):
    model, prompts = wb.load(build(architecture), tokenizer=tokenizer()), words(20, 7)
    want, small = model.logits(prompts, without(layer)), fast.shrink(model, layer)
    assert getattr(small.hf.config, name) == says
    assert (small.logits(prompts) - want).abs().max() < 1e-5
    assert (reloaded(small, tmp_path).logits(prompts) - want).abs().max() < 1e-5


def test_a_rhythm_of_layers_is_refused_with_what_to_do(monkeypatch):
    rhythm = {**tiny_models.MIXTURES["qwen3_moe"], "decoder_sparse_step": 2}
    monkeypatch.setitem(tiny_models.MIXTURES, "qwen3_moe", rhythm)
    model = wb.load(build("qwen3_moe"), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="Drop other blocks"):
        fast.shrink(model, 0)
    assert fast.shrink(model, 2).names.n_layers == 2  # as it says


def test_blocks_are_numbers_or_streams(llama):
    for one in (np.int64(1), [np.int64(1)], "resid_post.1", wb.Component.parse("resid_post.1")):
        assert fast.shrink(llama, one).names.n_layers == 2
    for one in ("z.1.2", "neuron.1.3", "mlp_out.1", "resid_pre.1", "resid_post.1@-1", "embed", True, [1.0]):
        with pytest.raises(ValueError, match=r"write its number, such as 4, or 'resid_post\.4' without a position"):
            fast.shrink(llama, one)
    with pytest.raises(ValueError, match="Nothing is taken out"):
        fast.shrink(llama)


def test_nothing_is_drawn_from_the_generator_of_others(llama):
    state = torch.get_rng_state()
    fast.shrink(llama, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_sides_of_an_embedding_that_came_apart_stay_apart(words, tmp_path):
    model = wb.load(build("gpt2"), tokenizer=tokenizer())
    shape = model.hf.lm_head.weight.shape
    apart = wb.Delta(
        weights={"lm_head.weight": torch.ones(shape).cumsum(0) / 50, "transformer.wte.weight": torch.zeros(shape)}
    )
    with model.edited(apart):
        want, small = model.logits(words(9), without(1)), fast.shrink(model, 1)
    assert (small.logits(words(9)) - want).abs().max() < 1e-5
    assert (reloaded(small, tmp_path).logits(words(9)) - want).abs().max() < 1e-5
