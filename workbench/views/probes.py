"""Where does a probe begin to read the label, and what would it read anyway? Accuracy by layer over its baselines."""

from __future__ import annotations

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets
from traitlets import Any, Dict, Int, List

from workbench.component import Component
from workbench.locate.probing.curves import LINES, curves
from workbench.views.callback import guarded
from workbench.views.view import View, script

MOST = 12  # panels; above, a grid of the same scores is easier to read
# column: (tone, dashes, marker), as in the still picture
STYLES = {"ood": ("blue", "4 2", "s"), "untrained": ("orange", "1.5 2", "^"), "tokens": ("red", "6 2 1.5 2", ""),
          "control": ("grey", "3 3", "x"), "majority": ("quiet", "1.5 3", "")}  # fmt: skip


class Lines(anywidget.AnyWidget):
    """The drawing itself: series over an axis go in, the numbers of the chosen places come out. Use `ProbeView`."""

    _esm, _css = script("lines")
    data = Dict().tag(sync=True)
    selected = List(Int()).tag(sync=True)


def panels(scores) -> dict[tuple, list[int]]:
    """(kind, index, position) -> the numbers of its components, from layer to layer."""
    found: dict = {}
    for i, one in enumerate(scores.components):
        found.setdefault((one.kind, one.index, one.position), []).append(i)
    return found


def has_curves(scores) -> bool:
    """Are these accuracies of probes over several layers, and few enough to draw as curves?"""
    found = panels(scores)
    return (scores.method.startswith("probing.") and scores.metric == "accuracy" and len(found) <= MOST
            and max(map(len, found.values())) > 1)  # fmt: skip


class ProbeView(View):
    """Accuracy of a probe by layer, over the nulls: shuffled labels, an untrained model, tokens alone, a control task.

    Args:
        value: `Scores` of `wb.locate.probing.probe`, over several layers.
        selected: components to begin with.
    Attributes:
        selected: the chosen sites as components, in the order they were chosen. Can be set.
        where: which position (and head) is shown, a number from 0. Can be set.

    Example:
        >>> view = wb.show(wb.locate.probing.probe(model, task, "resid_post.*@-1"))  # doctest: +SKIP
    """

    value = Any()
    where = Int(0, min=0)
    selected = List()

    def __init__(self, value, selected=()):
        super().__init__(value=value)
        self._lines, self._panels = Lines(), panels(value)
        self._number = {one: k for k, one in enumerate(value.components)}
        narrow = {"layout": {"width": "auto"}, "style": {"description_width": "initial"}}
        self._which = widgets.Dropdown(options=[(self._name(key), k) for k, key in enumerate(self._panels)],
                                       description="where", **narrow)  # fmt: skip
        self._layer = widgets.Dropdown(description="site", **narrow)
        self._toggle = widgets.Button(description="add", layout={"width": "80px"})
        self._clear = widgets.Button(description="clear", layout={"width": "70px"})
        self._which.observe(guarded(self, lambda change: self.set_trait("where", change["new"])), "value")
        self._layer.observe(guarded(self, self._show_selection), "value")
        self._toggle.on_click(guarded(self, self._toggled))
        self._clear.on_click(guarded(self, lambda _: self.set_trait("selected", [])))
        self._lines.observe(guarded(self, self._clicked), "selected")
        self.observe(guarded(self, self._draw), "where")
        self.observe(self._show_selection, "selected")
        controls = widgets.HBox(
            [*([self._which] if len(self._panels) > 1 else []), self._layer, self._toggle, self._clear]
        )
        controls.add_class("wb-row")
        self.fill(self._lines, controls)
        self._draw()
        self.selected = list(selected)

    @traitlets.validate("where")
    def _there(self, proposal) -> int:
        if not 0 <= proposal["value"] < len(self._panels):
            raise ValueError(f"where={proposal['value']}: give 0 to {len(self._panels) - 1}.")
        return proposal["value"]

    @traitlets.validate("selected")
    def _known(self, proposal) -> list[Component]:
        found = list(dict.fromkeys(Component.parse(one) for one in proposal["value"]))
        for one in found:
            if one not in self._number:
                first, last = self.value.components[0], self.value.components[-1]
                raise ValueError(
                    f"{one} was not probed. Probed were {len(self._number)} sites, from {first} to {last}."
                )
        return found

    @property
    def code(self) -> str:
        """The selection as code: paste it where a method wants `at`."""
        return "[" + ", ".join(f'"{one}"' for one in self.selected) + "]"

    def figure(self):
        return curves(self.value)

    def __repr__(self) -> str:
        best = self.value.top(1)[0]
        return (
            f"ProbeView({self.value.method} at {len(self.value.components)} sites, best {best}: {self.value[best]:.2f})"
        )

    # between the value and the controls

    @property
    def _mine(self) -> list[int]:
        return list(self._panels.values())[self.where]

    def _name(self, panel) -> str:
        kind, index, position = panel
        token = self.value.labels.get(position)
        place = "" if position is None else f"@{position}" + (f" ({token})" if token not in (None, "·") else "")
        return f"{kind}{'' if index is None else f' {index}'} {place}".strip()

    def _draw(self, _=None) -> None:
        scores, mine = self.value, self._mine
        sites = [scores.components[i] for i in mine]
        columns = {name: column for name, column in scores.columns.items() if name in LINES}
        series = [
            {
                "label": "shuffled labels reach this (95 %)",
                "tone": "grey",
                "area": True,
                "y": _plain(scores.null_p95, mine),
            }
        ]
        series += [{"label": LINES[name][0], "tone": STYLES[name][0], "dash": STYLES[name][1], "marker": STYLES[name][2],
                    "y": _plain(columns[name], mine)} for name in LINES if name in columns]  # fmt: skip
        series.append({"label": "held out: new entities (test)", "tone": "blue", "marker": "o", "main": True,
                       "y": _plain(scores.values, mine), "lo": _plain(scores.ci_lo, mine), "hi": _plain(scores.ci_hi, mine)})  # fmt: skip
        best = max(mine, key=lambda i: scores.values[i])
        self._which.value = self.where
        self._layer.options = [(str(one), k) for k, one in enumerate(sites)]
        self._layer.value = mine.index(best)
        self._lines.data = {
            "names": [str(one) for one in sites], "labels": ["" if one.layer is None else str(one.layer) for one in sites],
            "tips": [self._tip(i, columns) for i in mine], "series": [one for one in series if any(y is not None for y in one["y"])],
            "ylim": [0, 1], "xlabel": "layer", "ylabel": "accuracy", "title": f"{scores.method} of {scores.task}: {self._name(list(self._panels)[self.where])}",
            "subtitle": scores.title, "note": scores.why, "widest": 760,
            "alt": f"{scores.title}. {len(sites)} sites, best {scores.components[best]}: {scores.values[best]:.2f}, "
                   f"shuffled labels {scores.null_p95[best]:.2f}. Left and right arrows move.",
        }  # fmt: skip
        self._show_selection()

    def _tip(self, i: int, columns) -> str:
        scores = self.value
        parts = [str(scores.components[i]), f"test {scores.values[i]:.2f} [{scores.ci_lo[i]:.2f}, {scores.ci_hi[i]:.2f}]",
                 f"shuffled labels {scores.null_p95[i]:.2f}"]  # fmt: skip
        parts += [f"{name} {columns[name][i]:.2f}" for name in LINES
                  if name in columns and np.isfinite(columns[name][i])]  # fmt: skip
        return "    ".join(parts)

    def _clicked(self, change) -> None:
        mine, others = self._mine, [one for one in self.selected if self._number[one] not in self._mine]
        self.selected = [*others, *(self.value.components[mine[k]] for k in change["new"])]
        if change["new"]:
            self._layer.value = change["new"][-1]

    def _toggled(self, _) -> None:
        one, chosen = self.value.components[self._mine[self._layer.value]], self.selected
        self.selected = [other for other in chosen if other != one] if one in chosen else [*chosen, one]

    def _show_selection(self, _=None) -> None:
        mine = self._mine
        if self._layer.value is None:
            return  # the menu is being filled
        self._lines.selected = [mine.index(self._number[one]) for one in self.selected if self._number[one] in mine]
        here = self.value.components[mine[self._layer.value]]
        self._toggle.description = "remove" if here in self.selected else "add"
        self.say_code(self.code)


def _plain(values, mine) -> list:
    return [None if not np.isfinite(x) else round(float(x), 5) for x in np.asarray(values, float)[mine]]
