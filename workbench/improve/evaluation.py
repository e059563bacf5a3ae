"""Before against after: target and guards, held-out prompts, intervals, and controls that did the same at random."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from workbench import measure
from workbench.component import Component
from workbench.intervention import Add, ProjectOut
from workbench.model import Prompts
from workbench.recipe import Recipe
from workbench.report import Report
from workbench.task import Task

METRICS = ("accuracy", "logit_diff")
STREAM = ("embed", "resid_pre", "resid_mid", "resid_post")


def evaluate(model, recipe, target, guards=(), *, splits=("test", "ood"), draws: int = 5, seed: int = 0) -> Report:
    """Did this change help, what did it cost, and would a random change have done as much?

    Target and guards of pairs are measured by accuracy (the answer is the most probable token) and by logit difference
    (the margin), guards of plain texts by loss (nats per token) and KL from the unchanged model, on the last two thirds
    of each text, the first third being the prompt. All differences are
    paired, with bootstrap intervals over entities (over prompts where no entity is named).

    Controls: the same recipe with random directions of equal norm, and at random other places: other components of the
    same kind, or for the stream, which every layer shares, other positions of the prompt. Each is drawn `draws` times and the draw that moves the target furthest is reported, because the recipe, too, was
    chosen.

    Args:
        recipe: an intervention or a recipe.
        target: a task of pairs, or the name of a bundled one; guards: tasks of pairs or plain texts, or names.
        splits: evaluated apart; a task that has none of them is evaluated whole, as split "all".
    Returns:
        Report.
    Raises:
        ValueError: for a target that is no task of pairs.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe([recipe])
    target, *guards = (one if isinstance(one, Task) else Task.load(one) for one in (target, *guards))
    if target.kind != "pairs":
        raise ValueError(f"The target must be a task of pairs; {target!r} holds {target.kind} texts.")
    arms = {"recipe": recipe, **_controls(model, recipe, target, splits, draws, seed)}
    rows, examples = [], []
    for task in (target, *guards):
        role = "target" if task is target else "guard"
        for split, part in _parts(task, splits):
            before = _measure(model, part, Recipe(()))
            for arm, changed in arms.items():
                after = _measure(model, part, changed, before)
                one = _compare(part, before, after, seed)
                place = {"arm": arm, "role": role, "task": task.name, "split": split}
                rows += [place | row for row in one]
                examples.append(_examples(part, before, after).assign(**place))
    table, each = pd.DataFrame(rows), pd.concat(examples, ignore_index=True)
    against = pd.DataFrame(_against(each, [arm for arm in arms if arm != "recipe"], seed))
    return Report(recipe.name or "recipe", table, against, each, {"seed": seed, "draws": draws})


def _parts(task: Task, splits) -> list[tuple[str, Task]]:
    have = set(task.column("split"))
    found = [(name, task.split(name)) for name in splits if name in have]
    return found or [("all", task)]


def _measure(model, task: Task, recipe: Recipe, before: dict | None = None) -> dict[str, np.ndarray]:
    """Metric -> values per row (per token for texts)."""
    if task.kind == "pairs":
        return {name: task.score(model, recipe, metric=name) for name in METRICS}
    prompts = _cut_texts(model, task)
    logits = [
        x[n - 1 : -1] for x, n in zip(model.logits(prompts, recipe, positions="all"), prompts.lengths, strict=True)
    ]
    ahead = [ids[n:] for ids, n in zip(prompts.ids, prompts.lengths, strict=True)]
    loss = [-x.log_softmax(-1).gather(-1, ids[:, None])[:, 0] for x, ids in zip(logits, ahead, strict=True)]
    found = {"loss": torch.cat(loss).numpy(), "text": np.repeat(range(len(ahead)), [len(x) for x in ahead])}
    if before is None:
        return found | {"logits": logits}
    pairs = list(zip(before["logits"], logits, strict=True))
    found["kl"] = torch.cat([measure.kl(a, b) for a, b in pairs]).numpy()
    found["top token changed"] = torch.cat([(a.argmax(-1) != b.argmax(-1)).float() for a, b in pairs]).numpy()
    return found


def _cut_texts(model, task: Task) -> Prompts:
    """Each text as a prompt (its first third) and a continuation, so that changes of the prompt's last token or of
    generated tokens act as they would in use; what is measured is the continuation."""
    ids = [model.ids(text) for text in task.column("text")]
    return Prompts(ids, [max(1, len(one) // 3) for one in ids])


def _compare(task: Task, before: dict, after: dict, seed: int) -> list[dict]:
    rows = []
    for name in [name for name in after if name not in ("logits", "text")]:
        old = before.get(name, np.zeros_like(after[name]))
        groups = after["text"] if "text" in after else _clusters(task)
        change, low, high = measure.mean_interval(after[name] - old, groups, seed=seed)
        row = {"metric": name, "before": old.mean(), "after": after[name].mean(), "change": change, "ci_lo": low,
               "ci_hi": high, "n": len(old)}  # fmt: skip
        if name == "kl":
            row |= {"p95": np.quantile(after[name], 0.95), "p99": np.quantile(after[name], 0.99)}
        rows.append(row)
    return rows


def _clusters(task: Task) -> list | None:
    entities = task.column("entity")
    return None if any(one is None for one in entities) else entities


def _examples(task: Task, before: dict, after: dict) -> pd.DataFrame:
    if task.kind != "pairs":
        return pd.DataFrame()
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


def _controls(model, recipe: Recipe, target: Task, splits, draws: int, seed: int) -> dict[str, Recipe]:
    """The best of `draws` random recipes of each kind, by what they do to the target."""
    rng = np.random.default_rng(seed)
    found, shortest = {}, min(map(len, target.on(model).clean))
    for label, make in (("random direction", _random_direction), ("random components", _random_components)):
        made = [make(model, recipe, rng, shortest) for _ in range(draws)]
        made = [one for one in made if one is not None]
        if made:
            part = _parts(target, splits)[0][1]
            best = max(made, key=lambda one: part.score(model, one).mean())
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
            if at.kind in STREAM:  # positions that every prompt of the target has, counted from the end
                others = [at.at(p) for p in range(-shortest, 0)] if at.position is not None else []
            else:
                wild = ["*" if part is not None else None for part in (at.layer, at.index)]
                others = [] if at.is_family else model.names.expand([Component(at.kind, *wild, at.position)])
            others = [other for other in others if other not in one.at and other not in places]
            changed |= bool(others)
            places.append(others[rng.integers(len(others))] if others else at)
        made.append(replace(one, at=tuple(places)))
    return Recipe(tuple(made)) if changed else None
