"""How strongly, and on or off? The control that belongs to one intervention."""

from __future__ import annotations

import math
from dataclasses import replace

import ipywidgets as widgets

from workbench.intervention import Add, Intervention


def knob_for(one: Intervention):
    """A slider for an Add, a switch for anything else."""
    wide = {"layout": {"width": "640px"}, "style": {"description_width": "initial"}}
    at = str(one.at[0]) + (f" and {len(one.at) - 1} more" if len(one.at) > 1 else "")
    if not isinstance(one, Add):
        return widgets.Checkbox(True, description=f"{type(one).__name__} at {at}", indent=False, **wide)
    limit = _round_up(2 * abs(one.strength)) if one.strength else 4.0
    unit = " (units of the local norm)" if one.unit == "norm" else ""
    return widgets.FloatSlider(one.strength, min=-limit, max=limit, step=limit / 20, continuous_update=False,
                               readout_format=f".{max(2, 2 - math.floor(math.log10(limit)))}f", description=f"strength at {at}{unit}", **wide)  # fmt: skip


def set_knob(knob, one: Intervention) -> None:
    """Move a control to where this part of the value stands."""
    if isinstance(one, Add):
        if abs(one.strength) > knob.max:
            limit = _round_up(2 * abs(one.strength))
            knob.min, knob.max, knob.step = -limit, limit, limit / 20
        knob.value = one.strength
    else:
        knob.value = True


def alike(a: Intervention, b: Intervention) -> bool:
    """Are these the same change, up to strength?"""
    return replace(a, strength=0.0) == replace(b, strength=0.0) if isinstance(a, Add) and isinstance(b, Add) else a == b


def _round_up(x: float) -> float:
    power = 10 ** math.floor(math.log10(x))
    return float(next(f"{m * power:.6g}" for m in (1, 2, 5, 10) if m * power >= x * 0.999999))
