"""Fewer bits for weights: rounded to nearest, layer by layer, as a weight delta with its true size in bytes."""

from __future__ import annotations

import time
from operator import attrgetter

import numpy as np
import torch

from workbench import measure
from workbench.component import Component
from workbench.intervention import Delta
from workbench.locate.magnitude.reading import texts
from workbench.scores import Scores

SCALE_BYTES = 2  # one fp16 number for each output channel


def quantize(model, bits) -> tuple[Delta, int]:
    """What do the blocks compute with their matrices rounded to so many bits?

    Each output channel of each matrix has a scale of its own, its largest weight; weights become the nearest of
    2^(bits-1) - 1 steps to either side of zero. Embeddings, norms and biases stay.

    Args:
        bits: 2 to 8, for all layers or as a dict from layer to bits; layers not named stay as they are.
    Returns:
        (the rounding error as a `Delta`, the bytes that all parameters take when the rounded matrices are stored in these bits,
        with their scales). The delta computes with the rounded weights in full precision: it shows the quality and the size,
        not the speed of integer arithmetic.
    Raises:
        ValueError: for other bits or layers.
    """
    layers = range(model.names.n_layers)
    chosen = dict(bits) if hasattr(bits, "items") else dict.fromkeys(layers, bits)
    if not chosen or set(chosen) - set(layers) or not all(isinstance(b, int) and 2 <= b <= 8 for b in chosen.values()):
        raise ValueError(f"bits is 2 to 8, or a dict from layers 0 to {model.names.n_layers - 1} to such; got {bits}.")
    weights, size = {}, 0
    for name, parameter, layer, axis in _parameters(model):
        if layer not in chosen or axis is None:
            size += parameter.numel() * parameter.element_size()
            continue
        w, steps = parameter.detach().float(), 2 ** (chosen[layer] - 1) - 1
        scale = (w.abs().amax(axis, keepdim=True) / steps).clamp(min=1e-12).half().float()
        weights[name] = (w / scale).round().clamp(-steps, steps) * scale - w
        size += -(-w.numel() * chosen[layer] // 8) + scale.numel() * SCALE_BYTES
    return Delta(weights=weights), size


def _parameters(model):
    """Every parameter once: (name, parameter, its layer or None, for a matrix of a block the axis of its inputs or None)."""
    prefix = model.names.row.layers + "."
    for name, parameter in model.hf.named_parameters():
        layer, axis = None, None
        if name.startswith(prefix):
            layer = int(name.removeprefix(prefix).split(".")[0])
            module = attrgetter(name.rpartition(".")[0])(model.hf) if parameter.dim() == 2 else None
            axis = None if module is None else (1 if isinstance(module, torch.nn.Linear) else 0)
        yield name, parameter, layer, axis


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
