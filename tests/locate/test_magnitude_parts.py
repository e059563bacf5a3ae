"""Magnitude of heads, weights, blocks and outliers: by hand, on written circuits, on planted outliers."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binom
from test_magnitude import labelled, model_of, random_texts
from tiny import MIXTURES, build, copying, tokenizer

import workbench as wb
from workbench.locate import magnitude
from workbench.locate.magnitude.heads import _fresh, _repeated
from workbench.task import DATA

# heads


@pytest.fixture(scope="module")
def induction():
    folder = DATA / "planted" / "induction"
    return wb.load(folder), wb.Task.load(folder / "task.jsonl"), json.loads((folder / "circuit.json").read_text())


def test_written_heads_are_found(induction):
    model, task, about = induction
    for pattern, head in (("previous", "z.0.1"), ("induction", "z.1.2")):
        for given in (None, task):
            scores = magnitude.pattern_scores(model, pattern, given)
            assert str(scores.top(1)[0]) == head and scores[head] > 0.95 and scores.values.max() <= 1 + 1e-6
            assert scores.above_null()[0] == scores.top(1)[0]
            if pattern == "previous":  # whichever other key is drawn, it gets no more than what is left
                assert scores.null_p95[scores._index(head)] <= 1 - scores[head] + 1e-6
    assert set(about["heads"]) == {"z.0.1", "z.1.2"}
    folder = DATA / "planted" / "inhibition"
    model = wb.load(folder)
    scores = magnitude.pattern_scores(model, "duplicate", wb.Task.load(folder / "task.jsonl"))
    assert str(scores.top(1)[0]) == "z.0.0"


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "gemma3_text"])
def test_pattern_scores_equal_attention_by_hand(architecture):
    model = model_of(architecture)
    texts = ["w10 w11 w12 w10 w11 w12 w10", "w20 w21 w22 w20 w24"]
    seen, entropy = {"previous": [], "duplicate": [], "induction": [], "first": []}, []
    for text in texts:
        ids = model.ids(text).tolist()
        pattern = model.activations([text], "pattern.1.2")[0]
        queries = range(2, len(ids))
        entropy.append(float(torch.special.entr(pattern[2:]).sum(-1).mean()))
        keys = {
            "previous": {q: [q - 1] for q in queries},
            "duplicate": {q: [k for k in range(q) if ids[k] == ids[q]] for q in queries},
            "induction": {q: [k + 1 for k in range(q - 1) if ids[k] == ids[q]] for q in queries},
            "first": {q: [0] for q in queries},
        }
        for name, wanted in keys.items():
            seen[name].append(np.mean([float(pattern[q, ks].sum()) for q, ks in wanted.items() if ks]))
    for name, wanted in seen.items():
        scores = magnitude.pattern_scores(model, name, texts)
        i = scores._index("z.1.2")
        np.testing.assert_allclose(scores.per_prompt[i], wanted, rtol=1e-3, atol=1e-6)
        for other, value in (*seen.items(), ("entropy", entropy)):
            assert other == name or scores.columns[other][i] == pytest.approx(np.mean(value), rel=1e-3, abs=1e-6)


def test_random_prompts_repeat_after_a_period_of_their_own(llama):
    for bos in (False, True):
        model, periods = wb.load(llama.hf, tokenizer=llama.tokenizer, bos=bos), set()
        for ids in _repeated(model, 20, 12, 0).ids:
            words = ids[int(bos) :].tolist()
            assert len(words) == 24 and (ids[0] == model.tokenizer.bos_token_id) == bos
            period = len(set(words))
            periods.add(period)
            assert words == (words[:period] * 3)[:24], "nothing repeats but after the period"
        assert (
            periods == {8, 9, 10, 11, 12}
            and len({tuple(ids[-8:].tolist()) for ids in _repeated(model, 20, 12, 0).ids}) == 20
        )
        old = _repeated(model, 2, 12, 0)
        for ids, was in zip(_fresh(model, old, 1).ids, old.ids):
            assert len(set(ids.tolist())) == len(was) and (not bos or ids[0] == was[0])


def test_untrained_heads_show_no_induction():
    for architecture in ("llama", "gpt2", "mistral"):
        scores = magnitude.pattern_scores(model_of(architecture), length=20, prompts=24)
        assert scores.n == 24 and scores.values.max() < 0.5 and scores.cost == 3
    assert magnitude.pattern_scores(model_of("llama"), null=False).cost == 1


def test_induction_heads_of_the_bundled_model_copy(course):
    scores = magnitude.pattern_scores(course)
    heads = scores.top(4)
    assert scores[heads[0]] > 0.6 > scores.null_p95.max()
    task = wb.Task.load("induction").split("test")
    without = task.score(
        course, wb.Zero(at=[one for one in scores.components if scores[one] > 0.3]), metric="accuracy"
    ).mean()
    assert task.score(course, metric="accuracy").mean() > 0.9 and without < 0.5


# weights


def test_wanda_is_weight_times_activation(llama):
    texts = ["w10 w11 w12", "w13 w14 w15 w16 w17"]
    acts = torch.cat([_neurons(llama, text) for text in texts])
    s = llama.hf.model.layers[1].mlp.down_proj.weight.abs() * acts.norm(dim=0)  # [output, input]
    scores = magnitude.wanda(llama, texts, "neuron.1.*")
    np.testing.assert_allclose(scores.values, s.sum(0), rtol=1e-4)
    np.testing.assert_allclose(scores.columns["row_share"], (s / s.sum(1, keepdim=True)).mean(0), rtol=1e-4)
    assert scores.columns["row_share"].sum() == pytest.approx(1) and scores.columns["kept"].mean() == pytest.approx(0.5)
    np.testing.assert_allclose(
        scores.columns["kept"], (s > s.median(1, keepdim=True).values).float().mean(0), rtol=1e-5
    )
    for i, text in enumerate(texts):
        np.testing.assert_allclose(
            magnitude.wanda(llama, [text], "neuron.1.*").values, scores.per_prompt[:, i], rtol=1e-4
        )
    dealt = scores.null_p95 / llama.weight("W_out", 1).abs().sum(1).numpy()  # lengths of any neurons
    assert np.median(dealt) == pytest.approx(np.quantile(acts.norm(dim=0), 0.95), rel=0.1)
    many = magnitude.wanda(llama, labelled(), "neuron.1.*")
    assert ((many.ci_lo < many.values) & (many.values < many.ci_hi)).all()
    z = torch.cat([torch.cat([llama.activations([t], f"z.2.{h}")[0] for h in range(4)], -1) for t in texts])
    s = llama.hf.model.layers[2].self_attn.o_proj.weight.abs() * z.norm(dim=0)
    heads = magnitude.wanda(llama, texts, "z.2.*")
    np.testing.assert_allclose(heads.values, s.sum(0).unflatten(0, (4, -1)).sum(-1), rtol=1e-4)


def _neurons(model, text):
    return torch.stack(list(model.activations([text], "neuron.1.*").values()), -1)[0]


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "olmo2", "opt"])
def test_weight_norms_by_hand(architecture):
    model = model_of(architecture)
    scores = magnitude.weight_norms(model)
    whole = model.weight("W_V", 1, 3) @ model.weight("W_O", 1, 3)
    i, size = scores._index("z.1.3"), torch.linalg.svdvals(whole.double())
    assert scores.values[i] == pytest.approx(whole.norm().item(), rel=1e-4)
    assert scores.columns["spectral"][i] == pytest.approx(size[0].item(), rel=1e-4)
    assert scores.columns["effective_rank"][i] == pytest.approx(
        (size.square().sum() ** 2 / (size**4).sum()).item(), rel=1e-4
    )
    qk = model.weight("W_Q", 1, 3) @ model.weight("W_K", 1, 3).T
    assert scores.columns["qk"][i] == pytest.approx(qk.norm().item(), rel=1e-4)
    others = [model.weight("W_V", 1, 3) @ model.weight("W_O", i // 4, i % 4) for i in range(12) if i != 7]
    reach = np.quantile([other.norm() for other in others], 0.95)
    assert scores.null_p95[i] == pytest.approx(reach, rel=1e-4)
    assert scores.n == 0 and scores.cost == 0 and "data-free" in scores.title and np.isnan(scores.ci_lo).all()
    neurons = magnitude.weight_norms(model, "neuron.2.*")
    key, value = model.weight("W_in", 2).T, model.weight("W_out", 2)
    length, written = key.norm(dim=1), value.norm(dim=1)
    np.testing.assert_allclose(neurons.values, length * written, rtol=1e-4)
    np.testing.assert_allclose(neurons.null_p95, length * np.quantile(written, 0.95), rtol=1e-4)
    np.testing.assert_allclose(neurons.columns["cosine"], torch.cosine_similarity(key, value), atol=1e-5)
    assert np.isnan(neurons.columns["norm_gate"]).all() == (architecture in ("gpt2", "gpt_neox", "opt"))


# layers


def test_block_influence_by_hand(llama):
    texts = ["w10 w11 w12", "w13 w14 w15 w16 w17"]
    scores = magnitude.block_influence(llama, texts)
    for layer in range(3):
        by_hand = []
        for text in texts:
            pre, post = llama.activations([text], [f"resid_pre.{layer}", f"resid_post.{layer}"]).values()
            by_hand.append(1 - torch.cosine_similarity(pre[0], post[0], dim=-1).mean().item())
        np.testing.assert_allclose(scores.per_prompt[layer], by_hand, rtol=1e-3)
    with torch.no_grad():
        idle = wb.load(build("llama"), tokenizer=tokenizer())
        for module in (idle.hf.model.layers[1].mlp.down_proj, idle.hf.model.layers[1].self_attn.o_proj):
            module.weight.zero_()
    scores = magnitude.block_influence(idle, texts)
    assert scores["resid_post.1"] == pytest.approx(0, abs=1e-5) and scores.columns["growth"][1] == pytest.approx(
        1, abs=1e-5
    )


def test_block_influence_null_is_a_random_update(llama):
    scores, generator = magnitude.block_influence(llama, labelled()), torch.Generator().manual_seed(0)
    pre, post = (torch.cat([llama.activations([t], f"{kind}.1")[0] for t in labelled().column("text")])
                 for kind in ("resid_pre", "resid_post"))  # fmt: skip
    side = torch.randn(pre.shape, generator=generator)
    moved = pre + side / side.norm(dim=-1, keepdim=True) * (post - pre).norm(dim=-1, keepdim=True)
    assert scores.null_p95[1] == pytest.approx(1 - torch.cosine_similarity(pre, moved, dim=-1).mean().item(), rel=0.1)


def test_expert_use(llama):
    model = model_of("mixtral")
    texts, picks = random_texts(5), []
    router = model.hf.model.layers[2].mlp.gate
    handle = router.register_forward_hook(lambda module, args, out: picks.append(out[2]))
    for row in texts:
        model.logits(row["text"])
    handle.remove()
    scores = magnitude.expert_use(model, wb.Task(texts))
    for expert in range(4):
        by_hand = [(one == expert).float().mean().item() for one in picks]
        np.testing.assert_allclose(scores.per_prompt[scores._index(f"expert.2.{expert}")], by_hand, atol=1e-6)
    assert scores.values.reshape(3, 4).sum(1) == pytest.approx(1)
    tokens = sum(map(len, picks))
    assert scores.null_p95 == pytest.approx(binom.ppf(0.95, tokens, 2 / 4) / (2 * tokens), abs=1.01 / (2 * tokens))
    off = wb.Zero(scores.top(2))  # what is found can be taken out as it is
    assert not torch.allclose(model.logits(texts[0]["text"], off), model.logits(texts[0]["text"]), atol=1e-3)
    with pytest.raises(ValueError, match="no mixture of experts"):
        magnitude.expert_use(llama, texts and wb.Task(texts))


@pytest.mark.parametrize("name", MIXTURES)
def test_expert_use_is_what_the_experts_are_given(name, monkeypatch):
    """In every family: also where groups of experts choose first, and where experts themselves are not offered."""
    if name == "deepseek_v3":
        monkeypatch.setitem(MIXTURES, name, MIXTURES[name] | {"n_group": 2})
    model, texts = wb.load(build(name), tokenizer=tokenizer()), random_texts(5)
    scores = magnitude.expert_use(model, wb.Task(texts))
    for one in scores.components:
        weights = [model.activations([row["text"]], one)[0] for row in texts]
        by_hand = [(x != 0).float().mean().item() / 2 for x in weights]
        np.testing.assert_allclose(scores.per_prompt[scores._index(one)], by_hand, atol=1e-6)
    model.names.refused["expert"] = "expert: they write something without weight."
    assert np.array_equal(magnitude.expert_use(model, wb.Task(texts)).values, scores.values)


def test_a_contrast_of_experts_compares_their_weights(trained_mixture):
    task = wb.Task(copying(6))
    pairs, chosen = task.on(trained_mixture), magnitude.expert_use(trained_mixture, task)
    scores = magnitude.contrast(trained_mixture, task, "expert.1.*", draws=20)
    often = magnitude.contrast(trained_mixture, task, "expert.1.*", statistic="frequency", draws=20)
    for i, one in enumerate(scores.components):
        for side in ("clean", "corrupted"):
            weights = trained_mixture.activations(getattr(pairs, side), one)
            assert scores.columns[f"mean {side}"][i] == pytest.approx(float(weights.mean()), abs=1e-6)
        assert often.columns["frequency clean"][i] == pytest.approx(2 * chosen[one], abs=1e-6)  # two are chosen
    with pytest.raises(ValueError, match="expert_use"):
        magnitude.contrast(trained_mixture, task, "router.1")


# outliers


def test_none_found_is_an_answer(llama, tmp_path):
    task = wb.Task(random_texts(6, length=12))
    for find in (magnitude.massive_activations, magnitude.super_weights):
        found = find(llama, task)
        assert found.components == [] and "none found" in repr(found) and len(found.frame) == 0
        back = magnitude.Outliers.load(found.save(tmp_path / "found.json"))
        assert repr(back) == repr(found) and back.layers == found.layers and found.plot() is not None


def test_every_part_of_a_rule_counts(llama):
    task = wb.Task(random_texts(6, length=12))
    for find in (magnitude.massive_activations, magnitude.super_weights):
        assert not find(llama, task, larger=1e-6).hits and not find(llama, task, ratio=1e-6, larger=1e6).hits
    assert magnitude.massive_activations(llama, task, larger=1e-6, ratio=2).hits
    found = magnitude.super_weights(
        llama, task, larger=1e-6, ratio=1e-6
    )  # every output counts, one weight in few of them
    assert len(found.hits) == sum(one["share"] > 0.5 for one in found.layers) < 3
    hits = magnitude.sinks(llama, task, threshold=0.01).hits
    assert all(hit["attention"] > 2 * hit["even"] for hit in hits) and len(hits) < 12
    even = np.mean([np.mean([1 / (q + 1) for q in range(2, n)]) for n in map(len, map(llama.ids, task.column("text")))])
    assert f"even attention {even:.2f}" in repr(magnitude.sinks(llama, task))


@pytest.mark.parametrize("weight", [1e7, -1e7])
def test_a_planted_super_weight_makes_a_massive_activation(weight):
    model = model_of("llama")
    task = wb.Task(random_texts(6, length=12))
    with torch.no_grad():
        model.hf.model.layers[1].mlp.down_proj.weight[7, 11] = weight
    found = magnitude.super_weights(model, task)
    first = found.hits[0]
    assert str(found.components[0]) == "neuron.1.11" and first["dimension"] == 7 and first["share"] > 0.99
    assert first["weight"] == pytest.approx(weight) and first["output"] == pytest.approx(
        first["weight"] * first["activation"], rel=1e-3
    )
    assert magnitude.super_weights(model, task, ratio=1e12).hits == ()
    massive = magnitude.massive_activations(model, task)
    assert {(hit["component"], hit["dimension"]) for hit in massive.hits} == {("resid_post.1", 7), ("resid_post.2", 7)}
    x = [model.activations([text], "resid_post.1")[0] for text in task.column("text")]
    median, (row, place) = (
        torch.cat(x).abs().median(),
        max(
            ((i, int(one[:, 7].abs().argmax())) for i, one in enumerate(x)),
            key=lambda at: abs(float(x[at[0]][at[1], 7])),
        ),
    )
    over = [one[:, 7].abs() > max(100, 1000 * float(median)) for one in x]
    hit = next(hit for hit in massive.hits if hit["component"] == "resid_post.1")
    assert hit["value"] == pytest.approx(float(x[row][place, 7]), rel=1e-3)
    assert hit["token"] == task.column("text")[row].split()[place]
    assert hit["times_median"] == pytest.approx(abs(hit["value"]) / float(median), rel=1e-2)
    assert hit["tokens"] == sum(int(one.sum()) for one in over) > 1
    assert hit["at_first"] == pytest.approx(sum(float(one[0]) for one in over) / hit["tokens"])


def test_a_head_that_rests_on_the_first_token_is_a_sink(course):
    texts = wb.Task.load("background").split("test")[:40]
    found = magnitude.sinks(course, texts)
    scores = magnitude.pattern_scores(course, "first", texts)
    wanted = [one for one in scores.top(48) if scores[one] > 0.3]
    assert found.components == wanted
    model = model_of("llama")
    assert magnitude.sinks(model, wb.Task(random_texts(6, length=12)), threshold=0.95).hits == ()
