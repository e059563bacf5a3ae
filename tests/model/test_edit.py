"""Weights changed for a while: differences act in every call, folded equals hooked, every bit comes back."""

import signal

import pytest
import torch
from tiny import build, tokenizer

import workbench as wb
from workbench.model.edit import refuse_delta
from workbench.model.fold import Folded, changed_by_deltas


def deltas(model, seed=0, size=0.05):
    rng = torch.Generator().manual_seed(seed)
    return wb.Delta(weights={name: size * torch.randn(one.shape, generator=rng)
                             for name, one in model.hf.named_parameters() if one.dim() == 2})  # fmt: skip


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operations(names):
    """Every operation at every place that may fold, in the order of the pass and against it."""
    d, h = names.d_model, names.d_head
    found = [
        wb.Zero("z.1.*"), wb.Scale(["z.0.1", "z.2.3"], (0.5, 2.0)), wb.Mean(["z.0.1", "z.1.0"], numbers(2, h)),
        wb.Replace("z.1.1", numbers(h)), wb.ProjectOut("z.1.1", numbers(h)), wb.Affine("z.1.1", numbers(h, h), numbers(h)),
        wb.Recipe([wb.Scale("z.1.1", 2.0), wb.Replace("z.1.1", numbers(h)), wb.Scale("z.1.1", 3.0)]),
        wb.Add("embed", numbers(d)), wb.Scale("embed", 0.5), wb.ProjectOut("embed", numbers(d)),
        wb.Add("resid_pre.0", numbers(d)), wb.ProjectOut("resid_pre.0", numbers(d)), wb.Scale("resid_pre.0", 0.5),
        wb.Add("resid_pre.2", numbers(d)), wb.Add("resid_post.2", numbers(d)), wb.Add("resid_mid.1", numbers(d)),
        wb.ProjectOut(["resid_pre.0", "attn_out.*", "mlp_out.*"], numbers(2, d)),
        wb.ProjectOut(["resid_pre.*", "resid_mid.*", "resid_post.*"], numbers(d)),
        wb.ProjectOut("ln_final", numbers(d)), wb.Scale("ln_final", 0.5), wb.Add("ln_final", numbers(d)),
        wb.Zero(["neuron.1.3", "neuron.0.7"]), wb.Scale("neuron.1.*", 2.0), wb.Mean(["neuron.1.3", "neuron.0.7"], numbers(2)),
        wb.Recipe([wb.Scale("neuron.1.3", 2.0), wb.Clamp("neuron.1.3", 1.5), wb.Scale("neuron.1.3", 3.0)]),
    ]  # fmt: skip
    for at in ("attn_out.1", "mlp_out.1"):
        found += [wb.Zero(at), wb.Scale(at, 0.5), wb.Mean(at, numbers(d)), 2 * wb.Add(at, numbers(d)), wb.ProjectOut(at, numbers(d)),
                  wb.Affine(at, numbers(d, d) / 4, numbers(d)),
                  wb.Recipe([wb.Add(at, numbers(d)), wb.Scale(at, 0.5), wb.Add(at, numbers(d, seed=1))])]  # fmt: skip
    found += [wb.Zero(["expert.1.3", "expert.0.2"]), wb.Scale("expert.1.*", 0.5),
              wb.Recipe([wb.Scale("expert.2.1", 2.0), wb.ProjectOut("mlp_out.2", numbers(d)), wb.Scale("expert.2.1", 0.3)])]  # fmt: skip
    return [one for one in found if offered(names, one)]


def offered(names, one) -> bool:
    return all(place.kind not in names.refused for part in wb.recipe.flatten(one) for place in part.at)


def folding(model, step: int = 1):
    """What folds on this model, of every `step`th operation; of each refusal, its text."""
    good, refused = [], []
    for one in operations(model.names)[::step]:
        try:
            Folded(model, one)
            good.append(one)
        except ValueError as error:
            refused.append(str(error))
    return good, refused


def state(model):
    return {name: one.clone() for name, one in model.hf.state_dict().items()}


def unchanged(model, before, parameters) -> bool:
    now = model.hf.state_dict()
    same = now.keys() == before.keys() and all(torch.equal(one, before[name]) for name, one in now.items())
    return same and all(a is b for a, b in zip(model.hf.parameters(), parameters, strict=True))


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def test_folded_is_hooked(tiny, words):
    prompts, before, parameters = words(7, 4), state(tiny), list(tiny.hf.parameters())
    plain = tiny.logits(prompts)
    good, refused = folding(tiny)
    assert len(good) >= 18
    alone = [one for one in good if isinstance(one, wb.ProjectOut) and len(one.at) > 1]  # of the whole stream
    rest = [one for one in good if one not in alone]
    for one in [*alone, *(wb.Recipe(rest[part::4]) for part in range(4))]:  # neighbours, which act at one place, apart
        hooked = tiny.logits(prompts, one)
        assert not close(hooked, plain, 1e-3)  # an effect to speak of
        with tiny.edited(one) as model:
            assert close(model.logits(prompts), hooked), one
        assert unchanged(tiny, before, parameters)
    for text in refused:
        assert text.startswith("These do not fold") and "instead" in text


def test_folded_is_hooked_one_by_one(llama, words):
    """Also the text, and with other weights beneath."""
    prompts, delta = words(7, 4), deltas(llama)
    good, refused = folding(llama)
    assert not refused
    for one in good:
        hooked = llama.logits(prompts, one, delta)
        with llama.edited(delta, one):
            assert close(llama.logits(prompts), hooked), one
    hooked = llama.generate(prompts, *good[::3], max_new_tokens=5)
    with llama.edited(*good[::3]):
        assert llama.generate(prompts, max_new_tokens=5) == hooked


def test_a_difference_is_added_as_finely_as_the_weight_is():
    for dtype, wide in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        model = wb.load(build("llama").to(dtype), tokenizer=tokenizer())
        delta = deltas(model)
        for name, new in changed_by_deltas(model, delta).items():
            old = model.hf.get_parameter(name)
            assert new.dtype == dtype and torch.equal(new, (old.to(wide) + delta.difference(name).to(wide)).to(dtype))
            assert not torch.equal(new, old)


def test_what_the_architecture_decides():
    """Norms and mixtures behind the matrices; known from their code, not from this package."""
    for kind in ("gemma2", "gemma3_text", "olmo2"):
        model = wb.load(build(kind), tokenizer=tokenizer())
        for one in (wb.Add("resid_post.1", torch.ones(32)), wb.ProjectOut("attn_out.1", torch.ones(32))):
            with pytest.raises(ValueError, match=r"_layernorm"), model.edited(one):
                pass
    model = wb.load(build("mixtral"), tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"Add at mlp_out.1: it needs a constant added.*experts has no bias"):
        Folded(model, wb.Add("mlp_out.1", torch.ones(32)))
    Folded(model, wb.ProjectOut("mlp_out.*", torch.ones(32)))
    with pytest.raises(ValueError, match="word_embeddings_layernorm"):
        Folded(wb.load(build("bloom"), tokenizer=tokenizer()), wb.ProjectOut("resid_pre.0", torch.ones(32)))


@pytest.mark.parametrize("change, said", [
    (lambda v: wb.Add("resid_post.1@-1", v), "acts at one position.*without position it is resid_post.1"),
    (lambda v: wb.Add("resid_post.1", v, phase="generation"), "phase 'generation'.*phase='both'"),
    (lambda v: wb.Add("resid_post.1", v, unit="norm"), "unit='raw' adds the same vector to all"),
    (lambda v: wb.Add("resid_post.1", v).gated(wb.Gate("resid_post.0@-1", v)), r"\.gated\(None\)"),
    (lambda v: wb.Add("resid_post.1@-1", v).gated(wb.Gate("resid_post.0@-1", v)), r"its gate opens for some"),
    (lambda v: wb.Scale("resid_post.1", 2.0), "only Add and ProjectOut fold there"),
    (lambda v: wb.ProjectOut("resid_post.1", v), r"at=\['resid_pre.0', 'attn_out.\*', 'mlp_out.\*'\]"),
    (lambda v: wb.Zero("v.1.*"), "Zero at v.1.0 and 1 more: v is no place"),
])  # fmt: skip
def test_what_does_not_fold_is_named_with_reason_and_way_out(llama, words, change, said):
    before, parameters = state(llama), list(llama.hf.parameters())
    with pytest.raises(ValueError, match=said), llama.edited(wb.Zero("z.0.1"), change(torch.ones(32))):
        raise AssertionError("never inside")
    assert unchanged(llama, before, parameters)


def test_a_projection_of_the_stream_folds_once_all_before_is_free_of_it(llama, words):
    v, w = numbers(32), numbers(32, seed=1)
    early = wb.ProjectOut(["resid_pre.0", "resid_mid.0", "resid_post.0"], v)
    across = wb.Add("attn_out.0", w - (w @ v) / (v @ v) * v)  # does not write the direction
    for one in (early, wb.Recipe([early, across]), wb.Recipe([early, wb.Zero("z.0.1"), wb.Add("mlp_out.2", v)])):
        with llama.edited(one):
            got = llama.logits(words(6))
        assert close(got, llama.logits(words(6), one))
    for one in (wb.Recipe([early, wb.Add("resid_mid.0", v), wb.ProjectOut("resid_mid.1", v)]),
                wb.ProjectOut(["resid_pre.0", "resid_post.0"], v)):  # fmt: skip
        with pytest.raises(ValueError, match="still has the direction"):
            Folded(llama, one)


def test_differences_act_for_one_call_only(tiny, words):
    prompts, delta = words(6, 4), deltas(tiny)
    push = wb.Add("resid_post.1@-1", torch.ones(tiny.names.d_model))
    before, parameters, plain = state(tiny), list(tiny.hf.parameters()), tiny.logits(prompts)
    with torch.no_grad():
        for name in delta.names:
            tiny.hf.get_parameter(name).add_(delta.difference(name))
    expected = (tiny.logits(prompts, push), tiny.activations(prompts, "z.1.1@-1", push), tiny.generate(prompts, push))
    metric = lambda logits, rows: logits[:, 5]  # noqa: E731
    slopes = tiny.gradients(prompts, "z.1.1@-1", metric, push)
    tiny.hf.load_state_dict(before)
    for given in ((delta, push), (push, delta), (wb.Recipe([push, delta]),), ([[push], delta],)):
        assert torch.equal(tiny.logits(prompts, *given), expected[0])
    assert torch.equal(tiny.activations(prompts, "z.1.1@-1", delta, push), expected[1])
    assert tiny.generate(prompts, delta, push) == expected[2]
    again = tiny.gradients(prompts, "z.1.1@-1", metric, delta, push)
    assert torch.equal(again[0], slopes[0]) and all(torch.equal(again[2][k], slopes[2][k]) for k in slopes[2])
    assert torch.equal(tiny.logits(prompts), plain) and unchanged(tiny, before, parameters)
    assert torch.equal(tiny.logits(prompts, 0 * delta), plain)
    assert not close(expected[0], plain, 1e-3)


def test_the_algebra_holds_when_run(tiny, words):
    """Bit for bit: 0 is nothing, 2 v is v at strength 2, --v is v, a + b is b + a at different places."""
    prompts, d = words(6, 3), tiny.names.d_model
    push, other, delta = wb.Add("resid_post.1", numbers(d)), wb.Scale("z.1.1", 0.5), deltas(tiny)
    plain, pushed = tiny.logits(prompts), tiny.logits(prompts, push)
    for nothing in (0 * push, 0 * delta, wb.Recipe([]), wb.Recipe([0 * push, 0 * delta])):
        assert torch.equal(tiny.logits(prompts, nothing), plain)
        with tiny.edited(nothing):
            assert torch.equal(tiny.logits(prompts), plain)
    assert torch.equal(tiny.logits(prompts, 2 * push), tiny.logits(prompts, wb.Add("resid_post.1", numbers(d), 2.0)))
    assert torch.equal(tiny.logits(prompts, -(-push)), pushed) and not torch.equal(pushed, plain)
    twice = wb.Delta(weights=delta.weights, strength=2.0)
    assert torch.equal(tiny.logits(prompts, 2 * delta), tiny.logits(prompts, twice))
    assert torch.equal(tiny.logits(prompts, -(-delta)), tiny.logits(prompts, delta))
    together = tiny.logits(prompts, push + other + delta)
    for order in (other + delta + push, delta + (push + other)):
        assert torch.equal(tiny.logits(prompts, order), together)
    assert torch.equal(tiny.logits(prompts, delta, other, push), together)


def test_undone_after_errors_and_interrupts_and_nested(llama, words):
    before, parameters, delta = state(llama), list(llama.hf.parameters()), deltas(llama)
    zero, plain = wb.Zero("z.1.1"), llama.logits(words(5))
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), llama.edited(delta, zero):
            raise error
        assert unchanged(llama, before, parameters)
    with llama.edited(delta):
        outer = llama.logits(words(5))
        with llama.edited(zero, 2 * delta):
            inner = llama.logits(words(5))
        assert torch.equal(llama.logits(words(5)), outer)
        again = llama.logits(words(5), delta)
    assert close(again, llama.logits(words(5), 2 * delta)) and not close(again, outer, 1e-3)
    assert close(inner, llama.logits(words(5), 3 * delta, zero)) and unchanged(llama, before, parameters)
    assert torch.equal(llama.logits(words(5)), plain)


def test_undone_after_a_signal_in_the_middle_of_a_run(llama, words):
    """Ctrl-C as it happens: a signal while the model computes."""
    before, parameters = state(llama), list(llama.hf.parameters())
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), llama.edited(deltas(llama)):
            while True:
                llama.logits(words(5), deltas(llama, 1))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert unchanged(llama, before, parameters)


def test_the_fingerprint_follows_the_weights(llama, words):
    outside, delta = llama.fingerprint, deltas(llama, size=1.0)
    recipe = wb.Recipe([wb.Zero("z.1.1")]).for_model(llama)
    with llama.edited(delta):
        inside = llama.fingerprint
        assert inside != outside
        llama.logits(words(4), recipe)  # made for the model that this one was made from
        made_here = wb.Recipe([wb.Zero("z.1.1")]).for_model(llama)
        with llama.edited(recipe):
            assert llama.fingerprint not in (inside, outside)
        assert llama.fingerprint == inside
    assert llama.fingerprint == outside and llama.made_from == ()
    with pytest.raises(ValueError, match="was made for model"):
        llama.logits(words(4), made_here)
    again = wb.load(llama.hf, tokenizer=llama.tokenizer)
    with again.edited(delta):
        assert again.fingerprint == inside
    assert again.fingerprint == outside


@pytest.fixture()
def tied():
    return wb.load(build("gemma2"), tokenizer=tokenizer())


def test_a_tied_weight_comes_apart_only_where_one_side_changes(tied, words):
    table, head = tied.hf.get_input_embeddings(), tied.hf.get_output_embeddings()
    weight, name = table.weight, "model.embed_tokens.weight"
    assert head.weight is weight
    push, difference = wb.Add("resid_pre.0", numbers(32)), numbers(*weight.shape)
    hooked = tied.logits(words(5), push)
    with tied.edited(push):
        assert head.weight is weight and table.weight is not weight
        assert close(tied.logits(words(5)), hooked)
    with tied.edited(wb.Scale("ln_final", 0.5)):
        assert head.weight is not weight and table.weight is weight
    assert table.weight is head.weight is weight
    both = []
    for weights in (
        {name: difference},
        {"lm_head.weight": difference},
        {name: difference, "lm_head.weight": difference.clone()},
    ):
        with tied.edited(wb.Delta(weights=weights)):
            assert table.weight is head.weight and torch.equal(table.weight, weight + difference)
            both.append(tied.logits(words(5)))
    assert torch.equal(both[0], both[1]) and torch.equal(both[0], both[2])
    with tied.edited(wb.Delta(weights={name: difference, "lm_head.weight": 0 * difference})):
        assert torch.equal(table.weight, weight + difference) and torch.equal(head.weight, weight)
    assert table.weight is head.weight is weight


def test_the_lens_reads_other_weights_too(llama, words):
    lens = wb.locate.vocabulary.logit_lens(llama, words(5), deltas(llama), wb.Zero("z.1.1"))
    with llama.edited(deltas(llama)):
        assert lens.frame.equals(wb.locate.vocabulary.logit_lens(llama, words(5), wb.Zero("z.1.1")).frame)
    assert not lens.frame.equals(wb.locate.vocabulary.logit_lens(llama, words(5), wb.Zero("z.1.1")).frame)


def test_bad_differences_are_refused_before_anything_changes(llama, words):
    before, parameters = state(llama), list(llama.hf.parameters())
    for weights, said in (({"model.norm.weigh": torch.ones(32)}, "Did you mean 'model.norm.weight'"),
                          ({"model.norm.weight": torch.ones(3)}, r"is \[32\], but its difference is \[3\]")):  # fmt: skip
        for act in (lambda d: llama.logits(words(4), d), lambda d: llama.edited(d).__enter__()):
            with pytest.raises(ValueError, match=said):
                act(wb.Delta(weights=weights))
    with pytest.raises(ValueError, match=r"with model.edited\(delta\)"):
        refuse_delta([wb.Recipe([wb.Zero("z.0.1"), deltas(llama)])])
    assert unchanged(llama, before, parameters)


def test_half_precision_is_folded_and_restored(words):
    model = wb.load(build("llama").to(torch.bfloat16), tokenizer=tokenizer())
    before, parameters = state(model), list(model.hf.parameters())
    one = wb.Recipe([wb.Zero("z.1.1"), wb.Add("attn_out.0", numbers(32)), deltas(model)])
    with model.edited(one):
        got = model.logits(words(6))
    assert close(got, model.logits(words(6), one), 0.1) and unchanged(model, before, parameters)
