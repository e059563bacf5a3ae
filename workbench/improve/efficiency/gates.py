"""Which heads need the whole context? A gate for each, trained to close where a sink and a window are enough."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from workbench.attend import window_of
from workbench.component import Component
from workbench.improve.efficiency.streaming import attention_as, grouped, own_layers
from workbench.locate.magnitude.reading import texts
from workbench.model import Prompts
from workbench.scores import Scores

NAME = "workbench_gates"


@torch.enable_grad()
def retrieval_heads(model, task, at="z.*.*", *, sink: int = 1, window: int = 4, penalty: float = 0.03, steps: int = 150,
                    rows: int = 24, lr: float = 0.05, seed: int = 0) -> Scores:  # fmt: skip
    """Which heads need to see far back for these prompts, and which would do with the first and the latest tokens?

    Each key-value head gets a gate g in [0, 1]: its output is g times that of full attention plus 1 - g times that of
    attention to a sink and a window. All gates are trained together, the weights staying as they are, to keep the last
    stream at the end of the prompt while the sum of the gates is made small. A gate that stays open is a retrieval head; one
    that closes is a streaming head, whose cache can be cut (`StreamingCache`).

    Args:
        task: a task, its name, or a list of texts: what the model has to be able to do afterwards.
        at: heads with a gate; those of local layers are left out.
        sink, window: what a streaming head sees, in tokens (the query's own included).
        penalty: weight of the gates' mean; the other term is the squared change of the last stream over its square.
        steps, rows, lr: of the training (Adam, lr falling to 0): steps of `rows` prompts each.
    Returns:
        Scores of heads: the gates. Trained together, they have neither intervals nor a null of their own: whether the closed
        ones can stream is for `evaluate` to say, with `wb.Window` on them and on as many random heads.
    Raises:
        ValueError: as `StreamingCache`; when every layer is local.
    Source:
        Xiao et al. 2025, "DuoAttention", eq. 1 to 3.
    """
    began, rng, (sink, window) = time.perf_counter(), np.random.default_rng(seed), window_of(sink, window)
    prompts, name = texts(model, task)
    local = [layer for layer, own in enumerate(own_layers(model)) if own.is_sliding]
    groups = {layer: index for layer, index in grouped(model, at).items() if layer not in local}
    if not groups:
        raise ValueError("Every layer of these heads is local, so their cache is a window already.")
    gates = {layer: torch.ones(model.names.n_kv_heads, device=model.hf.device) for layer in groups}
    free = {layer: torch.zeros_like(gate) for layer, gate in gates.items()}  # 1 where a gate is trained
    for layer, index in groups.items():
        free[layer][index] = 1
    for gate in gates.values():
        gate.requires_grad_(True)
    optimizer, count = torch.optim.Adam(gates.values(), lr), sum(map(len, groups.values()))
    rows = min(rows, len(prompts.ids))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)  # else the gates swing together, and never settle
        part = _drawn(prompts, rng.choice(len(prompts.ids), rows, replace=False))
        with torch.no_grad():
            wanted = _last(model, part)
        with _gated(model, gates, free, part, sink, window):
            off = _last(model, part) - wanted
        lost = (off.square().sum(-1) / wanted.square().sum(-1)).mean()
        loss = lost + penalty * sum((gate * free[layer]).sum() for layer, gate in gates.items()) / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for gate in gates.values():
                gate.clamp_(0, 1)
    share = model.names.n_heads // model.names.n_kv_heads
    found = {Component("z", layer, kv * share + i): gates[layer][kv].item()
             for layer, index in groups.items() for kv in index for i in range(share)}  # fmt: skip
    empty = np.full(len(found), np.nan)
    return Scores(list(found), np.array(list(found.values())), empty, empty.copy(), empty.copy(), np.zeros((len(found), 0)),
                  "efficiency.retrieval_heads", "gate", task=name, cost=4.0 * steps * rows / len(prompts.ids),
                  seconds=time.perf_counter() - began, seed=seed,
                  why="Gates are trained together on all prompts; compare with random heads in evaluate.")  # fmt: skip


def _drawn(prompts: Prompts, rows) -> Prompts:
    return Prompts([prompts.ids[row] for row in rows])


def _last(model, part: Prompts) -> torch.Tensor:
    """The last stream (after the final norm) at the end of each prompt, [row, d_model]."""
    out = model.hf(**model.inputs(part), use_cache=False, output_hidden_states=True, logits_to_keep=1)
    return out.hidden_states[-1][:, -1].float()


@contextmanager
def _gated(model, gates: dict, free: dict, part: Prompts, sink: int, window: int):
    """Inside, the heads of these layers mix full and windowed attention by their gates."""
    place = torch.arange(part.width, device=model.hf.device)
    first = place[None, None] < (torch.tensor(part.pads) + sink).to(place.device)[:, None, None]
    hidden = ~(first | (place[None, None] > place[None, :, None] - window))[:, None]  # [row, 1, query, key]
    share = model.names.n_heads // model.names.n_kv_heads

    def attention(module, query, key, value, attention_mask, **kwargs):
        own = sys.modules[type(module).__module__].eager_attention_forward
        full = own(module, query, key, value, attention_mask, **kwargs)[0]
        if module.layer_idx not in gates:
            return full, None
        mask = attention_mask.masked_fill(hidden, torch.finfo(attention_mask.dtype).min)
        short = own(module, query, key, value, mask, **kwargs)[0]
        gate = torch.where(free[module.layer_idx] > 0, gates[module.layer_idx], 1.0).repeat_interleave(share)[:, None]
        gate = gate.to(full.dtype)
        return gate * full + (1 - gate) * short, None

    with attention_as(model, NAME):
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, eager_mask)
        try:
            yield
        finally:  # the tables have no public way out
            AttentionInterface._global_mapping.pop(NAME)
            AttentionMaskInterface._global_mapping.pop(NAME)
