"""Facts edited in closed form: ROME, MEMIT, AlphaEdit."""

from __future__ import annotations

import weakref

import torch

from workbench.component import Component
from workbench.locate.features.tokens import activations, at_place, known, texts
from workbench.model import Prompts
from workbench.model.edit import edited
from workbench.operations import Delta
from workbench.steer.optimization.requests import layout, read_edits, texts_about
from workbench.steer.optimization.values import sites, target_values
from workbench.task import Task

MOMENTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> (layer, text, tokens) -> C


# the formulas, for keys as columns K [d_mlp, n] and what is to be added to their outputs, R [d_model, n]


def rome_update(key: torch.Tensor, add: torch.Tensor, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least change, in the metric of C, with (W + change) k = W k + add: factors add/(u k) and u = C^-1 k.

    Source:
        Meng et al. 2022, eq. 2. The same key stands in both factors (Gupta et al. 2024, "Rebuilding ROME").
    """
    u = torch.linalg.solve(moment.double(), key.double())
    return (add.double() / (u @ key.double()))[:, None], u[None]


def memit_update(keys: torch.Tensor, add: torch.Tensor, moment: torch.Tensor, weight: float) -> tuple:
    """R K^T (weight C + K K^T)^-1 as factors R and K^T (...)^-1. Source: Meng et al. 2023, eq. 14."""
    keys = keys.double()
    u = torch.linalg.solve(moment.double(), keys)  # (weight + K^T C^-1 K)^-1 K^T C^-1 is the same, and well conditioned
    return add.double(), torch.linalg.solve(keys.T @ u + weight * torch.eye(keys.shape[1]).to(keys), u.T)


def alphaedit_update(keys, add, project, previous=None, ridge: float = 0.0) -> tuple:
    """R K^T P (K_p K_p^T P + K K^T P + ridge I)^-1 as factors: nothing changes outside the space that P projects on.

    Source: Fang et al. 2025, eq. 13; solved as in their code, (P (K K^T + K_p K_p^T) + ridge I) change^T = P K R^T.
    """
    keys, add, project = keys.double(), add.double(), project.double()
    seen = keys @ keys.T + (0 if previous is None else previous.double() @ previous.double().T)
    return add, torch.linalg.solve(project @ seen + ridge * torch.eye(len(keys)).to(keys), project @ keys).T


def null_space(moment: torch.Tensor, threshold: float) -> torch.Tensor:
    """The projection on directions whose second moment is below `threshold` times the mean one."""
    values, vectors = torch.linalg.eigh(moment.double())
    free = vectors[:, values < threshold * values.mean()]
    return free @ free.T


def second_moment(model, layer: int, text="background", tokens: int = 20_000) -> torch.Tensor:
    """C = E[k k^T] of what an FFN's output weights read, over tokens of `text`; kept in memory for each model.

    Args:
        text: a text, task, name of a task, or a list of such; of more than `tokens`, texts are drawn at random.
    Raises:
        ValueError: for fewer tokens than neurons, from which C could not be told.
    """
    asked = [one for some in ([text] if isinstance(text, (str, Task)) else text) for one in texts(some)]
    key, kept = (layer, hash(tuple(map(str, asked))), tokens), MOMENTS.setdefault(model, {})
    if key not in kept:
        order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()
        ids = known(model, [asked[i] for i in order])
        ends = torch.tensor([len(one) for one in ids]).cumsum(0)
        x = activations(model, ids[: int((ends < tokens).sum()) + 1], Component("neuron", layer, "*")).double()
        if len(x) < x.shape[1]:
            raise ValueError(
                f"{len(x)} tokens of text do not show how {x.shape[1]} neurons move together: give more text=."
            )
        kept[key] = x.T @ x / len(x)
    return kept[key]


def rome(
    model, edit, at, *, neighbours=(), text="background", tokens: int = 20_000, ridge: float = 1e-4, **values
) -> Delta:
    """What is the smallest change of one FFN's output weights that makes it write what this fact needs? ROME.

    The weights get a change of rank one: the key that stands for the subject (averaged over the prompts) is answered with
    the target value, and keys that are orthogonal to it in the metric of C are answered as before. The model is not
    changed: the result is a `Delta`, to be applied, scaled, saved or baked.

    Args:
        edit: one row {"prompt": text or texts, "subject": ..., "target_new": ...}, or one such pair of a task (its foil
            becomes the answer).
        at: "mlp_out.3@subject" or "mlp_out.5@-1". Where a fact is traced and where it is best edited are different
            questions (Hase et al. 2023): try other layers too.
        neighbours: tasks, or names, of prompts that are like the edit's and should stay: "person_city" when a person's city
            is edited. What the FFN reads there, at the same place, counts in C as much as all other text together; prompts
            about the subject itself are left out. Without it other subjects follow the edit easily, above all at "@-1".
        text, tokens: what C, the second moment of keys, is measured on. ridge: added to C, in mean eigenvalues.
        values: `keep`, `keep_weight`, `prefixes`, `steps`, `lr`, `clamp`, `decay`, `reach`, `progress`; see
            `target_values`.
    Returns:
        Delta of one weight, as two factors; its `history` is a table with what was reached.
    Raises:
        ValueError: for several facts, a site that is no FFN, a target that is not reached.
    Source:
        Meng et al. 2022, "Locating and editing factual associations in GPT".
    """
    layers, site = sites(model, at)
    if (count := len(read_edits(model, edit, site))) > 1 or len(layers) > 1:
        raise ValueError(f"ROME makes one edit in one layer; {count} edits in {len(layers)} layers were given. Use memit or "
                         "alphaedit.")  # fmt: skip
    found, (layer,) = target_values(model, edit, at, **values), layers
    moment = _ridged(_moment(model, found, site, layer, neighbours, text, tokens), ridge)
    factors = rome_update(_keys(model, found.edits, layer)[:, 0], found.delta[0] / model.names.scale, moment)
    return with_history(Delta(weights=_weights(model, layer, factors)), found.history)


def memit(model, edits, at, *, weight: float = 0.02, neighbours=(), text="background", tokens: int = 20_000,
          ridge: float = 1e-4, **values) -> Delta:  # fmt: skip
    """Which change of a few FFNs says many new facts, with least harm to everything else? MEMIT.

    The values are found at the last layer; each layer takes an equal share of what is still missing there.

    Args:
        edits: rows, or a task of pairs, as for `rome`.
        at: one site or several, such as ["mlp_out.2@subject", "mlp_out.3@subject"].
        weight: of C against the keys of the edits: how dear it is to change what other text reads. A single edit gets
            1 / (1 + weight) of what it needs (the reference's 15000 counts tokens and does not carry over); towards 0
            every target is met, and with one edit the result is ROME's.
        neighbours, text, tokens, ridge, values: as for `rome`.
    Returns:
        Delta, with `history`.
    Source:
        Meng et al. 2023, "Mass-editing memory in a transformer", eq. 14 and 20.
    """

    def update(layer, keys, add):
        moment = _ridged(_moment(model, found, site, layer, neighbours, text, tokens), ridge)
        alone = (keys.double() * torch.linalg.solve(moment, keys.double())).sum(0).mean()
        return memit_update(keys, add, moment, weight * float(alone))

    (_, site), found = sites(model, at), target_values(model, edits, at, **values)
    return _spread(model, found, update)


def alphaedit(model, edits, at, *, threshold: float = 0.02, ridge: float = 0.01, neighbours=(), text="background",
              tokens: int = 20_000, **values) -> Delta:  # fmt: skip
    """Which change says new facts and provably leaves alone what FFNs read in other text? AlphaEdit.

    The change is kept inside the directions that other text hardly uses.

    Args:
        edits, at, neighbours, text, tokens, values: as for `memit`.
        threshold: directions with a second moment below it, in mean eigenvalues, count as unused (the reference's is
            absolute and depends on the scale of the model). `history` says how many there are ("free").
        ridge: in units of the mean squared length of the edited keys within these directions.
    Returns:
        Delta, with `history`.
    Source:
        Fang et al. 2025, "AlphaEdit: null-space constrained knowledge editing", eq. 13.
    """
    free = {}

    def update(layer, keys, add):
        project = null_space(_moment(model, found, site, layer, neighbours, text, tokens), threshold)
        free[layer] = int(project.trace().round())
        if not free[layer]:
            raise ValueError(f"Other text uses every direction in layer {layer}: give a threshold above {threshold:g}.")
        return alphaedit_update(keys, add, project, ridge=ridge * float((project @ keys).square().sum(0).mean()))

    (_, site), found = sites(model, at), target_values(model, edits, at, **values)
    made = _spread(model, found, update)
    made.history["free"] = ", ".join(map(str, free.values()))
    return made


def _moment(model, found, site: Component, layer: int, neighbours, text, tokens: int) -> torch.Tensor:
    """C of the text, and as much again of what the FFN reads at the site in prompts about other subjects."""
    moment = second_moment(model, layer, text, tokens)
    named = [neighbours] if isinstance(neighbours, (str, Task)) else list(neighbours or ())
    if not named:
        return moment
    keys = []
    for task in map(Task.of, named):
        pairs = task.on(model)
        prompts = Prompts(pairs.clean, spans=pairs.spans)
        rows = [row["clean"] for row in pairs.task.rows]
        other = [not any(edit.subject and texts_about(edit.subject, [row]) for edit in found.edits) for row in rows]
        done = 0
        for part in prompts.chunks():
            (x,) = at_place(model, part, Component("neuron", layer, "*"))
            keys += [x[row, part.columns(site, row)[-1]] for row in range(len(part.ids)) if other[done + row]]
            done += len(part.ids)
    if not keys:
        raise ValueError("Every row of the neighbours is about an edited subject, so nothing is said about others.")
    near = torch.stack(keys).double()
    near = near.T @ near / len(near)
    return moment + near * (moment.trace() / near.trace())


def _spread(model, found, update) -> Delta:
    """Layer by layer, each on the model with the changes so far; what the layers before have brought is not asked again."""
    last, weights = found.layers[-1], {}
    place = Component("resid_post", last)
    start = _at_sites(model, found.edits, place)
    for number, layer in enumerate(found.layers):
        with edited(model, *([Delta(weights=weights)] if weights else [])):
            missing = found.delta.double() - (_at_sites(model, found.edits, place) - start)
            keys = _keys(model, found.edits, layer)
        share = missing / (len(found.layers) - number) / model.names.scale
        weights |= _weights(model, layer, update(layer, keys, share.T))
    return with_history(Delta(weights=weights), found.history)


def _keys(model, edits, layer: int) -> torch.Tensor:
    """What the FFN's output weights read at the site, the mean over the prompts of each edit: [d_mlp, edit]."""
    return _at_sites(model, edits, Component("neuron", layer, "*")).T


def _at_sites(model, edits, component: Component) -> torch.Tensor:
    """Activations at the site, the mean over the prompts of each edit: [edit, width]."""
    prompts, owner, kept = layout(edits, list(range(len(edits))))
    total, done = None, 0
    for part in prompts.chunks():
        (x,) = at_place(model, part, component)
        total = torch.zeros(len(edits), x.shape[-1], dtype=torch.float64) if total is None else total
        for row, spans in enumerate(part.spans):
            if not kept[done + row]:
                i = owner[done + row]
                total[i] += x[row, part.pads[row] + spans["site"][0]].double() / len(edits[i].prompts)
        done += len(part.ids)
    return total


def _weights(model, layer: int, factors) -> dict[str, torch.Tensor]:
    """The change of an FFN's output weights, given as [d_model, n] and [n, d_mlp], under the parameter's name."""
    names = model.names
    module = f"{names.row.layers}.{layer}.{names.row.neurons}"
    left, right = factors
    if not isinstance(model.hf.get_submodule(module), torch.nn.Linear):  # GPT-2 keeps [in, out]
        left, right = right.T, left.T
    if left.shape[1] * 2 > min(left.shape[0], right.shape[1]):
        return {f"{module}.weight": (left @ right).float()}
    return {f"{module}.weight.left": left.float(), f"{module}.weight.right": right.float()}


def _ridged(moment: torch.Tensor, ridge: float) -> torch.Tensor:
    return moment + ridge * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)


def with_history(made, rows: list[dict]):
    """The same value with what happened while it was made, as a table in `.history` (not saved with it)."""
    import pandas as pd

    object.__setattr__(made, "history", pd.DataFrame(rows))
    return made
