"""Streaming heads: a key-value cache in which some heads keep every token, the others a sink and the latest ones."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import eager_mask

from workbench.component import components
from workbench.model.edit import LOCK

NAME = "workbench_streaming"  # of the attention function, in transformers' table


class Held(NamedTuple):
    """What one pass attends to: keys and values of the heads that keep all, then of those that stream.

    `places` [row, key] are the columns the streaming keys came from; `start` is the column of this pass's first query.
    """

    keys: torch.Tensor
    values: torch.Tensor
    short_keys: torch.Tensor
    short_values: torch.Tensor
    places: torch.Tensor
    start: int
    layer: StreamingLayer


class StreamingLayer(DynamicLayer):
    """One layer's cache, with two lengths: `keys` and `values` of the retrieval heads, `short_keys` and `short_values` of the
    streaming ones.

    Args:
        streaming: numbers of the key-value heads that stream, of `n` in the layer; sink, window: what these keep.
        firsts: for each row, its first column that is no padding.
    """

    def __init__(self, streaming, n: int, sink: int, window: int, firsts: torch.Tensor):
        super().__init__()
        self.streaming, self.sink, self.window, self.firsts, self.seen = sorted(streaming), sink, window, firsts, 0
        self.keeping = [head for head in range(n) if head not in self.streaming]
        self.short_keys = self.short_values = self.places = None

    def update(self, key_states, value_states, *args, **kwargs):
        rows, new = len(key_states), torch.arange(self.seen, self.seen + key_states.shape[-2])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            empty = key_states[:, self.streaming, :0]
            self.keys, self.values = key_states[:, self.keeping, :0], value_states[:, self.keeping, :0]
            self.short_keys, self.short_values = empty, value_states[:, self.streaming, :0]
            self.places = torch.zeros(rows, 0, dtype=torch.long)
        start, self.seen = self.seen, self.seen + len(new)
        self.keys = torch.cat([self.keys, key_states[:, self.keeping]], -2)
        self.values = torch.cat([self.values, value_states[:, self.keeping]], -2)
        short = [torch.cat([old, now[:, self.streaming]], -2)
                 for old, now in ((self.short_keys, key_states), (self.short_values, value_states))]  # fmt: skip
        places = torch.cat([self.places, new.expand(rows, -1)], -1)
        held = Held(self.keys, self.values, *short, places, start, self)
        # the next query sees the sink and the last window - 1 tokens besides itself; the rest is let go
        wanted = (places < (self.firsts + self.sink)[:, None]) & (places >= self.firsts[:, None])
        wanted |= places > self.seen - self.window
        kept = wanted.int().topk(min(places.shape[1], self.sink + self.window - 1)).indices.sort().values
        self.places = places.gather(1, kept)
        index = kept[:, None, :, None].to(key_states.device)
        self.short_keys, self.short_values = (x.take_along_dim(index, 2) for x in short)
        return held, held

    def visible(self, mask: torch.Tensor, held: Held) -> torch.Tensor:
        """The mask [row, 1, query, key] of the streaming heads, from the model's own over all columns."""
        place = held.places.to(mask.device)[:, None, None]
        own = mask.expand(len(held.places), -1, -1, -1).take_along_dim(place, -1)
        query = held.start + torch.arange(mask.shape[-2], device=mask.device)[:, None]
        seen = (place < (self.firsts + self.sink).to(mask.device)[:, None, None, None]) | (place > query - self.window)
        return own.masked_fill(~seen, torch.finfo(own.dtype).min)

    def get_seq_length(self) -> int:
        return self.seen


class StreamingCache(Cache):
    """A cache for `hf(...)` or `hf.generate` in which streaming heads store less, inside `with streaming(model)`.

    Each streaming head keeps the first `sink` tokens and the latest `window` (the query's own included); what it computes
    is what `wb.Window` computes by masking. Layers without a streaming head, and layers that are local anyway, have the
    cache that transformers gives them.

    Args:
        heads: which stream: "z.3.1", a list, or a family. Where query heads share keys, a key-value head streams when all
            its query heads are named.
        firsts: for each row of a padded batch its first column that is no padding; None for one row or no padding.
    Raises:
        ValueError: for other components; in a layer that is local already; where transformers computes attention in a way
            of its own.
    Source:
        Xiao et al. 2025, "DuoAttention"; Tang et al. 2025, "RazorAttention".
    """

    def __init__(self, model, heads, sink: int = 1, window: int = 4, firsts=None, rows: int = 1):
        layers = own_layers(model)
        firsts = torch.zeros(rows, dtype=torch.long) if firsts is None else torch.as_tensor(firsts)
        for layer, index in grouped(model, heads).items():
            if layers[layer].is_sliding:
                raise ValueError(f"Layer {layer} is local: its cache is a window already. Leave its heads out.")
            layers[layer] = StreamingLayer(index, model.names.n_kv_heads, sink, window, firsts)
        super().__init__(layers=layers)


def own_layers(model) -> list:
    """The layers of the cache that transformers would use, windows of local layers included."""
    layers = DynamicCache(config=model.hf.config).layers
    return layers or [DynamicLayer() for _ in range(model.names.n_layers)]


def grouped(model, heads) -> dict[int, list[int]]:
    """Layer -> the key-value heads of which every query head is named, sorted.

    Raises:
        ValueError: for other kinds, positions, or a model whose attention cannot be replaced.
    """
    if "q" in model.names.refused:
        raise ValueError(f"Streaming heads need transformers' attention function. {model.names.refused['q']}")
    found, share = {}, model.names.n_heads // model.names.n_kv_heads
    for one in model.names.expand(components(heads)):
        if one.kind not in ("z", "pattern", "attn_scores") or one.position is not None:
            raise ValueError(f"{one} is no head; write 'z.*.*' or 'z.5.2', without a position.")
        found.setdefault(one.layer, set()).add(one.index)
    whole = {layer: [kv for kv in range(model.names.n_kv_heads) if set(range(kv * share, (kv + 1) * share)) <= own]
             for layer, own in sorted(found.items())}  # fmt: skip
    return {layer: index for layer, index in whole.items() if index}


def attention(module, query, key, value, attention_mask, **kwargs):
    """transformers' attention function: the architecture's own, once for the heads that keep all and once for the others."""
    own = sys.modules[type(module).__module__].eager_attention_forward
    if not isinstance(key, Held):
        return own(module, query, key, value, attention_mask, **kwargs)
    held, layer, parts, order = key, key.layer, [], []
    share = query.shape[1] // (len(layer.keeping) + len(layer.streaming))
    for index, keys, values, short in ((layer.keeping, held.keys, held.values, False),
                                       (layer.streaming, held.short_keys, held.short_values, True)):  # fmt: skip
        if index:
            heads = [kv * share + i for kv in index for i in range(share)]
            mask = layer.visible(attention_mask, held) if short else attention_mask
            parts.append(own(module, query[:, heads], keys, values, mask, **kwargs)[0])  # [row, query, head, d_head]
            order += heads
    return torch.cat(parts, 2)[:, :, torch.tensor(order).argsort()], None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)


def streaming(model):
    """Inside, this model's attention can read a `StreamingCache`; with another cache it computes what it always does."""
    return attention_as(model, NAME)


@contextmanager
def attention_as(model, name: str):
    """Inside, this model computes attention by the function of that name in transformers' table."""
    config, before = model.hf.config, model.hf.config._attn_implementation
    with LOCK:
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = before


def stream(model, prompts, heads, *, sink: int = 1, window: int = 4) -> torch.Tensor:
    """What does the model predict next, with these heads streaming and their cache truly smaller?

    Args:
        prompts: a text, or a list of texts or ids; heads, sink, window: as in `StreamingCache`.
    Returns:
        [prompt, d_vocab] at the last position.
    """
    found = []
    for part in model._prompts(prompts).chunks():
        cache = StreamingCache(model, heads, sink, window, part.pads)
        with streaming(model), torch.no_grad():
            out = model.hf(**model.inputs(part), **{model.cache_key: cache}, use_cache=True, logits_to_keep=1)
        found.append(out.logits[:, -1].float().cpu())
    return torch.cat(found)


def cache_bytes(cache) -> int:
    """How many bytes do the keys and values in a cache take?"""
    names = ("keys", "values", "short_keys", "short_values")
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
