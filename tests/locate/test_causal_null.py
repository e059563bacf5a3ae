"""The null of patching: thresholds that 5 % of pairs without an effect exceed, and random changes as large."""

from itertools import combinations

import numpy as np
import pytest
import torch
from tiny import build, copying, tokenizer

import workbench as wb
from workbench import measure
from workbench.component import Component
from workbench.locate.causal import ablate, between, knockout, patch, path_patch, trace
from workbench.locate.causal.null import as_far, draws_of, matched, partners
from workbench.model.sweep import capture


def test_how_often_the_null_is_drawn():
    assert draws_of(True) == 2 and draws_of(False) == 0 and draws_of(3) == 3
    with pytest.raises(ValueError, match="null=1"):
        draws_of(1)


def shuffled(model, task, seed):
    """Pairs whose restored side is another pair's prompt of the side that is run: nothing is carried."""
    pairs, rows = task.on(model), []
    for row, (other,) in zip(task, partners(pairs, pairs.corrupted, [list(range(len(task)))], 1, seed)):
        rows.append({k: v for k, v in row.items() if k != "spans"} | {"clean": task.rows[other]["corrupted"]})
    return wb.Task(rows, task.name)


def exceeding(model, task, at, seeds, monkeypatch):
    monkeypatch.setattr("workbench.locate.causal.patching.refuse_without_gap", lambda *args: None)
    found = []
    for seed in seeds:
        scores = patch(model, shuffled(model, task(seed), 1000 + seed), at, seed=seed)
        live = (scores.per_prompt != 0).any(1)
        found.append((np.abs(scores.values) > scores.null_p95)[live].mean())
    return np.mean(found)


def test_of_shuffled_pairs_five_percent_exceed_their_null(trained, monkeypatch):
    share = exceeding(trained, lambda seed: wb.Task(copying(20, seed)), ["z.*.*", "mlp_out.*", "v.*.*"],
                      range(12), monkeypatch)  # fmt: skip
    assert 0.03 <= share <= 0.07


@pytest.mark.slow
def test_of_shuffled_pairs_of_the_bundled_model_too(course, monkeypatch):
    """Components of one sweep rise and fall together: 12 seeds leave 2 points of noise, 48 half a point."""
    found = {}
    for name in ("ioi", "person_city", "mood", "currency"):
        whole = wb.Task.load(name).on(course).task
        lengths = [len(ids) for ids in whole.on(course).clean]
        common = max(set(lengths), key=lengths.count)
        rows = [row for row, length in zip(whole, lengths) if length == common]

        def task(seed, rows=rows, name=name):
            return wb.Task([rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:24]], name)

        found[name] = exceeding(course, task, "z", range(48), monkeypatch)
    print(found)
    assert all(0.03 <= share <= 0.07 for share in found.values())


def test_pairs_without_a_null_do_not_change_its_unit(trained, monkeypatch):
    """The threshold is in the units of the score, also where some pairs have no other of their length."""
    seen, rows = {}, [*copying(8), *({k: f"w11 {v}" if k in ("clean", "corrupted") else v for k, v in row.items()}
                                     for row in copying(2, 9))]  # fmt: skip
    real = measure.null_threshold
    monkeypatch.setattr(measure, "null_threshold", lambda effects: seen.setdefault("limit", real(effects)))
    scores = patch(trained, wb.Task(rows), "z")
    assert np.allclose(scores.null_p95 * abs(scores.clean - scores.corrupted), seen["limit"])


def other_causes(n):
    """Pairs of which every second one has w8 instead of w5, so that the two sides have different partners."""
    rows = [row | {"spans": {}} for row in copying(n)]
    rows[::2] = [row | {"corrupted": row["corrupted"].replace(" w5 ", " w8 ")} for row in rows[::2]]
    return wb.Task(rows)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_the_null_by_hand(trained, direction, drawn):
    """In each draw the component comes from the partner's prompt of the side that is run."""
    task, side = other_causes(6), "corrupted" if direction == "denoising" else "clean"
    patch(trained, task, "mlp_out.1", positions="all", direction=direction, null=2, seed=4)
    pairs = task.on(trained)
    ids = getattr(pairs, side)
    others, acts = partners(pairs, ids, [list(range(6))], 2, 4), trained.activations(ids, "mlp_out.1")
    for i, row in enumerate(task):
        one = wb.Task([row])
        for draw, other in enumerate(others[i]):
            change = [wb.Replace(f"mlp_out.1@{p}", acts[other][p]) for p in range(7)]
            expected = one.score(trained, *change, prompt=side) - one.score(trained, prompt=side)
            assert drawn["under"][draw, 0, i] == pytest.approx(expected[0], abs=1e-4)
    assert np.abs(drawn["under"]).max() > 1e-2


@pytest.mark.parametrize("call, is_share", [
    (lambda m, t: patch(m, t, "z", null=3), True),
    (lambda m, t: path_patch(m, t, "z", "mlp_out.2", null=3), True),
    (lambda m, t: between(m, wb.load(build("llama", 1), tokenizer=tokenizer()), t, "z", null=3), True),
    (lambda m, t: trace(m, t, "mlp_out", draws=3), True),
    (lambda m, t: ablate(m, t, "z", null=3), False),
    (lambda m, t: knockout(m, t, 2, null=3), False),
], ids=["patch", "path_patch", "between", "trace", "ablate", "knockout"])  # fmt: skip
def test_draws_of_a_null_differ_and_are_in_the_units_of_the_score(trained, call, is_share, drawn):
    scores = call(trained, wb.Task(copying(8)))
    assert np.allclose(scores.null_p95 * (abs(scores.clean - scores.corrupted) if is_share else 1), drawn["limit"])
    assert len(drawn["under"]) == 3
    for one, other in combinations([*drawn["under"], scores.per_prompt], 2):
        assert np.abs(one - other).max() > 1e-6


def test_which_side_is_called_the_answer_does_not_matter(trained):
    turned = [row | {"answer": row["foil"], "foil": row["answer"]} for row in copying(8)]
    for call in (lambda t: patch(trained, t, "z"), lambda t: path_patch(trained, t, "z")):
        one, two = call(wb.Task(copying(8))), call(wb.Task(turned))
        assert one.clean == pytest.approx(-two.clean) and (one.null_p95 > 0).all()
        assert np.allclose(one.values, two.values) and np.allclose(one.null_p95, two.null_p95)


def test_partners_share_the_template_and_not_the_cause(trained):
    """Where two such are there: of three rows with w5 and two with w8 in each template, those with the other word."""
    rows = [row | {"template": "ab"[i % 2], "spans": {}} for i, row in enumerate(copying(10))]
    rows = [
        row if i < 6 else row | {"corrupted": row["corrupted"].replace(" w5 ", " w8 ")} for i, row in enumerate(rows)
    ]
    pairs = wb.Task(rows).on(trained)
    found = partners(pairs, pairs.corrupted, [list(range(10))], 40, 0)
    for i, own in enumerate(found):
        assert set(own) == {j for j in range(10) if j % 2 == i % 2 and (j < 6) != (i < 6)}
    assert len({tuple(own) for own in found}) > 2  # drawn, each for itself
    alone = partners(pairs, pairs.corrupted, [[0, 1, 3, 5]], 40, 0)[0]  # nobody shares the template
    assert set(alone) == {1, 3, 5}


def test_partners_are_of_the_same_length_and_another_pair(trained):
    long = [dict(row, clean="w11 " + row["clean"], corrupted="w11 " + row["corrupted"]) for row in copying(4, 9)]
    pairs = wb.Task([*copying(6), *long]).on(trained)
    found = partners(pairs, pairs.corrupted, [list(range(10))], 5, 0)
    assert all(
        other != i and len(pairs.clean[other]) == len(pairs.clean[i]) for i, own in enumerate(found) for other in own
    )
    assert (
        found
        == partners(pairs, pairs.corrupted, [list(range(10))], 5, 0)
        != partners(pairs, pairs.corrupted, [list(range(10))], 5, 1)
    )
    assert partners(pairs, pairs.corrupted, [[0, 6], [1, 2]], 2, 0)[:3] == [None] * 3  # nobody to choose from


def test_a_random_change_is_as_large_for_each_component(trained):
    pairs = wb.Task(copying(4)).on(trained)
    found = [Component.parse(one) for one in ("z.1.0", "neuron.0.3", "mlp_out.2")]
    base, source = (capture(trained, side, found) for side in (pairs.corrupted, pairs.clean))
    donors = [1, 2, 3, 0]
    moved = as_far(trained.names, base, source, donors, seed=0)
    for site, heads in ((("z", 1), 4), (("neuron", 0), 48), (("mlp_out", 2), 1)):
        wanted, got = (
            (x - base.acts[site]).unflatten(-1, (heads, -1)).norm(dim=-1)
            for x in (source.acts[site][donors], moved.acts[site])
        )
        assert torch.allclose(wanted, got, atol=1e-5) and not torch.allclose(source.acts[site], moved.acts[site])


def test_matched_components_are_others_of_the_same_layers(trained):
    pool = trained.names.expand([Component.parse("z.*.*")])
    chosen = [Component.parse("z.1.0@end"), Component.parse("z.1.2"), Component.parse("z.0.1")]
    for some in matched(trained, chosen, pool + trained.names.expand([Component.parse("neuron.*.*")]), 20, 0):
        assert {one.kind for one in some} == {"z"}
        assert sorted(one.layer for one in some) == [0, 1, 1] and not {one.at(None) for one in some} & {
            one.at(None) for one in chosen
        }
        assert [one.position for one in some] == ["end", None, None] and len({one.at(None) for one in some}) == 3
    assert matched(trained, pool[:11], pool, 5, 0) == []
