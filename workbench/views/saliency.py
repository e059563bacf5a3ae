"""Which tokens does the answer hang on? Prompts as text, each token on the colour of its score, over their mean."""

from __future__ import annotations

import ipywidgets as widgets
import numpy as np
import traitlets
from traitlets import Any, List

from workbench.component import Component
from workbench.views.callback import guarded
from workbench.views.tokens import Tokens
from workbench.views.view import View


class SaliencyView(View):
    """Scores of tokens: the mean over prompts on top, then prompts; blue speaks for the answer, red against it.

    Colours are in units of the metric on one scale for all prompts. The null is one of means over prompts, so only the
    top line can be within it: faint and dotted. A click selects a position, in all lines; ctrl or shift adds.

    Args:
        value: `TokenScores` (`wb.locate.gradient.saliency`, `integrated_gradients`).
        prompts: how many, from the first on, or a list of their numbers.
        selected: components to begin with ("embed@3").
    Attributes:
        prompts: the numbers of the prompts shown. Can be set.
        selected: the chosen positions as components, such as embed@3. Can be set.

    Example:
        >>> view = wb.show(wb.locate.gradient.saliency(model, task))  # doctest: +SKIP
        >>> off = wb.Zero(at=view.selected)  # doctest: +SKIP
    """

    value = Any()
    prompts = List()
    selected = List()

    def __init__(self, value, prompts=3, selected=()):
        super().__init__(value=value)
        self._tokens = Tokens()
        first = list(range(min(prompts, len(value.tokens)))) if isinstance(prompts, int) else list(prompts)
        self._from = widgets.BoundedIntText(
            value=0, min=0, max=max(0, len(value.tokens) - 1), step=max(1, len(first)), description="from prompt",
            layout={"width": "180px"}, style={"description_width": "initial"})  # fmt: skip
        self._clear = widgets.Button(description="clear", layout={"width": "70px"})
        self.set_trait("prompts", first)
        self._draw()
        self._from.observe(guarded(self, self._paged), "value")
        self._clear.on_click(guarded(self, lambda _: self.set_trait("selected", [])))
        self._tokens.observe(guarded(self, self._clicked), "selected")
        self.observe(guarded(self, self._draw), "prompts")
        self.observe(self._show_selection, "selected")
        controls = widgets.HBox([*([self._from] if len(value.tokens) > len(first) else []), self._clear])
        controls.add_class("wb-row")
        self.fill(self._tokens, controls)
        self.selected = list(selected)
        self._show_selection()

    @traitlets.validate("prompts")
    def _there(self, proposal) -> list[int]:
        for one in proposal["value"]:
            if not (isinstance(one, (int, np.integer)) and 0 <= one < len(self.value.tokens)):
                raise ValueError(
                    f"prompts: {one!r} is none of the {len(self.value.tokens)} prompts, which count from 0."
                )
        return [int(one) for one in proposal["value"]]

    @traitlets.validate("selected")
    def _known(self, proposal) -> list[Component]:
        found, longest = [], max(map(len, self.value.tokens))
        for one in map(Component.parse, proposal["value"]):
            inside = isinstance(one.position, int) and -longest <= one.position < longest
            if one not in self.value.components and not (one.kind == "embed" and inside):
                raise ValueError(f"{one} is no token of these prompts. Choose embed@0 to embed@{longest - 1}, or one of those "
                                 f"scored, such as {self.value.components[0]}.")  # fmt: skip
            found.append(one)
        return list(dict.fromkeys(found))

    @property
    def code(self) -> str:
        """The selection as code: paste it where a method wants `at`."""
        return "[" + ", ".join(f'"{one}"' for one in self.selected) + "]"

    def figure(self):
        return self.value.strip(self.prompts) if self.prompts else self.value.plot()

    def __repr__(self) -> str:
        return f"SaliencyView({self.value!r}, prompts {', '.join(map(str, self.prompts))})"

    # between the value and the controls

    def _draw(self, _=None) -> None:
        scores = self.value
        limit = max((float(np.abs(one).max()) for one in scores.by_token if len(one)), default=0.0) or 1.0
        rows = [{"name": "mean", "cells": [self._mean(k, limit) for k in range(len(scores.components))]}]
        for i in self.prompts:
            cells = [{"text": token.strip() or token, "value": float(value) / limit, "key": f"embed@{k}",
                      "tip": f"prompt {i}, embed@{k} {token!r}: {value:+.3f} ({scores.metric})"}
                     for k, (token, value) in enumerate(zip(scores.tokens[i], scores.by_token[i], strict=True))]  # fmt: skip
            rows.append({"name": f"prompt {i}", "cells": cells})
        faint = any(cell["faint"] for cell in rows[0]["cells"])
        gap = scores.gaps[np.isfinite(scores.gaps)]
        note = ["Faint and dotted: the mean is no larger than the null reaches in 95 of 100 cases."] if faint else []
        note += [f"Null of the mean: {scores.null}."] if scores.null else []
        note += [f"Median completeness gap {np.median(gap):.1%}."] if len(gap) else []
        self._tokens.data = {
            "table": False, "many": True, "rows": rows, "title": f"{scores.method}: which tokens does the answer hang on?",
            "subtitle": scores.title, "alt": "tokens with their scores", "note": " ".join([*note, scores.why]).strip(),
            "scale": {"low": f"{-limit:+.3g}".replace("-", "\u2212"), "high": f"{limit:+.3g}", "unit": scores.metric},
        }  # fmt: skip
        self._cells = [(row, i, cell["key"]) for row, line in enumerate(rows) for i, cell in enumerate(line["cells"])]
        self._show_selection()

    def _mean(self, k: int, limit: float) -> dict:
        scores, one = self.value, self.value.components[k]
        label, mean, null = scores.labels.get(one.position), float(scores.per_prompt[k].mean()), scores.null_p95[k]
        spread = (
            "no interval"
            if np.isnan(scores.ci_lo[k])
            else f"95 % interval [{scores.ci_lo[k]:+.3f}, {scores.ci_hi[k]:+.3f}]"
        )
        within = bool(abs(scores.values[k]) <= null)
        beside = "no null" if np.isnan(null) else f"null p95 {null:.3f}{', within the null' if within else ''}"
        text = one.position if label in (None, "·") else label
        return {"text": str("all" if text is None else text), "value": mean / limit, "key": str(one), "faint": within,
                "tip": f"{one}: score {scores.values[k]:+.3f}    {spread}    {beside}    mean {mean:+.3f} ({scores.metric})"}  # fmt: skip

    def _paged(self, change) -> None:
        many = max(1, len(self.prompts))
        self.prompts = list(range(change["new"], min(change["new"] + many, len(self.value.tokens))))

    def _clicked(self, change) -> None:
        key, flat = {(row, i): key for row, i, key in self._cells}, change["new"]
        self.selected = [Component.parse(one) for one in dict.fromkeys(key[at] for at in zip(flat[::2], flat[1::2]))]

    def _show_selection(self, _=None) -> None:
        wanted = [str(one) for one in self.selected]
        self._tokens.selected = [
            part for one in wanted for row, i, key in self._cells if key == one for part in (row, i)
        ]
        self.say_code(self.code)
