"""How is this value written in code? By the notebook's own variable, so that what a view shows can be pasted."""

from __future__ import annotations

import sys
from dataclasses import replace

from workbench.intervention import Intervention
from workbench.operations import Add
from workbench.recipe import Recipe


def written(value, otherwise: str = "") -> str:
    """An expression for a value: a variable of the notebook, a multiple of one, or the line that makes it.

    Args:
        otherwise: the name to write for a model or report that the notebook has no variable for.
    """
    known = {name: one for name, one in _notebook().items() if not name.startswith("_")}
    for name, one in known.items():
        if one is value or (type(one) is type(value) and _equal(one, value)):
            return name
    if isinstance(value, Add):
        for name, one in known.items():
            if isinstance(one, Add) and _equal(replace(one, strength=value.strength), value):
                factor = round(value.strength / one.strength, 9) if one.strength else 0.0
                if (factor * one).strength == value.strength:
                    return f"{factor:g} * {name}" if float(f"{factor:g}") == factor else f"{factor!r} * {name}"
    if isinstance(value, Recipe):
        return " + ".join(written(one) for one in value) or "wb.Recipe([])"
    return f"wb.{value!r}" if isinstance(value, Intervention) else otherwise


def _notebook() -> dict:
    """The variables of the notebook; none outside of one. A copy, because cells may add to it meanwhile."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return dict(shell.user_ns) if shell is not None else {}


def _equal(one, value) -> bool:
    try:
        return bool(one == value)
    except Exception:  # a type of the user's whose == is not a plain answer is no match
        return False
