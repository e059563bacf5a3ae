"""Circuits: identities of runs in which every part reads its own mixture, known circuits, evaluation, refusals."""

import json

import numpy as np
import pytest
import torch
from test_gradient import told_apart
from tiny import build, copying, tokenizer

import workbench as wb
from workbench import measure
from workbench.locate.causal.null import partners
from workbench.locate.circuit import (
    Circuit,
    Edge,
    acdc,
    curve,
    eap,
    eap_ig,
    exact,
    faithfulness,
    flow,
    learned,
    masks,
    minimality,
    stability,
)
from workbench.locate.circuit.attribution import DRAWS, all_edges, null_of
from workbench.locate.circuit.evaluation import connected, random_masks
from workbench.locate.circuit.results import Curve
from workbench.measure import kl
from workbench.model.edges import attribution, capture, mixed, wiring
from workbench.model.edges.parts import Norm
from workbench.model.plan import Prompts

PLANTED = ("induction", "lookup", "inhibition")


def task(n=12):
    return wb.Task(copying(n), "copying")


@pytest.fixture(scope="module")
def planted():
    """Name -> (model, its task, its true edges)."""
    found = {}
    for name in PLANTED:
        folder = wb.task.DATA / "planted" / name
        truth = json.loads((folder / "circuit.json").read_text())["edges"]
        edges = [Edge(source, f"{part}.{target[2:]}" if part else target) for source, target, part in truth]
        found[name] = wb.load(folder), wb.Task.load(folder / "task.jsonl").split("fit")[:24], edges
    return found


def runs(model, seed=0):
    """Clean and corrupted prompts, some of them shorter, and their two runs."""
    ids = torch.randint(10, 60, (3, 9), generator=torch.Generator().manual_seed(seed))
    other = ids.clone()
    other[:, 3], other[:, 5] = (other[:, 3] + 1) % 50 + 10, (other[:, 5] + 7) % 50 + 10
    sides = [Prompts([side[0], side[1][2:], side[2]]) for side in (ids, other)]
    row = model.names.row
    if row.norm_attn and row.norm_attn == row.norm_mlp:
        with pytest.raises(ValueError, match="through one norm"):
            wiring(model)
        pytest.skip("attention and FFN share a norm")
    wired = wiring(model)
    return wired, *(capture(model, wired, side) for side in sides)


def replaced(model, own, other, at):
    """Logits of one prompt with a component's activation from another prompt."""
    there = model.activations([other], at)[0]
    return model.logits([own], wb.Replace([f"{at}@{p}" for p in range(len(own))], there))[0]


def close(a, b, tolerance=1e-4):
    return torch.allclose(a, b, atol=tolerance * float(b.abs().max()), rtol=0)


# identities, on every architecture


def test_all_edges_are_the_clean_run_and_none_the_corrupted_run(tiny):
    wired, clean, corrupted = runs(tiny)
    whole, which = wired.exists.float(), torch.arange(3)
    assert not close(clean.logits, corrupted.logits, 0.01)
    assert close(mixed(tiny, wired, clean, corrupted, whole, which), clean.logits)
    assert close(mixed(tiny, wired, clean, corrupted, 0 * whole, which), corrupted.logits)
    rows = mixed(tiny, wired, clean, corrupted, torch.stack([whole, 0 * whole, whole]), which)
    assert close(rows, torch.stack([clean.logits[0], corrupted.logits[1], clean.logits[2]]))


def test_a_part_that_reads_the_corrupted_stream_gives_its_corrupted_activation(tiny):
    wired, clean, corrupted = runs(tiny)
    own, other = list(clean.prompts.ids), list(corrupted.prompts.ids)
    for kind, at in (("q", "q.1.2"), ("k", "k.1.1"), ("v", "v.1.0"), ("mlp_out", "mlp_out.1")):
        mask = wired.exists.float()
        mask[wired.targets.index(wb.Component.parse(at))] = 0
        found = mixed(tiny, wired, clean, corrupted, mask, torch.arange(3))
        if kind in tiny.names.refused or (kind in "qk" and tiny.hf.config.model_type == "olmo2"):
            continue  # OLMo 2 divides the queries of a layer by the size of all of them together
        for i in range(3):
            assert close(found[i], replaced(tiny, own[i], other[i], at)), at
            assert not close(found[i], clean.logits[i], 2e-4)


def test_attribution_is_the_gradient_by_masks(tiny):
    wired, clean, corrupted = runs(tiny)

    def read(logits, prompts):
        return logits[:, 11] - logits[:, 12]

    values = clean.streams[0][None]
    (found,) = attribution(
        tiny, wired, clean.prompts, ("resid_pre", 0), values, [clean.writes - corrupted.writes], read
    )
    mask = wired.exists.float().repeat(3, 1, 1).requires_grad_()
    read(mixed(tiny, wired, clean, corrupted, mask, torch.arange(3)), None).sum().backward()
    assert close(found, mask.grad * wired.exists, 1e-3) and found.abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_one_head_cut_from_all_its_readers_is_that_head_replaced(architecture):
    model = wb.load(build(architecture), tokenizer=tokenizer())
    wired, clean, corrupted = runs(model)
    mask = wired.exists.float()
    mask[:, wired.sources.index(wb.Component.parse("z.1.2"))] = 0
    found = mixed(model, wired, clean, corrupted, mask, torch.arange(3))
    assert not close(found, clean.logits, 1e-3)
    if architecture == "gemma2":  # a norm behind W_O: the other heads' shares change with this head
        return
    assert close(found[0], replaced(model, clean.prompts.ids[0], corrupted.prompts.ids[0], "z.1.2"))


def test_a_run_goes_on_from_what_is_known(llama):
    wired, clean, corrupted = runs(llama)
    mask = (torch.rand(wired.exists.shape, generator=torch.Generator().manual_seed(1)) < 0.6) * wired.exists.float()
    which = torch.tensor([0, 2, 1, 1])
    whole, delta = mixed(llama, wired, clean, corrupted, mask, which, keep=True)
    later = mixed(llama, wired, clean, corrupted, mask, which, known=delta[: 1 + 2 * 5])
    assert close(later, whole) and not close(whole, clean.logits[which], 0.01)


# scores


def test_patching_one_edge_into_the_logits_is_its_direct_effect(trained):
    scores = exact(trained, task(), ["z.1.2 -> logits", "mlp_out.2 -> logits", "z.0.1 -> v.2.0"])
    wired, pairs = wiring(trained), task().on(trained)
    clean, corrupted = (capture(trained, wired, Prompts(side)) for side in (pairs.clean, pairs.corrupted))
    for edge in scores.edges[1:]:
        source = wired.sources.index(edge.source)
        x = clean.last - clean.writes[source] + corrupted.writes[source]
        logits = trained.hf.lm_head(trained.hf.model.norm(x))[:, -1]
        before, after = (x[:, 6] - x[:, 7] for x in (clean.logits, logits))
        assert np.allclose(scores.per_prompt[scores.edges.index(edge)], (before - after).detach(), atol=1e-3)
    mask = wired.exists.float()
    mask[wired.targets.index(wb.Component.parse("v.2.0")), wired.sources.index(wb.Component.parse("z.0.1"))] = 0
    slow = mixed(trained, wired, clean, corrupted, mask, torch.arange(12))
    lost = (clean.logits - slow)[:, 6] - (clean.logits - slow)[:, 7]
    assert np.allclose(scores.per_prompt[0], lost, atol=1e-3) and abs(scores.scores[0]) > 1e-4


@pytest.mark.parametrize("name", PLANTED)
def test_written_circuits_are_found(planted, name):
    model, pairs, true = planted[name]
    oracle, steps = exact(model, pairs), eap_ig(model, pairs)
    gap = oracle.scores.max()
    # edges that carry the same in both runs, such as the query of a token that does not change, have nothing to patch
    carry = [edge for edge in true if abs(oracle[edge]) > 0.05 * gap]
    assert len(carry) >= 3 and oracle.auroc(carry) == 1
    assert steps.auroc(carry) > 0.98 and eap_ig(model, pairs, of="activations").auroc(carry) > 0.98
    assert eap(model, pairs).auroc(carry) < 0.9  # saturated attention has no gradient
    assert float(faithfulness(model, pairs, Circuit.of(model, true), random=0)) == pytest.approx(1, abs=0.02)
    assert float(faithfulness(model, pairs, steps.top(len(true) + 4), random=0)) == pytest.approx(1, abs=0.02)
    assert float(faithfulness(model, pairs, Circuit.of(model, true).without(carry[0]), random=0)) < 0.1


def test_acdc_finds_the_written_path(planted):
    model, pairs, true = planted["induction"]
    found = acdc(model, pairs[:6], 0.01)
    by_metric = acdc(model, pairs[:6], 0.05, metric="logit_diff")
    for some in (found, by_metric):
        assert set(some.edges) <= set(true) and float(faithfulness(model, pairs, some, random=0)) > 0.98


@pytest.mark.parametrize("metric, threshold", [("kl", 3e-4), ("logit_diff", 3e-3)])
def test_acdc_keeps_what_cutting_one_by_one_keeps(llama, word_pairs, metric, threshold):
    """By a metric, edges that hurt go, however much."""
    pairs = word_pairs[:2]
    found = acdc(llama, pairs, threshold, metric=metric)
    wired, on = wiring(llama), pairs.on(llama)
    clean, corrupted = (capture(llama, wired, Prompts(side)) for side in (on.clean, on.corrupted))
    mask, now = wired.exists.float(), 0.0
    for t in reversed(range(len(wired.targets))):
        for s in reversed(range(wired.known[t])):
            trial = mask.clone()
            trial[t, s] = 0
            now_said = mixed(llama, wired, clean, corrupted, trial, torch.arange(2))
            lost = (clean.logits - now_said)[:, 10] - (clean.logits - now_said)[:, 20]
            away = float((kl(clean.logits, now_said) if metric == "kl" else lost).mean())
            if away - now < threshold:
                mask, now = trial, away
    left = [f"{wired.sources[s]} -> {wired.targets[t]}" for t, s in mask.nonzero().tolist()]
    assert 10 < len(found) < 0.8 * found.whole and set(found.edges) == set(Circuit.of(llama, left).pruned().edges)


def test_learned_masks_keep_the_behaviour(planted, monkeypatch):
    model, pairs, _ = planted["lookup"]
    found = masks(model, pairs, price=0.01, steps=60)
    small = found.only(found.scores > 0.5)
    assert len(small) < 20 and float(faithfulness(model, pairs, small, random=0)) > 0.9
    assert np.array_equal(masks(model, pairs, steps=3).scores, masks(model, pairs, steps=3).scores)
    seen = []
    monkeypatch.setattr(learned, "mixed", lambda *args: seen.append(args[4].detach()) or mixed(*args))
    masks(model, pairs, steps=3)
    gates = torch.stack(seen)[:, wiring(model).exists]  # hard: some all the way open, none beyond
    assert gates.min() >= 0 and gates.max() == 1 and (gates == 1).float().mean() > 0.1


def test_flow_gives_every_reader_shares_that_sum_to_one(llama, word_pairs):
    shares = flow(llama, word_pairs)
    totals = {}
    for edge, score in zip(shares.edges, shares.scores, strict=True):
        totals[edge.target] = totals.get(edge.target, 0) + score
    assert np.allclose(list(totals.values()), 1, atol=1e-5) and shares.scores.min() >= 0
    small = shares.top(12, by="route")
    assert 0 < len(small) <= 12 and small.pruned().edges == small.edges


def test_flow_by_hand(llama, word_pairs):
    """How much nearer each write brings the sum, at the last position for the logits and on average elsewhere, without padding."""
    rows = [dict(row) for row in word_pairs[:2]]
    rows[0] |= {side: f"w11 w12 {rows[0][side]}" for side in ("clean", "corrupted")}
    shares, wired = flow(llama, wb.Task(rows)), wiring(llama)
    for i, row in enumerate(rows):
        run = capture(llama, wired, Prompts([llama.ids(row["clean"])]))
        for target, known in (("v.1.0", 6), ("mlp_out.1", 10), ("logits", 16)):
            writes = run.writes[:known, 0]
            x = writes.sum(0)
            near = (x.abs().sum(-1) - (x - writes).abs().sum(-1)).clamp(min=0)
            share = near / near.sum(0)
            for source, wanted in zip(wired.sources, share[:, -1] if target == "logits" else share.mean(1)):
                place = shares.edges.index(Edge(source, target))
                assert shares.per_prompt[place, i] == pytest.approx(float(wanted), abs=1e-4)


def test_edges_into_the_logits_and_their_null_by_hand(trained, monkeypatch):
    """The change of what is written times the slope at the end; for the null the change to another pair's corrupted prompt."""
    rows = [row | {"spans": {}} for row in copying(6)]
    rows[::2] = [row | {"corrupted": row["corrupted"].replace(" w5 ", " w8 ")} for row in rows[::2]]
    some, seen = wb.Task(rows), {}  # partners differ at the cause, on the corrupted side only
    monkeypatch.setattr(measure, "null_threshold", lambda effects: seen.setdefault("under", effects).mean((0, 2)))
    found, pairs, wired = eap(trained, some, seed=4), some.on(trained), wiring(trained)
    clean, corrupted = (capture(trained, wired, Prompts(side)) for side in (pairs.clean, pairs.corrupted))
    x = clean.last.detach().requires_grad_()
    logits = trained.hf.lm_head(trained.hf.model.norm(x))[:, -1]
    (slope,) = torch.autograd.grad((logits[:, 6] - logits[:, 7]).sum(), x)
    others = partners(pairs, pairs.corrupted, [list(range(6))], 2, 4)
    into = [i for i, edge in enumerate(found.edges) if edge.target.kind == "logits"]
    changes = [clean.writes - corrupted.writes]
    changes += [corrupted.writes[:, [own[draw] for own in others]] - corrupted.writes for draw in range(2)]
    for change, got in zip(changes, [found.per_prompt, *seen["under"]], strict=True):
        assert np.allclose(got[into], (change * slope).sum((2, 3)), atol=1e-3) and np.abs(got[into]).max() > 0.05
    _, low, high = measure.mean_interval(found.per_prompt.T, pairs.task.clusters(), draws=DRAWS, seed=4)
    assert np.allclose([found.ci_lo, found.ci_hi], [low, high])


def test_prompts_without_another_pair_are_in_no_null():
    effects = np.arange(24.0).reshape(2, 3, 4)
    under, why = null_of(effects, [[1, 2], None, [0, 2], None])
    assert np.array_equal(under, effects[..., [0, 2]]) and not why
    assert null_of(effects, [[1, 2], None, None, None])[0] is None and null_of(None, [[1, 2]] * 4)[0] is None


def test_integrated_gradients_are_complete_with_enough_steps(course):
    # every path begins with an edge out of the embedding, so these add up to the whole gap
    pairs = wb.Task.load("ioi").split("test")[:4]
    many, few = (eap_ig(course, pairs, steps=steps, null=False) for steps in (40, 1))
    assert many.completeness == pytest.approx(1, abs=0.05) and abs(few.completeness - 1) > abs(many.completeness - 1)
    assert many.cost == 82 and len(many) == many.whole == len(all_edges(wiring(course)))


def test_repeatable_with_interval_and_null_and_without_side_effects(trained):
    weights = {k: v.clone() for k, v in trained.hf.state_dict().items()}
    one, two = (eap_ig(trained, task(), seed=3) for _ in range(2))
    assert np.array_equal(one.scores, two.scores) and np.array_equal(one.null_p95, two.null_p95)
    assert (one.ci_lo <= one.scores + 1e-9).all() and (one.scores <= one.ci_hi + 1e-9).all()
    assert "another pair" in one.null and 0 < len(one.above_null()) < len(one)
    assert all(torch.equal(v, weights[k]) for k, v in trained.hf.state_dict().items())
    alone = eap(trained, task(1))
    assert np.isnan(alone.ci_lo).all() and np.isnan(alone.null_p95).all() and "no other pair" in alone.why


# evaluation


def test_sizes_from_nothing_to_everything(planted):
    model, pairs, _ = planted["inhibition"]
    line = curve(model, pairs, eap_ig(model, pairs), sizes=(0.0, 0.05, 0.2, 1.0), random=2)
    assert line.by_sign[[0, -1]] == pytest.approx([0, 1], abs=1e-4) and line.by_size[-1] == pytest.approx(1, abs=1e-4)
    assert line.by_size[1] > 0.9 > line.random[:, 1].max() and line.random.shape == (2, 4)
    assert line.edges[-1] == 172 and list(line.frame.columns)[-1] == "random"
    assert "CPR" in repr(line) and line.plot() is not None


def test_a_curve_is_the_faithfulness_of_the_strongest_edges(llama, word_pairs):
    """Of pairs whose gaps differ, so that the ratio of means is no mean of ratios."""
    wired, rng = wiring(llama), np.random.default_rng(0)
    edges, some = all_edges(wired), wb.Task(told_apart(llama, word_pairs).rows[:4])
    scores = Circuit(edges, rng.normal(size=len(edges)), wired.sizes, len(edges))
    line = curve(llama, some, scores, sizes=(0.7, 0.9, 1.0), random=0)
    for i, size in enumerate((0.7, 0.9)):
        for by, found in (("sign", line.by_sign), ("size", line.by_size)):
            kept = faithfulness(llama, some, scores.top(size, by), random=0)
            assert found[i] == pytest.approx(float(kept), abs=1e-4)
            shares = np.sort((kept.kept - kept.corrupted) / (kept.clean - kept.corrupted))
            assert np.allclose(kept.frame.share, shares) and abs(shares.mean() - float(kept)) > 1e-3
    assert np.abs(line.by_sign - line.by_size).max() > 0.1


def test_areas_by_hand():
    sizes, signed, sized = np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.5, 1.0]), np.array([0.0, 1.2, 1.0])
    line = Curve(sizes, sizes, signed, sized, np.array([signed, sized]), "m", "t", 3, 0.0)
    assert line.cpr == pytest.approx(0.75 * 0.5 + 1.25 * 0.5) and line.cmd == pytest.approx(0.6 * 0.5 + 0.1 * 0.5)
    assert line.random_cpr == pytest.approx([1.0, 0.85]) and line.random_cmd == pytest.approx([0.5, 0.35])


def test_random_circuits_have_as_many_edges_and_differ(llama):
    wired = wiring(llama)
    drawn = random_masks(wired, 37, 3, seed=0)
    assert all(int(mask.sum()) == 37 and (mask <= wired.exists).all() for mask in drawn)
    assert len({tuple(mask.flatten().tolist()) for mask in drawn}) == 3


def test_a_shared_value_leads_to_each_head_of_its_group(llama):
    for head, leads in enumerate((False, False, True, True)):  # v.0.1 is read by heads 2 and 3
        circuit = Circuit.of(llama, ["embed -> v.0.1", f"z.0.{head} -> logits"])
        assert connected(wiring(llama), circuit.mask(wiring(llama))) == leads == (len(circuit.pruned()) == 2)


def test_random_rankings_have_the_areas_of_chance(course):
    pairs = wb.Task.load("ioi").split("test")[:5]
    line = curve(course, pairs, eap(course, pairs, null=False), random=12)
    assert line.random_cpr.mean() == pytest.approx(0.25, abs=0.02)
    assert line.random_cmd.mean() == pytest.approx(0.75, abs=0.02)
    assert line.cmd < 0.2 < 0.5 < line.cpr


def test_a_tenth_of_the_edges_does_indirect_objects_with_new_names(course):
    every = wb.Task.load("ioi")
    scores = eap_ig(course, every.split("fit")[:40], null=False)
    small = scores.top(0.1)
    kept = faithfulness(course, every.split("test")[:24], small, random=1)
    assert small.share <= 0.1 and float(kept) > 0.8 and abs(kept.random[0]) < 0.2
    assert kept.ci_lo <= float(kept) <= kept.ci_hi and len(kept.frame) == 24
    assert stability(scores, 0.05) > 0.5


def test_minimality_is_what_each_cut_costs(planted):
    model, pairs, true = planted["inhibition"]
    circuit = Circuit.of(model, [*true, "embed -> q.1.0"])
    worth = minimality(model, pairs[:8], circuit)
    assert worth["z.1.1 -> q.2.2"] > 0.9 and abs(worth["embed -> q.1.0"]) < 1e-6
    one = faithfulness(model, pairs[:8], circuit.without("z.1.1 -> q.2.2"), random=0)
    whole = faithfulness(model, pairs[:8], circuit, random=0)
    assert worth["z.1.1 -> q.2.2"] == pytest.approx(float(whole) - float(one), abs=1e-5)


# files, refusals


def test_saved_and_loaded_and_drawn(trained, tmp_path):
    scores = eap(trained, task())
    small = scores.top(60)
    again = Circuit.load(small.save(tmp_path / "circuit.json"))
    assert len(small)
    assert again.edges == small.edges and np.allclose(again.scores, small.scores)
    assert again.frame.edge[0] == small.frame.edge[0] and again.per_prompt is None and np.isfinite(again.null_p95).all()
    assert repr(again) == repr(small) and "eap" in repr(again)
    for value in (again, scores, faithfulness(trained, task(), again)):
        value.plot().savefig(tmp_path / "picture.png")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no Circuit"):
        Circuit.load(tmp_path / "other.json")


def test_refusals(trained, llama, course):
    same = wb.Task([dict(row, corrupted=row["clean"]) for row in task()])
    for run in (lambda: eap(trained, same), lambda: faithfulness(trained, same, eap(trained, task()))):
        with pytest.raises(ValueError, match="hardly differ"):
            run()
    for run, said in [(lambda: eap(trained, task(), metric="accuracy"), "no gradient"),
                      (lambda: eap_ig(trained, task(), of="weights"), "of='weights'"),
                      (lambda: eap_ig(trained, task(), steps=0), "steps=0"),
                      (lambda: exact(trained, task(), ["z.1.1 -> q.9.0"]), "no edge z.1.1 -> q.9.0"),
                      (lambda: exact(trained, task(), []), "No edges were given"),
                      (lambda: acdc(trained, task(), 0), "threshold=0"), (lambda: masks(trained, task(), price=-1), "price=-1"),
                      (lambda: faithfulness(course, "ioi", eap(trained, task())), "belongs to a model"),
                      (lambda: curve(trained, task(), eap(trained, task()), sizes=(0.5, 0.1)), "rising")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            run()


def test_rows_of_one_entity_are_one_observation(trained):
    """The same rows four times over tell nothing new: the interval is that of the rows."""
    some, many = wb.Task(copying(6)), wb.Task(copying(6) * 4)
    once, again = (eap(trained, rows, null=False) for rows in (some, many))
    assert (
        np.allclose([once.ci_lo, once.ci_hi], [again.ci_lo, again.ci_hi], atol=1e-3) and (once.ci_lo < once.ci_hi).any()
    )
    circuit = once.top(60)
    one, four = (faithfulness(trained, rows, circuit, random=0) for rows in (some, many))
    assert (one.ci_lo, one.ci_hi) == (pytest.approx(four.ci_lo, abs=1e-4), pytest.approx(four.ci_hi, abs=1e-4))
    one, four = (minimality(trained, rows, circuit) for rows in (some, many))
    assert np.allclose([one.ci_lo, one.ci_hi], [four.ci_lo, four.ci_hi], atol=1e-4) and (one.ci_lo < one.ci_hi).any()


def test_edges_in_bfloat16_are_those_of_float32(course):
    half, few = wb.load("course", dtype=torch.bfloat16), wb.Task.load("ioi").split("test")[:6]
    one, two = (eap(model, few, null=False) for model in (course, half))
    assert np.corrcoef([one[edge] for edge in one.edges], [two[edge] for edge in one.edges])[0, 1] > 0.99


@pytest.mark.parametrize("width", [64, 768])
def test_a_layer_norm_in_bfloat16_is_known_as_one(width):
    norm = torch.nn.LayerNorm(width).to(torch.bfloat16).requires_grad_(False)
    assert Norm(norm, width, torch.zeros(1, dtype=torch.bfloat16)).centres
