"""Weights under their field names: what the modules compute is what these matrices compute."""

from operator import attrgetter

import pytest
import torch
from tiny import OTHERS, build, copying, tokenizer
from transformers import CONFIG_MAPPING

import workbench as wb
from workbench.model.weights import columns
from workbench.steer.optimization.masks import weight_masks


def inside(model):
    """What goes into and comes out of the projections of layer 1."""
    row, ids = model.names.row, torch.tensor([[4, 5, 6, 7, 8]])

    def read(names=model.names):
        block = names.layers[1]
        found = {"x": names.place("resid_pre", 1, 1).get().clone()}
        if row.norm_attn:
            found["x"] = attrgetter(row.norm_attn)(block).output.clone()
        found["qkv"] = [attrgetter(path)(block).output.clone() for path in row.qkv]
        found["z"] = names.place("z", 1, 1).get().clone()
        found["heads"] = names.part("heads", 1).output.clone()
        if row.norm_mlp and row.neurons:
            shared = row.norm_mlp == row.norm_attn  # it has gone by already
            found["y"] = found["x"] if shared else attrgetter(row.norm_mlp)(block).output.clone()
            found["mlp_in"] = [attrgetter(path)(block).output.clone() for path in row.mlp_in]
        if row.neurons:
            found["neuron"], found["mlp"] = (
                names.place("neuron", 1, 1).get().clone(),
                names.part("neurons", 1).output.clone(),
            )
        return found

    return model.trace(model.inputs(ids), read)


def steps(x):
    """Differences between neighbouring positions: biases drop out."""
    x = x[0] if x.dim() == 3 else x
    return x[1:] - x[:-1]


def test_they_compute_what_the_modules_compute(tiny):
    names, seen = tiny.names, inside(tiny)
    for kind in "qkv":
        out = seen["qkv"]["qkv".index(kind) if len(seen["qkv"]) == 3 else 0]
        for head in range(names.n_heads):
            own = head if kind == "q" else head * names.n_kv_heads // names.n_heads
            start, end = columns(names, kind, own)
            assert torch.allclose(
                steps(out[..., start:end]), steps(seen["x"]) @ tiny.weight(f"W_{kind.upper()}", 1, head), atol=1e-5
            )
    width = names.d_head
    mixed = sum(seen["z"][..., h * width : (h + 1) * width] @ tiny.weight("W_O", 1, h) for h in range(names.n_heads))
    assert torch.allclose(steps(seen["heads"]), steps(mixed), atol=1e-5)
    if "neuron" in seen:
        assert torch.allclose(steps(seen["mlp"]), steps(seen["neuron"] @ tiny.weight("W_out", 1)), atol=1e-5)
    if "y" in seen:
        keys = [tiny.weight("W_in", 1)]
        if sum(out.shape[-1] for out in seen["mlp_in"]) == 2 * names.d_mlp:
            keys = [tiny.weight("W_gate", 1), *keys]
        assert torch.allclose(steps(torch.cat(seen["mlp_in"], -1)), steps(seen["y"]) @ torch.cat(keys, 1), atol=1e-5)


def test_embeddings(llama):
    ids = torch.tensor([5, 9, 33])
    first, last = llama.activations([ids], ["embed", "ln_final"]).values()
    assert torch.equal(first[0], llama.weight("W_E")[ids])
    assert torch.allclose(last[0] @ llama.weight("W_U"), llama.logits([ids], positions="all")[0], atol=1e-5)


def test_a_copy_is_given(llama):
    before = llama.weight("W_O", 0, 1)
    llama.weight("W_O", 0, 1).zero_()
    assert torch.equal(llama.weight("W_O", 0, 1), before)


@pytest.mark.parametrize(("asked", "said"), [(("W_X",), "W_QK|W_E"), (("W_Q", 9, 0), "layer from 0 to 2"), (("W_Q", 0), "head from 0"),
                                             (("W_O", 0, 7), "head from 0 to 3")])  # fmt: skip
def test_refuses(llama, asked, said):
    with pytest.raises(ValueError, match=said):
        llama.weight(*asked)


@pytest.mark.parametrize("name", ["W_E", "W_U", "W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out"])
def test_a_weight_is_a_copy(llama, name):
    args = () if name in ("W_E", "W_U") else (1, 0) if name[2:] in "QKVO" else (1,)
    before = llama.weight(name, *args)
    llama.weight(name, *args).zero_()
    assert torch.equal(llama.weight(name, *args), before) and before.any()


def test_attention_made_in_steps_of_its_own_is_refused_by_name():
    """Latent attention: no matrix gives one head's queries, so whatever needs one says so, and the way that is named works."""
    model = wb.load(build("deepseek_v3"), tokenizer=tokenizer())
    task, tune = wb.Task(copying()), wb.steer.optimization
    for call in (lambda: model.weight("W_Q", 1, 0), lambda: wb.locate.vocabulary.ov_circuit(model, "z.1.0"),
                 lambda: wb.locate.circuit.eap(model, task), lambda: tune.lora(model, task, "attn_out.1", keep=()),
                 lambda: weight_masks(model, "z.1.0")):  # fmt: skip
        with pytest.raises(ValueError, match="steps of its own"):
            call()
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    mask = torch.ones_like(dict(model.hf.named_parameters())[name], dtype=torch.bool)
    assert tune.finetune(model, task, {name: mask}, keep=(), steps=2, every=1, progress=False).names == (name,)


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "falcon"])  # its norms are not known
def test_those_of_further_families_too(name):
    if name not in CONFIG_MAPPING:
        pytest.skip("this version of transformers does not know it")
    test_they_compute_what_the_modules_compute(wb.load(build(name), tokenizer=tokenizer()))


def test_an_unknown_norm_is_refused():
    model = wb.load(build("falcon"), tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"no post_attention_layernorm.*row of its own"):
        wb.locate.circuit.eap(model, wb.Task(copying()))
