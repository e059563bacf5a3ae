"""Fewer bits and fewer layers: rounding errors within half a step, bytes as stored, exits that stop where they say."""

import threading

import pytest
import torch
from tiny import build, tokenizer

import workbench as wb
from workbench.improve import efficiency as fast


def outputs_first(model, name, tensor):
    """[..., output, input]: GPT-2 and the experts of gpt-oss keep it the other way round."""
    kind = model.hf.config.model_type
    return tensor.mT if kind == "gpt2" or (kind == "gpt_oss" and "experts" in name) else tensor


def check_rounding(model, words):
    delta, size = fast.quantize(model, {0: 4, 2: 8})
    parameters, bits, scales = dict(model.hf.named_parameters()), {}, 0
    for name, parameter in parameters.items():
        layer = next((layer for layer in (0, 2) if f".{layer}." in name), None)
        if layer is not None and parameter.dim() > 1 and not name.endswith("bias"):
            bits[name] = 4 if layer == 0 else 8
    assert set(delta.names) == set(bits)  # experts and routers, too; no biases
    for name in bits:
        steps = 2 ** (bits[name] - 1) - 1
        old, off = (outputs_first(model, name, one) for one in (parameters[name].detach(), delta.difference(name)))
        scale = (old.abs().amax(-1, keepdim=True) / steps).half().float()
        whole = (old + off) / scale
        assert (whole - whole.round()).abs().max() < 0.02 and whole.abs().max() < steps + 0.02
        assert (
            off / scale
        ).abs().max() <= 0.51 + 0.001 * steps  # half a step, and what a scale of half precision cuts off
        scales += 2 * scale.numel()
    stored = sum(parameters[name].numel() * bits[name] / 8 for name in bits)
    assert size == stored + scales + sum(p.numel() * 4 for name, p in parameters.items() if name not in bits)
    before = model.logits(words(7))
    near, far = (model.logits(words(7), fast.quantize(model, bits)[0]) for bits in (8, 3))
    assert 0 < (near - before).abs().max() < (far - before).abs().max()


def test_rounded_weights_are_the_nearest_of_their_channel(tiny, words):
    check_rounding(tiny, words)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_experts_are_rounded_one_by_one(architecture, words):
    check_rounding(wb.load(build(architecture), tokenizer=tokenizer()), words)


def test_channels_of_zeros_stay_zero():
    hf = build("llama")
    with torch.no_grad():
        hf.model.layers[0].mlp.down_proj.weight[3] = 0
        hf.model.layers[0].mlp.down_proj.weight[4] *= 1e-12  # the scale is 0 in half precision
    name = "model.layers.0.mlp.down_proj.weight"
    for bits in (2, 8):
        delta, _ = fast.quantize(wb.load(hf, tokenizer=tokenizer()), bits)
        rounded = hf.get_parameter(name).detach() + delta.difference(name)
        assert (rounded[3:5] == 0).all() and rounded[5].abs().max() > 0


def test_in_half_precision_the_running_weights_are_the_stored_ones_rounded_once():
    model = wb.load(build("llama").to(torch.bfloat16), tokenizer=tokenizer())
    delta, _ = fast.quantize(model, 8)
    for name in delta.names:
        old = model.hf.get_parameter(name).detach().float()
        scale = (old.abs().amax(1, keepdim=True) / 127).half().float()
        whole = ((old + delta.difference(name)) / scale).round()
        with model.edited(delta):
            running = model.hf.get_parameter(name).detach()
        assert (running == (whole * scale).to(torch.bfloat16)).float().mean() > 0.999  # the last bit of the sum
        assert (running.float() / scale - whole).abs().max() <= 0.5  # as the docstring says


def test_a_weight_without_known_channels_is_refused(words):
    hf = build("llama")
    hf.model.layers[1].register_parameter("odd", torch.nn.Parameter(torch.ones(2, 3)))
    model = wb.load(hf, tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"model\.layers\.1\.odd \[2, 3\]"):
        fast.quantize(model, 4)
    assert fast.quantize(model, {0: 4, 2: 4})[1] > 0


def test_quantize_refuses_other_bits_and_layers(llama):
    for bits in (1, 16, {}, {9: 4}, {0: 2.5}):
        with pytest.raises(ValueError, match="bits is 2 to 8"):
            fast.quantize(llama, bits)


def test_effects_are_those_of_one_layer_alone(trained):
    from tiny import copying

    task, dealt = wb.Task(copying(6), "copying"), torch.Generator().manual_seed(5)
    scores, prompts = fast.quantization_effects(trained, task, bits=3, seed=5), task.column("clean")
    before = trained.logits(prompts)
    for layer in range(3):
        delta, _ = fast.quantize(trained, {layer: 3})
        after = trained.logits(prompts, delta)
        assert scores[f"resid_post.{layer}"] == pytest.approx(wb.measure.kl(before, after).mean().item(), rel=1e-4)
        errors = {name: delta.difference(name) for name in delta.names}
        mixed = {name: x.flatten()[torch.randperm(x.numel(), generator=dealt)].view_as(x) for name, x in errors.items()}
        null = wb.measure.kl(before, trained.logits(prompts, wb.Delta(weights=mixed))).mean().item()
        assert scores.null_p95[layer] == pytest.approx(null, rel=1e-4)
    assert (scores.values > 0).all()


def test_an_exit_is_the_lens_and_never_leaving_is_the_model(tiny, words):
    prompts = words(6, 9, 5)
    said, ran = fast.exit_early(tiny, prompts, 1.1)
    assert ran.tolist() == [3, 3, 3]
    assert (said - tiny.logits(prompts)).abs().max() < 1e-5
    said, ran = fast.exit_early(tiny, prompts, 0.0, start=1)
    assert ran.tolist() == [2, 2, 2]
    lens = wb.locate.vocabulary.logit_lens(tiny, prompts, at="resid_post.1")
    assert [tiny.token(i) for i in said.argmax(-1)] == [lens.said("resid_post.1", i)[0][0] for i in range(3)]
    assert not any(module._forward_hooks for module in tiny.hf.modules())
    with pytest.raises(ValueError, match="0 to 2"):
        fast.exit_early(tiny, prompts, start=3)
    for confidence in (float("nan"), -0.1):
        with pytest.raises(ValueError, match="0 to 1"):
            fast.exit_early(tiny, prompts, confidence)


def test_a_sure_model_leaves_early_and_says_the_same(trained):
    from tiny import copying

    prompts = wb.Task(copying(8), "copying").column("clean")
    said, ran = fast.exit_early(trained, prompts, 0.9)
    assert ran.float().mean() < 3
    assert torch.equal(said.argmax(-1), trained.logits(prompts).argmax(-1))


@pytest.mark.parametrize("confidence, start", [(0.0, 0), (0.0, 2), (1.1, 0)])
def test_a_model_that_the_lens_cannot_read_is_refused(confidence, start, words):
    hf = build("llama")

    class Odd(type(hf)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.flip(-1)
            return out

    hf.__class__ = Odd
    model = wb.load(hf, tokenizer=tokenizer())
    with pytest.raises(ValueError, match="no stream can be read out"):
        fast.exit_early(model, words(6), confidence, start=start)
    assert not any(module._forward_hooks for module in hf.modules())


@pytest.mark.parametrize("call", [lambda model, prompts: fast.exit_early(model, prompts, 0.0, start=1),
                                  lambda model, prompts: fast.prune_tokens(model, prompts, 0.5, after=0)])  # fmt: skip
def test_another_thread_meets_no_hooks(llama, words, call):
    prompts, found, others = words(9), [], []
    want, alone = llama.logits(prompts), call(llama, prompts)

    def meanwhile(module, inputs, output):
        if not others:
            others.append(threading.Thread(target=lambda: found.append(llama.logits(prompts))))
            others[0].start()
            others[0].join(0.5)  # it waits for us, so it is not done by then

    hook = llama.hf.model.layers[0].register_forward_hook(meanwhile)
    try:
        assert torch.equal(call(llama, prompts)[0], alone[0])
        others[0].join()
    finally:
        hook.remove()
    assert torch.equal(found[0], want)
