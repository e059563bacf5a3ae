"""Before against after: target and guards, held-out prompts, intervals, and controls that did the same at random."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from workbench import measure
from workbench.improve.controls import random_controls, tuning_controls
from workbench.model import Prompts
from workbench.model.plan import Edits, check_recipe
from workbench.recipe import Recipe
from workbench.report import AIMS, TOLERANCES, Report
from workbench.task import Task

METRICS = ("accuracy", "logit_diff")  # of guards of pairs
STILL = ("prob",)
WRONG = {"logit_diff": 1, "gap": -1}  # which way is up
AGAINST = ["control", "split", "metric", "recipe", "control_after", "difference", "ci_lo", "ci_hi"]


def evaluate(model, recipe, target, guards=(), *, aim: str = "answer", still=(), splits=("test", "ood"), controls=None,
             prompt: str | None = None, retrain: bool = True, tolerances: dict | None = None, draws: int = 10,
             seed: int = 0) -> Report:  # fmt: skip
    """Did this change help, what did it cost, and would a random change have done as much?

    Target and guards of pairs are measured by accuracy (the answer is the most probable token), by logit difference
    (the margin) and, where rows have a `completion`, by "exact": whether greedy decoding gives the whole of it; with
    aim="even" the target instead by the gap and by the probability of answer and foil together. Guards of plain texts are
    measured by loss (nats per token) and KL from the unchanged model, on the last two thirds of each text, the first third
    being the prompt; the bundled "background" is added where no guard is a text and the model can read it. All differences
    are paired, with bootstrap intervals over entities and templates (over prompts where neither is named).

    Controls: the same recipe with random directions of equal norm, at random other places, and, for differences of means,
    with the labels shuffled that they were fitted on; each is drawn `draws` times, and the draw with the largest mean logit
    difference (aim="even": the smallest mean gap) on the target's first split is reported, because the recipe, too, was
    chosen. Weights that `finetune` made are tuned again, with the same task,
    steps, rate and seed: as many at random ("random mask") and all of them ("full tuning", also after `lora`). Full tuning
    is there to compare with, and need not be beaten. A recipe read back from disk has forgotten what it was fitted on, and
    that or a multiple of one how it was tuned.

    Args:
        recipe: an intervention or a recipe.
        target: a task of pairs, or the name of a bundled one; guards: tasks of pairs or plain texts, or names.
        aim: "answer": the answer should become the most probable token. "even": answer and foil should become equally
            likely; smaller is better for the gap, |logit difference|. Only clean prompts are measured: for odds that lean
            either way, give every pair both ways round (under one `entity`, for they are no independent evidence), for
            evening out one side alone may be a push of all to the other.
        still: tasks of pairs, or names, in which the answer's probability should move neither up nor down. Rows whose
            answers are each other's foils would hide a push from one to the other.
        splits: a name or several, evaluated apart; a task without splits, or with rows of one other split only, is evaluated
            whole, as split "all".
        controls: further recipes to compare with, by name: {"another layer": push, "full tuning": delta}; one that is
            named like a tuning control stands in its place.
        prompt: words put before every prompt of the target as a control, such as "system : be cheerful .": is asking enough?
        retrain: False leaves the tuning controls out, which take as long as the tuning did, and longer.
        tolerances: what a guard may lose and still count as kept: "accuracy" (share of all prompts, 0.05), "margin"
            (share of its logit difference, 0.1), "loss" (nats per token, 0.02); "probability" (0.02): how far the answer's
            may move where it should be still, and how much of it answer and foil may lose when they are made even.
    Returns:
        Report; `report.checks` has the claims and whether they hold, `report.verdict` says them in words.
    Raises:
        ValueError: for an unknown aim, splits that a task does not have, a target or still task that is no task of pairs, two
            tasks of one name, a recipe made for another model or that cannot act on a task's prompts (a span they do not
            have), words of `prompt` that the model cannot read; nothing has run then.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe([recipe])
    if not isinstance(aim, str) or aim not in AIMS:
        raise ValueError(f"aim={aim!r} is unknown; choose {', '.join(map(repr, AIMS))}.")
    guards, still = ([one] if isinstance(one, (str, Task)) else list(one) for one in (guards, still))
    splits = [splits] if isinstance(splits, str) else list(splits)
    target, *guards = (Task.of(one) for one in (target, *guards))
    still = [Task.of(one) for one in still]
    for what, task in (("target", target), *(("still task", one) for one in still)):
        if task.kind != "pairs":
            raise ValueError(f"The {what} must be a task of pairs; {task!r} holds {task.kind} texts.")
    unknown = set(tolerances or {}) - set(TOLERANCES)
    if unknown:
        raise ValueError(f"There is no tolerance {unknown.pop()!r}; there are {', '.join(TOLERANCES)}.")
    if all(task.kind == "pairs" for task in guards):
        guards += _background(model)
    measures = {target.name: AIMS[aim].metrics, **{task.name: STILL for task in still}}
    tasks = [target, *still, *guards]
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError("Target and guards need different names, to be told apart in the report: wb.Task(rows, name).")
    parts = {task.name: _parts(model, task, splits) for task in tasks}
    given = {name: one if isinstance(one, Recipe) else Recipe([one]) for name, one in (controls or {}).items()}
    for name, one in {"the recipe": recipe, **given}.items():
        check_recipe(model, one)
        _refuse_misfits(model, name, one, parts)
    for _, part in parts[target.name] if prompt else ():
        _asked(part, prompt).on(model)  # words that the model cannot read are refused before anything runs
    shortest = min(min(_prompts(model, part).lengths) for found in parts.values() for _, part in found)
    random = random_controls(model, recipe, parts[target.name][0][1], shortest, draws, seed, AIMS[aim])
    tuned, missing = tuning_controls(recipe, given) if retrain else ({}, {})
    arms = {"recipe": recipe, **random, **tuned, **given}
    rows, examples = [], []
    for task in tasks:
        for split, part in parts[task.name]:
            place = {"role": "target" if task is target else "guard", "task": task.name, "split": split}
            measured, before, metrics = {}, None, measures.get(task.name, METRICS)
            for arm, changed in arms.items():
                before, after = measured[arm] = _measure(model, part, changed, before, metrics)
            if prompt and task is target:
                measured[f"prompt: {prompt}"] = before, _pairs(model, _asked(part, prompt), metrics=metrics)
            for arm, (before, after) in measured.items():
                rows += [{"arm": arm, **place, **row} for row in _compare(part, before, after, seed)]
                examples.append(_examples(part, before, after).assign(arm=arm, **place))
    table, each = pd.DataFrame(rows), pd.concat(examples, ignore_index=True)
    others = [arm for arm in dict.fromkeys(table.arm) if arm != "recipe"]
    against = pd.DataFrame(_against(each, others, seed), columns=AGAINST)
    settings = {"aim": aim, "seed": seed, "draws": draws, "tolerances": TOLERANCES | (tolerances or {}),
                "missing": missing}  # fmt: skip
    return Report(recipe.name or "recipe", table, against, each, settings)


def _background(model) -> list[Task]:
    """The bundled background texts, where this model knows their words: those that it has positions for."""
    task, longest = Task.load("background"), getattr(model.hf.config, "max_position_embeddings", None) or float("inf")
    try:
        fits = [len(model.ids(row["text"])) <= longest for row in task]
    except ValueError:
        return []
    rows = [row for row, fit in zip(task, fits, strict=True) if fit]
    return [Task(rows, task.name)] if model.tokenizer.unk_token_id is not None and len(rows) * 4 > len(task) else []


def _refuse_misfits(model, name: str, recipe: Recipe, parts: dict) -> None:
    for task, found in parts.items():
        for split, part in found:
            try:
                Edits(model.names, recipe, _prompts(model, part))
            except ValueError as error:
                raise ValueError(f"{name} does not fit task {task!r} ({split}): {error}") from None


def _parts(model, task: Task, splits) -> list[tuple[str, Task]]:
    """The splits that are there, with the rows that fit the model.

    Raises:
        ValueError: for a task of several splits, none of which is asked for: as a whole it has rows that were fitted on.
    """
    have = set(task.column("split"))
    found = [(name, task.split(name)) for name in splits if name in have] or [("all", task)]
    if found[0][0] == "all" and len(have) > 1:
        raise ValueError(f"Task {task.name!r} has the splits {', '.join(sorted(map(str, have)))}, none of {', '.join(splits)}. "
                         "Give splits= one of them, or task.split(name), which is then evaluated whole.")  # fmt: skip
    return [(name, part.on(model).task if part.kind == "pairs" else part) for name, part in found]


def _asked(task: Task, prompt: str) -> Task:
    """The same rows with words before both prompts; spans would stand elsewhere, and nothing acts here, so they go."""
    rows = [{key: value for key, value in row.items() if key != "spans"} for row in task]
    return Task([row | {side: f"{prompt} {row[side]}" for side in ("clean", "corrupted")} for row in rows], task.name)


def _prompts(model, task: Task) -> Prompts:
    """The clean prompts of pairs; each text as a prompt (its first third) and a continuation, so that changes of the
    prompt's last token or of generated tokens act as they would in use; what is measured is the continuation."""
    if task.kind == "pairs":
        pairs = task.on(model)
        return Prompts(pairs.clean, spans=pairs.spans)
    ids = [model.ids(text) for text in task.column("text")]
    return Prompts(ids, [max(1, len(one) // 3) for one in ids])


def _measure(model, task: Task, recipe: Recipe, before: dict | None = None, metrics=METRICS) -> tuple[dict, dict]:
    """Metric -> values, before (where not given) and after."""
    if task.kind == "pairs":
        return before or _pairs(model, task, metrics=metrics), _pairs(model, task, recipe, metrics=metrics)
    return _measure_texts(model, task, recipe)


def _pairs(model, task: Task, *recipe: Recipe, metrics=METRICS) -> dict:
    """Metric -> values per row."""
    pairs, prompts, exact = task.on(model), _prompts(model, task), {}
    if None in task.column("completion"):
        logits = model.logits(prompts, *recipe)
    else:  # one pass over prompts and their whole replies
        whole = [model.ids(f"{row['clean']} {row['completion']}") for row in task]
        both = model.logits(Prompts(whole, prompts.lengths, prompts.spans), *recipe, positions="all")
        said = [x[n - 1 : -1] for x, n in zip(both, prompts.lengths, strict=True)]
        right = [
            torch.equal(x.argmax(-1).cpu(), ids[n:]) for x, ids, n in zip(said, whole, prompts.lengths, strict=True)
        ]
        exact["exact"] = np.array(right, float)
        logits = torch.stack([x[0] for x in said])
    return {name: measure.metric(name)(logits, pairs.answer, pairs.foil).numpy() for name in metrics} | exact


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
    groups, rows = after["text"] if "text" in after else _clusters(task.column("entity"), task.column("template")), []
    for name, new in after.items():
        if name == "text":
            continue
        old = before[name]
        change, low, high = measure.mean_interval(new - old, groups, seed=seed)
        row = {"metric": name, "before": old.mean(), "after": new.mean(), "change": change, "ci_lo": low, "ci_hi": high}
        if name == "kl":
            row |= {"p95": np.quantile(new, 0.95), "p99": np.quantile(new, 0.99)}
        if name in WRONG:  # inputs that were steered the wrong way
            row |= {"wrong_way": float((WRONG[name] * new < WRONG[name] * old - 1e-4).mean())}
        if name == "gap" and old.any():
            ratio = measure.ratio_of_means((new - old)[None], old, groups, seed=seed)
            row |= {key: float(x[0]) for key, x in zip(("relative", "relative_lo", "relative_hi"), ratio, strict=True)}
        rows.append(row | {"n": len(new)})
    return rows


def _clusters(*labels) -> list | None:
    """The labelings (entity, template) that every row has; None without any."""
    return [list(one) for one in labels if all(x is not None and x == x for x in one)] or None


def _examples(task: Task, before: dict, after: dict) -> pd.DataFrame:
    """One line for each prompt and metric; for texts, means over the tokens of each."""
    frames = []
    for name in (name for name in after if name != "text"):
        if "text" in after:
            sides = [pd.Series(side[name]).groupby(after["text"]).mean().to_numpy() for side in (before, after)]
            about = {"prompt": task.column("text")}
        else:
            sides, about = [before[name], after[name]], {"prompt": task.column("clean")}
        about |= {"entity": task.column("entity"), "template": task.column("template"), "metric": name}
        frames.append(pd.DataFrame({"row": range(len(task)), **about, "before": sides[0], "after": sides[1]}))
    return pd.concat(frames, ignore_index=True)


def _against(each: pd.DataFrame, controls: list[str], seed: int) -> list[dict]:
    """On the target: what the recipe reaches beyond each control, prompt by prompt."""
    rows = []
    target = each[each["role"] == "target"]
    for (split, name), part in target.groupby(["split", "metric"], sort=False):
        own = part[part["arm"] == "recipe"].set_index("row")
        groups = _clusters(list(own["entity"]), list(own["template"]))
        for control in controls:
            other = part[part["arm"] == control].set_index("row")
            if other.empty:
                continue
            gain, low, high = measure.mean_interval((own["after"] - other["after"]).to_numpy(), groups, seed=seed)
            rows.append({"control": control, "split": split, "metric": name, "recipe": own["after"].mean(),
                         "control_after": other["after"].mean(), "difference": gain, "ci_lo": low, "ci_hi": high})  # fmt: skip
    return rows
