"""Probing: what is read equals what is there, nulls are fair, erasers are exact, swaps flip what they should."""

import numpy as np
import pytest
import torch
from tiny import build, copying, tokenizer

import workbench as wb
from workbench.locate.probing import curves, das, erase, probe, random_weights
from workbench.locate.probing import erasure as erasing
from workbench.locate.probing import fit as fitting
from workbench.locate.probing.examples import Examples, _without_rounding, examples, read, sites
from workbench.locate.probing.probes import Study
from workbench.locate.probing.resumed import RESUMED, Apply, each

SPLITS = ["fit"] * 4 + ["test"] * 3 + ["ood"] * 3


def copies(n=60):
    """Pairs for the trained tiny model: the word at position 2 decides."""
    return wb.Task([row | {"split": SPLITS[i % 10]} for i, row in enumerate(copying(n))], "copying")


def typed(types=12, rows=8, classes=2, seed=0):
    """Texts whose label is a function of the word at position 2, every word in several rows."""
    rng, table = np.random.default_rng(seed), []
    labels = rng.permutation(np.arange(types) % classes)
    for i in range(types * rows):
        words = [f"w{k}" for k in rng.integers(30, 64, 5)]
        words[2] = f"w{4 + i % types}"
        table.append({"text": " ".join(words), "label": f"class {labels[i % types]}", "entity": words[2],
                      "split": SPLITS[(i // types) % 10] if i // types else "fit"})  # fmt: skip
    return wb.Task(table, "typed")


# what is read


def test_what_is_read_is_what_the_model_gives(tiny, words):
    prompts = [tiny.ids(text) for text in words(7, 5, 9, 7)]
    kinds = [kind for kind in ("embed", "resid_pre.1", "resid_mid.0", "q.1.1", "v.2.1", "z.1.3", "attn_out.1", "mlp_out.2",
                               "neuron.1.5", "resid_post.2", "ln_final") if kind.split(".")[0] not in tiny.names.refused]  # fmt: skip
    at = sites(tiny, [f"{kind}@{place}" for kind in kinds for place in (1, -1)])
    seen = read(tiny, wb.model.Prompts(prompts), at)
    for one, values in tiny.activations(prompts, at).items():
        assert np.allclose(seen[one], values.reshape(len(prompts), -1), rtol=1e-4, atol=1e-4 * values.abs().max())


def test_without_a_position_the_prompt_is_averaged_and_neurons_stay_together(llama, words):
    prompts = [llama.ids(text) for text in words(5, 9)]
    whole, layer = sites(llama, ["resid_post.1", "neuron.1.*@-1"][::-1])
    assert (str(layer), str(whole)) == ("resid_post.1", "neuron.1.*@-1")
    seen = read(llama, wb.model.Prompts(prompts), [whole, layer])
    for row, ids in enumerate(prompts):
        assert np.allclose(seen[layer][row], llama.activations(ids, "resid_post.1")[0].mean(0), atol=1e-4)
        assert seen[whole].shape == (2, llama.names.d_mlp)
        assert np.allclose(seen[whole][row, 7], llama.activations(ids, "neuron.1.7@-1"), atol=1e-4)


def test_rounding_is_no_signal():
    rng = np.random.default_rng(0)
    x = np.tile(rng.standard_normal(4), (6, 1))
    x[:, 1] += 1e-7 * rng.standard_normal(6)
    x[:, 2] += 1e-3 * rng.standard_normal(6)
    clean = _without_rounding(x, 8 * np.finfo(np.float32).eps)
    assert (clean[:, [0, 1, 3]] == 0).all() and np.array_equal(clean[:, 2], x[:, 2])


def test_labels_of_pairs():
    model = wb.load(build("llama"), tokenizer=tokenizer())
    task = copies(10)
    sides = examples(model, task)
    assert (
        sides.labels.tolist() == ["clean"] * 10 + ["corrupted"] * 10
        and sides.types.tolist() == ["w4"] * 10 + ["w5"] * 10
    )
    assert set(sides.other[:10]) == {"corrupted"}
    mixed = wb.Task([row if i % 2 else row | {"answer": row["foil"], "foil": row["answer"], "clean": row["corrupted"],
                     "corrupted": row["clean"], "spans": {}} for i, row in enumerate(task)])  # fmt: skip
    assert examples(model, mixed).labels.tolist() == ["w7", "w6"] * 5 + ["w6", "w7"] * 5, "a side that says nothing"
    assert set(examples(model, mixed, {"w6": "a", "w7": "b"}).labels) == {"a", "b"}
    same = examples(model, task, "template")
    assert set(same.labels) == {"t"} and same.other is None
    rng = np.random.default_rng(0)
    for _ in range(5):
        drawn = sides.shuffled(np.arange(20), rng)
        assert (drawn[:10] != drawn[10:]).all(), "the sides of a pair are swapped, never made equal"


# probes


def test_the_cause_is_read_where_it_is_and_nowhere_before(trained):
    scores = probe(trained, copies(), ["resid_post.*@cause", "resid_post.*@1", "resid_post.2@-1"])
    for one in ("resid_post.0@cause", "resid_post.2@-1"):
        assert scores[one] == 1 and one in map(str, scores.above_null())
    row = scores.frame.set_index("component")
    assert (row.loc[["resid_post.0@1", "resid_post.1@1"], "score"] == 0.5).all(), "no position sees what comes later"
    assert row.loc["resid_post.2@-1", "ood"] == 1 and (row.majority == 0.5).all() and (row.null_p95 < 0.9).all()
    assert (row.null_best >= row.null_p95).all() and row.null_best.nunique() == 1
    assert (row.loc[row.position == "cause", "tokens"] == 1).all() and (
        row.loc[row.position == 1, "tokens"] == 0.5
    ).all()
    assert scores.per_prompt.shape == (7, 36) and set(scores.per_prompt.flat) <= {0.0, 1.0}
    assert scores.cost == 2 and scores.seconds > 0


@pytest.mark.parametrize("method", fitting.METHODS)
def test_repeatable_and_free_of_side_effects(trained, method):
    weights = {k: v.clone() for k, v in trained.hf.state_dict().items()}
    state = torch.get_rng_state()
    one, two = (probe(trained, copies(30), ["z.2.*@-1", "neuron.1.*@-1"], method, seed=3, draws=2) for _ in range(2))
    assert one.frame.equals(two.frame) and len(one.components) == 5
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in trained.hf.state_dict().items())


def test_a_probe_on_token_identity_has_no_selectivity(trained):
    scores = probe(trained, typed(), ["embed@2", "resid_post.0@2"], untrained=False, draws=3)
    row = scores.frame.set_index("component")
    assert abs(row.identity_selectivity.iloc[0]) <= 0.02
    assert abs(row.selectivity["embed@2"]) <= 0.02 and row.seen["embed@2"] > 0.98 and row.control["embed@2"] > 0.98


def test_several_classes(trained):
    scores = probe(trained, typed(12, 10, 3), "embed@2", "logistic", fit="fit", test="test", untrained=False, draws=3)
    assert scores.frame.majority[0] < 0.45 and scores["embed@2"] > 0.9
    assert np.isnan(scores.frame.ood[0]) == (scores.frame.ood_lo[0] != scores.frame.ood_lo[0])
    near = probe(trained, typed(12, 10, 3), "embed@2", "difference_of_means", untrained=False, draws=3)
    assert near["embed@2"] > 0.45


def test_sparse_probes_name_the_units_that_differ():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((80, 30)), np.repeat(["a", "b"], 40)
    x[:40, 7] += 6
    x[:40, 21] += 3
    assert fitting.fitted("sparse", x, y, 1.0, 1)[1].get_support(indices=True).tolist() == [7]
    assert fitting.fitted("sparse", x, y, 1.0, 2)[1].get_support(indices=True).tolist() == [7, 21]


def test_sparse_probes_give_addresses(trained):
    scores = probe(trained, copies(30), "neuron.*.*@-1", "sparse", k=2, untrained=False, draws=3)
    units = scores.frame.set_index("component").units["neuron.2.*@-1"].split()
    assert len(units) == 2 and all(wb.Component.parse(one).layer == 2 for one in units)


def test_difference_of_means_is_the_sign_from_half_way():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 5)) + 1, np.repeat(["a", "b"], 30)
    x[:30] += 0.7
    direction = x[:30].mean(0) - x[30:].mean(0)
    half_way = (x[:30].mean(0) + x[30:].mean(0)) / 2
    wanted = np.where((x - half_way) @ direction > 0, "a", "b")
    assert (fitting.fitted("difference_of_means", x, y).predict(x) == wanted).all()


def test_shuffled_pairs_exceed_their_null_in_one_of_twenty_cases():
    """Sides of pairs at random: nothing to find, so 5 % of sites may exceed what shuffled labels reach."""
    above = []
    for draw in range(50):
        rng, pair = np.random.default_rng(10**6 + draw), np.tile(np.arange(60), 2)
        side = rng.integers(0, 2, 60)
        labels, splits = np.r_[side, 1 - side].astype(str), np.array(SPLITS * 6)[pair]
        found = Examples([], [], labels, labels, splits, pair, pair, np.roll(labels, 60))
        study = Study(
            found, {one: found.rows(one) for one in ("fit", "test", "ood")}, "difference_of_means", 5, 19, 1, draw
        )
        shared = np.tile(2 * rng.standard_normal((60, 8)), (2, 1))  # what the sides of a pair have in common
        lines = [study.site(shared + rng.standard_normal((120, 8)), None) for _ in range(6)]
        above += [line["right"].mean() > line["null_p95"] for line in lines]
    assert np.mean(above) == pytest.approx(0.05, abs=0.02)


def test_a_random_model_and_random_sides_give_nothing(llama, words):
    sides = [*zip(words(*[5] * 60, seed=1), words(*[5] * 60, seed=2))]
    coin = np.random.default_rng(3).integers(0, 2, 60)
    rows = [{"clean": pair[flip], "corrupted": pair[1 - flip], "answer": "w6", "foil": "w7", "split": SPLITS[i % 10]}
            for i, (pair, flip) in enumerate(zip(sides, coin))]  # fmt: skip
    scores = probe(llama, wb.Task(rows), ["z.*.*@-1", "mlp_out.*@-1", "resid_post.*@2"], "difference_of_means",
                   untrained=False, controls=1, seed=4)  # fmt: skip
    assert np.abs(scores.values - 0.5).max() < 0.3 and len(scores.above_null()) <= 4


def test_the_threshold_is_the_rank_that_makes_the_test_exact():
    draws = np.arange(19.0)
    assert fitting.threshold(draws) == 18 and fitting.threshold(np.arange(99.0)) == 94
    assert fitting.threshold(np.arange(20.0)) == 19, "20 draws: only the largest is rare enough"
    rng = np.random.default_rng(0)
    values = rng.standard_normal((20, 4000))
    assert np.mean(values[0] > fitting.threshold(values[1:])) == pytest.approx(0.05, abs=0.01)


def test_an_untrained_model_is_made_by_its_seed(trained, words):
    one, two, other = (random_weights(trained, seed) for seed in (0, 0, 1))
    prompts = words(6, 6)
    assert torch.equal(one.logits(prompts), two.logits(prompts))
    assert not torch.allclose(one.logits(prompts), other.logits(prompts))
    assert not torch.allclose(one.logits(prompts), trained.logits(prompts))


def test_an_untrained_model_answers_at_chance_where_the_trained_one_reads_the_cause(trained):
    scores = probe(
        trained, copies(), "resid_post.2@-1", "difference_of_means", untrained=random_weights(trained, 5), draws=3
    )
    assert scores.frame.untrained[0] < scores.values[0] == 1


def test_seen_rows_hold_out_as_many_of_each_label():
    types, y = np.repeat(["p", "q", "r"], [6, 9, 2]), np.array(list("aabbab") + list("aaaaaaaaa") + list("ab"))
    fit, held = fitting.seen_rows(types, y, np.random.default_rng(0))
    assert sorted([*fit, *held]) == list(range(17))
    assert (
        sorted(y[held][types[held] == "p"]) == ["a", "b"] and (types[held] == "q").sum() == 3 and "r" not in types[held]
    )
    labels = fitting.control_labels(types, y, np.random.default_rng(0))
    assert all(len(set(labels[types == one])) == 1 for one in "pqr")


def test_a_task_without_splits_holds_a_third_out(trained):
    rows = [{k: v for k, v in row.items() if k != "split"} for row in copies(30)]
    scores = probe(trained, wb.Task(rows), "resid_post.2@-1", draws=3, untrained=False)
    assert scores.n == 20 and "held out as test" in scores.why and np.isnan(scores.frame.ood[0])
    assert scores["resid_post.2@-1"] == 1


# erasers


def concept(n=200, width=12, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.standard_normal((n, width)) @ rng.standard_normal((width, width)) + rng.standard_normal((classes, width))[y]
    return x, y.astype(str)


@pytest.mark.parametrize("method", erasing.ERASERS)
@pytest.mark.parametrize("n, width", [(200, 12), (40, 60)])
def test_after_erasure_no_linear_probe_beats_guessing(method, n, width):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    x, y = concept(n, width)
    matrix, bias = erasing.eraser(x, y, method)
    gone = x @ matrix.T + bias
    assert np.abs(gone.mean(0) - x.mean(0)).max() < 1e-8, "the mean stays"
    for one in np.unique(y):
        assert np.abs(gone[y == one].mean(0) - x.mean(0)).max() < 1e-7, "and every class has it"
    assert np.abs(gone @ matrix.T + bias - gone).max() < 1e-7, "erasing twice is erasing once"
    assert np.linalg.matrix_rank(np.eye(width) - matrix, tol=1e-6) == 2
    loss = log_loss(y, LogisticRegression(C=1e4, max_iter=5000).fit(gone, y).predict_proba(gone))
    counts = np.unique(y, return_counts=True)[1] / n
    assert loss == pytest.approx(-(counts * np.log(counts)).sum(), abs=1e-6)
    assert erasing._readable(x, {"fit": np.arange(n)}, {"fit": y, "ood": []})["gain"] > 0.05


def test_leace_is_its_formula_and_moves_least():
    from scipy.linalg import fractional_matrix_power, pinv

    x, y = concept()
    matrix, bias = erasing.eraser(x, y)
    centred = x - x.mean(0)
    onehot = (y[:, None] == np.unique(y)).astype(float)
    white = fractional_matrix_power(np.cov(x.T, bias=True), -0.5).real
    cross = white @ (centred.T @ (onehot - onehot.mean(0)) / len(x))
    wanted = np.eye(12) - pinv(white) @ cross @ pinv(cross) @ white
    assert np.allclose(matrix, wanted, atol=1e-8) and np.allclose(bias, x.mean(0) - wanted @ x.mean(0), atol=1e-8)

    def moved(change):
        return ((x @ change[0].T + change[1] - x) ** 2).sum(1).mean()

    rng = np.random.default_rng(0)
    least = moved((matrix, bias))
    assert least < moved(erasing.eraser(x, y, "orthogonal"))
    for _ in range(5):  # any other whitening erases too, and moves more
        other = rng.standard_normal((12, 12))
        basis, _ = np.linalg.qr(other @ np.linalg.pinv(white) @ cross[:, :2])
        assert least < moved(erasing._map(basis, other, np.linalg.inv(other), x.mean(0)))


def test_random_erasures_have_the_same_rank():
    x, _ = concept(40, 60)
    matrix, _ = erasing.random_eraser(x, 2, np.random.default_rng(0))
    assert np.linalg.matrix_rank(np.eye(60) - matrix, tol=1e-6) == 2
    assert np.abs(matrix @ matrix - matrix).max() < 1e-8


def test_erasing_the_cause_ends_the_behaviour(trained):
    erasure = erase(trained, copies(), "resid_post.2@-1", draws=3)
    row = erasure.frame.set_index("erased")
    assert row.gain["nothing"] > 0.6 and abs(row.gain["concept"]) < 1e-5
    assert row.accuracy["nothing"] == 1 and row.accuracy["concept"] < 0.75 and row.accuracy["random"] > 0.9
    assert row.logit_diff["concept"] < 0.3 * row.logit_diff["nothing"] and len(erasure.draws) == 3
    before = trained.activations(copies().split("test").column("clean"), "resid_post.2@-1")
    after = trained.activations(copies().split("test").column("clean"), "resid_post.2@-1", erasure.intervention)
    assert torch.allclose(erasure.apply(before), after, atol=1e-4)
    assert "copying 1.00 -> " in repr(erasure) and erasure.plot().axes


def test_a_chain_of_erasers_leaves_nothing_at_its_end(trained):
    erasure = erase(trained, copies(), "resid_post.*@-1", draws=0)
    assert len(erasure.intervention.at) == 3 and erasure.intervention.matrix.shape == (3, 32, 32)
    assert abs(erasure.frame.gain[1]) < 1e-5 and list(erasure.frame.erased) == ["nothing", "concept"]
    recipe = wb.Recipe([erasure.intervention])
    assert torch.equal(
        trained.logits("w10 w11 w4 w12 w13", recipe), trained.logits("w10 w11 w4 w12 w13", erasure.intervention)
    )


def test_texts_can_be_erased_and_another_behaviour_watched(trained):
    alone = erase(trained, typed(), "resid_post.1@2", draws=1)
    assert np.isnan(alone.frame.accuracy).all() and "behaviour=" in alone.why and abs(alone.frame.gain[1]) < 1e-5
    watched = erase(trained, typed(), "resid_post.1@2", behaviour=copies(), draws=1)
    assert watched.frame.accuracy[0] == 1 and watched.behaviour == "copying"


# swaps


def test_the_variable_is_found_in_one_dimension(trained):
    found = das(trained, copies(), ["resid_post.2@-1", "resid_pre.0@cause", "resid_post.1@1"], steps=30)
    row = found.frame.set_index("component")
    for one in ("resid_post.2@-1", "resid_pre.0@cause"):
        assert row.score[one] > 0.9 and row.ood[one] > 0.9 and row.full_site[one] == 1
        assert row.null_p95[one] < 0.5, "a random dimension does not do it"
    assert row.score["resid_post.1@1"] == row.full_site["resid_post.1@1"] == 0, "nothing differs there"
    assert found.scores.per_prompt.shape == (3, 36) and found.note == "" and found.plot().axes
    losses = found.losses[wb.Component.parse("resid_post.2@-1")]
    assert len(losses) == 30 and np.mean(losses[-5:]) < np.mean(losses[:5])


def test_all_dimensions_are_the_whole_site(trained):
    found = das(trained, copies(30), ["z.1.2@-1", "resid_post.1@-1"], k=8, steps=1, draws=2)
    row = found.frame.set_index("component")
    assert row.score["z.1.2@-1"] == row.full_site["z.1.2@-1"]
    for directions in found.directions.values():
        assert torch.allclose(directions @ directions.T, torch.eye(8), atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2", "granite"])
def test_going_on_from_a_run_equals_running_again(architecture, words):
    model = wb.load(build(architecture), tokenizer=tokenizer())
    spans = [{"some": [1, 3]}, {"some": [2]}, {"some": [0, 1]}]
    prompts = wb.model.Prompts([model.ids(text) for text in words(7, 4, 9)], spans=spans)
    kinds = [kind for kind in RESUMED if kind not in model.names.refused] + ["embed", "q"]
    at = sites(model, [f"{kind}@{place}" if kind == "embed" else f"{kind}.1{'.2' if kind in 'qz' else ''}@{place}"
                       for kind in kinds if kind not in model.names.refused for place in (-1, "some")])  # fmt: skip
    for one in at:
        changes = [None, lambda x, rows: 1.5 * x.flip(-1)]
        found = each(model, prompts, one, changes, lambda logits, rows: logits[torch.arange(len(rows)), 5 + rows])
        for values, edit in zip(found, ([], [Apply(one, function=lambda x: 1.5 * x.flip(-1))])):
            wanted = model.logits(prompts, *edit)[torch.arange(3), 5 + torch.arange(3)].numpy()
            assert np.allclose(values, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max()), one
        assert np.abs(found[1] - found[0]).max() > 1e-4, one


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2"])
def test_the_gradient_of_a_swap_is_its_slope(architecture, word_pairs):
    from workbench.locate.probing.alignment import Interchange

    model = wb.load(build(architecture), tokenizer=tokenizer())
    found, pairs = examples(model, word_pairs, "side"), word_pairs.on(model)
    (one,) = sites(model, "resid_post.1@3")
    x = torch.tensor(read(model, found.prompts, [one])[one], dtype=torch.float32)
    swap = Interchange(model, one, found, x, torch.roll(x, len(x) // 2, 0), torch.cat([pairs.foil, pairs.answer]))
    rows, raw = np.arange(len(x)), torch.randn(x.shape[1], 2, generator=torch.Generator().manual_seed(0))

    def loss(basis):
        logits = model.logits(
            found.prompts, Apply(one, function=lambda x: swap.swapped(rows, basis)[:, None].expand_as(x))
        )
        return torch.nn.functional.cross_entropy(logits, swap.wanted).item()

    basis, step = torch.linalg.qr(raw)[0], torch.randn(raw.shape, generator=torch.Generator().manual_seed(1))
    basis.requires_grad_(True)
    swapped = swap.swapped(rows, basis)
    _, _, slopes = model.gradients(found.prompts, one, lambda logits, n: torch.nn.functional.cross_entropy(
        logits, swap.wanted[n], reduction="none"), Apply(one, function=lambda x: swapped.detach()[:, None].expand_as(x)))  # fmt: skip
    (slopes[one] * swapped).sum().div(len(rows)).backward()
    slope, basis = basis.grad, basis.detach()
    measured = (loss(basis + 1e-3 * step) - loss(basis - 1e-3 * step)) / 2e-3
    assert (slope * step).sum().item() == pytest.approx(measured, rel=0.05, abs=1e-3)


def test_an_alignment_is_kept(trained, tmp_path):
    found = das(trained, copies(20), ["resid_post.2@-1", "resid_post.1@-1"], k=2, steps=2, draws=2)
    again = wb.locate.probing.Alignment.load(found.save(tmp_path / "found"))
    assert (
        repr(again) == repr(found) and again.losses == found.losses and list(again.directions) == list(found.directions)
    )
    assert all(torch.equal(again.directions[one], found.directions[one]) for one in found.directions)
    found.scores.save(tmp_path / "scores")
    with pytest.raises(FileNotFoundError, match=r"no alignment\.json"):
        wb.locate.probing.Alignment.load(tmp_path / "scores")


def test_a_subspace_that_beats_the_whole_site_is_flagged(trained):
    from dataclasses import replace

    found = das(trained, copies(20), "resid_post.2@-1", steps=2, draws=2)
    odd = replace(found.scores, values=np.array([0.9]), columns=found.scores.columns | {"full_site": np.array([0.2])})
    assert "illusion" in replace(found, scores=odd).note


# pictures and refusals


def test_curves_have_a_panel_for_each_position(trained):
    scores = probe(trained, copies(20), ["resid_post.*@cause", "resid_post.*@-1"], "difference_of_means", draws=3)
    figure = curves(scores)
    assert figure._repr_png_()[:4] == b"\x89PNG"
    assert [ax.get_title(loc="left") for ax in figure.axes if ax.get_visible()] == [
        "resid_post @cause",
        "resid_post @-1",
    ]
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"untrained model", "tokens alone"}
    with pytest.raises(ValueError, match="'oood' is unknown"):
        curves(scores, ["oood"])
    with pytest.raises(ValueError, match="these are causal"):
        curves(wb.locate.causal.patch(trained, copies(3), "resid_pre"))


@pytest.mark.parametrize("call, said", [
    (lambda m: probe(m, copies(20), "resid_post.2@-1", "lasso"), "method='lasso' is unknown; choose 'logistic'"),
    (lambda m: probe(m, copies(20), "pattern.1.0@-1"), "lies between two positions"),
    (lambda m: probe(m, copies(20), "resid_post.2@subject"), "no span 'subject'"),
    (lambda m: probe(m, copies(20), "resid_post.9@-1"), "layer 9 is out of range"),
    (lambda m: probe(m, copies(20), "resid_post.2@-1", label="template"), "at least two classes"),
    (lambda m: probe(m, copies(20), "resid_post.2@-1", label="colour"), "has a 'colour'; all have"),
    (lambda m: probe(m, copies(20), "resid_post.2@-1", label={"w6": "a"}), "no class for 'w7'"),
    (lambda m: probe(m, copies(20), "resid_post.2@-1", fit="select"), "no rows of split 'select'; it has fit, ood, test"),
    (lambda m: probe(m, copies(20), "resid_post.2@-1", draws=0), "at least 1"),
    (lambda m: probe(m, wb.Task([{"text": "w9 w8"}]), "resid_post.2@-1"), "plain texts; a probe needs"),
    (lambda m: erase(m, copies(20), "resid_post.2"), "needs a position, for example resid_post.2@-1"),
    (lambda m: erase(m, copies(20), "neuron.1.*@-1"), "Take mlp_out.1"),
    (lambda m: erase(m, copies(20), "resid_post.2@-1", "inlp"), "choose 'leace' or 'orthogonal'"),
    (lambda m: das(m, typed(), "resid_post.2@-1"), "swapping between prompts needs pairs"),
    (lambda m: das(m, copies(20), "resid_post.2@-1", k=40), "k=40 dimensions do not fit resid_post.2@-1, which is 32 wide"),
    (lambda m: das(m, copies(20), "resid_post.2"), "must be one token"),
])  # fmt: skip
def test_refusals_say_what_to_do(trained, call, said):
    with pytest.raises(ValueError, match=said):
        call(trained)


# phenomena of the bundled model


def part(name, n=40):
    """Some rows of each split of a bundled task."""
    task = wb.Task.load(name)
    return wb.Task([row for split in ("fit", "test", "ood") for row in task.split(split)[:n]], name)


def test_mood_arrives_at_the_last_token_and_only_there_is_needed(course):
    task = part("mood")
    scores = probe(course, task, ["resid_post.0@-1", "resid_post.6@-1", "embed@mood"])
    row = scores.frame.set_index("component")
    assert row.score["resid_post.0@-1"] == 0.5, "the first layers see two tokens"
    assert row.score["resid_post.6@-1"] > 0.9 > row.untrained["resid_post.6@-1"]
    assert row.selectivity["resid_post.6@-1"] > 0.1 and abs(row.identity_selectivity.iloc[0]) <= 0.02
    erasure = erase(course, task, "resid_post.6@-1", draws=2).frame.set_index("erased")
    assert erasure.accuracy["nothing"] > 0.9 and erasure.accuracy["concept"] < 0.75 < erasure.accuracy["random"]


def test_the_interval_of_a_behaviour_is_over_its_entities(trained, monkeypatch):
    seen, given = [], wb.measure.mean_interval

    def recorded(values, clusters=None, **settings):
        seen.append((len(values), clusters))
        return given(values, clusters, **settings)

    rows = [row | {"entity": f"e{i % 5}"} for i, row in enumerate(copies())]
    monkeypatch.setattr(erasing.measure, "mean_interval", recorded)
    erase(trained, wb.Task(rows), "resid_post.1@2", draws=0)
    last = [[f"entity {row['entity']}" for row in rows if row["split"] == "test"]]
    assert (len(last[0]), last) in seen
