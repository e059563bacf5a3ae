"""One forward pass over many prompts, keeping of each site only what a statistic needs, prompt by prompt."""

from __future__ import annotations

from operator import attrgetter

import numpy as np
import torch

from workbench import measure
from workbench.component import Component
from workbench.model.plan import Prompts
from workbench.task import Task

DRAWS = 1000


def texts(model, task) -> tuple[Prompts, str]:
    """The prompts to run (clean ones of pairs) and a name for them, from a task, its name, or a list of texts.

    Raises:
        ValueError: for an empty list.
    """
    if isinstance(task, (list, tuple)):
        if not task:
            raise ValueError("No prompt was given: pass a task, the name of a bundled one, or a list of texts.")
        task = Task([{"text": text} for text in task], "texts")
    task = Task.of(task)
    if task.kind == "pairs":
        pairs = task.on(model)
        return Prompts(pairs.clean, spans=pairs.spans), task.name
    return Prompts([model.ids(text) for text in task.column("text")]), task.name


def counted(model, part: Prompts, position=None) -> torch.Tensor:
    """[row, column], true for the tokens that count: those of `position`, or all but padding and BOS."""
    mask = torch.zeros(len(part.ids), part.width, dtype=torch.bool)
    for row, ids in enumerate(part.ids):
        mask[row, part.columns(Component("logits", position=position), row)] = True
        if position is None and model.bos and len(ids) > 1 and ids[0] == model.tokenizer.bos_token_id:
            mask[row, part.pads[row]] = False
    return mask


def gated(names) -> bool:
    """Do neurons have a gate of their own (SwiGLU, GeGLU)?"""
    paths = names.row.mlp_in
    return len(paths) == 2 or attrgetter(paths[0])(names.layers[0]).weight.numel() == 2 * names.d_mlp * names.d_model


def value(names, kind: str, layer, rows: int) -> torch.Tensor:
    """Inside a trace: a site [row, column, width]. "gate" is what opens neurons: the gate's pre-activation; without a
    gate the activation itself, which has the same sign."""
    if kind == "gate" and gated(names):
        out = attrgetter(names.row.mlp_in[0])(names.layers[layer]).output
        return out[..., : names.d_mlp]
    return names.place("neuron" if kind == "gate" else kind, layer, rows).get()


def read(model, prompts: Prompts, sites, reduce, position=None) -> dict:
    """Run once; site (kind, layer) -> what `reduce(value [row, column, width], mask [row, column], kind)` keeps of it.

    `reduce` runs inside the pass, so that no batch of whole activations is ever kept.
    """
    order = sorted(set(sites), key=lambda site: _place_in_pass(*site))
    found: dict[tuple, list] = {site: [] for site in order}
    for part in prompts.chunks():
        mask = counted(model, part, position).to(model.hf.device)
        kept = model.trace(model.inputs(part), _visit(model.names, order, len(part.ids), reduce, mask))
        for site, one in zip(order, kept, strict=True):
            found[site].append(one.float().cpu())
    return {site: torch.cat(parts) for site, parts in found.items()}


def _visit(names, order, rows, reduce, mask):
    def body():
        kept, pre = [], {}
        for kind, layer in order:
            x = value(names, kind, layer, rows)
            if kind == "resid_pre":
                pre[layer] = x
            if kind == "resid_mid":  # its place holds what attention writes
                x = pre[layer] + x
            kept.append(reduce(x.float(), mask, kind))
        return kept

    return body


def _place_in_pass(kind: str, layer):
    return (Component("neuron" if kind == "gate" else kind, layer), kind != "gate")


# labels and resampling


def shuffles(labels: np.ndarray, groups: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Labels dealt anew within each group, [draw, row]."""
    rng = np.random.default_rng(seed)
    by_group = labels[np.argsort(groups, kind="stable")]
    dealt = np.empty((draws, len(labels)), labels.dtype)
    for draw in dealt:
        draw[np.lexsort((rng.random(len(labels)), groups))] = by_group
    return dealt


def matched(task: Task, labels) -> tuple[np.ndarray, np.ndarray, str]:
    """Which rows of a labelled task may exchange labels: those of one template and entity, else of one template, else all.

    Returns:
        (group [row], cluster to resample [row], words for the group). Groups are the finest in which nine rows of ten
        stand beside another label; clusters are the groups of one template and entity, else single rows.
    """
    labels, alone = np.asarray(labels), np.arange(len(task))
    for columns in (("template", "entity"), ("template",)):
        if any(None in task.column(column) for column in columns):
            continue
        keys = list(zip(*(task.column(column) for column in columns)))
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        groups = np.array([number[key] for key in keys])
        mixed = [len(set(labels[groups == group])) > 1 for group in range(len(number))]
        if np.mean([mixed[group] for group in groups]) >= 0.9:
            return groups, groups if len(columns) == 2 else alone, f"rows of one {' and '.join(columns)}"
    return np.zeros(len(task), int), alone, "all rows"


def resampled(n: int, clusters, draws: int, seed: int) -> np.ndarray:
    """What each row weighs when clusters of rows are drawn with replacement, [draw, row]; once each where none can be."""
    weights = measure.cluster_weights(n, clusters, draws, seed)
    return np.ones((draws, n)) if weights is None else weights * n
