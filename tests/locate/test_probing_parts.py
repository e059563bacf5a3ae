"""Probing part by part: what each control is fitted on and measured on, swaps and erasures by hand."""

import numpy as np
import pytest
import torch
from test_probing import SPLITS, copies, typed
from tiny import copying

import workbench as wb
from workbench import measure
from workbench.locate.probing import alignment, das, erase, probe, random_weights
from workbench.locate.probing import erasure as erasing
from workbench.locate.probing import fit as fitting
from workbench.locate.probing.examples import Examples, examples
from workbench.locate.probing.probes import Study
from workbench.locate.probing.resumed import Apply

# rows and labels


def test_texts_hang_on_their_entities(llama):
    task = wb.Task([row | {"template": f"t{i % 6}"} for i, row in enumerate(typed())])
    found = examples(llama, task)
    entity = np.array(task.column("entity"))
    assert found.types.tolist() == entity.tolist() and len(set(found.group)) == 12
    assert ((found.group[:, None] == found.group) == (entity[:, None] == entity)).all()
    rows = found.rows("fit")
    drawn = found.shuffled(rows, np.random.default_rng(0))
    assert sorted(drawn) == sorted(found.labels[rows]) and (drawn != found.labels[rows]).any()


def test_the_penalty_is_chosen_on_groups_that_were_not_seen(monkeypatch):
    group = np.tile(np.arange(9), 4)
    best = {0.1}

    class Fake:
        def __init__(self, x, y, c):
            self.seen, self.right = set(x[:, 0]), c in best

        def predict(self, x):
            assert not self.seen & set(x[:, 0]), "a group stands on both sides of a fold"
            return x[:, 1] if self.right else 1 - x[:, 1]

    monkeypatch.setattr(fitting, "fitted", lambda method, x, y, c, k: Fake(x, y, c))
    y = np.arange(36) % 2
    x = np.stack([group, y], 1)
    assert fitting.strength("logistic", x, y, group) == 0.1
    best |= set(fitting.STRENGTHS)
    assert fitting.strength("logistic", x, y, group) == min(fitting.STRENGTHS), "the strongest penalty among equals"


def test_control_labels_are_random_and_as_frequent_as_the_classes():
    types, y = np.repeat(np.arange(100), 3), np.array(["a"] * 240 + ["b"] * 60)
    one, two = (fitting.control_labels(types, y, np.random.default_rng(seed)) for seed in (0, 1))
    assert (one == "a").sum() == (two == "a").sum() == 240 and (one != two).any()
    fit, held = fitting.seen_rows(np.array(["s"] * 12), np.array(list("aaaaaaaaabbb")), np.random.default_rng(0))
    assert len(fit) == 10 and len(held) == 2, "as many of each label"


def test_units_differ_by_the_gap_of_a_class_to_the_rest():
    y = np.array(list("abc") * 4)
    x = np.stack([-6.0 * (y == "a"), 3.0 * (y == "b"), np.zeros(12)], 1)
    assert fitting.mean_difference(x, y).tolist() == [6, 3, 0]


# probes


def test_every_null_is_fitted_and_measured_on_its_own_labels(monkeypatch):
    n, rng, given = 200, np.random.default_rng(0), []
    labels = np.array(["a", "b"])[rng.integers(0, 2, n)]
    types, splits = rng.integers(0, 10, n).astype(str), np.array(SPLITS * 20)
    found = Examples([], [], labels, types, splits, np.arange(n), np.arange(n), None)
    study = Study(found, {one: found.rows(one) for one in ("fit", "test", "ood")}, "logistic", 5, 4, 2, 0)
    x, real, chosen = rng.standard_normal((n, 150)), fitting.fitted, []

    def recorded(method, rows, y, c, k):
        given.append((y, real(method, rows, y, c, k)))
        return given[-1][1]

    monkeypatch.setattr(fitting, "fitted", recorded)
    monkeypatch.setattr(fitting, "strength", lambda method, rows, y, *rest: chosen.append(y) or 0.1)
    line, y = study.site(x, None), study.y
    assert np.array_equal(chosen[0], y["fit"]) and np.array_equal(given[0][0], y["fit"])
    reached = {"test": [], "ood": []}
    for draw, (fitted_on, model) in zip(study.shuffled, given[1:5], strict=True):
        assert np.array_equal(fitted_on, draw["fit"]) and not np.array_equal(draw["fit"], y["fit"])
        for split, some in reached.items():
            some.append((model.predict(x[study.rows[split]]) == draw[split]).mean())
    assert line["shuffled"] == pytest.approx(np.mean(reached["test"]))
    for split, name in (("test", "null_p95"), ("ood", "null_ood")):
        assert line[name] == pytest.approx(np.max(np.array(reached[split]) + study.lots / len(y[split])))
    for split, name in (("test", "right"), ("ood", "right_ood")):
        assert np.array_equal(line[name], given[0][1].predict(x[study.rows[split]]) == y[split])
    names, counts = np.unique(y["fit"], return_counts=True)
    assert line["majority"] == (y["test"] == names[counts.argmax()]).mean() != counts.max() / counts.sum()
    assert line["seen"] < 0.8, "noise says nothing of rows that were left out"


def test_the_untrained_baseline_is_a_probe_of_the_untrained_model(trained):
    blank, at = random_weights(trained, 5), ["resid_post.1@-1", "embed@2"]
    beside = probe(trained, typed(), at, untrained=blank, draws=1)
    alone = probe(blank, typed(), at, untrained=False, draws=1)
    assert np.array_equal(beside.columns["untrained"], alone.values)
    assert np.array_equal(beside.columns["untrained_ood"], alone.columns["ood"])
    groups = np.unique(typed().split("test").column("entity"), return_inverse=True)[1]
    wanted = measure.mean_interval(alone.per_prompt.T, groups)
    assert np.allclose([alone.values, alone.ci_lo, alone.ci_hi], wanted) and (alone.ci_lo < alone.ci_hi).any()


def test_tokens_count_up_to_the_position_in_prompts_of_any_length(trained):
    rng, rows = np.random.default_rng(0), []
    for i in range(60):
        words = ["w10", f"w{4 + i % 2}", *(f"w{k}" for k in rng.integers(30, 64, 2 + i // 2 % 4))]
        rows.append({"text": " ".join(words), "label": "ab"[i % 2], "split": SPLITS[i // 2 % 10]})
    scores = probe(trained, wb.Task(rows), ["embed@0", "embed@1"], untrained=False, draws=1)
    assert scores.columns["tokens"].tolist() == [0.5, 1.0]


def test_two_word_types_are_too_few_for_a_control_task(trained):
    scores = probe(trained, copies(20), "embed@2", untrained=False, draws=1)
    assert np.isnan(scores.columns["control"]).all() and "Too few word types" in scores.why


# swaps


def test_swaps_by_hand(trained, monkeypatch):
    """Where the swap does it for some prompts only, so that the splits differ."""
    seen, real = [], alignment._mean_directions
    monkeypatch.setattr(alignment, "_mean_directions", lambda x, y, k: seen.append((x, y)) or real(x, y, k))
    rows = [row | {"split": SPLITS[i % 10]} for i, row in enumerate(copying(40))]
    found = das(trained, wb.Task(rows), "attn_out.1@-1", steps=10, lr=0.1, draws=2, seed=1)
    pairs, at = wb.Task(rows).on(trained), wb.Component.parse("attn_out.1@-1")
    x = trained.activations([*pairs.clean, *pairs.corrupted], at)
    base, source = x, torch.cat([x[40:], x[:40]])
    ids, wanted = [*pairs.clean, *pairs.corrupted], torch.cat([pairs.foil, pairs.answer])
    of = {split: [i for i in range(80) if rows[i % 40]["split"] == split] for split in ("fit", "test", "ood")}
    fit_x, labels = seen[0]
    assert np.allclose(fit_x, x[of["fit"]], atol=1e-4) and labels.tolist() == ["clean"] * 16 + ["corrupted"] * 16
    means = x[[i for i in of["fit"] if i < 40]].mean(0) - x[[i for i in of["fit"] if i >= 40]].mean(0)

    def right(split, basis):
        swapped = (base + (source - base) @ basis.T @ basis)[of[split]]
        swap = Apply(at, function=lambda x: swapped[:, None].expand_as(x))
        logits = trained.logits([ids[i] for i in of[split]], swap)
        return (logits.argmax(-1) == wanted[of[split]]).double().numpy()

    columns, learned = found.scores.columns, found.directions[at]
    assert len({found.scores.values[0], columns["fit"][0], columns["ood"][0], 0.0, 1.0}) == 5
    assert abs(float(measure.unit(means) @ real(fit_x, labels, 1)[:, 0])) == pytest.approx(1, abs=1e-4)
    assert np.array_equal(found.scores.per_prompt[0], right("test", learned))
    assert columns["fit"][0] == right("fit", learned).mean() and columns["ood"][0] == right("ood", learned).mean()
    for name, basis in (("full_site", torch.eye(32)), ("difference_of_means", measure.unit(means)[None])):
        assert columns[name][0] == right("test", basis).mean()
        assert columns[f"{name}_ood"][0] == right("ood", basis).mean()
    interval = measure.mean_interval(found.scores.per_prompt.T, np.array(of["test"]) % 40, seed=1)
    assert np.allclose([found.scores.values, found.scores.ci_lo, found.scores.ci_hi], interval)
    # nothing is learned from rows that are held out
    other = [row if row["split"] == "fit" else new | {"split": row["split"]} for row, new in zip(rows, copying(40, 9))]
    again = das(trained, wb.Task(other), "attn_out.1@-1", steps=10, lr=0.1, draws=2, seed=1)
    assert torch.allclose(again.directions[at], learned, atol=1e-4)


# erasures


def test_a_new_probe_is_fitted_on_test_and_measured_on_ood():
    y = np.tile(["a", "b"], 30)
    x = np.where(y == "a", 1.0, -1.0)[:, None] + np.zeros(3)
    x[40:] *= -1  # the other way round in ood
    rows = {"fit": np.arange(20), "test": np.arange(20, 40), "ood": np.arange(40, 60)}
    assert erasing._readable(x, rows, {name: y[which] for name, which in rows.items()})["probe"] == 0


def test_an_erasure_by_hand(trained, monkeypatch):
    seen, drawn, given, real = [], [], measure.mean_interval, erasing.random_eraser

    def recorded(values, *args, **settings):
        seen.append(values)
        return given(values, *args, **settings)

    monkeypatch.setattr(erasing.measure, "mean_interval", recorded)
    monkeypatch.setattr(erasing, "random_eraser", lambda *args: drawn.append(real(*args)) or drawn[-1])
    found = erase(trained, copies(30), "resid_post.1@-1", draws=3)
    row, pairs = found.frame.set_index("erased"), copies(30).split("test").on(trained)
    change = found.intervention
    for name, values, edits in (("nothing", seen[0], []), ("concept", seen[1], [change])):
        gaps = [sign * measure.logit_diff(trained.logits(side, *edits), pairs.answer, pairs.foil)
                for sign, side in ((1, pairs.clean), (-1, pairs.corrupted))]  # fmt: skip
        assert np.allclose(values, (torch.stack(gaps) > 0).double().mean(0)), "one number for each pair"
        assert row.accuracy[name] == pytest.approx(values.mean())
        assert row.logit_diff[name] == pytest.approx(float(torch.stack(gaps).mean()), abs=1e-4)
    assert row.accuracy["random"] == pytest.approx(found.draws.mean()) and len(found.draws) == 3
    for matrix, _ in drawn:
        assert np.linalg.matrix_rank(np.eye(32) - matrix, tol=1e-6) == found.rank == 1
    pairs = copies(30).on(trained)
    x = trained.activations([*pairs.clean, *pairs.corrupted], "resid_post.1@-1")
    spread = (x - x.mean(0)).norm(dim=1).mean()
    assert row.moved["concept"] == pytest.approx(float((found.apply(x) - x).norm(dim=1).mean() / spread), rel=1e-3)
    assert row.moved["nothing"] == 0


def test_without_splits_a_behaviour_is_measured_on_what_the_eraser_has_not_seen(trained):
    task = wb.Task(copying(30))
    found = examples(trained, task)
    rows = erasing.Behaviour(trained, task, None, found, ("test", "ood")).rows
    assert list(rows) == [""] and set(rows[""]) == set(found.pair[found.rows("test")]) and len(rows[""]) == 10
