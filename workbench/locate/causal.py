"""Causal attribution: change one component, keep the rest, watch the answer (survey section on causal attribution)."""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench import measure
from workbench.component import KINDS, Component, components
from workbench.model.plan import TOKENS_PER_PASS
from workbench.model.sweep import Cell, bar, capture, sweep
from workbench.scores import Scores
from workbench.task import Pairs, Task

PATCHABLE = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")
DIRECTIONS = ("denoising", "noising")


def patch(model, task: Task, at, *, positions=None, direction: str = "denoising", metric="logit_diff", null: bool = True,
          seed: int = 0, progress: bool = True) -> Scores:  # fmt: skip
    """Which components carry what tells the clean prompt from the corrupted one? Activation patching.

    Denoising runs the corrupted prompt and restores one component from the clean run: is it sufficient? Noising runs
    the clean prompt and takes one component from the corrupted run: is it necessary? Scores are ratios of means over
    prompts, (m_patched - m_corrupted) / (m_clean - m_corrupted) for denoising and (m_clean - m_patched) / (m_clean -
    m_corrupted) for noising: 0 changes nothing, 1 moves the metric all the way.

    The null takes the same component from another pair's prompt of the side that is being run (a corrupted one, for
    denoising; one with another word at the cause, where there is one): it disturbs, but does not carry what is traced.
    `null_p95` is what |score| reaches under it in 95 % of resamplings.

    Args:
        task: pairs, or the name of a bundled task; they are compared position by position.
        at: a kind ("z", "resid_pre"), a component or family ("z.*.*", "resid_post.3@-1", "resid_pre.*@subject"), or
            a list of them. Kinds: resid_pre, resid_mid, resid_post, attn_out, mlp_out, z.
        positions: "each" for one score per position (the spans that all rows name, where prompts differ in length),
            "all" for all positions together; None means "each" for a bare kind of the stream, "all" otherwise.
        metric: "logit_diff", "log_prob", "prob", "accuracy", or a function (logits, answer, foil) -> [prompt].
    Returns:
        Scores. With one prompt the interval and the null are NaN.
    Raises:
        ValueError: for a component that cannot be patched or is out of range, pairs of unequal token length, an answer
            that is no token, activations that are not finite, or prompts between which the metric hardly differs.
    Source:
        Vig et al. 2020; Zhang and Nanda 2024, "Towards best practices of activation patching"; Heimersheim and Nanda
        2024 on the two directions.
    """
    began = time.perf_counter()
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r} is unknown; choose {' or '.join(map(repr, DIRECTIONS))}.")
    task = Task.of(task)
    pairs, of = task.on(model), measure.metric(metric)
    cells, labels = _cells(model, pairs, at, positions)
    clean, corrupted = np.zeros(len(pairs.clean)), np.zeros(len(pairs.clean))
    patched, shuffled = (np.zeros((len(cells), len(pairs.clean))) for _ in range(2))
    cost, partners = 0.0, _partners(pairs, pairs.corrupted if direction == "denoising" else pairs.clean, seed)
    with bar(len(cells) * len(pairs.clean) * (1 + null), progress) as show:
        for group in _groups(pairs):
            answer, foil = pairs.answer[group], pairs.foil[group]

            def read(logits, prompts, answer=answer, foil=foil):
                return of(logits, answer[prompts].to(logits.device), foil[prompts].to(logits.device)).float().cpu()

            ids = torch.stack([*(pairs.clean[i] for i in group), *(pairs.corrupted[i] for i in group)])
            both = capture(model, ids, {cell.component.kind for cell in cells})
            half = len(group)
            sides = both.rows(slice(0, half)), both.rows(slice(half, None))
            base, source = sides[::-1] if direction == "denoising" else sides
            own = torch.arange(half)
            clean[group], corrupted[group] = (read(side.logits, own).numpy() for side in sides)
            mine = [Cell(cell.component, [cell.positions[i] for i in group]) for cell in cells]
            values, spent = sweep(model, base, source, own, mine, read, show.update)
            patched[:, group] = values.numpy()
            cost += (2 + spent) * half
            if null and half > 1:
                donors = torch.tensor([group.index(partners[i]) for i in group])
                values, spent = sweep(model, base, base, donors, mine, read, show.update)
                shuffled[:, group] = values.numpy()
                cost += spent * half
    return _scores(model, task, pairs, [cell.component for cell in cells], labels, clean, corrupted, patched,
                   shuffled if null else None, partners, direction, of, metric, cost / len(clean), seed, began)  # fmt: skip


def _scores(model, task, pairs, found, labels, clean, corrupted, patched, shuffled, partners, direction, of, metric, cost,
            seed, began) -> Scores:  # fmt: skip
    gap = clean - corrupted
    _refuse_without_gap(gap, clean, corrupted, metric)
    sign = 1 if direction == "denoising" else -1
    effects = sign * (patched - (corrupted if direction == "denoising" else clean))
    ratio, low, high = measure.ratio_of_means(effects, gap, seed=seed)
    threshold, why = np.full(len(found), np.nan), ""
    if len(set(map(len, pairs.clean))) > 1 and any(
        isinstance(one.position, int) and one.position < -1 for one in found
    ):
        why = "Prompts differ in length and positions count from the end: name spans in the task to compare like with like."
    usable = [i for i, partner in enumerate(partners) if partner is not None]
    if shuffled is None:
        why = "No null was asked for."
    elif len(usable) < 2:
        why = "No two prompts have equal length, so there is no other pair to make a null from."
    else:
        under = sign * (shuffled - (corrupted if direction == "denoising" else clean))[:, usable]
        threshold = measure.null_threshold(under, gap[usable], seed=seed + 1)
    return Scores(found, ratio, low, high, threshold, effects, "causal.patch", _name(metric), float(clean.mean()),
                  float(corrupted.mean()), direction, "the same patch from another pair's prompt of the unpatched side", labels,
                  task.name, float(cost), time.perf_counter() - began, seed, why)  # fmt: skip


def _refuse_without_gap(gap, clean, corrupted, metric) -> None:
    noise = 3 * gap.std(ddof=1) / len(gap) ** 0.5 if len(gap) > 1 else 1e-6
    if abs(gap.mean()) <= noise:
        raise ValueError(f"Clean and corrupted prompts hardly differ in {_name(metric)} ({clean.mean():+.3f} and "
                         f"{corrupted.mean():+.3f}), so there is nothing to trace. Does the model know this task? "
                         "task.score(model) shows it row by row.")  # fmt: skip


def _name(metric) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")


def _groups(pairs: Pairs) -> list[list[int]]:
    """Prompts of equal length share a batch, up to what one pass should hold."""
    lengths: dict[int, list[int]] = {}
    for i, ids in enumerate(pairs.clean):
        lengths.setdefault(len(ids), []).append(i)
    groups = []
    for length, group in lengths.items():
        pieces = -(-len(group) * 2 * length // TOKENS_PER_PASS)
        groups += [part.tolist() for part in np.array_split(group, pieces)]
    return groups


def _partners(pairs: Pairs, base: list, seed: int) -> list[int | None]:
    """For each pair another of its batch: of the same template, and with another word at the cause, where it can be."""
    rng = np.random.default_rng(seed)
    partners: list[int | None] = [None] * len(base)
    templates = pairs.task.column("template")
    for group in _groups(pairs):
        for i in group:
            others = [j for j in group if j != i]
            alike = [j for j in others if templates[j] == templates[i]] or others
            cause = pairs.clean[i] != pairs.corrupted[i]
            others = [j for j in alike if (base[j] != base[i])[cause].any()] or alike
            if others:
                partners[i] = int(rng.choice(others))
    return partners


def _cells(model, pairs: Pairs, at, positions) -> tuple[list[Cell], dict]:
    lengths = [len(ids) for ids in pairs.clean]
    if not (positions in (None, "each", "all") or (isinstance(positions, (list, tuple)) and positions)):
        raise ValueError(f"positions={positions!r} is unknown; use 'each', 'all' or a list such as [4, -1, 'subject'].")
    found: dict[tuple, Component] = {}
    for given in [at] if isinstance(at, (str, Component)) else at:
        (family,) = components(given)
        if family.kind not in PATCHABLE:
            raise ValueError(f"{family} cannot be patched yet; kinds are {', '.join(PATCHABLE)}.")
        if family.kind == "z" and "attn_out" in model.names.refused:
            raise ValueError(f"{family} cannot be patched here: {model.names.refused['attn_out']}")
        each = positions or ("each" if given in KINDS and KINDS[family.kind][0] is None else "all")
        places = [family.position]
        if family.position is None and each != "all":
            places = _places(pairs, lengths) if each == "each" else list(each)
        elif family.position is not None and positions is not None:
            raise ValueError(f"{family} names its position already; leave out positions={positions!r}.")
        for one in model.names.expand([family]):
            for order, place in enumerate(places):
                found.setdefault((one.at(None), order, str(place)), one.at(place))
    cells = [Cell(one, [_resolve(one, pairs, i) for i in range(len(lengths))]) for _, one in sorted(found.items())]
    return cells, _labels(model, pairs, {cell.component.position for cell in cells}, lengths)


def _places(pairs: Pairs, lengths: list[int]) -> list:
    """Every position where all prompts are equally long; else the spans that all rows name; else from the right."""
    if len(set(lengths)) == 1:
        return list(range(lengths[0]))
    shared = [name for name in pairs.spans[0] if all(name in row for row in pairs.spans)]
    if shared:
        return sorted(shared, key=lambda name: np.mean([row[name][0] - n for row, n in zip(pairs.spans, lengths)]))
    return list(range(-min(lengths), 0))


def _resolve(component: Component, pairs: Pairs, i: int) -> list[int]:
    place, length = component.position, len(pairs.clean[i])
    if place is None:
        return list(range(length))
    if isinstance(place, str):
        if place not in pairs.spans[i]:
            known = ", ".join(pairs.spans[i]) or "none"
            raise ValueError(f"{component}: row {i} of the task names no span {place!r}; its spans: {known}.")
        return pairs.spans[i][place]
    if not -length <= place < length:
        raise ValueError(f"{component}: position {place} is out of range; row {i} has {length} tokens (0 to {length - 1}, "
                         f"or -1 to {-length}).")  # fmt: skip
    return [place % length]


def _labels(model, pairs: Pairs, places: set, lengths: list[int]) -> dict:
    """Token text for each position: 'tired/happy' where the sides differ, '·' where the prompts disagree."""
    labels = {}
    for place in places:
        if isinstance(place, int):
            sides = [{int(ids[place]) for ids in side} for side in (pairs.clean, pairs.corrupted)]
            if all(len(seen) == 1 for seen in sides):
                labels[place] = "/".join(dict.fromkeys(model.token(seen.pop()) for seen in sides))
            else:
                labels[place] = "·"
    return labels
