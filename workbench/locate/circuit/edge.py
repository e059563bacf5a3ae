"""One edge: what one part writes, as one other part reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache, total_ordering

from workbench.component import Component

SOURCES, TARGETS = ("embed", "z", "mlp_out", "feature"), ("q", "k", "v", "mlp_out", "feature", "logits")


@total_ordering
@dataclass(frozen=True)
class Edge:
    """What one part writes, as one other part reads it: `z.2.1 -> q.4.3`.

    Args:
        source: embed, a head (z.2.1) or an FFN (mlp_out.2); a feature (feature.NAME.77) or error term
            (feature.NAME.error), where a stream is taken apart by an SAE.
        target: a head's query, key or value (q.4.3), an FFN (mlp_out.4) or logits; a feature or error term.
    Raises:
        ValueError: for a pair that is no edge.
    """

    source: Component
    target: Component

    def __post_init__(self) -> None:
        for name, kinds in (("source", SOURCES), ("target", TARGETS)):
            one = Component.parse(getattr(self, name))
            object.__setattr__(self, name, one)
            if one.kind not in kinds or one.is_family or one.position is not None:
                raise ValueError(f"{one} cannot be the {name} of an edge. An edge goes from embed, a head (z.2.1) or an FFN "
                                 "(mlp_out.2) to a head's query, key or value (q.4.3), an FFN or logits; or from or to a "
                                 "feature (feature.NAME.77).")  # fmt: skip
        features = [one.kind == "feature" for one in (self.source, self.target)]
        if all(features):
            raise ValueError(f"{self}: features of one stream do not read each other.")
        # within a layer q, k and v come first, then z, then the FFN; where features stand, only the model knows
        if not any(features) and not self.source < self.target:
            raise ValueError(f"{self.source} -> {self.target} runs backwards: {self.target} is read first.")

    @classmethod
    def parse(cls, text: str | Edge) -> Edge:
        """Which edge does this text name? `str` and `parse` round-trip."""
        return text if isinstance(text, Edge) else _parsed(text)

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"

    __repr__ = __str__

    def __lt__(self, other: Edge) -> bool:
        return self.order < other.order

    @cached_property
    def order(self) -> tuple:
        """For sorting: by what reads, then by what writes, both in forward order."""
        return (self.target._key(), self.source._key())


@lru_cache(maxsize=2**16)
def _parsed(text) -> Edge:
    ends = re.split(r"\s*->\s*", text.strip()) if isinstance(text, str) else []
    if len(ends) != 2:
        raise ValueError(f"{text!r} is no edge. Write two components with an arrow: 'z.2.1 -> q.4.3'.")
    return Edge(*ends)


@lru_cache(maxsize=8)
def every_edge(sources: tuple, targets: tuple, known: tuple) -> tuple[Edge, ...]:
    """All edges of a model, in order: `known` says for each target how many sources come before it."""
    return tuple(Edge(source, target) for target, n in zip(targets, known, strict=True) for source in sources[:n])
