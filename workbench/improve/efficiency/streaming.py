"""Streaming heads: a key-value cache in which some heads keep every token, the others a sink and the latest ones."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import eager_mask

from workbench.attend import window_of
from workbench.component import components
from workbench.locate.magnitude.reading import texts
from workbench.model.edit import LOCK
from workbench.task import Task

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
        config: of the model, which says whether its attention can read this.
    """

    is_croppable = False

    def __init__(self, streaming, n: int, sink: int, window: int, firsts: torch.Tensor, config):
        super().__init__()
        self.streaming, self.sink, self.window, self.config = sorted(streaming), sink, window, config
        self.keeping = [head for head in range(n) if head not in self.streaming]
        self.given = firsts
        self.reset()

    def update(self, key_states, value_states, *args, **kwargs):
        if self.config._attn_implementation != NAME:
            raise RuntimeError(
                "Attention here cannot read a StreamingCache: put the call inside `with streaming(model)`."
            )
        rows, new = len(key_states), torch.arange(self.seen, self.seen + key_states.shape[-2])
        if not self.is_initialized:
            if rows % len(self.firsts):
                raise ValueError(f"This StreamingCache was made for {len(self.firsts)} rows, but the batch has {rows}: give rows= "
                                 "or firsts= of the batch.")  # fmt: skip
            self.firsts = self.firsts.repeat_interleave(rows // len(self.firsts))  # beams, as `generate` lays them
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

    def reset(self) -> None:
        super().reset()
        self.short_keys = self.short_values = self.places = None
        self.firsts, self.seen = self.given, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rows(lambda x: x[indices.to(x.device) if isinstance(indices, torch.Tensor) else indices])

    def _rows(self, choose) -> None:
        if self.is_initialized:
            for name in ("keys", "values", "short_keys", "short_values", "places", "firsts"):
                setattr(self, name, choose(getattr(self, name)))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("A StreamingCache has let tokens go, so it cannot be cut back to fewer; build a new one and run the shorter "
                         "text.")  # fmt: skip


class StreamingCache(Cache):
    """A cache for `hf(...)` or `hf.generate` in which streaming heads store less, inside `with streaming(model)`.

    Each streaming head keeps the first `sink` tokens and the latest `window` (the query's own included); what it computes
    is what `wb.Window` computes by masking. Layers without a streaming head, and layers that are local anyway, have the
    cache that transformers gives them.

    Args:
        heads: which stream: "z.3.1", a list, or a family. Where query heads share keys, all that share them are named.
        sink, window: as in `wb.Window`.
        firsts: for each row of a padded batch its first column that is no padding; None for one row or no padding.
    Raises:
        ValueError: for other components, or some query heads of a key-value head without the others; in a layer that is local
            already; where transformers computes attention, or caches it, in a way of its own.
        RuntimeError: when the model runs with it outside `streaming`.
    Source:
        Xiao et al. 2025, "DuoAttention"; Tang et al. 2025, "RazorAttention".
    """

    def __init__(self, model, heads, sink: int = 1, window: int = 4, firsts=None, rows: int = 1):
        layers, (sink, window) = own_layers(model), window_of(sink, window)
        firsts = torch.zeros(rows, dtype=torch.long) if firsts is None else torch.as_tensor(firsts)
        for layer, index in grouped(model, heads).items():
            if layers[layer].is_sliding:
                raise ValueError(f"Layer {layer} is local: its cache is a window already. Leave its heads out.")
            layers[layer] = StreamingLayer(index, model.names.n_kv_heads, sink, window, firsts, model.hf.config)
        super().__init__(layers=layers)


def own_layers(model) -> list:
    """The layers of the cache that transformers would use, windows of local layers included."""
    layers = DynamicCache(config=model.hf.config).layers
    return layers or [DynamicLayer() for _ in range(model.names.n_layers)]


def grouped(model, heads) -> dict[int, list[int]]:
    """Layer -> the key-value heads that are named, each by all its query heads, sorted.

    Raises:
        ValueError: for other kinds, positions, key-value heads that are named in part, or a model whose attention or cache
            cannot be replaced.
    """
    if "q" in model.names.refused:
        raise ValueError(f"Streaming heads need transformers' attention function. {model.names.refused['q']}")
    kind = model.hf.config.model_type
    if getattr(model.hf.config, "kv_lora_rank", None):
        raise ValueError(f"No head of {kind!r} can stream: its cache holds one latent for all heads of a layer, so none can store "
                         "less than another. wb.Window hides tokens without a cache.")  # fmt: skip
    if model.names.has_sinks:
        raise ValueError(f"No head of {kind!r} can stream: its attention has learnt sinks, a column beside the keys.")
    found, share = {}, model.names.n_heads // model.names.n_kv_heads
    for one in model.names.expand(components(heads)):
        if one.kind not in ("z", "pattern", "attn_scores") or one.position is not None:
            raise ValueError(f"{one} is no head; write 'z.*.*' or 'z.5.2', without a position.")
        found.setdefault(one.layer, set()).add(one.index)
    for layer, own in found.items():
        for kv in sorted({head // share for head in own}):
            every = [f"z.{layer}.{head}" for head in range(kv * share, (kv + 1) * share)]
            if len(own & set(range(kv * share, (kv + 1) * share))) < share:
                raise ValueError(f"Only some query heads of key-value head {kv} in layer {layer} are named, and they share what is "
                                 f"stored: name all query heads of a key-value head, here {' and '.join(every)}.")  # fmt: skip
    return {layer: sorted({head // share for head in own}) for layer, own in sorted(found.items())}


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
        prompts: a text, a list of texts or ids, or a task (clean prompts of pairs); heads, sink, window: as in `StreamingCache`.
    Returns:
        [prompt, d_vocab] at the last position.
    """
    found, prompts = [], texts(model, prompts)[0] if isinstance(prompts, Task) else model._prompts(prompts)
    for part in prompts.chunks():
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
