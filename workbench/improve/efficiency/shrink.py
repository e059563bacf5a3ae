"""A truly smaller checkpoint: blocks and neurons cut out of the weights, as an ordinary Hugging Face model."""

from __future__ import annotations

import copy
from numbers import Integral
from operator import attrgetter

import torch

from workbench.component import Component, components
from workbench.model import Model
from workbench.model.plan import Prompts
from workbench.operations import Zero

WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")  # what families call the width of the FFN
NUMBERED = ("mlp_only_layers", "moe_layers")  # lists of layers in a config, by number
COUNTED = ("first_k_dense_replace",)  # how many of the first layers are another kind
NEXT = "Drop other blocks, the last ones for example, or keep wb.Zero on attn_out and mlp_out of these."
TOLERANCE = 1e-3  # of the logits, against their largest


def shrink(model, layers=(), neurons=()) -> Model:
    """What is left when blocks and neurons are taken out, not only set to zero?

    The new model computes what `wb.Zero` on the same parts computes, with fewer weights, operations and cached keys; this
    is checked before it is returned. Every layer gets the same width, as the config of a checkpoint asks: that of the layer
    with the most neurons left. Where others have fewer, neurons of zeros fill up.

    Args:
        layers: blocks to drop: numbers, or their streams such as "resid_post.4" without a position (what
            `locate.magnitude.block_influence` scores).
        neurons: "neuron.3.17", a list, or a family.
    Returns:
        A model like any other; `wb.Recipe([]).bake(small, folder)` keeps it as a checkpoint. Recipes made for the whole
        model are refused by it.
    Raises:
        ValueError: when nothing is taken out or no block would be left, for other components, or where this architecture's
            config cannot say what is left.
    Source:
        Men et al. 2024, "ShortGPT" (blocks); Sun et al. 2024, "Wanda" (a score for neurons, `locate.magnitude.wanda`).
    """
    names = model.names
    given = [layers] if isinstance(layers, (Integral, str, Component)) else list(layers)
    dropped = sorted({layer for one in given for layer in _blocks(names, one)})
    outside = [one for one in dropped if not 0 <= one < names.n_layers]
    if outside or len(dropped) == names.n_layers:
        raise ValueError(f"Blocks to drop are among 0 to {names.n_layers - 1}, and one must stay; got {dropped}.")
    cut = names.expand(components(neurons)) if neurons else []
    for one in cut:
        if one.kind != "neuron" or one.position is not None:
            raise ValueError(f"{one} is no neuron; write 'neuron.3.17' or 'neuron.3.*', without a position.")
    if not dropped and not cut:
        raise ValueError("Nothing is taken out: name blocks, such as shrink(model, [4]), or neurons=['neuron.3.17'].")
    kept = [layer for layer in range(names.n_layers) if layer not in dropped]
    off = {layer: {one.index for one in cut if one.layer == layer} for layer in kept}
    width = max(names.d_mlp - len(off[layer]) for layer in kept) if cut else None
    if width == 0:
        raise ValueError("No neuron would be left in any layer.")
    config = _config(model, kept, width)
    with torch.random.fork_rng(devices=[]):  # its first weights are random, and drawn in vain
        hf = type(model.hf)(config)
    # each weight has the type it had; buffers, such as the angles of rotary embeddings, stay as they are computed
    hf.load_state_dict(_weights(model, kept, off, width, hf), assign=True)
    hf.to(model.hf.device).tie_weights()
    hf.generation_config = copy.deepcopy(model.hf.generation_config)
    small = Model(hf.eval(), model.tokenizer, bos=model.bos)
    _refuse_another_function(model, small, dropped, [one for one in cut if one.layer in kept])
    return small


def _blocks(names, one) -> list[int]:
    """Which blocks does a number or a stream stand for?"""
    if isinstance(one, Integral) and not isinstance(one, bool):
        return [int(one)]
    found = names.expand(components(one)) if isinstance(one, (str, Component)) else []
    if not found or any(c.kind != "resid_post" or c.position is not None for c in found):
        raise ValueError(f"{one!r} is no block; write its number, such as 4, or 'resid_post.4' without a position. Neurons go to neurons=; "
                         "for anything else keep wb.Zero.")  # fmt: skip
    return [c.layer for c in found]


def _config(model, kept: list[int], width: int | None):
    config = copy.deepcopy(model.hf.config)
    config.num_hidden_layers = len(kept)
    head = model.hf.get_output_embeddings()
    if head is not None and head.weight is not model.hf.get_input_embeddings().weight:
        config.tie_word_embeddings = False  # an edit may have taken them apart
    for name, value in vars(config).items():  # layer_types and the like: one entry for each layer
        if name in NUMBERED and value:
            setattr(config, name, [kept.index(layer) for layer in value if layer in kept])
        elif name in COUNTED and value:
            setattr(config, name, sum(layer < value for layer in kept))
        elif isinstance(value, (list, tuple)) and len(value) == model.names.n_layers and "layer" in name:
            setattr(config, name, [value[layer] for layer in kept])
    if width is not None:
        own = [name for name in WIDTHS if name in vars(config)]
        if not own:
            raise ValueError(f"The config of {config.model_type!r} has no width of the FFN, so no checkpoint of it can be narrower. "
                             "Keep wb.Zero on these neurons, or drop whole blocks.")  # fmt: skip
        setattr(config, own[0], width)
    return config


def _weights(model, kept: list[int], off: dict, width: int | None, hf) -> dict:
    """The state of the new model: blocks renumbered, FFN matrices cut."""
    row, prefix, sides = model.names.row, model.names.row.layers + ".", {}
    if width is not None:
        block = attrgetter(row.layers)(model.hf)[0]
        for path, axis in [*((path, "out") for path in row.mlp_in), (row.neurons, "in")]:
            module = attrgetter(path)(block)
            weight_axis = int(isinstance(module, torch.nn.Linear) == (axis == "in"))
            sides |= {f"{path}.weight": weight_axis} | ({f"{path}.bias": 0} if axis == "out" else {})
    found, shapes = {}, hf.state_dict()
    for name, value in model.hf.state_dict().items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if int(number) not in kept:
                continue
            if rest in sides:
                value = _cut(value, sides[rest], off[int(number)], model.names.d_mlp, width)
            name = f"{prefix}{kept.index(int(number))}.{rest}"
        if name not in shapes or shapes[name].shape != value.shape:
            raise ValueError(
                f"A checkpoint of {model.hf.config.model_type!r} has no place for {name} of shape {list(value.shape)}: which layers are of "
                f"which kind hangs on their numbers. {NEXT}"
            )
        found[name] = value.detach().clone()
    return found


def _cut(value: torch.Tensor, axis: int, off: set, d_mlp: int, width: int) -> torch.Tensor:
    """Without the neurons that are off, filled up with zeros to `width`; gate and up may stand in one matrix."""
    stay = torch.tensor([i for i in range(d_mlp) if i not in off], device=value.device)
    parts = [part.index_select(axis, stay) for part in value.split(d_mlp, axis)]
    shape = list(parts[0].shape)
    shape[axis] = width - len(stay)
    return torch.cat([x for part in parts for x in (part, part.new_zeros(shape))], axis)


def _refuse_another_function(model, small: Model, dropped: list[int], cut: list) -> None:
    """Does the small model compute what the large one does without these parts? On the tokens of a probe."""
    length = min(64, getattr(model.hf.config, "max_position_embeddings", None) or 64)
    ids = torch.arange(length).remainder(model.names.d_vocab)
    blocks = [Component(kind, layer) for layer in dropped for kind in ("attn_out", "mlp_out")]
    changes = [Zero(at) for at in (blocks, cut) if at]
    want, got = (one.logits(Prompts([ids, ids.flip(0)]), *given) for one, given in ((model, changes), (small, [])))
    off = ((got - want).abs().max() / want.abs().max()).item()
    if not off < max(TOLERANCE, 4 * torch.finfo(model.hf.dtype).eps):
        raise ValueError(f"The smaller {model.hf.config.model_type!r} does not compute what the ablated model does (off by {off:.1%}), "
                         f"so it is not returned: something in this architecture depends on the number of a layer. {NEXT}")  # fmt: skip
