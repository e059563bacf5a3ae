"""The view of token scores without a browser: colours are the values, a position is a component in every line."""

import numpy as np
import pytest

import workbench as wb
from workbench.locate.gradient.tokenscores import TokenScores

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def tokens():
    by_token = [np.array([0.5, -1.0, 0.25]), np.array([2.0, 0.0, 0.5]), np.array([1.0, -0.5])]
    parts = [wb.Component("embed", position=k) for k in (0, 1)]
    effects = np.array([[one[k] for one in by_token] for k in (0, 1)])
    values, null = effects.mean(1), np.array([0.3, 0.9])
    texts = [["w4", EVIL, "w6"], ["w4", "w7", "w8"], ["w9", "$x$"]]
    return TokenScores(parts, values, values - 0.1, values + 0.1, null, effects, "gradient.saliency", "logit_diff",
                       null="dealt anew", labels={0: "·", 1: "w7"}, tokens=texts, by_token=by_token, gaps=np.array([np.nan] * 3))  # fmt: skip


def test_every_token_has_its_value_and_the_mean_its_null(tokens):
    view = wb.show(tokens)
    mean, *rows = view._tokens.data["rows"]
    assert [cell["text"] for cell in rows[0]["cells"]] == ["w4", EVIL, "w6"]
    for i, row in enumerate(rows):  # one scale for all: the largest is 2
        assert [cell["value"] for cell in row["cells"]] == pytest.approx(tokens.by_token[i] / 2)
    assert [cell["value"] for cell in mean["cells"]] == pytest.approx(tokens.values / 2)
    assert [cell["faint"] for cell in mean["cells"]] == [False, True]  # +1.17 over 0.3, -0.5 within 0.9
    assert [cell["text"] for cell in mean["cells"]] == ["0", "w7"]  # where prompts differ, the position
    assert "within the null" in mean["cells"][1]["tip"] and "within" not in mean["cells"][0]["tip"]
    assert not any(cell.get("faint") for row in rows for cell in row["cells"])
    assert view._tokens.data["scale"]["high"] == "+2" and "dealt anew" in view._tokens.data["note"]


def test_a_click_is_a_component_in_all_lines(tokens, llama):
    view = wb.show(tokens, selected=["embed@2"])
    assert view._tokens.selected == [1, 2, 2, 2]  # prompts 0 and 1 have a third token
    view._tokens.selected = [1, 1]  # what a click does
    assert view.selected == [wb.Component.parse("embed@1")] and view.code == '["embed@1"]'
    assert view._tokens.selected == [0, 1, 1, 1, 2, 1, 3, 1]
    assert llama.logits("w4 w5 w6", wb.Zero(at=view.selected)).shape == (1, 64)
    view._clear.click()
    assert view.selected == [] and view._tokens.selected == []


def test_other_prompts(tokens):
    view = wb.show(tokens, prompts=1)
    assert [row["name"] for row in view._tokens.data["rows"]] == ["mean", "prompt 0"]
    view._from.value = 2
    assert view.prompts == [2] and [cell["text"] for cell in view._tokens.data["rows"][1]["cells"]] == ["w9", "$x$"]
    view.prompts = [0, 2]
    assert len(view._tokens.data["rows"]) == 3 and len(view.figure().axes[0].texts) == 5
    assert repr(view).endswith("prompts 0, 2)")


def test_refuses(tokens):
    with pytest.raises(ValueError, match=r"none of the 3 prompts"):
        wb.show(tokens, prompts=[3])
    with pytest.raises(ValueError, match=r"embed@0 to embed@2"):
        wb.show(tokens, selected=["embed@3"])
    with pytest.raises(ValueError, match="no token"):
        wb.show(tokens, selected=["z.0.1"])


def test_scores_of_a_model(llama, words):
    scores = wb.locate.gradient.saliency(llama, words(5, 5, 5, 7), how="norm")
    view = wb.show(scores, prompts=[3])
    cells = view._tokens.data["rows"][1]["cells"]
    assert len(cells) == 7 and max(abs(cell["value"]) for cell in cells) <= 1
    assert [cell["key"] for cell in cells][:2] == ["embed@0", "embed@1"]
