"""Errors of controls: shown in the view, as text, and raised again under WORKBENCH_STRICT=1."""

import pytest

import workbench as wb
from workbench.views.callback import guarded
from workbench.views.view import View


def breaks(*_):
    raise ValueError("no such <b>component</b>")


def test_an_error_is_shown_as_text_and_raised_again(monkeypatch):
    view = View()
    monkeypatch.setenv("WORKBENCH_STRICT", "1")
    with pytest.raises(ValueError, match="no such"):
        guarded(view, breaks)()
    assert view.error == "ValueError: no such <b>component</b>"
    assert "&lt;b&gt;" in view._error.value and "<b>" not in view._error.value


def test_without_strict_it_is_only_shown_and_the_next_success_clears_it(monkeypatch):
    view = View()
    monkeypatch.delenv("WORKBENCH_STRICT")
    assert guarded(view, breaks)() is None and view.error and view._error.layout.display == ""
    assert guarded(view, lambda x: x + 1)(1) == 2
    assert view.error == "" and view._error.value == "" and view._error.layout.display == "none"


def test_every_control_of_the_panel_is_guarded(llama, monkeypatch):
    panel = wb.show(wb.Zero("z.0.1"), llama, prompt="w4 w9", max_new_tokens=2)
    with pytest.raises(ValueError, match="vocabulary"):
        panel.prompt = "w4 nonsense"
    monkeypatch.delenv("WORKBENCH_STRICT")
    panel.prompt = "w4 rubbish"
    assert "rubbish" in panel.error and panel.text == "" and panel._strip.data == {}
    panel.value = wb.Zero("z.0.1@7")
    assert "rubbish" in panel.error
    panel.prompt = "w4 w9"
    assert "position 7 is out of range" in panel.error
    panel.value = wb.Zero("z.0.1")
    assert panel.error == "" and panel.text


def test_show_says_what_it_takes():
    with pytest.raises(TypeError, match=r"no view for int\. It takes Scores; an Intervention or Recipe"):
        wb.show(3)
