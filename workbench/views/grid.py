"""Which components matter, and which do I want? A grid of scores to point at and click."""

from __future__ import annotations

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets
from traitlets import Any, Dict, Int, List

from workbench.component import Component
from workbench.plot import description, grid
from workbench.views.callback import guarded
from workbench.views.view import View, script


class Canvas(anywidget.AnyWidget):
    """The drawing itself: `data` goes in, the numbers of the selected cells come out. Use `Grid`."""

    _esm, _css = script("grid")
    data = Dict().tag(sync=True)
    selected = List(Int()).tag(sync=True)


class Grid(View):
    """Scores as cells: layers upwards, heads or positions across. Point to read, click to select.

    Everything a click does, the two menus and the buttons do as well.

    Args:
        value: the `Scores`.
        selected: components, or their printed forms, to begin with.
    Attributes:
        selected: the selected components, in the order they were selected. Can be set.

    Example:
        >>> grid = wb.show(scores)  # doctest: +SKIP
        >>> grid.selected = scores.top(3)  # doctest: +SKIP
    """

    value = Any()
    selected = List()

    def __init__(self, value, selected=()):
        super().__init__(value=value)
        self._cells = description(value)
        self._number = {one: k for k, one in enumerate(value.components)}
        self._canvas = Canvas(data=self._cells)
        self._place = {
            (r, c): k for k, (r, c) in enumerate(zip(self._cells["row"], self._cells["column"], strict=True))
        }
        rows = [(text, i) for i, text in enumerate(self._cells["rows"])]
        columns = [(text, i) for i, text in enumerate(self._cells["columns"])]
        narrow = {"layout": {"width": "auto"}, "style": {"description_width": "initial"}}
        self._row = widgets.Dropdown(options=rows, description=self._cells["upward"], **narrow)
        self._column = widgets.Dropdown(options=columns, description=self._cells["across"], **narrow)
        self._toggle = widgets.Button(description="add", layout={"width": "80px"})
        self._clear = widgets.Button(description="clear", layout={"width": "70px"})
        self._point_at(int(np.argmax(np.abs(np.nan_to_num(value.values)))))
        self._canvas.observe(guarded(self, self._clicked), "selected")
        self._row.observe(guarded(self, self._show_selection), "value")
        self._column.observe(guarded(self, self._show_selection), "value")
        self._toggle.on_click(guarded(self, self._toggled))
        self._clear.on_click(guarded(self, lambda _: self.set_trait("selected", [])))
        self.observe(self._show_selection, "selected")
        controls = widgets.HBox([self._row, self._column, self._toggle, self._clear])
        controls.add_class("wb-row")
        self.fill(self._canvas, controls)
        self.selected = list(selected)
        self._show_selection()

    @traitlets.validate("selected")
    def _known(self, proposal) -> list[Component]:
        found = list(dict.fromkeys(Component.parse(one) for one in proposal["value"]))
        for one in found:
            if one not in self._number:
                first, last = self.value.components[0], self.value.components[-1]
                raise ValueError(f"{one} is not in this grid, which holds {len(self._number)} components of kind "
                                 f"{self.value.kind}, from {first} to {last}.")  # fmt: skip
        return found

    @property
    def code(self) -> str:
        """The selection as code: paste it where a method wants `at`."""
        return "[" + ", ".join(f'"{one}"' for one in self.selected) + "]"

    def figure(self):
        return grid(self.value, self._canvas.selected)

    def __repr__(self) -> str:
        best = self.value.top(1)[0]
        size = f"{len(self._cells['rows'])}x{len(self._cells['columns'])}"
        return f"Grid({self.value.kind} {size}, max {self.value[best]:+.2f} at {best})"

    # between the value and the controls

    def _clicked(self, change) -> None:
        self.selected = [self.value.components[k] for k in change["new"]]
        if change["new"]:
            self._point_at(change["new"][-1])

    def _toggled(self, _) -> None:
        one = self.value.components[self._place[self._row.value, self._column.value]]
        chosen = self.selected
        self.selected = [other for other in chosen if other != one] if one in chosen else [*chosen, one]

    def _point_at(self, k: int) -> None:
        self._row.value, self._column.value = self._cells["row"][k], self._cells["column"][k]

    def _show_selection(self, _=None) -> None:
        self._canvas.selected = [self._number[one] for one in self.selected]
        k = self._place.get((self._row.value, self._column.value))
        has = k is not None and self.value.components[k] in self.selected
        self._toggle.description, self._toggle.disabled = ("remove" if has else "add"), k is None
        self.say_code(self.code)
