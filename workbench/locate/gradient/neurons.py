"""Knowledge neurons: FFN neurons that a fact's probability integrates to, shared by the ways to say it."""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench import measure
from workbench.component import Component, components
from workbench.locate.causal.patching import name_of
from workbench.locate.causal.places import batches
from workbench.locate.gradient.passes import refuse_without_slope, run, tokens_per_pass
from workbench.model.plan import Prompts
from workbench.model.sweep import bar
from workbench.scores import Scores
from workbench.task import Task


def knowledge_neurons(model, task, at="neuron.*.*", *, position=-1, metric="prob", steps: int = 20, reach: float = 0.2,
                      null: bool = True, seed: int = 0, progress: bool = True) -> Scores:  # fmt: skip
    """Which neurons hold a fact? Integrated gradients over a layer's neurons, and what paraphrases share.

    The task should be ways to say one fact (rows with one `entity`). All neurons of a layer are raised together from zero to
    what they are, at one position; a neuron's score is its activation times the mean gradient on the way. The scores of a
    layer add up to the change of the metric. A neuron that serves the sentence rather than the fact is strong in one
    paraphrase only, so the column `shared` says in which share of the prompts it reaches `reach` of the strongest one: the
    paper keeps those with 0.7 or more, `scores.frame.query("shared >= 0.7")`.

    The null is the same for other facts in the same sentences: the corrupted prompts with the foil as their answer.

    Args:
        task: pairs; at: neurons, without position.
        position: where they are raised: -1 (what is predicted from), a number or a span such as "subject".
        metric: of the answer; "prob" as in the paper, "log_prob", or "logit_diff" against the foil.
        steps: of the midpoint rule.
    Returns:
        Scores in units of the metric, with the column `shared`. Cost: 2 forward-pass equivalents for a step and a layer,
        less for the blocks below it, which are not run again.
    Raises:
        ValueError: for other kinds or positions, a metric without gradient, or an architecture without neurons.
    Source:
        Dai et al. 2022, "Knowledge neurons in pretrained transformers", eq. 2 to 4 and section 3.3 (20 steps; 0.2; 0.7).
    """
    began, names, task = time.perf_counter(), model.names, Task.of(task)
    refuse_without_slope(metric)
    family = components(at)
    for one in family:
        if one.kind != "neuron" or one.position is not None:
            raise ValueError(f"{one}: knowledge neurons are neurons, written 'neuron.*.*' or 'neuron.3.*'; where they are "
                             "raised goes into position=.")  # fmt: skip
    wanted, pairs = sorted(names.expand(family)), task.on(model)
    layers, n, of = sorted({one.layer for one in wanted}), len(pairs.clean), measure.metric(metric)
    groups = batches(pairs, 1, tokens_per_pass(names))
    where = [Prompts([ids], spans=[spans]).columns(Component("neuron", 0, 0, position), 0)
             for ids, spans in zip(pairs.clean, pairs.spans)]  # fmt: skip
    rows = {layer: [i for i, one in enumerate(wanted) if one.layer == layer] for layer in layers}
    sides = [(pairs.clean, pairs.answer, pairs.foil), (pairs.corrupted, pairs.foil, pairs.answer)][: 1 + null]
    found, values, cost = np.zeros((len(sides), len(wanted), n)), np.zeros((len(sides), n)), 0.0
    with bar(len(sides) * len(layers) * n * steps, progress) as show:
        for side, (ids, right, wrong) in enumerate(sides):
            for group in groups:
                prompts = Prompts([ids[i] for i in group])

                def read(logits, which, right=right[group], wrong=wrong[group]):
                    return of(logits, right[which].to(logits.device), wrong[which].to(logits.device))

                sites = [(kind, layer) for layer in layers for kind in ("resid_pre", "neuron")]
                seen = run(model, prompts, sites, read)
                values[side, group] = seen.value.float().cpu().numpy()
                cost += len(group) / n
                mask = torch.zeros(len(group), prompts.width, 1, device=seen.value.device)
                for row, i in enumerate(group):
                    mask[row, [prompts.pads[row] + p for p in where[i]]] = 1
                for layer in layers:
                    total = _integral(model, prompts, seen.acts, layer, mask, read, steps, show)
                    index = [wanted[i].index for i in rows[layer]]
                    found[np.ix_([side], rows[layer], group)] = total[:, index].T.double().cpu().numpy()[None]
                    cost += 2 * steps * (1 - layer / names.n_layers) * len(group) / n
    score, low, high = measure.mean_interval(found[0].T, pairs.task.clusters(), seed=seed)
    limit, why = np.full(len(wanted), np.nan), "" if null else "No null was asked for."
    if null and n > 1:
        limit = measure.null_threshold(found[1].T[:, :, None], together=n)  # a further draw is as many other facts
    elif null:
        why = "One prompt: neither interval nor null."
    shared = (found[0] >= reach * found[0].max(0)).mean(1)
    return Scores(wanted, score, low, high, limit, found[0], "gradient.knowledge_neurons", f"{name_of(metric)}, @{position}",
                  float(values[0].mean()), float(values[1].mean()) if null else np.nan, "",
                  "the same for other facts: corrupted prompts with their own answer" if null else "", {}, task.name, cost,
                  time.perf_counter() - began, seed, why, {"shared": shared})  # fmt: skip


def _integral(model, prompts: Prompts, acts: dict, layer: int, mask, read, steps: int, show) -> torch.Tensor:
    """[row, neuron]: activation times mean gradient, summed over the columns of the mask."""
    names, n = model.names, len(prompts.ids)
    at_once = max(1, tokens_per_pass(names) // (n * prompts.width))
    neurons, total = acts["neuron", layer].float(), 0.0
    for shares in torch.split((torch.arange(steps) + 0.5) / steps, at_once):
        k = len(shares)
        raised = torch.cat([torch.where(mask > 0, share * neurons, neurons) for share in shares])
        stream, which = acts["resid_pre", layer].repeat(k, 1, 1), torch.arange(n).repeat(k)
        body = _raise(
            names, layer, stream, raised.to(acts["neuron", layer].dtype), lambda x, which=which: read(x, which)
        )
        slope = model.trace(model.inputs(Prompts(prompts.ids * k)), body, logits_to_keep=1, use_cache=False)
        total = total + slope.float().unflatten(0, (k, n)).sum(0)
        show.update(n * k)
    return (neurons * mask * total / steps).sum(1)


def _raise(names, layer: int, stream, neurons, metric):
    def body():
        with torch.enable_grad():
            for below in range(layer):
                names.layers[below].skip(names.block_value(stream))
            names.layers[layer].input = stream
            place = names.place("neuron", layer, len(stream))
            place.get()
            leaf = neurons.detach().requires_grad_(True)
            place.set(leaf)
            value = metric(names.nn.output.logits[:, -1].float())
            return torch.autograd.grad(value.sum(), leaf)[0]

    return body
