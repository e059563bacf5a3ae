"""Vocabulary projection: identities on every architecture, planted truth, nulls, refusals."""

import copy

import numpy as np
import pytest
import torch
from tiny import build, copying, tokenizer

import workbench as wb
from workbench.component import Component
from workbench.locate.vocabulary import (
    BackwardLens,
    Lens,
    NeuronVocabulary,
    TunedLens,
    backward_lens,
    copying_scores,
    logit_attribution,
    logit_lens,
    neuron_vocabulary,
    ov_circuit,
    patchscope,
    qk_circuit,
    tuned_lens,
)
from workbench.locate.vocabulary.backward import outer_products
from workbench.locate.vocabulary.readout import Readout, freeze, gain_of, run
from workbench.model.plan import Prompts


def pairs(n=8, seed=0):
    rng, rows = np.random.default_rng(seed), []
    for _ in range(n):
        words = rng.integers(10, 64, 6).tolist()
        clean, corrupted = (" ".join(f"w{i}" for i in [*words[:2], cause, *words[3:]]) for cause in (5, 6))
        answer, foil = rng.choice(np.arange(10, 64), 2, replace=False)
        rows.append({"clean": clean, "corrupted": corrupted, "answer": f"w{answer}", "foil": f"w{foil}"})
    return wb.Task(rows, "random words")


def planted(name):
    folder = f"{wb.task.DATA}/planted/{name}"
    return wb.load(folder), wb.Task.load(f"{folder}/task.jsonl")[:40]


def uncapped(model, logits):
    cap = Readout(model).cap
    return torch.atanh(logits.double() / cap) * cap if cap else logits.double()


# the logit lens


def test_the_last_lens_is_the_model(tiny, words):
    prompts = words(7, 4)
    last, readout = Component("resid_post", tiny.names.n_layers - 1), Readout(tiny)
    for _, seen, logits in run(tiny, tiny._prompts(prompts), [last]):
        with torch.no_grad():
            assert torch.equal(readout(seen[last]), logits)  # bit for bit, softcaps and scaling included
    lens = logit_lens(tiny, prompts, k=3)
    assert (lens.kl[-1][~np.isnan(lens.kl[-1])] == 0).all() and (lens.rank[-1, :, -1] == 1).all()
    whole = tiny.logits(prompts, positions="all")
    for i, logits in enumerate(whole):
        said = lens.top_prob[-1, i, lens.prob.shape[2] - len(logits) :, 0]
        assert np.allclose(said, logits.softmax(-1).max(-1).values, atol=1e-6)


def test_a_short_prompt_reads_the_same_beside_a_long_one(llama, words):
    long, short = words(9, 5)
    both, alone = logit_lens(llama, [long, short], answers=["w10", "w11"]), logit_lens(llama, short, answers="w11")
    assert np.isnan(both.prob[:, 1, :4]).all() and np.allclose(both.kl[:, 1, 4:], alone.kl[:, 0], atol=1e-5)
    assert np.allclose(both.prob[:, 1, 4:], alone.prob[:, 0], atol=1e-6) and both.answers == ["w10", "w11"]
    assert len(both.frame) == (9 + 5) * 4 and (both.entropy[~np.isnan(both.entropy)] >= 0).all()
    direct = llama.activations(short, "resid_post.1")
    with torch.no_grad():
        said = Readout(llama)(direct).softmax(-1)[0, -1]
    assert alone.prob[2, 0, -1] == pytest.approx(said[llama.ids("w11")[-1]].item(), abs=1e-6)
    assert alone.said("resid_post.1")[0][1] == pytest.approx(said.max().item(), abs=1e-6)


def test_the_lens_with_interventions_saved_and_drawn(llama, words, tmp_path):
    off, prompts = wb.Zero("mlp_out.2"), words(6, 6)
    plain, changed = logit_lens(llama, prompts), logit_lens(llama, prompts, off)
    assert np.allclose(plain.top_prob[:3], changed.top_prob[:3]) and not np.allclose(
        plain.top_prob[3], changed.top_prob[3]
    )
    assert (changed.kl[-1] == 0).all()
    again = Lens.load(plain.save(tmp_path))
    assert repr(again) == repr(plain) and again.frame.equals(plain.frame)
    assert plain.plot().axes and plain.plot(1, "kl").axes and len(plain.by_layer()) == 4
    assert list(logit_lens(llama, prompts, at="resid_mid.*").components) == [
        Component("resid_mid", i) for i in range(3)
    ]


def test_what_a_lens_refuses(llama, words):
    prompts = words(5, 5)
    for settings, said in [({"at": "z.0.0"}, "no stream"), ({"at": "resid_post.1@-1"}, "position out"),
                           ({"answers": ["w5"]}, "2 prompts, but 1 answers"), ({"answers": "w5 w6"}, "no single token")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            logit_lens(llama, prompts, **settings)
    with pytest.raises(ValueError, match="value='size'"):
        logit_lens(llama, prompts).plot(value="size")
    odd = wb.load(build("llama"), tokenizer=tokenizer())
    odd.hf.config.logits_scaling = 3.0  # says something of the model that is not so
    with pytest.raises(ValueError, match="do not give this architecture's own logits"):
        logit_lens(odd, prompts)


# direct logit attribution


def test_contributions_sum_to_the_logit_difference(tiny):
    task, names = pairs(), tiny.names
    prompts = task.on(tiny)
    logits = uncapped(tiny, tiny.logits(prompts.clean))
    rows = torch.arange(len(task))
    wanted = (logits[rows, prompts.answer] - logits[rows, prompts.foil]).numpy()
    readout = Readout(tiny)
    at = ["resid_pre.0", "z.*.*", "mlp_out.*" if "neuron" in names.refused else "neuron.*.*"]
    blocks = logit_attribution(tiny, task, ["resid_pre.0", "attn_out.*", "mlp_out.*"], null=False)
    parts = logit_attribution(tiny, task, at, null=False)
    for scores in (blocks, parts):
        assert np.abs(scores.per_prompt.sum(0) - wanted).max() < 1e-4 and scores.clean == pytest.approx(
            wanted.mean(), abs=1e-4
        )
    # nothing is swept into the rest: with all blocks asked for, it is the final norm's and the unembedding's bias
    _, bias, _ = gain_of(readout.norm, names.d_model)
    direction = readout.rows(prompts.answer) - readout.rows(prompts.foil)
    known = (direction @ bias + readout.bias(prompts.answer) - readout.bias(prompts.foil)).numpy()
    assert np.abs(blocks.per_prompt[-1] - known).max() < 1e-4
    # heads and neurons add up to their blocks, but for biases
    if tiny.hf.config.model_type not in ("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom"):
        for layer in range(names.n_layers):
            for kind, whole in (("z", "attn_out"), ("neuron", "mlp_out")):
                own = [i for i, one in enumerate(parts.components) if (one.kind, one.layer) == (kind, layer)]
                if own:
                    block = blocks.components.index(Component(whole, layer))
                    assert np.abs(parts.per_prompt[own].sum(0) - blocks.per_prompt[block]).max() < 1e-4


def test_a_contribution_is_what_the_difference_loses_at_the_same_scale(llama):
    task = pairs()
    prompts, readout = task.on(llama), Readout(llama)
    part, x = llama.activations(prompts.clean, "mlp_out.1@-1"), llama.activations(prompts.clean, "resid_post.2@-1")
    norm = freeze(readout.norm, x)
    direction = readout.rows(prompts.answer) - readout.rows(prompts.foil)
    lost = (part.double() * norm.gain * norm.scale[:, None] * direction).sum(1)
    scores = logit_attribution(llama, task, "mlp_out.1", null=False)
    assert np.allclose(scores.per_prompt[0], lost, atol=1e-5)
    both = logit_attribution(llama, task, "mlp_out.1", prompt="difference", null=False)
    other = logit_attribution(llama, task, "mlp_out.1", prompt="corrupted", null=False)
    assert np.allclose(both.per_prompt, scores.per_prompt - other.per_prompt, atol=1e-9)


@pytest.mark.parametrize("name, head, indirect", [("induction", "z.1.2", "z.0.1"), ("inhibition", "z.2.2", "z.1.1")])
def test_the_planted_head_writes_the_answer_and_earlier_ones_do_not(name, head, indirect):
    model, task = planted(name)
    scores = logit_attribution(model, task)
    assert str(scores.top(1)[0]) == head and Component.parse(head) in scores.above_null()
    assert scores[head] > 0.9 * scores.clean and abs(scores[indirect]) < 0.01 * scores.clean
    copying = copying_scores(model)
    assert copying[head] > 0.95 and copying.top(1)[0] == Component.parse(head)
    if name == "induction":  # the other vocabulary is too small for a null below 1
        assert copying.above_null() == [Component.parse(head)]


def test_the_planted_neurons_write_the_capitals():
    model, task = planted("lookup")
    top = logit_attribution(model, task, "neuron.*.*", null=False).top(4)
    words = neuron_vocabulary(model, top, k=1)
    capitals = {row["answer"] for row in task}
    assert all(words.words["promotes"][i][0][0] in capitals for i in range(4))
    assert all(words.words["promotes"][i][0][1] > words.null_p95["promotes"][i] for i in range(4))


def test_attribution_nulls_repeat_and_leave_the_weights_alone(llama):
    before = {k: v.clone() for k, v in llama.hf.state_dict().items()}
    one, two = (logit_attribution(llama, pairs(12), seed=3) for _ in range(2))
    assert np.array_equal(one.null_p95, two.null_p95) and np.array_equal(one.values, two.values)
    assert (one.null_p95 == np.fmax(one.columns["null_tokens"], one.columns["null_swapped"])).all() and one.cost == 1
    assert all(torch.equal(v, before[k]) for k, v in llama.hf.state_dict().items())
    shares = [
        len(s.above_null()) / len(s.components) for s in (logit_attribution(llama, pairs(16, i)) for i in range(8))
    ]
    assert np.mean(shares) < 0.1  # answers drawn at random: nothing to find
    single = logit_attribution(llama, pairs(1))
    assert np.isnan(single.ci_lo).all() and (single.null_p95 > 0).all() and "One prompt" in single.why


def test_rows_of_one_entity_are_one_observation(trained):
    once, again = (logit_attribution(trained, wb.Task(rows), null=False) for rows in (copying(6), copying(6) * 4))
    assert np.allclose([once.ci_lo, once.ci_hi], [again.ci_lo, again.ci_hi], atol=1e-3)
    assert (once.ci_hi - once.ci_lo).max() > 0.1


@pytest.mark.parametrize("at, said", [("resid_post.1", "no part of the sum"), ("resid_pre.*", "no part of the sum"),
                                      (["z.1.0", "attn_out.1"], "would count twice"), ("z.0.0@2", "only the last position"),
                                      (["embed", "resid_pre.0"], "would count twice"), ("z.0.9", "head 9")])  # fmt: skip
def test_what_attribution_refuses(llama, at, said):
    with pytest.raises(ValueError, match=said):
        logit_attribution(llama, pairs(), at)


def test_the_embedding_is_refused_where_positions_are_added_to_it(llama):
    assert np.allclose(logit_attribution(llama, pairs(), "embed", null=False).values,
                       logit_attribution(llama, pairs(), "resid_pre.0", null=False).values)  # fmt: skip
    gpt2 = wb.load(build("gpt2"), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="write resid_pre"):
        logit_attribution(gpt2, pairs(), "embed")
    with pytest.raises(ValueError, match="prompt='both'"):
        logit_attribution(llama, pairs(), prompt="both")


# the tuned lens


def test_a_tuned_lens_is_never_worse_and_is_saved(course, tmp_path):
    tuned = tuned_lens(course, "background", steps=20, tokens=1500, progress=False)
    assert (tuned.tuned_kl <= tuned.logit_kl + 0.001).all() and tuned.tuned_kl.mean() < 0.9 * tuned.logit_kl.mean()
    again = TunedLens.load(tuned.save(tmp_path))
    assert torch.equal(again.A, tuned.A) and again.frame.equals(tuned.frame) and again.plot().axes
    prompts = wb.Task.load("capital").split("test")[:8]
    plain, through = logit_lens(course, prompts), logit_lens(course, prompts, tuned=again)
    assert through.name == "tuned lens" and np.array_equal(plain.kl[-1], through.kl[-1], equal_nan=True)
    assert not np.allclose(plain.prob[2], through.prob[2])
    other = wb.load(build("llama"), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="was trained on model"):
        logit_lens(other, "w5 w6", tuned=again)
    with pytest.raises(FileNotFoundError, match="holds no tuned_lens"):
        TunedLens.load(tmp_path / "nowhere")


def test_an_untrained_translator_is_the_logit_lens(llama, words):
    texts = words(*[8] * 40)
    tuned = tuned_lens(llama, texts, steps=1, lr=0.0, progress=False)
    assert (tuned.A == 0).all() and np.allclose(tuned.tuned_kl, tuned.logit_kl) and set(tuned.steps) <= {0, 1}
    plain, through = logit_lens(llama, texts[:3]), logit_lens(llama, texts[:3], tuned=tuned)
    assert np.array_equal(plain.prob, through.prob, equal_nan=True)
    wild = tuned_lens(llama, texts, steps=2, lr=5.0, progress=False)  # makes things worse: then the logit lens stays
    assert (wild.A == 0).all() and wild.steps == [0, 0, 0] and np.allclose(wild.tuned_kl, wild.logit_kl)
    for few, said in ((texts[:3], "at least 10 texts"), (["nonsense"] * 20, "got 0 of")):
        with pytest.raises(ValueError, match=said):
            tuned_lens(llama, few)
    with pytest.raises(ValueError, match="no translator"):
        tuned.translate("resid_mid.0", torch.zeros(1, 32))


# heads


def regained(name, norm):
    """A tiny model whose norms of this name have random gains."""
    model = wb.load(build(name), tokenizer=tokenizer())
    with torch.no_grad():
        for key, parameter in model.hf.named_parameters():
            if f"{norm}.weight" in key and name != "llama":
                parameter.normal_(std=3.0, generator=torch.Generator().manual_seed(1))
    return model


def test_the_copying_score_is_that_of_the_whole_table(llama):
    head = "z.1.2"
    found = ov_circuit(llama, head, embedding="W_E", draws=5)
    block = llama.hf.model.layers[1]
    with torch.no_grad():
        tokens = block.input_layernorm(llama.weight("W_E"))
        out = llama.weight("W_U") * llama.hf.model.norm.weight[:, None]
        table = tokens @ llama.weight("W_V", 1, 2) @ llama.weight("W_O", 1, 2) @ (out - out.mean(1, keepdim=True))
    eigenvalues = torch.linalg.eigvals(table.double()).numpy()
    assert found.score == pytest.approx(eigenvalues.real.sum() / np.abs(eigenvalues).sum(), abs=1e-4)
    assert found.eigenvalues.real.sum() == pytest.approx(table.trace().item(), rel=1e-3)
    assert [word for word, _ in found.most[20]] == [llama.token(i) for i in table[20].topk(5).indices]
    assert found.own_rank[20] == 1 + (table[20] > table[20, 20]).sum() and len(found.singular) == 3
    assert len(ov_circuit(llama, "L1H2", tokens=["w5", 7], draws=5).frame) == 2 and found.plot().axes


def test_the_qk_circuit_is_what_attention_computes_at_distance_0(llama):
    found = qk_circuit(llama, "z.0.1", tokens=["w20"], k=3, draws=5, embedding="W_E")
    own = {}
    for token in ("w20", "w30"):
        for kind in ("q", "k"):
            own[token, kind] = llama.activations(token, f"{kind}.0.{1 if kind == 'q' else 0}@0")[0]
    keys = torch.stack([llama.activations(f"w{i}", "k.0.0@0")[0] for i in range(4, 64)])
    scores = keys @ own["w20", "q"] / llama.names.d_head**0.5
    wanted = [f"w{i + 4}" for i in scores.topk(3).indices.tolist()]
    seen = [word for word, _ in found.most[0] if word.startswith("w")]
    assert seen == wanted[: len(seen)] and seen
    gap = found.most[0][0][1] - found.least[0][0][1]
    assert gap >= (scores.max() - scores.min()).item() - 1e-4
    with torch.no_grad():
        tokens = llama.hf.model.layers[0].input_layernorm(llama.weight("W_E"))
    seen = tokens @ llama.weight("W_K", 0, 1)
    table = tokens @ llama.weight("W_Q", 0, 1) @ (seen - seen.mean(0)).T  # no softmax sees what all keys share
    eigenvalues = torch.linalg.eigvals(table.double()).numpy()
    assert found.score == pytest.approx(eigenvalues.real.sum() / np.abs(eigenvalues).sum(), abs=1e-4)
    with pytest.raises(ValueError, match="normalises queries and keys"):
        qk_circuit(wb.load(build("qwen3"), tokenizer=tokenizer()), "z.0.1")


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "llama"])
def test_what_a_singular_direction_writes_has_passed_the_norm_behind_the_block(name):
    model = regained(name, "post_attention_layernorm")
    found = ov_circuit(model, "z.1.2", draws=2)
    _, size, v = torch.linalg.svd(model.weight("W_V", 1, 2) @ model.weight("W_O", 1, 2))
    block = model.hf.model.layers[1]
    written = v[:1] if name == "llama" else block.post_attention_layernorm(v[:1]).detach()
    logits = (written @ Readout(model).matrix())[0]
    sides = [{model.token(i) for i in (sign * logits).topk(5).indices} for sign in (1, -1)]
    assert found.directions[0][0] == pytest.approx(float(size[0]), rel=1e-3)
    assert {frozenset(found.directions[0][2]), frozenset(found.directions[0][4])} == set(map(frozenset, sides))


def test_heads_read_tokens_through_the_bias_of_their_norm():
    model = wb.load(build("gpt2"), tokenizer=tokenizer())
    norm, attention = model.hf.transformer.h[0].ln_1, model.hf.transformer.h[0].attn.c_attn
    with torch.no_grad():
        norm.bias.normal_(std=2.0, generator=torch.Generator().manual_seed(1))
        x = norm(model.weight("W_E")) @ attention.weight
    q, k, v = (part[:, 8:16] for part in x.split(32, -1))
    scores = q @ (k - k.mean(0)).T / 8**0.5
    found = qk_circuit(model, "z.0.1", draws=2, embedding="W_E")
    assert [line[0][0] for line in found.most] == [model.token(i) for i in scores.argmax(1)]
    assert [line[0][1] for line in found.most] == pytest.approx(scores.amax(1).tolist(), rel=1e-3)
    written = v @ model.weight("W_O", 0, 1) @ Readout(model).matrix()
    found = ov_circuit(model, "z.0.1", draws=2, embedding="W_E")
    assert [line[0][0] for line in found.most] == [model.token(i) for i in written.argmax(1)]


def test_heads_of_every_architecture_have_a_copying_score(tiny):
    scores = copying_scores(tiny, draws=20)
    assert len(scores.components) == 12 and (np.abs(scores.values) <= 1).all() and (scores.null_p95 > 0).all()
    matching = np.isnan(scores.columns["matching"])
    assert matching.all() if tiny.hf.config.model_type in ("qwen3", "gemma3_text", "olmo2") else not matching.any()
    again = copying_scores(tiny, draws=20)
    assert np.array_equal(scores.null_p95, again.null_p95)


def test_induction_heads_copy_the_tokens_they_find(course):
    induction = wb.locate.magnitude.pattern_scores(course, "induction")
    heads = [one for one in induction.top(5) if induction[one] > 0.5]
    found, bare = copying_scores(course, draws=5), copying_scores(course, draws=5, embedding="W_E")
    assert np.median([found[one] for one in heads]) > 0.5
    assert np.median([found[one] for one in heads]) > np.median([bare[one] for one in heads]) + 0.3


def test_what_head_circuits_refuse(llama):
    for head, said in (
        ("z.*.*", "several heads"),
        ("neuron.1.2", "no head"),
        ("z.7.0", "layer 7"),
        ("z.1.0@2", "no head"),
    ):
        with pytest.raises(ValueError, match=said):
            ov_circuit(llama, head)
    with pytest.raises(ValueError, match="no single token"):
        ov_circuit(llama, "z.1.0", tokens=["w5 w6"])
    with pytest.raises(ValueError, match="embedding='mean'"):
        copying_scores(llama, embedding="mean")


# neurons and gradients


def test_a_planted_neuron_says_what_it_was_given(tmp_path):
    model = wb.load(build("llama"), tokenizer=tokenizer())
    mlp = model.hf.model.layers[1].mlp
    found = model.activations("w20", "resid_mid.1@-1")[0]
    with torch.no_grad():
        key = model.hf.model.layers[1].post_attention_layernorm(found)
        mlp.gate_proj.weight[7], mlp.up_proj.weight[7] = key, key
        mlp.down_proj.weight[:, 7] = model.weight("W_U")[:, 33] * 10
    model.tokenizer.bos_token = None  # tokens then stand alone, as the key was read
    words = neuron_vocabulary(model, "neuron.1.*", k=3)
    side = {name: words.words[name][7] for name in words.sides}
    assert side["promotes"][0][0] == "w33" and side["opens"][0][0] == "w20" and side["fires"][0][0] == "w20"
    assert side["promotes"][0][1] > words.null_p95["promotes"][7]
    beyond = [line[0][1] for line in words.words["promotes"]] > words.null_p95["promotes"]
    assert beyond.mean() < 0.2  # the other 47 neurons are random
    assert NeuronVocabulary.load(words.save(tmp_path / "n.json")).frame.equals(words.frame) and words.plot().axes
    with pytest.raises(ValueError, match="no neuron"):
        neuron_vocabulary(model, "z.1.0")


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "gemma2", "phi3"])
def test_outer_products_are_the_gradient_of_the_weights(name, words):
    model = wb.load(build(name), tokenizer=tokenizer())
    prompts = model._prompts(words(5, 7))
    answer = torch.tensor([11, 12])
    other = copy.deepcopy(model.hf)
    for parameter in other.parameters():
        parameter.requires_grad_(True)
    logits = other(**model.inputs(prompts)).logits[:, -1]
    logits.log_softmax(-1).gather(1, answer[:, None]).sum().backward()
    twin = wb.load(other, tokenizer=tokenizer())  # for its weights' names only
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
    for weight in ("W_out", "W_in", *(["W_gate"] if name in ("llama", "gemma2", "phi3") else [])):
        for layer, (before, after) in enumerate(outer_products(model, prompts, answer, weight)):
            mine = torch.einsum("rpi,rpo->io", before, after)
            true = twin.weight(weight, layer)
            assert torch.allclose(mine, true, atol=1e-4 * true.abs().max().item() + 1e-8), (weight, layer)


def test_the_backward_lens_in_words(llama, words):
    lens = backward_lens(llama, words(6, 4), answers=["w30", "w31"])
    assert isinstance(lens, BackwardLens) and np.isnan(lens.size[:, 1, :2]).all()
    # at the last layer and position δ is W_U[answer] minus the mean over what was predicted, but for the norm
    assert (lens.rank[-1, :, -1] == 1).all() and (lens.size[-1, :, :-1][~np.isnan(lens.size[-1, :, :-1])] < 1e-6).all()
    assert len(lens.frame) == 30 and lens.plot().axes and lens.by_layer().share.sum() < 1 + 1e-6
    with pytest.raises(ValueError, match="weight='W_Q'"):
        backward_lens(llama, "w5 w6", weight="W_Q")
    with pytest.raises(ValueError, match="no gate"):
        backward_lens(wb.load(build("gpt2"), tokenizer=tokenizer()), "w5 w6", weight="W_gate")


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "llama"])
def test_the_words_of_a_gradient_are_those_that_a_step_adds_to_the_stream(name, words):
    """A step of W_out along the gradient, and what it changes at mlp_out, behind the norm where there is one."""
    model, answer = regained(name, "post_feedforward_layernorm"), torch.tensor([9])
    prompt = words(6)
    ((before, after),) = outer_products(model, model._prompts(prompt), answer, "W_out")[1:2]
    linear, base = model.hf.model.layers[1].mlp.down_proj, model.activations(prompt, "mlp_out.1@-1")
    old = linear.weight.detach().clone()
    with torch.no_grad():
        linear.weight.add_(1e-3 * after[0, -1][:, None] @ before[0, -1][None])
        added = model.activations(prompt, "mlp_out.1@-1") - base
        linear.weight.copy_(old)
    lens = backward_lens(model, prompt, answers=[9])
    logits = (added @ Readout(model).matrix())[0]
    assert len(set(lens.up[1, 0, -1].tolist()) & set(logits.topk(8).indices.tolist())) >= 4
    assert len(set(lens.down[1, 0, -1].tolist()) & set((-logits).topk(8).indices.tolist())) >= 4


# patchscope


def test_a_patchscope_at_the_ends_is_the_run_itself(llama, words):
    prompts = words(6, 6, 6)
    end = patchscope(llama, prompts, "resid_post.2@-1", target="w5 w6 {}")
    assert (end.rank == 1).all() and np.allclose(
        end.prob[0], llama.logits(prompts).softmax(-1).max(-1).values.numpy(), atol=1e-6
    )
    start = patchscope(llama, prompts, "resid_pre.0@2", target="w5 {} w6")
    whole = [f"w5 {prompt.split()[2]} w6" for prompt in prompts]
    assert np.allclose(start.top_prob[0], llama.logits(whole).softmax(-1).topk(5).values, atol=1e-6)
    assert start.tokens[0] == [prompt.split()[2] for prompt in prompts] and start.plot().axes
    into = patchscope(llama, prompts, "resid_post.*@-1", target="w5 {} w6", into="resid_pre.1")
    assert into.into == "resid_pre.1"
    assert len(into.frame) == 9 and np.allclose(into.prob[0], patchscope(
        llama, prompts, "resid_post.0@-1", target="w5 {} w6").prob[0], atol=1e-6)  # fmt: skip


def test_a_state_read_through_words_is_a_mixture_of_their_embeddings(llama, words):
    prompts, some = words(6, 6, 6), ["w7", "w8", "w9"]
    ids = torch.tensor([int(llama.ids(word)[-1]) for word in some])
    one = patchscope(llama, prompts, "resid_post.2@-1", target="w5 {} w6", into="embed", through=["w7"])
    assert np.allclose(one.top_prob[0], llama.logits(["w5 w7 w6"]).softmax(-1).topk(5).values, atol=1e-6)
    several = patchscope(llama, prompts, "resid_post.2@-1", target="w5 {}", into="embed", through=some)
    shares = llama.logits(prompts)[:, ids].softmax(-1)  # the last stream says what the model says
    mixed = shares @ llama.hf.get_input_embeddings().weight.detach()[ids]
    for row in range(3):
        found = llama.logits(["w5 w5"], wb.Replace("embed@-1", mixed[row])).softmax(-1).topk(5).values
        assert np.allclose(several.top_prob[0, row], found[0], atol=1e-5)
    by_default = patchscope(llama, prompts, "resid_post.2@-1", target="w5 {} w6", through="w7")
    assert by_default.into == "embed" and np.array_equal(by_default.prob, one.prob)
    with pytest.raises(ValueError, match="no word to read the state by"):
        patchscope(llama, prompts, "resid_post.2@-1", through=[])
    with pytest.raises(ValueError, match="through: 'zzz' is not one token"):
        patchscope(llama, prompts, "resid_post.2@-1", target="w5 {}", into="embed", through=["zzz"])


def test_the_induction_prompt_reads_a_word_back(course):
    task = wb.Task.load("induction").split("test")[:20]
    found = patchscope(course, task, "resid_pre.0@-1")
    assert found.repeats > 0.8 and found.by_layer().own_first[0] > 0.8 and found.by_layer().other_first[0] < 0.2


def test_what_a_patchscope_refuses(llama, words):
    prompts = words(5, 5)
    for settings, said in [({"at": "resid_post.1"}, "name a position, such as resid_post.1@-1"), ({"at": "z.1.0@-1"}, "no stream"),
                           ({"target": "w5 w6"}, "must hold {} once"), ({"into": "mlp_out.1"}, "no stream"),
                           ({"into": "resid_pre"}, "several streams; a state goes into one, such as 'resid_pre.0'"),
                           ({"target": "hello {}"}, "Not in this model's vocabulary")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            patchscope(llama, prompts, **settings)


def test_tasks_by_name_and_ids_as_prompts(course):
    lens = logit_lens(course, wb.Task.load("capital")[:5])
    assert lens.task == "capital" and lens.given
    ids = Prompts([course.ids("the capital of kenya is")])
    assert logit_lens(course, ids, answers=[int(course.ids("nairobi")[-1])]).answers == ["nairobi"]
    with pytest.raises(ValueError, match="need their answers as ids"):
        logit_lens(course, [course.ids("the capital of kenya is")], answers="nairobi")
