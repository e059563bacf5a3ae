"""Where a tensor is in the running model: what a forward pass reads there and what it goes on with."""

from __future__ import annotations

import inspect

import torch

# what fused experts are called with: tokens, and for each the numbers and the weights of the experts it goes to
ROUTED = (["hidden_states", "top_k_index", "top_k_weights"], ["hidden_states", "router_indices", "routing_weights"])


def fused_experts(block) -> tuple[str, str | None] | None:
    """Where a block keeps the experts of a mixture, one tensor for all, and their router (None if it is not beside them);
    None for a block without experts, or whose experts are called in another way."""
    for path, module in block.named_modules():
        weight = getattr(module, "down_proj", None)
        if path.endswith("experts") and isinstance(weight, torch.Tensor) and weight.dim() == 3:
            given, ffn = list(inspect.signature(type(module).forward).parameters), path.rpartition(".")[0]
            beside = dict(block.get_submodule(ffn).named_children())
            router = next((f"{ffn}.{name}" for name in ("gate", "router") if name in beside), None)
            return (path, router) if given[1:4] in ROUTED else None
    return None


def first(value):
    """Some modules return (tensor, extras): the tensor."""
    return value[0] if isinstance(value, tuple) else value


class Place:
    """One tensor in the running model; `get` and `set` are for use inside an nnsight trace."""

    def __init__(self, envoy, side: str, rows: int, scale: float = 1.0):
        self.envoy, self.side, self.rows, self.scale = envoy, side, rows, scale
        self.flat = False

    def get(self) -> torch.Tensor:
        """[row, position, width]"""
        value = self.envoy.input if self.side == "input" else first(self.envoy.output)
        self.flat = value.dim() == 2  # OPT's FFN runs on [row * position, width]
        value = value.unflatten(0, (self.rows, -1)) if self.flat else value
        return value if self.scale == 1.0 else value * self.scale

    def set(self, value: torch.Tensor) -> None:
        if self.scale != 1.0:
            value = value / self.scale
        if self.flat:
            value = value.flatten(0, 1)
        if self.side == "input":
            self.envoy.input = value
        else:
            whole = self.envoy.output
            self.envoy.output = (value, *whole[1:]) if isinstance(whole, tuple) else value


class InsideAttention(Place):
    """A tensor between the projections and z, [row, position, head * width]; the width is d_head for q, k (after the
    rotary embedding) and v, and the number of key positions for attn_scores and pattern.

    transformers gives all but the oldest architectures one attention function; nnsight reads and changes what goes
    through it.
    """

    def __init__(self, attn, kind: str):
        super().__init__(attn, kind, 0)

    def get(self) -> torch.Tensor:
        call = self.envoy.source.attention_interface_1
        if self.side in ("q", "k", "v"):
            value = call.inputs[0]["_qkv".index(self.side)]
        elif self.side == "attn_scores":
            value = call.source.nn_functional_softmax_0.inputs[0][0]
        else:
            value = call.source.nn_functional_dropout_0.output
        self.heads = value.shape[1]
        return value.transpose(1, 2).flatten(2)

    def set(self, value: torch.Tensor) -> None:
        call = self.envoy.source.attention_interface_1
        value = value.unflatten(2, (self.heads, -1)).transpose(1, 2)
        if self.side == "pattern":
            call.source.nn_functional_dropout_0.output = value
            return
        call = call if self.side != "attn_scores" else call.source.nn_functional_softmax_0
        args, kwargs = call.inputs
        which = "_qkv".index(self.side) if self.side != "attn_scores" else 0
        call.inputs = ((*args[:which], value, *args[which + 1 :]), kwargs)


class Routing(Place):
    """The weight with which each expert of a mixture adds what it computes, [row, position, expert]; 0 where it was not
    chosen. A change leaves the other experts' weights as they are.

    The fused experts are given the chosen ones and their weights for each token. An expert that gets a weight where it was
    not chosen is put beside them, at no weight for the other tokens.
    """

    def __init__(self, experts, rows: int, n_experts: int):
        super().__init__(experts, "input", rows)
        self.n_experts = n_experts

    def get(self) -> torch.Tensor:
        (_, chosen, weights), _ = self.envoy.inputs
        self.flat = True
        return (
            weights.new_zeros(len(weights), self.n_experts)
            .scatter_add(1, chosen, weights)
            .unflatten(0, (self.rows, -1))
        )

    def set(self, value: torch.Tensor) -> None:
        (hidden, chosen, weights), kwargs = self.envoy.inputs
        value = value.flatten(0, 1).to(weights.dtype)
        others = value.scatter(1, chosen, 0)
        if value.requires_grad:  # the gradient at an expert that was not chosen needs what it computes
            joined = torch.arange(self.n_experts, device=chosen.device)
        else:
            joined = others.any(0).nonzero()[:, 0]
        value = torch.cat([value.gather(1, chosen), others[:, joined]], 1)
        chosen = torch.cat([chosen, joined.to(chosen).expand(len(chosen), -1)], 1)
        self.envoy.inputs = ((hidden, chosen, value), kwargs)
