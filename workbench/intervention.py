"""What every intervention is: a value with a place, a phase and a gate, built by hand or returned by `steer.*`.

Each says where (`at`), what (the class, in `operations.py` and `attend.py`) and when (`phase`). A position in an address is a place in the prompt, so
an intervention with one acts on the prompt only; without one it acts on the prompt and on every generated token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch

from workbench.component import Component, components
from workbench.gate import Gate

PHASES = ("prompt", "generation", "both")
APART = ("at", "phase", "gate")  # what every intervention has, said first and last
OPERATIONS: dict[str, type[Intervention]] = {}  # by the name that files have for them; each class enters itself


@dataclass(frozen=True, eq=False, kw_only=True)
class Intervention:
    """A change of activations, or of weights (`Delta`). Build one of Zero, Mean, Replace, Scale, Clamp, Add, ProjectOut,
    Affine, Attend, Window, Delta.

    Attributes:
        at: a component, such as "expert.1.2", a family ("z.4.*") or a list; kept as components. Empty for a `Delta`.
        phase: "prompt" (prompt tokens), "generation" (every generated token, no prompt token) or "both".
        gate: for which prompts it acts, a `Gate`; None for all.
    """

    at: tuple[Component, ...] = field(kw_only=False)
    phase: str | None = None
    gate: Gate | None = None
    tensors: ClassVar[tuple[str, ...]] = ()
    grows: ClassVar[bool] = False  # whether it can change attention whose keys become more with every generated token

    def __init_subclass__(cls, **settings) -> None:
        super().__init_subclass__(**settings)
        OPERATIONS[cls.__name__] = cls

    def __post_init__(self) -> None:
        at = components(self.at)
        object.__setattr__(self, "at", at)
        placed = [one for one in at if one.position is not None]
        phase = self.phase or ("prompt" if placed else "both")
        if phase not in PHASES:
            raise ValueError(f"phase={self.phase!r} is unknown; choose one of {', '.join(map(repr, PHASES))}.")
        if placed and phase != "prompt":
            raise ValueError(
                f"{placed[0]} names a prompt position, so it cannot act in phase {phase!r}. "
                f"Write {placed[0].at(None)} to act on every token, or phase='prompt'."
            )
        object.__setattr__(self, "phase", phase)
        if not isinstance(self.gate, (Gate, type(None))):
            raise TypeError(f"gate= takes a wb.Gate(at, direction, threshold); got {self.gate!r}.")
        late = [one for one in at if self.gate is not None and phase != "generation" and not self.gate.before(one)]
        if late:
            raise ValueError(f"{self.gate.at} is read after {late[0]} has gone by, so it cannot gate it. Read the gate at the same "
                             "place or earlier in the pass, or act on generated tokens only: phase='generation'.")  # fmt: skip
        for name in self.tensors:
            tensor = torch.as_tensor(getattr(self, name)).detach().clone()
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{type(self).__name__}: {name} holds NaN or infinite numbers.")
            object.__setattr__(self, name, tensor if tensor.is_floating_point() else tensor.float())

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        """The new activations for `at[which]`, from the present ones [..., width]. Never changes `x` in place."""
        raise NotImplementedError

    def changes(self, x: torch.Tensor, which: list[int]) -> torch.Tensor:
        """As `change`, for several components of one kind at once: `x` is [..., component, width]."""
        return torch.stack([self.change(x[..., i, :], one) for i, one in enumerate(which)], -2)

    @property
    def does_nothing(self) -> bool:
        return False

    def moved(self, at, phase: str | None = None) -> Intervention:
        """The same change somewhere else."""
        return self._but(at=at, phase=phase)

    def on(self, prompts) -> Intervention:
        """The same change, knowing the prompts of the batch that it is about to meet."""
        return self

    def after(self, step: int) -> Intervention:
        """The same change, knowing how many tokens were generated before this pass."""
        return self

    def gated(self, gate: Gate | None) -> Intervention:
        """The same change for the prompts that this gate lets through, in place of the gate it had; None takes a gate off."""
        return self._but(gate=gate)

    def _but(self, **settings) -> Intervention:
        """A copy with other settings. What a vector was fitted on goes along, for its control with shuffled labels."""
        made = replace(self, **settings)
        if hasattr(self, "fitted_on"):
            object.__setattr__(made, "fitted_on", self.fitted_on)
        return made

    def __neg__(self) -> Intervention:
        return self * -1

    def __mul__(self, factor: float) -> Intervention:
        raise TypeError(
            f"{type(self).__name__} has no strength to multiply. Only Add has: write 2 * wb.Add(...), "
            "or use wb.Scale(at, factor) to scale an activation."
        )

    def __rmul__(self, factor: float) -> Intervention:
        return self * factor

    def __eq__(self, other) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None

    def __repr__(self) -> str:
        at = str(self.at[0]) if len(self.at) == 1 else [str(one) for one in self.at]
        values = [f"{f.name}={_brief(getattr(self, f.name))}" for f in fields(self) if f.name not in APART]
        gate = [] if self.gate is None else [f"gate={self.gate!r}"]
        return f"{type(self).__name__}({', '.join([f'at={at!r}', *values, f'phase={self.phase!r}', *gate])})"

    def to_dict(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """Plain settings for JSON, and the tensors by name."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*self.tensors, "at", "gate")}
        tensors = {name: getattr(self, name) for name in self.tensors}
        if self.gate is not None:
            plain["gate"], own = self.gate.to_dict()
            tensors |= {f"gate.{name}": tensor for name, tensor in own.items()}
        return {"op": type(self).__name__, "at": [str(one) for one in self.at], **plain}, tensors

    @staticmethod
    def from_dict(plain: dict, tensors: dict[str, torch.Tensor]) -> Intervention:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for an operation this version does not know.
        """
        plain = dict(plain)
        op = OPERATIONS.get(plain.pop("op", None))
        if op is None:
            raise ValueError(f"Unknown operation in this recipe; this version knows {', '.join(OPERATIONS)}.")
        return op._restored(plain, tensors)

    @classmethod
    def _restored(cls, plain: dict, tensors: dict[str, torch.Tensor]) -> Intervention:
        own = {name.removeprefix("gate."): tensor for name, tensor in tensors.items() if name.startswith("gate.")}
        gate = Gate(**plain.pop("gate"), **own) if own else None
        return cls(**plain, **{name: t for name, t in tensors.items() if not name.startswith("gate.")}, gate=gate)


def _same(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a == b)


def _brief(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"<{'x'.join(map(str, value.shape)) or 'scalar'} tensor, norm {value.norm():.3g}>"
    if isinstance(value, tuple) and len(value) > 4:
        return f"<{len(value)} numbers>"
    return f"{value:g}" if isinstance(value, float) else repr(value)
