"""Weights and how strongly they are used: Wanda's weight times activation, and norms of weights alone (data-free)."""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench import measure
from workbench.component import components
from workbench.locate.magnitude.reading import read, texts
from workbench.scores import Scores

DRAWS = 200
KINDS = ("neuron", "z")


def wanda(model, task, at="neuron.*.*", *, null: bool = True, draws: int = DRAWS, seed: int = 0) -> Scores:
    """Which neurons and heads have large output weights that are also much used? Weight times activation (Wanda).

    A weight's score is |W_ij| |X_j|: its size times the length (over all tokens) of the activation it multiplies. A
    neuron's score is the sum over what it writes to (its row of W_out), a head's over all of its W_O. Wanda compares
    weights within an output row only: see the columns.

    The null: the same weights, with the activations' lengths dealt anew within the layer. Above it, large weights meet
    large activations.

    Args:
        task: a task, its name, or a list of texts (128 sequences in the paper); padding and BOS do not count.
        at: neurons and heads (z), without positions.
    Returns:
        Scores with the columns `row_share` (the share of an output row's total, averaged over rows; sums to 1 in a
        layer) and `kept` (which share of its weights is in the larger half of their row, and stays when Wanda prunes
        50 %). Cost: one pass.
    Raises:
        ValueError: for other kinds, or a position.
    Source:
        Sun et al. 2024, "A simple and effective pruning approach for large language models", eq. 1.
    """
    began, rng = time.perf_counter(), np.random.default_rng(seed + 1)
    wanted = _wanted(model, at)
    prompts, name = texts(model, task)
    blocks: dict[tuple, list] = {}
    for one in wanted:
        blocks.setdefault(one.site, []).append(one)
    squares = {site: x.double() for site, x in read(model, prompts, blocks, _squares).items()}
    count = len(prompts.ids)
    often = measure.bootstrap_weights(count, 1000, seed) * count
    table: dict[str, list] = {
        "values": [],
        "ci_lo": [],
        "ci_hi": [],
        "null_p95": [],
        "per_prompt": [],
        "row_share": [],
        "kept": [],
    }
    for (kind, layer), own in blocks.items():
        size, index = model.names.size(kind), [one.index for one in own]
        w = _output(model, kind, layer).abs().double().cpu()  # [input, output]

        def units(x, w=w, size=size, index=index):
            """[..., input] in lengths of activations to [..., unit] scores."""
            return (x * w.sum(1)).unflatten(-1, (size, -1)).sum(-1)[..., index].numpy()

        length = squares[kind, layer].sum(0).sqrt()
        s = w * length[:, None]
        shares = (s / s.sum(0).clamp(min=1e-30)).mean(1).unflatten(0, (size, -1)).sum(-1)
        kept = (s > s.median(0).values).double().mean(1).unflatten(0, (size, -1)).mean(-1)
        drawn = (
            units((torch.from_numpy(often) @ squares[kind, layer]).sqrt())
            if count > 1
            else np.full((1, len(own)), np.nan)
        )
        dealt = units(torch.stack([length[rng.permutation(len(length))] for _ in range(draws)])) if null else None
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        row = {"values": units(length), "ci_lo": low, "ci_hi": high, "per_prompt": units(squares[kind, layer].sqrt()).T,
               "null_p95": np.quantile(dealt, 0.95, axis=0) if null else np.full(len(own), np.nan),
               "row_share": shares[index].numpy(), "kept": kept[index].numpy()}  # fmt: skip
        for key, values in row.items():
            table[key].append(values)
    columns = {key: np.concatenate(values) for key, values in table.items()}
    main = {key: columns.pop(key) for key in ("values", "ci_lo", "ci_hi", "null_p95", "per_prompt")}
    return Scores(wanted, **main, method="magnitude.wanda", metric="sum of |weight| times |activation|", task=name, cost=1.0,
                  seconds=time.perf_counter() - began, seed=seed, columns=columns,
                  null="the activations' lengths dealt anew within the layer" if null else "",
                  why="" if null else "No null was asked for.")  # fmt: skip


def weight_norms(model, at="z.*.*", *, seed: int = 0) -> Scores:
    """Which heads and neurons have large weights? Data-free: no prompt is run, so it says nothing about a behaviour.

    A head's score is the Frobenius norm of W_V W_O, which takes what it attends to into the stream; a neuron's is
    |w_in| |w_out|, the lengths of its key and value. Norms in front of them are not folded in.

    The null pairs the same input weights with the output weights of another head of the model (neuron of the layer).

    Returns:
        Scores over 0 prompts, with columns: for heads `qk` (norm of W_Q W_K^T), `spectral` (largest singular value of
        W_V W_O) and `effective_rank` (its participation ratio); for neurons `norm_in`, `norm_gate` (NaN without a gate),
        `norm_out` and `cosine` of key and value. Cost: none.
    Raises:
        ValueError: for other kinds, both kinds at once, or a position.
    Source:
        Elhage et al. 2021 for W_V W_O and W_Q W_K^T.
    """
    began = time.perf_counter()
    wanted = _wanted(model, at)
    if len({one.kind for one in wanted}) > 1:
        raise ValueError("Norms of heads and neurons do not compare; ask for one kind at a time.")
    values, threshold, columns = (_heads if wanted[0].kind == "z" else _neurons)(model, wanted)
    empty = np.full(len(wanted), np.nan)
    other = "head of the model" if wanted[0].kind == "z" else "neuron of the layer"
    return Scores(wanted, values, empty, empty.copy(), threshold, np.zeros((len(wanted), 0)), "magnitude.weight_norms",
                  "norm of weights", direction="data-free", null=f"the output weights of another {other}", cost=0.0,
                  seconds=time.perf_counter() - began, seed=seed, columns=columns,
                  why="Data-free: no prompt was run, so there is no interval.")  # fmt: skip


def _heads(model, wanted):
    every = [(layer, h) for layer in range(model.names.n_layers) for h in range(model.names.n_heads)]
    place = [every.index((one.layer, one.index)) for one in wanted]
    # |A B|^2 = trace of (A^T A)(B B^T), for any pair of heads without a d_model x d_model product
    pairs = {}
    for name, left, right in (("ov", "W_V", "W_O"), ("qk", "W_Q", "W_K")):
        a = [model.weight(left, *one).double() for one in every]
        b = [model.weight(right, *one).double() for one in every]
        b = b if name == "ov" else [x.T for x in b]
        pairs[name] = (torch.stack([x.T @ x for x in a]), torch.stack([x @ x.T for x in b]))
        if name == "ov":
            small = [torch.linalg.svdvals(torch.linalg.qr(x).R @ torch.linalg.qr(y.T).R.T) for x, y in zip(a, b)]
    norms = {name: (left.flatten(1) @ right.flatten(1).T).clamp(min=0).sqrt() for name, (left, right) in pairs.items()}
    ov = norms["ov"]
    others = ov[~torch.eye(len(ov), dtype=torch.bool)].unflatten(0, (len(ov), -1))
    size = torch.stack(small) ** 2
    columns = {"qk": norms["qk"].diagonal(), "spectral": size[:, 0].sqrt(),
               "effective_rank": size.sum(1) ** 2 / (size**2).sum(1).clamp(min=1e-30)}  # fmt: skip
    reach = others.quantile(0.95, dim=1) if len(ov) > 1 else torch.full((1,), torch.nan)
    found = {key: x.cpu()[place].numpy() for key, x in (columns | {"ov": ov.diagonal(), "reach": reach}).items()}
    return found.pop("ov"), found.pop("reach"), found


def _neurons(model, wanted):
    rows = []
    for layer in dict.fromkeys(one.layer for one in wanted):
        index = [one.index for one in wanted if one.layer == layer]
        key, out = model.weight("W_in", layer), model.weight("W_out", layer)
        try:
            gate = model.weight("W_gate", layer).norm(dim=0)
        except ValueError:
            gate = torch.full_like(key[0], torch.nan)
        length, written = key.norm(dim=0), out.norm(dim=1)
        cosine = (key * out.T).sum(0) / (length * written).clamp(min=1e-30)
        rows.append(
            torch.stack([length * written, length * written.quantile(0.95), length, gate, written, cosine])[:, index]
        )
    score, reach, *rest = torch.cat(rows, 1).double().cpu().numpy()
    return score, reach, dict(zip(("norm_in", "norm_gate", "norm_out", "cosine"), rest))


def _wanted(model, at):
    for one in components(at):
        if one.kind not in KINDS or one.position is not None:
            raise ValueError(f"{one}: weights belong to neurons and heads; write 'neuron.*.*', 'neuron.3.17', 'z.*.*'.")
    return sorted(model.names.expand(components(at)))


def _output(model, kind: str, layer: int) -> torch.Tensor:
    if kind == "neuron":
        return model.weight("W_out", layer)
    return torch.cat([model.weight("W_O", layer, head) for head in range(model.names.n_heads)])


def _squares(x: torch.Tensor, mask: torch.Tensor, kind: str) -> torch.Tensor:
    return (x**2 * mask[..., None]).sum(1)
