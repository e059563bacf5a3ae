"""How strongly, on or off, and on which tokens? The controls that belong to one intervention."""

from __future__ import annotations

import math
from dataclasses import replace

import ipywidgets as widgets

from workbench.intervention import Intervention
from workbench.operations import Add, Delta

STRONG = (Add, Delta)  # what has a strength


def knob_for(one: Intervention):
    """A slider for an Add or a Delta, a switch for anything else."""
    wide = {"layout": {"width": "560px"}, "style": {"description_width": "initial"}}
    at = named(one)
    if not isinstance(one, STRONG):
        return widgets.Checkbox(True, description=f"{type(one).__name__} at {at}", indent=False, **wide)
    limit = _round_up(2 * abs(one.strength)) if one.strength else 4.0
    unit = " (units of the local norm)" if getattr(one, "unit", "") == "norm" else ""
    return widgets.FloatSlider(one.strength, min=-limit, max=limit, step=limit / 20, continuous_update=False,
                               readout_format=f".{max(2, 2 - math.floor(math.log10(limit)))}f", description=f"strength at {at}{unit}", **wide)  # fmt: skip


def set_knob(knob, one: Intervention) -> None:
    """Move a control to where this part of the value stands."""
    if isinstance(one, STRONG):
        if abs(one.strength) > knob.max:
            limit = _round_up(2 * abs(one.strength))
            knob.min, knob.max, knob.step = -limit, limit, limit / 20
        knob.value = one.strength
    else:
        knob.value = True


def alike(a: Intervention, b: Intervention) -> bool:
    """Are these the same change, up to strength?"""
    if isinstance(a, STRONG) and type(a) is type(b):
        return replace(a, strength=1.0) == replace(b, strength=1.0)
    return a == b


def named(one: Intervention) -> str:
    """Where it acts, in few words."""
    if isinstance(one, Delta):
        return one.names[0] + (f" and {len(one.names) - 1} more" if len(one.names) > 1 else "")
    return str(one.at[0]) + (f" and {len(one.at) - 1} more" if len(one.at) > 1 else "")


def places_for(one: Intervention):
    """A menu of the tokens it acts on: phase and position together. None for a change of weights, which acts on all."""
    if not one.at:
        return None
    own = (one.phase, one.at[0].position)
    choices = {"prompt and generated": ("both", None), "the prompt": ("prompt", None), "its last token": ("prompt", -1),
               "what is generated": ("generation", None)}  # fmt: skip
    if own not in choices.values():
        choices = {f"@{own[1]}": own, **choices}
    return widgets.Dropdown(options=list(choices.items()), value=own, description="on", layout={"width": "230px"},
                            style={"description_width": "initial"})  # fmt: skip


def placed(one: Intervention, choice: tuple) -> Intervention:
    """The same change on the tokens that a menu says."""
    phase, position = choice
    return one.moved(tuple(component.at(position) for component in one.at), phase)


def _round_up(x: float) -> float:
    power = 10 ** math.floor(math.log10(x))
    return float(next(f"{m * power:.6g}" for m in (1, 2, 5, 10) if m * power >= x * 0.999999))
