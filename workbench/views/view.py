"""What every view shares: a place for errors, a line of code, and a picture that is still there after reopening."""

from __future__ import annotations

import base64
import html
from pathlib import Path

import ipywidgets as widgets
from traitlets import Unicode

from workbench.plot import png

STATIC = Path(__file__).parent / "static"


class View(widgets.VBox):
    """A value on the screen.

    Displaying one emits two outputs: the widget, and a still picture of it. A style rule hides the picture while the
    widget is alive; on GitHub, in an untrusted notebook or without a kernel the picture is what remains.

    Attributes:
        error: what went wrong in the last callback; "" when nothing did.
    """

    error = Unicode("")

    def __init__(self, **traits):
        super().__init__(**traits)
        self.add_class("wb-view")
        style = (STATIC / "view.css").read_text(encoding="utf-8")
        self._style = widgets.HTML(f"<style>{style}</style>", layout={"display": "none"})
        self._error = widgets.HTML(layout={"display": "none"})
        self._code = widgets.HTML()
        self.observe(self._show_error, "error")

    def fill(self, *children) -> None:
        """The parts of the view, from top to bottom; the code line and the error area come last."""
        self.children = (self._style, *children, self._code, self._error)

    def say_code(self, code: str) -> None:
        """Show the line of code that stands for the present state."""
        self._code.value = f'<code class="wb-code" title="the same as code">{html.escape(code)}</code>'

    def _show_error(self, _) -> None:
        self._error.value = f'<div class="wb-error" role="alert">{html.escape(self.error)}</div>' if self.error else ""
        self._error.layout.display = "" if self.error else "none"

    def figure(self):
        """The still picture, as a matplotlib figure."""
        raise NotImplementedError

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self._repr_mimebundle_(), raw=True)
        still = {"image/png": base64.b64encode(png(self.figure())).decode(), "text/plain": f"<picture of {self!r}>"}
        display(still, raw=True, metadata={"needs_background": "light"})


def script(name: str) -> tuple[str, str]:
    """The JavaScript and CSS of an anywidget, from `static/`; nothing is ever fetched from a network."""
    read = [(STATIC / file).read_text(encoding="utf-8") for file in ("theme.js", f"{name}.js", f"{name}.css")]
    return read[0] + read[1], read[2]


def image(data: bytes, alt: str, width: int | None = None, css: str = "") -> str:
    """A PNG as an HTML element with its alternative text."""
    size = f' width="{width}"' if width else ""
    return (f'<img class="{html.escape(css)}" alt="{html.escape(alt)}"{size} '
            f'src="data:image/png;base64,{base64.b64encode(data).decode()}">')  # fmt: skip
