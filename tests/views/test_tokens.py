"""The token views without a browser: a lens and the contexts of a feature; set a trait, read a trait."""

import pytest

import workbench as wb
from workbench.locate.features.contexts import Contexts

PROMPTS = ["w4 w5 w6 w7", "w9 w8"]


@pytest.fixture
def lens(llama):
    return wb.locate.vocabulary.logit_lens(llama, PROMPTS)


@pytest.fixture
def contexts():
    rows = [{"tokens": ["<b>a</b>", "cat"], "activations": [0.0, 2.0], "peak": 1, "text": 3, "max": 2.0},
            {"tokens": ["dog"], "activations": [1.0], "peak": 0, "text": 0, "max": 1.0}]  # fmt: skip
    parts = [("bone", 1.2)], [("sea", -0.5)], 0.01, 2.0, 500
    return [Contexts(wb.Component.parse(f"feature.mid.{k}"), rows[k:], *parts) for k in (0, 1)]


def test_a_lens_shows_what_each_stream_says(lens, llama):
    view = wb.show(lens)
    data = view._tokens.data
    assert data["table"] and data["columns"] == PROMPTS[0].split()
    assert [row["name"] for row in data["rows"]] == [str(one) for one in lens.components]
    last = llama.logits(PROMPTS[0], positions="all")[0]
    assert [cell["text"] for cell in data["rows"][-1]["cells"]] == [llama.token(i) for i in last.argmax(-1)]
    assert data["rows"][-1]["cells"][3]["value"] == pytest.approx(last[3].softmax(-1).max().item(), abs=1e-5)


def test_a_choice_is_a_component(lens):
    view = wb.show(lens)
    assert view.selected is None
    view._tokens.selected = [1, 2]  # what a click does
    assert view.selected == lens.components[1].at(2) and view.code == f'"{view.selected}"'
    view.prompt = 1
    assert view._tokens.data["columns"] == PROMPTS[1].split() and view.selected is None and view._which.value == 1
    view._tokens.selected = [0, 1]
    assert view.selected.position == 1
    view._colour.value = "kl"
    assert all(
        abs(cell["value"]) < 1e-5 for cell in view._tokens.data["rows"][-1]["cells"]
    )  # the last says what is said
    assert view.figure().axes


def test_contexts_of_features(contexts):
    view = wb.show(contexts)
    data = view._tokens.data
    assert not data["table"] and data["rows"][0]["cells"][0]["text"] == "<b>a</b>"
    assert [cell["value"] for cell in data["rows"][0]["cells"]] == [0.0, 1.0] and data["rows"][0]["cells"][1]["marked"]
    assert "bone +1.20" in data["note"] and view.code == '"feature.mid.0"'
    view.number = 1
    assert view.selected == wb.Component.parse("feature.mid.1") and len(view._tokens.data["rows"]) == 1
    assert len(wb.show(contexts[0]).value) == 1 and wb.show(contexts[0]).figure().axes
