"""What is changed, and where: components with their positions in each prompt, and prompts that share a batch."""

from __future__ import annotations

import numpy as np

from workbench.component import KINDS, Component, components
from workbench.model.names import INSIDE, MIXTURE
from workbench.model.sweep import Cell
from workbench.task import Pairs

STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
PATCHABLE = (*STREAM, "z", "neuron", "feature", *INSIDE, *MIXTURE)

TOKENS_KEPT = 1024  # tokens of runs of which everything is kept: far more than a pass needs, so fewer than in a pass


def batches(pairs: Pairs, copies: int = 2, budget: int = TOKENS_KEPT) -> list[list[int]]:
    """Prompts of similar length share a batch of `budget` tokens, when each of them is held `copies` times."""
    lengths = [len(ids) for ids in pairs.clean]
    found: list[list[int]] = []
    for length in sorted(set(lengths)):
        alike = [i for i, own in enumerate(lengths) if own == length]
        most = max(1, budget // (copies * length))
        for part in np.array_split(alike, -(-len(alike) // most)):  # evenly: nulls need others of the same length
            if found and (len(found[-1]) + len(part)) * copies * length <= budget:
                found[-1].extend(part.tolist())
            else:
                found.append(part.tolist())
    return found


def cells_of(model, pairs: Pairs, at, positions=None) -> tuple[list[Component], list[Cell], dict]:
    """The components that `at` names, with their cells, and token text for their positions.

    Raises:
        ValueError: for a component that cannot be changed or is out of range, or positions that are not there.
    """
    lengths = [len(ids) for ids in pairs.clean]
    if not (positions in (None, "each", "all") or (isinstance(positions, (list, tuple)) and positions)):
        raise ValueError(f"positions={positions!r} is unknown; use 'each', 'all' or a list such as [4, -1, 'subject'].")
    found: dict[tuple, Component] = {}
    for given in [at] if isinstance(at, (str, Component)) else at:
        (family,) = components(given)
        _refuse(model.names, family)
        each = positions or ("each" if given in KINDS and KINDS[family.kind][0] is None else "all")
        places = [family.position]
        if family.position is None and each != "all":
            places = _places(pairs, lengths) if each == "each" else list(each)
        elif family.position is not None and positions is not None:
            raise ValueError(f"{family} names its position already; leave out positions={positions!r}.")
        for one in model.names.expand([family]):
            for order, place in enumerate(places):
                found.setdefault((one.at(None), order, str(place)), one.at(place))
    ordered = [one for _, one in sorted(found.items())]
    cells = [Cell({one: [resolve(one, pairs, i) for i in range(len(lengths))]}) for one in ordered]
    return ordered, cells, labels_of(model, pairs, {one.position for one in ordered})


def _refuse(names, family: Component) -> None:
    if family.kind not in PATCHABLE:
        raise ValueError(f"{family} cannot be patched; kinds are {', '.join(PATCHABLE)}.")
    names.validate(family)
    needed = {"z": "attn_out", "neuron": "mlp_out"}.get(family.kind)
    if needed in names.refused:
        raise ValueError(f"{family} cannot be patched here: {names.refused[needed]}")
    if family.kind == "feature":
        sae = names.saes[family.name]
        for place in (sae.at, sae.source):
            if place.kind not in (*STREAM, "mlp_in") or place.index is not None:
                raise ValueError(
                    f"{family} cannot be patched: its SAE is at {place}; it must be at one of {', '.join(STREAM)}."
                )


def _places(pairs: Pairs, lengths: list[int]) -> list:
    """Every position where all prompts are equally long; else the spans that all rows name; else from the right."""
    if len(set(lengths)) == 1:
        return list(range(lengths[0]))
    shared = [name for name in pairs.spans[0] if all(name in row for row in pairs.spans)]
    if shared:
        return sorted(shared, key=lambda name: np.mean([row[name][0] - n for row, n in zip(pairs.spans, lengths)]))
    return list(range(-min(lengths), 0))


def refuse_window(window) -> None:
    """A window of layers holds the layer itself at least."""
    if window is not None and not window >= 1:
        raise ValueError(f"window={window!r} layers are none; give 1 or more, or None for the default.")


def window_of(layer: int, wide: int, layers: int) -> list[int]:
    """`wide` layers around one, as many of them as there are."""
    return list(range(max(0, layer - (wide - 1) // 2), min(layers, layer + wide // 2 + 1)))


def resolve(component: Component, pairs: Pairs, i: int) -> list[int]:
    """The positions of a component in prompt i."""
    place, length = component.position, len(pairs.clean[i])
    if place is None:
        return list(range(length))
    if isinstance(place, str):
        if place not in pairs.spans[i]:
            known = ", ".join(pairs.spans[i]) or "none"
            raise ValueError(f"{component}: row {i} of the task names no span {place!r}; its spans: {known}.")
        return pairs.spans[i][place]
    if not -length <= place < length:
        raise ValueError(f"{component}: position {place} is out of range; row {i} has {length} tokens (0 to {length - 1}, "
                         f"or -1 to {-length}).")  # fmt: skip
    return [place % length]


def labels_of(model, pairs: Pairs, places: set) -> dict:
    """Token text for each position: 'tired/happy' where the sides differ, '·' where the prompts disagree."""
    labels = {}
    for place in places:
        if isinstance(place, int):
            sides = [{int(ids[place]) for ids in side} for side in (pairs.clean, pairs.corrupted)]
            if all(len(seen) == 1 for seen in sides):
                labels[place] = "/".join(dict.fromkeys(model.token(seen.pop()) for seen in sides))
            else:
                labels[place] = "·"
    return labels
