"""One site changed in many ways: each prompt is run once, and each change goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from workbench.component import Component
from workbench.intervention import Intervention
from workbench.model import Prompts
from workbench.model.sweep import capture, resume, span, stream_at

RESUMED = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")  # others take a whole forward pass
TOKENS = 4096  # of prompts kept with all their activations at a time


@dataclass(frozen=True, eq=False, repr=False)
class Apply(Intervention):
    """Any function of the activations [row, column, width] of a batch that is run in one pass."""

    function: Callable

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return self.function(x)


def each(model, prompts: Prompts, one: Component, changes: list, read) -> np.ndarray:
    """What does every change of one site do to every prompt? [change, row].

    Args:
        one: a site with a position. changes: functions (activations [row, column, width], rows [row]) -> new activations, of
            which those at the position are taken; None changes nothing.
        read: (logits [row, d_vocab] at the last position, rows [row]) -> [row].
    """
    found = np.zeros((len(changes), len(prompts.ids)))
    order = sorted(range(len(prompts.ids)), key=lambda row: len(prompts.ids[row]))  # so that little is padding
    step = max(1, TOKENS // prompts.width)
    for rows in (np.array(order[i : i + step]) for i in range(0, len(order), step)):
        part = Prompts([prompts.ids[row] for row in rows], spans=[prompts.spans[row] for row in rows])
        run = capture(model, part.ids, [one]) if one.kind in RESUMED else None
        for number, change in enumerate(changes):
            if run is None:
                edits = [] if change is None else [Apply(one, function=partial(change, rows=rows))]
                logits = model.logits(part, *edits)
            else:
                logits = run.logits if change is None else _resumed(model, run, part, one, partial(change, rows=rows))
            found[number, rows] = read(logits.float().cpu(), torch.as_tensor(rows)).numpy()
    return found


def _resumed(model, run, part: Prompts, one: Component, change) -> torch.Tensor:
    names, every = model.names, torch.arange(len(part.ids))
    columns = [part.columns(one, row) for row in range(len(part.ids))]
    start = min(map(min, columns))
    where = torch.zeros(len(part.ids), part.width - start, 1, dtype=torch.bool)
    for row, own in enumerate(columns):
        where[row, [column - start for column in own]] = True
    if one.kind in ("resid_pre", "resid_post"):
        layer = one.layer + (one.kind == "resid_post")
        stream = stream_at(names, run, layer, "pre", every, start)
        stream = torch.where(where.to(stream.device), change(stream).to(stream), stream)
        return resume(model, run, every, start, layer, "pre", stream)[0]
    value = run.value(names, *one.site)[:, start:].clone()
    own = span(names, one, value.shape[-1])
    value[..., own] = change(value[..., own]).to(value)
    where = where.repeat(1, 1, value.shape[-1])
    where[..., : own.start or 0] = False
    where[..., own.stop or value.shape[-1] :] = False
    stream = stream_at(names, run, one.layer, "pre", every, start)
    return resume(model, run, every, start, one.layer, "pre", stream, {one.site: (where, value)})[0]
