"""Efficient inference: fewer operations, smaller weights, a smaller cache, each measured and not only counted in masks."""

from workbench.improve.efficiency.costs import Costs, costs, decode
from workbench.improve.efficiency.exits import exit_early
from workbench.improve.efficiency.gates import retrieval_heads
from workbench.improve.efficiency.quantize import quantization_effects, quantize
from workbench.improve.efficiency.shrink import shrink
from workbench.improve.efficiency.streaming import StreamingCache, cache_bytes, stream, streaming
from workbench.improve.efficiency.tokens import prune_tokens

__all__ = [
    "Costs", "StreamingCache", "cache_bytes", "costs", "decode", "exit_early", "prune_tokens", "quantization_effects", "quantize",
    "retrieval_heads", "shrink", "stream", "streaming",
]  # fmt: skip
