"""What a probe is fitted on: prompts with labels, what must stay together, and the activations at a site."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from workbench.component import SINGLE, Component, components
from workbench.model import Prompts
from workbench.task import Task


@dataclass(frozen=True, eq=False)
class Examples:
    """Prompts of one model with what is to be read off them.

    Attributes:
        ids, spans: token ids, and the positions of named spans, of each row.
        labels: [row], the class as text. types: [row], the word type that a control label hangs on.
        splits: [row]. group: [row], rows that share a number never stand on both sides of a fold.
        pair: [row], the number of the row of the task; clean and corrupted share it.
        other: [row], the label of a pair's other side, where the two differ in every pair; else None.
        why: what was decided for the caller, in a sentence.
    """

    ids: list
    spans: list
    labels: np.ndarray
    types: np.ndarray
    splits: np.ndarray
    group: np.ndarray
    pair: np.ndarray
    other: np.ndarray | None
    why: str = ""

    def rows(self, splits) -> np.ndarray:
        """The numbers of the rows of one split or several."""
        return np.flatnonzero(np.isin(self.splits, [splits] if isinstance(splits, str) else list(splits)))

    def keep(self, rows: dict) -> tuple[Examples, dict]:
        """Only these rows, and their new numbers: {split: rows}, so that nothing is run that nobody reads."""
        order = np.unique(np.concatenate(list(rows.values())))
        own = {f: getattr(self, f)[order] for f in ("labels", "types", "splits", "group", "pair")}
        ids, spans = ([getattr(self, f)[i] for i in order] for f in ("ids", "spans"))
        other = None if self.other is None else self.other[order]
        return replace(self, ids=ids, spans=spans, other=other, **own), {
            k: np.searchsorted(order, v) for k, v in rows.items()
        }

    @property
    def prompts(self) -> Prompts:
        return Prompts(self.ids, spans=self.spans)

    def shuffled(self, rows: np.ndarray, rng) -> np.ndarray:
        """Labels of these rows at random: swapped within pairs where the sides differ, else permuted over rows."""
        if self.other is None:
            return rng.permutation(self.labels[rows])
        coin = rng.integers(0, 2, self.pair.max() + 1).astype(bool)
        return np.where(coin[self.pair[rows]], self.other[rows], self.labels[rows])


def examples(model, task: Task, label=None, types: str | None = None, seed: int = 0) -> Examples:
    """The rows of a task as labelled prompts.

    Args:
        task: labelled texts, or pairs, of which both sides become rows.
        label: what the classes are. None: the `label` column of texts; of pairs "side", or "answer" where an answer of
            one row is the foil of another, so that the side says nothing. "side": clean or corrupted. "answer": the
            word that is right after the prompt. A dict merges answers or labels into classes ({"was": "singular", ...}).
            Any other text names a column.
        types: the column whose values get a random label in the control task; by default the words in which the sides
            of a pair differ, and of texts the `entity` column, else the last token.
    Raises:
        ValueError: for a task of plain texts, an unknown column, or an answer that the dict leaves out.
    """
    if task.kind == "plain":
        raise ValueError(f"Task {task.name!r} holds plain texts; a probe needs labelled texts (text, label) or pairs.")
    if task.kind == "pairs":
        pairs = task.on(model)
        rows = list(pairs.task) * 2
        sides = np.repeat(["clean", "corrupted"], len(pairs.clean))
        ids, spans = [*pairs.clean, *pairs.corrupted], [*pairs.spans, *pairs.spans]
        right = [row["answer" if side == "clean" else "foil"].strip() for row, side in zip(rows, sides, strict=True)]
        if label is None:
            shared = set(right[: len(pairs.clean)]) & set(right[len(pairs.clean) :])
            label = "answer" if shared else "side"
        words = [_difference(model, *two) for two in zip(pairs.clean, pairs.corrupted, strict=True)]
        words = [one for one, _ in words] + [other for _, other in words]
        named = {"side": list(sides), "answer": right}
        pair = np.tile(np.arange(len(pairs.clean)), 2)
    else:
        rows, ids, spans = list(task), [model.ids(row["text"]) for row in task], [{} for _ in task.rows]
        right = [row["label"] for row in rows]
        words = [row.get("entity") or model.token(one[-1]) for row, one in zip(rows, ids, strict=True)]
        named, pair = {"label": right}, np.arange(len(rows))
    labels = _labels(rows, right, named, label or "label", task)
    if types is not None:
        words = _column(rows, types, task)
    labels, other = np.array(labels), None
    if task.kind == "pairs" and (labels != np.roll(labels, len(labels) // 2)).all():
        other = np.roll(labels, len(labels) // 2)
    splits, why = [row.get("split") for row in rows], ""
    group = _groups(rows, pair)
    if not any(splits):
        held = np.random.default_rng(seed).permutation(np.unique(group))[: max(1, len(np.unique(group)) // 3)]
        splits = ["test" if one in held else "fit" for one in group]
        why = "The task has no splits: a third of it, chosen by seed, was held out as test."
    return Examples(
        ids, spans, labels, np.array(words), np.array([str(one) for one in splits]), group, pair, other, why
    )


def check_classes(found: Examples, rows: np.ndarray, split, task: Task) -> None:
    """Are there rows to fit on, of at least two classes, with more than one row each?

    Raises:
        ValueError: with what there is.
    """
    if not len(rows):
        have = ", ".join(sorted(set(found.splits)))
        raise ValueError(f"Task {task.name!r} has no rows of split {split!r}; it has {have}.")
    classes, counts = np.unique(found.labels[rows], return_counts=True)
    if len(classes) < 2 or counts.max() < 2:
        shown = ", ".join(f"{one} ({n})" for one, n in list(zip(classes, counts, strict=True))[:6])
        raise ValueError(f"A probe needs at least two classes with several rows each; split {split!r} of task "
                         f"{task.name!r} has: {shown}. Choose other classes with label=.")  # fmt: skip


def sites(model, at) -> list[Component]:
    """The places to probe, in forward order: families by layer and head; the neurons or experts of a layer stay together.

    Raises:
        ValueError: for a component the model does not have, or attention between two positions.
    """
    found: dict[Component, None] = {}
    for family in components(at):
        if family.kind in ("attn_scores", "pattern"):
            raise ValueError(f"{family} lies between two positions, so it is no vector to probe; probe z or attn_out.")
        if family.kind == "feature":
            raise ValueError(f"{family}: features are not probed one by one; probe the place of their SAE, or rank them by what "
                             "they tell apart with wb.locate.features.find.")  # fmt: skip
        whole = family.kind in SINGLE and family.index == "*"
        for one in model.names.expand([replace(family, index=0) if whole else family]):
            found[replace(one, index="*") if whole else one] = None
    return sorted(found, key=lambda one: one.at(None))  # named positions stay as they were given


def read(model, prompts: Prompts, at: list[Component]) -> dict[Component, np.ndarray]:
    """The activations at each site, [row, width]; the mean over a span, and over the whole prompt without a position.

    One forward pass, in batches. Numbers that differ between rows by no more than rounding are set to 0, so that no
    probe can read how a batch was padded.

    Raises:
        ValueError: for a position that a prompt does not have, before anything runs.
    """
    places = {one.position: one for one in at}
    for one in places.values():
        for row in range(len(prompts.ids)):
            prompts.columns(one, row)
    stops: dict[tuple, set] = {}
    for one in at:
        for stop in _stops(one):
            stops.setdefault(stop, set()).add(one.position)
    order = [(stop, sorted(stops[stop], key=str)) for stop in sorted(stops, key=lambda stop: Component(*stop))]
    seen: dict[tuple, list] = {}
    by_length = sorted(range(len(prompts.ids)), key=lambda row: len(prompts.ids[row]))  # so that little is padding
    prompts = Prompts([prompts.ids[row] for row in by_length], spans=[prompts.spans[row] for row in by_length])
    for part in prompts.chunks():
        pools = {}
        for place, one in places.items():
            pools[place] = torch.zeros(len(part.ids), part.width)
            for row in range(len(part.ids)):
                columns = part.columns(one, row)
                pools[place][row, columns] = 1 / len(columns)
            pools[place] = pools[place].to(model.hf.device)
        names, rows = model.names, len(part.ids)  # what the trace may carry away with it: not the model itself
        for key, block in model.trace(
            model.inputs(part),
            lambda names=names, rows=rows, pools=pools: _pool(names, rows, order, pools),
            logits_to_keep=1,
        ).items():
            seen.setdefault(key, []).append(block.cpu())
    whole = {key: torch.cat(blocks).double().numpy()[np.argsort(by_length)] for key, blocks in seen.items()}
    grain = 8 * max(torch.finfo(model.hf.dtype).eps, torch.finfo(torch.float32).eps)
    return {one: _without_rounding(_view(model.names, whole, one), grain) for one in at}


def _pool(names, rows: int, order, pools) -> dict:
    """Inside a trace: every site, averaged over each of its positions."""
    found = {}
    for (kind, layer), positions in order:
        value = names.place(kind, layer, rows).get().float()
        for position in positions:
            found[kind, layer, position] = torch.einsum("rc,rcw->rw", pools[position].to(value.device), value)
    return found


def _stops(one: Component) -> list[tuple]:
    """The tensors that a site is made of: the stream between attention and FFN is a sum of two."""
    if one.kind == "resid_mid":
        return [Component("resid_pre", one.layer).canonical.site, ("attn_out", one.layer)]
    return [one.canonical.site]


def _view(names, whole: dict, one: Component) -> np.ndarray:
    value = sum(whole[*stop, one.position] for stop in _stops(one))
    if not isinstance(one.index, int):
        return value
    width = value.shape[1] // names.size(one.kind)
    return value[:, one.index * width : (one.index + 1) * width]


def _without_rounding(x: np.ndarray, grain: float) -> np.ndarray:
    constant = x.std(0) <= grain * np.sqrt((x**2).mean())
    return np.where(constant, 0.0, x)


def _difference(model, clean, corrupted) -> tuple[str, str]:
    where = clean != corrupted
    return tuple(" ".join(model.token(i).strip() for i in side[where]) for side in (clean, corrupted))


def _labels(rows: list, right: list, named: dict, label, task: Task) -> list[str]:
    if isinstance(label, dict):
        missing = sorted(set(right) - set(label))
        if missing:
            raise ValueError(f"label= gives no class for {', '.join(map(repr, missing[:6]))}; name one for every answer or "
                             "label of the task, or leave those rows out of it.")  # fmt: skip
        return [str(label[one]) for one in right]
    return named[label] if label in named else _column(rows, label, task)


def _column(rows: list, name: str, task: Task) -> list[str]:
    values = [row.get(name) for row in rows]
    if None in values:
        have = sorted(set.intersection(*({k for k, v in row.items() if isinstance(v, str)} for row in rows)))
        raise ValueError(f"Not every row of task {task.name!r} has a {name!r}; all have {', '.join(have)}.")
    return [str(one) for one in values]


def _groups(rows: list, pair: np.ndarray) -> np.ndarray:
    """By entity, else by template, where the task names them for every row and there are enough for a fold; else by pair."""
    for column in ("entity", "template"):
        values = [row.get(column) for row in rows]
        if None not in values and len(set(values)) >= 5:
            return np.unique(np.array(values, str), return_inverse=True)[1]
    return pair
