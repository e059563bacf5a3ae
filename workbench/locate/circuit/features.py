"""Circuits of SAE features: which features, which error terms, which heads and FFNs do it, and do they do it alone?

At the place of an SAE the tensor is x = sum_j f_j w_j + e: w_j is the decoder's row j, e what no feature writes (b_dec in
it). A node is one such term, `feature.NAME.77` or `feature.NAME.error`, or a head or FFN that no SAE takes apart.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench import measure
from workbench.component import Component, components
from workbench.locate.causal.null import donors, draws_of, partners
from workbench.locate.causal.patching import name_of, reader
from workbench.locate.causal.places import batches
from workbench.locate.circuit.attribution import DRAWS, null_of, refuse_without_gap
from workbench.locate.circuit.results import Faithfulness
from workbench.locate.features.finding import attached as known
from workbench.locate.gradient.passes import refuse_without_slope, tokens_per_pass
from workbench.model.edges import Code, Swap, look, slope, swapped, view, whole
from workbench.model.plan import Prompts
from workbench.sae import SAE
from workbench.scores import Scores
from workbench.task import Task

OTHERS = ("z", "mlp_out")
RESTS = ("corrupted", "mean")


def nodes(model, task: Task, saes=None, others=OTHERS, *, steps: int = 10, metric="logit_diff", null: bool = True,
          seed: int = 0) -> Scores:  # fmt: skip
    """Which features matter, how much goes past them in the error term, and which heads and FFNs matter beside them?

    The score of a node a estimates what the metric loses when a alone has its value from the corrupted run, summed over
    positions:

        (a_clean - a_corrupted) * mean over k of dm/da at a_corrupted + alpha_k (a_clean - a_corrupted),

    alpha_k = (k + 0.5) / steps, where all terms of a site (the features and the error of an SAE, the heads of a layer, an
    FFN) move together and everything before the site is as in the clean run. So the scores of a site's terms add up to
    that of the whole tensor, which with enough steps is m(clean) - m(site corrupted), whatever the model; and each is exact
    where the metric is linear in the site. A large error term says that the features do not carry the task.

    Args:
        task: pairs, or the name of a bundled task.
        saes: attached SAEs, or their names; None for all that are attached.
        others: of "z" (heads) and "mlp_out" (FFNs), what is scored beside them; () for nothing. A head or FFN whose tensor
            an SAE takes apart is not a node of its own.
        steps: gradients on the way from corrupted to clean; 0 takes one, in the clean run (attribution patching).
        metric: "logit_diff", "log_prob", "prob", or a differentiable function (logits, answer, foil) -> [prompt].
        null: also score what another pair's corrupted prompt would change, for `null_p95` (seed says which).
    Returns:
        Scores in units of the metric, positive where the node helps, with the column `site`. Features that are the same in
        both runs of every pair have no effect and are left out. Cost: 2 + 2 * steps * number of sites.
    Raises:
        ValueError: without an attached SAE, for two SAEs at one place, prompts between which the metric hardly differs.
    Source:
        Marks et al. 2025, "Sparse feature circuits" (arXiv 2403.19647), equations 3 and 4: attribution patching (steps=0)
        and integrated gradients with N = 10, here at midpoints; the sign is turned round, so that what helps is positive.
    """
    began, names = time.perf_counter(), model.names
    refuse_without_slope(metric)
    if int(steps) != steps or steps < 0:
        raise ValueError(f"steps={steps!r}: give a whole number from 0; 10 is usual.")
    chosen, task = attached(model, saes), Task.of(task)
    sites = _others(model, chosen, others)
    streams = [Component("resid_pre", one.layer) for one in (*sites, *(sae.at for sae in chosen.values()))]
    alphas = [(k + 0.5) / steps for k in range(int(steps))] or [1.0]
    pairs = task.on(model)
    read, n = reader(pairs, metric), len(pairs.clean)
    groups, sides = batches(pairs, max(2, len(alphas)), tokens_per_pass(names)), np.zeros((2, n))
    draws = draws_of(null)
    others_of = partners(pairs, pairs.corrupted, groups, draws, seed)
    found = {name: np.zeros((1 + draws, sae.d_sae + 1, n)) for name, sae in chosen.items()}
    found |= {site: np.zeros((1 + draws, names.size(site.kind) or 1, n)) for site in sites}
    for group in groups:
        prompts, of = Prompts([pairs.clean[i] for i in group]), read(group)
        seen = [*sites, *streams]
        runs = [look(model, Prompts([side[i] for i in group]), seen, chosen) for side in (pairs.clean, pairs.corrupted)]
        (at_clean, clean, _), (at_corrupted, corrupted, _) = runs
        for side, (_, _, logits) in zip(sides, runs, strict=True):
            side[group] = of(logits, torch.arange(len(group))).double().numpy()
        theirs = [donors(others_of, group, draw) for draw in range(draws)]

        def way(at, prompts=prompts, of=of, at_clean=at_clean, at_corrupted=at_corrupted):
            site, end = whole(at), at_clean[whole(at)]
            change = torch.zeros_like(end)  # of a single head only that head's part
            view(names, change, at).copy_(view(names, end - at_corrupted[site], at))
            values = torch.stack([end - (1 - alpha) * change for alpha in alphas])
            stream = at_clean[Component("resid_pre", site.layer)]
            return view(names, slope(model, prompts, site, values, stream, of), at)

        for name, sae in chosen.items():
            gradient, base = way(sae.at), corrupted[name]
            own = [clean[name]] + [Code(*(x[one] for x in (base.x, base.source, base.f))) for one in theirs]
            for draw, code in enumerate(own):
                found[name][draw][:, group] = _terms(sae, code, base, gradient).T.cpu().numpy()
        for site in sites:
            gradient, base = way(site), at_corrupted[site]
            for draw, x in enumerate([at_clean[site], *(base[one] for one in theirs)]):
                effect = ((x - base).float() * gradient).unflatten(-1, (names.size(site.kind) or 1, -1)).sum((1, 3))
                found[site][draw][:, group] = effect.T.cpu().numpy()
    refuse_without_gap(model, *sides, metric, clusters=pairs.task.clusters())
    rows = [row for key, values in found.items() for row in _rows(names, chosen, key, values)]
    rows.sort(key=lambda row: row[0])
    per_prompt = np.stack([values[0] for _, _, values in rows])
    score, low, high = measure.mean_interval(per_prompt.T, pairs.task.clusters(), draws=DRAWS, seed=seed)
    under, why = null_of(np.stack([values[1:] for _, _, values in rows], 1) if draws else None, others_of)
    limit = np.full(len(rows), np.nan) if under is None else measure.null_threshold(under)
    return Scores([one for one, _, _ in rows], score, low, high, limit, per_prompt,
                  f"circuit.nodes, {f'{steps} steps' if steps else 'clean gradient'}", name_of(metric),
                  float(sides[0].mean()), float(sides[1].mean()), "",
                  "the same score for the change to another pair's corrupted prompt" if null else "", {}, task.name,
                  2.0 + 2 * len(alphas) * len(found), time.perf_counter() - began, seed, why,
                  {"site": np.array([str(site) for _, site, _ in rows])})  # fmt: skip


def keep(model, task: Task, nodes, *, error: bool | None = None, rest: str = "corrupted", metric="logit_diff",
         random: int = 3, seed: int = 0) -> Faithfulness:  # fmt: skip
    """Do these features (heads, FFNs) do the task alone? Everything else of their kind gets its value from elsewhere.

    One run of the clean prompts in which, at the place of each SAE that is named, features outside `nodes` are exchanged:
    x + sum over j not kept of (f_j elsewhere - f_j now) w_j. What is kept has the value of this very run, with all that was
    exchanged before. If heads (or FFNs) are named, all other heads (FFNs) are exchanged too. Faithfulness is
    (m(kept) - m(nothing kept)) / (m(model) - m(nothing kept)).

    Args:
        task: pairs, or the name of a bundled task; better other ones than the nodes were found with.
        nodes: components: features, error terms, heads (z), FFNs (mlp_out); embed and logits are always there.
        error: whether error terms are kept: True, False, or None for those among `nodes`.
        rest: where the rest comes from: "corrupted", the run of the corrupted prompt; "mean", the mean of both sides of all
            prompts of the same length, position by position.
        random: how many random sets to measure beside it: as many features, heads and FFNs, of those that differ anywhere
            between the two sides, with the same error terms (seed says which).
    Returns:
        Faithfulness; `edges` counts the nodes that were kept, `whole` all that could be; `corrupted` is m(nothing kept).
    Raises:
        ValueError: for other components, an SAE that is not attached, or prompts on which nothing is lost.
    Source:
        Marks et al. 2025 (arXiv 2403.19647): faithfulness with error terms as nodes; they take the mean for the rest.
    """
    began, task = time.perf_counter(), Task.of(task)
    if rest not in RESTS:
        raise ValueError(f"rest={rest!r} is unknown; choose {' or '.join(map(repr, RESTS))}.")
    kept = sorted({one for one in components(nodes) if one.kind not in ("embed", "logits")})
    chosen = attached(model, list(dict.fromkeys(one.name for one in kept if one.kind == "feature")))
    for one in kept:
        if one.kind not in ("feature", *OTHERS) or one.position is not None or one.is_family:
            raise ValueError(f"{one} is no node. Nodes are features (feature.NAME.77), error terms (feature.NAME.error), heads "
                             "(z.2.1) and FFNs (mlp_out.2), each by itself and without a position.")  # fmt: skip
        if one.index != "error":
            model.names.validate(one)
    sites = _others(model, chosen, dict.fromkeys(one.kind for one in kept if one.kind in OTHERS))
    for one in kept:
        if one.kind in OTHERS and Component(one.kind, one.layer) not in sites:
            raise ValueError(f"{one} is taken apart by an SAE here: name its features instead.")
    if not kept:
        raise ValueError("Nothing was named to be kept. Give at least one node, for example 'feature.sae.77'.")
    errors = {name for name in chosen if error or (error is None and _error(name) in kept)}
    pairs, names = task.on(model), model.names
    read, n, rng = reader(pairs, metric), len(pairs.clean), np.random.default_rng(seed)
    looks, alive = [], set()
    for group in batches(pairs, 2):
        sides = [Prompts([side[i] for i in group]) for side in (pairs.clean, pairs.corrupted)]
        runs = [look(model, side, sites, chosen) for side in sides]
        looks.append((group, sides[0], runs))
        for name in chosen:
            fire = [run[1][name].f for run in runs]
            differ = (fire[0] != fire[1]).flatten(0, 1).any(0).nonzero()[:, 0].tolist()
            alive |= {Component("feature", None, j, None, name) for j in differ}
    heads = [Component(site.kind, site.layer, i) for site in sites for i in _numbers(names, site)]
    wanted = {one for one in kept if one.index != "error"}
    pool = {"feature": sorted(alive | {one for one in wanted if one.kind == "feature"})}
    pool |= {kind: [one for one in heads if one.kind == kind] for kind in OTHERS}
    sets, counts = [set(), wanted], {kind: sum(one.kind == kind for one in wanted) for kind in pool}
    for _ in range(random):
        picked = [pool[kind][i] for kind, k in counts.items() for i in rng.choice(len(pool[kind]), k, replace=False)]
        sets.append(set(picked))
    clean, values = np.zeros(n), np.zeros((len(sets), n))
    for group, prompts, runs in looks:
        of, rows = read(group), torch.arange(len(group))
        clean[group] = of(runs[0][2], rows).double().numpy()
        for number, some in enumerate(sets):
            swap = _swap(names, chosen, sites, some, errors if number else set(), runs, prompts.pads, rest)
            values[number, group] = of(swapped(model, prompts, chosen, swap), rows).double().numpy()
    nothing, inside = values[0], values[1:]
    refuse_without_gap(model, clean, nothing, metric, "The whole model and the model with nothing kept",
                       pairs.task.clusters())  # fmt: skip
    shares, low, high = measure.ratio_of_means(inside - nothing, clean - nothing, pairs.task.clusters(), seed=seed)
    size = len(wanted) + len(errors)
    return Faithfulness(float(shares[0]), float(low[0]), float(high[0]), shares[1:], clean, nothing, inside[0], size,
                        sum(sae.d_sae + 1 for sae in chosen.values()) + len(heads), name_of(metric), task.name,
                        time.perf_counter() - began, "nodes")  # fmt: skip


def attached(model, saes) -> dict:
    """Name -> SAE, of those asked for."""
    have = model.names.saes
    wanted = list(have) if saes is None else [saes] if isinstance(saes, str | SAE) else list(saes)
    if saes is None and not have:
        raise ValueError("No SAE is attached to this model, so there are no features. Attach one: "
                         "model.attach(wb.SAE.load('course')). Heads and FFNs alone: wb.locate.causal.patch, or eap_ig.")  # fmt: skip
    chosen = {sae.name: sae for sae in (known(model, one) for one in wanted)}
    places = [sae.at.canonical for sae in chosen.values()]
    twice = next((place for place in places if places.count(place) > 1 or
                  (place.index is not None and Component(place.kind, place.layer) in places)), None)  # fmt: skip
    if twice is not None:
        raise ValueError(f"Two SAEs take {twice} apart: its terms would count twice. Name one of them: saes=['NAME'].")
    return chosen


def _others(model, chosen: dict, others) -> list[Component]:
    """Sites of heads and FFNs that no SAE takes apart."""
    others = [others] if isinstance(others, str) else list(others)
    for kind in others:
        if kind not in OTHERS:
            raise ValueError(f"others={kind!r} is unknown; choose of {', '.join(map(repr, OTHERS))}, or () for none.")
        model.names.validate(Component(kind, 0, "*" if kind == "z" else None))
    taken = {whole(sae.at) for sae in chosen.values()}
    every = [Component(kind, layer) for kind in others for layer in range(model.names.n_layers)]
    return [site for site in every if site not in taken]


def _error(name: str) -> Component:
    return Component("feature", None, "error", None, name)


def _numbers(names, site: Component) -> list:
    return list(range(names.size(site.kind))) if names.size(site.kind) else [None]


def _terms(sae, code: Code, base: Code, gradient: torch.Tensor) -> torch.Tensor:
    """[row, feature or (last) error]: what each term changes between two runs, times the gradient, over all positions."""
    features = code.f * sae.slope(gradient, code.source) - base.f * sae.slope(gradient, base.source)
    error = ((code.error(sae) - base.error(sae)) * gradient).sum((1, 2))
    return torch.cat([features.sum(1), error[:, None]], 1)


def _rows(names, chosen: dict, key, values):
    """(component, site, [draw, prompt]) of one SAE or site."""
    if isinstance(key, str):
        for j in np.flatnonzero((values[0, :-1] != 0).any(1)):
            yield Component("feature", None, int(j), None, key), chosen[key].at, values[:, j]
        yield _error(key), chosen[key].at, values[:, -1]
        return
    for i, number in enumerate(_numbers(names, key)):
        yield Component(key.kind, key.layer, number), key, values[:, i]


def _swap(names, chosen: dict, sites, kept: set, errors: set, runs, pads: list, rest: str) -> Swap:
    """What is exchanged when these nodes and error terms are kept."""
    features, parts, instead = {}, {}, {}

    def elsewhere(clean, corrupted):
        if rest == "corrupted":
            return corrupted
        found = torch.empty_like(corrupted)
        for pad in set(pads):
            rows = torch.tensor([i for i, own in enumerate(pads) if own == pad])
            found[rows] = (clean[rows].mean(0) + corrupted[rows].mean(0)) / 2
        return found

    (at_clean, clean, _), (at_corrupted, corrupted, _) = runs
    for name, sae in chosen.items():
        off = torch.ones(sae.d_sae, device=sae.W_dec.device)
        off[[one.index for one in kept if one.name == name]] = 0
        features[name], sides = off, []
        for code in (clean[name], corrupted[name]):
            sides.append(code.parts(sae, off) + (0 if name in errors else code.error(sae)))
        instead[name] = elsewhere(*sides)
    for site in sites:
        own = [Component(site.kind, site.layer, number) for number in _numbers(names, site)]
        off = [i for i, one in enumerate(own) if one not in kept]
        if off:
            parts[site], instead[site] = off, elsewhere(at_clean[site], at_corrupted[site])
    return Swap(features, set(chosen) - errors, parts, instead)
