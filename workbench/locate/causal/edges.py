"""Attention knockout: which positions must be able to see which others, and in which layers?"""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench import measure
from workbench.component import Component
from workbench.locate.causal.null import draws_of
from workbench.locate.causal.patching import name_of, reader, refuse_not_finite
from workbench.locate.causal.places import batches, refuse_window, resolve, window_of
from workbench.model.plan import Prompts
from workbench.model.sweep import Row, bar, capture, resume, run_rows, stream_at
from workbench.scores import Scores
from workbench.task import Pairs, Task


def knockout(model, task: Task, source, target="-1", *, window: int | None = None, heads: str = "all", metric="logit_diff",
             null=True, seed: int = 0, progress: bool = True) -> Scores:  # fmt: skip
    """In which layers does information flow from these positions to those? Attention between them is cut, pre-softmax.

    In a window of layers, every head's scores from the target (as query) to the source (as keys) become minus infinity, so
    that attention goes to the other positions instead. Scores are m_clean - m_cut, in units of the metric: above 0 the
    model needed the edge there. Cutting one layer shows little, for another carries the same; hence the window.

    The null cuts as many other positions, drawn for each prompt from those that the same target sees in some layer.

    Args:
        task: pairs, of which the clean prompts are run.
        source, target: spans ("subject") or positions (3, -1), or a list of them. A target cannot be cut from itself alone.
        window: layers at once, around the one named; None is a fifth of the layers.
        heads: "all" heads of a layer together, or "each" by itself.
        null: False for none, True for two draws, or their number.
    Returns:
        Scores of `attn_scores.LAYER.*` (or of each head) at the target; columns say the window and the share of the gap.
    Raises:
        ValueError: for a position or span that is not there, nothing to cut, a cut that leaves a target nothing to see (in
            some layer: attention may slide), or an architecture whose attention scores are out of reach.
    Source:
        Geva et al. 2023, "Dissecting recall of factual associations", section 4 (windows of about a fifth of the layers).
    """
    began, draws, task, names = time.perf_counter(), draws_of(null), Task.of(task), model.names
    if heads not in ("all", "each"):
        raise ValueError(f"heads={heads!r} is unknown; choose 'all' or 'each'.")
    names.validate(Component("attn_scores", 0, "*"))
    refuse_window(window)
    pairs, rng = task.on(model), np.random.default_rng(seed)
    wide = window or max(1, round(names.n_layers / 5))
    to, of = _positions(pairs, target), _positions(pairs, source)
    edges = [{(q, k) for q in to[i] for k in of[i] if k <= q} for i in range(len(to))]
    if not all(edges):
        i = next(i for i, some in enumerate(edges) if not some)
        raise ValueError(f"Row {i}: no attention from {target!r} (positions {to[i]}) to {source!r} ({of[i]}) can be cut: "
                         "a position sees itself and earlier ones only.")  # fmt: skip
    always, ever = _visible(model, pairs, to)
    for i, some in enumerate(edges):
        if any({(q, k) for k in always[i][q]} <= some for q in to[i]):
            raise ValueError(f"Row {i}: this cuts {target!r} from everything it sees, at least in one layer; leave it some "
                             "position.")  # fmt: skip
    others = [[_elsewhere(to[i], of[i], ever[i], rng) for i in range(len(to))] for _ in range(draws)]
    one_position = target if not isinstance(target, (list, tuple)) else None
    at = Component.parse(f"attn_scores.*@{one_position}").position if one_position is not None else None
    found = [Component("attn_scores", layer, head, at) for layer in range(names.n_layers)
             for head in (["*"] if heads == "all" else range(names.n_heads))]  # fmt: skip
    read, n = reader(pairs, metric), len(pairs.clean)
    clean, corrupted = np.zeros(n), np.zeros(n)
    cut = np.zeros((1 + draws, len(found), n))
    usable, cost = [i for i in range(n) if all(draw[i] for draw in others)], 0.0
    with bar(len(found) * n * (1 + draws), progress) as show:
        for group in batches(pairs, 2):
            base, mine = capture(model, [pairs.clean[i] for i in group], []), read(group)
            clean[group] = mine(base.logits, torch.arange(len(group))).numpy()
            logits = model.logits([pairs.corrupted[i] for i in group])
            corrupted[group] = mine(logits, torch.arange(len(group))).numpy()
            for draw, some in enumerate([edges, *others]):
                values, spent = _cut(model, base, found, wide, [some[i] or set() for i in group], mine, show.update)
                cut[draw][:, group] = values.numpy()
                cost += spent * len(group) / n
    effects = clean - cut
    refuse_not_finite(effects[0], metric)
    mean, low, high = measure.mean_interval(effects[0].T, pairs.task.clusters(), seed=seed)
    limit, why = np.full(len(found), np.nan), "" if draws else "No null was asked for."
    if draws and len(usable) > 1:
        limit = measure.null_threshold(effects[1:][..., usable])
    elif draws:
        why = "Prompts are too short to cut as many other positions, so there is no null."
    windows = [window_of(one.layer, wide, names.n_layers) for one in found]
    columns = {"share": mean / (clean.mean() - corrupted.mean()), "first_layer": [w[0] for w in windows],
               "last_layer": [w[-1] for w in windows]}  # fmt: skip
    return Scores(found, mean, low, high, limit, effects[0], "causal.knockout", name_of(metric), float(clean.mean()),
                  float(corrupted.mean()), f"{source} to {target} cut", "as many other positions cut from the same target", {},
                  task.name, float(3 + cost), time.perf_counter() - began, seed, why, columns)  # fmt: skip


def _cut(model, base, found, wide: int, edges: list[set], read, progress):
    """([component, prompt] metric with the edges cut, cost)."""
    names, (n, width) = model.names, base.ids.shape
    values = read(base.logits, torch.arange(n))[None].repeat(len(found), 1)
    groups: dict[tuple, list[Row]] = {}
    for c, one in enumerate(found):
        layers = window_of(one.layer, wide, names.n_layers)
        for prompt, some in enumerate(edges):
            if some:
                start = min(q for q, _ in some) + base.pads[prompt]
                groups.setdefault((layers[0], len(layers)), []).append(Row(start, c, prompt, []))

    def call(group, start, part):
        prompts, edits = torch.tensor([row.prompt for row in part]), {}
        where = torch.zeros(len(part), width - start, names.n_heads, width, dtype=torch.bool)
        for i, row in enumerate(part):
            head = found[row.cell].index
            for q, k in edges[row.prompt]:
                where[
                    i,
                    q + base.pads[row.prompt] - start,
                    slice(None) if head == "*" else head,
                    k + base.pads[row.prompt],
                ] = True
        stream = stream_at(names, base, group[0], "pre", prompts, start)
        lowest = torch.full((1, 1, 1), torch.finfo(stream.dtype).min)
        for layer in range(group[0], group[0] + group[1]):
            edits["attn_scores", layer] = (where.flatten(2), lowest)
        return resume(model, base, prompts, start, group[0], "pre", stream, edits)[0]

    return values, run_rows(model, base, groups, call, read, values, progress)


def _positions(pairs: Pairs, where) -> list[list[int]]:
    """The positions that spans or numbers name, for each prompt."""
    wanted = [Component.parse(f"embed@{one}") for one in (where if isinstance(where, (list, tuple)) else [where])]
    return [sorted({p for one in wanted for p in resolve(one, pairs, i)}) for i in range(len(pairs.clean))]


def _visible(model, pairs: Pairs, to: list[list[int]]) -> tuple[list[dict], list[dict]]:
    """For each prompt: target -> the positions that it sees in every layer, and in some, by the model's own mask."""
    names, found = model.names, ([{} for _ in to], [{} for _ in to])
    for group in batches(pairs, 1):
        prompts, rows = Prompts([pairs.clean[i] for i in group]), len(group)

        def body(rows=rows):
            seen = []
            for layer in range(names.n_layers):
                x = names.place("attn_scores", layer, rows).get()
                seen.append((x > torch.finfo(x.dtype).min / 4).unflatten(-1, (names.n_heads, -1)).any(2))
            return torch.stack([torch.stack(seen).all(0), torch.stack(seen).any(0)])  # [2, row, query, key]

        masks = model.trace(model.inputs(prompts), body).cpu()
        for row, i in enumerate(group):
            pad = prompts.pads[row]
            for some, mask in zip(found, masks, strict=True):
                some[i] = {q: (mask[row, q + pad].nonzero()[:, 0] - pad).tolist() for q in to[i]}
    return found


def _elsewhere(to: list[int], of: list[int], seen: dict, rng) -> set | None:
    """As many edges from the same target to other positions; None where there are too few."""
    free = [k for k in seen[max(to)] if k < max(to) and k not in of and k not in to]
    if len(free) <= len(of):  # something must stay visible
        return None
    chosen = rng.choice(free, len(of), replace=False)
    return {(q, int(k)) for q in to for k in chosen if k <= q} or None
