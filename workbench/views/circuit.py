"""How many edges does it take, and through which parts do they run? A circuit with a slider for its size."""

from __future__ import annotations

import html

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets
from traitlets import Any, Dict, Int, List, Unicode

from workbench.component import Component
from workbench.locate.circuit import Circuit, Curve, Faithfulness
from workbench.locate.circuit.drawing import curve as draw_curve
from workbench.locate.circuit.drawing import draw, places
from workbench.plot import MARK, picture
from workbench.views.callback import guarded
from workbench.views.graph import beside, counted, drawing, fixed, measured, said
from workbench.views.names import written
from workbench.views.probes import Lines
from workbench.views.view import View, script

WAYS = {"largest |score|": "size", "largest score (helping edges)": "sign", "route down from the logits": "route"}
START = 40  # edges shown first, of a circuit with many more


class Graph(anywidget.AnyWidget):
    """The drawing itself: parts and edges go in, the numbers of the chosen parts come out. Use `CircuitView`."""

    _esm, _css = script("graph")
    data = Dict().tag(sync=True)
    selected = List(Int()).tag(sync=True)


class CircuitView(View):
    """A circuit in layers, upwards: blue edges help, red ones hurt, wide ones do so strongly; beside it, how faithful it is.

    The slider keeps the strongest edges, as `Circuit.top` does. A click selects a part and lets its edges stand out;
    a click on the curve goes to that size. Everything a click does, the slider and the menus do as well.

    Args:
        value: a `Circuit`, best with all edges scored (`wb.locate.circuit.eap_ig`).
        evaluation: the `Curve` of the same scores (`wb.locate.circuit.curve`), or a `Faithfulness`; without one the view
            says what to call.
        size: edges to begin with. by: "size", "sign" or "route", as for `Circuit.top`.
        selected: parts to begin with ("z.4.2").
    Attributes:
        size, by: can be set.
        circuit: the `Circuit` that is shown, pruned to edges on a path from the embedding to the logits.
        selected: the chosen parts as components, in the order they were chosen. Can be set.
    Raises:
        TypeError, ValueError: for an evaluation that is none, or that was made from other scores.

    Example:
        >>> view = wb.show(scores, wb.locate.circuit.curve(model, task, scores))  # doctest: +SKIP
        >>> wb.locate.circuit.faithfulness(model, task, view.circuit)  # doctest: +SKIP
    """

    value = Any()
    size = Int(0)
    by = Unicode("size")
    selected = List()

    def __init__(self, value: Circuit, evaluation=None, *, size: int | None = None, by: str = "size", selected=()):
        super().__init__(value=value)
        if not len(value):
            raise ValueError("This circuit has no edge to show.")
        self.evaluation, self._filling = _checked(value, evaluation), False
        self._places = places(value)
        self._number = {one: k for k, one in enumerate(self._places)}
        self._graph, self._lines, self._words = Graph(), Lines(), widgets.HTML()
        narrow = {"layout": {"width": "auto"}, "style": {"description_width": "initial"}}
        self._size = widgets.SelectionSlider(options=self._stops(), description="edges", continuous_update=True,
                                             layout={"width": "380px"}, style={"description_width": "initial"})  # fmt: skip
        self._by = widgets.Dropdown(options=WAYS, description="first those with the", **narrow)
        self._part = widgets.Dropdown(description="part", **narrow)
        self._toggle = widgets.Button(description="add", layout={"width": "80px"})
        self._clear = widgets.Button(description="clear", layout={"width": "70px"})
        whole = len(value) if len(value) <= 3 * START else START
        self.set_trait("by", by)
        self.set_trait("size", whole if size is None else size)
        self._size.observe(guarded(self, self._moved), "value")
        self._by.observe(guarded(self, lambda change: self.set_trait("by", change["new"])), "value")
        self._part.observe(guarded(self, self._show_selection), "value")
        self._toggle.on_click(guarded(self, self._toggled))
        self._clear.on_click(guarded(self, lambda _: self.set_trait("selected", [])))
        self._graph.observe(guarded(self, self._clicked), "selected")
        self._lines.observe(guarded(self, self._clicked_curve), "selected")
        self.observe(guarded(self, self._draw), ["size", "by"])
        self.observe(self._show_selection, "selected")
        rows = [widgets.HBox(row) for row in ([self._size, self._by], [self._part, self._toggle, self._clear])]
        side = widgets.VBox([self._lines, self._words] if isinstance(self.evaluation, Curve) else [self._words])
        both = widgets.HBox([self._graph, side])
        for box, name in ((rows[0], "wb-row"), (rows[1], "wb-row"), (both, "wb-beside"), (side, "wb-side")):
            box.add_class(name)
        self.fill(rows[0], both, rows[1])
        self._draw()
        self.selected = list(selected)

    @traitlets.validate("size")
    def _possible(self, proposal) -> int:
        if not 1 <= proposal["value"] <= len(self.value):
            raise ValueError(f"size={proposal['value']}: give a number of edges from 1 to {len(self.value)}.")
        return proposal["value"]

    @traitlets.validate("by")
    def _way(self, proposal) -> str:
        if proposal["value"] not in WAYS.values():
            raise ValueError(f"by={proposal['value']!r} is unknown; choose 'size', 'sign' or 'route'.")
        return proposal["value"]

    @traitlets.validate("selected")
    def _known(self, proposal) -> list[Component]:
        found = list(dict.fromkeys(Component.parse(one) for one in proposal["value"]))
        for one in found:
            if fixed(one):
                raise ValueError(f"{one} cannot be selected: nothing can be changed there. Select what writes into it.")
            if one not in self._number:
                raise ValueError(f"{one} is no part of this circuit. Its parts are embed, heads (z.2.1) and FFNs (mlp_out.2) "
                                 f"up to {max(p for p in self._number if not fixed(p))}.")  # fmt: skip
        return found

    @property
    def code(self) -> str:
        """The circuit and the selected parts as code."""
        top = f"{self.size}" if self.by == "size" else f'{self.size}, by="{self.by}"'
        line = f"circuit = {written(self.value, 'scores')}.top({top})"
        at = ", ".join(f'"{one}"' for one in self.selected)
        return line + (f"\nat = [{at}]" if at else "")

    @property
    def words(self) -> str:
        """How faithful is a circuit of this size, as far as that was measured? "" without an evaluation."""
        return said(self.evaluation, self.value, self.circuit, self.size, self.by)

    def figure(self):
        """The graph, and the curve with this size marked."""
        task = f": {self.value.task}" if self.value.task else ""
        about = f"{self.value.method}{task}, {counted(self.circuit, self.size)}"
        if not isinstance(self.evaluation, Curve):
            return self.circuit.plot(title=f"{about}{'; ' * bool(self.words)}{self.words}")
        from matplotlib.figure import Figure

        figure = picture(Figure(figsize=(10.5, 5.4), dpi=110, layout="constrained"))
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        draw(self.circuit, ax=left, title=about)
        draw_curve(self.evaluation, ax=right)
        right.axvline(100 * self.size / self.value.whole, color=MARK, lw=1.5, ls="--")
        return figure

    def __repr__(self) -> str:
        return f"CircuitView({self.value.method}, {len(self.circuit)} of {self.value.whole} edges)"

    # between the value and the controls

    def _stops(self) -> list[int]:
        """Sizes on the slider: steps by a quarter, and those that were measured."""
        last = len(self.value)
        found = {*np.unique(np.round(1.25 ** np.arange(0, 60))).astype(int).tolist(), START, last, self.size}
        if isinstance(self.evaluation, Curve):
            found.update(measured(self.evaluation, self.value))
        elif self.evaluation is not None:
            found.update([self.evaluation.edges] if self.evaluation.unit == "edges" else [])
        return sorted(int(one) for one in found if 1 <= one <= last)

    def _draw(self, _=None) -> None:
        self.circuit = self.value.top(self.size, self.by)
        stops, size = tuple(self._stops()), self.size
        self._filling = True  # new options set the slider back to the first of them
        if self._size.options != stops:
            self._size.options = stops
        self._size.value, self._by.value = size, self.by
        self._filling = False
        parts = [str(one) for one in self.circuit.nodes if not fixed(one)]
        if self._part.options != tuple(parts):
            before, self._part.options = self._part.value, parts
            self._part.value = before if before in parts else parts[-1] if parts else None
        self._graph.data = drawing(self.value, self.circuit, self._places, self.size)
        if isinstance(self.evaluation, Curve):
            self._lines.data = beside(self.evaluation, self.value, self.circuit, self.size, self.by)
        self._words.value = f'<div class="wb-said">{self._advice()}</div>'
        self._show_selection()

    def _advice(self) -> str:
        if self.evaluation is not None:
            return html.escape(self.words)
        name = html.escape(written(self.value, "scores"))
        if self.value.saes:  # edges of features cannot be switched, their nodes can
            call = "wb.locate.circuit.keep(model, task, view.circuit.nodes)"
            return f"How faithful is it? <code>{call}</code> measures it."
        return (f"How faithful is it? <code>curve = wb.locate.circuit.curve(model, task, {name})</code> measures it, best on other "
                f"prompts than those it was found with; <code>wb.show({name}, curve)</code> shows it here.")  # fmt: skip

    def _moved(self, change) -> None:
        if not self._filling:
            self.size = change["new"]

    def _clicked(self, change) -> None:
        nodes = list(self._places)
        self.selected = [nodes[k] for k in change["new"]]
        if change["new"] and str(nodes[change["new"][-1]]) in self._part.options:
            self._part.value = str(nodes[change["new"][-1]])

    def _clicked_curve(self, change) -> None:
        if change["new"]:
            self._lines.selected = []
            self.size = min(len(self.value), max(1, measured(self.evaluation, self.value)[change["new"][-1]]))

    def _toggled(self, _) -> None:
        one, chosen = Component.parse(self._part.value), self.selected
        self.selected = [other for other in chosen if other != one] if one in chosen else [*chosen, one]

    def _show_selection(self, _=None) -> None:
        self._graph.selected = [self._number[one] for one in self.selected]
        there = self._part.value is not None
        has = there and Component.parse(self._part.value) in self.selected
        self._toggle.description, self._toggle.disabled = ("remove" if has else "add"), not there
        self.say_code(self.code)


def _checked(value: Circuit, evaluation):
    """The evaluation, if it is one of these scores."""
    if evaluation is not None and not isinstance(evaluation, (Curve, Faithfulness)):
        raise TypeError(f"evaluation is a Curve or a Faithfulness; got {type(evaluation).__name__}. For one, type "
                        "curve = wb.locate.circuit.curve(model, task, scores).")  # fmt: skip
    if isinstance(evaluation, Curve):
        mine = [len(value.top(float(size))) for size in evaluation.sizes]
        if evaluation.method != value.method or mine != evaluation.edges.tolist():
            raise ValueError(f"This curve was measured on other scores ({evaluation!r}) than those shown ({value!r}). Show the "
                             "scores that curve() was given, or call curve() on these.")  # fmt: skip
    return evaluation
