"""Gates: each row decides for itself, open is no gate and closed no intervention, bit for bit; order, saving, refusals."""

from dataclasses import replace

import pytest
import torch
from test_sae import make
from tiny import build, tokenizer

import workbench as wb

PROMPTS = [
    "w10 w11 w4",
    "w12 w13 w4 w6 w8",
    "w14 w15 w5",
    "w33 w20 w21 w22 w5",
]  # of two lengths, so that some are padded
V = torch.randn(32, generator=torch.Generator().manual_seed(1))
AT = "resid_post.0@-1"
OPEN = wb.Gate(AT, V, -1e6)
HEAD = V[:8]
CHANGES = [wb.Add("resid_post.1", 3 * V), wb.Zero("z.1.2"), wb.Scale("mlp_out.1@-1", 3.0), wb.Clamp("neuron.1.3", 9.0),
           wb.ProjectOut("resid_mid.1", V), wb.Replace("z.1.1", HEAD), wb.Affine("resid_post.1@-1", 2 * torch.eye(32), V),
           wb.Attend("attn_scores.1.*", 0), wb.Add("resid_post.1", V, 40.0, "angle")]  # fmt: skip


def half(model, at=AT, prompts=PROMPTS, **given):
    """A gate that lets half of the prompts through, and which."""
    gate = wb.Gate(at, V, **given)
    x = torch.stack([model.activations(text, at)[0] for text in prompts])
    reading = gate.reading(x)
    gate = replace(gate, threshold=float((reading.sort().values[1] + reading.sort().values[2]) / 2))
    return gate, gate.open(x)


@pytest.fixture(scope="module", params=["llama", "gpt2", "granite"])
def model(request):
    return wb.load(build(request.param), tokenizer=tokenizer())


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: type(c).__name__)
def test_open_is_no_gate_closed_is_no_intervention_and_rows_decide_alone(model, change):
    base, full = model.logits(PROMPTS), model.logits(PROMPTS, change)
    assert not torch.equal(base, full)
    assert torch.equal(model.logits(PROMPTS, change.gated(OPEN)), full)
    assert torch.equal(model.logits(PROMPTS, change.gated(~OPEN)), base)
    gate, is_open = half(model)
    assert is_open.sum() == 2
    wanted = torch.where(is_open[:, None], full, base)
    assert torch.allclose(model.logits(PROMPTS, change.gated(gate)), wanted, atol=1e-4)
    assert torch.allclose(
        model.logits(PROMPTS, change.gated(~gate)), torch.where(is_open[:, None], base, full), atol=1e-4
    )


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("phase", ["both", "generation"])
def test_the_answer_holds_for_all_generated_tokens(model, phase, cached):
    push, settings = wb.Add("resid_post.1", 4 * V, phase=phase), {"max_new_tokens": 6, "use_cache": cached}
    gate, is_open = half(model)
    base, full = model.generate(PROMPTS, **settings), model.generate(PROMPTS, push, **settings)
    assert all(one != other for one, other in zip(base, full, strict=True))
    wanted = [f if o else b for b, f, o in zip(base, full, is_open, strict=True)]
    assert model.generate(PROMPTS, push.gated(gate), **settings) == wanted
    assert model.generate(PROMPTS, push.gated(OPEN), **settings) == full
    assert model.generate(PROMPTS, push.gated(~OPEN), **settings) == base
    alone = [model.generate(text, push.gated(gate), **settings) for text in PROMPTS]
    assert alone == wanted


def test_activations_positions_spans_and_cosine(llama):
    push = wb.Add("resid_post.1", V)
    base, full = (llama.activations(PROMPTS, "resid_post.1@-1", *change) for change in ((), (push,)))
    for at, spans, read in (("resid_mid.0@1", None, lambda x: x[1]), ("mlp_out.0", None, lambda x: x.mean(0)),
                            ("resid_pre.0@here", [{"here": [1, 2]}] * 4, lambda x: x[1:3].mean(0))):  # fmt: skip
        whole = [llama.activations(text, wb.Component.parse(at).at(None))[0] for text in PROMPTS]
        cosine = torch.stack([torch.nn.functional.cosine_similarity(read(x), V, dim=0) for x in whole])
        for threshold in (cosine[:2, None] + torch.tensor([-1e-4, 1e-4])).flatten().tolist():  # row 0 is padded
            gated = push.gated(wb.Gate(at, V, threshold, by="cosine"))
            seen = llama.activations(PROMPTS, "resid_post.1@-1", gated, spans=spans)
            assert torch.equal(seen, torch.where((cosine > threshold)[:, None], full, base)), at
    gate, x = wb.Gate(AT, [2.0, 0.0], 3.0), torch.tensor([[3.0, 5.0], [2.9, 0.0], [-3.0, 9.0]])
    assert gate.open(x).tolist() == [True, False, False] and (~gate).open(x).tolist() == [False, True, True]
    gate = wb.Gate("mlp_out.0", V)
    x = llama.activations(PROMPTS[0], "mlp_out.0")[0].mean(0)
    assert torch.allclose(gate.reading(x[None]), (x @ V / V.norm())[None], atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(x, V, dim=0)
    assert torch.allclose(replace(gate, by="cosine").reading(x[None]), cosine[None], atol=1e-6)


def test_it_is_read_before_any_change_of_the_same_tensor_and_after_earlier_ones(llama):
    gate, is_open = half(llama)
    last = wb.Add("resid_post.1", V)
    same = wb.Add(AT, 100 * V)
    with_same = llama.activations(PROMPTS, "resid_post.1@-1", same, last.gated(gate))
    ungated, both = (llama.activations(PROMPTS, "resid_post.1@-1", same, *more) for more in ([], [last]))
    assert torch.equal(with_same, torch.where(is_open[:, None], both, ungated))
    earlier = wb.Add("resid_pre.0", 100 * V)  # pushes every row over the threshold
    seen = llama.activations(PROMPTS, "resid_post.1@-1", earlier, last.gated(gate))
    assert torch.equal(seen, llama.activations(PROMPTS, "resid_post.1@-1", earlier, last))


def test_several_gates_neurons_and_features(llama):
    gate, is_open = half(llama)
    neuron = wb.Gate("neuron.0.5@-1", [1.0], float(llama.activations(PROMPTS, "neuron.0.5@-1").median()) + 1e-4)
    fires = neuron.open(llama.activations(PROMPTS, "neuron.0.5@-1")[:, None])
    a, b = wb.Zero("mlp_out.1"), wb.Add("resid_post.1", V)
    seen = llama.logits(PROMPTS, a.gated(gate), b.gated(neuron))
    for row, text in enumerate(PROMPTS):
        acting = [one for one, on in ((a, is_open[row]), (b, fires[row])) if on]
        assert torch.allclose(seen[row], llama.logits(text, *acting)[0], atol=1e-4)
    try:
        llama.attach(make("resid_post.1"), "d")
        clamp = wb.Clamp("feature.d.3", 5.0)
        base, full = llama.logits(PROMPTS), llama.logits(PROMPTS, clamp)
        assert torch.equal(llama.logits(PROMPTS, clamp.gated(OPEN)), full)
        assert torch.equal(llama.logits(PROMPTS, clamp.gated(~OPEN)), base)
        with pytest.raises(ValueError, match=r"resid_post\.2@-1 is read after resid_post\.1"):
            llama.logits(PROMPTS, clamp.gated(wb.Gate("resid_post.2@-1", V)))
    finally:
        llama.detach("d")


def test_a_later_gate_can_decide_about_generated_tokens_only(llama):
    late = wb.Gate("resid_post.2@-1", V, -1e6)
    with pytest.raises(ValueError, match=r"resid_post\.2@-1 is read after resid_post\.1 has gone by"):
        wb.Add("resid_post.1", V, gate=late)
    with pytest.raises(ValueError, match="read after"):
        wb.Add("resid_pre.*", V).gated(OPEN)
    heads = wb.Zero("z.*.*")  # whose first layer comes after what it begins with
    assert torch.equal(
        llama.logits(PROMPTS, heads.gated(wb.Gate("resid_pre.0@-1", V, -1e6))), llama.logits(PROMPTS, heads)
    )
    push = wb.Add("resid_post.1", 4 * V, phase="generation")
    assert llama.generate(PROMPTS, push.gated(late)) == llama.generate(PROMPTS, push) != llama.generate(PROMPTS)
    from workbench.model import Prompts

    text = Prompts([llama.ids("w10 w11 w4 w9 w8")], [3])  # two tokens count as generated, in the same pass
    with pytest.raises(ValueError, match="in this pass"):
        llama.logits(text, push.gated(late))


def test_recipes_keep_gates_and_controls_respect_them(llama, tmp_path):
    gate, _ = half(llama)
    recipe = wb.Recipe([wb.Add("resid_post.1", V, gate=gate), wb.Zero("z.1.2", gate=~gate), wb.Zero("z.0.0")])
    back = wb.Recipe.load(recipe.save(tmp_path / "r"))
    assert list(back) == list(recipe) and back.interventions[0].gate is None and sorted(
        one.gate.side for one in back if one.gate) == ["above", "below"]  # fmt: skip
    assert torch.equal(llama.logits(PROMPTS, back), llama.logits(PROMPTS, recipe))
    assert wb.Add("resid_post.1", V) != wb.Add("resid_post.1", V, gate=gate) != wb.Add("resid_post.1", V, gate=~gate)
    assert "gate=Gate('resid_post.0@-1'" in repr(wb.Zero("z.1.2", gate=gate)) and "gate" not in repr(wb.Zero("z.1.2"))
    assert (2 * wb.Add("resid_post.1", V, gate=gate)).gate == gate
    from workbench.improve.controls import random_controls

    rows = [{"clean": "w10 w11 w4", "corrupted": "w10 w11 w5", "answer": "w6", "foil": "w7"}]
    made = random_controls(llama, wb.Recipe([wb.Zero("z.1.2", gate=gate)]), wb.Task(rows), 3, 8, 0)
    assert len(made) == 1 and all(one.gate == gate for recipe in made.values() for one in recipe)


def test_leaving_the_machine_takes_gates_along(llama):
    push = wb.Add("resid_post.1", 4 * V, gate=half(llama)[0])
    here, said = llama.logits(PROMPTS, push), llama.generate(PROMPTS, push)
    llama.remote = "local"
    try:
        assert torch.allclose(llama.logits(PROMPTS, push), here, atol=1e-5)
        assert llama.generate(PROMPTS, push) == said
    finally:
        llama.remote = None


def test_refusals(llama):
    for bad, match in ((("z.*.*@-1", V), "one component"), (("pattern.0.1@-1", V), "of kind"), ((AT, 0 * V), "not zero"),
                       ((AT, V, float("inf")), "finite"), ((AT, V, 0, "beside"), "'above' or 'below'"),
                       ((AT, V, 0, "above", "length"), "'dot' or 'cosine'")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            wb.Gate(*bad)
    with pytest.raises(TypeError, match=r"wb\.Gate"):
        wb.Zero("z.1.2", gate="resid_post.0@-1")
    with pytest.raises(ValueError, match="no gate"):
        wb.Delta(weights={"w": V}, gate=OPEN)
    with pytest.raises(ValueError, match="8 wide, but resid_post"):
        llama.logits(PROMPTS, wb.Zero("z.1.2", gate=wb.Gate(AT, HEAD)))
    with pytest.raises(ValueError, match="out of range"):
        llama.logits(PROMPTS, wb.Zero("z.1.2", gate=wb.Gate("resid_post.0@9", V)))
