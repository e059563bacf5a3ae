"""Is what a probe reads also needed? Take a concept out of a site, least-squares minimally, and watch the behaviour."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from workbench import measure
from workbench.locate.probing import fit as fitting
from workbench.locate.probing.examples import check_classes, examples, sites
from workbench.locate.probing.resumed import each
from workbench.model import Prompts
from workbench.model.names import MIXTURE
from workbench.operations import Affine
from workbench.task import Task

ERASERS = ("leace", "orthogonal")


@dataclass(frozen=True, eq=False)
class Erasure:
    """What is left of a concept, and of a behaviour, once the concept is erased?

    Attributes:
        intervention: the eraser as a value for `model.logits`, `model.generate` or a recipe.
        frame: a line each for nothing, the erasure and random erasures of the same rank (their mean over draws):
            gain: what a probe gains on the fit rows over always guessing the classes' frequencies, in nats; 0 is chance.
            probe: accuracy of a new probe, fitted on test rows and measured on ood rows, after the erasure.
            moved: mean length of the change, as a share of the activation's own spread.
            accuracy, logit_diff (test) and accuracy_ood, logit_diff_ood: the behaviour on both sides of each pair, how
            often and by how much the right one of answer and foil is preferred; with ci_lo and ci_hi for the accuracy
            on test.
        draws: accuracy on test under each random erasure.
        rank: dimensions taken out at each site. classes: what was erased.
    """

    intervention: Affine
    frame: object
    draws: np.ndarray
    rank: int
    classes: tuple[str, ...]
    method: str
    task: str
    behaviour: str
    cost: float
    seconds: float
    seed: int
    why: str = ""

    def apply(self, x) -> torch.Tensor:
        """The activations [..., width] of the first site without the concept."""
        return self.intervention.change(torch.as_tensor(x), 0)

    def __repr__(self) -> str:
        at = self.intervention.at
        where = str(at[0]) if len(at) == 1 else f"{at[0]} to {at[-1]}"
        line = self.frame.set_index("erased").accuracy
        behaves = "" if np.isnan(line.iloc[0]) else f", {self.behaviour} {line['nothing']:.2f} -> {line['concept']:.2f}"
        if behaves and "random" in line:
            behaves += f" (random {line['random']:.2f})"
        return f"Erasure({self.method} of {self.task} at {where}, rank {self.rank}{behaves})"

    def plot(self):
        """Probe and behaviour before and after, beside random erasures, as a matplotlib figure."""
        from workbench.locate.probing.curves import bars

        return bars(self)


def erase(model, task: Task, at, method: str = "leace", *, label=None, behaviour=None, fit="fit", test="test", ood="ood",
          draws: int = 5, seed: int = 0) -> Erasure:  # fmt: skip
    """Does the model need what a linear probe reads here? The concept is erased, and the behaviour measured again.

    The eraser is x - W^+ P W (x - mean), with W the whitening of the fit rows and P the projection on the whitened
    covariance with the classes. No linear probe can then do better on the fit rows than guessing, and no affine map that
    achieves this changes x less. Several sites are erased together: each eraser is fitted in forward order, with the
    earlier ones acting (concept scrubbing); one site alone is often repaired by what later layers read elsewhere.

    Args:
        task: what is erased: labelled texts or pairs.
        at: a component or family with a position ("resid_post.4@-1", "resid_post.*@end"), or a list.
        method: "leace", or "orthogonal" (W = 1: the class means are projected out, at the price of a larger change).
        label: what the classes are, see `probing.examples.examples`.
        behaviour: pairs on which the effect is measured; by default the task itself, if it is one of pairs.
        draws: of random erasures of the same rank (in the whitened space), the control; 0 leaves them out.
    Returns:
        Erasure, with the intervention and a table.
    Raises:
        ValueError: for an unknown method, a site without a position, single neurons, experts, or classes with too few rows.
    Source:
        Belrose et al. 2023, "LEACE", theorem 4.3 and section 5; Elazar et al. 2021 on erasing as a test of use.
    """
    began = time.perf_counter()
    if method not in ERASERS:
        raise ValueError(f"method={method!r} is unknown; choose {' or '.join(map(repr, ERASERS))}.")
    task, at = Task.of(task), sites(model, at)
    for one in at:
        if one.kind in ("neuron", *MIXTURE):
            raise ValueError(f"{one}: an eraser acts on a vector. Take mlp_out.{one.layer} or the residual stream.")
        if one.position is None:
            raise ValueError(
                f"{one} needs a position, for example {one}@-1, since each prompt gives one row to fit on."
            )
    found = examples(model, task, label, seed=seed)
    behaves = Behaviour(model, task, behaviour, found, (test, ood))
    rows = {"fit": found.rows(fit), "test": found.rows(test), "ood": found.rows(ood)}
    check_classes(found, rows["fit"], fit, task)
    found, rows = found.keep(rows)
    labels = {name: found.labels[which] for name, which in rows.items()}
    classes = np.unique(labels["fit"])
    rng, maps, others, intervention = np.random.default_rng(seed), [], [[] for _ in range(draws)], None
    fit_prompts = Prompts([found.ids[i] for i in rows["fit"]], spans=[found.spans[i] for i in rows["fit"]])
    for i, one in enumerate(at):
        x = model.activations(fit_prompts, one, *([intervention] if maps else [])).double().numpy()
        maps.append(eraser(x, labels["fit"], method))
        for other in others:
            other.append(random_eraser(x, len(classes) - 1, rng, method))
        intervention = _affine(at[: i + 1], maps)
    before = model.activations(found.prompts, at[-1]).double().numpy()

    changes = [None, intervention, *(_affine(at, other) for other in others)]
    lines = behaves.measure(at, changes, seed)
    for line, change, last in zip(lines, changes, [None, maps[-1], *(other[-1] for other in others)], strict=True):
        if change is None:
            after = before
        elif len(at) == 1:  # then nothing else acts on the last site
            after = before @ last[0].T + last[1]
        else:
            after = model.activations(found.prompts, at[-1], change).double().numpy()
        spread = np.linalg.norm(before - before.mean(0), axis=1).mean() or 1.0
        line |= _readable(after, rows, labels) | {"moved": np.linalg.norm(after - before, axis=1).mean() / spread}
    chance = lines[2:]
    lines = [{"erased": name} | line for name, line in zip(("nothing", "concept"), lines)]
    if chance:
        lines.append({"erased": "random", **{k: float(np.mean([line[k] for line in chance])) for k in chance[0]}})
    import pandas as pd

    why = "" if behaves.name else "Labelled texts have no answers; give behaviour=, a task of pairs."
    return Erasure(intervention, pd.DataFrame(lines), np.array([line["accuracy"] for line in chance]), len(classes) - 1,
                   tuple(map(str, classes)), method, task.name, behaves.name, float(1 + len(at) + (2 + draws) * bool(behaves.rows)),
                   time.perf_counter() - began, seed, " ".join(filter(None, [found.why, why])))  # fmt: skip


def eraser(x: np.ndarray, y: np.ndarray, method: str = "leace") -> tuple[np.ndarray, np.ndarray]:
    """The affine map after which classes cannot be told apart linearly on these rows, as (matrix, bias).

    Args:
        x: [row, width]; y: [row], class labels.
    """
    mean = x.mean(0)
    means = np.stack(
        [(x[y == one].mean(0) - mean) * (y == one).mean() for one in np.unique(y)], 1
    )  # covariance with one-hot
    white, back = whitening(x) if method == "leace" else (np.eye(x.shape[1]),) * 2
    left, size, _ = np.linalg.svd(white @ means, full_matrices=False)
    return _map(left[:, size > 1e-9 * max(size.max(), 1e-300)], white, back, mean)


def random_eraser(x: np.ndarray, rank: int, rng, method: str = "leace") -> tuple[np.ndarray, np.ndarray]:
    """The control: a random subspace of the same rank taken out, drawn where the rows vary."""
    white, back = whitening(x) if method == "leace" else (np.eye(x.shape[1]),) * 2
    basis, _ = np.linalg.qr(white @ back @ rng.standard_normal((x.shape[1], rank)))
    return _map(basis, white, back, x.mean(0))


def whitening(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The symmetric square roots of the inverse covariance and of the covariance, on the directions that vary at all."""
    size, vectors = np.linalg.eigh(np.cov(x.T, bias=True).reshape(x.shape[1], x.shape[1]))
    kept = size > max(size.max(), 0) * x.shape[1] * np.finfo(float).eps
    root, vectors = np.sqrt(size[kept]), vectors[:, kept]
    return (vectors / root) @ vectors.T, (vectors * root) @ vectors.T


def _map(basis, white, back, mean) -> tuple[np.ndarray, np.ndarray]:
    taken = back @ basis @ basis.T @ white
    return np.eye(len(mean)) - taken, taken @ mean


def _affine(at, maps) -> Affine:
    matrix, bias = (torch.tensor(np.stack(part), dtype=torch.float32) for part in zip(*maps))
    return Affine(at, matrix, bias)


def _readable(x: np.ndarray, rows: dict, labels: dict) -> dict:
    """How much of the classes a probe still reads: its gain on the fit rows, and a new probe's accuracy on held-out rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    fit, y = x[rows["fit"]] - x[rows["fit"]].mean(0), labels["fit"]
    fit /= np.sqrt((fit**2).mean()) or 1.0  # one scale for all units, so that rounding stays as small as it is
    names, counts = np.unique(y, return_counts=True)
    guess = -(counts / len(y) * np.log(counts / len(y))).sum()
    model = LogisticRegression(C=100.0, max_iter=2000).fit(fit, y)
    line = {"gain": float(guess - log_loss(y, model.predict_proba(fit), labels=list(names))), "probe": float("nan")}
    if len(labels["ood"]) and len(np.unique(labels["test"])) > 1:
        fresh = fitting.fitted("logistic", x[rows["test"]], labels["test"], 0.1)
        line["probe"] = float((fresh.predict(x[rows["ood"]]) == labels["ood"]).mean())
    return line


class Behaviour:
    """Pairs on which a behaviour is measured: both sides, in two splits ("test" and "ood", or what stands for them)."""

    def __init__(self, model, task: Task, behaviour, found, splits):
        self.name, self.model, self.pairs, self.rows = "", model, None, {}
        if behaviour is None and task.kind != "pairs":
            return
        task = task if behaviour is None else Task.of(behaviour)
        self.name, self.pairs = task.name, task.on(model)
        named = self.pairs.task.column("split")
        for split, end in zip(splits, ("", "_ood"), strict=True):
            wanted = [split] if isinstance(split, str) else list(split)
            rows = [i for i, one in enumerate(named) if (one or "test") in wanted]
            if behaviour is None and not any(named):  # then the third that the eraser has not seen
                rows = np.unique(found.pair[found.rows(split)]).tolist()
            if rows:
                self.rows[end] = sorted(rows, key=lambda i: len(self.pairs.clean[i]))  # so that little is padding

    def measure(self, at: list, changes: list, seed: int) -> list[dict]:
        """For every change, accuracy and logit difference of the right one of answer and foil, over both sides of pairs."""
        empty = dict.fromkeys(
            ("accuracy", "ci_lo", "ci_hi", "logit_diff", "accuracy_ood", "logit_diff_ood"), float("nan")
        )
        lines = [dict(empty) for _ in changes]
        for end, rows in self.rows.items():
            pairs, two = self.pairs, [*rows, *rows]
            prompts = Prompts([*(pairs.clean[i] for i in rows), *(pairs.corrupted[i] for i in rows)],
                              spans=[pairs.spans[i] for i in two])  # fmt: skip
            sign = torch.tensor([1.0, -1.0]).repeat_interleave(len(rows))
            answer, foil = pairs.answer[two], pairs.foil[two]

            def read(logits, which, sign=sign, answer=answer, foil=foil):
                return sign[which] * measure.logit_diff(logits, answer[which], foil[which])

            if len(at) == 1:
                functions = [None if one is None else partial(_changed, one) for one in changes]
                margins = each(self.model, prompts, at[0], functions, read)
            else:
                every = torch.arange(len(two))
                margins = [
                    read(self.model.logits(prompts, *([] if one is None else [one])), every).numpy() for one in changes
                ]
            for line, margin in zip(lines, margins, strict=True):
                both = (margin > 0).reshape(2, -1).mean(0)
                right, low, high = measure.mean_interval(both, pairs.task.clusters(rows), seed=seed)
                line |= {f"accuracy{end}": float(right), f"logit_diff{end}": float(margin.mean())}
                line |= {"ci_lo": float(low), "ci_hi": float(high)} if not end else {}
        return lines


def _changed(intervention: Affine, x: torch.Tensor, rows) -> torch.Tensor:
    return intervention.change(x, 0)
