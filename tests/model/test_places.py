"""Experts and routers of mixtures: what an expert weighs at each token, read and set, against transformers by hand."""

import pytest
import torch
from test_edit import close, state, unchanged
from tiny import MIXTURES, build, tokenizer
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter

import workbench as wb
from workbench.model import Prompts
from workbench.model.fold import Folded


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request):
    return wb.load(build(request.param), tokenizer=tokenizer())


def experts_of(model, layer):
    return model.hf.model.layers[layer].mlp.experts


def last(model) -> int:
    return max(model.names.experts)


def called(model, layer, text):
    """What plain transformers gives the experts of a layer: tokens, the chosen ones, their weights."""
    seen = []
    handle = experts_of(model, layer).register_forward_pre_hook(lambda module, args: seen.extend(args))
    model.hf(model.ids(text)[None])
    handle.remove()
    return seen


def reweighted(model, layer, text, change):
    """Logits of plain transformers whose experts of a layer are given other (chosen ones, weights)."""
    hook = experts_of(model, layer).register_forward_pre_hook(lambda module, args: (args[0], *change(*args[1:])))
    logits = model.hf(model.ids(text)[None]).logits[:, -1]
    hook.remove()
    return logits


def test_an_expert_is_what_it_weighs(mixture, words):
    (text,), layer = words(7), last(mixture)
    _, chosen, weights = called(mixture, layer, text)
    dense = torch.zeros(7, 4)
    for token, (those, share) in enumerate(zip(chosen, weights, strict=True)):
        dense[token, those] = share
    for index in range(4):
        assert torch.equal(mixture.activations(text, f"expert.{layer}.{index}")[0], dense[:, index])
        assert mixture.activations(text, f"expert.{layer}.{index}@-1") == dense[-1:, index]
    assert (dense != 0).sum(1).tolist() == [2] * 7


def test_without_an_expert_the_others_keep_their_weights(mixture, words):
    """Zero and Scale by hand: the same call of the fused experts, with other weights and no renormalization."""
    (text,), layer, moved = words(7), last(mixture), 0
    for index in range(4):
        for change, factor in (
            (wb.Zero(f"expert.{layer}.{index}"), 0.0),
            (wb.Scale(f"expert.{layer}.{index}", 0.5), 0.5),
        ):
            by_hand = reweighted(mixture, layer, text, lambda chosen, weights, index=index, factor=factor: (
                chosen, torch.where(chosen == index, factor * weights, weights)))  # fmt: skip
            assert torch.allclose(mixture.logits(text, change), by_hand, atol=1e-5)
            moved = max(moved, (by_hand - mixture.logits(text)).abs().max())
    assert moved > 0.01


def test_what_an_expert_adds_is_its_weight_times_what_it_computes():
    """From the weights of a Mixtral: also where the router had not chosen it."""
    model = wb.load(build("mixtral"), tokenizer=tokenizer())
    text, inner = "w10 w20 w30 w40 w50 w60", experts_of(model, 1)
    x, chosen, _ = called(model, 1, text)
    one, other, *_ = (i for i in range(4) if 0 < (chosen == i).sum() < 6)  # chosen at some tokens, not at others
    gate, up = (x @ inner.gate_up_proj[one].T).chunk(2, -1)
    computed = (inner.act_fn(gate) * up) @ inner.down_proj[one].T
    weight, plain = (model.activations(text, at)[0] for at in (f"expert.1.{one}", "mlp_out.1"))
    without = model.activations(text, "mlp_out.1", wb.Zero(f"expert.1.{one}"))[0]
    assert close(without, plain - weight[:, None] * computed)
    at = [f"expert.1.{one}", f"expert.1.{other}", "mlp_out.1"]
    here, beside, out = model.activations(text, at, wb.Clamp(f"expert.1.{one}", 0.7)).values()
    assert torch.allclose(here, torch.tensor(0.7)) and torch.equal(beside, model.activations(text, at[1]))
    assert close(out[0], without + 0.7 * computed)


def test_no_expert_is_no_ffn_output(mixture, words):
    """Exactly, but for a shared expert, which is no component: then what it writes is left."""
    prompts, layer = words(6, 6), last(mixture)
    out = mixture.activations(prompts, f"mlp_out.{layer}", wb.Zero(f"expert.{layer}.*"))
    names = dict(mixture.hf.model.layers[layer].mlp.named_children())
    shared = next((names[name] for name in ("shared_expert", "shared_experts") if name in names), None)
    assert bool(out.any()) == (shared is not None)
    if shared is None:
        off = mixture.logits(prompts, wb.Zero(f"expert.{layer}.*"))
        assert torch.equal(off, mixture.logits(prompts, wb.Zero(f"mlp_out.{layer}")))


def test_nothing_changes_no_bit(mixture, words):
    prompts, layer = words(6, 3), last(mixture)
    plain, own = mixture.logits(prompts), f"expert.{layer}.*"
    shut = wb.Gate(f"resid_pre.{layer}@-1", torch.ones(32), 1e6)
    for change in (wb.Scale(own, 1.0), 0 * wb.Add(f"expert.{layer}.1", [1.0]), wb.Zero(own).gated(shut),
                   wb.Zero(own, phase="generation"), 0 * wb.Add(f"router.{layer}", torch.ones(4))):  # fmt: skip
        assert torch.equal(mixture.logits(prompts, change), plain)
    (one,) = words(6)
    weights = mixture.activations(one, own)
    same = [wb.Replace(at.at(p), float(x[0, p])) for at, x in weights.items() for p in range(6)]
    assert torch.allclose(mixture.logits(one, *same), mixture.logits(one), atol=1e-5)


def test_padded_batches_and_generation(mixture, words):
    layer = last(mixture)
    prompts, own = words(3, 8, 5), f"expert.{layer}"
    for change in ([wb.Zero([f"{own}.0", f"{own}.1"])], [wb.Clamp(f"{own}.2", 0.6)], [wb.Scale(f"{own}.*@-1", 3.0)],
                   [wb.Add(f"router.{layer}", torch.tensor([9.0, 0, 0, -9.0]))],
                   [wb.Scale(f"{own}.*", 4.0, phase="generation"), wb.Zero(f"{own}.1", phase="prompt")]):  # fmt: skip
        single = torch.cat([mixture.logits(prompt, *change) for prompt in prompts])
        assert torch.allclose(mixture.logits(prompts, *change), single, atol=1e-4)
        texts = [mixture.generate(prompt, *change, max_new_tokens=4) for prompt in prompts]
        assert mixture.generate(prompts, *change, max_new_tokens=4) == texts
        for prompt in prompts[:1]:  # each token is the best one after what was generated before
            ids = mixture.ids(prompt)
            (made,) = mixture.generate_ids([prompt], *change, max_new_tokens=4)
            for i, token in enumerate(made):
                again = mixture.logits(Prompts([torch.cat([ids, made[:i]])], [len(ids)]), *change)
                assert again.argmax() == token


def test_a_router_is_its_logits(mixture, words):
    (text,), layer = words(6), last(mixture)
    logits = mixture.activations(text, f"router.{layer}")[0]
    gate = mixture.names.mixture(layer)[1]._module
    seen = []
    handle = gate.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    mixture.hf(mixture.ids(text)[None])
    handle.remove()
    assert torch.equal(logits, seen[0].float())
    chosen = mixture.activations(text, f"expert.{layer}.3", wb.Add(f"router.{layer}", torch.tensor([0, 0, 0, 100.0])))
    plain = mixture.activations(text, f"expert.{layer}.3")
    assert (chosen > 0).all() and not (plain > 0).all()
    more = mixture.activations(text, f"expert.{layer}.3", wb.Add(f"expert.{layer}.3", [0.25]))
    assert torch.equal(more, plain + 0.25)  # also where it was not chosen
    ties = mixture.activations(text, f"router.{layer}", wb.Zero(f"router.{layer}"))
    assert not ties.any()


def test_gradients_are_slopes_also_where_an_expert_was_not_chosen(mixture, words):
    (text,), layer = words(6), last(mixture)
    at = [f"expert.{layer}.{i}" for i in range(4)]
    _, acts, slopes = mixture.gradients(text, at, lambda logits, rows: logits[:, 10] - logits[:, 20])
    assert any((x == 0).any() and slopes[one][x == 0].any() for one, x in acts.items())
    for one, slope in slopes.items():
        moved = [mixture.logits(text, wb.Add(one.at(-1), [step])) for step in (0.01, -0.01)]
        expected = (moved[0] - moved[1])[0] / 0.02
        assert slope[0, -1] == pytest.approx(float(expected[10] - expected[20]), rel=0.05, abs=0.02)


def test_folded_is_hooked_or_says_why_not(mixture, words):
    prompts, layer = words(7, 4), last(mixture)
    before, parameters = state(mixture), list(mixture.hf.parameters())
    change = wb.Recipe(
        [wb.Scale([f"expert.{layer}.1", f"expert.{layer}.2"], (0.25, 3.0)), wb.Zero(f"expert.{layer}.0")]
    )
    if mixture.hf.config.model_type == "gpt_oss":
        with pytest.raises(ValueError, match="experts have biases"):
            Folded(mixture, change)
        return
    hooked = mixture.logits(prompts, change)
    assert not close(hooked, mixture.logits(prompts), 1e-3)
    with mixture.edited(change):
        assert close(mixture.logits(prompts), hooked)
    assert unchanged(mixture, before, parameters)
    for one, said in ((wb.Clamp(f"expert.{layer}.1", 0.5), "the router decides"),
                      (wb.Add(f"router.{layer}", torch.ones(4)), "Zero and Scale of experts are")):  # fmt: skip
        with pytest.raises(ValueError, match=said), mixture.edited(one):
            raise AssertionError("never inside")
    if {"shared_expert", "shared_experts"} & set(dict(mixture.hf.model.layers[layer].mlp.named_children())):
        with pytest.raises(ValueError, match="in a form of its own"):  # the experts alone are not all that writes
            Folded(mixture, wb.Zero(f"mlp_out.{layer}"))


def test_families_are_the_layers_that_have_experts(mixture):
    layers = {one.layer for one in mixture.names.expand([wb.Component.parse("expert.*.*")])}
    assert layers == {one.layer for one in mixture.names.expand([wb.Component.parse("router.*")])}
    without = set(range(3)) - layers
    assert without == {"qwen2_moe": {1}, "deepseek_v3": {0}}.get(mixture.hf.config.model_type, set())
    for layer in without:
        with pytest.raises(ValueError, match=f"layer {layer} has no experts here"):
            mixture.logits("w5 w6", wb.Zero(f"expert.{layer}.0"))
    with pytest.raises(ValueError, match=r"experts 0 to 3"):
        mixture.logits("w5 w6", wb.Zero(f"expert.{last(mixture)}.4"))


def test_a_model_without_experts_says_so(llama):
    for at in ("expert.1.3", "router.1"):
        with pytest.raises(ValueError, match=f"{at[:6]}.*no mixture of experts"):
            llama.logits("w5 w6", wb.Zero(at))
        with pytest.raises(ValueError, match="no mixture of experts"):
            llama.activations("w5 w6", at)


class Differently(MixtralExperts):
    def forward(self, x, where, how):
        return super().forward(x, where, how)


class Also(MixtralExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states, top_k_index, top_k_weights) + 1


class Turned(MixtralTopKRouter):
    def forward(self, hidden_states):
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        return logits, *(-logits).softmax(-1).topk(self.top_k)


def test_a_router_that_chooses_otherwise_in_one_layer_is_refused():
    hf = build("mixtral")
    hf.model.layers[2].mlp.gate.__class__ = Turned
    model = wb.load(hf, tokenizer=tokenizer())
    with pytest.raises(ValueError, match="its logits do not choose the experts"):
        model.activations("w5 w6", "router.1")
    assert model.activations("w5 w6", "expert.2.1").shape == (1, 2)


@pytest.mark.parametrize("kind, said", [(Differently, "keeps its experts in a form of its own"),
                                        (Also, "experts without weight write something")])  # fmt: skip
def test_experts_of_another_kind_are_refused(kind, said):
    hf = build("mixtral")
    for block in hf.model.layers if kind is Differently else hf.model.layers[-1:]:  # the last one's are enough
        block.mlp.experts.__class__ = kind
    model = wb.load(hf, tokenizer=tokenizer())
    with pytest.raises(ValueError, match=said):
        model.logits("w5 w6", wb.Zero("expert.1.3"))
