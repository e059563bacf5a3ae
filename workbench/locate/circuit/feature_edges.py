"""Edges into and out of the features of one stream: the graph of a circuit with a dictionary in the middle."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch

from workbench.component import Component
from workbench.locate.causal.null import donors, draws_of, partners
from workbench.locate.causal.patching import reader
from workbench.locate.circuit.attribution import both, eap, eap_ig, groups, null_of, scored
from workbench.locate.circuit.edge import Edge
from workbench.locate.circuit.features import attached
from workbench.locate.circuit.graph import COLUMNS, Circuit
from workbench.model.edges import Code, attribution, slope, wiring
from workbench.task import Task


def feature_edges(model, task: Task, nodes, *, steps: int = 10, metric="logit_diff", null: bool = True,
                  seed: int = 0) -> Circuit:  # fmt: skip
    """Which heads and FFNs write these features, and which read them? The stream that an SAE takes apart is cut there.

    What is offered: one SAE on the stream between two blocks (resid_pre or resid_post), with edges

    - from the embedding, heads and FFNs before it into each feature: sum over positions of (write_clean -
      write_corrupted) . W_enc[:, j] * s_j * g_j, with g_j = w_j . dm/dx and s_j the share of the way from corrupted to
      clean on which the feature fires, which is the encoder's derivative;
    - into the error term: the same with what is left, dm/dx - sum of s_j g_j W_enc[:, j] over all features, so that a
      source's edges into all features and the error add up to its effect on the whole site;
    - from features and the error term to every query, key, value, FFN and the logits behind it: (f_clean - f_corrupted)
      w_j . (gradient at what the target reads); over all targets they add up to the score that `nodes` gives;
    - among heads and FFNs on one side of the SAE, as `eap_ig` scores them.

    Edges past the SAE, from before to behind, are left out: they are what the features and the error term stand for. There
    are no edges between features, none inside an FFN or attention block (SAEs at mlp_out, attn_out, resid_mid), and no run
    in which single edges of a feature are switched: `keep` evaluates the nodes.

    Args:
        task: pairs, or the name of a bundled task.
        nodes: components, or scores of `nodes` cut down with `.top`; its features and error terms are taken.
        steps: gradients on the way from corrupted to clean at the site; 0 takes one, in the clean run.
    Returns:
        A circuit, in units of the metric, with `saes`; `.top(60).plot()` draws it, `.nodes` are its parts.
    Raises:
        ValueError: for nodes without a feature, of several SAEs, or of one at another place.
    Source:
        Marks et al. 2025 (arXiv 2403.19647), appendix A.1, for edges along the direct path through the stream; they take
        both slopes in the clean run alone.
    """
    began, task, wired = time.perf_counter(), Task.of(task), wiring(model)
    ends = sorted({one for one in map(Component.parse, nodes) if one.kind == "feature"})
    (name, sae), layer = _only(model, ends)
    find = eap_ig(model, task, steps=int(steps), metric=metric, null=null, seed=seed) if steps else eap(
        model, task, metric=metric, null=null, seed=seed)  # fmt: skip
    own = [one.index for one in ends if one.index != "error"]
    before = 1 + layer * (model.names.n_heads + 1)
    behind = [t for t, target in enumerate(wired.targets) if target.kind == "logits" or target.layer >= layer]
    known = [len(ends) if t in set(behind) else 0 for t in range(len(wired.targets))]
    alphas = [(k + 0.5) / steps for k in range(int(steps))] or [1.0]
    pairs, draws = task.on(model), draws_of(null)
    read = reader(pairs, metric)
    batches = groups(pairs, wired, model, max(len(alphas), len(ends) // (4 * model.names.n_layers) + 1))
    others = partners(pairs, pairs.corrupted, batches, draws, seed)
    found = np.zeros((1 + draws, len(ends) * (before + len(behind)), len(pairs.clean)))
    for group in batches:
        clean, corrupted = both(model, wired, pairs, group)
        x, base = clean.streams[layer], corrupted.streams[layer]
        values = torch.stack([base + alpha * (x - base) for alpha in alphas])
        gradient = slope(model, clean.prompts, Component("resid_pre", layer), values, x, read(group))
        pushes, errors = _coefficients(sae, values, gradient, own)
        outs, codes = [], [Code(one.float(), one.float(), sae.encode(one.float())) for one in (x, base)]
        for draw in range(1 + draws):
            other = donors(others, group, draw - 1) if draw else None
            write = clean.writes[:before] if draw == 0 else corrupted.writes[:before, other]
            write = write - corrupted.writes[:before]
            into = torch.einsum("srpd,dk,rpk->ksr", write.float(), sae.W_enc[:, own], pushes)
            rest = torch.einsum("srpd,rpd->sr", write.float(), errors)[None]
            into = torch.cat([into, rest]) if ends[-1].index == "error" else into
            found[draw, : len(ends) * before, group] = into.flatten(0, 1).T.cpu().numpy()
            code = codes[0] if draw == 0 else Code(*(one[other] for one in (codes[1].x, codes[1].source, codes[1].f)))
            outs.append(_changes(sae, code, codes[1], ends).to(x.dtype))
        table = attribution(model, wired, clean.prompts, ("resid_pre", layer), values, outs, read(group), known)
        for draw, one in enumerate(table):
            found[draw, len(ends) * before :, group] = one[:, behind].transpose(1, 2).flatten(1).cpu().numpy()
    edges = [Edge(source, end) for end in ends for source in wired.sources[:before]]
    edges += [Edge(end, wired.targets[t]) for end in ends for t in behind]
    under, _ = null_of(found[1:] if draws else None, others)
    mine = scored(wired, found[0], under, "", metric, pairs.task, seed, began, 0, find.why, tuple(edges))
    first, early = {wired.targets[t] for t in behind}, set(wired.sources[:before])
    plain = find.only(np.array([edge.target not in first or edge.source not in early for edge in find]))
    kept = ("scores", "per_prompt", *COLUMNS)
    both_of = {one: np.concatenate([getattr(part, one) for part in (mine, plain)]) for one in kept}
    whole = len(plain) + (sae.d_sae + 1) * (before + len(behind))
    return replace(find, edges=mine.edges + plain.edges, whole=whole, method="circuit.feature_edges", saes={name: str(sae.at)},
                   cost=find.cost + 2 + 4.0 * len(alphas), seconds=time.perf_counter() - began, **both_of)  # fmt: skip


def _only(model, ends: list) -> tuple:
    """The one SAE that these features belong to, and the block that reads its stream."""
    chosen = attached(model, sorted({one.name for one in ends}))
    for one in ends:
        if one.index != "error":
            model.names.validate(one)
    if len(chosen) != 1:
        raise ValueError(f"Give features of one SAE; these nodes have features of {', '.join(chosen) or 'none'}. "
                         "wb.locate.circuit.nodes(model, task).top(40) has some.")  # fmt: skip
    (name, sae), at = *chosen.items(), next(iter(chosen.values())).at
    layer = {"resid_pre": at.layer, "resid_post": (at.layer or 0) + 1}.get(at.kind, model.names.n_layers)
    if sae.reads is not None or sae.normalize != "none" or layer >= model.names.n_layers:
        raise ValueError(f"{sae!r}: edges are offered for an SAE that takes the stream between two blocks apart as it is "
                         "(resid_pre or resid_post, not the last, normalize='none'). For others: wb.locate.circuit.nodes "
                         "and keep.")  # fmt: skip
    return (name, sae), layer


def _coefficients(sae, values, gradient, own: list[int]) -> tuple:
    """(what a push along its encoder does through each of these features [row, position, feature], what any push does
    through the error term [row, position, d_model])."""
    fires = torch.stack([(sae.encode(x.float()) > 0).float() for x in values]).mean(0)
    pushes = fires * sae.slope(gradient, values[0])
    return pushes[..., own], gradient - pushes @ sae.W_enc.T


def _changes(sae, code: Code, base: Code, ends: list) -> torch.Tensor:
    """What each of these terms writes in one run beyond another, [term, row, position, d_model]."""
    own = [one.index for one in ends if one.index != "error"]
    parts = (code.f - base.f)[..., own].movedim(-1, 0)[..., None] * sae.W_dec[own][:, None, None]
    error = (code.error(sae) - base.error(sae))[None]
    return torch.cat([parts, error]) if ends[-1].index == "error" else parts
