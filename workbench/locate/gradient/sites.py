"""Which numbers belong to which component: selection of components, and their effects from whole sites."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from workbench.component import KINDS, Component, components
from workbench.locate.causal.places import cells_of
from workbench.locate.gradient.passes import Site
from workbench.model.names import Names
from workbench.model.plan import Prompts

Group = tuple[str, int | None, str | None]  # kind, layer, SAE


@dataclass
class Selection:
    """Components by the site they live in.

    Attributes:
        found: components in forward order. labels: position -> token text.
        members: (kind, layer, SAE) -> [(row in `found`, index or None, number of its place)].
        places: for each place (all positions, a number, a span) the positions it has in each prompt.
    """

    found: list[Component]
    labels: dict
    members: dict[Group, list] = field(default_factory=dict)
    places: list[list[list[int]]] = field(default_factory=list)

    def masks(self, group: list[int], prompts: Prompts, device) -> torch.Tensor:
        """[place, row, column], 1 where a place is, for the prompts of one batch."""
        mask = np.zeros((len(self.places), len(group), prompts.width), dtype=np.float32)
        for place, positions in enumerate(self.places):
            for row, i in enumerate(group):
                mask[place, row, [prompts.pads[row] + p for p in positions[i]]] = 1
        return torch.from_numpy(mask).to(device)

    def used(self, group: Group) -> list[int]:
        """The numbers of the places that a group's components have."""
        return sorted({place for _, _, place in self.members[group]})

    def put(self, into: np.ndarray, prompts: list[int], group: Group, effects: torch.Tensor) -> None:
        """Write [draw, place as in `used`, prompt, unit] of one group into [draw, component, prompt]."""
        rows, units, places = (np.array(part) for part in zip(*((r, u or 0, p) for r, u, p in self.members[group])))
        places = np.searchsorted(self.used(group), places)
        into[:, rows[:, None], prompts] = effects.cpu().numpy()[:, places, :, units].transpose(1, 0, 2)


def select(model, pairs, at, positions=None) -> Selection:
    """The components that `at` names, as `causal.patch` understands it, grouped by site.

    Raises:
        ValueError: as `causal.patch` does.
    """
    found: dict[Component, dict] = {}
    labels, places = {}, {}
    for given in [at] if isinstance(at, (str, Component)) else at:
        (family,) = components(given)
        members = model.names.expand([family.at(None)])
        free = "each" if given in KINDS and KINDS[family.kind][0] is None else "all"
        where = positions if family.position is not None else positions or free
        # of one member: all have the same positions
        _, cells, more = cells_of(model, pairs, members[0].at(family.position), where)
        own = {component.position: columns for cell in cells for component, columns in cell.parts.items()}
        labels, places = labels | more, places | own
        for member in members:
            found.setdefault(member, {}).update(own)
    number = {place: i for i, place in enumerate(places)}
    selection = Selection([], labels, {}, list(places.values()))
    for member in sorted(found):
        group = selection.members.setdefault((member.kind, member.layer, member.name), [])
        for place in found[member]:
            group.append((len(selection.found), member.index, number[place]))
            selection.found.append(member.at(place))
    return selection


def site_of(names: Names, kind: str, layer: int | None) -> Site:
    """The tensor that a kind is read from: the stream after a block is the stream before the next."""
    if kind == "resid_post" and layer + 1 < names.n_layers:
        return "resid_pre", layer + 1
    return kind, layer


def needs(names: Names, group: Group, qk_fix: bool) -> tuple[set[Site], set[Site]]:
    """(sites whose activations, sites whose slopes) the effects of a group are made of."""
    kind, layer, name = group
    if kind == "feature":
        read, written = ((at.kind, at.layer, None) for at in (names.saes[name].source, names.saes[name].at))
        return needs(names, read, False)[0], needs(names, written, False)[1]
    if kind == "resid_mid":  # resid_pre + attn_out; its slope arrives at what attention writes
        return {("resid_pre", layer), ("attn_out", layer)}, {("attn_out", layer)}
    if kind in ("q", "k") and qk_fix:
        return {("q", layer), ("k", layer), ("attn_scores", layer), ("pattern", layer)}, {("pattern", layer)}
    site = site_of(names, kind, layer)
    return {site}, {site}


def value(names: Names, acts: dict, kind: str, layer: int | None) -> torch.Tensor:
    """What is at a component's site, [row, column, width]."""
    if kind == "resid_mid":
        return acts["resid_pre", layer] + acts["attn_out", layer]
    return acts[site_of(names, kind, layer)]


def slope(names: Names, slopes: dict, kind: str, layer: int | None) -> torch.Tensor:
    return slopes["attn_out", layer] if kind == "resid_mid" else slopes[site_of(names, kind, layer)]
