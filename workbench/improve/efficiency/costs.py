"""What does running a model cost? Multiply-adds, bytes and seconds, measured; masks save nothing by themselves."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from workbench.improve.efficiency.streaming import StreamingCache, attention_as, cache_bytes, own_layers, streaming
from workbench.locate.vocabulary.readout import asked


@dataclass(frozen=True)
class Costs:
    """Means over prompts, each run alone, as on a laptop.

    Attributes:
        prompt_operations, token_operations: multiply-adds of the pass over the prompt, and of one generated token.
        weight_bytes: of all parameters (a shared matrix counts once).
        cache_bytes: keys and values held after the last token. tokens: how many tokens they are of.
        seconds: for prompt and generated tokens together, the best of the repeats. n: prompts.
    """

    prompt_operations: float
    token_operations: float
    weight_bytes: int
    cache_bytes: float
    tokens: float
    seconds: float
    n: int

    def __repr__(self) -> str:
        return (
            f"Costs({self.prompt_operations / 1e6:.1f}M multiply-adds a prompt, {self.token_operations / 1e6:.2f}M a token, weights "
            f"{self.weight_bytes / 1e6:.2f} MB, cache {self.cache_bytes / 1e3:.1f} kB of {self.tokens:.0f} tokens, n={self.n})"
        )

    def saved(self, before: Costs) -> dict[str, float]:
        """Which share of each cost is saved against `before`?"""
        names = ("prompt_operations", "token_operations", "weight_bytes", "cache_bytes", "seconds")
        return {name: 1 - getattr(self, name) / getattr(before, name) for name in names}


def costs(
    model, prompts, heads=None, *, sink: int = 1, window: int = 4, new_tokens: int = 4, repeats: int = 1
) -> Costs:
    """What does it cost to read these prompts and to write a few tokens?

    Every prompt is run by itself, prompt first, then greedily token by token on its cache. What is counted are the
    multiply-adds of matrix products, which is nearly all there is: those with weights, of experts those that a token is sent
    to, and in attention every query with every key, hidden ones included. Fused kernels ("sdpa", "grouped_mm") compute the
    same in products that torch does not count, so while counting, attention and experts are plain ones. Seconds are measured
    in runs of their own, as the model is.

    Args:
        prompts: a text, a list of texts or ids, a task or the name of a bundled one (clean prompts of pairs).
        heads, sink, window: streaming heads and what they keep, as in `StreamingCache`; None for the model's own cache.
        new_tokens: how many tokens are written, whatever they are.
        repeats: of the timed runs; the best counts. Times of a busy machine say little; operations and bytes are exact.
    """
    if new_tokens < 1 or repeats < 1:
        raise ValueError(f"costs needs new_tokens=1 or more and repeats=1 or more; got {new_tokens} and {repeats}.")
    rows, found = asked(model, prompts)[0].ids, []
    for ids in rows:
        with _countable(model), FlopCounterMode(display=False) as counter:
            run = decode(model, ids, heads, sink, window)
            next(run)
            first = counter.get_total_flops() / 2
            for _ in range(new_tokens - 1):
                next(run)
            _, cache = next(run)
            later = (counter.get_total_flops() / 2 - first) / new_tokens
        found.append((first, later, cache_bytes(cache), len(ids) + new_tokens))
    took = []
    for _ in range(repeats):
        _finish(model)
        began = time.perf_counter()
        for ids in rows:
            run = decode(model, ids, heads, sink, window)
            for _ in range(new_tokens + 1):
                next(run)
        took.append((time.perf_counter() - began) / len(rows))
    first, later, held, tokens = np.mean(found, 0)
    return Costs(first, later, weight_bytes(model), held, tokens, min(took), len(rows))


def decode(model, ids: torch.Tensor, heads=None, sink: int = 1, window: int = 4):
    """Greedy decoding without end on a cache: yields (logits [d_vocab], cache) after the prompt and after each token,
    once they are there (a GPU is waited for).

    Args:
        heads: the streaming heads; None for the model's own cache.
    """
    from transformers.cache_utils import Cache

    cache = Cache(layers=own_layers(model)) if heads is None else StreamingCache(model, heads, sink, window)
    step = ids[None].to(model.hf.device)
    while True:
        with torch.no_grad(), streaming(model) if heads is not None else contextlib.nullcontext():
            out = model.hf(input_ids=step, **{model.cache_key: cache}, use_cache=True, logits_to_keep=1)
        _finish(model)
        yield out.logits[0, -1], cache
        step = out.logits[:, -1:].argmax(-1)


@contextlib.contextmanager
def _countable(model):
    """Inside, attention and experts are plain matrix products."""
    config, before = model.hf.config, model.hf.config._experts_implementation
    with attention_as(model, "eager"):
        config._experts_implementation = "eager"
        try:
            yield
        finally:
            config._experts_implementation = before


def _finish(model) -> None:
    """Waits until accelerators have done what they were given: they compute while Python runs on."""
    for device in {parameter.device for parameter in model.hf.parameters()}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()


def weight_bytes(model) -> int:
    """How many bytes do the parameters take? A matrix that is used twice counts once."""
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in model.hf.parameters()}.values())
