"""The attention view without a browser: what it holds are the model's patterns; set a trait, read a trait."""

import numpy as np
import pytest
import torch

import workbench as wb

TEXT = "w4 w5 w6 w7 w8"


def test_it_holds_the_patterns_of_the_model(llama):
    view = wb.show(llama, TEXT)
    out = llama.hf(input_ids=llama.ids(TEXT)[None], output_attentions=True).attentions
    assert torch.allclose(view.pattern.unflatten(0, (3, 4)), torch.cat(out), atol=1e-6)
    sent = np.frombuffer(view._patterns.patterns, np.uint8).reshape(12, 5, 5)
    assert np.abs(sent / 255 - view.pattern.numpy()).max() <= 0.5 / 255 + 1e-6
    data = view._patterns.data
    assert data["tokens"] == TEXT.split() and data["heads"][5] == "pattern.1.1" and data["row"][5] == 1
    assert repr(view) == "Attention(3x4 heads, 5 tokens)"


def test_selection_goes_both_ways(llama):
    view = wb.show(llama, TEXT, selected=["L2H1"])
    assert view.code == '["pattern.2.1"]' and view._patterns.selected == [9]
    view.selected = ["z.0.3", "pattern.1.0"]
    assert view._patterns.selected == [3, 4]
    view._patterns.selected = [11]  # what a click does
    assert view.selected == [wb.Component("pattern", 2, 3)] and (view._layer.value, view._head.value) == (2, 3)
    view._toggle.click()
    assert view.selected == []
    view._toggle.click()
    assert llama.logits(TEXT, wb.Zero(view.selected)).shape == (1, 64)


def test_another_prompt(llama):
    view = wb.show(llama, TEXT)
    view.prompt = "w9 w8 w7"
    assert view.pattern.shape == (12, 3, 3) and view._patterns.data["tokens"] == ["w9", "w8", "w7"]
    with pytest.raises(ValueError, match="vocabulary"):
        view.prompt = "dog"
    assert "vocabulary" in view.error


def test_refuses(llama):
    with pytest.raises(ValueError, match=r"pattern\.0\.0 to pattern\.2\.3"):
        wb.show(llama, TEXT, selected=["z.7.0"])
    with pytest.raises(TypeError, match="needs a prompt"):
        wb.show(llama)


def test_picture(llama):
    assert len(wb.show(llama, TEXT, selected=["z.0.0", "z.1.1"]).figure().axes) == 2
    assert len(wb.show(llama, TEXT).figure().axes) == 1
