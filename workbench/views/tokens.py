"""Tokens to read and to click: a lens as a table of layers by positions, the contexts of a feature as running text."""

from __future__ import annotations

import anywidget
import ipywidgets as widgets
import numpy as np
from traitlets import Any, Dict, Int, List

from workbench.views.callback import guarded
from workbench.views.view import View, script

COLOURS = {"the token shown": "says_prob", "the answer": "prob", "the final prediction (KL, nats)": "kl"}


class Tokens(anywidget.AnyWidget):
    """The drawing itself: rows of tokens go in, [row, token] of the chosen one comes out. Use `LensView`, `ContextsView`."""

    _esm, _css = script("tokens")
    data = Dict().tag(sync=True)
    selected = List(Int()).tag(sync=True)


class LensView(View):
    """What the stream says on its way: layers upwards, positions across, in each cell the most probable next token.

    Args:
        value: a `Lens` (`wb.locate.vocabulary.logit_lens`, `tuned_lens`).
        prompt: which of its prompts is shown.
    Attributes:
        prompt: can be set.
        selected: the chosen stream at its position, such as resid_post.6@10; None without a choice.
    """

    value = Any()
    prompt = Int(0, min=0)
    selected = Any(None, allow_none=True)

    def __init__(self, value, prompt: int = 0):
        super().__init__(value=value, prompt=prompt)
        self._tokens = Tokens()
        narrow = {"layout": {"width": "auto"}, "style": {"description_width": "initial"}}
        short = [(f"{k}: {' '.join(tokens[-8:])}", k) for k, tokens in enumerate(value.tokens)]
        self._which = widgets.Dropdown(options=short, value=prompt, description="prompt", **narrow)
        self._colour = widgets.Dropdown(options=COLOURS, description="colour: probability of", **narrow)
        self._which.observe(guarded(self, lambda change: self.set_trait("prompt", change["new"])), "value")
        self._colour.observe(guarded(self, self._draw), "value")
        self._tokens.observe(guarded(self, self._clicked), "selected")
        self.observe(guarded(self, self._draw), "prompt")
        controls = widgets.HBox([self._which, self._colour])
        controls.add_class("wb-row")
        self.fill(controls, self._tokens)
        self._draw()

    @property
    def code(self) -> str:
        """The choice as code: paste it where a method wants `at`."""
        return f'"{self.selected}"' if self.selected is not None else "nothing selected"

    def figure(self):
        return self.value.plot(self.prompt, self._colour.value)

    def __repr__(self) -> str:
        return f"LensView({self.value!r}, prompt {self.prompt})"

    def _draw(self, _=None) -> None:
        lens, k, what = self.value, self.prompt, self._colour.value
        tokens, width, answer = lens.tokens[k], lens.prob.shape[2], lens.answers[k]
        numbers = lens.top_prob[..., 0] if what == "says_prob" else getattr(lens, what)
        limit = float(np.nanmax(numbers[:, k])) if what == "kl" else 1.0
        rows = []
        for c, one in enumerate(lens.components):
            cells = []
            for i in range(len(tokens)):
                at = width - len(tokens) + i
                word, share = lens.words[int(lens.top[c, k, at, 0])], lens.top_prob[c, k, at, 0]
                tip = (f"{one.at(i)}: {word!r} {share:.3f}; {answer!r} {lens.prob[c, k, at]:.3f}, rank {int(lens.rank[c, k, at])}; "
                       f"KL to the final prediction {lens.kl[c, k, at]:.2f} nats")  # fmt: skip
                cells.append({"text": word, "value": float(numbers[c, k, at] / (limit or 1.0)), "tip": tip})
            rows.append({"name": str(one), "cells": cells})
        self._which.value, self._tokens.selected = k, []
        self._tokens.data = {
            "table": True, "title": lens.name, "columns": tokens, "corner": "", "rows": rows, "note": "",
            "subtitle": "the most probable next token; the stronger the colour, the larger the number",
            "alt": f"{lens.name}: {len(rows)} streams, upwards, by {len(tokens)} positions",
        }  # fmt: skip
        self.selected = None
        self.say_code(self.code)

    def _clicked(self, change) -> None:
        if change["new"]:
            row, position = change["new"]
            self.selected = self.value.components[row].at(position)
        else:
            self.selected = None
        self.say_code(self.code)


class ContextsView(View):
    """Where a feature (or neuron) fires: its strongest texts, the more colour the more activation, and what it promotes.

    Args:
        value: `Contexts` (`wb.locate.features.contexts`), or a list of them to browse.
    Attributes:
        number: which of them is shown. Can be set.
        selected: the component that is shown.
    """

    value = Any()
    number = Int(0, min=0)

    def __init__(self, value, number: int = 0):
        super().__init__(value=list(value) if isinstance(value, (list, tuple)) else [value], number=number)
        self._tokens = Tokens()
        names = [(str(one.component), k) for k, one in enumerate(self.value)]
        self._which = widgets.Dropdown(options=names, value=number, description="feature", layout={"width": "auto"})
        self._which.observe(guarded(self, lambda change: self.set_trait("number", change["new"])), "value")
        self.observe(guarded(self, self._draw), "number")
        self.fill(*([self._which] if len(self.value) > 1 else []), self._tokens)
        self._draw()

    @property
    def selected(self):
        return self.value[self.number].component

    @property
    def code(self) -> str:
        """The feature as code: paste it where a method wants `at`."""
        return f'"{self.selected}"'

    def figure(self):
        return self.value[self.number].plot()

    def __repr__(self) -> str:
        return f"ContextsView({self.value[self.number]!r})"

    def _draw(self, _=None) -> None:
        one = self.value[self.number]
        self._which.value = self.number
        rows = []
        for row in one.rows:
            pairs = enumerate(zip(row["tokens"], row["activations"], strict=True))
            cells = [{"text": token.strip() or token, "value": float(value) / (one.max or 1.0), "marked": i == row["peak"],
                      "tip": f"{token!r}: activation {value:.2f} (text {row['text']})"} for i, (token, value) in pairs]  # fmt: skip
            rows.append({"name": f"{row['max']:.2f}", "cells": cells})
        promoted, suppressed = (", ".join(f"{token.strip()} {value:+.2f}" for token, value in side[:6])
                                for side in (one.promoted, one.suppressed))  # fmt: skip
        self._tokens.data = {
            "table": False, "title": str(one.component), "rows": rows, "alt": "activation",
            "subtitle": f"fires at {one.density:.2%} of {one.n_tokens} tokens; strongest texts first, the peak underlined",
            "note": f"promotes {promoted}    suppresses {suppressed}",
        }  # fmt: skip
        self.say_code(self.code)
