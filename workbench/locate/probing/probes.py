"""What can be read off a site by a probe, beside everything that a probe could get without the model's help."""

from __future__ import annotations

import copy
import os
import time

import numpy as np
import torch
from tqdm import tqdm

from workbench import measure
from workbench.component import SINGLE, Component
from workbench.locate.probing import fit as fitting
from workbench.locate.probing.examples import Examples, check_classes, examples, read, sites
from workbench.model import Model
from workbench.scores import Scores
from workbench.task import Task


def probe(model, task: Task, at, method: str = "logistic", *, k: int = 5, label=None, types: str | None = None,
          fit="fit", test="test", ood="ood", untrained=True, draws: int = 19, controls: int = 5, seed: int = 0,
          progress: bool = True) -> Scores:  # fmt: skip
    """At which sites can a linear probe read the label? Accuracy on held-out rows, beside what needs no trained model.

    A probe is fitted on split `fit` (C by inner cross-validation over entities, else templates) and measured on `test`
    and `ood`. That a probe can read something does not mean that the model uses it: see `erase` and `das`.

    Columns of the result, all accuracies on test, or on ood where the name ends so:
        ood, ood_lo, ood_hi: with the interval over entities. majority: the class most frequent in `fit`.
        null_p95, null_ood: what the same probe reaches in 95 % of draws of shuffled labels (fitted and measured on
            them, with the C of the real ones; ties broken by lot); `shuffled` is its mean; null_best is what the best
            of all sites reaches.
        untrained, untrained_ood: the same probe on a model of the same config with random weights.
        tokens, tokens_ood: a probe on which tokens stand in the prompt up to here.
        seen, control, selectivity: on rows of `fit` left out, all of whose word types have been seen, the accuracy, the
            accuracy of the control task (a random label for each word type), and the difference; identity_selectivity:
            the same difference for a probe that sees the word type and nothing else.
        C: the inverse penalty chosen. units: for sparse probes, what they read.

    Args:
        task: labelled texts or pairs, or the name of a bundled task.
        at: a component or family with a position ("resid_post.*@-1", "z.*.*@end"), or a list. The neurons of a layer
            ("neuron.*.*@-1") are one site, and so are the weights of its experts. Spans are averaged, and so is the whole
            prompt where no position is given.
        method: "logistic", "difference_of_means" or "sparse" (logistic on the k units of the site that differ most).
        label, types: what the classes and the word types are, see `probing.examples.examples`.
        fit, test, ood: splits, each a name or several. A task without splits has a third of its entities held out.
        untrained: False leaves that baseline out (it needs the memory of a second model); or a Model to use.
        draws: of shuffled labels; 19 make the threshold exact at 5 %. controls: draws of the control task.
    Returns:
        Scores; per_prompt [site, test row] is 1 where the probe is right (of pairs: clean rows, then corrupted ones).
    Raises:
        ValueError: for an unknown method, a site that is no vector, classes with too few rows.
    Source:
        Alain and Bengio 2016; Hewitt and Liang 2019 (control tasks, selectivity); Gurnee et al. 2023 (sparse probing).
    """
    began = time.perf_counter()
    if method not in fitting.METHODS:
        raise ValueError(f"method={method!r} is unknown; choose {', '.join(map(repr, fitting.METHODS))}.")
    if draws < 1 or controls < 1 or k < 1:
        raise ValueError(f"draws, controls and k are at least 1; got {draws}, {controls} and {k}.")
    task, at = Task.of(task), sites(model, at)
    found = examples(model, task, label, types, seed)
    rows = {"fit": found.rows(fit), "test": found.rows(test), "ood": found.rows(ood)}
    check_classes(found, rows["fit"], fit, task)
    if not len(rows["test"]):
        raise ValueError(
            f"Task {task.name!r} has no rows of split {test!r}; it has {', '.join(sorted(set(found.splits)))}."
        )
    found, rows = found.keep(rows)
    trained = read(model, found.prompts, at)
    other = untrained if isinstance(untrained, Model) else random_weights(model, seed) if untrained else None
    naive = read(other, found.prompts, at) if other is not None else {}
    study = Study(found, rows, method, k, draws, controls, seed)
    hidden = not progress or os.environ.get("WORKBENCH_STRICT") == "1"
    shown = tqdm(at, desc="probing", leave=False, delay=5, disable=hidden)
    table = [study.site(trained[one], naive.get(one)) for one in shown]
    right = np.array([line.pop("right") for line in table])
    right_ood = np.array([line.pop("right_ood") for line in table])
    best = fitting.threshold(np.max([line.pop("draws") for line in table], axis=0))  # sites share the draws
    units = [_units(one, line.pop("units")) for one, line in zip(at, table, strict=True)]
    columns = {name: np.array([line[name] for line in table]) for name in table[0]}
    columns |= {"units": units} if method == "sparse" else {}
    values, low, high = _interval(right, found.group[rows["test"]], seed)
    columns = dict(zip(("ood", "ood_lo", "ood_hi"), _interval(right_ood, found.group[rows["ood"]], seed))) | columns
    columns["null_best"] = np.full(len(at), best)
    columns["identity_selectivity"] = np.full(len(at), study.identity())
    tokens = study.tokens(at)
    columns |= {name: np.array([tokens[one.position][name] for one in at]) for name in tokens[at[0].position]}
    why = " ".join(filter(None, [found.why, study.why, "" if len(rows["ood"]) else f"No rows of split {ood!r}."]))
    null = f"the same probe fitted on shuffled labels{' (sides of pairs swapped)' if found.other is not None else ''}, {draws} draws"
    return Scores(at, values, low, high, columns.pop("null_p95"), right, f"probing.{method}", "accuracy", null=null,
                  labels=_position_labels(model, found, at), task=task.name, cost=1.0 + bool(naive),
                  seconds=time.perf_counter() - began, seed=seed, why=why, columns=columns)  # fmt: skip


def random_weights(model, seed: int = 0) -> Model:
    """The untrained baseline: a model of the same config and tokenizer whose weights are as they are before training."""
    config = copy.deepcopy(model.hf.config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = type(model.hf)(config).eval()
    return Model(hf.to(model.hf.device, model.hf.dtype), model.tokenizer, bos=model.bos)


class Study:
    """One task's rows and random draws, which all sites share, so that their figures can be compared."""

    def __init__(self, found: Examples, rows: dict, method: str, k: int, draws: int, controls: int, seed: int):
        self.found, self.rows, self.method, self.k, self.why = found, rows, method, k, ""
        self.y = {name: found.labels[which] for name, which in rows.items()}
        rng, types = np.random.default_rng(seed), found.types[rows["fit"]]
        self.shuffled = [{name: found.shuffled(which, rng) for name, which in rows.items()} for _ in range(draws)]
        self.lots = rng.uniform(
            -0.5, 0.5, draws
        )  # ties are broken by lot, or equal accuracies would make the null too strict
        self.seen, self.held = fitting.seen_rows(types, self.y["fit"], rng)
        self.control = [fitting.control_labels(types, self.y["fit"], rng) for _ in range(controls)]
        if len(self.held) < 10 or len(np.unique(types)) < 4:
            self.held, self.why = self.held[:0], "Too few word types stand in several rows for a control task."
        classes, counts = np.unique(self.y["fit"], return_counts=True)
        self.majority = float((self.y["test"] == classes[counts.argmax()]).mean())

    def site(self, x: np.ndarray, naive: np.ndarray | None) -> dict:
        """Every figure for one site. x, naive: activations [row, width] of the model and of the untrained one."""
        fit, y, group = x[self.rows["fit"]], self.y, self.found.group[self.rows["fit"]]
        c = fitting.strength(self.method, fit, y["fit"], group, self.k)

        def train(rows, labels, which=slice(None)):
            return fitting.fitted(self.method, rows[which], labels[which], c, self.k)

        def right(model, split, values=x, labels=y):
            rows = self.rows[split]
            return (model.predict(values[rows]) == labels[split]).astype(float) if len(rows) else np.zeros(0)

        best, null, plain = train(fit, y["fit"]), {"test": [], "ood": []}, []
        for labels, lot in zip(self.shuffled, self.lots, strict=True):
            worse = train(fit, labels["fit"])
            for split, draws in null.items():
                draws.append(_mean(right(worse, split, labels=labels)) + lot / max(1, len(y[split])))
            plain.append(_mean(right(worse, "test", labels=labels)))
        line = {
            "right": right(best, "test"), "right_ood": right(best, "ood"), "majority": self.majority,
            "null_p95": fitting.threshold(null["test"]), "null_ood": fitting.threshold(null["ood"]),
            "shuffled": np.mean(plain), "draws": null["test"], "C": c, "units": _chosen(best),
        }  # fmt: skip
        if naive is not None:
            start = naive[self.rows["fit"]]
            c_naive = fitting.strength(self.method, start, y["fit"], group, self.k)
            blank = fitting.fitted(self.method, start, y["fit"], c_naive, self.k)
            line |= {
                "untrained": right(blank, "test", naive).mean(),
                "untrained_ood": _mean(right(blank, "ood", naive)),
            }
        return line | self._selectivity(fit, train)

    def _selectivity(self, fit: np.ndarray, train) -> dict:
        """Accuracy on rows whose word types have been seen: of the task, and of the control task."""
        if not len(self.held):
            return dict.fromkeys(("seen", "control", "selectivity"), np.nan)

        def accuracy(labels) -> float:
            if len(np.unique(labels[self.seen])) < 2:
                return float((labels[self.held] == labels[self.seen][0]).mean())
            return float((train(fit, labels, self.seen).predict(fit[self.held]) == labels[self.held]).mean())

        seen, control = accuracy(self.y["fit"]), float(np.mean([accuracy(labels) for labels in self.control]))
        return {"seen": seen, "control": control, "selectivity": seen - control}

    def identity(self) -> float:
        """The selectivity of a probe that sees the word type and nothing else: 0 where types decide the label."""
        _, which = np.unique(self.found.types[self.rows["fit"]], return_inverse=True)
        types = np.eye(which.max() + 1)[which]
        return self._selectivity(types, lambda x, labels, rows: fitting.token_probe(x[rows], labels[rows]))[
            "selectivity"
        ]

    def tokens(self, at: list[Component]) -> dict:
        """For each position the token-identity baseline: a probe on the tokens that stand there or before."""
        found, table = self.found, {}
        for one in {one.position: one for one in at}.values():
            prompts = found.prompts
            upto = [max(prompts.columns(one, row)) - prompts.pads[row] + 1 for row in range(len(prompts.ids))]
            x = fitting.bag(found.ids, upto)
            fit, y = x[self.rows["fit"]], self.y
            model = fitting.token_probe(fit, y["fit"])
            scores = {
                split: _mean(model.predict(x[self.rows[split]]) == y[split]) if len(y[split]) else np.nan
                for split in ("test", "ood")
            }
            table[one.position] = {"tokens": scores["test"], "tokens_ood": scores["ood"]}
        return table


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _interval(right: np.ndarray, clusters: np.ndarray, seed: int) -> tuple:
    """Accuracy of each site with its interval; right is [site, row], rows of one cluster are resampled together."""
    if not right.shape[1]:
        return (np.full(len(right), np.nan),) * 3
    return measure.mean_interval(right.T, clusters, seed=seed)


def _chosen(model) -> list[int]:
    select = getattr(model, "named_steps", {}).get("selectkbest")
    return [] if select is None else [int(i) for i in select.get_support(indices=True)]


def _units(one: Component, units) -> str:
    """The units that a sparse probe reads: neurons and experts by their address, others by their number within the site."""
    if one.kind in SINGLE and one.index == "*":
        return " ".join(f"{one.kind}.{one.layer}.{unit}" for unit in units)
    return " ".join(map(str, units))


def _position_labels(model, found: Examples, at: list[Component]) -> dict:
    """Token text at numbered positions, where all prompts agree on it."""
    labels = {}
    for place in {one.position for one in at if isinstance(one.position, int)}:
        seen = {int(ids[place]) for ids in found.ids}
        labels[place] = model.token(seen.pop()).strip() if len(seen) == 1 else "·"
    return labels
