"""What to do: activations set, scaled, pushed, projected or mapped, and weights changed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from workbench.component import SINGLE, Component
from workbench.intervention import Intervention


@dataclass(frozen=True, eq=False, repr=False)
class Zero(Intervention):
    """What happens without this component? Its activation becomes 0 (zero ablation; off the data's distribution).

    Of an expert the activation is its routing weight, so what it adds to the FFN's output is gone; the other experts keep
    their weights, which are not made to sum to 1 again. Of a router it makes all logits equal: the choice is then a tie.
    """

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return torch.zeros_like(x)

    def changes(self, x: torch.Tensor, which: list[int]) -> torch.Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False, repr=False)
class Replace(Intervention):
    """What happens with these activations instead? `values` is [width] or [len(at), width] (a number each for neurons,
    features and experts)."""

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
        """One row of values per component; for neurons, features and experts, whose values are numbers, one."""
        return self.values.dim() == 2 or (self.values.dim() == 1 and self.at[0].kind in SINGLE)

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        value = self.values[which] if self._one_each else self.values
        return _fit(value, x, self.at[which]).expand_as(x).clone()

    def changes(self, x: torch.Tensor, which: list[int]) -> torch.Tensor:
        value = self.values[which] if self._one_each else self.values
        value = value[:, None].expand(-1, x.shape[-1]) if self._one_each and value.dim() == 1 else value
        return _fit(value, x, self.at[which[0]]).expand_as(x).clone()


@dataclass(frozen=True, eq=False, repr=False)
class Mean(Replace):
    """What happens at the average? Like `Replace`, with `values` being mean activations over matched prompts."""


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Intervention):
    """What happens with more or less of it? The activation times `factor`; 1 changes nothing, 0 is `Zero`.

    Args:
        factor: one number, or one for each component of `at`.
    """

    factor: float | tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if hasattr(self.factor, "__len__"):
            object.__setattr__(self, "factor", tuple(map(float, self.factor)))
            if len(self.factor) != len(self.at):
                raise ValueError(f"Scale: {len(self.at)} components but {len(self.factor)} factors.")

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return x * (self.factor[which] if isinstance(self.factor, tuple) else self.factor)

    def changes(self, x: torch.Tensor, which: list[int]) -> torch.Tensor:
        if not isinstance(self.factor, tuple):
            return x * self.factor
        factors, exact = [self.factor[one] for one in which], torch.promote_types(x.dtype, torch.float32)
        return (x * torch.tensor(factors, dtype=exact, device=x.device)[:, None]).to(x.dtype)

    @property
    def does_nothing(self) -> bool:
        return set(self.factor) == {1.0} if isinstance(self.factor, tuple) else self.factor == 1


@dataclass(frozen=True, eq=False, repr=False)
class Clamp(Intervention):
    """What happens when a neuron, a feature or an expert's routing weight is held at `value`?"""

    value: float

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return torch.full_like(x, self.value)

    def changes(self, x: torch.Tensor, which: list[int]) -> torch.Tensor:
        return torch.full_like(x, self.value)


@dataclass(frozen=True, eq=False, repr=False)
class Add(Intervention):
    """What happens when the stream is pushed along a direction?

    Args:
        vector: [width]. At "router.1" [n_experts] steers the choice; at "expert.1.2" [1] acts also where it was not chosen.
        strength: how far. `2 * a`, `-a` return the same vector at another strength; 0 changes nothing, bit for bit.
        unit: "raw" adds strength * vector; "norm" adds strength * |x| * vector/|vector|, the strength being in
            units of the local norm |x| at each token; "angle" turns x by `strength` degrees towards the vector (as far
            as it at most) without changing its length.
    """

    vector: torch.Tensor
    strength: float = 1.0
    unit: str = "raw"
    tensors: ClassVar[tuple[str, ...]] = ("vector",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit not in ("raw", "norm", "angle"):
            raise ValueError(
                f"unit={self.unit!r} is unknown; choose 'raw', 'norm' (units of the local norm) or 'angle' (degrees)."
            )
        if self.vector.dim() != 1:
            raise ValueError(f"Add takes one vector [width]; got shape {list(self.vector.shape)}.")
        if self.unit != "raw" and not self.vector.norm() > 0:
            raise ValueError("Add in units of the norm or of an angle needs a direction; this vector is zero.")

    def change(self, x: torch.Tensor, which: int) -> torch.Tensor:
        vector = _fit(self.vector, x, self.at[which])
        if self.unit == "raw":
            return x + self.strength * vector
        if self.unit == "angle":
            return _turned(x, vector, math.radians(self.strength))
        return x + self.strength * x.norm(dim=-1, keepdim=True) * vector / vector.norm()

    @property
    def does_nothing(self) -> bool:
        return self.strength == 0

    def __mul__(self, factor: float) -> Add:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return self._but(strength=self.strength * factor)


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


@dataclass(frozen=True, eq=False, repr=False)
class Delta(Intervention):
    """What happens with other weights? Each named weight becomes itself + strength * its difference.

    Args:
        weights: differences by parameter name as in `model.hf.named_parameters()`, such as
            "model.layers.5.mlp.down_proj.weight", each of the shape of its parameter. A difference of low rank may be
            given as two factors, "NAME.left" [out, rank] and "NAME.right" [rank, in], whose product it is.
        strength: `2 * d` and `-d` are the same difference at another strength; 0 changes nothing, bit for bit.
    """

    at: tuple[Component, ...] = ()
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.at or self.phase not in (None, "both") or self.gate is not None:
            raise ValueError(
                "A Delta changes weights for every token and prompt: it takes no place, no phase and no gate."
            )
        if not self.weights:
            raise ValueError("A Delta needs at least one weight: wb.Delta(weights={name: difference}).")
        object.__setattr__(self, "phase", "both")
        kept = {}
        for name, tensor in self.weights.items():
            tensor = torch.as_tensor(tensor).detach().cpu().clone()
            if not torch.isfinite(tensor).all():
                raise ValueError(f"Delta: the difference of {name} holds NaN or infinite numbers.")
            kept[name] = tensor if tensor.is_floating_point() else tensor.float()
        for name in kept:
            stem, _, side = name.rpartition(".")
            if side in ("left", "right") and not {f"{stem}.left", f"{stem}.right"} <= set(kept):
                raise ValueError(f"Delta: {name} is one factor of two; give {stem}.left and {stem}.right.")
        object.__setattr__(self, "weights", kept)

    def __getstate__(self) -> dict:
        """Everything but the tuning controls, which hold a model."""
        return {name: value for name, value in self.__dict__.items() if name != "controls"}

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters it changes."""
        return tuple(dict.fromkeys(name.removesuffix(".left").removesuffix(".right") for name in self.weights))

    def difference(self, name: str) -> torch.Tensor:
        """What is added to a parameter at the present strength, in float32."""
        if name in self.weights:
            return self.strength * self.weights[name].float()
        return self.strength * (self.weights[f"{name}.left"].float() @ self.weights[f"{name}.right"].float())

    @property
    def does_nothing(self) -> bool:
        return self.strength == 0

    def __mul__(self, factor: float) -> Delta:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return replace(self, strength=self.strength * factor)

    def __eq__(self, other) -> bool:
        if not isinstance(other, Delta):
            return NotImplemented
        return (self.strength, set(self.weights)) == (other.strength, set(other.weights)) and all(
            torch.equal(value, other.weights[name]) for name, value in self.weights.items()
        )

    __hash__ = None

    def __repr__(self) -> str:
        norm = sum(self.difference(name).square().sum() for name in self.names) ** 0.5
        return f"Delta(<{len(self.names)} weights, norm {norm:.3g}>, strength={self.strength:g})"

    def to_dict(self) -> tuple[dict, dict[str, torch.Tensor]]:
        return {"op": "Delta", "strength": self.strength}, dict(self.weights)

    @classmethod
    def _restored(cls, plain: dict, tensors: dict[str, torch.Tensor]) -> Delta:
        return cls(**plain, weights=tensors)


def _fit(value: torch.Tensor, x: torch.Tensor, at: Component) -> torch.Tensor:
    if value.dim() and value.shape[-1] != x.shape[-1]:
        raise ValueError(f"{at} is {x.shape[-1]} numbers wide, but the given tensor is {value.shape[-1]} wide.")
    return value.to(x)


def _turned(x: torch.Tensor, vector: torch.Tensor, angle: float) -> torch.Tensor:
    """x turned towards the vector (away from it for a negative angle) in the plane of both, at most until they agree."""
    size = x.norm(dim=-1, keepdim=True)
    unit, goal = x / size.clamp(min=1e-12), math.copysign(1, angle) * vector / vector.norm()
    cos = (unit * goal).sum(-1, keepdim=True).clamp(-1, 1)
    side = goal - cos * unit
    side = side / side.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    turn = torch.acos(cos).clamp(max=abs(angle))
    return size * (turn.cos() * unit + turn.sin() * side)
