"""Vectors from attention heads: what the heads that carry a task write, and pushes at the heads that tell truth apart."""

from __future__ import annotations

import numpy as np
import torch

from workbench import measure
from workbench.component import Component, components
from workbench.locate.probing.fit import fitted
from workbench.model import Prompts
from workbench.operations import Add, Replace
from workbench.recipe import Recipe
from workbench.steer.vector.reading import sides, states
from workbench.task import Task

ROWS = 64


def function_vector(model, task: Task, *, heads=None, k: int = 10, to=None, phase: str | None = None) -> Add:
    """What do the heads that carry a task in context write at the last token? The sum of their mean outputs, to add.

    Args:
        task: pairs of a prompt that shows the task by examples (clean) and one that does not (corrupted). Only split
            "fit" is used where there is one.
        heads: the heads to sum, such as ["z.4.2", "z.5.0"]; by default the k heads of largest `indirect_effects`.
        to: where it acts, by default at the last prompt token after a third of the layers.
    Raises:
        ValueError: where what heads write goes through a norm before it is added (Gemma, OLMo 2), so that it has no sum.
    Source:
        Todd et al. 2024, "Function vectors in large language models", eq. 2-5.
    """
    names = model.names
    if "layernorm" in names.row.attn_add:
        raise ValueError("In this architecture what heads write goes through a norm together, so their outputs do not add up to a "
                         "vector. Use difference_of_means at resid_post instead.")  # fmt: skip
    if heads is None:
        effects = indirect_effects(model, task)
        heads = sorted(effects, key=effects.get, reverse=True)[:k]
    heads = [one.at(-1) for one in names.expand([c.at(None) for c in components(heads)])]
    if any(one.kind != "z" for one in heads):
        raise ValueError(f"heads= takes heads such as 'z.4.2'; got {', '.join(map(str, heads))}.")
    means = states(model, sides(model, task)[0], heads)
    vector = sum(means[one].mean(0) @ model.weight("W_O", one.layer, one.index).cpu() for one in heads) * names.scale
    return Add(to if to is not None else f"resid_post.{names.n_layers // 3}@-1", vector, phase=phase)


def indirect_effects(model, task: Task, *, metric="prob", rows: int = ROWS) -> dict[Component, float]:
    """Which heads carry the task? What the answer gains when one head, on a prompt that does not show the task, writes what
    it writes on average on prompts that do: {head: average indirect effect}.

    Args:
        task: as for `function_vector`. metric: of the answer of the clean prompt. rows: of split "fit", to save time.
    Source:
        Todd et al. 2024, eq. 3-4. `locate.causal.patch` takes the output from the same pair instead, and has a null.
    """
    task = Task.of(task)
    task = task.split("fit") if "fit" in task.column("split") else task
    pairs, of = task[:rows].on(model), measure.metric(metric)
    clean, corrupted = (Prompts(side, spans=pairs.spans) for side in (pairs.clean, pairs.corrupted))
    heads = model.names.expand([Component("z", "*", "*", -1)])
    means = {one: x.mean(0) for one, x in states(model, clean, heads).items()}

    def value(*changes) -> float:
        return float(of(model.logits(corrupted, *changes), pairs.answer, pairs.foil).mean())

    base = value()
    return {one.at(None): value(Replace(one, means[one])) - base for one in heads}


def inference_time_intervention(model, task: Task, *, k: int | None = None, alpha: float = 15.0, by: str = "means",
                                positive: str | None = None) -> Recipe:  # fmt: skip
    """Where do heads tell the two sides apart, and what happens when they are pushed there? z + alpha * sigma * theta at the
    k heads whose probes are most accurate, at the last prompt token and at every generated one.

    Probes and directions are fitted on split "fit", accuracies are taken on "select" (else on a third of "fit" held out).

    Args:
        task: pairs or texts with two labels. positive: for labelled texts, the label to push towards.
        k: how many heads; by default one in twenty (the paper: 48 of 1,024).
        alpha: strength in standard deviations of the activations along theta (the paper: 15, shared among its 48 heads).
        by: "means", theta is the difference of the two sides' means; "probe", the probe's weights. Both of length 1.
    Returns:
        Recipe of an `Add` for each head and phase; its notes hold the accuracies.
    Source:
        Li et al. 2023, "Inference-time intervention: eliciting truthful answers from a language model", section 3.
    """
    if by not in ("means", "probe"):
        raise ValueError(f"by={by!r} is unknown; choose 'means' or 'probe'.")
    names = model.names
    heads, task = names.expand([Component("z", "*", "*", -1)]), Task.of(task)
    k = max(1, round(len(heads) / 20)) if k is None else k
    if not 1 <= k <= len(heads):
        raise ValueError(f"k={k}: this model has {len(heads)} heads.")
    fit = [states(model, side, heads) for side in sides(model, task, positive)]
    if "select" in task.column("split"):
        held = [states(model, side, heads) for side in sides(model, task, positive, "select")]
        train = fit
    else:
        held, train = ([{h: x[rows] for h, x in side.items()} for side in fit] for rows in (slice(None, None, 3), slice(1, None, 3)))  # fmt: skip
    accuracy, theta, sigma = {}, {}, {}
    for one in heads:
        (x, y), (x_held, y_held) = _labelled(train, one), _labelled(held, one)
        probe = fitted("logistic", x, y, 0.1)
        accuracy[one] = float((probe.predict(x_held) == y_held).mean())
        whole = torch.cat([side[one] for side in fit])
        direction = fit[0][one].mean(0) - fit[1][one].mean(0)
        if by == "probe" and hasattr(probe, "named_steps"):
            direction = torch.tensor(probe[-1].coef_[0] / probe[0].scale_, dtype=whole.dtype)
        theta[one] = direction / direction.norm().clamp(min=1e-12)
        sigma[one] = float((whole @ theta[one]).std())
    best = [one for one in sorted(heads, key=accuracy.get, reverse=True) if theta[one].norm() > 0][:k]
    parts = [Add(place, sigma[one] * theta[one], alpha, phase=phase) for one in best
             for place, phase in ((one, "prompt"), (one.at(None), "generation"))]  # fmt: skip
    notes = {"accuracy": {str(one.at(None)): accuracy[one] for one in best}, "alpha": alpha, "task": task.name}
    return Recipe(tuple(parts), "inference-time intervention", notes=notes)


def _labelled(sides: list, one: Component) -> tuple[np.ndarray, np.ndarray]:
    x = torch.cat([side[one] for side in sides]).double().numpy()
    return x, np.repeat([1, 0], [len(side[one]) for side in sides])
