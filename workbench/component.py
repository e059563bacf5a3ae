"""Where: addresses of the parts of a transformer that can be read and changed.

A component prints as `kind.layer.index@position`: `resid_post.3@-1`, `z.4.2`, `neuron.5.120@subject`.
Names are TransformerLens' vocabulary; its hook names (`blocks.5.hook_resid_post`) and `L9H6` are understood too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import total_ordering

# kind: (what one index counts, survey object), in the order of one forward pass
KINDS: dict[str, tuple[str | None, str]] = {
    "embed": (None, "token embedding"),
    "resid_pre": (None, "residual stream before the block"),
    "q": ("head", "query"),
    "k": ("head", "key"),
    "v": ("head", "value"),
    "attn_scores": ("head", "attention scores"),
    "pattern": ("head", "attention pattern"),
    "z": ("head", "head output before W_O"),
    "attn_out": (None, "attention block output"),
    "resid_mid": (None, "residual stream between attention and FFN"),
    "router": (None, "router of a mixture of experts"),
    "neuron": ("neuron", "FFN neuron activation"),
    "expert": ("expert", "expert of a mixture"),
    "mlp_out": (None, "FFN block output"),
    "resid_post": (None, "residual stream after the block"),
    "feature": ("feature", "SAE feature"),
    "ln_final": (None, "final norm"),
    "logits": (None, "logits"),
}
SINGLE = ("neuron", "expert", "feature")  # one number at each token
RANK = {kind: i for i, kind in enumerate(KINDS)}
WITHOUT_LAYER = {"embed", "ln_final", "logits"}
TL_HOOKS = {
    "hook_in": "resid_pre", "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid",
    "hook_out": "resid_post", "hook_resid_post": "resid_post", "hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out",
    "attn.hook_q": "q", "attn.hook_k": "k", "attn.hook_v": "v", "attn.hook_z": "z",
    "attn.hook_attn_scores": "attn_scores", "attn.hook_pattern": "pattern", "mlp.hook_post": "neuron",
}  # fmt: skip


@total_ordering
@dataclass(frozen=True)
class Component:
    """One address. Which part of the model, at which layer, which head or neuron, at which position?

    Attributes:
        kind: one of `KINDS`.
        layer: block number from 0, "*" for every layer, None for `embed`, `ln_final`, `logits` and features.
        index: head, neuron, feature or expert number, "*" for all, None where a kind has no index; "error" for what an
            SAE leaves unexplained (feature.NAME.error), a node of circuits only.
        position: token position in the prompt (negative counts from its end), a span named by the task, or None
            for every position.
        name: for features, the name of the SAE.
    """

    kind: str
    layer: int | str | None = None
    index: int | str | None = None
    position: int | str | None = None
    name: str | None = None

    @classmethod
    def parse(cls, text: str | Component) -> Component:
        """Which component does this text name? `str` and `parse` round-trip.

        Raises:
            ValueError: for a text that is no component, with the nearest spelling.
        """
        if isinstance(text, Component):
            return text
        if not isinstance(text, str):
            raise TypeError(f"A component is written like 'z.4.2' or 'resid_post.3@-1'; got {text!r}.")
        body, at, position = text.strip().partition("@")
        place = _position(position, text) if at else None
        alias = _alias(body)
        if alias:
            return replace(alias, position=place)
        kind, *rest = body.split(".")
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, 1, 0.4)
            hint = f"Did you mean {'.'.join([near[0], *rest])!r}? " if near else ""
            raise ValueError(f"{text!r} names no component. {hint}Kinds are: {', '.join(KINDS)}.")
        if kind == "feature":
            if len(rest) != 2:
                raise ValueError(f"{text!r}: a feature is written feature.NAME.77, NAME being the attached SAE.")
            return cls(kind, None, rest[1] if rest[1] == "error" else _number(rest[1], text), place, rest[0])
        numbers = [_number(part, text) for part in rest]
        wanted = (kind not in WITHOUT_LAYER) + (KINDS[kind][0] is not None)
        if len(numbers) > wanted:
            raise ValueError(f"{text!r} has too many numbers; write {_pattern(kind)!r}.")
        numbers += ["*"] * (wanted - len(numbers))
        layer = numbers.pop(0) if kind not in WITHOUT_LAYER else None
        return cls(kind, layer, numbers[0] if numbers else None, place)

    def __str__(self) -> str:
        parts = [self.kind, self.name, self.layer, self.index]
        body = ".".join(str(part) for part in parts if part is not None)
        return body if self.position is None else f"{body}@{self.position}"

    def __repr__(self) -> str:
        return str(self)

    def __lt__(self, other: Component) -> bool:
        return self._key() < other._key()

    def _key(self) -> tuple:
        """Forward order: by layer, then by place within the block, then by index and position."""
        layer = {None: 10**6, "*": -1}.get(self.layer, self.layer)
        if self.kind == "embed":
            layer = -2
        return (layer, RANK[self.kind], _sortable(self.index), _sortable(self.position), self.name or "")

    @property
    def canonical(self) -> Component:
        """The one address of this tensor: `resid_pre.5` is `resid_post.4`."""
        if self.kind == "resid_pre" and isinstance(self.layer, int) and self.layer > 0:
            return replace(self, kind="resid_post", layer=self.layer - 1)
        return self

    @property
    def is_family(self) -> bool:
        """Does it stand for several components (`z.*.*`)?"""
        return "*" in (self.layer, self.index)

    @property
    def site(self) -> tuple[str, int | str | None]:
        """The tensor it lives in: kind and layer, without index and position."""
        return (self.kind, self.layer)

    def at(self, position: int | str | None) -> Component:
        """The same component at another position (None for all)."""
        return replace(self, position=position)


def components(at) -> tuple[Component, ...]:
    """One component, its printed form, or a list of either, as a tuple of components."""
    if isinstance(at, (str, Component)):
        return (Component.parse(at),)
    if not isinstance(at, Iterable):
        raise TypeError(f"A component is written like 'z.4.2' or 'resid_post.3@-1', several as a list; got {at!r}.")
    found = tuple(Component.parse(one) for one in at)
    if not found:
        raise ValueError("No component was given. Name at least one, for example 'z.4.2' or 'resid_post.3@-1'.")
    return found


def _pattern(kind: str) -> str:
    layer = [] if kind in WITHOUT_LAYER else ["LAYER"]
    index = [] if KINDS[kind][0] is None else [KINDS[kind][0].upper()]
    return ".".join([kind, *layer, *index])


def _number(part: str, text: str) -> int | str:
    if part == "*":
        return part
    if not re.fullmatch(r"\d+", part):
        raise ValueError(f"{text!r}: {part!r} is no number. Write for example 'z.4.2', 'resid_post.3' or 'z.*.*'.")
    return int(part)


def _position(part: str, text: str) -> int | str:
    if re.fullmatch(r"-?\d+", part):
        return int(part)
    if not re.fullmatch(r"[A-Za-z_]\w*", part):
        raise ValueError(f"{text!r}: after @ comes a position (4, -1) or the name of a span (subject); got {part!r}.")
    return part


def _alias(body: str) -> Component | None:
    """TransformerLens hook names and L9H6."""
    if head := re.fullmatch(r"L(\d+)H(\d+)", body):
        return Component("z", int(head[1]), int(head[2]))
    if hook := re.fullmatch(r"blocks\.(\d+)\.(.+)", body):
        kind = TL_HOOKS.get(hook[2])
        if kind:
            return Component(kind, int(hook[1]), None if KINDS[kind][0] is None else "*")
    return {"hook_embed": Component("embed"), "ln_final.hook_normalized": Component("ln_final")}.get(body)


def _sortable(value) -> tuple:
    return (0, 0, "") if value is None else (1, value, "") if isinstance(value, int) else (2, 0, value)
