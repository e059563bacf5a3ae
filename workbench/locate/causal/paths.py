"""Path patching: along which paths does a component act?"""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench import measure
from workbench.component import Component, components
from workbench.locate.causal.null import donors, draws_of, partners
from workbench.locate.causal.patching import DIRECTIONS, name_of, reader, refuse_without_gap
from workbench.locate.causal.places import batches, cells_of
from workbench.model.sweep import Cell, Row, bar, capture, resume, run_rows, span, stream_at
from workbench.scores import Scores
from workbench.task import Task

SENDERS = ("resid_pre", "z", "attn_out", "neuron", "mlp_out")
RECEIVERS = ("q", "k", "v", "z", "neuron", "mlp_out", "logits")


def path_patch(model, task: Task, senders, receivers="logits", *, direction: str = "noising", together: bool = False,
               frozen=("z",), metric="logit_diff", null=True, seed: int = 0, progress: bool = True) -> Scores:  # fmt: skip
    """Does this component act on that one directly, and how much of the answer goes that way? Path patching.

    A first run takes the sender from the other prompt while all other heads keep their activations, and reads what then
    reaches the receivers: only what comes straight through the stream and through FFNs. A second run puts just that
    into the receivers and lets everything after them follow. Scores are shares of the gap, as in `patch`.

    With frozen=("z", "mlp_out") only the direct path counts; with frozen=() and receivers "logits" it is `patch`.

    The null sends from other pairs' prompts of the side that is being run, as in `patch`.

    Args:
        senders: components or families: z, attn_out, neuron, mlp_out, or resid_pre.0 (the embeddings).
        receivers: "logits", or components: queries, keys and values of heads ("q.5.3", ["k.5.3", "v.5.3"]), heads with
            all three ("z.5.3"), neurons, FFN outputs. They receive at all positions, all together.
        direction: "noising" runs the clean prompt and sends from the corrupted one, as in the papers; or "denoising".
        together: all senders at once, as one score (of the first sender), instead of one by one.
        frozen: kinds that keep their activations in the first run.
    Returns:
        Scores of the senders. A sender that comes after all receivers has no path, and scores 0.
    Raises:
        ValueError: for a component that cannot send or receive, or prompts between which the metric hardly differs.
    Source:
        Wang et al. 2022, appendix B (through FFNs, other heads frozen); Goldowsky-Dill et al. 2023.
    """
    began, draws, task = time.perf_counter(), draws_of(null), Task.of(task)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown; choose {' or '.join(map(repr, DIRECTIONS))}.")
    pairs = task.on(model)
    found, cells, labels = cells_of(model, pairs, [Component.parse(one) for one in components(senders)])
    into = _receivers(model, receivers)
    _refuse(found, into, frozen)
    if together:
        cells = [Cell({one: positions for cell in cells for one, positions in cell.parts.items()})]
    read, n, groups = reader(pairs, metric), len(pairs.clean), batches(pairs)
    clean, corrupted, sent, cost = np.zeros(n), np.zeros(n), np.zeros((1 + draws, len(cells), n)), 0.0
    others = partners(pairs, pairs.corrupted if direction == "denoising" else pairs.clean, groups, draws, seed)
    sites = {(kind, layer) for kind in frozen for layer in range(model.names.n_layers)}
    with bar(len(cells) * n * (1 + draws), progress) as show:
        for group in groups:
            both = capture(
                model, [side[i] for side in (pairs.clean, pairs.corrupted) for i in group], found, sites=sites
            )
            half, own, of = len(group), torch.arange(len(group)), read(group)
            sides = both.rows(slice(0, half)), both.rows(slice(half, None))
            base, source = sides[::-1] if direction == "denoising" else sides
            clean[group], corrupted[group] = (of(side.logits, own).numpy() for side in sides)
            mine = [cell.of(group) for cell in cells]
            values, spent = _send(model, base, source, own, mine, into, frozen, of, show.update)
            sent[0][:, group] = values.numpy()
            for draw in range(draws):
                other = donors(others, group, draw)
                values, more = _send(model, base, base, other, mine, into, frozen, of, show.update)
                sent[1 + draw][:, group], spent = values.numpy(), spent + more
            cost += (2 + spent) * half / n
    gap, sign = clean - corrupted, 1 if direction == "denoising" else -1
    clusters = pairs.task.clusters()
    refuse_without_gap(model, gap, clean, corrupted, metric, clusters)
    effects = sign * (sent - (corrupted if direction == "denoising" else clean))
    values, low, high = measure.ratio_of_means(effects[0], gap, clusters, seed=seed)
    usable = [i for i in range(n) if others[i] is not None]
    limit, why = np.full(len(cells), np.nan), "" if draws else "No null was asked for."
    if draws and len(usable) > 1:
        limit = measure.null_threshold(effects[1:][..., usable]) / abs(gap.mean())
    elif draws:
        why = "No three prompts have equal length, so there is no other pair to make a null from."
    names = ", ".join(map(str, components(receivers)))
    return Scores(found[: len(cells)], values, low, high, limit, effects[0], "causal.path_patch", name_of(metric),
                  float(clean.mean()), float(corrupted.mean()), direction, "sent from other pairs' prompts of the unpatched side",
                  labels, task.name, float(cost), time.perf_counter() - began, seed,
                  " ".join(part for part in (f"Received by {names}.", f"All {len(found)} senders at once." if together else "", why)
                           if part))  # fmt: skip


def _receivers(model, receivers) -> list[Component]:
    """The sites that receive, in forward order; "logits" alone is no site but the end of the first run."""
    wanted, ends = components(receivers), [one.kind == "logits" for one in components(receivers)]
    if any(ends) and len(wanted) > 1:
        raise ValueError(
            f"'logits' receives by itself; got {', '.join(map(str, wanted))}. Ask for it in a call of its own."
        )
    return [] if any(ends) else sorted(model.names.expand(wanted))


def _refuse(found, into, frozen) -> None:
    for one in found:
        if one.kind not in SENDERS or (one.kind == "resid_pre" and one.layer != 0):
            raise ValueError(
                f"{one} cannot send; senders are z, attn_out, neuron, mlp_out and resid_pre.0 (the embeddings)."
            )
    for one in into:
        if one.kind not in RECEIVERS or one.position is not None:
            raise ValueError(
                f"{one} cannot receive; receivers are {', '.join(RECEIVERS)}, at all positions, and logits by itself."
            )
    if "mlp_out" in frozen and any(one.kind == "neuron" for one in found):
        raise ValueError(
            "Neurons send through their FFN's output, so it cannot be frozen: leave 'mlp_out' out of frozen."
        )
    for kind in frozen:
        if kind not in ("z", "mlp_out"):
            raise ValueError(f"frozen={kind!r} is unknown; choose from 'z' and 'mlp_out'.")


def _send(model, base, source, donors, cells, into, frozen, read, progress):
    """([sender, prompt] metric, cost): the first run reads what reaches the receivers, the second puts it there."""
    names, (n, width) = model.names, base.ids.shape
    values = read(base.logits, torch.arange(n))[None].repeat(len(cells), 1)
    differ = base.marks != source.marks[donors]
    groups: dict[tuple, list[Row]] = {}
    last = max((one.layer for one in into), default=names.n_layers)
    for c, cell in enumerate(cells):
        first = min(one.layer for one in cell.parts)
        for prompt in range(n):
            begins = int(differ[prompt].nonzero()[0]) if differ[prompt].any() else width
            parts = [(one, [p + base.pads[prompt] for p in own[prompt] if p + base.pads[prompt] >= begins])
                     for one, own in cell.parts.items()]  # fmt: skip
            parts = [(one, columns) for one, columns in parts if columns]
            if parts and first <= last:
                groups.setdefault((first,), []).append(Row(min(min(c) for _, c in parts), c, prompt, parts))
    record = [one.site for one in into]

    def call(group, start, part):
        prompts = torch.tensor([row.prompt for row in part])
        theirs, layer = donors[prompts], group[0]
        stream, edits = stream_at(names, base, layer, "pre", prompts, start), {}
        for site, x in base.acts.items():  # what is frozen keeps its own activations
            if site[0] in frozen and site[1] >= layer:
                edits[site] = (torch.ones(1, 1, 1, dtype=torch.bool), x[prompts, start:].clone())
        for i, row in enumerate(part):  # senders
            for one, columns in row.parts:
                own = [c - start for c in columns]
                if one.kind == "resid_pre":
                    stream[i, own] = source.acts[one.site][theirs[i], columns].to(stream)
                    continue
                if one.site not in edits:
                    x = base.acts[one.site][prompts, start:]
                    edits[one.site] = (torch.zeros(x.shape, dtype=torch.bool), x.clone())
                where, new = edits[one.site]
                part_of = span(names, one, new.shape[-1])
                if where.shape == new.shape:
                    where[i, own, part_of] = True
                new[i, own, part_of] = source.acts[one.site][theirs[i], columns, part_of].to(new)
        logits, kept = resume(model, base, prompts, start, layer, "pre", stream, edits, record)
        if not into:
            return logits
        enters, received = min(one.layer for one in into), {}
        for one in into:
            x = kept[one.site]
            where = received.setdefault(one.site, (torch.zeros(x.shape, dtype=torch.bool), x))[0]
            where[..., span(names, one, x.shape[-1])] = True
        stream = stream_at(names, base, enters, "pre", prompts, start)
        return resume(model, base, prompts, start, enters, "pre", stream, received)[0]

    return values, run_rows(model, base, groups, call, read, values, progress) * (2 if into else 1)
