"""Where does each head look? The attention patterns of one prompt, all heads small and the chosen one large."""

from __future__ import annotations

import anywidget
import ipywidgets as widgets
import torch
import traitlets
from traitlets import Any, Bytes, Dict, Int, List, Unicode

from workbench.component import Component
from workbench.plot import INK
from workbench.views.callback import guarded
from workbench.views.view import View, script

STILL = 4  # heads in the still picture


class Patterns(anywidget.AnyWidget):
    """The drawing itself: patterns go in as bytes [head, query, key], the numbers of chosen heads come out. Use `Attention`."""

    _esm, _css = script("attention")
    data = Dict().tag(sync=True)
    patterns = Bytes().tag(sync=True)
    selected = List(Int()).tag(sync=True)


class Attention(View):
    """The patterns of all heads on one prompt: point to read, click to see a head large and to select it.

    Everything a click does, the two menus do as well.

    Args:
        model: the model to look into.
        prompt: what it reads; can be set again.
        selected: heads to begin with ("z.4.2", "pattern.4.2" or "L4H2").
    Attributes:
        selected: the chosen heads as components of kind pattern, in the order they were chosen. Can be set.
        pattern: [head, query, key], heads in forward order; each row sums to one.

    Example:
        >>> view = wb.show(model, "tom has a cat . tom has a")  # doctest: +SKIP
        >>> view.selected = scores.top(2)  # doctest: +SKIP
    """

    model = Any()
    prompt = Unicode()
    selected = List()

    def __init__(self, model, prompt: str, selected=()):
        super().__init__(model=model, prompt=prompt)
        self.heads = model.names.expand([Component.parse("pattern.*.*")])
        self._number = {one: k for k, one in enumerate(self.heads)}
        self._patterns = Patterns()
        narrow = {"layout": {"width": "auto"}, "style": {"description_width": "initial"}}
        self._layer = widgets.Dropdown(options=range(model.names.n_layers), description="layer", **narrow)
        self._head = widgets.Dropdown(options=range(model.names.n_heads), description="head", **narrow)
        self._toggle = widgets.Button(description="add", layout={"width": "80px"})
        self._read()
        self._patterns.observe(guarded(self, self._clicked), "selected")
        self._layer.observe(guarded(self, self._show_selection), "value")
        self._head.observe(guarded(self, self._show_selection), "value")
        self._toggle.on_click(guarded(self, self._toggled))
        self.observe(self._show_selection, "selected")
        self.observe(guarded(self, lambda _: self._read()), "prompt")
        controls = widgets.HBox([self._layer, self._head, self._toggle])
        controls.add_class("wb-row")
        self.fill(self._patterns, controls)
        self.selected = list(selected)
        self._show_selection()

    @traitlets.validate("selected")
    def _known(self, proposal) -> list[Component]:
        found = []
        for one in map(Component.parse, proposal["value"]):
            head = Component("pattern", one.layer, one.index)
            if head not in self._number:
                last = self.heads[-1]
                raise ValueError(f"{one} is no head of this model, which has pattern.0.0 to {last}.")
            found.append(head)
        return list(dict.fromkeys(found))

    @property
    def code(self) -> str:
        """The selection as code: paste it where a method wants `at`."""
        return "[" + ", ".join(f'"{one}"' for one in self.selected) + "]"

    def figure(self):
        """The selected heads (at most four; the sharpest one if none is)."""
        from matplotlib.figure import Figure

        sharpest = int(self.pattern.amax(-1).mean(-1).argmax())
        shown = [self._number[one] for one in self.selected[:STILL]] or [sharpest]
        figure = Figure(figsize=(3.2 * len(shown) + 0.6, 3.4), dpi=110, layout="constrained")
        for k, ax in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
            ax.imshow(self.pattern[k].sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
            ax.set_title(f"{self.heads[k]}: rows look at columns", fontsize=8.5, loc="left", color=INK)
            every = range(0, len(self._tokens), -(-len(self._tokens) // 24))
            named = [self._tokens[i] for i in every]
            ax.set_xticks(every, named, rotation=60, ha="right", fontsize=7, parse_math=False)
            ax.set_yticks(every, named, fontsize=7, parse_math=False)
            ax.tick_params(length=0)
        return figure

    def __repr__(self) -> str:
        n = self.model.names
        chosen = f", selected {self.code}" if self.selected else ""
        return f"Attention({n.n_layers}x{n.n_heads} heads, {len(self._tokens)} tokens{chosen})"

    # between the model and the controls

    def _read(self) -> None:
        found = self.model.activations(self.prompt, self.heads)
        self.pattern = torch.stack([found[one][0] for one in self.heads])
        self._tokens = self.model.tokens(self.prompt)
        n, words = self.model.names, []
        for k in range(len(self.heads)):
            query = len(self._tokens) - 1
            key = int(self.pattern[k, query].argmax())
            words.append(
                f"the last token looks most at {self._tokens[key]!r} ({key}): {self.pattern[k, query, key]:.2f}"
            )
        self._patterns.patterns = (self.pattern * 255).round().to(torch.uint8).numpy().tobytes()
        self._patterns.data = {
            "tokens": self._tokens, "heads": [str(one) for one in self.heads], "row": [one.layer for one in self.heads],
            "column": [one.index for one in self.heads], "n_layers": n.n_layers, "n_heads": n.n_heads, "notes": words,
            "title": "attention patterns", "subtitle": f"{len(self._tokens)} tokens; the stronger the colour, the more attention; rows sum to one",
            "alt": f"attention patterns of {n.n_layers} layers by {n.n_heads} heads; arrow keys move between heads",
        }  # fmt: skip

    def _clicked(self, change) -> None:
        self.selected = [self.heads[k] for k in change["new"]]
        if change["new"]:
            last = self.heads[change["new"][-1]]
            self._layer.value, self._head.value = last.layer, last.index

    def _toggled(self, _) -> None:
        one = Component("pattern", self._layer.value, self._head.value)
        chosen = self.selected
        self.selected = [other for other in chosen if other != one] if one in chosen else [*chosen, one]

    def _show_selection(self, _=None) -> None:
        self._patterns.selected = [self._number[one] for one in self.selected]
        here = Component("pattern", self._layer.value, self._head.value)
        self._toggle.description = "remove" if here in self.selected else "add"
        self.say_code(self.code)
