"""Fewer bits for weights: rounded to nearest, layer by layer, as a weight delta with its true size in bytes."""

from __future__ import annotations

import time
from operator import attrgetter

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from workbench import measure
from workbench.component import Component
from workbench.locate.magnitude.reading import texts
from workbench.operations import Delta
from workbench.scores import Scores

SCALE_BYTES = 2  # one fp16 number for each output channel
TINY = 2.0**-24  # the smallest of them above 0


def quantize(model, bits) -> tuple[Delta, int]:
    """What do the blocks compute with their matrices rounded to so many bits?

    Each output channel of each matrix (of each expert, and of routers too) has a scale of its own, its largest weight;
    weights become the nearest of 2^(bits-1) - 1 steps to either side of zero. Embeddings, norms and biases stay.

    Args:
        bits: 2 to 8, for all layers or as a dict from layer to bits; layers not named stay as they are.
    Returns:
        (the rounding error as a `Delta`, the bytes that all parameters take when the rounded matrices are stored in these bits,
        with their scales). The delta computes with the rounded weights in the model's own precision: it shows the quality and
        the size, not the speed of integer arithmetic. bfloat16 itself cannot tell 8 bits apart everywhere: there a running
        weight lies up to half a step from the rounded one.
    Raises:
        ValueError: for other bits or layers; for weights of a kind whose output channels are not known.
    """
    layers = range(model.names.n_layers)
    chosen = dict(bits) if hasattr(bits, "items") else dict.fromkeys(layers, bits)
    if not chosen or set(chosen) - set(layers) or not all(isinstance(b, int) and 2 <= b <= 8 for b in chosen.values()):
        raise ValueError(f"bits is 2 to 8, or a dict from layers 0 to {model.names.n_layers - 1} to such; got {bits}.")
    weights, size = {}, 0
    for name, parameter, layer, axis in _parameters(model, chosen):
        if axis is None:
            size += parameter.numel() * parameter.element_size()
            continue
        w, steps = parameter.detach().float(), 2 ** (chosen[layer] - 1) - 1
        scale = (w.abs().amax(axis, keepdim=True) / steps).half().float()  # 0 for a channel of zeros, or nearly
        weights[name] = (w / scale.clamp(min=TINY)).round().clamp(-steps, steps) * scale - w
        size += -(-w.numel() * chosen[layer] // 8) + scale.numel() * SCALE_BYTES
    return Delta(weights=weights), size


def _parameters(model, chosen):
    """Every parameter once: (name, parameter, its layer, the axis of its inputs); the last two are None for what stays."""
    prefix = model.names.row.layers + "."
    for name, parameter in model.hf.named_parameters():
        layer, axis = None, None
        if name.startswith(prefix) and parameter.dim() > 1 and not name.endswith("bias"):
            layer = int(name.removeprefix(prefix).split(".")[0])
            if layer in chosen:
                axis = _inputs(attrgetter(name.rpartition(".")[0])(model.hf), name, parameter)
        yield name, parameter, layer, axis


def _inputs(module, name: str, parameter) -> int | None:
    """Which axis of a matrix is that of its inputs? None for embeddings."""
    if isinstance(module, torch.nn.Embedding):
        return None
    if parameter.dim() == 2 and name.endswith(".weight"):  # routers are no Linear, but lie as one
        return 0 if isinstance(module, Conv1D) else 1
    if parameter.dim() == 3 and hasattr(module, "is_transposed"):  # the experts of a mixture in one tensor
        return 1 if module.is_transposed else 2
    raise ValueError(f"Which axis of {name} {list(parameter.shape)} holds outputs is not known for a {type(module).__name__}, so it has no "
                     "scale for each. Name layers without one, such as bits={0: 4}.")  # fmt: skip


def quantization_effects(model, task, bits: int = 4, *, seed: int = 0) -> Scores:
    """Which layers suffer most from fewer bits? KL of the next token when one layer alone is rounded.

    The null: the same errors, dealt anew over the weights of each matrix.

    Args:
        task: a task, its name, or a list of texts.
    Returns:
        Scores of `resid_post.0`, `resid_post.1`, ..., in nats. Cost: 1 + 2 passes for each layer.
    """
    began, (prompts, name) = time.perf_counter(), texts(model, task)
    generator = torch.Generator().manual_seed(seed)
    before, effects, under = model.logits(prompts), [], []
    for layer in range(model.names.n_layers):
        delta, _ = quantize(model, {layer: bits})
        dealt = {
            key: x.flatten()[torch.randperm(x.numel(), generator=generator)].view_as(x)
            for key, x in delta.weights.items()
        }
        for one, found in ((delta, effects), (Delta(weights=dealt), under)):
            found.append(measure.kl(before, model.logits(prompts, one)).numpy())
    values, low, high = measure.mean_interval(np.array(effects).T, seed=seed)
    return Scores([Component("resid_post", layer) for layer in range(model.names.n_layers)], values, low, high, np.array(under).mean(1),
                  np.array(effects), "efficiency.quantization_effects", f"KL at {bits} bits", task=name,
                  null="the same errors dealt anew over each matrix (one draw, its mean)", cost=1.0 + 2 * model.names.n_layers,
                  seconds=time.perf_counter() - began, seed=seed)  # fmt: skip
