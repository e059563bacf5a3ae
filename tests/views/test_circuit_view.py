"""The circuit view without a browser: the slider is `Circuit.top`, a click is a component, the curve belongs to its scores."""

import numpy as np
import pytest

import workbench as wb
from workbench.locate.circuit import Circuit, Curve, Faithfulness
from workbench.locate.circuit.attribution import all_edges
from workbench.model.edges import wiring


@pytest.fixture(scope="module")
def scores(llama):
    wired = wiring(llama)
    edges, rng = all_edges(wired), np.random.default_rng(0)
    numbers = rng.normal(size=len(edges))
    return Circuit(edges, numbers, wired.sizes, len(edges), "circuit.eap", "logit_diff", "words", numbers - 0.1, numbers + 0.1,
                   np.full(len(edges), 0.5))  # fmt: skip


@pytest.fixture(scope="module")
def curve(scores):
    sizes = np.array([0.05, 0.2, 1.0])
    edges = np.array([len(scores.top(float(size))) for size in sizes])
    return Curve(sizes, edges, np.array([0.1, 0.6, 1.0]), np.array([0.2, 0.7, 1.0]), np.array([[0.0, 0.1, 1.0]]), scores.method,
                 "words", 4, 0.1)  # fmt: skip


def test_it_draws_the_circuit_of_the_size_and_nothing_else(scores):
    view = wb.show(scores, size=30)
    for size, by in ((30, "size"), (30, "route"), (80, "sign"), (len(scores), "size")):
        view.by, view.size = by, size
        top = scores.top(size, by)
        assert view.circuit.edges == top.edges and (view._size.value, view._by.value) == (size, by)
        data = view._graph.data
        names = [node["name"] for node in data["nodes"]]
        strongest, drawn = np.argsort(-np.abs(top.scores), kind="stable"), iter(data["edges"])
        for i in strongest:  # a shared key or value goes to several heads
            for reader in top.readers(top.edges[i].target):
                source, target, kind, score, low, high, null, faint = next(drawn)
                assert (names[source], names[target], kind) == (
                    str(top.edges[i].source),
                    str(reader),
                    top.edges[i].target.kind,
                )
                assert score == pytest.approx(top.scores[i], rel=1e-3) and (low, high, null) == pytest.approx(
                    (score - 0.1, score + 0.1, 0.5), abs=1e-3
                )
                assert faint == (abs(top.scores[i]) <= 0.5)
        assert next(drawn, None) is None


def test_parts_stay_in_place_and_layers_run_upwards(scores):
    view = wb.show(scores, size=5)
    first = {node["name"]: (node["x"], node["y"]) for node in view._graph.data["nodes"]}
    view.size = 180
    assert first == {node["name"]: (node["x"], node["y"]) for node in view._graph.data["nodes"]}
    assert first["embed"][1] < first["z.0.1"][1] < first["mlp_out.0"][1] < first["z.1.1"][1] < first["logits"][1]
    layers = {one["label"]: (one["from"], one["to"]) for one in view._graph.data["layers"]}
    assert "Hexagon" not in view._graph.data["note"]
    assert list(layers) == ["layer 0", "layer 1", "layer 2"] and layers["layer 0"][1] < layers["layer 1"][0]


def test_a_click_is_a_component_that_can_be_cut(scores, llama):
    view = wb.show(scores, size=len(scores))
    view._toggle.click()  # without a mouse
    assert view.selected == [wb.Component.parse(view._part.value)] and view._toggle.description == "remove"
    number = {node["name"]: k for k, node in enumerate(view._graph.data["nodes"])}
    view._graph.selected = [number["z.1.2"], number["mlp_out.0"]]  # what clicks do
    assert view.selected == [wb.Component.parse("z.1.2"), wb.Component.parse("mlp_out.0")]
    assert (
        view.code == f'circuit = scores.top({len(scores)})\nat = ["z.1.2", "mlp_out.0"]'
        and view._part.value == "mlp_out.0"
    )
    assert llama.logits("w4 w5", wb.Zero(at=view.selected)).shape == (1, 64)
    view._toggle.click()
    assert [str(one) for one in view.selected] == ["z.1.2"]
    view.selected = ["embed"]
    assert view._graph.selected == [number["embed"]]
    with pytest.raises(ValueError, match="logits cannot be selected"):
        view.selected = ["logits"]
    with pytest.raises(ValueError, match=r"z\.9\.9 is no part"):
        view.selected = ["z.9.9"]


def test_the_curve_stands_beside_with_the_size_marked(scores, curve):
    view = wb.show(scores, curve, size=round(0.2 * len(scores)))
    assert view._lines.data["mark"] == view.size and view._lines.data["at"][-1] == len(scores)
    lines = {one["label"]: one["y"] for one in view._lines.data["series"]}
    assert lines == {
        "random rankings": [0.0, 0.1, 1.0],
        "largest |score|": [0.2, 0.7, 1.0],
        "largest score": [0.1, 0.6, 1.0],
    }
    assert f"faithfulness 0.70 with {view.size} edges; random 0.10" in view._words.value
    view.by = "sign"
    assert "faithfulness 0.60" in view._words.value and 'by="sign"' in view.code
    view.size += 1
    assert "not measured at this size; 0.60 with" in view._words.value and view.size in view._size.options
    view._lines.selected = [0]  # a click on the curve
    assert view.size == round(0.05 * len(scores)) == view._size.value and view._lines.selected == []
    assert len(view.figure().axes) == 2
    view.by = "route"
    assert "faithfulness" in view._words.value and "0.10" not in view._words.value


def test_without_a_curve_it_says_what_to_call(scores):
    view = wb.show(scores)
    assert "wb.locate.circuit.curve(model, task, scores)" in view._words.value and view._lines.data == {}
    assert len(view.figure().axes) == 1


def test_one_faithfulness(scores):
    kept = len(scores.top(50))
    one = Faithfulness(
        0.8, 0.7, 0.9, np.array([0.1]), np.ones(3), np.zeros(3), np.ones(3), kept, scores.whole, "logit_diff", "", 1.0
    )
    view = wb.show(scores, one, size=50)
    assert f"faithfulness 0.80 [0.70, 0.90] with {kept} edges; random circuits 0.10" in view._words.value
    assert "not measured" not in view._words.value
    view.size = 180
    assert "not measured with" in view._words.value


def test_refuses(scores, curve):
    with pytest.raises(TypeError, match=r"curve = wb\.locate\.circuit\.curve"):
        wb.show(scores, 0.7)
    other = Circuit(scores.edges, scores.scores[::-1], scores.sizes, scores.whole, scores.method)
    with pytest.raises(ValueError, match="other scores"):
        wb.show(other, curve)
    view = wb.show(scores)
    for wrong in ({"size": 0}, {"size": len(scores) + 1}, {"by": "luck"}):
        with pytest.raises(ValueError, match=r"give a number of edges|choose 'size'"):
            view.set_trait(*next(iter(wrong.items())))
    with pytest.raises(ValueError, match="no edge"):
        wb.show(scores.only(np.zeros(len(scores), bool)))


def test_a_circuit_by_hand_and_one_without_any_path(llama, scores):
    view = wb.show(Circuit.of(llama, ["embed -> q.0.1", "z.0.1 -> logits"]))
    assert view.size == 2 and [node["label"] for node in view._graph.data["nodes"]] == ["embed", "0.1", "logits"]
    assert not any(edge[-1] for edge in view._graph.data["edges"])  # no null, so none is within it
    view.size = 1
    assert view._graph.data["edges"] == [] and "No path" in view._graph.data["note"] and view._toggle.disabled


def test_features_and_the_error_term_are_parts(scores):
    edges = (
        "embed -> feature.mid.3",
        "embed -> feature.mid.error",
        "feature.mid.3 -> logits",
        "feature.mid.error -> logits",
    )
    found = Circuit(
        edges, np.array([1.0, 0.2, -0.5, 0.1]), scores.sizes, 40, "circuit.feature_edges", saes={"mid": "resid_post.1"}
    )
    view = wb.show(found)
    labels = {node["name"]: (node["label"], node["fixed"]) for node in view._graph.data["nodes"]}
    assert labels["feature.mid.3"] == ("3", False) and labels["feature.mid.error"] == ("err", True)
    assert len(view._graph.data["edges"]) == 4 and [one["label"] for one in view._graph.data["layers"]] == ["mid"]
    assert "Hexagons: features of the SAE 'mid' at resid_post.1" in view._graph.data["note"]
    assert view.figure().axes[0].get_title(loc="left") == "circuit.feature_edges, 4 of 40 edges"
    assert "wb.locate.circuit.keep(model, task, view.circuit.nodes)" in view._words.value
    view.selected = ["feature.mid.3"]
    with pytest.raises(ValueError, match=r"feature\.mid\.error cannot be selected"):
        view.selected = ["feature.mid.error"]
