"""Features of attached SAEs along one forward pass: read, and changed as x <- x + (f' - f) W_dec, the error term kept."""

from __future__ import annotations

from dataclasses import replace

import torch

from workbench.component import Component
from workbench.model.names import Names, first
from workbench.sae import SAE

PLACES = ("embed", "resid_pre", "z", "attn_out", "resid_mid", "neuron", "mlp_out", "resid_post", "ln_final", "mlp_in")


def attach(model, sae: SAE, name: str | None = None) -> SAE:
    """Make `feature.NAME.77` an address of this model; `Model.attach` says how.

    Returns:
        The SAE as it is attached: under this name, on the model's device.
    """
    names = model.names
    sae = replace(sae, name=name) if name else sae
    if sae.name in names.saes:
        raise ValueError(f"There is an SAE {sae.name!r} attached already. model.detach({sae.name!r}) first, or attach this "
                         f"one under another name: model.attach(sae, '{sae.name}_2').")  # fmt: skip
    if sae.fingerprint not in ("", model.fingerprint):
        raise ValueError(f"The SAE {sae.name!r} was trained on model {sae.fingerprint}, this one is {model.fingerprint}. "
                         "To use it anyway: dataclasses.replace(sae, fingerprint='').")  # fmt: skip
    for place, width in ((sae.source, sae.d_in), (sae.at, len(sae.b_dec))):
        if place.kind not in PLACES or place.layer == "*" or place.position is not None:
            raise ValueError(
                f"{sae!r}: a dictionary belongs to one tensor, for example at='resid_post.3'; got {place}."
            )
        if place.kind == "mlp_in":
            if names.row.mlp_in is None or not 0 <= place.layer < names.n_layers:
                raise ValueError(f"{sae!r}: this model has no single FFN input at layer {place.layer}.")
        else:
            names.validate(place)
        if width != (has := _width(names, place)):
            raise ValueError(f"{sae!r} does not fit: {place} is {has} wide here, the SAE expects {width}.")
    if sae.before_gain:
        sae = _after_gain(model, sae)
    names.saes[sae.name] = sae.to(model.hf.device)
    return names.saes[sae.name]


def detach(model, name: str | None = None) -> None:
    """Take an attached SAE off the model (all of them without a name)."""
    if name is not None and name not in model.names.saes:
        raise ValueError(f"No SAE {name!r} is attached. Attached: {', '.join(model.names.saes) or 'none'}.")
    for one in [name] if name is not None else list(model.names.saes):
        del model.names.saes[one]


def read(names: Names, at: Component, rows: int) -> torch.Tensor:
    """Inside a trace: the tensor that an SAE works on, [row, position, width]."""
    if at.kind == "resid_mid":
        pre = names.place("resid_pre", at.layer, rows).get()
        return pre + names.place("attn_out", at.layer, rows).get()
    return _view(names, names.place(at.kind, at.layer, rows).get(), at)


def write(names: Names, at: Component, rows: int, make) -> None:
    """Inside a trace: the tensor that an SAE works on becomes `make(it)`."""
    kind = "attn_out" if at.kind == "resid_mid" else at.kind
    pre = names.place("resid_pre", at.layer, rows).get() if at.kind == "resid_mid" else None
    place = names.place(kind, at.layer, rows)
    value = place.get()
    x = value if pre is None else pre + value
    old = _view(names, x, at)
    place.set(_added(names, value, at, (make(old) - old).to(value.dtype)))


def skip_after(names: Names, at: Component) -> None:
    """Inside a trace: leave out the blocks after a component, when only what comes before is wanted."""
    if at.layer is None:
        return
    x = first(names.layers[at.layer].output)
    for layer in range(at.layer + 1, names.n_layers):
        names.layers[layer].skip(names.block_value(x))


class Features:
    """The features that one run reads or changes. Changes at one place start from the same x and are added up.

    Args:
        edits: SAE name -> changes (`plan.Change`), in the order given.
        read: components, of which those of kind feature are read.
    """

    def __init__(self, names: Names, edits: dict[str, list], read):
        self.names, self.edits = names, edits
        wanted: dict[str, set] = {}
        for one in [
            *(c for own in edits.values() for change in own for c in change.components),
            *(c for c in read if c.kind == "feature"),
        ]:
            wanted.setdefault(one.name, set()).add(one.index)
        self.indices = {name: sorted(own) for name, own in wanted.items()}
        self.x: dict[str, torch.Tensor] = {}
        self.f: dict[str, torch.Tensor] = {}

    def visit(self, site, value: torch.Tensor, pre, step: int, mask) -> tuple[torch.Tensor, bool]:
        """At one site of the pass: encode what is read here, change what is changed here.

        Args:
            value: the site's tensor, after all other interventions; pre: the stream before it, for resid_mid.
            mask: (change, value, step) -> [row, column, 1], or None where it does not act.
        Returns:
            (the tensor, whether it changed).
        """
        old = value
        for name, indices in self.indices.items():
            sae = self.names.saes[name]
            if _site(sae.source) == site:
                self.x[name] = _view(self.names, old if sae.source.kind != "resid_mid" else pre + old, sae.source)
                self.f[name] = sae.encode(self.x[name], indices)
            if _site(sae.at) != site:
                continue
            before, after, changed = self.f[name], self.f[name].clone(), False
            where = {index: i for i, index in enumerate(indices)}
            for change in self.edits.get(name, []):
                acts = mask(change, value, step)
                if acts is not None:
                    own = [where[one.index] for one in change.components]
                    f = after[..., own].unsqueeze(-1)
                    new = change.intervention.changes(f, list(change.components.values())).to(f.dtype)
                    after[..., own] = torch.where(acts[..., None], new, f).squeeze(-1)
                    changed = True
            if changed:
                difference = sae.change(after - before, self.x[name], indices).to(value.dtype)
                value = _added(self.names, value, sae.at, difference)
                self.f[name] = after
        return value, value is not old

    def value(self, component: Component) -> torch.Tensor:
        """A feature as this run has it, changes included: [row, position, 1]."""
        i = self.indices[component.name].index(component.index)
        return self.f[component.name][..., i : i + 1]

    def slope(self, gradient: torch.Tensor, component: Component) -> torch.Tensor:
        """The gradient with respect to a feature, from that at its SAE's place: [row, position, 1]."""
        sae = self.names.saes[component.name]
        return sae.slope(_view(self.names, gradient, sae.at), self.x[component.name], [component.index])


def _site(at: Component) -> tuple:
    one = at.canonical
    return ("attn_out" if one.kind == "resid_mid" else one.kind), one.layer


def _view(names: Names, value: torch.Tensor, at: Component) -> torch.Tensor:
    if not isinstance(at.index, int):
        return value
    width = value.shape[-1] // names.size(at.kind)
    return value[..., at.index * width : (at.index + 1) * width]


def _added(names: Names, value: torch.Tensor, at: Component, difference: torch.Tensor) -> torch.Tensor:
    if not isinstance(at.index, int):
        return value + difference
    value = value.clone()
    _view(names, value, at).add_(difference)
    return value


def _width(names: Names, place: Component) -> int:
    if place.kind == "z":
        return names.d_head * (1 if isinstance(place.index, int) else names.n_heads)
    return 1 if isinstance(place.index, int) else {"neuron": names.d_mlp}.get(place.kind, names.d_model)


def _after_gain(model, sae: SAE) -> SAE:
    """The same transcoder for what the FFN is given here, the norm's gain and bias folded into its encoder."""
    names, layer = model.names, sae.reads.layer
    norm = names.norm("norm_mlp", layer)
    if norm is None:
        return replace(sae, before_gain=False)
    gain = norm.weight.detach().float().cpu()
    gain = 1 + gain if "Gemma" in type(norm).__name__ else gain  # Gemma stores what is added to 1
    bias = getattr(norm, "bias", None)
    W_enc = sae.W_enc / gain[:, None]
    b_enc = sae.b_enc if bias is None else sae.b_enc - bias.detach().float().cpu() @ W_enc
    return replace(sae, W_enc=W_enc, b_enc=b_enc, before_gain=False)
