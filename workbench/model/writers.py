"""Who writes into the residual stream, and with which weights: out = scale * (rows of a matrix, summed, + bias)."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter

import torch

from workbench.component import Component
from workbench.intervention import Intervention
from workbench.operations import Add


@dataclass(frozen=True)
class Step:
    """One intervention at one component that a writer takes in."""

    component: Component
    one: Intervention
    which: int

    def shift(self, width: int) -> torch.Tensor:
        """What becomes of 0: the constant part, [width] in float64."""
        return self.one.change(torch.zeros(1, width, dtype=torch.float64), self.which)[0]

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """What becomes of x [..., width] besides the constant; every operation but Add in units of the norm is affine."""
        return x if isinstance(self.one, Add) else self.one.change(x, self.which) - self.shift(x.shape[-1])


@dataclass
class Writer:
    """Weights whose sum arrives at one place. Inputs are what the matrix is given (heads, neurons) or, of experts,
    weighted by; outputs what it gives.

    Attributes:
        path: the module's name in the Hugging Face model; module: itself.
        rows: names of the weights; extra: weights added beside them (positions), which take no constant.
        scale: what the module's output is multiplied by on its way to the stream; factor: and from there on to resid_pre.0.
        constants: whether a constant has somewhere to go: a bias that is there or can be added, or the rows themselves.
        norm: it is a norm, whose weight can scale each coordinate but not mix them.
    """

    path: str
    module: torch.nn.Module
    rows: tuple[str, ...]
    extra: tuple[str, ...] = ()
    scale: float = 1.0
    factor: float = 1.0
    inputs: list[tuple[slice, Step]] = field(default_factory=list)
    outputs: list[Step] = field(default_factory=list)

    @property
    def norm(self) -> bool:
        return self.module.weight.dim() == 1 if hasattr(self.module, "weight") else False

    @property
    def embeds(self) -> bool:
        return isinstance(self.module, torch.nn.Embedding)

    @property
    def bias(self) -> str:
        return f"{self.path}.bias"

    @property
    def constants(self) -> bool:
        has = getattr(self.module, "bias", None) is not None
        return has or self.embeds or isinstance(self.module, torch.nn.Linear)

    def frees(self, basis: torch.Tensor) -> bool:
        """Is nothing along these directions [width, k] ever written here, whatever the weights are?"""
        x = torch.randn(8, len(basis), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x[0] = 0
        for step in self.outputs:
            if not (self.extra and step.component.kind == "embed"):
                x = step.linear(x) + step.shift(x.shape[-1])
        return bool((x @ basis).abs().max() < 1e-6 * (1 + x.abs().max()))

    def new_weights(self, value) -> dict[str, torch.Tensor]:
        """The weights after all steps. Steps on inputs are taken from the last to the first, for x goes through the first
        one first: (x A + a) W + b = x (A W) + (a W + b).

        Args:
            value: name -> the present weight, or None for a bias that is not there.
        """
        old = [value(name) for name in (*self.rows, *self.extra)]
        offset = 1.0 if self.norm and "Gemma" in type(self.module).__name__ else 0.0  # Gemma stores what is added to 1
        rows = [self._turn(one.double()) + offset for one in old]
        shift = None if self.embeds else value(self.bias)
        bias = torch.zeros(rows[0].shape[-1], dtype=torch.float64) if shift is None else shift.double().cpu()
        bias = bias.to(rows[0].device)
        for part, step in reversed(self.inputs):
            block = rows[0][part].flatten(1)  # an expert's whole matrix is one row: its weight is one number
            size = len(block)
            if (constant := step.shift(size).to(block)).any():
                bias = bias + constant @ block
            rows[0][part] = (step.linear(torch.eye(size, dtype=torch.float64)).to(block) @ block).view_as(rows[0][part])
        for step in self.outputs:
            scale = self.scale * (self.factor if step.component.kind == "resid_pre" else 1.0)
            constant = step.shift(len(bias)).to(bias) / scale
            bias = step.linear(bias) + constant
            for i, one in enumerate(rows):
                if i < len(self.rows) or step.component.kind != "embed":
                    rows[i] = step.linear(one)
        found = {}
        if self.embeds:
            rows[0], bias = rows[0] + bias, torch.zeros_like(bias)
        for name, one, was in zip((*self.rows, *self.extra), rows, old, strict=True):
            found[name] = self._turn(one - offset).to(was).contiguous()
        if not self.embeds and (shift is not None or bias.any()):
            found[self.bias] = bias.to(old[0])
        return found

    def _turn(self, weight: torch.Tensor) -> torch.Tensor:
        """Between a weight as it is stored and rows [..., input, width]; the same both ways. Linear and fused experts
        [expert, width, input] keep the transpose."""
        stored_turned = isinstance(self.module, torch.nn.Linear) or weight.dim() == 3
        return weight.transpose(-1, -2) if stored_turned else weight


def writers_of(model) -> dict[tuple[str, int | None], Writer]:
    """(kind, layer) -> what writes at attn_out and mlp_out, and what z, neuron, expert and ln_final are multiplied with.

    Where no norm stands between, ("z", l) and ("attn_out", l) are one writer. A mixture has no ("neuron", l), and one in
    which something besides the experts writes, no ("mlp_out", l).
    """
    names, row, found = model.names, model.names.row, {}
    paths = {id(module): path for path, module in model.hf.named_modules()}

    def writer(module, scale=1.0):
        return Writer(paths[id(module)], module, (f"{paths[id(module)]}.weight",), scale=scale)

    for layer, block in enumerate(attrgetter(row.layers)(model.hf)):
        for kind, out, path, add in (
            ("z", "attn_out", row.heads, row.attn_add),
            ("neuron", "mlp_out", row.neurons, row.mlp_add),
        ):
            last = attrgetter(add)(block)
            norm = isinstance(getattr(last, "weight", None), torch.Tensor) and last.weight.dim() == 1
            if path is not None:
                found[kind, layer] = writer(attrgetter(path)(block), 1.0 if norm else names.scale)
            if norm:
                found[out, layer] = writer(last, names.scale)
            elif path is not None:
                found[out, layer] = found[kind, layer]
        if layer in names.experts:
            experts = attrgetter(names.experts[layer][0])(block)
            if not hasattr(experts, "down_proj_bias") and not getattr(experts, "is_transposed", False):
                path = paths[id(experts)]
                found["expert", layer] = Writer(path, experts, (f"{path}.down_proj",), scale=names.scale)
                beside = dict(last.named_children()).keys() - {"experts", "gate", "router"}
                if (out, layer) not in found and not beside:
                    found[out, layer] = found["expert", layer]
    head = model.hf.get_output_embeddings()
    if head is not None:
        found["ln_final", None] = writer(head)
    return found | _beginning(model, writer)


def _beginning(model, writer) -> dict[tuple[str, int | None], Writer]:
    """What writes `embed` and resid_pre.0, found out on the running model: token embedding (times a factor), perhaps plus
    a position embedding; or a norm of the token embedding. No ("resid_pre", 0) where it is something else."""
    names, hf = model.names, model.hf
    table = attrgetter(names.row.embed)(hf)
    embed = writer(table, float(getattr(table, "embed_scale", 1.0)))
    found = {("embed", None): embed}
    ids = torch.arange(12).mul(7).remainder(hf.config.vocab_size).view(2, 6)
    e, r = model.trace(model.inputs(ids), lambda: _read_beginning(names))
    tolerance = max(1e-3, 4 * torch.finfo(r.dtype).eps)
    inside = {id(m) for m in attrgetter(names.row.layers)(hf).modules()} | {id(attrgetter(names.row.ln_final)(hf))}
    outside = [m for m in hf.modules() if id(m) not in inside and m is not table]
    norms = [m for m in outside if isinstance(m, torch.nn.LayerNorm)]
    if len(norms) == 1 and torch.allclose(norms[0](e).double(), r.double(), tolerance, tolerance):
        return found | {("resid_pre", 0): writer(norms[0])}
    if e.shape != r.shape or norms:
        return found
    e, r = e.double(), r.double()
    factor = ((r[0] - r[1]) * (e[0] - e[1])).sum() / (e[0] - e[1]).square().sum()
    rest, small = r - factor * e, tolerance * r.abs().max()
    places = [m for m in outside if isinstance(m, torch.nn.Embedding) and m.weight.shape[1] == names.d_model]
    if rest.abs().max() > small:  # something besides the token: the same for every token, so a position
        if (rest[0] - rest[1]).abs().max() > small or len(places) != 1:
            return found
        embed.extra = writer(places[0]).rows
    embed.factor = factor.item()
    return found | {("resid_pre", 0): embed}


def _read_beginning(names) -> tuple[torch.Tensor, torch.Tensor]:
    e = names.place("embed", None, 2).get().clone()
    return e, names.place("resid_pre", 0, 2).get().clone()
