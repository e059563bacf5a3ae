"""The panel without a browser: what it shows is what the model says with `panel.value`."""

import pytest
import torch
from tiny import copying

import workbench as wb
from workbench.views.panel import pieces, steered

PROMPT = "w4 w9 w30 w31 w12"


@pytest.fixture(scope="module")
def push():
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    return wb.Add("resid_post.1", vector=vector, strength=0.5)


def said(model, panel):
    return model.generate(panel.prompt, panel.value, max_new_tokens=panel.max_new_tokens)


def test_the_text_is_what_the_model_generates_at_every_strength(llama, push):
    panel = wb.show(push, llama, prompt=PROMPT, max_new_tokens=6)
    seen = {panel.text}
    assert panel.text == said(llama, panel) and panel.value == push
    (slider,) = panel._knobs
    for strength in (-0.95, 0.0, 1.0):
        slider.value = strength
        assert panel.value.strength == strength and panel.text == said(llama, panel)
        seen.add(panel.text)
    assert len(seen) > 1
    slider.value = 0.0
    assert panel.text == llama.generate(PROMPT, max_new_tokens=6) == panel._before


def test_the_value_can_be_set(llama, push):
    panel = wb.show(push, llama, prompt=PROMPT, max_new_tokens=4)
    panel.value = 3 * push
    assert panel._knobs[0].value == 1.5 and panel._knobs[0].max >= 1.5 and panel.text == said(llama, panel)
    panel.value = wb.Zero("z.0.1")
    assert isinstance(panel._knobs[0].value, bool) and panel.text == said(llama, panel)
    with pytest.raises(TypeError, match=r"panel\.value is an Intervention or a Recipe; got str"):
        panel.value = "z.0.1"


def test_a_recipe_has_a_slider_for_every_add_and_a_switch_for_the_rest(llama, push):
    recipe = wb.Recipe([wb.Zero(["z.0.1", "z.1.2"]), push, 2 * push.moved("resid_post.2")], name="both")
    panel = wb.show(recipe, llama, prompt=PROMPT, max_new_tokens=4)
    switch, first, second = panel._knobs
    switch.value, second.value = False, -0.5
    assert panel.value == wb.Recipe([push, push.moved("resid_post.2") * -1], name="both")
    assert panel.text == said(llama, panel)
    switch.value = True
    assert len(panel.value) == 3 and panel.value.name == "both" and first.value == 0.5


def test_a_change_without_strength_can_be_switched_off(llama):
    panel = wb.show(wb.Zero("resid_post.0"), llama, prompt=PROMPT, max_new_tokens=4)
    assert panel.text == said(llama, panel) != panel._before
    panel._knobs[0].value = False
    assert panel.value == wb.Recipe(()) and panel.text == panel._before
    panel._knobs[0].value = True
    assert panel.value == wb.Zero("resid_post.0")


def test_a_menu_says_on_which_tokens(llama, push):
    panel = wb.show(push, llama, prompt=PROMPT, max_new_tokens=4)
    (menu,) = panel._places
    assert menu.value == ("both", None)
    menu.value = ("prompt", -1)
    assert panel.value == push.moved("resid_post.1@-1") and panel.text == said(llama, panel)
    menu.value = ("generation", None)
    assert panel.value == push.moved("resid_post.1", phase="generation") and panel.text == said(llama, panel)
    panel.value = push.moved("resid_post.1@2")
    assert panel._places[0].options[0] == ("@2", ("prompt", 2)) and panel.text == said(llama, panel)


def test_a_change_of_weights_has_a_slider_and_acts_on_every_token(llama):
    name = "model.layers.1.mlp.down_proj.weight"
    shape = dict(llama.hf.named_parameters())[name].shape
    delta = wb.Delta(weights={name: torch.randn(shape, generator=torch.Generator().manual_seed(2))})
    panel = wb.show(delta, llama, prompt=PROMPT, max_new_tokens=4)
    assert panel.text == said(llama, panel) != panel._before and panel._places == [None]
    assert all(token["steered"] for token in panel._strip.data["rows"][1]["prompt"])
    panel._knobs[0].value = 0.0
    assert panel.value.strength == 0 and panel.text == panel._before


def test_a_recipe_is_saved_and_loaded(llama, push, tmp_path):
    panel = wb.show(push, llama, prompt=PROMPT, max_new_tokens=3)
    with pytest.raises(ValueError, match="Name a folder"):
        panel._saved(None)
    panel._folder.value = str(tmp_path / "kept")
    panel._saved(None)
    assert wb.Recipe.load(tmp_path / "kept") == wb.Recipe([push]).for_model(llama)
    panel.value = wb.Zero("z.0.1")
    panel._loaded(None)
    assert list(panel.value) == [push] and panel.text == said(llama, panel)


def test_guards_are_drawn_beside_the_metric(trained, push):
    task = wb.Task([row | {"split": "select"} for row in copying(8)], "copying")
    panel = wb.show(20 * push, trained, prompt=PROMPT, task=task, guards=[wb.Task(task.rows, "kept")], max_new_tokens=2)
    panel._measured(None)
    points = panel._points
    wanted = [task.score(trained, panel._at(x), metric="accuracy").mean() for x in points["x"]]
    assert points["guards"]["kept"] == pytest.approx(wanted) and len(set(wanted)) > 1
    assert "data:image/png" in panel._curve.value


def test_steered_tokens_are_marked(llama, push):
    def marks(change):
        row = wb.show(change, llama, prompt=PROMPT, max_new_tokens=3)._strip.data["rows"][1]
        return [t["steered"] for t in row["prompt"]], {t["steered"] for t in row["generated"]}

    assert marks(push) == ([True] * 5, {True})
    assert marks(push.moved("resid_post.1@-2")) == ([False, False, False, True, False], {False})
    assert marks(push.moved("resid_post.1", phase="generation")) == ([False] * 5, {True})
    assert marks(0 * push) == ([False] * 5, {False})
    assert steered(wb.Zero(["z.0.1@0", "z.0.1@3"]), 5) == ({0, 3}, False)


def test_the_next_tokens_are_the_model_s(llama, push):
    bars = wb.show(push, llama, prompt=PROMPT, max_new_tokens=2)._chart.data["bars"]
    before, after = (llama.logits(PROMPT, *change)[0].softmax(-1) for change in ((), (push,)))
    assert len(bars) == 8
    for one in bars:
        (token,) = llama.ids(one["token"]) if one["token"].startswith("w") else [llama.tokenizer.vocab[one["token"]]]
        assert one["before"] == pytest.approx(float(before[token]), abs=1e-6)
        assert one["after"] == pytest.approx(float(after[token]), abs=1e-6)
    assert bars[0]["after"] == pytest.approx(float(after.max()), abs=1e-6)


def test_the_curve_is_the_task_s_score_at_each_strength(llama, push, word_pairs):
    panel = wb.show(push, llama, prompt=PROMPT, task=word_pairs, max_new_tokens=2)
    panel._measure.click()
    points = panel._points
    assert points["x"] == pytest.approx([-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1])
    for x, mean in zip(points["x"], points["mean"], strict=True):
        assert mean == pytest.approx(word_pairs.score(llama, x / push.strength * push).mean(), abs=1e-4)
    assert panel._curve.value.count("<img") == 2 and "alt=" in panel._curve.value
    panel._knobs[0].value = 0.75  # the curve stands, its mark moves
    assert panel._points is points
    panel.value = push.moved("resid_post.0")  # another change, another curve
    assert panel._points is None and panel._curve.value == ""


def test_a_change_without_strength_is_measured_as_a_pair(llama, word_pairs):
    panel = wb.show(wb.Zero("z.0.1"), llama, prompt=PROMPT, task=word_pairs, max_new_tokens=2)
    panel._measure.click()
    assert f"{word_pairs.score(llama, panel.value).mean():+.2f}" in panel._curve.value


def test_the_code_names_the_notebook_s_variables(llama, push, monkeypatch):
    panel = wb.show(push, llama, prompt=PROMPT, max_new_tokens=4)
    assert panel.code == f"model.generate({PROMPT!r}, wb.{push!r}, max_new_tokens=4)"
    names = {"m": llama, "sad": push, "model": None, "table": torch.zeros(2)}
    monkeypatch.setattr("workbench.views.names._notebook", lambda: names)
    assert panel.code == f"m.generate({PROMPT!r}, sad, max_new_tokens=4)"
    panel._knobs[0].value = -0.75
    assert panel.code == f"m.generate({PROMPT!r}, -1.5 * sad, max_new_tokens=4)"
    assert eval(panel.code, dict(names)) == panel.text
    panel.value = wb.Zero(["z.0.1", "z.2.0"]) + 2 * push
    assert "wb.Zero(at=['z.0.1', 'z.2.0'], phase='both') + 2 * sad" in panel.code
    assert eval(panel.code, names | {"wb": wb}) == panel.text


def test_the_pieces_are_the_text(llama, words):
    ids = llama.ids(words(9)[0])
    assert "".join(pieces(llama, ids)) == llama.tokenizer.decode(ids) and len(pieces(llama, ids)) == 9
    assert pieces(llama, ids[:0]) == []


def test_bytes_that_make_one_letter_together():
    class Bytes:
        """Two tokens to a letter, as byte-level tokenizers have for é."""

        class tokenizer:
            @staticmethod
            def decode(ids, skip_special_tokens):
                return bytes(ids).decode("utf-8", errors="replace")

    ids = list("caféà!".encode())
    assert "".join(pieces(Bytes, ids)) == "caféà!" and len(pieces(Bytes, ids)) == len(ids)
    assert pieces(Bytes, ids[:4]) == ["c", "a", "f", "\ufffd"]


def test_it_prints_itself_and_leaves_a_picture(llama, push):
    panel = wb.show(2 * push, llama, prompt=PROMPT, max_new_tokens=2)
    assert repr(panel) == f"Panel(Add at resid_post.1, strength +1, prompt={PROMPT!r})"
    assert panel.figure().axes
