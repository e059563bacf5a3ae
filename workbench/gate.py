"""When: a gate says for which prompts an intervention acts (conditional activation steering)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from workbench.component import Component

KINDS = ("embed", "resid_pre", "z", "attn_out", "resid_mid", "neuron", "mlp_out", "resid_post")
SIDES, BY = ("above", "below"), ("dot", "cosine")


@dataclass(frozen=True, eq=False)
class Gate:
    """For which prompts does an intervention act? For those whose activation at one place lies on one side of a threshold.

    It is read once for each prompt, during the pass over the prompt and before any other change of the same tensor, and
    holds for all tokens generated after it. Each row of a batch has its own answer.

    Args:
        at: where it is read, one component with a position of the prompt ("resid_post.3@-1", "resid_post.3@verb"; a span
            is averaged), without a position averaged over the prompt. Not later in the pass than what it gates, except
            for changes of generated tokens alone.
        direction: [width] (a number for a neuron).
        threshold: open where the reading is at least this ("above") or less than this ("below").
        by: "dot" reads the component along the direction of length 1, "cosine" divides that by the activation's length.
    Source:
        Lee et al. 2025, "Programming refusal with conditional activation steering" (CAST), row by row; the authors' code
        keeps one answer for a whole batch, and reads the cosine with the projection onto the direction.
    """

    at: Component
    direction: torch.Tensor
    threshold: float = 0.0
    side: str = "above"
    by: str = "dot"

    def __post_init__(self) -> None:
        at = Component.parse(self.at)
        object.__setattr__(self, "at", at)
        if at.kind not in KINDS or at.is_family:
            raise ValueError(f"A gate reads one component, such as 'resid_post.3@-1', of kind {', '.join(KINDS)}; got {at}. For a "
                             "feature give the place its SAE reads and its encoder column as the direction.")  # fmt: skip
        direction = torch.atleast_1d(torch.as_tensor(self.direction).detach().clone().float())
        if direction.dim() != 1 or not torch.isfinite(direction).all() or not direction.norm() > 0:
            raise ValueError(f"A gate needs a direction [width] that is finite and not zero; got shape "
                             f"{list(direction.shape)}, norm {direction.norm():g}.")  # fmt: skip
        object.__setattr__(self, "direction", direction)
        object.__setattr__(self, "threshold", float(self.threshold))
        if not abs(self.threshold) < float("inf"):
            raise ValueError(f"threshold={self.threshold}: give a finite number.")
        for name, allowed in (("side", SIDES), ("by", BY)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose {' or '.join(map(repr, allowed))}."
                )

    def reading(self, x: torch.Tensor) -> torch.Tensor:
        """What is compared with the threshold, [row], from activations [row, width]."""
        if x.shape[-1] != len(self.direction):
            raise ValueError(
                f"The gate's direction is {len(self.direction)} wide, but {self.at} is {x.shape[-1]} wide."
            )
        x, unit = x.float(), (self.direction / self.direction.norm()).to(x.device)
        dot = (x * unit).sum(-1)  # not a matrix product, whose rounding depends on the rows beside it
        return dot if self.by == "dot" else dot / x.norm(dim=-1).clamp(min=1e-12)

    def open(self, x: torch.Tensor) -> torch.Tensor:
        """For which rows does it let the intervention act? [row], bool, from activations [row, width]."""
        reading = self.reading(x)
        return reading >= self.threshold if self.side == "above" else reading < self.threshold

    def __invert__(self) -> Gate:
        """Open exactly where this one is closed."""
        return replace(self, side=SIDES[1 - SIDES.index(self.side)])

    def before(self, component: Component) -> bool:
        """Is it read in time to decide about this component in the same pass? A family counts from its first layer."""
        own, other = (replace(c.canonical, index=None, position=None) for c in (self.at, component))
        other = replace(other, layer=0) if other.layer == "*" else other
        return other.kind == "feature" or not other < own or _place(own) == _place(other)

    def __eq__(self, other) -> bool:
        if not isinstance(other, Gate):
            return NotImplemented
        return self._plain == other._plain and torch.equal(self.direction, other.direction)

    __hash__ = None

    def __repr__(self) -> str:
        return f"Gate({str(self.at)!r}, <{len(self.direction)} tensor>, {self.threshold:g}, {self.side!r}, {self.by!r})"

    @property
    def _plain(self) -> tuple:
        return str(self.at), self.threshold, self.side, self.by

    def to_dict(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """Plain settings for JSON, and the tensors by name."""
        return dict(zip(("at", "threshold", "side", "by"), self._plain, strict=True)), {"direction": self.direction}


def _place(one: Component) -> tuple:
    """The tensor it lives in: resid_mid is reached through attn_out."""
    return ("attn_out" if one.kind == "resid_mid" else one.kind), one.layer
