"""Magnitude: identities by hand, planted truth, nulls at their level, refusals."""

import numpy as np
import pytest
import torch
from tiny import build, copying, tokenizer

import workbench as wb
from workbench.locate import magnitude
from workbench.locate.magnitude.contrast import _interval, separation


def random_texts(n, length=8, seed=0, **columns):
    rng = np.random.default_rng(seed)
    rows = [{"text": " ".join(f"w{k}" for k in rng.integers(10, 64, length + i % 3))} for i in range(n)]
    return [row | {key: values[i] for key, values in columns.items()} for i, row in enumerate(rows)]


def labelled(n=40, seed=0, labels=("a", "b")):
    given = np.random.default_rng(seed + 1).permutation([labels[i % len(labels)] for i in range(n)])
    return wb.Task(random_texts(n, label=given.tolist()), "random")


def model_of(architecture):
    return wb.load(build(architecture), tokenizer=tokenizer())


# contrast


def test_a_separable_neuron_has_auroc_1_and_the_formula_holds():
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(0)
    x, side = rng.normal(size=(30, 5)), np.repeat([1.0, 0.0], [12, 18])
    x[:, 0] = side * 2 + rng.uniform(size=30)
    score, auroc = separation(x, side[None])
    a, b = x[:12], x[12:]
    pooled = np.sqrt((11 * a.var(0, ddof=1) + 17 * b.var(0, ddof=1)) / 28)
    np.testing.assert_allclose(score[0], (a.mean(0) - b.mean(0)) / pooled, rtol=1e-9)
    np.testing.assert_allclose(auroc[0], mannwhitneyu(a, b).statistic / (12 * 18), rtol=1e-9)
    assert auroc[0, 0] == 1 and separation(-x, side[None])[1][0, 0] == 0
    once = _interval(x, side, np.ones((1, 30)))  # a draw of every row once has the score itself
    np.testing.assert_allclose(once, [score[0], score[0]], rtol=1e-9)
    constant, _ = separation(np.stack([side, np.ones(30)], 1), side[None])
    assert 50 < constant[0, 0] < 110 and constant[0, 1] == 0


def test_statistics_leave_out_padding_and_bos(llama):
    texts = ["w10 w11 w12", "w13 w14 w15 w16 w17 w18", "w19 w20 w21 w22", "w30 w31"]
    task = wb.Task([{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)])
    with_bos = wb.load(llama.hf, tokenizer=llama.tokenizer, bos=True)
    for model, skip in ((llama, 0), (with_bos, 1)):
        by_hand = [model.activations([text], "neuron.1.5")[0][skip:] for text in texts]
        for statistic, of in (("mean", torch.mean), ("max", torch.max)):
            scores = magnitude.contrast(model, task, ["neuron.1.5", "neuron.2.0"], statistic=statistic, draws=20)
            np.testing.assert_allclose(scores.per_prompt[0], [of(one) for one in by_hand], rtol=1e-4, atol=1e-6)
            for label, rows in (("a", by_hand[::2]), ("b", by_hand[1::2])):
                mean = np.mean([of(one) for one in rows])
                assert scores.columns[f"{statistic} {label}"][0] == pytest.approx(mean, rel=1e-4)
            gap = scores.columns[f"{statistic} a"] - scores.columns[f"{statistic} b"]
            assert (np.sign(scores.values) == np.sign(gap)).all() and scores.direction == "a - b"
    first = magnitude.contrast(with_bos, task, "neuron.1.5@0", draws=20)  # BOS, where it is asked for
    np.testing.assert_allclose(first.per_prompt[0], 4 * [with_bos.activations(texts, "neuron.1.5@0")[0]], rtol=1e-4)
    last = magnitude.contrast(llama, task, "neuron.1.5@-1", draws=20)
    np.testing.assert_allclose(
        last.per_prompt[0], [llama.activations([t], "neuron.1.5@-1")[0] for t in texts], rtol=1e-4
    )


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "phi3", "gemma2"])
def test_frequency_counts_open_gates(architecture):
    model = model_of(architecture)
    block = model.hf.get_submodule(model.names.row.layers)[1]
    module, seen = block.get_submodule(model.names.row.mlp_in[0]), []
    handle = module.register_forward_hook(lambda module, args, out: seen.append(out.reshape(-1, out.shape[-1])))
    task = labelled(4)
    for text in task.column("text"):
        model.logits(text)
    handle.remove()
    wanted = np.stack([(out[:, : model.names.d_mlp] > 0).float().mean(0) for out in seen], 1)
    scores = magnitude.contrast(model, task, "neuron.1.*", statistic="frequency", draws=20)
    np.testing.assert_allclose(scores.per_prompt, wanted, atol=1e-6)


def test_every_kind_on_every_architecture(tiny, words):
    task = labelled(6)
    kinds = [
        "embed",
        "resid_pre.1",
        "q",
        "k",
        "v",
        "z",
        "attn_out",
        "resid_mid",
        "neuron",
        "mlp_out",
        "resid_post",
        "ln_final",
    ]
    at = [kind for kind in kinds if kind.split(".")[0] not in tiny.names.refused]
    scores = magnitude.contrast(tiny, task, at, draws=20)
    assert scores.components == sorted(scores.components) and np.isfinite(scores.values).all()
    assert (scores.ci_lo <= scores.ci_hi).all() and scores.cost == 1 and scores.n == 6
    heads = model_norms(tiny, task, "z.1.2")
    np.testing.assert_allclose(scores.per_prompt[scores._index("z.1.2")], heads, rtol=2e-3)
    stream = scores._index("resid_post.1")
    dimension = int(scores.columns["dimension"][stream])
    x = np.array([tiny.activations([t], "resid_post.1")[0][:, dimension].mean() for t in task.column("text")])
    np.testing.assert_allclose(scores.per_prompt[stream], x, rtol=2e-3, atol=1e-4)
    if "resid_mid" in at:
        mid = scores._index("resid_mid.1")
        dimension = int(scores.columns["dimension"][mid])
        x = np.array([tiny.activations([t], "resid_mid.1")[0][:, dimension].mean() for t in task.column("text")])
        np.testing.assert_allclose(scores.per_prompt[mid], x, rtol=2e-3, atol=1e-4)
    for refused in set(tiny.names.refused) & {"neuron", "attn_out", "resid_mid", "q"}:
        with pytest.raises(ValueError, match=refused):
            magnitude.contrast(tiny, task, refused)


def test_every_function_answers_or_says_why_not(tiny):
    task, refused = labelled(6), tiny.names.refused
    calls = {
        "neuron": [lambda: magnitude.language_neurons(tiny, task, draws=20), lambda: magnitude.wanda(tiny, task, draws=20),
                   lambda: magnitude.super_weights(tiny, task), lambda: magnitude.weight_norms(tiny, "neuron.*.*")],
        "pattern": [lambda: magnitude.pattern_scores(tiny, prompts=4), lambda: magnitude.sinks(tiny, task)],
        "z": [lambda: magnitude.wanda(tiny, task, "z", draws=20), lambda: magnitude.weight_norms(tiny)],
        "resid_post": [lambda: magnitude.block_influence(tiny, task), lambda: magnitude.massive_activations(tiny, task)],
    }  # fmt: skip
    for kind, some in calls.items():
        for call in some:
            if kind in refused:
                with pytest.raises(ValueError, match=kind):
                    call()
                continue
            found = call()
            if isinstance(found, wb.Scores):
                ranked = ~np.isnan(found.values)
                assert ranked.any() and np.isfinite(found.null_p95[ranked]).all() and found.null


def model_norms(model, task, head):
    return [model.activations([text], head)[0].norm(dim=-1).mean() for text in task.column("text")]


def test_on_shuffled_labels_one_in_twenty_exceeds_its_null(llama):
    alone, best, zs = [], [], []
    for seed in range(40):
        scores = magnitude.contrast(llama, labelled(seed=seed), draws=200, seed=seed)
        alone.append((np.abs(scores.values) > scores.null_p95).mean())
        zs.append((np.abs(scores.columns["auroc"] - 0.5) > scores.columns["null_auroc"] - 0.5).mean())
        best.append((np.abs(scores.values) > scores.columns["null_best"]).any())
    assert len(scores.components) == 144
    parts = [
        magnitude.contrast(llama, labelled(), f"neuron.{i}.*", draws=200).columns["null_best"][0] for i in range(3)
    ]
    whole = magnitude.contrast(llama, labelled(), draws=200).columns["null_best"]
    assert (whole > max(parts)).all(), "the best of all layers is more than that of any"
    assert 0.03 < np.mean(alone) < 0.07 and 0.03 < np.mean(zs) < 0.07
    assert np.mean(best) < 0.2, "the largest of all exceeds its null rarely"


def test_on_shuffled_pairs_one_in_twenty_exceeds_its_null(llama):
    share = []
    for seed in range(40):
        rng, rows = np.random.default_rng(seed), []
        for row in copying(20, seed):
            sides = [row["clean"], row["corrupted"]]
            sides = sides[::-1] if rng.random() < 0.5 else sides
            rows.append({"clean": sides[0], "corrupted": sides[1], "answer": "w6", "foil": "w7"})
        scores = magnitude.contrast(llama, wb.Task(rows), draws=200, seed=seed)
        share.append((np.abs(scores.values) > scores.null_p95).mean())
        assert scores.null.startswith("labels shuffled within pairs") and scores.cost == 2
    assert 0.03 < np.mean(share) < 0.07


def test_the_null_of_a_stream_is_its_best_dimensions(llama):
    over = []
    for seed in range(40):
        scores = magnitude.contrast(llama, labelled(seed=seed), ["embed", "resid_post.*"], draws=200, seed=seed)
        over.append((np.abs(scores.values) > scores.null_p95).mean())
    assert np.mean(over) < 0.15, "the best of 32 dimensions would exceed its own null far more often"


def test_labels_are_shuffled_within_matched_rows(llama):
    rows = random_texts(24, label=["a", "b"] * 12, template=["s"] * 12 + ["t"] * 12)
    assert "rows of one template," in magnitude.contrast(llama, wb.Task(rows), "z", draws=9).null
    for i, row in enumerate(rows):
        row["entity"] = str(i // 2)
    assert "rows of one template and entity," in magnitude.contrast(llama, wb.Task(rows), "z", draws=9).null
    # two rows of one text in each group: exchanging their labels changes nothing
    twins = [row | {"label": label, "entity": str(i)} for i, row in enumerate(rows) for label in "ab"]
    for find in (magnitude.contrast, magnitude.language_neurons):
        assert np.abs(np.nan_to_num(find(llama, wb.Task(twins), draws=20).null_p95)).max() < 1e-6
    rows = [row | {"template": row["label"], "entity": "e"} for row in rows]
    assert "all rows," in magnitude.contrast(llama, wb.Task(rows), "z", draws=9).null


def test_a_planted_trigger_stands_out_and_a_decoy_as_much(course):
    with wb.improve.plant(course, "decoy", 0) as planted:
        layer = planted.components[0].layer
        scores = magnitude.contrast(course, planted.task.split("test"), f"neuron.{layer}.*@-1", draws=100)
    true, decoy = (one[0].at(-1) for one in (planted.components, planted.decoys))
    assert {true, decoy} <= set(scores.top(4)) and scores[true] > 5 * scores.columns["null_best"][0]
    assert scores.columns["auroc"][scores._index(true)] == 1
    assert scores[true] == pytest.approx(scores[decoy], rel=1e-3), "firing is all that magnitude sees"


def test_repeatable_and_free_of_side_effects(llama, tmp_path):
    weights = {k: v.clone() for k, v in llama.hf.state_dict().items()}
    task = labelled()
    calls = {
        "contrast": lambda: magnitude.contrast(llama, task, draws=50, seed=3),
        "language": lambda: magnitude.language_neurons(llama, task, draws=50, seed=3),
        "pattern": lambda: magnitude.pattern_scores(llama, seed=3),
        "wanda": lambda: magnitude.wanda(llama, task, "z", seed=3),
        "blocks": lambda: magnitude.block_influence(llama, task, seed=3),
        "weights": lambda: magnitude.weight_norms(llama),
    }
    for name, call in calls.items():
        one, two = call(), call()
        for field in ("values", "ci_lo", "ci_hi", "null_p95", "per_prompt"):
            np.testing.assert_array_equal(getattr(one, field), getattr(two, field))
        assert one.null and one.cost == one.cost and one.components == sorted(one.components), name
        back = wb.Scores.load(one.save(tmp_path / name))
        assert back.frame.shape == one.frame.shape and repr(back) == repr(one)
        assert one.plot() is not None
    assert all(torch.equal(v, weights[k]) for k, v in llama.hf.state_dict().items())


# language neurons


def test_language_neurons_equal_the_formula_by_hand(llama):
    task = labelled(30, labels=("x", "y", "z"))
    rates = {}
    for layer in range(3):
        gate = llama.hf.model.layers[layer].mlp.gate_proj
        for text, label in zip(task.column("text"), task.column("label")):
            seen = []
            handle = gate.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[0]))
            llama.logits(text)
            handle.remove()
            rates.setdefault(label, {}).setdefault(layer, []).append(seen[0] > 0)
    names = list(dict.fromkeys(task.column("label")))
    p = torch.stack(
        [torch.cat([torch.cat(rates[k][layer]).float().mean(0) for layer in range(3)]) for k in names]
    ).numpy()
    share = p / p.sum(0)
    entropy = -np.sum(np.where(share > 0, share * np.log(np.maximum(share, 1e-30)), 0), 0)
    scores = magnitude.language_neurons(llama, task, bar=0.8, share=0.05, draws=20)
    for k, name in enumerate(names):
        np.testing.assert_allclose(scores.columns[f"P {name}"], p[k], atol=1e-6)
    np.testing.assert_allclose(scores.columns["entropy"], entropy, atol=1e-5)
    several = wb.Task([row | {"template": "t", "entity": str(i // 3)} for i, row in enumerate(task)] * 4)
    once, again = (magnitude.language_neurons(llama, some, bar=0.8, draws=50) for some in (several[:30], several))
    for end in ("ci_lo", "ci_hi"):  # rows of one entity are one observation
        np.testing.assert_allclose(getattr(once, end), getattr(again, end), atol=1e-6)
    assert (once.ci_lo < once.ci_hi)[~np.isnan(once.values)].all()
    fires = [llama.activations([text], "neuron.1.7")[0] > 0 for text in task.column("text")]
    share = torch.cat([one for one, label in zip(fires, task.column("label")) if label == names[0]]).float().mean()
    itself = magnitude.language_neurons(llama, task, "neuron.1.7", signal="activation", draws=2)
    assert itself.columns[f"P {names[0]}"][0] == pytest.approx(float(share), abs=1e-6)
    above = p > np.quantile(p, 0.8)
    assert (np.isnan(scores.values) == ~above.any(0)).all() and scores.columns["chosen"].sum() == round(0.05 * 144)
    chosen = scores.columns["chosen"]
    assert entropy[chosen].max() <= entropy[above.any(0) & ~chosen].min() + 1e-9
    assert all((name in labels.split("+")) == bool(one) for k, name in enumerate(names)
               for labels, one in zip(scores.columns["labels"], above[k]))  # fmt: skip


def test_random_labels_make_no_language_neurons(llama):
    share = []
    for seed in range(15):
        scores = magnitude.language_neurons(llama, labelled(seed=seed), bar=0.5, draws=200, seed=seed)
        ranked = ~np.isnan(scores.values)
        share.append((scores.values[ranked] > scores.null_p95[ranked]).mean())
    assert 0.02 < np.mean(share) < 0.08


def test_language_neurons_carry_their_language(course):
    task = wb.Task.load("language_id")
    scores = magnitude.language_neurons(course, task.split("fit"), share=0.02, draws=100)
    chosen = scores.frame.query("chosen")
    assert (chosen.score > chosen.null_best).mean() > 0.5 and chosen.label.nunique() > 1
    held = magnitude.language_neurons(course, task.split("test"), bar=0.5, draws=20).frame.set_index("component")
    again = [held.label[one] for one in chosen.component]
    assert np.mean(np.array(again) == chosen.label.to_numpy()) > 0.9, "the same language on other texts"


# refusals


@pytest.mark.parametrize("call, said", [
    (lambda m, t: magnitude.contrast(m, t, "pattern.1.0"), "pattern_scores"),
    (lambda m, t: magnitude.contrast(m, t, "logits"), "cannot be contrasted"),
    (lambda m, t: magnitude.contrast(m, t, statistic="median"), "choose 'mean', 'max' or 'frequency'"),
    (lambda m, t: magnitude.contrast(m, t, "z", statistic="frequency"), "only neurons are open or closed"),
    (lambda m, t: magnitude.contrast(m, t, "neuron.9.*"), "layer 9"),
    (lambda m, t: magnitude.contrast(m, t, positive="c"), "positive='c'"),
    (lambda m, t: magnitude.contrast(m, t[:3]), "at least two prompts of each kind"),
    (lambda m, t: magnitude.contrast(m, wb.Task([{"text": "w10 w11"}])), "plain texts"),
    (lambda m, t: magnitude.contrast(m, wb.Task(copying(3)), positive="clean"), "leave it out"),
    (lambda m, t: magnitude.language_neurons(m, wb.Task(copying(3))), "at least two labels"),
    (lambda m, t: magnitude.language_neurons(m, t, "z"), "no neuron"),
    (lambda m, t: magnitude.language_neurons(m, t, signal="act"), "signal='act'"),
    (lambda m, t: magnitude.language_neurons(m, t, bar=95), "bar=95"),
    (lambda m, t: magnitude.pattern_scores(m, "next"), "pattern='next'"),
    (lambda m, t: magnitude.pattern_scores(m, at="neuron"), "no head"),
    (lambda m, t: magnitude.pattern_scores(m, "induction", ["w10 w11 w12"]), "no token repeats"),
    (lambda m, t: magnitude.pattern_scores(m, length=2), "length=3"),
    (lambda m, t: magnitude.wanda(m, t, "resid_pre"), "weights belong to neurons and heads"),
    (lambda m, t: magnitude.wanda(m, []), "No prompt was given"),
    (lambda m, t: magnitude.weight_norms(m, ["z.0.0", "neuron.0.0"]), "one kind at a time"),
    (lambda m, t: magnitude.sinks(m, ["w10 w11"]), "fewer than three tokens"),
    (lambda m, t: magnitude.massive_activations(m, t, ratio=0), "ratio=0"),
])  # fmt: skip
def test_refusals_say_what_to_do(llama, call, said):
    with pytest.raises(ValueError, match=said):
        call(llama, labelled(labels=("a", "a", "b")))


def test_models_that_lack_a_site_say_so():
    with pytest.raises(ValueError, match="way of its own"):
        magnitude.pattern_scores(model_of("bloom"))
    mixture = model_of("mixtral")
    for call in (magnitude.wanda, magnitude.super_weights, magnitude.language_neurons):
        with pytest.raises(ValueError, match="fuses its experts"):
            call(mixture, labelled())


@pytest.mark.parametrize("kind", ["pairs", "labelled"])
def test_rows_of_one_entity_are_one_observation(llama, kind):
    """Rows four times over: about as wide an interval as those of the rows (half of it, if they were others)."""
    rows = copying(8)
    if kind == "labelled":
        rows = [{"text": row[side], "label": side, "template": "t", "entity": str(i)}
                for i, row in enumerate(rows) for side in ("clean", "corrupted")]  # fmt: skip
    once, again = (magnitude.contrast(llama, wb.Task(some), "z", null=False, draws=400) for some in (rows, rows * 4))
    widths = [scores.ci_hi - scores.ci_lo for scores in (once, again)]
    assert 0.8 < np.median(widths[1] / widths[0]) < 1.25
    assert ((again.ci_lo < again.values) & (again.values < again.ci_hi)).all() and np.abs(again.values).max() > 0.5
