"""Pictures of the values, in matplotlib. Layers run upwards, as the stream does; blue is positive, red negative."""

from __future__ import annotations

import io
import textwrap
from functools import partial
from itertools import cycle

import numpy as np

from workbench.component import KINDS, Component

INK, FAINT, BLUE, GREY = "#222831", "#8a919c", "#2166ac", "#9aa3ad"
MARK, RED = "#e08a00", "#b2182b"


def picture(figure):
    """The same Figure, which a notebook shows when it is the last line of a cell; one made without pyplot would not."""
    figure._repr_png_ = partial(png, figure)
    return figure


def png(figure, dpi: int | None = None) -> bytes:
    """A matplotlib figure as the bytes of a PNG, without a date in them."""
    import warnings

    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # tokens of any script
        FigureCanvasAgg(figure).print_figure(file, format="png", dpi=dpi or figure.dpi, metadata={"Software": None})
    return file.getvalue()


def layout(scores) -> dict:
    """Where does each component stand? Row 0 is the bottom one, the lowest layer.

    Returns:
        rows, columns: their labels. row, column: [component], numbers from 0. tokens: [component], token text or "".
        upward, across: what rows and columns count. wide: whether the columns are positions with long labels.
    """
    found = scores.components
    mixed = len({one.kind for one in found}) > 1
    headed = any(one.index is not None for one in found)
    placed = any(one.position is not None for one in found)
    sites = sorted({one.site for one in found}, key=lambda site: Component(*site))
    columns = list(dict.fromkeys((one.index, one.position) for one in found))
    if all(isinstance(part, int | None) for column in columns for part in column):
        columns.sort(key=lambda column: [(-1, 0) if part is None else (part < 0, part) for part in column])
    across = " and ".join(filter(None, [headed and (KINDS[found[0].kind][0] or "index"), placed and "position"]))

    def label(column) -> str:
        index, position = column
        token = scores.labels.get(position)
        place = str(position) if token is None else f"{token} {position}"
        parts = [*([str(index)] if index is not None else []), *([place] if position is not None else [])]
        return " @".join(parts) or "all"

    row_of, column_of = {s: i for i, s in enumerate(sites)}, {c: i for i, c in enumerate(columns)}
    return {
        "rows": [".".join(str(part) for part in site if part is not None) if mixed or site[1] is None else str(site[1])
                 for site in sites],
        "columns": [label(column) for column in columns],
        "row": [row_of[one.site] for one in found],
        "column": [column_of[one.index, one.position] for one in found],
        "tokens": [str(scores.labels.get(one.position, "")) for one in found],
        "upward": "component" if mixed else "layer", "across": across or "position", "wide": placed and len(columns) <= 12,
    }  # fmt: skip


def meaning(scores) -> str:
    """What the numbers are, for a colour bar."""
    share = {"denoising": "restored", "noising": "lost"}.get(scores.direction)
    return f"share of {scores.metric} {share} ({scores.direction})" if share else f"score ({scores.metric})"


def description(scores) -> dict:
    """Everything a drawing of scores needs, in plain JSON (NaN becomes null): `layout`, numbers, titles, legend."""
    place = layout(scores)
    faint = np.abs(scores.values) <= scores.null_p95
    best = scores.top(1)[0]
    kind = KINDS[scores.kind][1] if scores.kind in KINDS else "several kinds"
    note = "Faint with a dot: no larger than the null reaches in 95 of 100 cases."
    note += f" Null: {scores.null}." if scores.null else ""
    return {
        **place, "names": [str(one) for one in scores.components],
        "score": _plain(scores.values), "lo": _plain(scores.ci_lo), "hi": _plain(scores.ci_hi),
        "null": _plain(scores.null_p95), "faint": faint.tolist(), "best": scores.components.index(best),
        "limit": float(np.nanmax(np.abs(scores.values), initial=0)) or 1.0,
        "title": f"{scores.kind}: {kind}", "subtitle": scores.title, "unit": meaning(scores),
        "note": " ".join(part for part in (note if faint.any() else "", scores.why) if part),
        "alt": f"{scores.title}. {len(place['rows'])} rows ({place['upward']}, upwards) by {len(place['columns'])} "
               f"columns ({place['across']}). Largest {scores[best]:+.2f} at {best}.",
    }  # fmt: skip


def grid(scores, selected: list[int] = ()):
    """Scores as a heat map; cells within their null are faint and dotted, selected ones framed. Returns the Figure."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    data = description(scores)
    rows, columns, limit = data["rows"], data["columns"], data["limit"]
    x, y, faint = np.array(data["column"]), np.array(data["row"]), np.array(data["faint"])
    score = np.array(data["score"], float)
    shades = colormaps["RdBu"](Normalize(-limit, limit)(np.nan_to_num(score)))
    shades[faint] = 0.45 * shades[faint] + 0.55
    field = np.zeros((len(rows), len(columns), 4))
    field[y, x] = shades
    size = (min(10, max(4.6, 0.5 * len(columns) + 2)), min(6, max(2.4, 0.36 * len(rows) + 1.5)))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    ax = figure.add_subplot()
    ax.imshow(field, origin="lower", aspect="auto", interpolation="nearest")
    if len(columns) <= 60:
        ax.scatter(x[faint], y[faint], s=2, color=FAINT)
    for k in np.flatnonzero(~faint & (np.abs(score) > 0.005 * limit)) if len(columns) <= 16 and len(rows) <= 16 else ():
        ink = "white" if abs(score[k]) > 0.6 * limit else INK
        ax.text(x[k], y[k], f"{score[k]:+.2f}", ha="center", va="center", fontsize=7, color=ink)
    for k in selected:
        ax.add_patch(Rectangle((x[k] - 0.5, y[k] - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=2, clip_on=False))
    across, up = -(-len(columns) // 24), -(-len(rows) // 24)
    turned = max(map(len, columns)) > 3
    ax.set_xticks(range(0, len(columns), across), columns[::across], rotation=50 if turned else 0,
                  ha="right" if turned else "center", fontsize=8, parse_math=False)  # fmt: skip
    ax.set_yticks(range(0, len(rows), up), rows[::up], fontsize=8)
    ax.set_xlabel(data["across"], fontsize=8.5)
    ax.set_ylabel(data["upward"], fontsize=8.5)
    wide = int(size[0] * 13)
    title = "\n".join(textwrap.wrap(data["title"], wide) + textwrap.wrap(data["subtitle"], wide))
    ax.set_title(title, fontsize=8.5, loc="left", color=INK, parse_math=False)
    colours = figure.colorbar(ScalarMappable(Normalize(-limit, limit), "RdBu"), ax=ax, pad=0.02)
    colours.set_label(data["unit"], fontsize=8)
    colours.ax.tick_params(labelsize=7.5, length=0)
    if data["note"]:
        note = "\n".join(textwrap.wrap(data["note"], int(1.3 * wide)))
        figure.supxlabel(note, x=0.01, ha="left", fontsize=7, color=FAINT, parse_math=False)
    ax.tick_params(length=0)
    for side in [*ax.spines.values(), *colours.ax.spines.values()]:
        side.set_visible(False)
    return picture(figure)


def forest(report):
    """Every task of a report: the change of what it is judged by, with its interval, recipe above controls; of a gap the
    relative change. Returns the Figure."""
    from matplotlib.figure import Figure

    table, judged = report.frame, {"accuracy": "accuracy", "gap": "relative gap", "prob": "probability"}
    table = table[table.metric.isin(judged)]
    if "relative" in table:
        shares = table[["relative", "relative_lo", "relative_hi"]].set_axis(["change", "ci_lo", "ci_hi"], axis=1)
        table = table.assign(**shares.where(table.metric == "gap", table))
    groups = list(table.groupby(["role", "task", "split"], sort=False))
    arms = list(dict.fromkeys(table.arm))
    marks = dict(zip(arms[1:], cycle("dsx^vPph*")))
    figure = Figure(figsize=(7.2, 0.9 + 0.15 * len(groups) * (len(arms) + 1)), dpi=110, layout="constrained")
    ax = figure.add_subplot()
    y, ticks, names = 0.0, [], []
    for (role, task, split), part in groups:
        ticks.append(y - (len(part) - 1) / 2)
        what = "" if part.metric.iloc[0] == "accuracy" else f", {judged[part.metric.iloc[0]]}"
        names.append(f"{task}\n{role}, {split}, n={int(part.n.iloc[0])}{what}")
        for _, row in part.iterrows():
            own = row.arm == "recipe"
            colour = (BLUE if role == "target" else INK) if own else GREY
            spread = np.array([[row.change - row.ci_lo], [row.ci_hi - row.change]])
            ax.errorbar(row.change, y, xerr=np.nan_to_num(spread).clip(min=0), fmt="o" if own else marks[row.arm], color=colour,
                        markersize=5 if own else 4, capsize=2.5, linewidth=1.4)  # fmt: skip
            y -= 1
        y -= 0.8
    for i, arm in enumerate(arms):
        ax.plot([], [], "o" if i == 0 else marks[arm], color=BLUE if i == 0 else GREY, label=arm)
    ax.axvline(0, color=FAINT, linewidth=0.8)
    ax.set_yticks(ticks, names, fontsize=8)
    measured = " or ".join(judged[name] for name in dict.fromkeys(table.metric))
    ax.set_xlabel(f"change in {measured} (after minus before), 95 % interval", fontsize=8)
    ax.set_title(report.name, loc="left", fontsize=9, color=INK)
    ax.legend(fontsize=7, frameon=False, loc="best")
    ax.tick_params(labelsize=8, length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    return picture(figure)


def _plain(values) -> list:
    return [None if not np.isfinite(x) else float(f"{x:.5g}") for x in np.asarray(values, float)]
