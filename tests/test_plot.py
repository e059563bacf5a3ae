"""One way to show a figure in a notebook, and it is the picture itself."""

import re
from pathlib import Path

from matplotlib.figure import Figure

from workbench.plot import picture, png

PACKAGE = Path(__file__).parents[1] / "workbench"


def test_a_picture_is_shown_as_its_png_and_is_the_same_each_time():
    figure = Figure(figsize=(1, 1), dpi=50)
    figure.subplots().set_title("文字 no font here has this")  # no warning
    assert picture(figure) is figure and figure._repr_png_()[:4] == b"\x89PNG"
    assert png(figure) == png(figure) == figure._repr_png_() and len(png(figure, dpi=100)) > len(png(figure))


def test_every_figure_of_a_value_goes_through_it():
    for path in [*PACKAGE.glob("locate/**/*.py"), *PACKAGE.glob("steer/**/*.py"), *PACKAGE.glob("improve/**/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "_repr_png_" not in text, f"{path.name}: use workbench.plot.picture"
        if re.search(r"\bFigure\(", text):
            assert "picture(" in text, f"{path.name} makes a figure that a notebook would not show"
