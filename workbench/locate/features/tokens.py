"""Activations token by token, of prompts of any length; the first token, whose activation is huge in most models, left out."""

from __future__ import annotations

import torch

from workbench.component import Component
from workbench.model.features import read, skip_after
from workbench.model.plan import TOKENS_PER_PASS, Prompts
from workbench.sae import SAE
from workbench.task import Task


def texts(prompts) -> list:
    """The texts of a task (of pairs: both sides, each with its right answer), or prompts as they are given."""
    if isinstance(prompts, str):
        prompts = Task.load(prompts) if prompts in Task.names() else [prompts]
    if not isinstance(prompts, Task):
        return list(prompts)
    if prompts.kind != "pairs":
        return prompts.column("text")
    rows = [row for row in prompts]
    return [f"{row['clean']} {row['answer']}" for row in rows] + [f"{row['corrupted']} {row['foil']}" for row in rows]


def known(model, prompts) -> list[torch.Tensor]:
    """Token ids of the texts that this model's tokenizer knows, of at least two tokens.

    Raises:
        ValueError: when it knows fewer than half of them, with the first reason.
    """
    found, reasons, asked = [], [], texts(prompts)
    for one in asked:
        try:
            ids = model.ids(one) if isinstance(one, str) else torch.as_tensor(one)
            if len(ids) > 1:
                found.append(ids)
        except ValueError as error:
            reasons.append(str(error))
    if len(found) * 2 < len(asked) or not found:
        raise ValueError(f"Only {len(found)} of {len(asked)} texts can be read by this model. {(reasons or [''])[0]}")
    return found


def batches(model, ids: list[torch.Tensor], budget: int = TOKENS_PER_PASS):
    """Batches of texts of similar length, as (numbers of the texts, Prompts)."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    done = 0
    for part in Prompts([ids[i] for i in order]).chunks(budget):
        yield order[done : done + len(part.ids)], part
        done += len(part.ids)


def kept(part: Prompts) -> torch.Tensor:
    """[row, column], true for every token but the first of its text and the padding."""
    return torch.arange(part.width)[None] > torch.tensor(part.pads)[:, None]


def at_place(model, part: Prompts, *places: Component) -> list[torch.Tensor]:
    """The tensors of a batch at places in forward order, [row, column, width], in one pass that ends after the last."""
    names, rows = model.names, len(part.ids)

    def body():
        found = []
        for place in places:
            found.append(read(names, place, rows).clone())
        skip_after(names, places[-1])
        return found

    return [x.float().cpu() for x in model.trace(model.inputs(part), body, logits_to_keep=1)]


def activations(model, prompts, at, limit: int | None = None, dtype=torch.float32) -> torch.Tensor:
    """What goes through a place, token by token: [token, width].

    Args:
        prompts: a task, its name, or a list of texts. limit: stop after so many tokens.
    """
    at, found, total = Component.parse(at), [], 0
    for _, part in batches(model, known(model, prompts)):
        (x,) = at_place(model, part, at)
        found.append(x[kept(part)].to(dtype))
        total += len(found[-1])
        if limit is not None and total >= limit:
            break
    return torch.cat(found)[:limit]


def by_token(model, sae: SAE, ids: list[torch.Tensor], position=None, spans=None) -> list[torch.Tensor]:
    """What an SAE is given at the tokens of a position or span of each prompt (at all, without one): [token, d_in] each."""
    found: list = [None] * len(ids)
    place = Component("feature", None, 0, position, sae.name)
    for numbers, part in batches(model, ids, TOKENS_PER_PASS // 2):
        part.spans = [spans[i] for i in numbers] if spans else part.spans
        (x,) = at_place(model, part, sae.source)
        for row, number in enumerate(numbers):
            found[number] = x[row, part.columns(place, row)]
    return found


def codes(model, sae: SAE, ids: list[torch.Tensor], position=None, spans=None) -> torch.Tensor:
    """Features of each prompt [prompt, d_sae]: at a position or span (its mean), or each feature's largest, over tokens."""
    found: torch.Tensor | None = None
    place = Component("feature", None, 0, position, sae.name)
    for numbers, part in batches(model, ids, TOKENS_PER_PASS // 2):
        part.spans = [spans[i] for i in numbers] if spans else part.spans
        (x,) = at_place(model, part, sae.source)
        for row, number in enumerate(numbers):
            columns = part.columns(place, row)
            f = sae.encode(x[row, columns].to(sae.W_enc.device)).cpu()
            f = f[min(1, len(f) - 1) :].amax(0) if position is None else f.mean(0)
            found = torch.zeros(len(ids), sae.d_sae) if found is None else found
            found[number] = f
    return found
