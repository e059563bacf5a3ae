"""Changes of the way back only: relevance rules (RelP), as hooks on the model's modules. Values stay what they are."""

from __future__ import annotations

from contextlib import contextmanager
from operator import attrgetter

import torch

from workbench.model.weights import columns


@contextmanager
def relevance_rules(model):
    """While open, slopes follow the rules of relevance propagation instead of calculus.

    - norms: the scale (one over the standard deviation) is a constant, so a norm is linear;
    - attention: the pattern is a constant, so heads are linear in their values (nothing flows back through q and k);
    - activation functions: the ratio of output to input is a constant;
    - gated neurons: each factor gets half.

    Raises:
        ValueError: for a model elsewhere (`model.remote`), or one whose neurons are fused.
    """
    if model.remote is not None:
        raise ValueError("Relevance patching changes the way back inside the model's modules, so the model must be here: "
                         "set model.remote = None.")  # fmt: skip
    names, row = model.names, model.names.row
    if row.neurons is None:
        raise ValueError(
            "Relevance patching needs an FFN whose neurons can be told apart; this architecture fuses experts."
        )
    gated = len(row.mlp_in) == 2 or "gate" in row.mlp_in[0]
    hooks = [attrgetter(row.ln_final)(model.hf).register_forward_hook(_linear_norm, prepend=True)]
    try:
        for block in attrgetter(row.layers)(model.hf):
            attn, neurons = attrgetter(row.attn)(block), attrgetter(row.neurons)(block)
            inside = set(attn.modules())
            for module in block.modules():
                if "norm" in type(module).__name__.lower() and module not in inside:
                    hooks.append(module.register_forward_hook(_linear_norm, prepend=True))
                elif module not in inside and _is_activation(module):
                    hooks.append(module.register_forward_hook(_constant_ratio, prepend=True))
            if gated:
                hooks.append(neurons.register_forward_pre_hook(_half, prepend=True))
            for which, path in enumerate(row.qkv):
                if which < 2:  # three projections: q and k are cut; one: all but the values
                    cut = _cut(None if len(row.qkv) == 3 else _values_only(names))
                    hooks.append(attrgetter(path)(block).register_forward_hook(cut, prepend=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_activation(module) -> bool:
    name = type(module).__name__.lower()
    return not list(module.children()) and any(word in name for word in ("gelu", "relu", "silu", "activation", "tanh"))


def _linear_norm(module, args, out):
    """The norm with its scale held fixed: same value, and a slope that is linear in the input."""
    x = args[0]
    centred = x - x.mean(-1, keepdim=True) if isinstance(module, torch.nn.LayerNorm) else x
    with torch.no_grad():
        bias = getattr(module, "bias", None)
        bare = out if bias is None else out - bias
        gain = _gain(module, x)
        scaled = centred * gain
        scale = (bare * scaled).sum(-1, keepdim=True) / (scaled * scaled).sum(-1, keepdim=True).clamp(min=1e-20)
    linear = centred * gain * scale
    return out.detach() + linear - linear.detach()


def _gain(module, x):
    weight = getattr(module, "weight", None)
    if weight is None:
        return torch.ones_like(x[..., :1])
    return 1 + weight if "Gemma" in type(module).__name__ else weight  # Gemma stores what is added to 1


def _constant_ratio(module, args, out):
    x = args[0]
    with torch.no_grad():
        ratio = torch.where(x.abs() > 1e-6, out / torch.where(x == 0, 1, x), 0.5)
    linear = x * ratio
    return out.detach() + linear - linear.detach()


def _half(module, args):
    """What the neurons' output matrix reads is a product of two factors, each of which gets half of the slope."""
    x = args[0]
    return (x.detach() + (x - x.detach()) / 2, *args[1:])


def _values_only(names) -> torch.Tensor:
    """Which columns of one joint projection are values."""
    keep = torch.zeros((names.n_heads + 2 * names.n_kv_heads) * names.d_head, dtype=torch.bool)
    for head in range(names.n_kv_heads):
        start, end = columns(names, "v", head)
        keep[start:end] = True
    return keep


def _cut(values):
    """Queries and keys as constants; of a joint projection, only the values stay."""
    if values is None:
        return lambda module, args, out: out.detach()
    return lambda module, args, out: torch.where(values.to(out.device), out, out.detach())
