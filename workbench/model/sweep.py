"""Many patches in few forward passes, exactly.

A patch changes the residual stream at a depth and a position; nothing before either moves. So each patch starts there:
blocks below are skipped, positions before are read from cached keys and values, and patches that start at the same
depth share a batch. Patches that cannot have an effect (the prompts agree up to there, or no attention follows) are
not run. Results equal patching with full forward passes to float error.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import DynamicCache

from workbench.component import Component
from workbench.model.names import Names
from workbench.model.run import Model

CALL_COST = 64  # what one more call costs, in tokens of computation: decides how many starts share a batch
TOKENS_PER_CALL = 4096  # cached ones included
LOGITS_PER_CALL = 2**27


@dataclass
class Run:
    """One unpatched forward pass over prompts of equal length.

    Attributes:
        ids: [prompt, position]; acts: site -> [prompt, position, width]; logits: [prompt, d_vocab], last position.
        keys, values: per layer [prompt, head, position, d_head].
    """

    ids: torch.Tensor
    acts: dict
    keys: list
    values: list
    logits: torch.Tensor

    def rows(self, part: slice) -> Run:
        """The same run for some of its prompts."""
        return Run(self.ids[part], {k: v[part] for k, v in self.acts.items()}, [k[part] for k in self.keys],
                   [v[part] for v in self.values], self.logits[part])  # fmt: skip


@dataclass
class Cell:
    """One patch of a sweep: a component, and the positions it covers in each prompt."""

    component: Component
    positions: list[list[int]]


def capture(model: Model, ids: torch.Tensor, kinds) -> Run:
    """Run prompts of equal length once and keep what patching the given kinds needs.

    Raises:
        ValueError: when activations are not finite, naming the place.
    """
    nn, names, key = model.nnsight, model.names, model.cache_key
    sites = {("resid_pre", layer) for layer in range(names.n_layers)}
    sites |= {("resid_post", names.n_layers - 1)}
    for kind in kinds:
        if kind == "resid_mid":
            sites |= {("attn_out", layer) for layer in range(names.n_layers)}
        elif kind in ("attn_out", "mlp_out", "z"):
            sites |= {(kind, layer) for layer in range(names.n_layers)}
            if not names.parallel and kind != "mlp_out":
                sites |= {("attn_out", layer) for layer in range(names.n_layers)}
    rows, order = len(ids), sorted(sites, key=lambda site: Component(*site))

    def read():
        found = {site: names.place(*site, rows).get().clone() for site in order}
        out = nn.output
        layers = getattr(out, key).layers
        return found, [one.keys for one in layers], [one.values for one in layers], out.logits[:, -1].float()

    # a cache made without the config keeps every position, also where attention slides
    own = {key: DynamicCache(), "use_cache": True}
    found, keys, values, logits = model.trace(model.inputs(ids), read, logits_to_keep=1, **own)
    for (kind, layer), x in found.items():
        if not torch.isfinite(x).all():
            prompt = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"Activations are not finite (NaN or infinite) at {Component(kind, layer)}, prompt {prompt}: "
                             "check the weights, or load the model in float32.")  # fmt: skip
    return Run(ids, found, keys, values, logits)


def sweep(model: Model, base: Run, source: Run, donors, cells: list[Cell], read, progress=None):
    """For each cell and prompt: the base run with the cell's activations taken from the source run.

    Args:
        donors: [prompt], which prompt of `source` each prompt of `base` takes its activations from.
        read: (last-position logits [row, d_vocab], prompt index [row]) -> [row], the metric.
        progress: called with the number of patches done.
    Returns:
        ([cell, prompt] metric values, cost in forward-pass equivalents of the base batch).
    """
    n, width = base.ids.shape
    donors = torch.as_tensor(donors)
    found = read(base.logits, torch.arange(n))[None].repeat(len(cells), 1)
    differ = base.ids != source.ids[donors].to(base.ids)
    first_difference = [int(row.nonzero()[0]) if row.any() else width for row in differ]
    groups: dict[tuple, list] = {}
    for c, cell in enumerate(cells):
        depth = _depth(model.names, cell.component)
        for prompt, positions in enumerate(cell.positions):
            if _only_last_matters(model.names, depth):
                positions = [p for p in positions if p == width - 1]
            elif depth == (0, "pre"):
                positions = [p for p in positions if differ[prompt, p]]
            positions = [p for p in positions if p >= first_difference[prompt]]
            if positions:
                group = (*depth, cell.component.kind == "z")
                groups.setdefault(group, []).append((min(positions), c, prompt, positions))
    cost = 0.0
    for group, rows in sorted(groups.items()):
        for start, part in _batches(rows, width, model.names.d_vocab):
            logits = _resume(model, base, source, donors, cells, group, start, part)
            prompts = torch.tensor([prompt for _, _, prompt, _ in part])
            found[[c for _, c, _, _ in part], prompts] = read(logits, prompts)
            cost += len(part) * (width - start) * (model.names.n_layers - group[0]) / (model.names.n_layers * n * width)
            if progress:
                progress(len(part))
    return found, cost


def bar(total: int, show: bool):
    """A progress bar for sweeps that take more than five seconds; none in tests (WORKBENCH_STRICT=1)."""
    hidden = not show or os.environ.get("WORKBENCH_STRICT") == "1"
    return tqdm(total=total, desc="patching", leave=False, delay=5, disable=hidden, mininterval=0.5)


def _depth(names: Names, component: Component) -> tuple[int, str]:
    """Where the forward pass is taken up: before block `layer` ("pre"), or between its attention and FFN ("mid")."""
    kind, layer = component.kind, component.layer
    if kind == "resid_pre":
        return layer, "pre"
    if kind in ("resid_post", "mlp_out") or names.parallel:
        return layer + 1, "pre"
    return layer, "mid"


def _only_last_matters(names: Names, depth: tuple[int, str]) -> bool:
    """After the last attention, no other position reaches the prediction."""
    return depth[0] == names.n_layers or depth == (names.n_layers - 1, "mid")


def _batches(rows: list, width: int, vocabulary: int):
    """Rows by starting position, neighbouring starts joined where one call fewer is worth the extra tokens."""
    rows = sorted(rows, key=lambda row: row[0])
    starts = sorted({row[0] for row in rows})
    counts = [sum(row[0] == start for row in rows) for start in starts]
    best: list[tuple[float, int]] = [(0.0, 0)]  # cheapest way to do the first j starts, and where its last batch begins
    for j in range(1, len(starts) + 1):
        options = [(best[i][0] + CALL_COST + sum(counts[i:j]) * (width - starts[i]), i) for i in range(j)]
        best.append(min(options))
    cuts, j = [], len(starts)
    while j:
        cuts.append((best[j][1], j))
        j = best[j][1]
    for i, j in reversed(cuts):
        together = [row for row in rows if starts[i] <= row[0] <= starts[j - 1]]
        size = max(1, min(TOKENS_PER_CALL // width, LOGITS_PER_CALL // vocabulary))
        for k in range(0, len(together), size):
            yield starts[i], together[k : k + size]


def _resume(model: Model, base: Run, source: Run, donors, cells, group, start: int, part) -> torch.Tensor:
    """One call: rows of patched streams from `start` on, taken up at a depth; logits [row, d_vocab] at the end."""
    layer, stage, by_head = group
    nn, names = model.nnsight, model.names  # what the trace may carry away with it: not the model itself
    prompts = torch.tensor([prompt for _, _, prompt, _ in part])
    patched = torch.zeros(len(part), base.ids.shape[1], 1, dtype=torch.bool)
    for row, (_, _, _, positions) in enumerate(part):
        patched[row, positions] = True
    patched = patched[:, start:].to(base.logits.device)

    def of(run: Run, site: tuple, which) -> torch.Tensor:
        return run.acts[site][which, start:]

    stream, head, theirs = _stream(names, base, layer, stage, prompts, start), None, donors[prompts]
    if by_head:
        at = cells[part[0][1]].component.layer
        mine, own = of(base, ("z", at), prompts), of(source, ("z", at), theirs)
        heads = torch.tensor([cells[c].component.index for _, c, _, _ in part]).to(mine.device)
        column = torch.arange(mine.shape[-1], device=mine.device) // names.d_head
        head = (at, mine, torch.where(patched & (column == heads[:, None, None]), own, mine))
    else:
        stream = _patched_stream(names, base, source, cells, part, of, stream, theirs, patched)

    past = {"use_cache": False}
    if start:
        past = {model.cache_key: _prefix(base, prompts, start, layer), "use_cache": True}
    ids = base.ids[prompts]

    def body():
        x = stream
        if head is not None:
            at, z, new = head
            x = x + _written(names, at, new) - _written(names, at, z)
        for below in range(layer):
            names.layers[below].skip(names.block_value(x))
        if layer < names.n_layers:
            names.layers[layer].input = x
            if stage == "mid":  # the stream already holds what attention wrote
                attention = names.part("attn", layer)
                attention.skip((x if names.row.attn_adds_residual else torch.zeros_like(x), None))
        return nn.output.logits[:, -1].float()

    return model.trace(model.inputs(ids, start=start), body, logits_to_keep=1, **past)


def _stream(names: Names, run: Run, layer: int, stage: str, which, start: int) -> torch.Tensor:
    site = ("resid_pre", layer) if layer < names.n_layers else ("resid_post", layer - 1)
    x = run.acts[site][which, start:]
    return x + run.acts["attn_out", layer][which, start:] if stage == "mid" else x


def _patched_stream(names, base, source, cells, part, of, stream, theirs, patched) -> torch.Tensor:
    """The base streams with each row's patch: the source's stream itself, or the difference a block's output makes."""
    kinds = [cells[c].component.kind for _, c, _, _ in part]
    layer = [cells[c].component.layer for _, c, _, _ in part]
    prompts = torch.tensor([prompt for _, _, prompt, _ in part])
    out = stream.clone()
    for kind, at in sorted(set(zip(kinds, layer, strict=True))):
        rows = [i for i, one in enumerate(zip(kinds, layer, strict=True)) if one == (kind, at)]
        if kind in ("attn_out", "mlp_out"):
            new = stream[rows] + of(source, (kind, at), theirs[rows]) - of(base, (kind, at), prompts[rows])
        elif kind == "resid_mid":
            new = of(source, ("resid_pre", at), theirs[rows]) + of(source, ("attn_out", at), theirs[rows])
        else:
            after = at + (kind == "resid_post")
            site = ("resid_pre", after) if after < names.n_layers else ("resid_post", at)
            new = of(source, site, theirs[rows])
        out[rows] = torch.where(patched[rows], new, stream[rows])
    return out


def _written(names: Names, layer: int, z: torch.Tensor) -> torch.Tensor:
    """Inside a trace: what attention adds to the stream, given z of all its heads."""
    written = names.part("heads", layer)(z)
    if names.row.attn_add not in (names.row.attn, names.row.heads):  # a norm between W_O and the stream
        written = names.part("attn_add", layer)(written)
    return written * names.scale


def _prefix(run: Run, prompts, start: int, layer: int):
    """Keys and values of the positions before `start`, one row per patch; skipped blocks only need the length."""
    cache = DynamicCache()
    length_only = run.keys[0].new_zeros(len(prompts), 1, start, 1)
    for j, (keys, values) in enumerate(zip(run.keys, run.values, strict=True)):
        if j < layer:
            cache.update(length_only, length_only, j)
        else:
            cache.update(keys[prompts, :, :start], values[prompts, :, :start], j)
    return cache
