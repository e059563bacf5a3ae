"""The values, with a mouse: a grid of scores to click, a panel to steer with, a report to read.

The only folder that imports ipywidgets or anywidget. A view holds a value, and its controls call `model.logits` and
`model.generate_ids`, nothing deeper; what a person does in one can be read back as that value, and as code.
"""

from __future__ import annotations

from workbench.intervention import Intervention
from workbench.locate.circuit import Circuit
from workbench.locate.features.contexts import Contexts
from workbench.locate.gradient.tokenscores import TokenScores
from workbench.locate.vocabulary.lens import Lens
from workbench.model import Model
from workbench.recipe import Recipe
from workbench.report import Report
from workbench.scores import Scores

__all__ = ["show"]


def show(value, *args, **kwargs):
    """What does this value look like, with a mouse?

    Args:
        value: Scores, for a grid to click (`.selected`); those of tokens, for prompts as coloured text; those of probes over
            several layers, for curves over their nulls; a Circuit, for a graph with a slider for its size, and with its Curve
            (`wb.show(scores, curve)`) for how faithful that size is; an Intervention or Recipe with a model and `prompt=`
            (`task=`, `max_new_tokens=`), for a panel to steer with (`.value`, `.text`); a Report, for its picture; a Model
            with a prompt, for the attention patterns of its heads (`.selected`); a Lens, for what the stream says at each
            layer and position (`.selected`); the Contexts of a feature or a list of them, to browse; any other result with
            a picture and a table (Quality, Effects, Erasure, Alignment, Outliers, Joint, Curve ...), for both.
    Returns:
        The view. It appears when it is the last line of a cell, or with `display(view)`.
    Raises:
        TypeError: for anything else.

    Example:
        >>> panel = wb.show(push, model, prompt="once upon a time")  # doctest: +SKIP
    """
    if isinstance(value, TokenScores):
        from workbench.views.saliency import SaliencyView

        return SaliencyView(value, *args, **kwargs)
    if isinstance(value, Scores):
        from workbench.views.grid import Grid
        from workbench.views.probes import ProbeView, has_curves

        if has_curves(value):
            return ProbeView(value, *args, **kwargs)
        return Grid(value, *args, **kwargs)
    if isinstance(value, Circuit):
        from workbench.views.circuit import CircuitView

        return CircuitView(value, *args, **kwargs)
    if isinstance(value, (Intervention, Recipe)):
        from workbench.views.panel import Panel

        if not (args or "model" in kwargs):
            raise TypeError('To steer, show() needs a model and a prompt: wb.show(push, model, prompt="...").')

        return Panel(value, *args, **kwargs)
    if isinstance(value, Model):
        from workbench.views.attention import Attention

        if not (args or "prompt" in kwargs):
            raise TypeError('To see attention patterns, show() needs a prompt: wb.show(model, "tom has a cat").')
        return Attention(value, *args, **kwargs)
    if isinstance(value, Lens):
        from workbench.views.tokens import LensView

        return LensView(value, *args, **kwargs)
    if isinstance(value, Contexts) or (isinstance(value, list) and value and isinstance(value[0], Contexts)):
        from workbench.views.tokens import ContextsView

        return ContextsView(value, *args, **kwargs)
    if isinstance(value, Report):
        from workbench.views.report import ReportView

        return ReportView(value, *args, **kwargs)
    from workbench.views.table import TableView, has_table

    if has_table(value):
        return TableView(value, *args, **kwargs)
    raise TypeError(
        f"show() has no view for {type(value).__name__}. It takes Scores; an Intervention or Recipe, with a model and "
        'prompt="..."; a Report; a Model and a prompt; a Lens; the Contexts of features; a Circuit, alone or with its '
        "Curve; or another result with a picture and a table. A Task or a table is read as it prints: task.frame."
    )
