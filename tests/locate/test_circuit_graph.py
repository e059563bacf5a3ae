"""Circuits as values: edges with their numbers, sorted, cut down, compared."""

import numpy as np
import pytest

import workbench as wb
from workbench.locate.circuit import Circuit, Edge, stability
from workbench.measure import bootstrap_weights


def _graph(n):
    """The first edges of a model of 3 layers and 4 heads, with scores."""
    sources = [wb.Component("embed"), *(wb.Component("z", 0, i) for i in range(4))]
    edges = [Edge(source, f"{kind}.1.{i}") for kind in "qkv" for i in range(4) for source in sources][:n]
    return edges, np.arange(n, dtype=float), (3, 4, 4), 479


def test_edges_are_written_and_read():
    edge = Edge.parse("z.2.1->q.4.3")
    assert str(edge) == "z.2.1 -> q.4.3" and Edge.parse(str(edge)) == edge and Edge("z.2.1", "q.4.3") == edge
    assert (
        sorted([Edge.parse("z.0.0 -> logits"), Edge.parse("embed -> mlp_out.0"), Edge.parse("embed -> v.0.1")])[
            0
        ].target.kind
        == "v"
    )
    for text, said in [("z.2.1", "with an arrow"), ("z.4.1 -> q.4.3", "backwards"), ("q.1.1 -> logits", "cannot be the source"),
                       ("z.1.1 -> z.2.1", "cannot be the target"), ("z.*.1 -> logits", "cannot be the source")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Edge.parse(text)


def test_a_circuit_is_a_set_that_can_be_cut_down(llama):
    circuit = Circuit.of(
        llama, ["embed -> v.0.0", "z.0.1 -> q.1.2", "z.1.2 -> logits", "z.1.0 -> logits", "embed -> k.2.0"]
    )
    assert (
        len(circuit) == 5
        and "z.0.1->q.1.2" in circuit
        and circuit["embed -> v.0.0"] == 1
        and circuit.edges[-1].target.kind == "logits"
    )
    assert set(circuit.pruned()) == {Edge.parse(t) for t in ("embed -> v.0.0", "z.0.1 -> q.1.2", "z.1.2 -> logits")}
    assert len(circuit.without("embed -> v.0.0").pruned()) == 0
    assert circuit.jaccard(circuit.pruned()) == pytest.approx(0.6)
    # two key heads serve four heads: v.0.1 is read by heads 2 and 3
    assert circuit.readers(wb.Component.parse("v.0.1")) == [wb.Component("z", 0, 2), wb.Component("z", 0, 3)]


def test_the_strongest_edges_by_size_and_by_sign():
    circuit = Circuit(_graph(20)[0], np.linspace(-3, 2, 20), (3, 4, 4), 479)
    assert circuit.top(1, prune=False).scores[0] == -3 and circuit.top(1, "sign", prune=False).scores[0] == 2
    assert len(circuit.top(0.02, prune=False)) == 10 and len(circuit.top(5)) == 0
    for size, by, said in [(500, "size", "from 0 to 479"), (1.2, "size", "share"), (3, "best", "by='best'")]:
        with pytest.raises(ValueError, match=said):
            circuit.top(size, by)


def test_every_number_stays_with_its_edge():
    """However edges are given, sorted, cut down: scores, intervals, nulls and values of prompts go along."""
    (edges, scores, *size), order = _graph(20), np.random.default_rng(0).permutation(20)
    scores = np.where(scores % 2 == 1, -scores, scores)
    columns = {"ci_lo": scores - 1, "ci_hi": scores + 1, "null_p95": np.abs(scores) / 2 + 5}
    columns |= {"per_prompt": np.stack([scores, scores + 2], 1)}
    given = {name: column[order] for name, column in columns.items()}
    circuit = Circuit([edges[i] for i in order], scores[order], *size, **given)
    assert circuit.above_null().edges == tuple(edges[11:]) and circuit.share == 20 / 479
    assert circuit.frame.edge[0] == str(edges[19]) and circuit[edges[19]] == -19
    for some in (circuit, circuit.top(7, prune=False), circuit.top(4, "sign", prune=False), circuit.above_null()):
        places = [edges.index(edge) for edge in some.edges]
        assert np.array_equal(some.scores, scores[places])
        assert all(np.array_equal(getattr(some, name), column[places]) for name, column in columns.items())


def test_telling_true_edges_by_hand():
    """Of nine edges three are scored; the true ones are the strongest, which hurts, and one without a score."""
    circuit = Circuit(_graph(3)[0], [-3.0, 1.0, 0.5], (3, 4, 4), 9)
    true = [circuit.edges[0], "z.1.0 -> logits"]
    # the first is ahead of all seven others, the second behind two and level with five
    assert circuit.auroc(true) == pytest.approx((7 + 5 / 2) / 14)


def test_a_route_grows_from_the_logits():
    steps = {
        "z.1.0 -> logits": -0.5,
        "z.0.0 -> q.1.0": 0.3,
        "z.1.1 -> logits": 0.2,
        "embed -> v.1.1": 3.0,
        "embed -> v.1.0": 0.1,
    }
    circuit = Circuit(list(steps), list(steps.values()), (2, 2, 2), 60)
    for count in range(len(steps) + 1):
        assert set(map(str, circuit.top(count, "route", prune=False))) == set(list(steps)[:count])


def test_stability_knows_prompts_that_agree(trained):
    same = Circuit(*_graph(40), per_prompt=np.arange(40)[:, None] + np.zeros(8))
    noise = Circuit(*_graph(40), per_prompt=np.random.default_rng(0).normal(size=(40, 8)))
    assert stability(same, 10) == 1
    drawn = noise.per_prompt @ bootstrap_weights(8, 30, 5).T
    tops = [set(np.argsort(-np.abs(one))[:10].tolist()) for one in drawn.T]
    slow = np.mean([len(a & b) / len(a | b) for i, a in enumerate(tops) for b in tops[:i]])
    assert stability(noise, 10, draws=30, seed=5) == pytest.approx(slow) and 0.1 < slow < 0.9
    with pytest.raises(ValueError, match="several prompts"):
        stability(Circuit(*_graph(40)), 10)
