"""Gradient methods: equal to exact patching where the model is linear, sums that must come out, known truth, refusals."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny import MIXTURES, build, copying, tokenizer
from torch import nn

import workbench as wb
from workbench import measure
from workbench.improve import plant
from workbench.locate import causal, gradient, magnitude
from workbench.locate.causal.null import partners
from workbench.locate.gradient import attribution, passes
from workbench.locate.gradient.passes import run
from workbench.locate.gradient.rules import relevance_rules
from workbench.model.plan import Prompts
from workbench.sae import SAE

ATP, RELP = gradient.attribution_patch, gradient.relevance_patch


def task(*args):
    return wb.Task(copying(*args), "copying")


def metric(logits, rows=None):
    return logits[:, 10] - logits[:, 20]


def told_apart(model, some):
    """The pairs with the words that a random model tells the sides apart by: answer rises most, foil falls most."""
    change = model.logits(some.column("clean")) - model.logits(some.column("corrupted"))
    change[:, :4] = 0
    told = [
        row | {"answer": f"w{int(one.argmax())}", "foil": f"w{int(one.argmin())}"} for row, one in zip(some, change)
    ]
    return wb.Task(told * 6)  # often enough for the difference of four to count


@pytest.fixture(scope="module")
def linear():
    """Llama and Gemma (with its softcap) with nothing but a linear map after the last layer's attention pattern."""
    models = {}
    for name in ("llama", "gemma2"):
        hf = build(name)
        block, hf.model.norm, hf.config.final_logit_softcapping = hf.model.layers[-1], nn.Identity(), None
        block.mlp.down_proj.weight.data.zero_()
        for part, factor in (
            ("q_proj", 2),
            ("k_proj", 2),
            ("o_proj", 10),
        ):  # effects of sharp attention, large enough to see
            block.self_attn.get_submodule(part).weight.data.mul_(factor)
        if name == "gemma2":
            block.post_attention_layernorm = nn.Identity()
        models[name] = wb.load(hf, tokenizer=tokenizer())
    return models


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_equal_to_exact_patching_where_the_model_is_linear(linear, name, direction, word_pairs):
    model = linear[name]
    word_pairs = told_apart(model, word_pairs)
    kinds = ["z.2.*", "v.2.*", "pattern.2.*", "attn_out.2@-1", "resid_mid.2@-1", "mlp_out.2", "resid_post.2@-1"]
    exact = causal.patch(model, word_pairs, kinds, direction=direction, null=False)
    first = ATP(model, word_pairs, kinds, direction=direction)
    assert first.components == exact.components and np.abs(exact.values).max() > 0.3
    assert np.allclose(first.values, exact.values, atol=1e-4) and np.allclose(first.ci_hi, exact.ci_hi, atol=1e-3)
    assert (first.clean, first.corrupted) == pytest.approx((exact.clean, exact.corrupted), abs=1e-4)
    relevance = RELP(model, word_pairs, [one for one in exact.components if one.kind != "pattern"], direction=direction)
    same = [exact[one] for one in relevance.components]
    assert np.allclose(relevance.values, same, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_qk_fix_is_exact_up_to_the_pattern(linear, name, word_pairs):
    word_pairs = told_apart(linear[name], word_pairs)
    for positions in ("all", [3, -1]):
        exact = causal.patch(linear[name], word_pairs, ["q.2.*", "k.2.*"], positions=positions, null=False)
        fixed = ATP(linear[name], word_pairs, ["q.2.*", "k.2.*"], positions=positions, qk_fix=True)
        plain = ATP(linear[name], word_pairs, ["q.2.*", "k.2.*"], positions=positions)
        assert np.allclose(fixed.per_prompt, exact.per_prompt, atol=1e-4) and np.abs(exact.per_prompt).max() > 0.03
        assert np.abs(plain.per_prompt - exact.per_prompt).max() > 0.01


def test_the_qk_fix_is_refused_where_scores_are_more_than_query_times_key(linear, word_pairs, monkeypatch):
    """Gemma's softcap, when nobody says that it is there."""
    some = told_apart(linear["gemma2"], word_pairs)
    monkeypatch.setattr(linear["gemma2"].hf.config, "attn_logit_softcapping", None)
    with pytest.raises(ValueError, match="multiple of query times key"):
        ATP(linear["gemma2"], some, "q.2.*", qk_fix=True, null=False)


def test_it_is_the_change_times_the_slope(tiny, word_pairs):
    """Against `activations` and `gradients`, which have tests of their own, for every kind an architecture offers."""
    kinds = ["resid_pre.1", "q.1.2", "k.1.0", "v.1.1", "attn_scores.1.3", "pattern.1.3", "z.1.3", "attn_out.1",
             "resid_mid.1", "router.1", "neuron.1.5", "expert.1.2", "mlp_out.1", "resid_post.1"]  # fmt: skip
    kinds = [one for one in kinds if one.split(".")[0] not in tiny.names.refused]
    some = told_apart(tiny, word_pairs)
    scores, pairs = ATP(tiny, some, kinds, positions="all", null=False), some.on(tiny)
    clean = tiny.activations(pairs.clean, kinds)

    def told(logits, rows):
        return logits[rows, pairs.answer[rows]] - logits[rows, pairs.foil[rows]]

    _, corrupted, slopes = tiny.gradients(pairs.corrupted, kinds, told)
    for one, effects in zip(scores.components, scores.per_prompt, strict=True):
        change = clean[one] - corrupted[one]
        if one.kind == "attn_scores":
            change = torch.where(change.abs() < 1e30, change, 0)
        expected = (change * slopes[one]).reshape(len(effects), -1).sum(1)
        assert np.allclose(effects, expected, rtol=1e-3, atol=1e-4), one


@pytest.mark.parametrize("method", [ATP, RELP])
def test_positions_add_up_and_padding_does_nothing(trained, method):
    kinds = ["z.*.*", "resid_pre.*", "neuron.1.*", "v.1.*"]
    each, whole = (method(trained, task(), kinds, positions=p, null=False) for p in ("each", "all"))
    for i, one in enumerate(whole.components):
        parts = [k for k, part in enumerate(each.components) if part.at(None) == one]
        assert np.allclose(each.per_prompt[parts].sum(0), whole.per_prompt[i], atol=1e-4)
    longer = [dict(row, clean="w11 " + row["clean"], corrupted="w11 " + row["corrupted"]) for row in task(4, 9)]
    both = method(trained, wb.Task([*task(8), *longer]), "resid_pre.1@cause", null=False)
    alone = method(trained, wb.Task(longer), "resid_pre.1@cause", null=False)
    assert np.allclose(both.per_prompt[:, 8:], alone.per_prompt, atol=1e-5)


def test_features_add_up_to_what_they_stand_for(llama, word_pairs):
    """With one feature for each half axis, the code is complete and linear, as long as no sign turns: sums agree."""
    word_pairs = told_apart(llama, word_pairs)
    eye = torch.eye(32)
    sae = SAE(torch.cat([eye, -eye], 1), torch.zeros(64), torch.cat([eye, -eye]), torch.zeros(32),
                 wb.Component.parse("resid_post.0"), name="axes")  # fmt: skip
    llama.attach(sae)
    try:
        features = ATP(llama, word_pairs, "feature.axes.*", null=False)
        one = ATP(llama, word_pairs, "feature.axes.33@3", null=False)
    finally:
        llama.detach("axes")
    stream = ATP(llama, word_pairs, "resid_post.0", positions="all", null=False)
    assert len(features.components) == 64 and len(one.components) == 1
    assert np.allclose(features.per_prompt.sum(0), stream.per_prompt[0], atol=1e-4)
    assert 0 < np.abs(one.values[0]) <= np.abs(features.per_prompt[33]).max()


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_the_null_is_the_same_estimate_for_other_prompts(trained, direction, monkeypatch):
    """Of prompts of the side that is run, with another word at the cause: of one side half the pairs share it."""
    rows = [row | {"spans": {}} for row in copying(12)]
    rows[::2] = [row | {"corrupted": row["corrupted"].replace(" w5 ", " w8 ")} for row in rows[::2]]
    task, seen, real = wb.Task(rows), {}, attribution.measure.null_threshold

    def watched(effects):
        seen.update(under=effects, limit=real(effects))
        return seen["limit"]

    monkeypatch.setattr(attribution.measure, "null_threshold", watched)
    kinds = ["resid_pre.1", "attn_scores.1.1", "z.1.2", "neuron.1.5"]
    scores = ATP(trained, task, kinds, positions="all", direction=direction, null=3, seed=4)
    assert np.allclose(scores.null_p95 * abs(scores.clean - scores.corrupted), seen["limit"])
    pairs = task.on(trained)
    ids = pairs.corrupted if direction == "denoising" else pairs.clean
    others = partners(pairs, ids, [list(range(12))], 3, 4)
    _, acts, slopes = trained.gradients(ids, kinds, lambda logits, rows: logits[:, 6] - logits[:, 7])
    for i, one in enumerate(acts):
        x, slope = acts[one].reshape(12, -1), slopes[one].reshape(12, -1)
        x = torch.where(x.abs() < 1e30, x, 0)
        for draw in range(3):
            expected = ((x[[other[draw] for other in others]] - x) * slope).sum(1)
            assert np.allclose(seen["under"][draw, i], expected, rtol=1e-3, atol=1e-4), one


@contextmanager
def constant(model, layer, attention=True):
    """What a layer of a Llama (or its FFN alone) adds to the stream has no slope."""
    block = model.hf.model.layers[layer]
    hooks = [block.mlp.register_forward_hook(lambda m, a, out: out.detach(), prepend=True)]
    if attention:
        hooks.append(block.self_attn.register_forward_hook(lambda m, a, out: (out[0].detach(), *out[1:]), prepend=True))
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("method", [ATP, RELP])
def test_a_bar_counts_prompts_and_can_be_left_out(trained, method, monkeypatch):
    from workbench.model.sweep import bar

    seen, shown = [], []

    def watched(total, progress):
        show = bar(total, progress)
        update = show.update
        show.update = lambda n: (seen.append(n), update(n))
        shown.append((total, progress, show.disable))
        return show

    monkeypatch.setenv("WORKBENCH_STRICT", "0")
    monkeypatch.setattr(attribution, "bar", watched)
    monkeypatch.setattr(attribution, "tokens_per_pass", lambda names, sites: 40)  # several batches
    first, second = method(trained, task(9), "z"), method(trained, task(9), "z", progress=False)
    assert shown == [(9, True, False), (9, False, True)] and np.array_equal(first.values, second.values)
    assert sum(seen) == 18 and len(seen) > 2


def test_grad_drop_averages_over_layers_without_slope(llama, word_pairs):
    word_pairs = told_apart(llama, word_pairs)
    kinds = ["resid_pre.1@3", "resid_mid.0@3", "z.0.*", "v.1.*", "mlp_out.2@-1"]
    dropped = ATP(llama, word_pairs, kinds, grad_drop=True)
    without = []
    for layer in range(3):
        with constant(llama, layer):
            without.append(np.abs(ATP(llama, word_pairs, kinds, null=False).per_prompt))
    with constant(llama, 0, attention=False):  # its slope arrives at what attention writes
        middle = np.abs(ATP(llama, word_pairs, "resid_mid.0@3", null=False).per_prompt)
    without[0][dropped._index("resid_mid.0@3")] = middle
    gap = dropped.clean - dropped.corrupted
    for i, one in enumerate(dropped.components):
        layers = [k for k in range(3) if one.kind.startswith("resid") or k != one.layer]
        mean = np.mean([without[k][i] for k in layers], 0)
        assert np.allclose(np.abs(dropped.per_prompt[i]), mean, atol=1e-4), one
        assert dropped.values[i] == pytest.approx(mean.mean() / abs(gap), rel=1e-3)
    for one in ("resid_mid.0@3", "mlp_out.2@-1"):  # whatever is asked for beside it
        assert ATP(llama, word_pairs, one, grad_drop=True)[one] == pytest.approx(dropped[one], rel=1e-4)
    assert dropped.cost == 5 and ATP(llama, word_pairs, kinds).cost == 3 and "GradDrop" in dropped.method


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3", "olmo2", "granite", "gpt2", "gpt_neox", "opt", "bloom"])
def test_relevance_is_conserved(name, words):
    """Without biases, the relevance of the stream adds up to the metric at every layer: the rules make the model linear."""
    hf = build(name)
    for key, parameter in hf.named_parameters():
        if key.endswith("bias"):
            parameter.data.zero_()
    model, prompts = wb.load(hf, tokenizer=tokenizer()), words(6, 6)
    ids, sites = Prompts([model.ids(text) for text in prompts]), [("resid_pre", 0), ("resid_pre", 2), ("resid_post", 2)]
    plain = model.logits(prompts)
    with relevance_rules(model):
        seen = run(model, ids, sites, metric, slopes=sites)
        assert torch.allclose(model.logits(prompts), plain, atol=1e-5)  # values stay what they are
    (slopes,) = seen.slopes
    for site in sites:
        relevance = (seen.acts[site] * slopes[site]).sum((1, 2))
        assert torch.allclose(relevance, seen.value, rtol=1e-3, atol=1e-3), site
    calculus = run(model, ids, sites, metric, slopes=sites)
    total = (calculus.acts["resid_pre", 0] * calculus.slopes[0]["resid_pre", 0]).sum((1, 2))
    assert not torch.allclose(total, seen.value, rtol=1e-2, atol=1e-2)  # the hooks are gone, and were needed


def test_relevance_is_refused_where_it_does_not_flow(llama, word_pairs):
    with pytest.raises(ValueError, match="does not flow through attention patterns, so k, q have none"):
        RELP(llama, word_pairs, ["q", "k"])
    with pytest.raises(ValueError, match="fuses experts"):
        RELP(wb.load(build("mixtral"), tokenizer=tokenizer()), word_pairs, "z")


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe"])
def test_families_of_experts_where_the_first_layer_has_none(name, word_pairs, monkeypatch):
    monkeypatch.setitem(MIXTURES, "qwen2_moe", MIXTURES["qwen2_moe"] | {"mlp_only_layers": [0]})
    model = wb.load(build(name), tokenizer=tokenizer())
    some = told_apart(model, word_pairs)
    scores = ATP(model, some, ["expert.*.*", "router.*@-1"], null=False)
    members = [*(f"expert.{layer}.{i}" for layer in (1, 2) for i in range(4)), "router.1@-1", "router.2@-1"]
    assert sorted(map(str, scores.components)) == sorted(members)
    each = ATP(model, some, members, null=False)
    assert np.allclose(scores.values, [each[one] for one in scores.components], atol=1e-6) and scores.values.any()
    for at in ("expert.*.*", "router.*"):
        with pytest.raises(ValueError, match="fuses experts"):
            RELP(model, some, at)


def test_a_pass_counts_the_experts_that_run_for_their_slopes(word_pairs, monkeypatch):
    """With slopes at their weights all experts run on every token; what is kept for the way back stays within the limit."""
    monkeypatch.setitem(MIXTURES, "qwen3_moe", MIXTURES["qwen3_moe"] | {"num_experts": 64})
    model = wb.load(build("qwen3_moe"), tokenizer=tokenizer())
    some, own = told_apart(model, word_pairs), {one.data_ptr() for one in model.hf.parameters()}
    monkeypatch.setattr(passes, "ACTIVATIONS_PER_PASS", 2**21)
    most, run = [], attribution.run

    def counted(*args, **kwargs):
        storages = {}  # by address, held so that none is used twice

        def pack(x):
            if x.untyped_storage().data_ptr() not in own:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            found = run(*args, **kwargs)
        most.append(sum(one.nbytes() for one in storages.values()) / 4)
        return found

    monkeypatch.setattr(attribution, "run", counted)
    kept = {}
    for at in ("mlp_out.*", "expert.*.*"):
        most.clear()
        ATP(model, some, at, positions="all", null=False, progress=False)
        kept[at] = max(most)
        assert 2**17 < kept[at] < 2**21


def test_a_saturated_head_is_found_by_the_qk_fix(course):
    with plant(course, "saturated", 2) as planted:
        (head,), held = planted.components, planted.task.split("test")
        key = wb.Component("k", head.layer, head.index)
        exact, plain = causal.patch(course, held, "k", null=False), ATP(course, held, "k")
        fixed = ATP(course, held, "k", qk_fix=True)
        stream = ATP(course, held, f"resid_pre.{head.layer}@cause")
        with pytest.warns(UserWarning, match="take more steps"):  # it opens at once, between two steps
            tokens = gradient.integrated_gradients(course, held[:4], steps=16, null=False)
    assert exact.top(1) == [key] and exact[key] > 0.8
    assert abs(plain[key]) < 0.01 and key not in plain.top(len(plain.components) // 2)
    assert fixed.top(1) == [key] and fixed[key] > 0.3
    assert abs(stream.values[0]) < 0.1  # what the head reads
    assert tokens.top(1) == [wb.Component.parse("embed@cause")]


def test_a_decoy_misleads_correlation_and_not_gradients(course):
    with plant(course, "decoy", 1) as planted:
        (true,), (decoy,), held = planted.components, planted.decoys, planted.task.split("test")
        correlated = magnitude.contrast(course, held, f"neuron.{true.layer}.*@-1")
        first = ATP(course, held, "neuron")
        exact = causal.patch(course, held, [true, decoy], null=False)
        known = gradient.knowledge_neurons(course, held[:6], f"neuron.{true.layer}.*")
        weights = gradient.weight_importance(course, held[:6], [true, decoy], null=False)
    assert decoy.at(-1) in correlated.top(2)
    assert first.top(1) == [true] and first[decoy] == 0 and abs(exact[decoy]) < 1e-6 and exact[true] > 0.7
    assert known.top(1) == [true] and known[decoy] == 0
    assert known.columns["shared"][known.components.index(true)] == 1
    assert weights[decoy] < 0.01 * weights[true]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "opt"])
def test_weight_importance_is_weight_times_gradient(name, word_pairs):
    hf = build(name)
    model = wb.load(hf, tokenizer=tokenizer())
    pairs, row = word_pairs.on(model), model.names.row
    at = ["q.1.2", "k.1.1", "v.1.0", "z.1.3", "neuron.2.5", "attn_out.0", "mlp_out.2"]
    snip, fisher = (gradient.weight_importance(model, word_pairs, at, rule=rule) for rule in ("snip", "fisher"))
    matrix = hf.get_submodule(row.layers)[1].get_submodule(row.heads).weight.requires_grad_(True)
    own = slice(3 * model.names.d_head, 4 * model.names.d_head)
    expected = []
    for ids, answer in zip(pairs.clean, pairs.answer, strict=True):
        loss = hf(ids[None]).logits[0, -1].log_softmax(-1)[answer]
        (slope,) = torch.autograd.grad(loss, matrix)
        each = torch.stack([(slope * matrix).abs(), slope**2]).detach()
        expected.append(each[:, own].sum((1, 2)) if name == "gpt2" else each[:, :, own].sum((1, 2)))
    matrix.requires_grad_(False)
    for scores, wanted in zip((snip, fisher), torch.stack(expected, 1)):
        assert np.allclose(scores.per_prompt[scores.components.index(wb.Component.parse("z.1.3"))], wanted, rtol=1e-3)
    whole = gradient.weight_importance(model, word_pairs, ["attn_out", "mlp_out"])
    assert whole.values.sum() == pytest.approx(1)
    parts = gradient.weight_importance(model, word_pairs, ["q.0.*", "k.0.*", "v.0.*", "z.0.*", "neuron.2.*"])
    by_block = {kind: sum(parts[one] for one in parts.components if one.kind in kind) for kind in ("qkvz", "neuron")}
    assert by_block["qkvz"] == pytest.approx(whole["attn_out.0"]) and by_block["neuron"] == pytest.approx(
        whole["mlp_out.2"]
    )
    assert not any(p.requires_grad for p in hf.parameters())


def test_weights_and_their_null_are_shares_by_hand(llama, monkeypatch):
    """The null is the next word at an earlier position: of two words the second, of more a random one."""
    words = ["w10 w11", "w12 w13", "w14 w15", "w20 w21 w22 w23 w24", "w30 w31 w32 w33 w34"]
    rows = [{"clean": text, "corrupted": text[:-1] + "9", "answer": "w40", "foil": "w41"} for text in words]
    seen = {}
    monkeypatch.setattr(measure, "null_threshold", lambda effects: seen.setdefault("under", effects).mean((0, 2)))
    at, pairs = [f"{kind}.{layer}" for layer in range(3) for kind in ("attn_out", "mlp_out")], wb.Task(rows).on(llama)
    scores = gradient.weight_importance(llama, wb.Task(rows), at, null=2)
    assert scores.values.sum() == pytest.approx(1) and seen["under"].mean(2).sum(1) == pytest.approx([1, 1])
    block = llama.hf.model.layers[1]
    matrices = [one.weight.requires_grad_(True) for part in (block.self_attn, block.mlp) for one in part.children()
                if isinstance(one, nn.Linear)]  # fmt: skip
    alone = []
    for ids in pairs.clean[:3]:
        slopes = torch.autograd.grad(llama.hf(ids[None]).logits[0, 0].log_softmax(-1)[ids[1]], matrices)
        alone.append(sum(float((w.detach() * slope).abs().sum()) for w, slope in zip(matrices, slopes, strict=True)))
    [one.requires_grad_(False) for one in matrices]
    for draw in seen["under"]:  # in shares of all weights
        assert draw[2:4, :3].sum(0) / alone == pytest.approx(np.full(3, draw[2, 0] + draw[3, 0]) / alone[0], rel=1e-3)
    assert (np.abs(seen["under"][0] - seen["under"][1]).max(0)[3:] > 0).any()
    sizes = [
        sum(one.numel() for one in part.parameters())
        for layer in llama.hf.model.layers
        for part in (layer.self_attn, layer.mlp)
    ]
    assert scores.columns["per_weight"] == pytest.approx(scores.values * sum(sizes) / sizes)


@pytest.mark.parametrize("method", [
    lambda m, t: ATP(m, t, ["z", "k"]), lambda m, t: ATP(m, t, ["q", "k"], qk_fix=True, grad_drop=True),
    lambda m, t: RELP(m, t, "mlp_out"), gradient.saliency, lambda m, t: gradient.integrated_gradients(m, t, steps=8),
    lambda m, t: gradient.knowledge_neurons(m, t, steps=4), gradient.weight_importance,
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Integrated gradients miss")
def test_repeatable_with_null_and_cost_and_free_of_side_effects(trained, method):
    weights = {k: v.clone() for k, v in trained.hf.state_dict().items()}
    logits = trained.logits(task().column("clean"))
    one, two = (method(trained, task()) for _ in range(2))
    assert np.array_equal(one.values, two.values) and np.array_equal(one.null_p95, two.null_p95)
    assert np.isfinite(one.null_p95).all() and (one.ci_lo <= one.ci_hi).all() and one.cost >= 2 and one.null
    assert one.method.startswith("gradient.") and one.components == sorted(one.components) and "\n" not in repr(one)
    assert all(torch.equal(v, weights[k]) for k, v in trained.hf.state_dict().items())
    assert torch.equal(trained.logits(task().column("clean")), logits)
    with torch.no_grad():
        single = method(trained, task(1))
    assert single.why or "norm" in single.method
    assert np.isnan(single.ci_lo).all() and (np.isnan(single.null_p95).all() or "norm" in single.method)


@pytest.mark.parametrize("settings, said", [
    ({"at": "z", "metric": "accuracy"}, "moves in steps"), ({"at": "z", "direction": "up"}, "denoising"),
    ({"at": "z", "qk_fix": True}, "for queries and keys"), ({"at": "embed"}, "cannot be patched"),
    ({"at": "z.9.0"}, "layer 9"), ({"at": "z", "null": 1}, "number of draws"), ({"at": "resid_prr"}, "Did you mean"),
    ({"at": "z", "metric": lambda logits, answer, foil: (logits[:, 6] > 0).float()}, "no gradient"),
])  # fmt: skip
def test_bad_arguments(trained, settings, said):
    with pytest.raises(ValueError, match=said):
        ATP(trained, task(4), **settings)


def test_bad_arguments_of_the_others(trained, words):
    for call, said in [
        (lambda: gradient.saliency(trained, task(3), how="loud"), "'norm' or 'input'"),
        (lambda: gradient.saliency(trained, words(5), baseline="corrupted"), "needs pairs"),
        (lambda: gradient.saliency(trained, task(3), how="input", baseline=torch.zeros(3)), r"a vector \[32\]"),
        (lambda: gradient.integrated_gradients(trained, task(3), steps=0), "steps=0"),
        (lambda: gradient.integrated_gradients(trained, []), "No prompt"),
        (lambda: gradient.knowledge_neurons(trained, task(3), "z"), "knowledge neurons are neurons"),
        (lambda: gradient.weight_importance(trained, task(3), rule="wanda"), "'snip' or 'fisher'"),
        (lambda: gradient.weight_importance(trained, task(3), "resid_pre"), "weights belong to"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize("method", [
    lambda m, t: ATP(m, t, ["z"], null=False), lambda m, t: gradient.saliency(m, t, null=False),
    lambda m, t: gradient.integrated_gradients(m, t, steps=8, null=False),
    lambda m, t: gradient.knowledge_neurons(m, t, "neuron.1.*", metric="logit_diff", steps=2, null=False),
    lambda m, t: gradient.weight_importance(m, t, null=False),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Integrated gradients miss")
def test_rows_of_one_entity_are_one_observation(trained, method):
    """The same rows four times over tell nothing new: the interval is that of the rows."""
    once, again = (method(trained, wb.Task(rows)) for rows in (copying(6), copying(6) * 4))
    assert np.allclose(once.values, again.values, rtol=1e-3, atol=1e-4)
    assert np.allclose([once.ci_lo, once.ci_hi], [again.ci_lo, again.ci_hi], rtol=1e-3, atol=1e-4)
    assert (once.ci_lo < once.ci_hi).any()


def test_weights_where_queries_and_keys_are_out_of_reach(word_pairs):
    model = wb.load(build("bloom"), tokenizer=tokenizer())
    found = gradient.weight_importance(model, word_pairs, null=False)
    assert {one.kind for one in found.components} == {"z", "mlp_out"} and (found.values > 0).all()
