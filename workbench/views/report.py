"""Did it help, and what did it cost? The verdict of a report, over its picture."""

from __future__ import annotations

import html

import ipywidgets as widgets
from traitlets import Any

from workbench.plot import png
from workbench.views.names import written
from workbench.views.view import View, image


class ReportView(View):
    """A report: the verdict in words, and every task beside its controls.

    Attributes:
        value: the `Report`.
    """

    value = Any()

    def __init__(self, value):
        super().__init__(value=value)
        figure = value.plot()
        width = int(figure.get_figwidth() * 96)
        words = f'<pre class="wb-verdict">{html.escape(value.verdict)}</pre>'
        picture = image(png(figure, dpi=200), value.verdict, width, "wb-card")
        self.say_code(f"{written(value, 'report')}.frame")
        self.fill(widgets.HTML(words), widgets.HTML(picture))

    def figure(self):
        return self.value.plot()

    def __repr__(self) -> str:
        return f"ReportView({self.value!r})"
