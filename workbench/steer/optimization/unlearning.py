"""Unlearning: NPO and RMU, and the attack that asks whether what was forgotten is gone or only hidden."""

from __future__ import annotations

import numpy as np
import torch

from workbench.component import Component
from workbench.operations import Delta
from workbench.steer.optimization.learning import Keep, Masked, check_settings, train_weights
from workbench.steer.optimization.masks import weight_masks
from workbench.steer.optimization.rows import Rows, forward, mean_of, steps_bar
from workbench.steer.optimization.tuning import fit_and_held


def npo(model, forget, retain, at="all", *, beta: float = 0.1, keep_weight: float = 1.0, budget: float = 0.05,
        enough: float = 0.02, steps: int = 300, lr: float = 3e-4, batch: int = 16, every: int = 20, patience: int = 4, seed: int = 0,
        progress: bool = True) -> Delta:  # fmt: skip
    """What must change for the model to stop saying this, and say all else as before? Negative preference optimization.

    The loss is -(2/beta) E log sigmoid(-beta log(p/p_ref)) on what is to be forgotten, which stops pushing where p is far
    below p_ref, + keep_weight * KL from the untouched model on what is to stay.

    Args:
        forget: pairs (answers to forget) or texts; trained on split "fit", judged on split "select" where there is one.
        retain: tasks, or names, that are to stay: rows of "fit" are held, rows of "select" measured.
        at: located components (see `weight_masks`), or "all".
        budget: the largest KL (nats per token) on the measured rows of the worst task.
        enough: probability of the forgotten answers at which it ends.
        lr, steps, batch, every, patience: as for `finetune`.
    Returns:
        Delta of the best check; `history` is a table of all checks ("target" is the probability of what is forgotten).
        Whether it is gone or hidden, `relearn` asks.
    Source:
        Zhang et al. 2024, "Negative preference optimization", eq. 3, with their retain term as a divergence.
    """
    check_settings(steps=steps, every=every, batch=batch, patience=patience)
    if not beta > 0:
        raise ValueError(
            f"beta={beta!r}: give a positive number, such as 0.1; towards 0 it becomes plain gradient ascent."
        )
    rows, held = fit_and_held(model, forget)
    reference = torch.cat([part.log_prob(forward(model, part.prompts())).detach() for part in rows.parts()])
    staying = Keep(model, retain, keep_weight)

    def loss(weights, rng):
        which = torch.randperm(len(rows), generator=rng)[:batch]
        part = rows.take(which)
        ratio = part.log_prob(forward(model, part.prompts(), weights)) - reference[which.to(reference.device)]
        return -(2 / beta) * torch.nn.functional.logsigmoid(-beta * ratio).mean() + staying.loss(weights, batch, rng)

    return train_weights(Masked(model, weight_masks(model, at)), loss, _forgotten(model, held, staying, enough), seed, steps=steps,
                         lr=lr, every=every, patience=patience, budget=budget, enough=enough, what="unlearning",
                         progress=progress)  # fmt: skip


def rmu(model, forget, retain, at, *, strength: float = 2.0, keep_weight: float = 10.0, layers=None, budget: float = 0.05,
        enough: float = 0.02, steps: int = 300, lr: float = 1e-3, batch: int = 16, every: int = 20, patience: int = 4, seed: int = 0,
        progress: bool = True) -> Delta:  # fmt: skip
    """Can the model be made to lose the thread where this is read? Representation misdirection.

    In rows to forget, the stream at `at` is pushed to a random direction; in rows to keep it is held where it was:
    |h - c u|^2 + keep_weight |h - h_before|^2, in units of the mean squared stream.

    Args:
        at: a place in the stream, not after the last block: "resid_post.3" (every token, as in the paper), or
            "resid_post.3@subject", which is needed where rows to forget and to keep have the same words around the subject.
        strength: c, in lengths of the stream (the reference's 6.5 is absolute). u has random positive entries, as there.
        layers: whose FFN output weights are trained: by default the block of `at` and the two before it.
        The rest as for `npo`. Rows to keep need the span that `at` names.
    Returns:
        Delta; `history` is a table of all checks.
    Source:
        Li et al. 2024, "The WMDP benchmark", sec. 4, and its code (FFN output weights of three layers).
    """
    check_settings(steps=steps, every=every, batch=batch, patience=patience)
    at = Component.parse(at)
    model.names.validate(at)
    if at.kind != "resid_post" or at.layer == "*" or at.layer >= model.names.n_layers - 1:
        raise ValueError(f"RMU works at the stream after one of the blocks 0 to {model.names.n_layers - 2}, such as "
                         f"'resid_post.{(model.names.n_layers - 1) // 2}@subject'; got {at}.")  # fmt: skip
    layers = range(max(0, at.layer - 2), at.layer + 1) if layers is None else layers
    names = [f"{model.names.row.layers}.{layer}.{model.names.row.neurons}.weight" for layer in layers]
    if "neuron" in model.names.refused or any(layer > at.layer for layer in layers):
        raise ValueError(f"RMU trains FFN output weights of blocks up to {at.layer}; got layers {list(layers)}.")
    weights = dict(model.hf.named_parameters())
    masks = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in names}
    rows, held = fit_and_held(model, forget)
    staying = Keep(model, retain, 1.0)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        there = _stream(model, rows.take(range(min(64, len(rows)))), at, None)
    unit = torch.rand(there.shape[-1], generator=rng).to(there)
    size = there.square().sum(-1).mean()
    wanted = strength * size.sqrt() * unit / unit.norm()

    def loss(weights, rng):
        total = (_stream(model, rows.draw(batch, rng), at, weights) - wanted).square().sum(-1).mean() / size
        for own in staying.held:
            part = own.draw(batch, rng)
            with torch.no_grad():
                before = _stream(model, part, at, None)
            moved = (_stream(model, part, at, weights) - before).square().sum(-1).mean() / size
            total = total + keep_weight * moved / len(staying.held)
        return total

    return train_weights(Masked(model, masks), loss, _forgotten(model, held, staying, enough), seed, steps=steps, lr=lr, every=every,
                         patience=patience, budget=budget, enough=enough, what="unlearning", progress=progress)  # fmt: skip


def relearn(model, delta: Delta, forget, *, share: float = 0.5, at="all", steps: int = 40, lr: float = 3e-4, batch: int = 16,
            every: int = 10, seed: int = 0, progress: bool = True):  # fmt: skip
    """Is it gone, or only hidden? Teach a part of what was forgotten, and see how much of the rest comes back.

    A share of the entities is taught again by fine-tuning the changed model for a few steps; the rest is only asked about.
    What comes back there was never gone. The control teaches the same rows with their answers shuffled, which brings
    back the form, and no fact.

    Args:
        delta: from `npo`, `rmu` or any other change of weights. forget: the task that was forgotten; all its rows count.
        share: of the entities that are taught (of the rows, where no entity is named).
        at: the weights that the attacker may change.
    Returns:
        A table: arm ("taught", "shuffled"), step, and accuracy on the rows taught ("given") and on the others ("rest");
        step -1 is the untouched model, step 0 the changed one.
    Source:
        Relearning as in Li et al. 2024 and Lynch et al. 2024, "Eight methods to evaluate robust unlearning".
    """
    import pandas as pd

    check_settings(every=every, batch=batch)  # no steps at all is a table, too
    rows, rng = Rows.of(model, forget), np.random.default_rng(seed)
    entities = [one if one is not None else i for i, one in enumerate(rows.entities)]
    names = list(dict.fromkeys(entities))
    if not 0 < share < 1 or len(names) < 2:
        raise ValueError(f"share={share!r} of {len(names)} entities leaves nothing to teach or nothing to ask: give a share "
                         "between 0 and 1 and a task with several entities.")  # fmt: skip
    count = min(len(names) - 1, max(1, round(share * len(names))))
    taught = {names[i] for i in rng.permutation(len(names))[:count]}
    given = rows.take([i for i, one in enumerate(entities) if one in taught])
    rest = rows.take([i for i, one in enumerate(entities) if one not in taught])
    right = lambda part, logits: part.right(logits)  # noqa: E731
    table = []
    for arm, lesson in (("taught", given), ("shuffled", _shuffled(given, rng))):
        change = Masked(model, weight_masks(model, at), delta)
        adam, draw = torch.optim.Adam(change.leaves, lr), torch.Generator().manual_seed(seed)
        table.append({"arm": arm, "step": -1, "given": mean_of(model, given, None, right),
                      "rest": mean_of(model, rest, None, right)})  # fmt: skip
        with steps_bar(steps, f"relearning, {arm}", progress) as bar:
            for step in range(steps + 1):
                if step % every == 0 or step == steps:
                    with torch.no_grad():
                        now = change.weights()
                    table.append({"arm": arm, "step": step, "given": mean_of(model, given, now, right),
                                  "rest": mean_of(model, rest, now, right)})  # fmt: skip
                if step == steps:
                    break
                part = lesson.draw(batch, draw)
                with torch.enable_grad():
                    value = part.nll(forward(model, part.prompts(), change.weights()))
                    found = torch.autograd.grad(value, change.leaves)
                for leaf, one in zip(change.leaves, change.keep_inside(found), strict=True):
                    leaf.grad = one
                adam.step()
                bar.update(1)
    return pd.DataFrame(table)


def _forgotten(model, held: Rows, staying: Keep, enough: float):
    """The check of unlearning: the probability of what is to be forgotten, on held-out rows; below `enough` all is well."""

    def check(weights):
        said = mean_of(model, held, weights, lambda part, logits: part.log_prob(logits).exp())
        return {"target": max(said, enough), "collateral": staying.collateral(weights)}

    return check


def _stream(model, part: Rows, at: Component, weights) -> torch.Tensor:
    """The stream at the component, [token, d_model]: at its position or span, else at every token."""
    prompts = part.prompts()
    hidden = forward(model, prompts, weights, inner=True, output_hidden_states=True).hidden_states[at.layer + 1].float()
    if at.position is None:
        at_all = [list(range(pad, hidden.shape[1])) for pad in prompts.pads]
    else:
        at_all = [prompts.columns(at, row) for row in range(len(prompts.ids))]
    return torch.cat([hidden[row, columns] for row, columns in enumerate(at_all)])


def _shuffled(rows: Rows, rng) -> Rows:
    """The same prompts with each other's continuations (of equal length)."""
    order, ids = rng.permutation(len(rows)), list(rows.ids)
    tails = [rows.ids[i][rows.lengths[i] :] for i in order]
    for i, tail in enumerate(tails):
        ids[i] = torch.cat([rows.ids[i][: rows.lengths[i]], tail])
    return Rows(ids, rows.lengths, rows.spans, rows.entities, rows.name)
