"""What to do there: interventions are values, built by hand or returned by `steer.*`.

Each says where (`at`), what (the class) and when (`phase`). A position in an address is a place in the prompt, so
an intervention with one acts on the prompt only; without one it acts on the prompt and on every generated token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch

from workbench.component import Component, components

PHASES = ("prompt", "generation", "both")


@dataclass(frozen=True, eq=False, kw_only=True)
class Intervention:
    """A change of activations. Build one of Zero, Mean, Replace, Scale, Clamp, Add, ProjectOut, Affine.

    Attributes:
        at: a component, its printed form, or a list of them; kept as a tuple of components.
        phase: "prompt" (prompt tokens), "generation" (every generated token, no prompt token) or "both".
    """

    at: tuple[Component, ...] = field(kw_only=False)
    phase: str | None = None
    tensors: ClassVar[tuple[str, ...]] = ()

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
        for name in self.tensors:
            tensor = torch.as_tensor(getattr(self, name)).detach().clone()
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{type(self).__name__}: {name} holds NaN or infinite numbers.")
            object.__setattr__(self, name, tensor if tensor.is_floating_point() else tensor.float())

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        """The new activations for `at[which]`, from the present ones [..., width]. Never changes `x` in place."""
        raise NotImplementedError

    @property
    def does_nothing(self) -> bool:
        return False

    def moved(self, at, phase: str | None = None) -> Intervention:
        """The same change somewhere else."""
        return replace(self, at=at, phase=phase)

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
        values = [f"{f.name}={_brief(getattr(self, f.name))}" for f in fields(self) if f.name not in ("at", "phase")]
        return f"{type(self).__name__}({', '.join([f'at={at!r}', *values, f'phase={self.phase!r}'])})"

    def to_dict(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """Plain settings for JSON, and the tensors by name."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*self.tensors, "at")}
        return {"op": type(self).__name__, "at": [str(one) for one in self.at], **plain}, {
            name: getattr(self, name) for name in self.tensors
        }

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
        return op(**plain, **tensors)


@dataclass(frozen=True, eq=False, repr=False)
class Zero(Intervention):
    """What happens without this component? Its activation becomes 0 (zero ablation; off the data's distribution)."""

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False, repr=False)
class Replace(Intervention):
    """What happens with these activations instead? `values` is [width] or [len(at), width] (a number for neurons)."""

    values: torch.Tensor
    tensors: ClassVar[tuple[str, ...]] = ("values",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._one_each and self.values.shape[0] != len(self.at):
            raise ValueError(f"{type(self).__name__}: {len(self.at)} components but {self.values.shape[0]} values.")
        if self.values.dim() > 2:
            raise ValueError(f"{type(self).__name__} takes values [width] or [len(at), width]; got shape "
                             f"{list(self.values.shape)}.")  # fmt: skip

    @property
    def _one_each(self) -> bool:
        """One row of values per component; for neurons, whose values are numbers, one number."""
        return self.values.dim() == 2 or (self.values.dim() == 1 and self.at[0].kind == "neuron")

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        value = self.values[which] if self._one_each else self.values
        return _fit(value, x, self.at[which]).expand_as(x).clone()


@dataclass(frozen=True, eq=False, repr=False)
class Mean(Replace):
    """What happens at the average? Like `Replace`, with `values` being mean activations over matched prompts."""


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Intervention):
    """What happens with more or less of it? The activation times `factor`; 1 changes nothing, 0 is `Zero`."""

    factor: float

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return x * self.factor

    @property
    def does_nothing(self) -> bool:
        return self.factor == 1


@dataclass(frozen=True, eq=False, repr=False)
class Clamp(Intervention):
    """What happens when a neuron or feature is held at `value`?"""

    value: float

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return torch.full_like(x, self.value)


@dataclass(frozen=True, eq=False, repr=False)
class Add(Intervention):
    """What happens when the stream is pushed along a direction?

    Args:
        vector: [width].
        strength: how far. `2 * a`, `-a` return the same vector at another strength; 0 changes nothing, bit for bit.
        unit: "raw" adds strength * vector; "norm" adds strength * |x| * vector/|vector|, the strength being in
            units of the local norm |x| at each token.
    """

    vector: torch.Tensor
    strength: float = 1.0
    unit: str = "raw"
    tensors: ClassVar[tuple[str, ...]] = ("vector",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit not in ("raw", "norm"):
            raise ValueError(f"unit={self.unit!r} is unknown; choose 'raw' or 'norm' (units of the local norm).")
        if self.vector.dim() != 1:
            raise ValueError(f"Add takes one vector [width]; got shape {list(self.vector.shape)}.")
        if self.unit == "norm" and not self.vector.norm() > 0:
            raise ValueError("Add in units of the norm needs a direction; this vector is zero.")

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        vector = _fit(self.vector, x, self.at[which])
        if self.unit == "raw":
            return x + self.strength * vector
        return x + self.strength * x.norm(dim=-1, keepdim=True) * vector / vector.norm()

    @property
    def does_nothing(self) -> bool:
        return self.strength == 0

    def __mul__(self, factor: float) -> Add:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return replace(self, strength=self.strength * factor)


@dataclass(frozen=True, eq=False, repr=False)
class ProjectOut(Intervention):
    """What happens when a direction cannot be written? x - r r^T x (directional ablation, Arditi et al. 2024, eq. 4).

    Args:
        direction: [width] or several as [k, width]; made orthonormal.
    """

    direction: torch.Tensor
    tensors: ClassVar[tuple[str, ...]] = ("direction",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.direction.dim() > 2 or not self.direction.norm() > 0:
            raise ValueError("ProjectOut takes a direction [width] or [k, width] that is not zero.")
        left, size, _ = torch.linalg.svd(torch.atleast_2d(self.direction).double().T, full_matrices=False)
        object.__setattr__(self, "_basis", left[:, size > 1e-6 * size[0]])

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        basis = self._basis.to(x)
        _fit(basis[:, 0], x, self.at[which])
        return x - (x @ basis) @ basis.T


@dataclass(frozen=True, eq=False, repr=False)
class Affine(Intervention):
    """What happens when the activation goes through a linear map? x -> A x + b, for example the eraser of a concept.

    Args:
        matrix: A [width, width], or one for each component as [len(at), width, width].
        bias: b [width] or [len(at), width].
    """

    matrix: torch.Tensor
    bias: torch.Tensor
    tensors: ClassVar[tuple[str, ...]] = ("matrix", "bias")

    def __post_init__(self) -> None:
        super().__post_init__()
        for value, dims, shape in ((self.matrix, 2, "[width, width]"), (self.bias, 1, "[width]")):
            if value.dim() not in (dims, dims + 1) or value.shape[-1] != self.matrix.shape[-2]:
                raise ValueError(f"Affine takes a matrix [width, width] and a bias [width], or one of each per component; got "
                                 f"shape {list(value.shape)} where {shape} belongs.")  # fmt: skip
            if value.dim() > dims and len(value) != len(self.at):
                raise ValueError(f"Affine: {len(self.at)} components but {len(value)} of {shape}.")

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        matrix = self.matrix if self.matrix.dim() == 2 else self.matrix[which]
        bias = self.bias if self.bias.dim() == 1 else self.bias[which]
        return x @ _fit(matrix, x, self.at[which]).T + _fit(bias, x, self.at[which])


OPERATIONS = {op.__name__: op for op in (Zero, Mean, Replace, Scale, Clamp, Add, ProjectOut, Affine)}


def _fit(value: torch.Tensor, x: torch.Tensor, at: Component) -> torch.Tensor:
    if value.dim() and value.shape[-1] != x.shape[-1]:
        raise ValueError(f"{at} is {x.shape[-1]} numbers wide, but the given tensor is {value.shape[-1]} wide.")
    return value.to(x)


def _same(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a == b)


def _brief(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"<{'x'.join(map(str, value.shape)) or 'scalar'} tensor, norm {value.norm():.3g}>"
    return f"{value:g}" if isinstance(value, float) else repr(value)
