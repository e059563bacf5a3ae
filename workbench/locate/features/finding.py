"""Which features belong to a behaviour: by what they answer to, and by what changing them does."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from workbench import measure
from workbench.locate.features.tokens import by_token, codes
from workbench.model.plan import Prompts
from workbench.operations import Add, Clamp
from workbench.sae import SAE
from workbench.scores import Scores
from workbench.task import Task

WAYS = ("difference", "auroc", "attribution", "output")
DRAWS = 200  # shufflings of the labels


def find(model, task, sae, by: str = "difference", *, position=-1, metric="logit_diff", positive: str | None = None,
         candidates: int = 24, seed: int = 0) -> Scores:  # fmt: skip
    """Which features answer to this behaviour, and which bring it about?

    - "difference": mean activation on the one side minus the other, in units of the stream.
    - "auroc": 2 AUROC - 1, from -1 (only the other side) over 0 (no telling apart) to 1.
    - "attribution": (f_clean - f_corrupted) dm/df on the clean prompts, what taking the feature's value from the
      corrupted prompt would cost the metric, to first order, summed over the tokens of a span; the error term is held
      fixed.
    - "output": the exact change of the metric when the corrupted prompts get the feature at the largest activation it
      has on any of the prompts; for the `candidates` that differ most between the sides. A feature that detects a
      behaviour often does not cause it: this is the test.

    Nulls: for "difference" and "auroc" the labels are shuffled (sides exchanged within pairs), for "attribution" answer
    and foil are exchanged at random. For "output" active features drawn at random are pushed equally far. `null_p95` is
    for one feature looked at alone; the column `null_max` is what the best of all reaches in 95 % of shufflings, the bar
    for a feature that was picked because it came first.

    Args:
        task: pairs, or texts with two labels ("difference", "auroc"), or the name of a bundled task.
        sae: an attached SAE, or its name.
        position: where the features are read: a token position, a span of the task, or None for each feature's largest
            activation in the prompt (not for "attribution").
        positive: for labelled texts, the label that counts as the one side; the first row's by default.
    Returns:
        Scores over all features that fire on any prompt (for "output" the candidates).
    Raises:
        ValueError: for an SAE that is not attached, a task that does not fit, or no feature that fires.
    Source:
        Marks et al. 2025 (attribution with error terms); Arad et al. 2025 (input features are not output features).
    """
    began = time.perf_counter()
    sae, task = attached(model, sae), Task.of(task)
    if by not in WAYS:
        raise ValueError(f"by={by!r} is unknown; choose {', '.join(map(repr, WAYS))}.")
    sides = Sides.of(model, task, sae, position, positive)
    alive = ((sides.yes > 0).any(0) | (sides.no > 0).any(0)).nonzero()[:, 0]
    if not len(alive):
        raise ValueError(
            f"No feature of {sae.name!r} fires on these prompts at position {position}. Try position=None."
        )
    if by in ("attribution", "output") and sides.pairs is None:
        raise ValueError(f"by={by!r} needs pairs with answer and foil; task {task.name!r} holds {task.kind} texts.")
    rng = np.random.default_rng(seed)
    yes, no = sides.yes[:, alive].numpy().astype(float), sides.no[:, alive].numpy().astype(float)
    extra, base = {}, (float("nan"), float("nan"))
    if by == "output":
        return _output(model, sae, sides, alive, candidates, measure.metric(metric), metric, position, rng, seed, began)
    if by == "attribution":
        per_prompt, base = _attribution(model, sae, sides, alive.tolist(), measure.metric(metric), position)
        values, low, high = measure.mean_interval(per_prompt.T, sides.task.clusters(), seed=seed)
        null = np.abs(_flips(per_prompt.shape[1], rng) @ per_prompt.T / per_prompt.shape[1])
        cost = 7.0
    else:
        statistic = _difference if by == "difference" else _separation
        values = statistic(yes, no)
        per_prompt = (yes - no).T if sides.pairs is not None else np.concatenate([yes, no]).T
        low, high = _interval(statistic, yes, no, sides, rng, seed)
        null = np.stack([np.abs(statistic(*_shuffled(yes, no, sides.pairs is not None, rng))) for _ in range(DRAWS)])
        cost = 2.0
    extra |= {"null_max": np.full(len(alive), np.quantile(null.max(1), 0.95)), "active": (yes > 0).mean(0),
              "active_other": (no > 0).mean(0), "mean": yes.mean(0), "mean_other": no.mean(0)}  # fmt: skip
    what = "answer and foil exchanged at random" if by == "attribution" else "labels shuffled"
    return Scores([sae.feature(i) if position is None else sae.feature(i).at(position) for i in alive], values, low, high,
                  np.quantile(null, 0.95, axis=0), per_prompt, f"features.{by}",
                  _name(metric) if by == "attribution" else {"auroc": "2 AUROC - 1"}.get(by, "activation"), *base,
                  null=what, task=task.name, cost=cost, seconds=time.perf_counter() - began, seed=seed,
                  columns=extra)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sides:
    """The two sides of a task: features [prompt, d_sae] of each; the pairs, where it has pairs; the task's rows that were
    read, of labelled texts the one side's first."""

    yes: torch.Tensor
    no: torch.Tensor
    pairs: object
    task: Task

    @classmethod
    def of(cls, model, task: Task, sae: SAE, position, positive: str | None) -> Sides:
        if task.kind == "pairs":
            pairs = task.on(model)
            both = codes(model, sae, [*pairs.clean, *pairs.corrupted], position, [*pairs.spans, *pairs.spans])
            return cls(both[: len(pairs.clean)], both[len(pairs.clean) :], pairs, pairs.task)
        labels = list(dict.fromkeys(task.column("label"))) if task.kind == "labelled" else []
        positive = positive if positive is not None else labels[0] if labels else None
        if len(labels) < 2 or positive not in labels:
            raise ValueError(f"Features are found between two sides: pairs, or texts with labels, one of them "
                             f"positive={positive!r}; task {task.name!r} has labels {labels}.")  # fmt: skip
        if isinstance(position, str):
            raise ValueError(f"position={position!r}: texts have no spans; give a number, or None for the whole text.")
        rows = list(task)
        found = codes(model, sae, [model.ids(row["text"]) for row in rows], position)
        own = torch.tensor([row["label"] == positive for row in rows])
        ordered = sorted(rows, key=lambda row: row["label"] != positive)
        return cls(found[own], found[~own], None, Task(ordered, task.name))


def attached(model, sae) -> SAE:
    """An SAE of this model, by itself or by its name.

    Raises:
        ValueError: when it is not attached, so that its features have no address yet, or another is under its name.
    """
    name, known = sae.name if isinstance(sae, SAE) else sae, ", ".join(model.saes) or "none"
    if name in model.saes and isinstance(sae, SAE) and not torch.equal(sae.W_dec.cpu(), model.saes[name].W_dec.cpu()):
        raise ValueError(f"Another SAE is attached as {name!r}, with other features than this one. Type: "
                         f"model.attach(sae, '{name}_2'), or model.detach({name!r}) first.")  # fmt: skip
    if name not in model.saes:
        raise ValueError(f"The SAE {name!r} is not attached to this model (attached: {known}), so its features have no "
                         "address. Type: sae = model.attach(sae)")  # fmt: skip
    return model.saes[name]


def _difference(yes, no):
    return yes.mean(0) - no.mean(0)


def _separation(yes, no):
    """2 AUROC - 1 of each column: how much more often the one side is larger (ties count half)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([yes, no]), axis=0)[: len(yes)].sum(0)
    return 2 * (ranks - len(yes) * (len(yes) + 1) / 2) / (len(yes) * len(no)) - 1


def _shuffled(yes, no, paired: bool, rng):
    if paired:
        swap = rng.random((len(yes), 1)) < 0.5
        return np.where(swap, no, yes), np.where(swap, yes, no)
    both = np.concatenate([yes, no])[rng.permutation(len(yes) + len(no))]
    return both[: len(yes)], both[len(yes) :]


def _interval(statistic, yes, no, sides: Sides, rng, seed: int, draws: int = 200):
    paired, clusters = sides.pairs is not None, sides.task.clusters()
    if min(len(yes), len(no)) < 2:
        return np.full(yes.shape[1], np.nan), np.full(yes.shape[1], np.nan)
    drawn = []
    for _ in range(0 if clusters else draws):
        i = rng.integers(0, len(yes), len(yes))
        drawn.append(statistic(yes[i], no[i if paired else rng.integers(0, len(no), len(no))]))
    n = len(yes) if paired else len(yes) + len(no)
    for counts in measure.cluster_counts(n, clusters, draws, seed) if clusters else ():
        i = np.repeat(np.arange(n), counts)
        one, other = (i, i) if paired else (i[i < len(yes)], i[i >= len(yes)] - len(yes))
        if len(one) and len(other):  # a draw of few clusters may miss a side
            drawn.append(statistic(yes[one], no[other]))
    return np.quantile(drawn, [0.025, 0.975], axis=0)


def _flips(n: int, rng) -> np.ndarray:
    return rng.choice([-1.0, 1.0], size=(DRAWS, n))


def _name(metric) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")


def _attribution(model, sae, sides, features, of, position):
    """[feature, prompt], and the metric's mean on either side."""
    if position is None:
        raise ValueError("by='attribution' is taken at one position: give position=-1, a number or a span of the task.")
    pairs, n, sae = sides.pairs, len(sides.pairs.clean), sae.to("cpu")
    given = [by_token(model, sae, side, position, pairs.spans) for side in (pairs.clean, pairs.corrupted)]
    effects, clean = torch.zeros(len(features), n), torch.zeros(n)
    for length in sorted({len(ids) for ids in pairs.clean}):
        some = [i for i in range(n) if len(pairs.clean[i]) == length]
        answer, foil = pairs.answer[some], pairs.foil[some]

        def metric(logits, rows, answer=answer, foil=foil):
            return of(logits, answer[rows], foil[rows])

        clean[some], _, slopes = model.gradients([pairs.clean[i] for i in some], [sae.at], metric)
        (slopes,) = slopes.values()
        for row, i in enumerate(some):  # token by token: a product of means over a span is no sum of products
            columns = Prompts([pairs.clean[i]], spans=[pairs.spans[i]]).columns(sae.at.at(position), 0)
            slope = sae.slope(slopes[row, columns], given[0][i], features)
            mine, other = (sae.encode(side[i], features) for side in given)
            effects[:, i] = ((mine - other) * slope).sum(0)
    corrupted = of(model.logits(pairs.corrupted, spans=pairs.spans), pairs.answer, pairs.foil)
    return effects.double().numpy(), (float(clean.mean()), float(corrupted.mean()))


def _output(model, sae, sides, alive, candidates, of, metric, position, rng, seed, began) -> Scores:
    """Exact effects of giving each candidate's largest activation to the corrupted prompts, beside random features."""
    pairs = sides.pairs
    gap = (sides.yes - sides.no).mean(0).abs()[alive]
    chosen = sorted(alive[gap.argsort(descending=True)[:candidates]].tolist())
    top = torch.maximum(sides.yes.amax(0), sides.no.amax(0))

    def run(*change):
        logits = model.logits(pairs.corrupted, *change, spans=pairs.spans)
        return of(logits, pairs.answer, pairs.foil).double().numpy()

    base = run()
    clean = of(model.logits(pairs.clean, spans=pairs.spans), pairs.answer, pairs.foil).double().numpy()
    effects = np.stack([run(Clamp(sae.feature(i).at(position), float(top[i]))) - base for i in chosen])
    # the same push, along features drawn at random from those that fire here
    x, local = torch.cat(by_token(model, sae, pairs.corrupted, position, pairs.spans)), sae.to("cpu")
    moved = [local.change(top[[i]] - local.encode(x, [i]), x, [i]).norm(dim=-1).mean() for i in chosen]
    size = float(np.median(moved))
    others = [int(i) for i in alive if int(i) not in chosen] or alive.tolist()
    drawn = rng.choice(others, size=min(16, len(others)), replace=False)
    at = sae.at.at(position)
    pushed = np.stack([run(Add(at, size * sae.W_dec[i].cpu() / sae.W_dec[i].cpu().norm())) - base for i in drawn])
    weights = measure.bootstrap_weights(len(base), DRAWS, seed)
    null = np.abs(pushed @ weights.T)
    values, low, high = measure.mean_interval(effects.T, pairs.task.clusters(), seed=seed)
    flipped = np.abs(_flips(effects.shape[1], rng) @ effects.T / effects.shape[1])
    columns = {"null_max": np.full(len(chosen), np.quantile(null.max(0), 0.95)),
               "null_shuffled": np.quantile(flipped, 0.95, axis=0), "clamped_to": top[chosen].double().numpy(),
               "mean": sides.yes[:, chosen].double().mean(0).numpy(), "mean_other": sides.no[:, chosen].double().mean(0).numpy()}  # fmt: skip
    return Scores([sae.feature(i).at(position) for i in chosen], values, low, high,
                  np.full(len(chosen), np.quantile(null, 0.95)), effects, "features.output", _name(metric),
                  float(clean.mean()), float(base.mean()), "", "features drawn at random, pushed equally far", {},
                  sides.task.name, 5.0 + len(chosen) + len(drawn), time.perf_counter() - began, seed, "", columns)  # fmt: skip
