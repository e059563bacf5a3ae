"""One naming for every architecture: where each component lives in a Hugging Face decoder, checked at load.

A row says which module's output is *added to the residual stream* by attention and by the FFN (after any norm or
multiplier that the family puts behind them), because that is what `attn_out` and `mlp_out` mean here. Adding an
architecture is adding a row; `Names.check` then proves or refuses it on the real model.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from operator import attrgetter

import torch

from workbench.component import KINDS, Component
from workbench.model.places import InsideAttention, Place, Routing, first, fused_experts

# between the projections and z; changed in the prompt's pass only, but for changes that grow (Attend, Window)
INSIDE = ("q", "k", "v", "attn_scores", "pattern")
MIXTURE = ("router", "expert")  # in the layers that have experts
READY = ("embed", "resid_pre", *INSIDE, "z", "attn_out", "resid_mid", "neuron", "mlp_out", "resid_post", "feature",
         "ln_final")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Module paths of one architecture; those from `attn` to `neurons` are relative to a block."""

    layers: str = "model.layers"
    attn: str = "self_attn"
    heads: str = "self_attn.o_proj"  # its input is z, all heads side by side
    attn_add: str = "self_attn"  # its output (times the multiplier) is added to the stream
    mlp_add: str = "mlp"
    neurons: str | None = "mlp.down_proj"  # its input is the neurons' activations
    embed: str = "model.embed_tokens"
    ln_final: str = "model.norm"
    attn_adds_residual: bool = False  # the attention module itself adds the stream to its output
    # weights: one module each for q, k and v, or one for all three, then "stacked" (all q, all k, all v) or "by head"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    layout: str = "stacked"
    mlp_in: tuple[str, ...] | None = ("mlp.gate_proj", "mlp.up_proj")  # one without a gate; None where fused by expert
    norm_attn: str | None = "input_layernorm"  # None: attention reads the bare stream
    norm_mlp: str | None = "post_attention_layernorm"


LLAMA = Row()
GEMMA = Row(attn_add="post_attention_layernorm", mlp_add="post_feedforward_layernorm",
            norm_mlp="pre_feedforward_layernorm")  # fmt: skip
ROWS: dict[str, Row] = {
    **dict.fromkeys(["llama", "mistral", "ministral", "qwen2", "qwen3", "granite"], LLAMA),
    "phi3": Row(qkv=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",)),
    "phi": Row(heads="self_attn.dense", neurons="mlp.fc2", ln_final="model.final_layernorm", mlp_in=("mlp.fc1",),
               norm_mlp="input_layernorm"),
    **dict.fromkeys(["cohere", "cohere2"], Row(norm_mlp="input_layernorm")),
    "glm": Row(mlp_in=("mlp.gate_up_proj",)),
    **dict.fromkeys(["nemotron", "arcee"], Row(mlp_in=("mlp.up_proj",))),
    "apertus": Row(mlp_in=("mlp.up_proj",), norm_attn="attention_layernorm", norm_mlp="feedforward_layernorm"),
    "starcoder2": Row(neurons="mlp.c_proj", mlp_in=("mlp.c_fc",)),
    "nanochat": Row(neurons="mlp.fc2", mlp_in=("mlp.fc1",)),
    "glm4": Row(attn_add="post_self_attn_layernorm", mlp_add="post_mlp_layernorm", mlp_in=("mlp.gate_up_proj",)),
    **dict.fromkeys(["gemma2", "gemma3_text"], GEMMA),
    "vaultgemma": Row(norm_mlp="pre_feedforward_layernorm"),
    **dict.fromkeys(["olmo2", "olmo3", "exaone4"], Row(
        attn_add="post_attention_layernorm", mlp_add="post_feedforward_layernorm", norm_attn=None, norm_mlp=None)),
    **dict.fromkeys(["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"], Row(neurons=None, mlp_in=None)),
    "llama4_text": Row(mlp_add="feed_forward", neurons=None, mlp_in=None),
    "granitemoe": Row(mlp_add="block_sparse_moe", neurons=None, mlp_in=None),
    "gpt2": Row("transformer.h", "attn", "attn.c_proj", "attn", "mlp", "mlp.c_proj", "transformer.wte",
                "transformer.ln_f", qkv=("attn.c_attn",), mlp_in=("mlp.c_fc",), norm_attn="ln_1", norm_mlp="ln_2"),
    "gpt_neo": Row("transformer.h", "attn.attention", "attn.attention.out_proj", "attn.attention", "mlp", "mlp.c_proj",
                   "transformer.wte", "transformer.ln_f", qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
                   mlp_in=("mlp.c_fc",), norm_attn="ln_1", norm_mlp="ln_2"),
    "gptj": Row("transformer.h", "attn", "attn.out_proj", "attn", "mlp", "mlp.fc_out", "transformer.wte", "transformer.ln_f",
                qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"), mlp_in=("mlp.fc_in",), norm_attn="ln_1", norm_mlp="ln_1"),
    "gpt_neox": Row("gpt_neox.layers", "attention", "attention.dense", "attention", "mlp", "mlp.dense_4h_to_h",
                    "gpt_neox.embed_in", "gpt_neox.final_layer_norm", qkv=("attention.query_key_value",), layout="by head",
                    mlp_in=("mlp.dense_h_to_4h",)),
    "opt": Row("model.decoder.layers", "self_attn", "self_attn.out_proj", "self_attn", "fc2", "fc2",
               "model.decoder.embed_tokens", "model.decoder.final_layer_norm", mlp_in=("fc1",),
               norm_attn="self_attn_layer_norm", norm_mlp="final_layer_norm"),
    "bloom": Row("transformer.h", "self_attention", "self_attention.dense", "self_attention.dense",
                 "mlp.dense_4h_to_h", "mlp.dense_4h_to_h", "transformer.word_embeddings", "transformer.ln_f", True,
                 qkv=("self_attention.query_key_value",), layout="by head", mlp_in=("mlp.dense_h_to_4h",)),
}  # fmt: skip


class Names:
    """Which tensor does a component name in this model, and which components can it offer?

    Attributes:
        n_layers, n_heads, n_kv_heads, d_head, d_model, d_mlp, n_experts, d_vocab: the model's sizes (d_mlp is None where
            neurons are not offered, n_experts where there are none; keys and values may have fewer heads than queries).
        experts: layer -> where in its block the experts of a mixture and their router are; layers without any are left out.
        refused: kind -> the sentence that says why this model does not offer it.
        saes: name -> the sparse autoencoders attached (`Model.attach`), whose features have addresses.
    """

    def __init__(self, nn, config, row: Row):
        self.nn, self.row, self.saes = nn, row, {}
        self.layers = attrgetter(row.layers)(nn)
        self.n_layers, self.n_heads = len(self.layers), config.num_attention_heads
        self.attention = getattr(config, "_attn_implementation", None) or "eager"
        self.n_kv_heads = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.scale = float(getattr(config, "residual_multiplier", None) or 1.0)
        self.d_model, self.d_vocab = config.hidden_size, config.vocab_size
        self.d_head, self.d_mlp = None, None
        self.parallel = False  # attention and FFN read the same stream, so there is none between them
        self.block_extras = 0  # further values in a block's output tuple
        self.block_is_tuple = False
        self.refused = {
            kind: f"{kind} is not offered in this version; offered are {', '.join(READY)}."
            for kind in KINDS
            if kind not in (*READY, *MIXTURE)
        }
        found = {layer: fused_experts(block._module) for layer, block in enumerate(self.layers)}
        self.experts = {layer: paths for layer, paths in found.items() if paths}
        self.n_experts = len(self.mixture(min(self.experts))[0]._module.down_proj) if self.experts else None
        if not self.experts:
            mixture = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
            why = (
                "this mixture keeps its experts in a form of its own"
                if mixture
                else "this model is no mixture of experts"
            )
            self.refused |= {kind: f"{kind}: {why}." for kind in MIXTURE}
        self.part("heads", 0), self.part("attn_add", 0), self.part("mlp_add", 0), self.part("attn", 0)
        attrgetter(row.embed)(nn), attrgetter(row.ln_final)(nn)
        if row.neurons is None:
            self.refused["neuron"] = "This architecture fuses its experts, so single neurons are not offered."
        else:
            self.part("neurons", 0)

    @property
    def has_sinks(self) -> bool:
        """Has attention a learnt column beside the keys (gpt_oss)?"""
        return hasattr(self.part("attn", 0)._module, "sinks")

    def part(self, name: str, layer: int):
        """The module (nnsight envoy) of a block that the row calls `name`."""
        return attrgetter(getattr(self.row, name))(self.layers[layer])

    def norm(self, name: str, layer: int):
        """The norm before attention ("norm_attn") or the FFN ("norm_mlp"), None where they read the bare stream.

        Raises:
            ValueError: where a family without a row of its own has it under another name.
        """
        path = getattr(self.row, name)
        module = path and getattr(self.layers[layer]._module, path, None)
        if path and module is None:
            raise ValueError(f"This family was recognized by its layout, but its blocks have no {path}, so what reads the stream through "
                             "a norm is not known. Give it a row of its own in ROWS of workbench/model/names.py.")  # fmt: skip
        return module

    def place(self, kind: str, layer: int | None, rows: int) -> Place:
        """Where the tensor of a kind lives, in a batch of `rows`; `resid_mid` and `attn_out` share one place."""
        if kind in ("attn_out", "resid_mid"):
            return Place(self.part("attn_add", layer), "output", rows, self.scale)
        if kind == "mlp_out":
            return Place(self.part("mlp_add", layer), "output", rows, self.scale)
        if kind == "z":
            return Place(self.part("heads", layer), "input", rows)
        if kind == "neuron":
            return Place(self.part("neurons", layer), "input", rows)
        if kind == "expert":
            return Routing(self.mixture(layer)[0], rows, self.n_experts)
        if kind == "router":  # its logits, before they choose
            return Place(self.mixture(layer)[1].source.F_linear_0, "output", rows)
        if kind == "mlp_in":  # no component: what transcoders read
            return Place(attrgetter(self.row.mlp_in[0])(self.layers[layer]), "input", rows)
        if kind in INSIDE:
            return InsideAttention(self.part("attn", layer), kind)
        if kind == "embed":
            return Place(attrgetter(self.row.embed)(self.nn), "output", rows)
        if kind == "ln_final":
            return Place(attrgetter(self.row.ln_final)(self.nn), "output", rows)
        return Place(self.layers[layer], "input" if kind == "resid_pre" else "output", rows)

    def mixture(self, layer: int) -> tuple:
        """The experts of a layer and their router (nnsight envoys); None for a router that is not found."""
        return tuple(path and attrgetter(path)(self.layers[layer]) for path in self.experts[layer])

    def block_value(self, x: torch.Tensor):
        """What a skipped block must return so that the stream goes on as `x`."""
        return (x, *[None] * self.block_extras) if self.block_is_tuple else x

    def validate(self, component: Component) -> None:
        """Does this model have the component?

        Raises:
            ValueError: with what was given, what the model has, and why a kind is not offered.
        """
        if component.kind in self.refused:
            raise ValueError(f"{component}: {self.refused[component.kind]}")
        if component.kind == "feature" and component.name not in self.saes:
            known = f"Attached are {', '.join(self.saes)}." if self.saes else "None is: model.attach(wb.SAE.load(...))."
            raise ValueError(f"{component}: no SAE {component.name!r} is attached to this model. {known}")
        if isinstance(component.layer, int) and not 0 <= component.layer < self.n_layers:
            raise ValueError(f"{component}: layer {component.layer} is out of range; this model has layers 0 to "
                             f"{self.n_layers - 1}.")  # fmt: skip
        if component.kind in MIXTURE and component.layer not in ("*", *self.experts):
            raise ValueError(f"{component}: layer {component.layer} has no experts here; layers that have are "
                             f"{', '.join(map(str, self.experts))}.")  # fmt: skip
        if component.index == "error":
            raise ValueError(f"{component} is a node of circuits only: see wb.locate.circuit.nodes and keep. Interventions on "
                             "features leave the error term in place.")  # fmt: skip
        size, what = self.size(component.kind, component.name), KINDS[component.kind][0]
        if size is None and component.index is not None:
            raise ValueError(f"{component}: {component.kind} has no index; write {component.kind}.{component.layer}.")
        if isinstance(component.index, int) and not 0 <= component.index < size:
            raise ValueError(f"{component}: {what} {component.index} is out of range; a layer has {what}s 0 to "
                             f"{size - 1}.")  # fmt: skip

    def size(self, kind: str, name: str | None = None) -> int | None:
        """How many heads, neurons or experts a layer has (features the SAE `name`); None for kinds without an index."""
        if kind == "feature":
            return self.saes[name].d_sae
        if kind in ("k", "v"):
            return self.n_kv_heads
        return {"head": self.n_heads, "neuron": self.d_mlp, "expert": self.n_experts}.get(KINDS[kind][0])

    def expand(self, components) -> list[Component]:
        """Families written out (`z.*.*` as one component per head), checked, without duplicates, in the order given."""
        found: dict[Component, None] = {}
        for one in components:
            self.validate(one)
            every = self.experts if one.kind in MIXTURE else range(self.n_layers)
            layers = every if one.layer == "*" else [one.layer]
            indices = range(self.size(one.kind, one.name)) if one.index == "*" else [one.index]
            for layer in layers:
                for index in indices:
                    found[Component(one.kind, layer, index, one.position, one.name)] = None
        return list(found)

    def check(self, trace) -> None:
        """Do the names mean here what they say? Run on the real model when it loads.

        For each layer, resid_pre + attn_out + mlp_out must equal resid_post; there is a resid_mid if the FFN reads
        what attention wrote. Kinds that fail are refused with a sentence from then on.

        Args:
            trace: runs `read(names, rows)` inside one forward pass of a few rows and returns what it returns.
        Raises:
            ValueError: when z or the stream do not have the expected shape, so that nothing could be trusted.
        """
        calls, final = [], attrgetter(self.row.ln_final)(self.nn)._module
        hook = final.register_forward_hook(lambda *_: calls.append(1))
        try:
            seen = trace(_read_all)
        finally:
            hook.remove()
        if len(calls) > 1:
            self.refused["ln_final"] = (
                "ln_final: the final norm also runs elsewhere in a pass here, so it is not offered."
            )
        pre, attn, mlp, post = (
            torch.stack(seen[k]).double() for k in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        width = seen["z"].shape[-1]
        if pre.shape[-1] != self.d_model or width % self.n_heads:
            raise ValueError(f"The row for this architecture does not fit: stream {pre.shape[-1]} wide, z {width} wide, "
                             f"d_model {self.d_model}, {self.n_heads} heads.")  # fmt: skip
        for kind, widths in seen["widths"].items():
            if len(widths) > 1:
                raise ValueError(f"{kind} is {' or '.join(map(str, sorted(widths)))} wide, depending on the layer; models whose layers differ "
                                 "in size are not offered, as a component's index would mean another thing in each.")  # fmt: skip
        self.d_head = width // self.n_heads
        self.d_mlp = seen["neuron"].shape[-1] if "neuron" in seen else None
        self.block_is_tuple, self.block_extras = seen["tuple"]
        error = ((pre + attn + mlp - post).abs().amax((1, 2, 3)) / post.abs().amax((1, 2, 3))).max().item()
        if not error < max(1e-3, 2 * torch.finfo(seen["resid_post"][0].dtype).eps):
            why = f"resid_pre + {{}} does not give resid_post here (off by {error:.1%}), so it cannot be told apart."
            for kind in ("attn_out", "mlp_out", "resid_mid"):
                self.refused[kind] = why.format("attn_out + mlp_out")
        if "attention_interface_1" not in _operations(self.part("attn", 0)):
            for kind in INSIDE:
                self.refused[kind] = f"{kind}: this architecture computes attention in a way of its own; use z."
        elif self.attention != "eager":
            for kind in ("attn_scores", "pattern"):
                self.refused[kind] = (
                    f"{kind}: attention is computed by {self.attention!r} here, which keeps no pattern; call "
                    "hf.set_attn_implementation('eager') before wb.load."
                )
        elif not trace(_patterns_sum_to_one):
            self.refused["pattern"] = "pattern: attention does not sum to one here (sinks), so it is not offered."
        if self.has_sinks:
            self.refused.setdefault("attn_scores", "attn_scores: attention has learnt sinks here, a column beside the keys, so it "
                                                   "is not offered.")  # fmt: skip
        self._check_mixture(trace)
        moved = trace(_read_mlp_without_attention)
        if torch.allclose(moved.double(), mlp[0], rtol=1e-6, atol=0):
            self.parallel = True
            self.refused["resid_mid"] = "attention and FFN run in parallel here, so there is no stream between them."

    def _check_mixture(self, trace) -> None:
        """In every layer, do experts without weight write nothing and the router's logits choose? Else they are not offered."""
        if not self.experts:
            return
        routers = [self.mixture(layer)[1] for layer in self.experts]
        if not all(router is not None and "F_linear_0" in _operations(router) for router in routers):
            self.refused["router"] = "router: it computes what it chooses by in a way of its own, so it is not offered."
        elif not trace(_router_chooses):
            self.refused["router"] = "router: its logits do not choose the experts here, so it is not offered."
        if trace(_written_without_weight) != 0:
            self.refused["expert"] = "expert: experts without weight write something here, so they are not offered."


def _read_all(names: Names, rows: int) -> dict:
    """Inside a trace: every site of every layer, in forward order."""
    found: dict = {
        "resid_pre": [],
        "attn_out": [],
        "mlp_out": [],
        "resid_post": [],
        "widths": {"z": set(), "neuron": set()},
    }
    for layer in range(names.n_layers):
        found["resid_pre"].append(names.place("resid_pre", layer, rows).get().clone())
        z = names.place("z", layer, rows).get()
        found.setdefault("z", z.clone())
        found["widths"]["z"].add(z.shape[-1])
        found["attn_out"].append(names.place("attn_out", layer, rows).get().clone())
        if "neuron" not in names.refused:
            neuron = names.place("neuron", layer, rows).get()
            found.setdefault("neuron", neuron.clone())
            found["widths"]["neuron"].add(neuron.shape[-1])
        found["mlp_out"].append(names.place("mlp_out", layer, rows).get().clone())
        whole = names.layers[layer].output
        found["tuple"] = (isinstance(whole, tuple), len(whole) - 1 if isinstance(whole, tuple) else 0)
        found["resid_post"].append(first(whole).clone())
    return found


def _operations(attn) -> str:
    """The operations of a module that nnsight can reach, as text."""
    return str(attn.source)


def _patterns_sum_to_one(names: Names, rows: int) -> bool:
    place = names.place("pattern", 0, rows)
    pattern = place.get().unflatten(2, (names.n_heads, -1)).float()
    return bool(torch.allclose(pattern.sum(-1), torch.ones_like(pattern[..., 0]), atol=1e-2))


def _router_chooses(names: Names, rows: int) -> bool:
    chosen = []
    for layer in names.experts:
        place = names.place("router", layer, rows)
        logits = torch.full_like(place.get(), -100.0)
        logits[..., 0] = 100.0
        place.set(logits)
        chosen.append(bool((names.place("expert", layer, rows).get()[..., 0] > 0).all()))
    return all(chosen)


def _written_without_weight(names: Names, rows: int) -> float:
    written = []
    for layer in names.experts:
        place = names.place("expert", layer, rows)
        place.set(torch.zeros_like(place.get()))
        written.append(float(place.envoy.output.abs().max()))
    return max(written)


def _read_mlp_without_attention(names: Names, rows: int) -> torch.Tensor:
    place = names.place("attn_out", 0, rows)
    place.set(torch.zeros_like(place.get()))
    return names.place("mlp_out", 0, rows).get().clone()


def find_names(nn, config, trace) -> Names:
    """The names for a model: its own row, or for a family without one the first row that passes the check.

    Raises:
        ValueError: naming what is missing when no row fits.
    """
    kind = config.model_type
    tried = [ROWS[kind]] if kind in ROWS else list(dict.fromkeys(ROWS.values()))
    reasons = {}
    for row in tried:
        try:
            names = Names(nn, config, row)
            names.check(lambda read, names=names: trace(read, names))
        except (AttributeError, ValueError) as error:
            reasons[row] = str(error)
            continue
        if kind in ROWS or "attn_out" not in names.refused:
            return names
    near = difflib.get_close_matches(kind, ROWS, 1)
    likely = ROWS.get(kind) or ROWS[near[0] if near else "llama"]
    missing = reasons.get(likely, "attn_out and mlp_out do not add up to what a block adds")
    if kind in ROWS:
        raise ValueError(f"The row of {kind!r} in workbench/model/names.py does not fit this model; was it built or changed by code of its "
                         f"own? Mend its module paths in ROWS. What was missing: {missing}")  # fmt: skip
    raise ValueError(
        f"The architecture {kind!r} has no row in workbench/model/names.py and none fits{f' (near: {near[0]})' if near else ''}. "
        f"Add a row to ROWS with its module paths. What was missing: {missing}"
    )
