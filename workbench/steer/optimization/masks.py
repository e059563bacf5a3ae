"""Located weights: which numbers of which parameters belong to a component, and as many others at random."""

from __future__ import annotations

from operator import attrgetter

import torch

from workbench.component import Component, components
from workbench.model.weights import columns, projection

KINDS = ("q", "k", "v", "z", "attn_out", "neuron", "mlp_out")


def weight_masks(model, at) -> dict[str, torch.Tensor]:
    """Which weights belong to these components? Parameter name -> a mask of its shape, True for what may change.

    Args:
        at: "all", "bias", masks as this function gives them, or components without positions: a head "z.4.2" is its
            slices of W_Q, W_K, W_V and W_O (keys and values: of its group), "q.4.2", "k.4.2", "v.4.2" one of them, a neuron
            its rows of W_in and W_gate and its column of W_out, "mlp_out.4" and "attn_out.4" whole blocks; families
            such as "neuron.5.*" too. Biases go with their rows.
    Raises:
        ValueError: for other components, a position, masks that do not fit, or a model without biases.
    """
    weights = dict(model.hf.named_parameters())
    if isinstance(at, dict):
        for name, mask in at.items():
            if name not in weights or mask.shape != weights[name].shape:
                raise ValueError(f"This model has no weight {name!r} of shape {list(mask.shape)}.")
        return {name: mask.bool() for name, mask in at.items() if mask.any()}
    if at == "all":
        return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    if at == "bias":
        found = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items() if n.endswith("bias")}
        if not found:
            raise ValueError(
                "This model has no biases. bias_only(model, task, at='resid_post.3') learns added vectors."
            )
        return found
    masks: dict[str, torch.Tensor] = {}
    for one in model.names.expand(components(at)):
        if one.kind not in KINDS or one.position is not None:
            raise ValueError(
                f"{one}: weights belong to {', '.join(KINDS)}, without a position; or give 'all' or 'bias'."
            )
        for name, index, dim in _slices(model, one):
            mask = masks.setdefault(name, torch.zeros_like(weights[name], dtype=torch.bool))
            mask[index if dim == 0 or mask.dim() == 1 else (slice(None), index)] = True
    return masks


def random_masks(model, at, seed: int = 0) -> dict[str, torch.Tensor]:
    """As many weights at random: the control for a located change.

    Components are exchanged for as many others of the same kind, drawn from all layers, which keeps their shapes; where
    too few are left, single weights are drawn from the attention and FFN matrices of all layers.

    Args:
        at: as for `weight_masks`.
    Returns:
        Masks, for `finetune(model, task, at=masks)`.
    """
    rng = torch.Generator().manual_seed(seed)
    wanted = weight_masks(model, at)
    size = sum(int(mask.sum()) for mask in wanted.values())
    if at not in ("all", "bias") and not isinstance(at, dict):
        own = model.names.expand(components(at))
        drawn = []
        for kind in dict.fromkeys(one.kind for one in own):
            mine = [one for one in own if one.kind == kind]
            rest = [one for one in model.names.expand([Component.parse(kind)]) if one not in mine]
            drawn += [rest[i] for i in torch.randperm(len(rest), generator=rng)[: len(mine)].tolist()]
        if len(drawn) == len(own):
            return weight_masks(model, drawn)
    fused = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in _fused(model).items()}
    pool = weight_masks(model, ["attn_out.*"]) | (fused or weight_masks(model, ["mlp_out.*"]))
    total = sum(mask.numel() for mask in pool.values())
    if size > total:
        raise ValueError(
            f"{size} weights are more than the {total} of attention and FFN: there is no random set of this size."
        )
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=rng)[:size]] = True
    parts = chosen.split([mask.numel() for mask in pool.values()])
    return {
        name: part.view(mask.shape).to(mask.device)
        for (name, mask), part in zip(pool.items(), parts, strict=True)
        if part.any()
    }


def matrices(model, at) -> list[str]:
    """The names of whole block matrices, for changes of low rank.

    Raises:
        ValueError: for anything but whole attention or FFN blocks.
    """
    found: dict[str, None] = {}
    for one in model.names.expand(components(at)):
        if one.kind not in ("attn_out", "mlp_out") or one.position is not None:
            raise ValueError(f"{one}: a change of low rank is learnt for whole blocks, such as 'attn_out.*' or 'mlp_out.3'; for "
                             "heads and neurons use finetune.")  # fmt: skip
        found |= dict.fromkeys(name for name, _, _ in _slices(model, one) if name.endswith(".weight"))
    return list(found)


def _slices(model, one: Component):
    """(parameter, index, dim) of a component; dim 0 is what the module gives, 1 what it reads."""
    names, row = model.names, model.names.row
    block = f"{row.layers}.{one.layer}"
    paths = {"qkv": row.qkv, "z": (row.heads,), "in": row.mlp_in, "out": (row.neurons,)}
    if one.kind in ("attn_out", "z", "q", "k", "v"):
        for path in row.qkv:
            projection(model.hf.get_submodule(block), path)  # refuses where no matrix is a head's
    if one.kind in ("neuron", "mlp_out") and "neuron" in names.refused:
        raise ValueError(f"{one}: {_instead(model) or names.refused['neuron']}")
    if one.kind in ("attn_out", "mlp_out"):
        for path in [p for key in (("qkv", "z") if one.kind == "attn_out" else ("in", "out")) for p in paths[key]]:
            yield from _module(model, f"{block}.{path}", slice(None), 0)
        return
    if one.kind == "neuron":
        for path in paths["in"]:
            rows = (
                [one.index]
                if len(paths["in"]) > 1 or _width(model, f"{block}.{path}") == names.d_mlp
                else [one.index, names.d_mlp + one.index]
            )
            yield from _module(model, f"{block}.{path}", rows, 0)
        yield from _module(model, f"{block}.{row.neurons}", [one.index], 1)
        return
    for kind in ("q", "k", "v") if one.kind == "z" else (one.kind,):
        grouped = one.index // (names.n_heads // names.n_kv_heads) if one.kind == "z" and kind != "q" else one.index
        path = row.qkv["qkv".index(kind) if len(row.qkv) == 3 else 0]
        yield from _module(model, f"{block}.{path}", slice(*columns(names, kind, grouped)), 0)
    if one.kind == "z":
        yield from _module(
            model, f"{block}.{row.heads}", slice(one.index * names.d_head, (one.index + 1) * names.d_head), 1
        )


def _fused(model) -> dict[str, torch.Tensor]:
    """The weights of FFNs whose matrices are fused by expert, [expert, ...]; none elsewhere."""
    return {name: one for name, one in model.hf.named_parameters() if ".experts." in name and one.dim() == 3}


def _instead(model) -> str:
    """What to type instead for the FFNs of such a model."""
    return "".join(f"an FFN's matrices are fused by expert here, one tensor for all experts: give at='attn_out.*', or to finetune and "
                   f"npo a mask by the parameter's name, at={{{name!r}: mask}}." for name in list(_fused(model))[:1])  # fmt: skip


def _module(model, path: str, index, dim: int):
    """A slice of a module's weight by output (dim 0, with its bias) or input (dim 1); GPT-2's Conv1D is [in, out]."""
    module = attrgetter(path)(model.hf)
    turned = not isinstance(module, torch.nn.Linear)
    yield f"{path}.weight", index, 1 - dim if turned else dim
    if dim == 0 and getattr(module, "bias", None) is not None:
        yield f"{path}.bias", index, 0


def _width(model, path: str) -> int:
    """How many numbers a module gives."""
    module = attrgetter(path)(model.hf)
    return module.weight.shape[0 if isinstance(module, torch.nn.Linear) else 1]
