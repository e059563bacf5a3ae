"""The names mean the same on seventeen architectures, and a model that breaks an identity is told apart."""

import numpy as np
import pytest
import torch
from tiny import CONFIGS, GEMMA, OTHERS, build, copying, tokenizer
from transformers import CONFIG_MAPPING

import workbench as wb
from workbench.component import Component
from workbench.model.names import ROWS

STREAM = ("resid_pre", "attn_out", "mlp_out", "resid_post")


def test_blocks_add_to_the_stream(tiny, words):
    prompt = words(7)
    for layer in range(tiny.names.n_layers):
        pre, attn, mlp, post = (tiny.activations(prompt, f"{kind}.{layer}") for kind in STREAM)
        assert torch.allclose(pre + attn + mlp, post, rtol=1e-4, atol=1e-5 * post.abs().max())
        if "resid_mid" not in tiny.names.refused:
            assert torch.allclose(tiny.activations(prompt, f"resid_mid.{layer}"), pre + attn, rtol=1e-5, atol=1e-5)
        if layer:
            assert torch.equal(pre, tiny.activations(prompt, f"resid_post.{layer - 1}"))


def test_the_stream_is_the_hidden_states_of_transformers(tiny, words):
    ids = tiny.ids(words(6)[0])
    hidden = tiny.hf(ids[None], output_hidden_states=True).hidden_states
    for layer in range(tiny.names.n_layers):
        assert torch.allclose(tiny.activations([ids], f"resid_pre.{layer}"), hidden[layer], atol=1e-5)


def test_heads_side_by_side_are_the_input_of_the_output_projection(tiny, words):
    heads = tiny.activations(words(6), "z.1.*")
    assert len(heads) == tiny.names.n_heads
    seen = {}
    module = tiny.hf.get_submodule(f"{tiny.names.row.layers}.1.{tiny.names.row.heads}")
    handle = module.register_forward_pre_hook(lambda _, args: seen.update(z=args[0].clone()))
    tiny.hf(tiny.ids(words(6)[0])[None])
    handle.remove()
    assert torch.equal(torch.cat(list(heads.values()), -1), seen["z"])


def test_only_parallel_blocks_lack_a_middle(tiny):
    parallel = tiny.hf.config.model_type in ("gpt_neox", "gptj")
    assert ("resid_mid" in tiny.names.refused) == parallel
    if parallel:
        with pytest.raises(ValueError, match="parallel"):
            tiny.names.validate(Component.parse("resid_mid.0"))


def test_sizes_and_ranges(llama):
    names = llama.names
    assert (names.n_layers, names.n_heads, names.d_head, names.d_model, names.d_mlp) == (3, 4, 8, 32, 48)
    assert len(names.expand([Component.parse("z")])) == 12
    for text, said in [("z.3.0", "layers 0 to 2"), ("z.0.4", "heads 0 to 3"), ("neuron.0.48", "neurons 0 to 47"),
                       ("k.0.2", "heads 0 to 1"), ("logits", "not offered")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            names.validate(Component.parse(text))


def test_a_family_without_a_row_is_recognized_or_refused():
    hf = build("llama")
    hf.config.model_type = "brand_new"
    assert wb.load(hf, tokenizer=tokenizer()).names.row == ROWS["llama"]
    del hf.model.norm
    with pytest.raises(ValueError, match=r"'brand_new' has no row .* Add a row"):
        wb.load(hf, tokenizer=tokenizer())
    hf.config.model_type = "llama"
    with pytest.raises(ValueError, match=r"The row of 'llama' .* does not fit .* missing: .*norm"):
        wb.load(hf, tokenizer=tokenizer())


def test_a_broken_identity_takes_the_parts_out_but_not_the_stream(words):
    hf = build("llama")
    block = hf.model.layers[1]
    block.forward = (lambda old: lambda *a, **k: old(*a, **k) * 1.5)(block.forward)
    model = wb.load(hf, tokenizer=tokenizer())
    assert {"attn_out", "mlp_out", "resid_mid"} <= set(model.names.refused)
    with pytest.raises(ValueError, match="does not give resid_post here"):
        model.activations(words(4), "attn_out.0")
    with pytest.raises(ValueError, match=r"z\.0\.0 cannot be patched here"):
        wb.locate.causal.patch(model, wb.Task(copying(3)), "z.0.0")
    model.activations(words(4), "resid_post.0")


@pytest.mark.parametrize("name", OTHERS)
def test_further_families_open_too(name):
    """What they do not offer is known; a sweep is what interventions give one by one; blocks sum to the logits."""
    if name not in CONFIG_MAPPING:
        pytest.skip("this version of transformers does not know it")
    model = wb.load(build(name), tokenizer=tokenizer())
    assert set(model.names.refused) - {"logits", "router", "expert"} == OTHERS[name][1]
    task = wb.Task(copying(4))
    at = [one for one in ("z.1.2", "mlp_out.0", "neuron.2.5") if one.split(".")[0] not in model.names.refused]
    swept = wb.locate.causal.ablate(model, task, at, "zero", null=False)
    for one, effects in zip(swept.components, swept.per_prompt, strict=True):
        assert np.allclose(effects, task.score(model) - task.score(model, wb.Zero(one)), atol=1e-5), one
    blocks = wb.locate.vocabulary.logit_attribution(model, task, ["resid_pre.0", "attn_out.*", "mlp_out.*"], null=False)
    pairs, gap = task.on(model), task.score(model)
    if cap := getattr(model.hf.config, "final_logit_softcapping", None):
        logits = torch.atanh((model.logits(pairs.clean) / cap).double()) * cap
        gap = wb.measure.logit_diff(logits, pairs.answer, pairs.foil).numpy()
    assert np.allclose(blocks.per_prompt.sum(0), gap, atol=1e-4 * max(1, np.abs(gap).max()))


def test_layers_of_different_size_are_refused(monkeypatch):
    """A neuron or head of one layer would be read with the size of another."""
    hf = build("llama")
    mlp = hf.model.layers[1].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        old = mlp.get_submodule(name)
        sizes = (
            (2 * old.in_features, old.out_features) if name == "down_proj" else (old.in_features, 2 * old.out_features)
        )
        setattr(mlp, name, torch.nn.Linear(*sizes, bias=False))
    with pytest.raises(ValueError, match="neuron is 48 or 96 wide, depending on the layer"):
        wb.load(hf, tokenizer=tokenizer())
    if "gemma4_text" in CONFIG_MAPPING:  # its global layers may have larger heads
        settings = GEMMA | {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0,
                            "layer_types": ["sliding_attention", "full_attention", "full_attention"]}  # fmt: skip
        monkeypatch.setitem(CONFIGS, "gemma4_text", settings)
        monkeypatch.setitem(ROWS, "gemma4_text", ROWS["gemma2"])
        with pytest.raises(ValueError, match="z is 32 or 64 wide, depending on the layer"):
            wb.load(build("gemma4_text"), tokenizer=tokenizer())
