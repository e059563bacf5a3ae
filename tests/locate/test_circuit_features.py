"""Circuits of SAE features: identities of terms and sums, agreement with exact patching, known dictionaries, the graph."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import build, copying, tokenizer

import workbench as wb
from workbench import measure
from workbench.locate import causal, gradient
from workbench.locate.causal.null import partners
from workbench.locate.circuit import Circuit, Edge, exact, faithfulness, feature_edges, keep, nodes
from workbench.locate.circuit.feature_edges import _coefficients
from workbench.plot import png
from workbench.sae import SAE

PLACES = {"resid_post.0": {}, "resid_pre.1": {"architecture": "topk", "k": 5}, "resid_mid.1": {}, "attn_out.1": {},
          "mlp_out.1": {"reads": wb.Component("mlp_in", 1), "apply_b_dec_to_input": False}, "z.1.2": {},
          "resid_post.1": {"normalize": "layer_norm"}, "resid_post.2": {"architecture": "jumprelu"}}  # fmt: skip


def task(n=4):
    return wb.Task(copying(n), "copying")


def dictionary(model, at="resid_post.0", d_sae=40, **more) -> SAE:
    """A random dictionary, in which about half of the features fire."""
    rng = torch.Generator().manual_seed(0)
    d_in = d_out = model.names.d_head if at.startswith("z") else model.names.d_model
    if more.get("architecture") == "jumprelu":
        more["threshold"] = torch.full((d_sae,), 0.3)
    random = lambda *shape: torch.randn(*shape, generator=rng) / shape[0] ** 0.5  # noqa: E731
    return SAE(random(d_in, d_sae), random(d_sae), random(d_sae, d_out), random(d_out), at, name="d", **more)


def two_sided(model, at) -> SAE:
    """The dictionary that explains everything: each dimension, and each turned round."""
    eye = torch.eye(model.names.d_model)
    zero = torch.zeros(2 * len(eye)), torch.zeros(len(eye))
    return SAE(torch.cat([eye, -eye], 1), zero[0], torch.cat([eye, -eye]), zero[1], at, name="d")


@pytest.fixture
def fresh(trained):
    """The trained model; what a test attaches is taken off again."""
    yield trained
    trained.detach()


@pytest.fixture(params=PLACES)
def taken_apart(fresh, request):
    """The trained model with a random dictionary at one place; both."""
    return fresh, fresh.attach(dictionary(fresh, request.param, **PLACES[request.param]))


def every(sae, *but) -> list:
    return [sae.feature(j) for j in range(sae.d_sae) if j not in but]


ERROR = "feature.d.error"


def of(scores) -> dict:
    """Feature number (or "error") -> [prompt], of the dictionary's terms."""
    rows = zip(scores.components, scores.per_prompt, strict=True)
    return {one.index: row for one, row in rows if one.kind == "feature"}


def test_all_terms_kept_are_the_clean_run_and_none_at_a_stream_the_corrupted_run(taken_apart):
    model, sae = taken_apart
    before = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    for rest in ("corrupted", "mean"):
        whole = keep(model, task(), [*every(sae), ERROR], rest=rest, random=0)
        assert np.allclose(whole.kept, whole.clean, atol=1e-5) and float(whole) == pytest.approx(1, abs=1e-5)
        assert not np.allclose(whole.corrupted, whole.clean, atol=0.01)
    if sae.at.kind in ("resid_pre", "resid_post"):
        some = keep(model, task(), every(sae)[:3], random=0)
        assert np.allclose(some.corrupted, task().score(model, prompt="corrupted"), atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.hf.state_dict().items())


def test_a_mean_is_taken_by_position_over_both_sides_of_prompts_of_one_length(fresh):
    fresh.attach(dictionary(fresh, "resid_post.0"))
    rows = copying(5)
    for row in rows[3:]:
        row |= {side: f"w11 {row[side]}" for side in ("clean", "corrupted")}
    kept = keep(fresh, wb.Task(rows), ["feature.d.0"], rest="mean", random=0)
    for part in (slice(0, 3), slice(3, 5)):
        mean = fresh.activations(
            [row[side] for row in rows[part] for side in ("clean", "corrupted")], "resid_post.0"
        ).mean(0)
        change = [wb.Replace(f"resid_post.0@{p}", x) for p, x in enumerate(mean)]
        assert np.allclose(kept.corrupted[part], wb.Task(rows[part]).score(fresh, *change), atol=1e-4)


def test_the_null_is_the_change_to_another_pairs_corrupted_prompt(fresh, monkeypatch):
    seen, sae = {}, fresh.attach(dictionary(fresh, "resid_post.0"))
    monkeypatch.setattr(measure, "null_threshold", lambda effects: seen.setdefault("under", effects).mean((0, 2)))
    scores, pairs = nodes(fresh, task(6), others="mlp_out", steps=0, seed=4), task(6).on(fresh)
    stream, written = at = [wb.Component.parse(one) for one in ("resid_post.0", "mlp_out.2")]
    _, clean, slopes = fresh.gradients(pairs.clean, at, lambda logits, rows: logits[:, 6] - logits[:, 7])
    corrupted = fresh.activations(pairs.corrupted, at)

    def changes(new):
        """By feature, and of the FFN: [prompt, number]."""
        features = (sae.encode(new[stream]) - sae.encode(corrupted[stream])) * (slopes[stream] @ sae.W_dec.T)
        return features.sum(1), ((new[written] - corrupted[written]) * slopes[written]).sum((1, 2))

    others = partners(pairs, pairs.corrupted, [list(range(6))], 2, 4)
    draws = [{one: x[[own[draw] for own in others]] for one, x in corrupted.items()} for draw in range(2)]
    for new, found in zip([clean, *draws], [scores.per_prompt, *seen["under"]], strict=True):
        features, ffn = changes(new)
        for one, got in zip(scores.components, found, strict=True):
            if one == written or (one.kind == "feature" and one.index != "error"):
                assert np.allclose(got, ffn if one == written else features[:, one.index], atol=1e-4), one
        assert np.abs(found).max() > 1e-3


def test_a_feature_counts_for_the_share_of_the_way_on_which_it_fires(fresh):
    """From -3 to 1 in every dimension: those for above 0 fire on a quarter of the way, those for below on the rest."""
    sae, slope = two_sided(fresh, "resid_post.0"), torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    way = torch.stack([torch.full((1, 1, 32), -3 + 4 * (k + 0.5) / 8) for k in range(8)])
    pushes, rest = _coefficients(sae, way, slope, [3, 32 + 3])
    assert torch.allclose(pushes[0, 0], slope[0, 0, 3] * torch.tensor([0.25, -0.75]))
    assert rest.abs().max() < 1e-6  # the two of a dimension take it all


def test_all_but_one_kept_is_that_one_patched(taken_apart):
    model, sae = taken_apart
    if sae.at.kind == "z":
        return  # `causal.patch` has no features of a head
    scores = nodes(model, task(), others=(), steps=2, null=False)
    one = max((c for c in scores.components if c.index != "error"), key=lambda c: abs(scores[c]))
    patched = causal.patch(model, task(), one, positions="all", direction="noising", null=False, progress=False)
    kept = keep(model, task(), every(sae, one.index), error=True, random=0)
    assert np.allclose(kept.clean - kept.kept, patched.per_prompt[0], atol=1e-4)
    assert np.abs(patched.per_prompt[0]).max() > 1e-3


def test_terms_add_up_to_the_whole_site(taken_apart):
    model, sae = taken_apart
    scores = nodes(model, task(), others=(), steps=0, null=False)
    total = sum(of(scores).values())
    site = gradient.attribution_patch(model, task(), sae.at, positions="all", direction="noising", null=False)
    assert np.allclose(total, site.per_prompt[0], atol=1e-4) and np.abs(total).max() > 1e-3
    many = nodes(model, task(), others=(), steps=50, null=False)  # on the way, the whole exact effect
    site = causal.patch(model, task(), sae.at, positions="all", direction="noising", null=False, progress=False)
    assert np.allclose(sum(of(many).values()), site.per_prompt[0], rtol=0.02, atol=0.02)


def test_on_a_linear_model_attribution_is_exact_patching():
    hf = build("llama")
    with torch.no_grad():
        for block in hf.model.layers[1:]:  # nothing is added behind the first block, and no norm stands at the end
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    hf.model.norm = torch.nn.Identity()
    model = wb.load(hf, tokenizer=tokenizer())
    sae = model.attach(dictionary(model))
    for steps in (0, 3):
        scores = nodes(model, task(), others=(), steps=steps)
        found = [one for one in scores.components if one.index != "error"]
        patched = causal.patch(model, task(), found, positions="all", direction="noising", null=False, progress=False)
        assert list(patched.components) == found and len(found) > 10
        assert np.allclose(scores.per_prompt[: len(found)], patched.per_prompt, atol=1e-3)
        error = keep(model, task(), every(sae), error=False, random=0)
        assert np.allclose(of(scores)["error"], error.clean - error.kept, atol=1e-3)


def test_a_useless_dictionary_leaves_all_to_the_error_and_a_whole_one_nothing(fresh):
    sae = fresh.attach(replace(dictionary(fresh, "resid_post.1"), W_dec=torch.zeros(40, 32)))
    scores = nodes(fresh, task(), others=())
    assert scores.top(1) == [wb.Component.parse(ERROR)] and len(scores.components) == 1
    assert float(keep(fresh, task(), [ERROR])) == pytest.approx(1, abs=1e-4)
    assert float(keep(fresh, task(), every(sae))) == pytest.approx(0, abs=1e-4)
    fresh.detach()
    sae = fresh.attach(two_sided(fresh, "resid_post.1"))
    assert abs(nodes(fresh, task(), others=())[ERROR]) < 1e-4
    assert float(keep(fresh, task(), every(sae))) == pytest.approx(1, abs=1e-4)


def test_heads_and_ffns_beside_features(fresh):
    sae = fresh.attach(two_sided(fresh, "mlp_out.1"))
    scores = nodes(fresh, task())
    kinds = {str(one) for one in scores.components if one.kind == "mlp_out"}
    assert kinds == {"mlp_out.0", "mlp_out.2"} and sum(one.kind == "z" for one in scores.components) == 12
    assert scores.cost == 2 + 20 * 6 and scores.null and np.isfinite(scores.null_p95).all()
    assert list(scores.components) == sorted(scores.components)
    assert len(scores.columns["site"]) == len(scores.components)
    assert (scores.ci_lo <= scores.values + 1e-9).all() and 0 < len(scores.above_null()) < len(scores.components)
    again = nodes(fresh, task())
    assert np.array_equal(again.values, scores.values) and np.array_equal(again.null_p95, scores.null_p95)
    # a head kept out is that head replaced
    heads = [f"z.{layer}.{head}" for layer in range(3) for head in range(4) if (layer, head) != (0, 3)]
    kept = keep(fresh, task(), heads, random=2)
    patched = causal.patch(fresh, task(), "z.0.3", positions="all", direction="noising", null=False, progress=False)
    assert np.allclose(kept.clean - kept.kept, patched.per_prompt[0], atol=1e-4)
    assert kept.edges == 11 and kept.whole == 12 and "of 12 nodes" in repr(kept) and kept.plot() is not None
    some = keep(fresh, task(), [*every(sae), "mlp_out.0"], random=0)  # then mlp_out.2 is exchanged, heads are not
    assert some.whole == 2 * 32 + 1 + 2 and some.edges == 65


def test_the_best_features_keep_more_than_random_ones(course):
    course.detach()
    sae = course.attach(SAE.load(SAE.names()[0]))
    try:
        pairs = wb.Task.load("ioi").split("fit")[:8]
        scores = nodes(course, pairs, others=())
        gap = scores.clean - scores.corrupted
        assert scores.values.sum() == pytest.approx(gap, abs=0.1 * gap)
        best = [one for one in scores.top(200) if one.index != "error"]
        for error in (True, False):
            kept = keep(course, pairs, best, error=error, random=2)
            assert float(kept) > kept.random.max() + 0.1 and kept.whole == sae.d_sae + 1
    finally:
        course.detach()


def test_edges_of_features_add_up(fresh):
    sae = fresh.attach(dictionary(fresh, "resid_post.0"))
    terms = [*every(sae), ERROR]
    scores = nodes(fresh, task(), others=(), null=False)
    graph = feature_edges(fresh, task(), terms)
    out, into = {}, {}
    for edge, row in zip(graph.edges, graph.per_prompt, strict=True):
        if edge.source.kind == "feature":
            out[edge.source.index] = out.get(edge.source.index, 0) + row
        if edge.target.kind == "feature":
            into.setdefault(edge.source, {})[edge.target.index] = row
    assert len(out) == 41 and len(into) == 1 + 4 + 1
    for index, row in of(scores).items():  # what reads a feature is all that it does
        assert np.allclose(out[index], row, atol=1e-4)
    # what is written into the stream is read by the features and the error, all of it
    assert np.allclose(sum(sum(row.values()) for row in into.values()), sum(of(scores).values()), atol=1e-4)
    # edges past the dictionary are gone, others are those of eap_ig
    assert "embed -> q.1.0" not in graph and "z.0.1 -> logits" not in graph and "z.1.0 -> logits" in graph
    assert graph["embed -> v.0.0"] == pytest.approx(wb.locate.circuit.eap_ig(fresh, task(), steps=10)["embed -> v.0.0"])
    assert len(graph) == graph.whole and np.isfinite(graph.null_p95).all()


def test_a_feature_that_is_on_in_both_runs_gets_from_its_writers_what_it_gives(fresh):
    sae = two_sided(fresh, "resid_post.0")
    fresh.attach(replace(sae, b_enc=torch.full((64,), 1e3)))  # the encoder never leaves its straight part
    scores = nodes(fresh, task(), others=(), null=False)
    graph = feature_edges(fresh, task(), every(sae), null=False)
    into = {}
    for edge, row in zip(graph.edges, graph.per_prompt, strict=True):
        if edge.target.kind == "feature":
            into[edge.target.index] = into.get(edge.target.index, 0) + row
    found = of(scores)
    assert len(found) == 65 and all(np.allclose(into[j], found[j], atol=2e-3) for j in range(64))


def test_a_graph_with_features_is_cut_down_drawn_and_kept(fresh, tmp_path):
    fresh.attach(dictionary(fresh, "resid_pre.1"))
    scores = nodes(fresh, task())
    graph = feature_edges(fresh, task(), scores.top(25))
    small = graph.top(60)
    assert 0 < len(small) <= 60 and small.pruned().edges == small.edges
    assert {"feature", "embed", "logits"} <= {one.kind for one in small.nodes}
    small.plot().savefig(tmp_path / "graph.png")
    again = Circuit.load(small.save(tmp_path / "graph.json"))
    assert again.edges == small.edges and again.saes == {"d": "resid_pre.1"} and again.nodes == small.nodes
    assert 0 <= float(keep(fresh, task(), again.nodes, error=True, random=0)) <= 1.5
    with pytest.raises(ValueError, match="Keep the nodes"):
        faithfulness(fresh, task(), small)
    assert not Circuit.of(fresh, ["embed -> v.0.0", "z.0.0 -> feature.d.3", "feature.d.4 -> logits"][:1]).pruned().edges
    assert str(Edge.parse("feature.d.error->q.2.1")) == "feature.d.error -> q.2.1"


def features_of(numbers, heads=4):
    """A graph from the embedding through these features of one dictionary, and an FFN on each side, to the logits."""
    ends = [f"feature.d.{j}" for j in numbers]
    edges = [f"embed -> {end}" for end in ends] + [f"{end} -> mlp_out.1" for end in ends]
    edges += ["embed -> mlp_out.0", f"mlp_out.0 -> {ends[0]}", "mlp_out.1 -> logits"]
    return Circuit(edges, np.linspace(-1, 1, len(edges)), (2, heads, heads), 10**6, "circuit.feature_edges",
                   saes={"d": "resid_post.0"})  # fmt: skip


@pytest.mark.parametrize("numbers", [(3, "error"), (7, 1395, "error"), range(16000, 16030), range(1000, 1060)], ids=len)
def test_the_numbers_of_features_fit_their_hexagons_which_lie_apart(numbers):
    """Whatever the number of digits and of features, up to the 120 edges that are drawn."""
    from matplotlib.patches import Polygon

    graph = features_of(numbers)
    figure = graph.plot(edges=200)
    png(figure)  # lays it out
    ax = figure.axes[0]
    boxes = [one.get_window_extent() for one in ax.patches if isinstance(one, Polygon) and len(one.get_xy()) == 7]
    words = {one.get_text(): one.get_window_extent() for one in ax.texts}
    assert len(boxes) == len(numbers) and (("err" in words) == ("error" in numbers))
    for box, j in zip(boxes, numbers):
        text = words["err" if j == "error" else str(j)]
        tip = 0.15 * box.height  # the corners of the text stay clear of the slanted ends
        assert box.x0 + tip < text.x0 and text.x1 < box.x1 - tip and box.y0 < text.y0 and text.y1 < box.y1
    assert all(one.x1 < two.x0 for one, two in pairwise(boxes))
    assert boxes[-1].x1 < words["F0"].x0  # the column of FFNs
    assert "Hexagons: features of the SAE 'd'" in (note := figure._supxlabel.get_text().replace("\n", " "))
    assert ("err is what" in note) == ("error" in numbers)
    assert "%" not in repr(graph) and f"{len(graph)} of 1000000 edges" in repr(graph)


def test_where_no_dictionary_is_no_hexagon_is_explained(fresh):
    circuit = Circuit.of(fresh, ["embed -> v.0.0", "z.0.0 -> logits"])
    assert "Hexagon" not in circuit.plot()._supxlabel.get_text() and "%)" in repr(circuit)


def test_dictionaries_are_named_by_themselves_or_by_their_names(fresh):
    sae, twin = dictionary(fresh), replace(dictionary(fresh, "resid_pre.2"), name="late")
    for one in (sae, twin):
        fresh.attach(one)
    by_name, itself = (nodes(fresh, task(), saes, others=(), steps=2, null=False) for saes in (["d"], [sae]))
    assert by_name.components == itself.components and np.array_equal(by_name.values, itself.values)
    assert {one.name for one in itself.components} == {"d"}
    both = nodes(fresh, task(), [sae, "late"], others=(), steps=2, null=False)
    assert {one.name for one in both.components} == {"d", "late"}
    assert nodes(fresh, task(), twin, others=(), steps=2, null=False).components[0].name == "late"
    for saes, said in [(replace(sae, name="e"), r"The SAE 'e' is not attached .*attached: d, late.* Type: sae = model\.attach"),
                       ("e", r"The SAE 'e' is not attached .* Type: sae = model\.attach"),
                       ([replace(sae, W_dec=-sae.W_dec)], "Another SAE is attached as 'd'")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            nodes(fresh, task(), saes)


def test_refusals(fresh):
    with pytest.raises(ValueError, match="No SAE is attached"):
        nodes(fresh, task())
    sae = fresh.attach(dictionary(fresh, "mlp_out.1"))
    fresh.attach(dictionary(fresh, "mlp_out.1"), "twin")
    for run, said in [(lambda: nodes(fresh, task()), "Two SAEs take mlp_out.1"),
                      (lambda: nodes(fresh, task(), "e"), "SAE 'e' is not attached"),
                      (lambda: nodes(fresh, task(), "d", others="q"), "'z', 'mlp_out'"),
                      (lambda: nodes(fresh, task(), "d", steps=-1), "steps=-1"),
                      (lambda: nodes(fresh, task(), "d", metric="accuracy"), "no gradient"),
                      (lambda: keep(fresh, task(), ["feature.d.3", "mlp_out.1"]), "taken apart"),
                      (lambda: keep(fresh, task(), ["neuron.1.3"]), "is no node"),
                      (lambda: keep(fresh, task(), ["feature.d.40"]), "out of range"),
                      (lambda: keep(fresh, task(), ["feature.d.3@-1"]), "without a position"),
                      (lambda: keep(fresh, task(), ["embed"]), "Nothing was named"),
                      (lambda: keep(fresh, task(), every(sae), rest="zero"), "rest='zero'"),
                      (lambda: feature_edges(fresh, task(), ["feature.d.3"]), "between two blocks"),
                      (lambda: feature_edges(fresh, task(), ["z.1.1"]), "features of one SAE"),
                      (lambda: exact(fresh, task(), ["z.1.1 -> feature.d.3"]), "no edge z.1.1 -> feature.d.3"),
                      (lambda: Edge("feature.d.1", "feature.d.2"), "do not read each other"),
                      (lambda: fresh.logits("w4 w5", wb.Zero(at=ERROR)), "node of circuits only")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            run()
