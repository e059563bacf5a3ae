"""One call that goes on from a run at a depth and a position, with changes on the way."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from workbench.model.names import Names
from workbench.model.run import Model
from workbench.model.sweep.capture import Run, in_order

# the matrix it goes through, and what adds the result to the stream
WRITTEN = {"z": ("heads", "attn_add"), "neuron": ("neurons", "mlp_add")}


def resume(model: Model, base: Run, prompts, start: int, layer: int, stage: str, stream, edits=None, record=(), add=None,
           slope=None):  # fmt: skip
    """One call: rows that go on from the base run at a depth and a column.

    Args:
        prompts: [row], the prompt of `base` that each row continues; stream: [row, column from start, d_model] before
            block `layer` (stage "pre") or between its attention and FFN ("mid").
        edits: site -> (where, values), boolean and numbers [row, column, width]: set there on the way; columns count from
            `start`, except for k and v, where all are there. Not resid_pre of the layer where the run is taken up.
        record: sites to read, before what is set there.
        add: (kind, layer, old, new), z or neurons [row, column, width]: what their difference writes is added to the stream.
        slope: (tensor that edits are made from, logits [row, d_vocab] -> loss [row]), for a gradient.
    Returns:
        (logits [row, d_vocab] at the last position, site -> what was read); with slope (loss [row], gradient of its sum).
    """
    nn, names = model.nnsight, model.names  # what the trace may carry away with it: not the model itself
    past = {"use_cache": False}
    if start:
        past = {model.cache_key: _prefix(base, prompts, start, layer), "use_cache": True}
    edits, rows, places = edits or {}, len(prompts), {}
    for kind, at in sorted({*edits, *record}, key=in_order):
        places.setdefault(("attn_out" if kind == "resid_mid" else kind, at), []).append(kind)
        if kind == "resid_mid":  # set by what attention writes, given the stream before
            places.setdefault(("resid_pre", at), [])
    order = sorted(places, key=in_order)

    def run():
        x, kept, pre = stream, {}, None
        if add is not None:
            kind, at, old, new = add
            x = x + _written(names, kind, at, new) - _written(names, kind, at, old)
        for below in range(layer):
            names.layers[below].skip(names.block_value(x))
        if layer < names.n_layers:
            names.layers[layer].input = x
            if stage == "mid":  # the stream already holds what attention wrote
                attention = names.part("attn", layer)
                attention.skip((x if names.row.attn_adds_residual else torch.zeros_like(x), None))
        for site in order:
            if site == ("resid_pre", layer):
                pre = x
                continue
            place = names.place(*site, rows)
            value = place.get()
            if site in record:
                kept[site] = value.clone()
            for kind in places[site]:
                if (kind, site[1]) in edits:
                    where, new = edits[kind, site[1]]
                    value = _set(kind, value, where, new - pre if kind == "resid_mid" else new)
                    place.set(value)
            pre = value if site[0] == "resid_pre" else pre
        return nn.output.logits[:, -1].float(), kept

    def body():
        if slope is None:
            return run()
        leaf, loss_of = slope
        with torch.enable_grad():
            loss = loss_of(run()[0])
            (gradient,) = torch.autograd.grad(loss.sum(), [leaf])
        return loss.detach(), gradient

    return model.trace(model.inputs(base.ids[prompts], base.mask[prompts], start), body, logits_to_keep=1, **past)


def _set(kind: str, value: torch.Tensor, where: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Inside a trace: new values where asked; attention scores that the causal mask has ruled out stay so."""
    where, new = where.to(value.device), new.to(value)
    if kind == "attn_scores":
        where = where & (value > torch.finfo(value.dtype).min / 2)
    return torch.where(where, new, value)


def _written(names: Names, kind: str, layer: int, x: torch.Tensor) -> torch.Tensor:
    """Inside a trace: what attention or the FFN adds to the stream, given z of all heads or all neurons."""
    linear, adds = WRITTEN[kind]
    written = names.part(linear, layer)(x)
    row = names.row
    inside = (row.attn, row.heads) if kind == "z" else (row.neurons, row.neurons.rpartition(".")[0])
    if getattr(row, adds) not in inside:  # a norm between the matrix and the stream
        written = names.part(adds, layer)(written)
    return written * names.scale


def _prefix(run: Run, prompts, start: int, layer: int):
    """Keys and values of the columns before `start`, one row per patch; skipped blocks only need the length."""
    cache = DynamicCache()
    length_only = run.keys[0].new_zeros(len(prompts), 1, start, 1)
    for j, (keys, values) in enumerate(zip(run.keys, run.values, strict=True)):
        if j < layer:
            cache.update(length_only, length_only, j)
        else:
            cache.update(keys[prompts, :, :start], values[prompts, :, :start], j)
    return cache
