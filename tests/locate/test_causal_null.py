"""The null of patching: thresholds that 5 % of pairs without an effect exceed, and random changes as large."""

import numpy as np
import pytest
import torch
from tiny import copying

import workbench as wb
from workbench import measure
from workbench.component import Component
from workbench.locate.causal import patch
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
    moved = as_far(trained.names, base, source, range(4), seed=0)
    for site, heads in ((("z", 1), 4), (("neuron", 0), 48), (("mlp_out", 2), 1)):
        wanted, got = (
            (run.acts[site] - base.acts[site]).unflatten(-1, (heads, -1)).norm(dim=-1) for run in (source, moved)
        )
        assert torch.allclose(wanted, got, atol=1e-5) and not torch.allclose(source.acts[site], moved.acts[site])


def test_matched_components_are_others_of_the_same_layers(trained):
    pool = trained.names.expand([Component.parse("z.*.*")])
    chosen = [Component.parse("z.1.0@end"), Component.parse("z.1.2"), Component.parse("z.0.1")]
    for some in matched(trained, chosen, pool, 20, 0):
        assert sorted(one.layer for one in some) == [0, 1, 1] and not {one.at(None) for one in some} & {
            one.at(None) for one in chosen
        }
        assert [one.position for one in some] == ["end", None, None] and len({one.at(None) for one in some}) == 3
    assert matched(trained, pool[:11], pool, 5, 0) == []
