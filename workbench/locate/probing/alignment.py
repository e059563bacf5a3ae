"""Does the model use a variable here? Learn the subspace whose swap between two prompts swaps the answer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from workbench import measure, storage
from workbench.component import Component
from workbench.locate.probing import fit as fitting
from workbench.locate.probing.examples import examples, read, sites
from workbench.locate.probing.resumed import Apply, each
from workbench.model import Prompts
from workbench.model.names import MIXTURE
from workbench.model.plan import TOKENS_PER_PASS
from workbench.scores import Scores
from workbench.task import Task


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where is the variable, and in which subspace?

    Attributes:
        scores: interchange-intervention accuracy of the learned subspace at each site, on test; null_p95 is what random
            subspaces reach; columns: ood, fit, full_site, difference_of_means (each also with _ood), null_ood.
        directions: site -> orthonormal [k, width]; `wb.ProjectOut(site, directions)` takes the subspace out.
        losses: site -> loss along training, in nats.
        k: dimensions.
    """

    scores: Scores
    directions: dict
    losses: dict
    k: int

    @property
    def frame(self):
        """The table of the scores."""
        return self.scores.frame

    @property
    def note(self) -> str:
        """A warning where the subspace does more than the whole site: then it works by a path the model does not use."""
        gain = self.scores.values - self.scores.columns["full_site"]
        odd = [str(one) for one, more in zip(self.scores.components, gain, strict=True) if more > 0.1]
        return "" if not odd else (f"At {', '.join(odd)} the subspace does more than the whole site: it may wake a path that the "
                                   "model itself does not use (interpretability illusion, Makelov et al. 2024).")  # fmt: skip

    def __repr__(self) -> str:
        best = self.scores.top(1)[0]
        i = self.scores.components.index(best)
        return (f"Alignment(das, k={self.k}, {len(self.directions)} site{'s' * (len(self.directions) > 1)}, {self.scores.task}, "
                f"best {best}: {self.scores.values[i]:.2f}, full site {self.scores.columns['full_site'][i]:.2f}, "
                f"random {self.scores.null_p95[i]:.2f})")  # fmt: skip

    def plot(self):
        """Interchange accuracy by site beside its baselines, as a matplotlib figure."""
        from workbench.locate.probing.curves import interchange

        return interchange(self)

    def save(self, folder) -> Path:
        """Write the scores, the directions (safetensors) and the losses (JSON): all of it, or nothing."""
        directions = {str(one): basis for one, basis in self.directions.items()}
        losses = {"k": self.k, "losses": {str(one): values for one, values in self.losses.items()}}
        return storage.write(
            folder, self.scores.files() | {"directions.safetensors": directions, "alignment.json": losses}
        )

    @classmethod
    def load(cls, folder) -> Alignment:
        """Read an alignment back.

        Raises:
            FileNotFoundError: when `folder` holds none.
        """
        plain, scores = storage.read(cls, folder, "alignment.json"), Scores.load(folder)
        stored = storage.read_tensors(Path(folder) / "directions.safetensors")
        order = scores.components
        return cls(
            scores,
            {one: stored[str(one)] for one in order},
            {one: plain["losses"][str(one)] for one in order},
            plain["k"],
        )


def das(model, task: Task, at, *, k: int = 1, label=None, steps: int = 40, lr: float = 0.03, batch: int = 16, fit="fit",
        test="test", ood="ood", draws: int = 19, seed: int = 0) -> Alignment:  # fmt: skip
    """Which k dimensions of a site carry what decides the answer? Distributed alignment search.

    For a base and a source prompt, the two sides of a pair in either order, the base's activation b becomes b + R R^T
    (s - b) with the source's s; the columns of R are orthonormal and trained so that the source's answer comes out. The
    figure is the interchange-intervention accuracy (IIA): how often it is the most probable token. Beside it stand the
    swap of the whole site, of the difference of class means, and of random subspaces of the same size.

    Args:
        task: pairs.
        at: a component or family with a position that is one token ("resid_post.5@-1", "z.4.2@end"), or a list.
        k: dimensions of the subspace. label: the classes for the difference of means, as for `probe`.
        steps, lr, batch: of Adam, on the rows of `fit`.
        draws: random subspaces; 19 make the threshold exact at 5 %.
    Returns:
        Alignment; scores.per_prompt [site, test row] is 1 where the swap gave the source's answer (base clean, then base
        corrupted).
    Raises:
        ValueError: for a task of texts, single neurons, experts, a span of several tokens, or k that does not fit.
    Source:
        Geiger et al. 2023, "Finding alignments between interpretable causal variables and distributed neural
        representations"; Wu et al. 2023; Makelov et al. 2024 on what a subspace can pretend.
    """
    began = time.perf_counter()
    task, at = Task.of(task), sites(model, at)
    if task.kind != "pairs":
        raise ValueError(f"Task {task.name!r} holds {task.kind} texts; swapping between prompts needs pairs.")
    found = examples(model, task, label, seed=seed)
    pairs = task.on(model)
    half = len(pairs.clean)
    rows = {"fit": found.rows(fit), "test": found.rows(test), "ood": found.rows(ood)}
    for split, which in (("fit", fit), ("test", test)):
        if not len(rows[split]):
            raise ValueError(
                f"Task {task.name!r} has no rows of split {which!r}; it has {', '.join(sorted(set(found.splits)))}."
            )
    _check(model, found, at, k)
    wanted = torch.cat([pairs.foil, pairs.answer])  # what the source, the other side of the pair, makes right
    sites_of = read(model, found.prompts, at)
    lines, right, right_ood, directions, losses = [], [], [], {}, {}
    for number, one in enumerate(at):
        x = torch.tensor(sites_of[one], dtype=torch.float32)
        base, source = x, torch.roll(x, half, 0)
        rng = torch.Generator().manual_seed(seed + number)
        swap = Interchange(model, one, found, base, source, wanted)
        basis, losses[one] = swap.train(rows["fit"], k, steps, lr, batch, rng)
        directions[one] = basis.T
        means = _mean_directions(x[rows["fit"]].numpy(), found.labels[rows["fit"]], k)
        chance = [torch.linalg.qr(torch.randn(x.shape[1], k, generator=rng))[0] for _ in range(draws)]
        line = {"fit": swap.accuracy(rows["fit"], [basis]).mean()}
        for split, end, kept in (("test", "", right), ("ood", "_ood", right_ood)):
            success = swap.accuracy(rows[split], [basis, torch.eye(x.shape[1]), means, *chance])
            kept.append(success[0])
            share = success.mean(1) if len(rows[split]) else np.full(len(success), np.nan)
            line |= {f"full_site{end}": share[1], f"difference_of_means{end}": share[2]}
            line[f"null{end or '_p95'}"] = fitting.threshold(share[3:])
        lines.append(line)
    columns = {name: np.array([line[name] for line in lines]) for name in lines[0]}
    values, low, high = measure.mean_interval(np.array(right).T, found.group[rows["test"]], seed=seed)
    if len(rows["ood"]):
        outer = measure.mean_interval(np.array(right_ood).T, found.group[rows["ood"]], seed=seed)
        columns = dict(zip(("ood", "ood_lo", "ood_hi"), outer)) | columns
    cost = 3 * steps * batch / len(found.ids) + 1 + len(at) * (3 + draws) * len(rows["test"]) / len(found.ids)
    scores = Scores(at, values, low, high, columns.pop("null_p95"), np.array(right), f"probing.das (k={k})", "IIA",
                    null=f"random subspaces of {k} dimension{'s' * (k > 1)}, {draws} draws", task=task.name, cost=float(cost),
                    seconds=time.perf_counter() - began, seed=seed, why=found.why, columns=columns)  # fmt: skip
    return Alignment(scores, directions, losses, k)


class Interchange:
    """One site's swaps: base rows with part of the source's activation."""

    def __init__(self, model, one: Component, found, base, source, wanted):
        self.model, self.one, self.found = model, one, found
        self.base, self.source, self.wanted = base, source, wanted

    def prompts(self, rows) -> Prompts:
        return Prompts([self.found.ids[i] for i in rows], spans=[self.found.spans[i] for i in rows])

    def swapped(self, rows, basis) -> torch.Tensor:
        """b + R R^T (s - b), [row, width]."""
        return self.base[rows] + (self.source[rows] - self.base[rows]) @ basis @ basis.T

    def accuracy(self, which: np.ndarray, bases: list) -> np.ndarray:
        """Whether the source's answer is the most probable token, [basis, row]."""
        if not len(which):
            return np.zeros((len(bases), 0))

        def swap(x, rows, basis):
            return _instead(self.swapped(which[rows], basis), x)

        def read(logits, rows):
            return measure.accuracy(logits, self.wanted[which[rows]])

        changes = [partial(swap, basis=basis) for basis in bases]
        return each(self.model, self.prompts(which), self.one, changes, read)

    def train(self, rows, k: int, steps: int, lr: float, batch: int, rng) -> tuple[torch.Tensor, list[float]]:
        """An orthonormal [width, k] by Adam on the cross-entropy of the source's answer, and the losses on the way."""
        raw = torch.randn(self.base.shape[1], k, generator=rng) / self.base.shape[1] ** 0.5
        raw.requires_grad_(True)
        optimizer, losses = torch.optim.Adam([raw], lr), []
        batch = max(1, min(batch, TOKENS_PER_PASS // max(len(self.found.ids[i]) for i in rows)))
        for _ in range(steps):
            part = rows[torch.randint(len(rows), (batch,), generator=rng).numpy()]
            swapped = self.swapped(part, torch.linalg.qr(raw)[0])

            def loss(logits, numbers, part=part):
                return torch.nn.functional.cross_entropy(logits, self.wanted[part].to(logits.device), reduction="none")

            change = Apply(self.one, function=partial(_instead, swapped.detach()))
            value, _, slopes = self.model.gradients(self.prompts(part), self.one, loss, change)
            optimizer.zero_grad()
            (slopes[self.one] * swapped).sum().div(batch).backward()  # the chain rule, from the site to R
            optimizer.step()
            losses.append(float(value.mean()))
        return torch.linalg.qr(raw.detach())[0], losses


def _instead(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """values [row, width] in place of x [row, column, width]."""
    return values.to(x)[:, None].expand_as(x)


def _check(model, found, at: list[Component], k: int) -> None:
    for one in at:
        if one.kind in ("neuron", *MIXTURE):
            raise ValueError(f"{one}: a subspace needs a vector. Take mlp_out.{one.layer} or the residual stream.")
        width = model.names.d_head if isinstance(one.index, int) else model.names.d_model
        if not 1 <= k <= width:
            raise ValueError(f"k={k} dimensions do not fit {one}, which is {width} wide.")
        if one.position is None or any(len(found.prompts.columns(one, i)) != 1 for i in range(len(found.ids))):
            raise ValueError(f"{one} must be one token in every prompt; name a position such as {one.at(-1)}.")


def _mean_directions(x: np.ndarray, y: np.ndarray, k: int) -> torch.Tensor:
    """An orthonormal basis of what tells the class means apart, at most k dimensions, [width, <= k]."""
    means = np.stack([x[y == one].mean(0) - x.mean(0) for one in np.unique(y)], 1)
    left, size, _ = np.linalg.svd(means, full_matrices=False)
    return torch.tensor(left[:, : max(1, min(k, int((size > 1e-6 * size[0]).sum())))], dtype=torch.float32)
