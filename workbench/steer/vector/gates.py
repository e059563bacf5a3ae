"""Fitting a gate: where, along which direction and above which threshold can two kinds of prompts be told apart?"""

from __future__ import annotations

import torch

from workbench.component import components
from workbench.gate import BY, Gate
from workbench.steer.vector.choosing import Choice
from workbench.steer.vector.directions import pca_direction, probe_weights
from workbench.steer.vector.reading import sides, states
from workbench.task import Task

DIRECTIONS = {
    "means": lambda yes, no: yes.mean(0) - no.mean(0),
    "pca": lambda yes, no: pca_direction(*(side[: min(len(yes), len(no))] for side in (yes, no))),
    "probe": lambda yes, no: probe_weights(yes, no, 0.1),
}


def fit_gate(
    model, task: Task, at, *, by: str = "dot", direction: str = "means", positive: str | None = None
) -> Choice:
    """For which prompts should an intervention act? A gate that opens for the positive side of a task.

    At each place a direction is fitted on split "fit", and the threshold with the best F1 there, in the middle of the gap.
    The place with the best F1 on split "select" wins (of equals the one with the widest gap, so that new prompts do not
    fall beside it; where there is no such split, F1 on "fit" decides).

    Args:
        task: pairs (open for clean prompts) or texts with two labels. The closed side must hold every kind of prompt for
            which the gate is to stay closed, everyday text too: of a kind that is on neither side nothing was fitted, and
            whether the gate opens there is chance.
        at: a place with a position of the prompt, or a list or family of them. A gate is read no later in the pass than what
            it gates, so give only places up to there: for a push at "resid_post.3", ["resid_post.1@-1", "resid_post.3@-1"];
            "resid_post.*@-1" may choose the last block, which can gate generated tokens only (phase="generation").
        by: "dot" or "cosine", see `wb.Gate`. direction: "probe" (the weights of a logistic probe, which turn away
            from what varies within both sides), "means" (difference of means) or "pca" (as CAST).
        positive: for labelled texts, the label to open for; the first row's by default. Pairs take none.
    Returns:
        Choice; `best` is the gate, for `push.gated(choice.best)`; `~gate` opens for the other side. Columns: threshold,
        f1_fit, f1_select, accuracy_select, gap (between the sides' closest readings on "fit", in standard deviations; below 0
        they overlap). Places where both sides have the same mean, such as a position before they differ, have no direction
        and are left out of the table.
    Raises:
        ValueError: for a task with one side only, `positive` given for pairs, or sides that do not differ at any place.
    Source:
        Lee et al. 2025 (CAST), section 3.3: place, direction and threshold by F1.
    """
    import pandas as pd

    if direction not in DIRECTIONS or by not in BY:
        raise ValueError(f"direction={direction!r}, by={by!r}: choose {', '.join(map(repr, DIRECTIONS))}, and "
                         f"{' or '.join(map(repr, BY))}.")  # fmt: skip
    task, places = Task.of(task), model.names.expand(components(at))
    fit = [states(model, side, places) for side in sides(model, task, positive)]
    has = "select" in task.column("split")
    held = [states(model, side, places) for side in sides(model, task, positive, "select")] if has else None
    lines, gates = [], []
    for one in places:
        yes, no = fit[0][one], fit[1][one]
        if torch.equal(yes.mean(0), no.mean(0)):
            continue
        along = DIRECTIONS[direction](yes, no)
        gate = Gate(one, along, by=by)
        a, b = gate.reading(yes), gate.reading(no)
        threshold, f1 = best_threshold(a, b)
        gate = Gate(one, along, threshold, by=by)
        line = {
            "at": str(one),
            "threshold": threshold,
            "f1_fit": f1,
            "f1_select": float("nan"),
            "accuracy_select": float("nan"),
        }
        if held is not None:
            opened, wrong = gate.open(held[0][one]), gate.open(held[1][one])
            line["f1_select"] = _f1(int(opened.sum()), int((~opened).sum()), int(wrong.sum()))
            line["accuracy_select"] = float(torch.cat([opened, ~wrong]).float().mean())
        line["gap"] = float((a.min() - b.max()) / torch.cat([a, b]).std())
        lines.append(line)
        gates.append(gate)
    if not lines:
        raise ValueError(f"The two sides of task {task.name!r} do not differ at any of these places, so no gate can tell them "
                         "apart. Read it at or after the place where they differ, for example at position -1.")  # fmt: skip
    frame, ruling = pd.DataFrame(lines), "f1_select" if has else "f1_fit"
    chosen = frame.sort_values([ruling, "gap"], ascending=False, kind="stable").index[0]
    frame["chosen"] = frame.index == chosen
    return Choice(gates[chosen], frame, f"The best {ruling} of {len(frame)} places, and among equals the widest gap.")


def best_threshold(yes: torch.Tensor, no: torch.Tensor) -> tuple[float, float]:
    """Above which reading are most of the positive rows, and few others? (threshold, F1), in the middle between readings.

    Args:
        yes, no: readings of the positive and of the negative rows.
    """
    values = torch.cat([yes, no]).double().unique()  # sorted
    cuts = torch.cat([values[:1] - 1, (values[1:] + values[:-1]) / 2])
    f1 = [_f1(int((yes >= cut).sum()), int((yes < cut).sum()), int((no >= cut).sum())) for cut in cuts]
    best = max(range(len(cuts)), key=f1.__getitem__)
    return float(cuts[best]), f1[best]


def _f1(hits: int, missed: int, wrong: int) -> float:
    return 2 * hits / max(1, 2 * hits + missed + wrong)
