"""Sites taken apart by SAEs: what each feature and the error term add to a tensor, in ordinary runs, along a path between
two runs, and in runs in which most of them are exchanged.

At the place of an SAE, x = sum of f_j w_j + e, with w_j = scale * W_dec[j] and e all that no feature writes (b_dec in it).
Heads (z) and FFNs (mlp_out) that no SAE takes apart are sites of one or several parts as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.component import Component
from workbench.model.features import _added as added
from workbench.model.features import _view as view
from workbench.model.names import Names
from workbench.model.plan import Prompts
from workbench.model.run import Model
from workbench.sae import SAE


@dataclass
class Code:
    """What an SAE makes of one run: x [row, position, width] at its place, what it encoded, f [row, position, d_sae]."""

    x: torch.Tensor
    source: torch.Tensor
    f: torch.Tensor

    def parts(self, sae: SAE, which=None) -> torch.Tensor:
        """What the features of a mask [d_sae] (all, without one) add up to, [row, position, width]."""
        return sae.change(self.f if which is None else self.f * which, self.source)

    def error(self, sae: SAE) -> torch.Tensor:
        """What no feature writes, [row, position, width]."""
        return self.x - self.parts(sae)


def order(at: Component) -> Component:
    """For sorting places in forward order; `mlp_in`, what an FFN is given, is no component."""
    return Component("router" if at.kind == "mlp_in" else at.kind, at.layer)


def whole(at: Component) -> Component:
    """The tensor that a place lies in: all heads of a layer, all of a stream."""
    return Component(at.kind, at.layer)


def visit(names: Names, rows: int, sites, see) -> None:
    """Inside a trace: at each site in forward order, `see(site, x [row, position, width])` looks, and returns what x shall
    be, or None to leave it."""
    for site in sorted(set(sites), key=order):
        pre = names.place("resid_pre", site.layer, rows).get() if site.kind == "resid_mid" else None
        place = names.place("attn_out" if site.kind == "resid_mid" else site.kind, site.layer, rows)
        value = place.get()
        x = value if pre is None else pre + value
        new = see(site, x)
        if new is not None:
            place.set((new if pre is None else new - pre).to(value.dtype))


def sites_of(sae: SAE) -> set[Component]:
    return {whole(sae.source), whole(sae.at)}


def look(model: Model, prompts: Prompts, sites, saes: dict) -> tuple[dict, dict, torch.Tensor]:
    """One ordinary run: (site -> x, SAE name -> its Code, logits at the last position [row, d_vocab])."""
    names, rows = model.names, len(prompts.ids)
    wanted = set(sites).union(*map(sites_of, saes.values()))

    def body():
        seen = {}
        visit(names, rows, wanted, lambda site, x: seen.update({site: x.clone()}))
        return seen, names.nn.output.logits[:, -1].float().clone()

    seen, logits = model.trace(model.inputs(prompts), body, logits_to_keep=1)
    codes = {}
    for name, sae in saes.items():
        source, x = (view(names, seen[whole(at)], at).float() for at in (sae.source, sae.at))
        codes[name] = Code(x, source, sae.encode(source))
    return seen, codes, logits


def slope(model: Model, prompts: Prompts, site: Component, values: torch.Tensor, stream, read) -> torch.Tensor:
    """The metric's gradient at a site, averaged over runs with the site set to each of several values.

    Args:
        values: [value, row, position, width]. stream: what the site's block reads, [row, position, d_model]: the blocks
            before are not run. read: (logits [row, d_vocab], row numbers) -> [row], the metric.
    Returns:
        [row, position, width]
    """
    names, (many, rows) = model.names, values.shape[:2]
    repeated = Prompts(prompts.ids * many)
    repeated.width, repeated.pads = prompts.width, prompts.pads * many
    leaf, begin = values.flatten(0, 1).detach().requires_grad_(True), stream.repeat(many, 1, 1)

    def body():
        with torch.enable_grad():
            for below in range(site.layer):
                names.layers[below].skip(names.block_value(begin))
            names.layers[site.layer].input = begin
            visit(names, many * rows, [site], lambda _, x: leaf)
            value = read(names.nn.output.logits[:, -1].float(), torch.arange(rows).repeat(many))
            return torch.autograd.grad(value.sum(), leaf)[0]

    found = model.trace(model.inputs(repeated), body, logits_to_keep=1, use_cache=False)
    return found.float().unflatten(0, (many, rows)).mean(0)


@dataclass
class Swap:
    """What is exchanged at the sites of one run; what is kept is what this very run has.

    Attributes:
        features: SAE name -> mask [d_sae] of those that are not kept. errors: SAEs whose error term is not kept.
        parts: site (z, mlp_out) -> numbers of its parts that are not kept.
        rest: SAE name or site -> what comes instead, [row, position, width]; of an SAE the sum of what is not kept.
    """

    features: dict
    errors: set
    parts: dict
    rest: dict


def swapped(model: Model, prompts: Prompts, saes: dict, swap: Swap) -> torch.Tensor:
    """Logits at the last position [row, d_vocab] of the run with everything exchanged that is not kept."""
    names, rows = model.names, len(prompts.ids)
    sites = set(swap.parts).union(*(sites_of(saes[name]) for name in swap.features))

    def body():
        seen = {}

        def see(site, x):
            seen[site], new = x, None
            for name, off in swap.features.items():
                sae = saes[name]
                if whole(sae.at) == site:
                    source, own = (view(names, seen[whole(at)], at).float() for at in (sae.source, sae.at))
                    f = sae.encode(source)
                    gone = sae.change(f * off, source)
                    if name in swap.errors:
                        gone = gone + own - sae.change(f, source)
                    new = added(names, x if new is None else new, sae.at, (swap.rest[name] - gone).to(x.dtype))
            if site in swap.parts:
                new = (x if new is None else new).clone()
                new = new.unflatten(-1, (names.size(site.kind) or 1, -1))
                rest = swap.rest[site].unflatten(-1, new.shape[-2:])
                new[..., swap.parts[site], :] = rest[..., swap.parts[site], :].to(x.dtype)
                new = new.flatten(-2)
            return new

        visit(names, rows, sites, see)
        return names.nn.output.logits[:, -1].float().clone()

    return model.trace(model.inputs(prompts), body, logits_to_keep=1)
