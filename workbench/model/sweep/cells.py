"""Patches as cells of a table: which need a run, where it is taken up, and which share a batch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm import tqdm

from workbench.component import Component
from workbench.model.names import INSIDE, MIXTURE, Names
from workbench.model.run import Model
from workbench.model.sweep.capture import Run, read_by, span, stream_at
from workbench.model.sweep.resume import WRITTEN, resume

CALL_COST = 64  # what one more call costs, in tokens of computation: decides how many starts share a batch
TOKENS_PER_CALL = 4096  # cached ones included
LOGITS_PER_CALL = 2**27
ON_THE_WAY = (*INSIDE, *MIXTURE)  # what is set inside its block, which is run again


@dataclass
class Cell:
    """One patch of a sweep: components that change together, each with the positions it covers in each prompt."""

    parts: dict[Component, list[list[int]]]

    def of(self, prompts: list[int]) -> Cell:
        """The same patch for some of the prompts."""
        return Cell({one: [positions[i] for i in prompts] for one, positions in self.parts.items()})


class Row(NamedTuple):
    """One prompt of one cell: the first column that must be run again, and what changes in which columns."""

    start: int
    cell: int
    prompt: int
    parts: list[tuple[Component, list[int]]]


def sweep(model: Model, base: Run, source: Run, donors, cells: list[Cell], read, progress=None):
    """For each cell and prompt: the base run with the cell's activations taken from the source run.

    Args:
        donors: [prompt], which prompt of `source` each prompt of `base` takes its activations from.
        read: (last-position logits [row, d_vocab], prompt index [row]) -> [row], the metric.
        progress: called with the number of patches done.
    Returns:
        ([cell, prompt] metric values, cost in forward-pass equivalents of the base batch).
    """
    names, (n, width) = model.names, base.ids.shape
    donors = torch.as_tensor(donors)
    found = read(base.logits, torch.arange(n))[None].repeat(len(cells), 1)
    differ = base.marks != source.marks[donors]
    live, pads = [set(row.nonzero()[:, 0].tolist()) for row in differ], base.pads
    groups: dict[tuple, list[Row]] = {}
    for c, cell in enumerate(cells):
        group = _group(names, list(cell.parts))
        for prompt in range(n):
            if not live[prompt]:
                continue
            parts, starts = [], []
            for one, positions in cell.parts.items():
                columns = [p + pads[prompt] for p in positions[prompt]]
                columns, start = _needed(names, one, columns, width, live[prompt])
                if columns:
                    parts.append((one, columns))
                    starts.append(start)
            if parts:
                groups.setdefault(group, []).append(Row(min(starts), c, prompt, parts))

    def call(entry, start, part):
        return _patched(model, base, source, donors, entry, start, part)

    return found, run_rows(model, base, groups, call, read, found, progress)


def run_rows(model: Model, base: Run, groups: dict[tuple, list[Row]], call, read, found, progress=None) -> float:
    """Rows in batches that start together: `found[cell, prompt]` gets the metric of what `call(group, start, rows)` gives.

    Args:
        groups: (layer, ...) -> rows that can share a call. call: returns last-position logits [row, d_vocab].
    Returns:
        Cost in forward-pass equivalents of the base batch.
    """
    (n, width), cost, layers = base.ids.shape, 0.0, model.names.n_layers
    for group, rows in sorted(groups.items()):
        for start, part in _batches(rows, width, model.names.d_vocab):
            prompts = torch.tensor([row.prompt for row in part])
            found[[row.cell for row in part], prompts] = read(call(group, start, part), prompts)
            cost += len(part) * (width - start) * (layers - group[0]) / (layers * n * width)
            if progress:
                progress(len(part))
    return cost


def bar(total: int, show: bool):
    """A progress bar for sweeps that take more than five seconds; none in tests (WORKBENCH_STRICT=1)."""
    hidden = not show or os.environ.get("WORKBENCH_STRICT") == "1"
    return tqdm(total=total, desc="patching", leave=False, delay=5, disable=hidden, mininterval=0.5)


def _entry(names: Names, one: Component) -> tuple[int, str]:
    """Where the pass is taken up for a component alone: before block `layer`, or between its attention and FFN ("mid")."""
    one = names.saes[one.name].at if one.kind == "feature" else one
    kind, layer = one.kind, one.layer
    if kind == "resid_pre" or kind in ON_THE_WAY:
        return layer, "pre"
    if kind in ("resid_post", "mlp_out", "neuron") or names.parallel:
        return layer + 1, "pre"
    return layer, "mid"


def _group(names: Names, parts: list[Component]) -> tuple:
    """(layer, stage, how): how is "stream", the kind whose difference is added, or "set" for what is set on the way."""
    (layer, stage), kind = _entry(names, parts[0]), parts[0].kind
    if len(parts) == 1 and kind not in ON_THE_WAY:
        return layer, stage, kind if kind in WRITTEN else f"feature {parts[0].name}" if kind == "feature" else "stream"
    return min(_entry(names, one)[0] if one.kind.startswith("resid") else one.layer for one in parts), "pre", "set"


def _needed(names: Names, one: Component, columns: list[int], width: int, live: set[int]) -> tuple[list[int], int]:
    """The columns of a patch that can have an effect, and the first that must be run again."""
    depth, last = _entry(names, one), names.n_layers - 1
    read_by_all = one.kind in ("k", "v") and one.layer == last  # by the last position, from the cache
    if depth == (0, "pre") and one.kind == "resid_pre":
        columns = [c for c in columns if c in live]
    elif (
        depth[0] > last
        or depth == (last, "mid")
        or (one.layer == last and one.kind in ("q", "attn_scores", "pattern", *MIXTURE))
    ):
        columns = [c for c in columns if c == width - 1]  # after the last attention, no other reaches the prediction
    columns = [c for c in columns if c >= min(live)]
    return columns, width - 1 if read_by_all else min(columns, default=0)


def _batches(rows: list[Row], width: int, vocabulary: int):
    """Rows by starting column, neighbouring starts joined where one call fewer is worth the extra tokens."""
    rows = sorted(rows, key=lambda row: row.start)
    starts = sorted({row.start for row in rows})
    counts = [sum(row.start == start for row in rows) for start in starts]
    best: list[tuple[float, int]] = [(0.0, 0)]  # cheapest way to do the first j starts, and where its last batch begins
    for j in range(1, len(starts) + 1):
        options = [(best[i][0] + CALL_COST + sum(counts[i:j]) * (width - starts[i]), i) for i in range(j)]
        best.append(min(options))
    cuts, j = [], len(starts)
    while j:
        cuts.append((best[j][1], j))
        j = best[j][1]
    size = max(1, min(TOKENS_PER_CALL // width, LOGITS_PER_CALL // vocabulary))
    for i, j in reversed(cuts):
        together = [row for row in rows if starts[i] <= row.start <= starts[j - 1]]
        for k in range(0, len(together), size):
            yield starts[i], together[k : k + size]


def _patched(model: Model, base: Run, source: Run, donors, group, start: int, part: list[Row]) -> torch.Tensor:
    """Logits [row, d_vocab] of rows that share an entry."""
    (layer, stage, how), names = group, model.names
    prompts = torch.tensor([row.prompt for row in part])
    theirs, stream = donors[prompts], stream_at(names, base, layer, stage, prompts, start)
    if how == "set":
        edits = {}
        for site, where in _wheres(names, source, part, start).items():
            new = source.value(names, *site)[theirs, 0 if site[0] in ("k", "v") else start :].to(stream.device)
            if site == ("resid_pre", layer) or (layer == names.n_layers and site == ("resid_post", layer - 1)):
                stream = torch.where(where.to(stream.device), new, stream)
            else:
                edits[site] = (where.to(stream.device), new)
        return resume(model, base, prompts, start, layer, stage, stream, edits)[0]
    ((one, _),) = part[0].parts
    if how in WRITTEN:
        old, own = base.acts[how, one.layer][prompts, start:], source.acts[how, one.layer][theirs, start:]
        (where,) = _wheres(names, source, part, start).values()
        add = (how, one.layer, old, torch.where(where.to(old.device), own.to(old), old))
        return resume(model, base, prompts, start, layer, stage, stream, add=add)[0]
    new = stream.clone()
    for which in {row.parts[0][0].site for row in part}:
        rows = [i for i, row in enumerate(part) if row.parts[0][0].site == which]
        columns = torch.zeros(len(rows), stream.shape[1], 1, dtype=torch.bool)
        for i, row in enumerate(rows):
            columns[i, [c - start for c in part[row].parts[0][1]]] = True
        if which[0] == "feature":
            moved = stream[rows] + _features(names, base, source, [part[i] for i in rows], theirs[rows], start).to(
                stream
            )
        elif which[0] in ("attn_out", "mlp_out"):
            moved = stream[rows] + source.acts[which][theirs[rows], start:] - base.acts[which][prompts[rows], start:]
        else:
            moved = source.value(names, *which)[theirs[rows], start:]
        new[rows] = torch.where(columns.to(stream.device), moved.to(stream), stream[rows])
    return resume(model, base, prompts, start, layer, stage, new)[0]


def _wheres(names: Names, source: Run, part: list[Row], start: int) -> dict[tuple, torch.Tensor]:
    """site -> [row, column, width], true where a row's patch is; columns from `start` on, for k and v all."""
    found, columns = {}, source.ids.shape[1]
    for i, row in enumerate(part):
        for one, own in row.parts:
            site = one.site
            if site[0] == "resid_post" and site[1] + 1 < names.n_layers:
                site = ("resid_pre", site[1] + 1)
            offset, width = 0 if site[0] in ("k", "v") else start, source.value(names, *site).shape[-1]
            where = found.setdefault(site, torch.zeros(len(part), columns - offset, width, dtype=torch.bool))
            where[i, [c - offset for c in own], span(names, one, width)] = True
    return found


def _features(names: Names, base: Run, source: Run, part: list[Row], theirs, start: int) -> torch.Tensor:
    """How the place of an SAE moves when one feature in each row changes, the error term kept: [row, column, width]."""
    (one, _), prompts = part[0].parts[0], torch.tensor([row.prompt for row in part])
    sae, indices = names.saes[one.name], base.features[one.name]
    which = torch.tensor([indices.index(row.parts[0][0].index) for row in part])
    old, new = base.acts["feature", one.name][prompts, start:], source.acts["feature", one.name][theirs, start:]
    change = torch.zeros_like(old)
    rows = torch.arange(len(part))
    change[rows, :, which] = (new - old)[rows, :, which]
    return sae.change(change, read_by(names, base, sae)[prompts, start:], indices)
