"""A circuit as a value: a set of edges with scores, to be cut down, compared, drawn and kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from workbench import storage
from workbench.component import Component
from workbench.locate.circuit.edge import Edge
from workbench.model.edges import wiring


@dataclass(frozen=True, eq=False)
class Circuit:
    """Which edges do it? A set of edges with scores; all edges of a model, when a method has just scored them.

    Attributes:
        edges: in forward order of what reads. scores: [edge], positive where the edge helps, in units of the metric.
        sizes: numbers of layers, heads, and heads for keys and values. whole: how many edges the model has.
        method, metric, task: how the scores were made.
        ci_lo, ci_hi: [edge], bootstrap interval, over clusters as in `Scores`. null_p95: [edge], what |score| reaches under the null in
            95 % of resamplings. NaN where a method has none; `why` says why.
        per_prompt: [edge, prompt], what the scores are means of; None where a method has none.
        null: one line on what `null_p95` is.
        completeness: of gradients along a path, what share of the metric's gap the edges out of the embedding add up to:
            1 with enough steps; far from 1, the scores are not to be trusted. NaN for other methods.
        cost: forward-pass equivalents (one batch of all prompts is one); seconds; seed.
        saes: name -> place of the SAEs that take a stream apart (see `feature_edges`).
    """

    edges: tuple[Edge, ...]
    scores: np.ndarray
    sizes: tuple[int, int, int]
    whole: int
    method: str = "by hand"
    metric: str = ""
    task: str = ""
    ci_lo: np.ndarray | None = None
    ci_hi: np.ndarray | None = None
    null_p95: np.ndarray | None = None
    per_prompt: np.ndarray | None = None
    null: str = ""
    completeness: float = float("nan")
    cost: float = float("nan")
    seconds: float = float("nan")
    seed: int = 0
    why: str = ""
    saes: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        edges = tuple(Edge.parse(one) for one in self.edges)
        scores = np.asarray(self.scores, float)
        if len(set(edges)) != len(edges) or len(edges) != len(scores):
            raise ValueError(f"A circuit needs each edge once, with one score: got {len(edges)} edges "
                             f"({len(set(edges))} different) and {len(scores)} scores.")  # fmt: skip
        order = sorted(range(len(edges)), key=lambda i: edges[i].order)
        object.__setattr__(self, "edges", tuple(edges[i] for i in order))
        object.__setattr__(self, "scores", scores[order])
        for name in (*COLUMNS, "per_prompt"):
            value = getattr(self, name)
            if value is not None or name in COLUMNS:
                value = np.full(len(edges), np.nan) if value is None else np.asarray(value, float)[order]
                object.__setattr__(self, name, value)

    @classmethod
    def of(cls, model, edges, name: str = "by hand") -> Circuit:
        """A circuit of these edges ('z.2.1 -> q.4.3', or pairs of components), each with score 1.

        Raises:
            ValueError: for an edge that the model does not have.
        """
        wired = wiring(model)
        edges = [Edge.parse(one) if isinstance(one, (str, Edge)) else Edge(*one) for one in edges]
        found = cls(tuple(edges), np.ones(len(edges)), wired.sizes, int(wired.exists.sum()), name)
        found.mask(wired)
        return found

    # as a set

    def __len__(self) -> int:
        return len(self.edges)

    def __iter__(self):
        return iter(self.edges)

    def __contains__(self, edge) -> bool:
        return Edge.parse(edge) in self._index

    def __getitem__(self, edge) -> float:
        """The score of an edge."""
        one = Edge.parse(edge)
        if one not in self._index:
            raise KeyError(f"{one} is not in this circuit of {len(self)} edges.")
        return float(self.scores[self._index[one]])

    @property
    def _index(self) -> dict:
        if "_places" not in self.__dict__:
            object.__setattr__(self, "_places", {edge: i for i, edge in enumerate(self.edges)})
        return self._places

    @property
    def share(self) -> float:
        """Its edges as a share of all edges of the model."""
        return len(self) / self.whole

    @property
    def nodes(self) -> list[Component]:
        """The parts it runs through, in forward order."""
        found = {part for edge in self.edges for part in (edge.source, *self.readers(edge.target))}
        return sorted(found)

    def readers(self, target: Component) -> list[Component]:
        """The parts that use what this target reads; a shared key or value serves several heads."""
        if target.kind not in "qkv":
            return [target]
        many = 1 if target.kind == "q" else self.sizes[1] // self.sizes[2]
        return [Component("z", target.layer, target.index * many + i) for i in range(many)]

    def only(self, keep) -> Circuit:
        """The edges for which `keep` holds: a list of edges, or a mask [edge]."""
        if not (isinstance(keep, np.ndarray) and keep.dtype == bool):
            wanted = {Edge.parse(one) for one in keep}
            keep = np.array([edge in wanted for edge in self.edges], bool)
        columns = {name: getattr(self, name)[keep] for name in COLUMNS}
        per_prompt = None if self.per_prompt is None else self.per_prompt[keep]
        return replace(self, edges=tuple(e for e, k in zip(self.edges, keep, strict=True) if k), scores=self.scores[keep],
                       per_prompt=per_prompt, **columns)  # fmt: skip

    def without(self, *edges) -> Circuit:
        """The circuit with these edges cut."""
        cut = {Edge.parse(one) for one in edges}
        return self.only(np.array([edge not in cut for edge in self.edges], bool))

    def top(self, size: int | float, by: str = "size", prune: bool = True) -> Circuit:
        """The strongest edges as a circuit.

        Args:
            size: how many edges (an int), or which share of all edges of the model (a float from 0 to 1).
            by: "size" takes the largest |score|; "sign" the largest score, so that edges that hurt stay out; "route"
                starts at the logits and always adds the largest |score| among the edges into what it has reached.
            prune: leave out edges that are on no path from the embedding to the logits.
        """
        count = round(size * self.whole) if isinstance(size, float) else int(size)
        if not 0 <= count <= self.whole or (isinstance(size, float) and size > 1):
            raise ValueError(
                f"size={size!r}: give a number of edges from 0 to {self.whole}, or a share from 0.0 to 1.0."
            )
        if by not in ("size", "sign", "route"):
            raise ValueError(f"by={by!r} is unknown; choose 'size', 'sign' or 'route'.")
        if by == "route":
            chosen = self._route(count)
        else:
            order = np.argsort(-(np.abs(self.scores) if by == "size" else self.scores), kind="stable")
            chosen = np.zeros(len(self), bool)
            chosen[order[:count]] = True
        found = self.only(chosen)
        return found.pruned() if prune else found

    def pruned(self) -> Circuit:
        """Without the edges that are on no path from the embedding to the logits; they cannot have an effect."""
        reached, needed = {Component("embed")}, {Component("logits")}
        for _ in range(1 + 2 * len(self.saes)):  # sources stand before targets; features, wherever they are, last
            for edge in self.edges:
                if edge.source in reached:
                    reached.update(self.readers(edge.target))
            for edge in reversed(self.edges):
                if needed.intersection(self.readers(edge.target)):
                    needed.add(edge.source)
        return self.only(np.array([edge.source in reached and bool(needed.intersection(self.readers(edge.target)))
                                   for edge in self.edges], bool))  # fmt: skip

    def _route(self, count: int) -> np.ndarray:
        import heapq

        into: dict = {}
        for i, edge in enumerate(self.edges):
            for reader in self.readers(edge.target):
                into.setdefault(reader, []).append((-abs(self.scores[i]), i))
        chosen, seen = np.zeros(len(self), bool), {Component("logits")}
        front = list(into.get(Component("logits"), []))
        heapq.heapify(front)
        while front and chosen.sum() < count:
            _, i = heapq.heappop(front)
            chosen[i] = True
            source = self.edges[i].source
            if source not in seen:
                seen.add(source)
                for item in into.get(source, []):
                    heapq.heappush(front, item)
        return chosen

    def above_null(self) -> Circuit:
        """The edges whose |score| exceeds what the null reaches."""
        return self.only(np.abs(self.scores) > self.null_p95)

    def jaccard(self, other) -> float:
        """How much do two circuits share? |both| / |either|."""
        mine, theirs = set(self.edges), {Edge.parse(one) for one in other}
        return len(mine & theirs) / max(1, len(mine | theirs))

    def auroc(self, true) -> float:
        """How well do the |scores| tell the true edges from all others of the model? 0.5 is chance, 1 perfect.

        Edges that were not scored count as 0.
        """
        from sklearn.metrics import roc_auc_score

        true = {Edge.parse(one) for one in true}
        labels = [edge in true for edge in self.edges] + [True] * len(true - set(self.edges))
        rest = self.whole - len(labels)
        strength = np.concatenate([np.abs(self.scores), np.zeros(len(labels) - len(self) + rest)])
        return float(roc_auc_score(labels + [False] * rest, strength))

    def mask(self, wired):
        """The circuit as a tensor [target, source] of 0 and 1, for this wiring of a model.

        Raises:
            ValueError: for a circuit of a model of another shape, or an edge that it does not have.
        """
        import torch

        if self.saes:
            raise ValueError("Edges into and out of features cannot be switched one by one. Keep the nodes of this circuit "
                             "instead: wb.locate.circuit.keep(model, task, circuit.nodes).")  # fmt: skip
        if tuple(self.sizes) != tuple(wired.sizes):
            raise ValueError(f"This circuit belongs to a model of (layers, heads, key heads) = {tuple(self.sizes)}, not "
                             f"{tuple(wired.sizes)}.")  # fmt: skip
        source, target = ({one: i for i, one in enumerate(ends)} for ends in (wired.sources, wired.targets))
        found = torch.zeros(wired.exists.shape)
        for edge in self.edges:
            place = target.get(edge.target), source.get(edge.source)
            if None in place or not wired.exists[place]:
                raise ValueError(f"This model has no edge {edge}: it has {wired.sizes[0]} layers, {wired.sizes[1]} heads and "
                                 f"{wired.sizes[2]} key heads, from 0"
                                 + (", and attention and FFN run in parallel." if wired.parallel else "."))  # fmt: skip
            found[place] = 1
        return found

    # as a table, a picture, a file

    @property
    def frame(self):
        """A pandas table, strongest first."""
        import pandas as pd

        table = pd.DataFrame({"edge": [str(e) for e in self.edges], "source": [str(e.source) for e in self.edges],
                              "target": [str(e.target) for e in self.edges], "score": self.scores,
                              **{name: getattr(self, name) for name in COLUMNS}})  # fmt: skip
        return table.iloc[np.argsort(-np.abs(self.scores), kind="stable")].reset_index(drop=True)

    def __repr__(self) -> str:
        best = max(range(len(self)), key=lambda i: abs(self.scores[i]), default=None)
        top = "" if best is None else f", strongest {self.edges[best]} {self.scores[best]:+.3g}"
        share = "" if self.saes else f" ({self.share:.1%})"  # next to none of the edges of all features
        return f"Circuit({self.method}, {len(self)} of {self.whole} edges{share}{top})"

    def plot(self, **kwargs):
        """The circuit as a matplotlib figure: layers upwards, an arrow per edge."""
        from workbench.locate.circuit.drawing import draw

        return draw(self, **kwargs)

    def save(self, path) -> Path:
        """Write the circuit as one JSON file (without the per-prompt scores)."""
        plain = {name: getattr(self, name) for name in PLAIN}
        numbers = {name: [None if x != x else x for x in getattr(self, name).tolist()] for name in ("scores", *COLUMNS)}
        plain = {name: None if value != value else value for name, value in plain.items()}
        edges = [str(edge) for edge in self.edges]
        return storage.write_file(path, plain | {"sizes": list(self.sizes), "edges": edges} | numbers)

    @classmethod
    def load(cls, path) -> Circuit:
        """Read a circuit back.

        Raises:
            ValueError: for a file that is no circuit.
        """
        plain = storage.read(cls, path)
        if "edges" not in plain or "scores" not in plain:
            raise ValueError(f"{path} holds no circuit. Circuit.load takes the file that save() wrote.")
        for name in ("scores", *COLUMNS):
            plain[name] = np.array([np.nan if x is None else x for x in plain[name]], float)
        plain |= {name: float("nan") for name in ("completeness", "cost", "seconds") if plain[name] is None}
        return cls(**plain | {"edges": tuple(plain["edges"]), "sizes": tuple(plain["sizes"])})


COLUMNS = ("ci_lo", "ci_hi", "null_p95")
PLAIN = ("whole", "method", "metric", "task", "null", "completeness", "cost", "seconds", "seed", "why", "saes")
