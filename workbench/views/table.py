"""What does this value say? Its picture over its table; rows that name components can be clicked."""

from __future__ import annotations

import ipywidgets as widgets
import traitlets
from traitlets import Any, List

from workbench.component import Component
from workbench.plot import png
from workbench.views.callback import guarded
from workbench.views.names import written
from workbench.views.tokens import Tokens
from workbench.views.view import View, image

MOST = 24  # rows shown
LONG = 44  # characters of a text


def has_table(value) -> bool:
    """Does this value draw itself and hold a table?"""
    return callable(getattr(value, "plot", None)) and hasattr(getattr(value, "frame", None), "columns")


class TableView(View):
    """Any value with a picture and a table: qualities, effects, erasures, alignments, outliers, joint effects, curves.

    Args:
        value: has `plot()`, a matplotlib figure, and `frame`, a pandas table.
        selected: components to begin with.
    Attributes:
        selected: the components of the chosen rows, for rows that name some. Can be set.
    """

    value = Any()
    selected = List()

    def __init__(self, value, selected=()):
        super().__init__(value=value)
        self._table = Tokens()
        frame = value.frame
        if frame.index.name is not None:
            frame = frame.reset_index()
        self._rows = _components(value, frame)
        figure = value.plot()
        width = min(940, int(figure.get_figwidth() * 96))
        self._picture = widgets.HTML(image(png(figure, dpi=200), repr(value), width, "wb-card"))
        self._clear = widgets.Button(description="clear", layout={"width": "70px"})
        self._table.data = self._cells(frame)
        self._table.observe(guarded(self, self._clicked), "selected")
        self._clear.on_click(guarded(self, lambda _: self.set_trait("selected", [])))
        self.observe(self._show_selection, "selected")
        self.fill(self._picture, self._table, *([self._clear] if any(self._rows) else []))
        self.selected = list(selected)
        self._show_selection()

    @traitlets.validate("selected")
    def _known(self, proposal) -> list[Component]:
        found = list(dict.fromkeys(Component.parse(one) for one in proposal["value"]))
        named = {one for row in self._rows for one in row}
        for one in found:
            if one not in named:
                few = ", ".join(map(str, sorted(named)[:5])) or "no component"
                raise ValueError(
                    f"{one} is in no row of this table, which names {few}{' ...' if len(named) > 5 else ''}."
                )
        return found

    @property
    def code(self) -> str:
        """The selection as code: paste it where a method wants `at`; without one, the table."""
        if self.selected:
            return "[" + ", ".join(f'"{one}"' for one in self.selected) + "]"
        return f"{written(self.value, type(self.value).__name__.lower())}.frame"

    def figure(self):
        return self.value.plot()

    def __repr__(self) -> str:
        return f"TableView({self.value!r})"

    # between the value and the controls

    def _cells(self, frame) -> dict:
        shown, rest = frame.head(MOST), len(frame) - MOST
        columns = [name for name in shown.columns if not shown[name].isna().all()]
        rows = []
        for k in range(len(shown)):
            line = {name: shown[name].iloc[k] for name in columns}
            first, *others = (_text(line[name]) for name in columns) if columns else ("",)
            own = ", ".join(map(str, self._rows[k][:6])) + (" ..." if len(self._rows[k]) > 6 else "")
            cells = [{"text": text, "value": 0.0, "key": f"row {k}", "tip": f"{own or first}    {name} {_text(line[name], 400)}"}
                     for name, text in zip(columns[1:], others, strict=True)]  # fmt: skip
            rows.append({"name": first, "cells": cells})
        more = f"{rest} more rows are in {written(self.value, 'value')}.frame." if rest > 0 else ""
        return {
            "table": True, "down": True, "many": True, "fixed": not any(self._rows), "title": "", "subtitle": "", "note": more,
            "corner": str(columns[0]) if columns else "", "columns": [str(name) for name in columns[1:]], "rows": rows,
            "alt": f"table of {self.value!r}",
        }  # fmt: skip

    def _clicked(self, change) -> None:
        lines = dict.fromkeys(change["new"][::2])
        self.selected = [one for k in lines for one in self._rows[k]]
        self._show_selection()  # also where the row names nothing

    def _show_selection(self, _=None) -> None:
        cells = self._table.data["rows"]
        wanted = [k for k, row in enumerate(self._rows[: len(cells)]) if row and set(row) <= set(self.selected)]
        self._table.selected = [part for k in wanted for i in range(len(cells[k]["cells"])) for part in (k, i)]
        self.say_code(self.code)


def _components(value, frame) -> list[list[Component]]:
    """For each row of the table, the components it is about."""
    if isinstance(getattr(value, "sets", None), list):  # rows are sets
        return [list(some) for some in value.sets]
    for name in ("component", "head", "feature", "neuron"):
        if name in frame.columns:
            return [_parsed(text) for text in frame[name]]
    return [[] for _ in range(len(frame))]


def _parsed(text) -> list[Component]:
    try:
        return [Component.parse(text)]
    except (ValueError, TypeError):
        return []


def _text(value, most: int = LONG) -> str:
    if isinstance(value, float) or type(value).__name__.startswith("float"):
        text = "" if value != value else f"{value:.4g}" if abs(value) >= 1e-4 or not value else f"{value:.1e}"
        return text.replace("-", "\u2212")
    text = str(value)
    return text if len(text) <= most else text[: most - 1] + "\u2026"
