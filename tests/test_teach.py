"""Exercise checks say right, not yet, or no answer yet."""

import pytest

from workbench import teach


def test_right_wrong_and_missing(capsys, monkeypatch):
    monkeypatch.delenv("WORKBENCH_STRICT")
    assert teach.check("01.address", "z.2.3@-1") and "right" in capsys.readouterr().out
    assert not teach.check("01.address", "z.3.2") and "Hint" in capsys.readouterr().out
    assert not teach.check("01.address", "zed") and "names no component" in capsys.readouterr().out
    assert not teach.check("01.address", ...) and "no answer yet" in capsys.readouterr().out


def test_a_wrong_answer_raises_for_autograders():
    with pytest.raises(AssertionError, match="is not right"):
        teach.check("01.address", "z.3.2")
    with pytest.raises(AssertionError):
        teach.check("01.address", ...)
    with pytest.raises(KeyError, match="no exercise"):
        teach.check("99.nothing", 1)
