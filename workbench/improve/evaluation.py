"""Before against after: target and guards, held-out prompts, intervals, and controls that did the same at random."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from workbench import measure
from workbench.component import Component
from workbench.intervention import Add, ProjectOut, Replace
from workbench.model import Prompts
from workbench.model.plan import Edits
from workbench.recipe import Recipe
from workbench.report import Report
from workbench.task import Task

METRICS = ("accuracy", "logit_diff")
STREAM = ("embed", "resid_pre", "resid_mid", "resid_post")


def evaluate(model, recipe, target, guards=(), *, splits=("test", "ood"), draws: int = 10, seed: int = 0) -> Report:
    """Did this change help, what did it cost, and would a random change have done as much?

    Target and guards of pairs are measured by accuracy (the answer is the most probable token) and by logit difference
    (the margin), guards of plain texts by loss (nats per token) and KL from the unchanged model, on the last two thirds
    of each text, the first third being the prompt. All differences are paired, with bootstrap intervals over entities
    (over prompts where no entity is named).

    Controls: the same recipe with random directions of equal norm, and at random other places: other components of the
    same kind, or for the stream, which every layer shares, other positions of the prompt. Each is drawn `draws` times,
    and the draw with the largest mean logit difference on the target's first split is reported, because the recipe,
    too, was chosen.

    Args:
        recipe: an intervention or a recipe.
        target: a task of pairs, or the name of a bundled one; guards: tasks of pairs or plain texts, or names.
        splits: evaluated apart; a task that has none of them is evaluated whole, as split "all".
    Returns:
        Report.
    Raises:
        ValueError: for a target that is no task of pairs, two tasks of one name, or a recipe that cannot act on a
            task's prompts (a span they do not have); nothing has run then.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe([recipe])
    guards = [guards] if isinstance(guards, (str, Task)) else guards
    target, *guards = (Task.of(one) for one in (target, *guards))
    if target.kind != "pairs":
        raise ValueError(f"The target must be a task of pairs; {target!r} holds {target.kind} texts.")
    if len({task.name for task in (target, *guards)}) <= len(guards):
        raise ValueError("Target and guards need different names, to be told apart in the report: wb.Task(rows, name).")
    parts = {task.name: _parts(model, task, splits) for task in (target, *guards)}
    for task, split, part in ((task, *one) for task, found in parts.items() for one in found):
        try:
            Edits(model.names, recipe, _prompts(model, part))
        except ValueError as error:
            raise ValueError(f"The recipe does not fit task {task!r} ({split}): {error}") from None
    shortest = min(min(_prompts(model, part).lengths) for found in parts.values() for _, part in found)
    arms = {"recipe": recipe, **_controls(model, recipe, parts[target.name][0][1], shortest, draws, seed)}
    rows, examples = [], []
    for task in (target, *guards):
        for split, part in parts[task.name]:
            for arm, changed in arms.items():
                before, after = (_measure_pairs if part.kind == "pairs" else _measure_texts)(model, part, changed)
                place = {"arm": arm, "role": "target" if task is target else "guard", "task": task.name, "split": split}
                rows += [place | row for row in _compare(part, before, after, seed)]
                if part.kind == "pairs":
                    examples.append(_examples(part, before, after).assign(**place))
    table, each = pd.DataFrame(rows), pd.concat(examples, ignore_index=True)
    against = pd.DataFrame(_against(each, [arm for arm in arms if arm != "recipe"], seed))
    return Report(recipe.name or "recipe", table, against, each, {"seed": seed, "draws": draws})


def _parts(model, task: Task, splits) -> list[tuple[str, Task]]:
    """The splits that are there, with the rows that fit the model."""
    have = set(task.column("split"))
    found = [(name, task.split(name)) for name in splits if name in have] or [("all", task)]
    return [(name, part.on(model).task if part.kind == "pairs" else part) for name, part in found]


def _prompts(model, task: Task) -> Prompts:
    """The clean prompts of pairs; each text as a prompt (its first third) and a continuation, so that changes of the
    prompt's last token or of generated tokens act as they would in use; what is measured is the continuation."""
    if task.kind == "pairs":
        pairs = task.on(model)
        return Prompts(pairs.clean, spans=pairs.spans)
    ids = [model.ids(text) for text in task.column("text")]
    return Prompts(ids, [max(1, len(one) // 3) for one in ids])


def _measure_pairs(model, task: Task, recipe: Recipe) -> tuple[dict, dict]:
    """Metric -> values per row, before and after."""
    pairs, prompts = task.on(model), _prompts(model, task)
    logits = [model.logits(prompts, *given) for given in ([], [recipe])]
    return tuple({name: measure.metric(name)(x, pairs.answer, pairs.foil).numpy() for name in METRICS} for x in logits)


def _measure_texts(model, task: Task, recipe: Recipe) -> tuple[dict, dict]:
    """Metric -> values per token of the continuations, before and after; "text" says which text a token is of."""
    before, after, done = [], [], 0
    for part in _prompts(model, task).chunks():
        sides = [model.logits(part, *given, positions="all") for given in ([], [recipe])]
        for i, (ids, length) in enumerate(zip(part.ids, part.lengths, strict=True)):
            old, new = (side[i][length - 1 : -1] for side in sides)
            ahead = ids[length:, None]
            loss = [-x.log_softmax(-1).gather(-1, ahead)[:, 0] for x in (old, new)]
            zero, text = torch.zeros_like(loss[0]), torch.full_like(loss[0], done + i)
            before.append(torch.stack([loss[0], zero, zero, text]))
            changed = (old.argmax(-1) != new.argmax(-1)).float()
            after.append(torch.stack([loss[1], measure.kl(old, new), changed, text]))
        done += len(part.ids)
    names = ("loss", "kl", "top token changed", "text")
    return tuple(dict(zip(names, torch.cat(side, 1).numpy(), strict=True)) for side in (before, after))


def _compare(task: Task, before: dict, after: dict, seed: int) -> list[dict]:
    groups, rows = after["text"] if "text" in after else _clusters(task), []
    for name, new in after.items():
        if name == "text":
            continue
        old = before[name]
        change, low, high = measure.mean_interval(new - old, groups, seed=seed)
        row = {"metric": name, "before": old.mean(), "after": new.mean(), "change": change, "ci_lo": low, "ci_hi": high}
        if name == "kl":
            row |= {"p95": np.quantile(new, 0.95), "p99": np.quantile(new, 0.99)}
        rows.append(row | {"n": len(new)})
    return rows


def _clusters(task: Task) -> list | None:
    entities = task.column("entity")
    return None if any(one is None for one in entities) else entities


def _examples(task: Task, before: dict, after: dict) -> pd.DataFrame:
    frames = [pd.DataFrame({"row": range(len(task)), "prompt": task.column("clean"), "entity": task.column("entity"),
                            "template": task.column("template"), "metric": name, "before": before[name],
                            "after": after[name]}) for name in METRICS]  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def _against(each: pd.DataFrame, controls: list[str], seed: int) -> list[dict]:
    """On the target: what the recipe reaches beyond each control, prompt by prompt."""
    rows = []
    target = each[each["role"] == "target"]
    for (split, name), part in target.groupby(["split", "metric"], sort=False):
        own = part[part["arm"] == "recipe"].set_index("row")
        for control in controls:
            other = part[part["arm"] == control].set_index("row")
            entity = None if own["entity"].isna().any() else list(own["entity"])
            gain, low, high = measure.mean_interval((own["after"] - other["after"]).to_numpy(), entity, seed=seed)
            rows.append({"control": control, "split": split, "metric": name, "recipe": own["after"].mean(),
                         "control_after": other["after"].mean(), "difference": gain, "ci_lo": low, "ci_hi": high})  # fmt: skip
    return rows


# controls


def _controls(model, recipe: Recipe, target: Task, shortest: int, draws: int, seed: int) -> dict[str, Recipe]:
    """The best of `draws` random recipes of each kind, by what they do to the target."""
    rng = np.random.default_rng(seed)
    found = {}
    for label, make in (("random direction", _random_direction), ("random components", _random_components)):
        made = [make(model, recipe, rng, shortest) for _ in range(draws)]
        made = [one for one in made if one is not None]
        if made:
            best = max(made, key=lambda one: target.score(model, one).mean())
            found[f"{label} (best of {len(made)})"] = best
    return found


def _random_direction(model, recipe: Recipe, rng, shortest: int) -> Recipe | None:
    """Every vector replaced by a random one of equal norm; None when the recipe has no vector."""
    made, changed = [], False
    for one in recipe:
        name = {Add: "vector", ProjectOut: "direction"}.get(type(one))
        if name:
            old = getattr(one, name)
            new = torch.as_tensor(rng.standard_normal(old.shape), dtype=old.dtype)
            one, changed = replace(one, **{name: new / new.norm() * old.norm()}), True
        made.append(one)
    return Recipe(tuple(made)) if changed else None


def _random_components(model, recipe: Recipe, rng, shortest: int) -> Recipe | None:
    """Every place replaced by a random other one of its kind; None where there is no other."""
    made, changed = [], False
    for one in recipe:
        places = []
        for at in one.at:
            if isinstance(one, Replace):  # its values belong to this place
                others = []
            elif at.kind in STREAM:  # positions that every prompt has, counted from the end
                others = [at.at(p) for p in range(-shortest, 0)] if at.position is not None else []
            else:
                wild = ["*" if part is not None else None for part in (at.layer, at.index)]
                others = [] if at.is_family else model.names.expand([Component(at.kind, *wild, at.position)])
            others = [other for other in others if other not in one.at and other not in places]
            changed |= bool(others)
            places.append(others[rng.integers(len(others))] if others else at)
        made.append(replace(one, at=tuple(places)))
    return Recipe(tuple(made)) if changed else None
