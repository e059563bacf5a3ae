"""One pass over prompts, with everything kept that patches of it need."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from workbench.component import Component
from workbench.model.names import INSIDE, MIXTURE, Names
from workbench.model.plan import Prompts
from workbench.model.run import Model


@dataclass
class Run:
    """One pass over prompts, lined up at their ends; or activations to take, from wherever they come.

    Attributes:
        ids, mask: [prompt, column], mask 0 left of the prompt. marks: where two runs have equal ones, they had equal inputs.
        acts: site -> [prompt, column, width], for features ("feature", name) -> those of `features[name]`.
        keys, values: per layer [prompt, head, column, d_head]. logits: [prompt, d_vocab], last position.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    marks: torch.Tensor
    acts: dict
    keys: list
    values: list
    logits: torch.Tensor
    features: dict[str, list[int]] = field(default_factory=dict)

    def rows(self, part: slice) -> Run:
        """The same run for some of its prompts."""
        return Run(self.ids[part], self.mask[part], self.marks[part], {k: v[part] for k, v in self.acts.items()},
                   [k[part] for k in self.keys], [v[part] for v in self.values], self.logits[part], self.features)  # fmt: skip

    def with_acts(self, acts: dict) -> Run:
        """Other activations in the same places: to take from, for an ablation."""
        return Run(self.ids, self.mask, torch.full_like(self.marks, -1), acts, [], [], self.logits, self.features)

    @property
    def pads(self) -> list[int]:
        """How many columns are left of each prompt."""
        return (self.mask == 0).sum(1).tolist()

    def value(self, names: Names, kind: str, layer: int) -> torch.Tensor:
        """Any site of the stream or a block, [prompt, column, width]."""
        if kind == "resid_mid":
            return self.acts["resid_pre", layer] + self.acts["attn_out", layer]
        if kind == "resid_post" and layer + 1 < names.n_layers:
            return self.acts["resid_pre", layer + 1]
        return self.acts[kind, layer]


def capture(model: Model, prompts, found, *, sites=(), noise=None) -> Run:
    """Run prompts once and keep what changing the given components needs.

    Args:
        prompts: a list of ids; found: components. sites: further (kind, layer) to keep.
        noise: [prompt, column, d_model], added to the embeddings.
    Raises:
        ValueError: when activations are not finite, naming the place.
    """
    nn, names, key, prompts = model.nnsight, model.names, model.cache_key, Prompts(prompts)
    batch, features = model.inputs(prompts), {}
    wanted = {("resid_pre", layer) for layer in range(names.n_layers)} | {("resid_post", names.n_layers - 1), *sites}
    for one in found:
        at = names.saes[one.name].at if one.kind == "feature" else one
        if one.kind == "feature":
            features.setdefault(one.name, set()).add(one.index)
            reads = names.saes[one.name].source
            wanted.add(("attn_out" if reads.kind == "resid_mid" else reads.canonical.kind, reads.canonical.layer))
        elif one.kind in ("z", "neuron", "mlp_out", *INSIDE, *MIXTURE):
            wanted.add(one.site)
        if at.kind in ("resid_mid", "attn_out") or (at.kind == "z" and not names.parallel):
            wanted.add(("attn_out", at.layer))
    rows, order = len(prompts.ids), sorted(wanted, key=in_order)

    def read():
        if noise is not None:
            place = names.place("embed", None, rows)
            place.set(place.get() + noise)
        acts = {}
        for site in order:
            acts[site] = names.place(*site, rows).get().clone()
        out = nn.output
        layers = getattr(out, key).layers
        return acts, [one.keys for one in layers], [one.values for one in layers], out.logits[:, -1].float()

    # a cache made without the config keeps every position, also where attention slides
    acts, keys, values, logits = model.trace(batch, read, logits_to_keep=1, **{key: DynamicCache(), "use_cache": True})
    for (kind, layer), x in acts.items():
        if not torch.isfinite(x).all():
            prompt = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"Activations are not finite (NaN or infinite) at {Component(kind, layer)}, prompt {prompt}: "
                             "check the weights, or load the model in float32.")  # fmt: skip
    run = Run(
        batch["input_ids"].cpu(), batch["attention_mask"].cpu(), batch["input_ids"].cpu(), acts, keys, values, logits
    )
    for name, indices in features.items():
        run.features[name], sae = sorted(indices), names.saes[name]
        acts["feature", name] = sae.encode(read_by(names, run, sae), run.features[name])
    return run


def stream_at(names: Names, run: Run, layer: int, stage: str, prompts, start: int) -> torch.Tensor:
    """The run's stream before block `layer`, or between its attention and FFN, from column `start` on."""
    if stage == "mid":
        return run.value(names, "resid_mid", layer)[prompts, start:]
    return run.value(names, *(("resid_pre", layer) if layer < names.n_layers else ("resid_post", layer - 1)))[
        prompts, start:
    ]


def read_by(names: Names, run: Run, sae) -> torch.Tensor:
    """What an SAE encodes, [prompt, column, width]."""
    return run.value(names, sae.source.kind, sae.source.layer)


def span(names: Names, one: Component, width: int) -> slice:
    """Where a component's own numbers are in its site, which is `width` wide."""
    unit = width // (names.size(one.kind) or 1)
    return slice(one.index * unit, (one.index + 1) * unit) if isinstance(one.index, int) else slice(None)


def in_order(site: tuple) -> Component:
    """A key that sorts sites as a forward pass meets them; "mlp_in" is what the FFN is given."""
    return Component("router" if site[0] == "mlp_in" else site[0], site[1])
