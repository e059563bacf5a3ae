"""Gradients at every site, against finite differences, and what lies inside attention."""

import pytest
import torch
from tiny import build, tokenizer

import workbench as wb
from workbench.model.names import INSIDE


def metric(logits, rows=None):
    return logits[:, 10] - logits[:, 20]


def offered(model, *sites):
    return [site for site in sites if site.split(".")[0] not in model.names.refused]


def test_gradients_are_slopes(tiny, words):
    """Scaling an activation by 1 + e moves the metric by e * activation * gradient."""
    prompts = words(5, 5)
    sites = offered(tiny, "embed", "resid_pre.1", "q.1.2", "k.1.0", "v.1.1", "pattern.1.3", "z.1.3", "attn_out.1",
                    "resid_mid.1", "router.1", "neuron.1.5", "expert.1.2", "mlp_out.1", "resid_post.1")  # fmt: skip
    value, acts, slopes = tiny.gradients(prompts, sites, metric)
    assert torch.allclose(value, metric(tiny.logits(prompts)), atol=1e-4)
    for one, slope in slopes.items():
        moved = [metric(tiny.logits(prompts, wb.Scale(one.at(2), factor))) for factor in (1.01, 0.99)]
        expected = (acts[one][:, 2] * slope[:, 2]).reshape(2, -1).sum(-1)
        assert torch.allclose((moved[0] - moved[1]) / 0.02, expected, rtol=0.1, atol=0.03), one


def test_gradients_under_an_intervention(llama, words):
    """What is replaced passes nothing on: nothing before it has a gradient."""
    cut = [wb.Zero(["resid_pre.1"])]
    _, _, slopes = llama.gradients(words(6), ["embed", "resid_post.0", "resid_post.2"], metric, *cut)
    before, at, after = slopes.values()
    assert not before.any() and after.any()
    assert at.any()  # the value put there has a slope of its own


def test_gradients_are_the_same_in_a_padded_batch(llama, words):
    prompts = words(5, 8)
    together = llama.gradients(prompts, "resid_post.0@-1", metric)[2]
    alone = [llama.gradients([one], "resid_post.0@-1", metric)[2] for one in prompts]
    for one, both in together.items():
        assert torch.allclose(both, torch.cat([a[one] for a in alone]), atol=1e-5)


def test_gradients_change_nothing(llama, words):
    before = llama.logits(words(5))
    llama.gradients(words(5), "q.0.0", metric)
    assert torch.equal(llama.logits(words(5)), before)


def test_inside_attention(tiny, words):
    """The pattern sums to one and is causal; scores become it; z is the pattern times v; unchanged values change nothing."""
    if "q" in tiny.names.refused:
        with pytest.raises(ValueError, match="way of its own"):
            tiny.activations(words(5), "q.0.0")
        return
    prompts, names = words(6, 6), tiny.names
    own = 3 * names.n_kv_heads // names.n_heads
    acts = tiny.activations(prompts, ["attn_scores.1.3", "pattern.1.3", f"v.1.{own}", "z.1.3"])  # in this order
    scores, pattern, value, z = acts.values()
    assert torch.allclose(pattern.sum(-1), torch.ones(2, 6), atol=1e-5)
    assert not pattern.triu(1).any()
    assert torch.allclose(scores.softmax(-1), pattern, atol=1e-5)
    assert torch.allclose(pattern @ value, z, atol=1e-4)
    base = tiny.logits(prompts)
    for kind in INSIDE:
        assert torch.equal(tiny.logits(prompts, wb.Scale(f"{kind}.1.1", 1.0)), base)
        assert not torch.allclose(tiny.logits(prompts, wb.Scale(f"{kind}.1.1@3", 3.0)), base, atol=1e-6), kind


def test_inside_attention_acts_on_the_prompt_only(llama, words):
    with pytest.raises(ValueError, match="prompt only"):
        llama.generate(words(5), wb.Zero("k.0.0", phase="generation"))
    assert llama.generate(words(5), wb.Zero("k.0.0"), max_new_tokens=3)


def test_attention_that_keeps_no_pattern(words):
    """A module with fused attention: q, k and v are there, the pattern is refused with what to type."""
    hf = build("llama")
    hf.set_attn_implementation("sdpa")
    model = wb.load(hf, tokenizer=tokenizer())
    assert model.activations(words(4, 4), "q.0.1").shape == (2, 4, 8)
    with pytest.raises(ValueError, match="set_attn_implementation"):
        model.activations(words(4), "pattern.0.1")


def test_attention_with_a_sink_beside_the_keys_has_no_pattern_that_sums_to_one():
    model = wb.load(build("gpt_oss"), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="does not sum to one"):
        model.activations("w5 w6 w7", "pattern.1.0")
