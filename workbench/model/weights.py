"""Weights under the names of the field, as matrices that multiply from the right: x @ W_Q, z @ W_O, neuron @ W_out."""

from __future__ import annotations

from operator import attrgetter

import torch

NAMES = ("W_E", "W_U", "W_Q", "W_K", "W_V", "W_O", "W_gate", "W_in", "W_out")


def weight(model, name: str, layer: int | None = None, index: int | None = None) -> torch.Tensor:
    """Which matrix does this head, FFN or embedding use? In float32, a copy.

    Args:
        name: "W_E" [d_vocab, d_model], "W_U" [d_model, d_vocab]; "W_Q", "W_K", "W_V" [d_model, d_head] and "W_O"
            [d_head, d_model] of head `index` (keys and values: of the group that this query head uses); "W_in" and
            "W_gate" [d_model, d_mlp] (a neuron's keys), "W_out" [d_mlp, d_model] (its values).
    Raises:
        ValueError: for a name, layer or head that is not there, or a gate where there is none.
    Source:
        Elhage et al. 2021 for the names; weights are those of the checkpoint, with no norm folded in.
    """
    names = model.names
    if name not in NAMES:
        raise ValueError(f"There is no weight {name!r}; there are {', '.join(NAMES)}.")
    if name == "W_E":
        return model.hf.get_input_embeddings().weight.float().clone()
    if name == "W_U":
        return model.hf.get_output_embeddings().weight.float().T.clone()
    if layer is None or not 0 <= layer < names.n_layers:
        raise ValueError(f"{name} needs a layer from 0 to {names.n_layers - 1}; got {layer}.")
    block, row = attrgetter(names.row.layers)(model.hf)[layer], names.row
    if name in ("W_gate", "W_in", "W_out"):
        if row.neurons is None or row.mlp_in is None:
            raise ValueError(f"{name}: this architecture fuses its experts, so single neurons are not offered.")
        if name == "W_out":
            return _matrix(attrgetter(row.neurons)(block)).clone()
        parts = [part for path in row.mlp_in for part in _matrix(attrgetter(path)(block)).split(names.d_mlp, dim=1)]
        if name == "W_gate" and len(parts) == 1:
            raise ValueError("W_gate: this FFN has no gate; its keys are W_in.")
        return parts[0 if name == "W_gate" else -1].clone()
    if index is None or not 0 <= index < names.n_heads:
        raise ValueError(f"{name} needs a head from 0 to {names.n_heads - 1}; got {index}.")
    if name == "W_O":
        return _matrix(attrgetter(row.heads)(block))[index * names.d_head : (index + 1) * names.d_head].clone()
    which = "QKV".index(name[2])
    if which:
        index //= names.n_heads // names.n_kv_heads
    start, end = columns(names, "qkv"[which], index)
    module = projection(block, row.qkv[which if len(row.qkv) == 3 else 0])
    return _matrix(module)[:, start:end].clone()


def projection(block, path: str):
    """The module at `path` whose weight gives queries, keys or values.

    Raises:
        ValueError: where there is none, as in latent attention, which makes them in several steps.
    """
    module = block
    for name in path.split("."):
        module = getattr(module, name, None)
    if getattr(module, "weight", None) is None:
        raise ValueError(f"This architecture has no {path} with a weight: it makes queries, keys and values in steps of its own, so no "
                         "matrix of theirs is one head's. Activations are offered (z, q, k, v); to train attention, give "
                         "finetune a mask by the parameter's name, at={name: mask}.")  # fmt: skip
    return module


def columns(names, kind: str, index: int) -> tuple[int, int]:
    """Where the numbers of head `index` of q, k or v stand in what their projection gives."""
    which, width = "qkv".index(kind), names.d_head
    if names.row.layout == "by head":
        start = (3 * index + which) * width
    else:
        before = (0, names.n_heads, names.n_heads + names.n_kv_heads)[which] if len(names.row.qkv) == 1 else 0
        start = (before + index) * width
    return start, start + width


def _matrix(module) -> torch.Tensor:
    """[in, out]; transformers' Conv1D of GPT-2 keeps it so, Linear the other way round."""
    return module.weight.float().T if isinstance(module, torch.nn.Linear) else module.weight.float()
