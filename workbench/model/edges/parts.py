"""Which edges a model has, the weights between its stream and its heads, and an ordinary run taken apart into writes."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import torch

from workbench.component import Component
from workbench.model.names import Names
from workbench.model.plan import Prompts
from workbench.model.run import Model
from workbench.model.weights import columns, projection

FLOATS = 2**25  # what one tensor of a run may hold (128 MiB in float32): decides how many rows share a call


def sources(n_layers: int, n_heads: int) -> list[Component]:
    """What writes to the stream, in forward order: embed, then per layer its heads and its FFN."""
    found = [Component("embed")]
    for layer in range(n_layers):
        found += [Component("z", layer, head) for head in range(n_heads)] + [Component("mlp_out", layer)]
    return found


def targets(n_layers: int, n_heads: int, n_kv_heads: int) -> list[Component]:
    """What reads from the stream, in forward order: per layer the queries, keys and values, the FFN; then the logits."""
    found = []
    for layer in range(n_layers):
        found += [Component("q", layer, head) for head in range(n_heads)]
        found += [Component(kind, layer, head) for kind in "kv" for head in range(n_kv_heads)]
        found.append(Component("mlp_out", layer))
    return [*found, Component("logits")]


class Norm:
    """A LayerNorm or RMSNorm as numbers: scale * (x - mean) / sqrt(variance + eps) + shift, the mean only if it centres.

    The numbers are found by asking the module, so that no family's spelling matters, and then proved on random input.
    """

    def __init__(self, module, width: int, like: torch.Tensor):
        self.scale, self.shift, self.centres, self.eps = (
            torch.ones(width).to(like),
            torch.zeros(width).to(like),
            False,
            None,
        )
        if module is None:  # attention reads the bare stream
            return
        sign = (1 - 2 * (torch.arange(width) % 2)).to(like)  # mean 0 and mean square 1
        self.shift = module(torch.zeros_like(sign))
        self.scale = (module(1e4 * sign) - self.shift) * sign
        self.centres = bool((module(torch.ones_like(sign)) - self.shift).abs().max() < 1e-2 * self.scale.abs().max())
        self.eps = getattr(module, "variance_epsilon", getattr(module, "eps", 0.0))
        x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(like)
        off = (self.normal(x)[0] * self.scale + self.shift - module(x)).abs().max()
        if not off < max(1e-3, 4 * torch.finfo(like.dtype).eps) * module(x).abs().max():  # bf16 keeps two digits
            raise ValueError(
                "Edges are not offered here: the norm before attention is neither a LayerNorm nor an RMSNorm."
            )

    def normal(self, x: torch.Tensor):
        """(x after centring and division, 1 / what it was divided by [..., 1])."""
        x = x - x.mean(-1, keepdim=True) if self.centres else x
        over = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * over, over

    def project(self, x: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
        """The norm of each target's stream, projected: x [target or 1, row, position, d_model], weights [target, d_model,
        d_head] -> [target, row, position, d_head]. Divided after the projection, where tensors are small."""
        over, shape = None, x.shape[1:-1]
        if self.eps is not None:
            x = x - x.mean(-1, keepdim=True) if self.centres else x
            over = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
            biases = biases + torch.einsum("d,tde->te", self.shift, weights)
            weights = weights * self.scale[:, None]
        out = (x.flatten(1, 2) @ weights).unflatten(1, shape)
        return (out if over is None else out * over) + biases[:, None, None]


class Wiring:
    """The sources and targets of a model, which edges there are, and the weights between stream and heads.

    Attributes:
        exists: [target, source]. reads: per layer, the targets of attention as a slice. known: per target, how many
            sources come before it.
    """

    def __init__(self, model: Model):
        names = model.names
        for kind in ("attn_out", "mlp_out", "ln_final"):
            if kind in names.refused:
                raise ValueError(f"Edges are not offered here: {names.refused[kind]}")
        if names.row.norm_attn is not None and names.row.norm_attn == names.row.norm_mlp:
            raise ValueError("Edges are not offered here: attention and FFN read the stream through one norm, so their inputs cannot be set "
                             "apart. For nodes use wb.locate.causal.patch.")  # fmt: skip
        self.sizes = names.n_layers, names.n_heads, names.n_kv_heads
        self.sources, self.targets = sources(*self.sizes[:2]), targets(*self.sizes)
        width, per = names.n_heads + 1, names.n_heads + 2 * names.n_kv_heads
        self.reads = [slice(layer * (per + 1), layer * (per + 1) + per) for layer in range(names.n_layers)]
        self.parallel, self.known = names.parallel, []
        for target in self.targets:
            layer = names.n_layers if target.kind == "logits" else target.layer
            own = names.n_heads if target.kind == "mlp_out" and not names.parallel else 0
            self.known.append(1 + layer * width + own)
        self.exists = torch.arange(len(self.sources)) < torch.tensor(self.known)[:, None]
        self.blocks = attrgetter(names.row.layers)(model.hf)
        names.norm("norm_mlp", 0)  # refuses where it is not known
        embed = model.hf.get_input_embeddings().weight
        self.norms = [Norm(names.norm("norm_attn", layer), names.d_model, embed) for layer in range(names.n_layers)]
        self.layout, self.heads = self._layout(names), names.row.heads

    def _layout(self, names: Names) -> list[tuple[str, list[int]]]:
        """For each projection: its path, and the targets of a layer in the order in which it gives their numbers."""
        own, paths = self.targets[self.reads[0]], names.row.qkv
        found: list = [(path, []) for path in paths]
        for which, target in enumerate(own):
            start, _ = columns(names, target.kind, target.index)
            found["qkv".index(target.kind) if len(paths) == 3 else 0][1].append((start, which))
        return [(path, [which for _, which in sorted(order)]) for path, order in found]

    def weights(self, layer: int):
        """The projections of one layer: ([target, d_model, d_head], biases [target, d_head]), as the targets stand."""
        parts, biases, order = [], [], []
        for path, whole in self.layout:
            module = projection(self.blocks[layer], path)
            matrix = module.weight.T if isinstance(module, torch.nn.Linear) else module.weight
            parts.append(matrix.unflatten(1, (len(whole), -1)).transpose(0, 1))
            bias = torch.zeros_like(matrix[0]) if module.bias is None else module.bias
            biases.append(bias.unflatten(0, (len(whole), -1)))
            order += whole
        back = torch.tensor(order).argsort()
        return torch.cat(parts)[back], torch.cat(biases)[back]

    def out(self, layer: int) -> torch.Tensor:
        """W_O of one layer, [head, d_head, d_model]."""
        module = attrgetter(self.heads)(self.blocks[layer])
        matrix = module.weight.T if isinstance(module, torch.nn.Linear) else module.weight
        return matrix.unflatten(0, (self.sizes[1], -1))


@dataclass
class Writes:
    """One ordinary run over prompts, taken apart.

    Attributes:
        prompts: left-padded to one length. writes: [source, prompt, position, d_model].
        streams, heads, middles: per layer, what attention reads, z of all heads side by side, what the FFN reads.
        last: what the final norm reads.
        logits: [prompt, d_vocab] at the last position.
    """

    prompts: Prompts
    writes: torch.Tensor
    streams: list
    heads: list
    middles: list
    last: torch.Tensor
    logits: torch.Tensor

    def inputs(self, which) -> Prompts:
        """The prompts of some rows, padded as they were in this run."""
        found = Prompts([self.prompts.ids[i] for i in which])
        found.width, found.pads = self.prompts.width, [self.prompts.width - len(one) for one in found.ids]
        return found


def capture(model: Model, wired: Wiring, prompts: Prompts) -> Writes:
    """Run prompts once and keep what each source writes and what each target reads."""
    names, rows = model.names, len(prompts.ids)

    def read():
        return _read(names, wired, rows)

    writes, *rest = model.trace(model.inputs(prompts), read, logits_to_keep=1)
    return Writes(prompts, torch.cat(writes), *rest)


def _read(names: Names, wired: Wiring, rows: int) -> tuple:
    """Inside a trace."""
    writes, streams, heads, middles = [], [], [], []
    for layer in range(names.n_layers):
        streams.append(names.place("resid_pre", layer, rows).get().clone())
        writes += [streams[0][None]] * (layer == 0)
        z = names.place("z", layer, rows).get()
        heads.append(z.clone())
        writes.append(head_writes(names, wired, layer, z))
        middles.append(ffn_input(names, layer, rows).get().clone())
        writes.append(names.place("mlp_out", layer, rows).get().clone()[None])
    last = attrgetter(names.row.ln_final)(names.nn).input.clone()
    return writes, streams, heads, middles, last, names.nn.output.logits[:, -1].float().clone()


def head_writes(names: Names, wired: Wiring, layer: int, z: torch.Tensor) -> torch.Tensor:
    """Inside a trace: what each head adds to the stream, [head, row, position, d_model]; biases belong to no head.

    A norm behind W_O divides all heads by the size of their sum, so each has its share of the sum's output.
    """
    found = torch.einsum("rphe,hed->hrpd", z.unflatten(-1, (names.n_heads, -1)), wired.out(layer))
    if names.row.attn_add not in (names.row.attn, names.row.heads):
        norm, whole = names.part("attn_add", layer), names.part("heads", layer)(z)
        size = _size(whole) / _size(found)
        found = norm(found * size) / size
    return found * names.scale


def _size(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-20)


def ffn_input(names: Names, layer: int, rows: int):
    """The place where the FFN takes its stream: the input of its norm, or of the FFN itself where it has none before."""
    place = names.place("mlp_in", layer, rows) if names.row.mlp_in else names.place("mlp_out", layer, rows)
    path = names.row.norm_mlp or names.row.mlp_in[0].rpartition(".")[0]
    place.envoy, place.side, place.scale = attrgetter(path)(names.layers[layer]), "input", 1.0
    return place
