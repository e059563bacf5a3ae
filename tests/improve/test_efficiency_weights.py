"""Fewer bits and fewer layers: rounding errors within half a step, bytes as stored, exits that stop where they say."""

import pytest
import torch

import workbench as wb
from workbench.improve import efficiency as fast


def test_rounded_weights_are_the_nearest_of_their_channel(tiny, words):
    delta, size = fast.quantize(tiny, {0: 4, 2: 8})
    parameters = dict(tiny.hf.named_parameters())
    assert all(".0." in name or ".2." in name for name in delta.names)
    for name in delta.names:
        old, off = parameters[name].detach(), delta.difference(name)
        if (
            "router" not in name and "mlp.gate.weight" not in name
        ):  # routers are no Linear: their channels lie otherwise
            steps, old, off = (
                (7 if ".0." in name else 127),
                *((old.T, off.T) if tiny.hf.config.model_type == "gpt2" else (old, off)),
            )
            whole = (old + off) / (old.abs().amax(1, keepdim=True) / steps).half().float()
            assert (whole - whole.round()).abs().max() < 0.02 and whole.abs().max() < steps + 0.02
    for name in delta.names:
        w = parameters[name].detach()
        step = w.abs().max() / (7 if ".0." in name else 127)
        assert delta.difference(name).abs().max() <= 0.51 * step
    cut = sum(parameters[n].numel() * (0.5 if ".0." in n else 1.0) for n in delta.names)
    rest = sum(p.numel() * 4 for n, p in parameters.items() if n not in delta.names)
    scales = size - cut - rest
    assert 0 < scales < 0.15 * (cut + rest)
    before = tiny.logits(words(7))
    near, far = (tiny.logits(words(7), fast.quantize(tiny, bits)[0]) for bits in (8, 3))
    assert 0 < (near - before).abs().max() < (far - before).abs().max()


def test_quantize_refuses_other_bits_and_layers(llama):
    for bits in (1, 16, {}, {9: 4}, {0: 2.5}):
        with pytest.raises(ValueError, match="bits is 2 to 8"):
            fast.quantize(llama, bits)


def test_effects_are_those_of_one_layer_alone(trained):
    from tiny import copying

    task = wb.Task(copying(6), "copying")
    scores, prompts = fast.quantization_effects(trained, task, bits=3), task.column("clean")
    before = trained.logits(prompts)
    for layer in range(3):
        after = trained.logits(prompts, fast.quantize(trained, {layer: 3})[0])
        assert scores[f"resid_post.{layer}"] == pytest.approx(wb.measure.kl(before, after).mean().item(), rel=1e-4)
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


def test_a_sure_model_leaves_early_and_says_the_same(trained):
    from tiny import copying

    prompts = wb.Task(copying(8), "copying").column("clean")
    said, ran = fast.exit_early(trained, prompts, 0.9)
    assert ran.float().mean() < 3
    assert torch.equal(said.argmax(-1), trained.logits(prompts).argmax(-1))
