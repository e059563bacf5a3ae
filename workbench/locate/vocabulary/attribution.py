"""Direct logit attribution: what does each part itself write towards the answer, at the last position?"""

from __future__ import annotations

import time
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch

from workbench import measure
from workbench.component import Component, components
from workbench.locate.vocabulary.readout import Frozen, Readout, freeze
from workbench.model.plan import TOKENS_PER_PASS, Prompts
from workbench.scores import Scores
from workbench.task import Task

KINDS = ("embed", "resid_pre", "z", "attn_out", "neuron", "mlp_out")
WHOLE = {"z": "attn_out", "neuron": "mlp_out"}  # the block that a part belongs to
REST = Component("ln_final")
NEAREST = 50  # how many tokens of about the same probability stand in for one
ROWS = 2048  # of draws times prompts at a time, in the null


class Part(NamedTuple):
    """Components of one site at the last position.

    Attributes:
        x: [prompt, width]. matrix: what takes x to what the block writes, [width, d_model], None for the stream itself.
        norm: the norm behind it, frozen. factor: the residual multiplier. groups: how many components x holds.
    """

    x: torch.Tensor
    matrix: torch.Tensor | None
    norm: Frozen | None
    factor: float
    groups: int

    def along(self, direction: torch.Tensor) -> torch.Tensor:
        """What each component writes along directions of the stream [..., prompt, d_model]: [..., prompt, component]."""
        direction = self.norm.back(direction) if self.norm else direction
        direction = direction if self.matrix is None else direction @ self.matrix.T.to(direction)
        return self.factor * (self.x.to(direction) * direction).unflatten(-1, (self.groups, -1)).sum(-1)


def logit_attribution(model, task: Task, at=None, *, prompt: str = "clean", null: bool = True, draws: int = 200,
                      seed: int = 0) -> Scores:  # fmt: skip
    """How much does each part itself write towards the answer and against the foil? Direct logit attribution.

    The last stream is a sum of what all parts wrote, and with the final norm frozen at the scale that it has on each
    prompt, the logit difference is a sum over them: c · (W_U[answer] - W_U[foil]). So scores are shares of it in nats of
    log-odds, and they add up to it. They do not see what a part does *through* later ones: a head that others read has a
    score of about 0 here and a large one under `causal.patch`. Where a softcap bends the logits, scores add up to the
    difference before it.

    The last row, `ln_final`, is what no other row holds: biases, and parts that were not asked for.

    Two nulls, what |score| reaches under them in 95 % of the draws; `null_p95` is the larger. `null_tokens` puts random
    tokens in the place of answers and foils, for each of them one to which the model gives about as much probability on
    these prompts, the same for all prompts that share it: a part beyond it means these words. `null_swapped` exchanges
    answer and foil of each prompt at random: a part beyond it sides with the answers reliably.

    Args:
        task: pairs, or the name of a bundled task.
        at: components or families, by default "resid_pre.0" (the embedding as it enters), "z.*.*" and "mlp_out.*". Kinds:
            embed, resid_pre.0, z, attn_out, neuron, mlp_out; with @-1 or none. Nothing twice: no head beside its block.
        prompt: "clean", "corrupted", or "difference" (clean minus corrupted, with the clean prompt's answer and foil).
    Returns:
        Scores; `clean` is the logit difference that they add up to. Cost: one pass.
    Raises:
        ValueError: for parts that overlap, that are no sum, or of other positions; for a norm that cannot be frozen.
    Source:
        Elhage et al. 2021, "A mathematical framework for transformer circuits"; nostalgebraist 2020.
    """
    began, task = time.perf_counter(), Task.of(task)
    if prompt not in ("clean", "corrupted", "difference"):
        raise ValueError(f"prompt={prompt!r} is unknown; choose 'clean', 'corrupted' or 'difference'.")
    wanted, pairs, readout = _wanted(model, at), task.on(model), Readout(model)
    sides = [_Side(model, readout, Prompts(getattr(pairs, one)), wanted)
             for one in (("clean", "corrupted") if prompt == "difference" else (prompt,))]  # fmt: skip

    def attributed(answer, foil, dtype=torch.float64):
        """[..., prompt, component and rest]"""
        direction = (readout.rows(answer) - readout.rows(foil)).to(dtype)
        bias = (readout.bias(answer) - readout.bias(foil)).to(dtype)
        first, *second = (side.along(direction, bias) for side in sides)
        return (first - second[0] if second else first).cpu().numpy()

    per_prompt = attributed(pairs.answer, pairs.foil).T
    n, found = per_prompt.shape[1], [*wanted, REST]
    value, low, high = measure.mean_interval(per_prompt.T, pairs.task.clusters(), seed=seed)
    threshold, columns, why = np.full(len(found), np.nan), {}, "" if null else "No null was asked for."
    if null:
        rng, size = np.random.default_rng(seed + 1), max(1, ROWS // n)
        drawn = _stand_ins(model, sum(side.chance for side in sides), pairs, draws, rng)
        under = [attributed(*drawn[:, k : k + size], torch.float32).mean(-2) for k in range(0, draws, size)]
        signs = rng.choice([-1.0, 1.0], (n, 1000))
        columns["null_tokens"] = np.quantile(np.abs(np.concatenate(under)), 0.95, axis=0)
        columns["null_swapped"] = np.quantile(np.abs(per_prompt @ signs) / n, 0.95, axis=1) if n > 1 else threshold
        threshold = np.fmax(columns["null_tokens"], columns["null_swapped"])
    why = why or ("" if n > 1 else "One prompt has no interval.")
    metric = "logit_diff" + (" before the softcap" if readout.cap else "")
    whole = [side.total for side in sides]
    return Scores(found, value, low, high, threshold, per_prompt, "vocabulary.logit_attribution", metric,
                  clean=whole[0] if prompt != "corrupted" else float("nan"),
                  corrupted=whole[-1] if prompt != "clean" else float("nan"),
                  direction="" if prompt == "clean" else prompt,
                  null="the larger of random tokens of about the same probability, and answer and foil swapped" if null else "", task=task.name,
                  cost=float(len(sides)), seconds=time.perf_counter() - began, seed=seed, why=why, columns=columns)  # fmt: skip


class _Side:
    """The prompts of one side: their parts, the frozen final norm, and the model's mean probability of each token."""

    def __init__(self, model, readout: Readout, prompts: Prompts, wanted: list[Component]):
        names, self.indices = model.names, {}
        for one in wanted:  # in forward order, so that a site's components stand together
            self.indices.setdefault(one.site, []).append(one.index or 0)
        seen, self.chance = _read(model, prompts, self.indices)
        self.last = seen["resid_post", names.n_layers - 1].double()
        with torch.no_grad():
            readout.check(readout(self.last.float()).float(), seen["logits", None])
        self.norm = freeze(readout.norm, self.last)
        self.parts = {site: _part(model, site, seen) for site in self.indices}
        self.total = float("nan")

    def along(self, direction: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Contributions [..., prompt, component and rest] to what `direction` [..., prompt, d_model] reads of the normed
        stream."""
        before = self.norm.back(direction).to(direction)
        by_site = {site: part.along(before) for site, part in self.parts.items()}
        found = torch.cat([by_site[site][..., index] for site, index in self.indices.items()], -1)
        whole = (before * self.last.to(before)).sum(-1) + (direction * self.norm.bias.to(before)).sum(-1) + bias
        if self.total != self.total:
            self.total = whole.mean().item()
        return torch.cat([found, (whole - found.sum(-1))[..., None]], -1)


def _wanted(model, at) -> list[Component]:
    names = model.names
    if "attn_out" in names.refused:
        raise ValueError(f"logit_attribution: {names.refused['attn_out']} wb.locate.causal.patch needs no sum.")
    given = components(at if at is not None else ["resid_pre.0", "z.*.*", "mlp_out.*"])
    for one in given:
        if one.position not in (None, -1):
            raise ValueError(f"{one}: only the last position writes to the prediction itself; leave the position out.")
        if one.kind not in KINDS or (one.kind == "resid_pre" and one.canonical.kind != "resid_pre"):
            raise ValueError(f"{one} is no part of the sum; kinds are embed, resid_pre.0, z, attn_out, neuron, mlp_out. "
                             "For the stream on its way use logit_lens.")  # fmt: skip
    found = sorted(names.expand(given))
    if any(one.kind == "resid_pre" and one.layer for one in found):
        raise ValueError("resid_pre.* is no part of the sum; write resid_pre.0 for the stream before the first block.")
    sites = {one.site: one for one in found}
    for one in found:
        block = (
            (WHOLE.get(one.kind), one.layer) if one.kind in WHOLE else ("resid_pre", 0) if one.kind == "embed" else None
        )
        if block in sites:
            raise ValueError(f"{one} is part of {sites[block]}, and would count twice; ask for one of the two.")
    return found


def _read(model, prompts: Prompts, sites) -> tuple[dict, torch.Tensor]:
    """Site -> activations at the last position [prompt, width]; the model's mean probability of each token [d_vocab]."""
    names = model.names
    wanted = {*sites, ("resid_post", names.n_layers - 1)}
    wanted |= {(WHOLE[kind], layer) for kind, layer in sites if kind in WHOLE}
    if ("embed", None) in wanted:
        wanted.add(("resid_pre", 0))
    order = sorted(wanted, key=lambda site: Component(*site))
    found: dict[tuple, list] = {site: [] for site in [*order, ("logits", None)]}
    chance, count = torch.zeros(names.d_vocab, dtype=torch.float64), 0
    for part in prompts.chunks(max(1, min(TOKENS_PER_PASS, 2**26 // names.d_vocab))):
        seen, logits = model.trace(model.inputs(part), _visit(model.nnsight, names, order, len(part.ids)))
        for site, x in zip(order, seen, strict=True):
            found[site].append(x.float())
        found["logits", None].append(logits[:, -1].float())
        for row, pad in enumerate(part.pads):
            chance += logits[row, pad:].float().softmax(-1).sum(0).double().cpu()
            count += len(part.ids[row])
    return {site: torch.cat(parts) for site, parts in found.items()}, chance / count


def _visit(nn, names, order, rows: int):
    def body():
        seen = []
        for kind, layer in order:
            place = names.place(kind, layer, rows)
            seen.append(place.get()[:, -1].clone())
        return seen, nn.output.logits.clone()

    return body


def _part(model, site: tuple, seen: dict) -> Part:
    names, (kind, layer), x = model.names, site, seen[site]
    if kind == "embed" and not torch.allclose(x, seen["resid_pre", 0], rtol=1e-4, atol=1e-6):
        raise ValueError("embed: something is added to the token embedding here, or scales it, before the first block; "
                         "write resid_pre.0, which is the stream as it enters.")  # fmt: skip
    if kind not in WHOLE:
        return Part(x.double(), None, None, 1.0, 1)
    row, block = names.row, attrgetter(names.row.layers)(model.hf)[layer]
    if kind == "z":
        linear, adds, inside = row.heads, row.attn_add, (row.attn, row.heads)
        matrix = torch.cat([model.weight("W_O", layer, head) for head in range(names.n_heads)])
    else:
        linear, adds, inside = row.neurons, row.mlp_add, (row.neurons, row.neurons.rpartition(".")[0])
        matrix = model.weight("W_out", layer)
    module = attrgetter(linear)(block)
    with torch.no_grad():
        written = module(x.to(module.weight.dtype))
        norm = None
        if adds not in inside:  # a norm between the matrix and the stream
            norm = freeze(attrgetter(adds)(block), written)
            written = attrgetter(adds)(block)(written)
    whole = seen[WHOLE[kind], layer]
    off = ((written.float() * names.scale - whole).abs().max() / whole.abs().max().clamp(min=1e-30)).item()
    if not off < max(1e-3, 4 * torch.finfo(module.weight.dtype).eps):
        raise ValueError(f"{kind}.{layer}: what these write does not add up to {WHOLE[kind]}.{layer} here (off by {off:.1%}), so "
                         f"no share can be told. Ask for {WHOLE[kind]!r} instead.")  # fmt: skip
    return Part(x.double(), matrix.double().to(x.device), norm, names.scale, names.size(kind))


def _stand_ins(model, chance: torch.Tensor, pairs, draws: int, rng) -> torch.Tensor:
    """Other tokens for answers and foils, to which the model gives about as much probability: [2, draw, prompt]."""
    both = torch.stack([pairs.answer, pairs.foil]).numpy()
    tokens, which = np.unique(both, return_inverse=True)
    special = {*model.tokenizer.all_special_ids, *tokens.tolist()}
    usable = np.array([i for i in range(min(len(model.tokenizer), len(chance))) if i not in special])
    size = np.log(chance.numpy() + 1e-30)
    near = np.stack([usable[np.argsort(np.abs(size[usable] - size[t]), kind="stable")[:NEAREST]] for t in tokens])
    index, columns = rng.integers(near.shape[1], size=(draws, len(tokens))), np.arange(len(tokens))
    answer, foil = (near[columns, index][:, one] for one in which.reshape(both.shape))
    same = answer == foil  # a difference of a token with itself would be 0
    foil[same] = near[columns, (index + 1) % near.shape[1]][:, which.reshape(both.shape)[1]][same]
    return torch.from_numpy(np.stack([answer, foil]))
