"""Whole blocks: how much does each change the stream, and which experts of a mixture are used?"""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench import measure
from workbench.component import Component
from workbench.locate.magnitude.reading import DRAWS, counted, texts
from workbench.scores import Scores


def block_influence(model, task, *, null: bool = True, draws: int = 200, seed: int = 0) -> Scores:
    """How much does each block turn the stream? 1 - cosine of what enters and what leaves, averaged over tokens.

    0 for a block that leaves the direction as it is. Each block is named by the stream that leaves it. The null: how
    much an update of the same length would turn the stream if its direction were random; a block below it writes along
    the stream (it makes it longer, mostly). Small models need all their blocks, whatever the score.

    Args:
        task: a task, its name, or a list of texts; padding and BOS do not count.
    Returns:
        Scores of `resid_post.0`, `resid_post.1`, ..., with the columns `growth` (length of the stream behind the block
        over that before) and `update` (length of what it adds over that before). Cost: one pass.
    Source:
        Men et al. 2024, "ShortGPT", eq. 1.
    """
    began, rng = time.perf_counter(), np.random.default_rng(seed + 1)
    prompts, name = texts(model, task)
    layers, parts, under, width = model.names.n_layers, [], [], model.names.d_model
    for part in prompts.chunks():
        mask = counted(model, part).to(model.hf.device)
        seen = model.trace(model.inputs(part), _streams(model.names, len(part.ids))).cpu().double()
        share = (mask / mask.sum(1, keepdim=True)).cpu().double()
        cosine, growth, update = seen.unbind(1)  # each [layer, row, column]
        parts.append(torch.stack([((x * share).sum(-1)) for x in (1 - cosine, growth, update)]).numpy())
        if null:  # only the cosine between stream and update matters, and that of random directions is known
            side = rng.standard_normal((draws, *update.shape))
            side /= np.sqrt(side**2 + rng.chisquare(width - 1, side.shape))
            r = update.numpy()
            turned = 1 - (1 + r * side) / np.sqrt(1 + r**2 + 2 * r * side)
            under.append((turned * share.numpy()).sum(-1))
    turn, growth, update = np.concatenate(parts, 2)
    values, low, high = measure.mean_interval(turn.T, seed=seed)
    threshold = np.quantile(np.concatenate(under, 2).mean(2), 0.95, axis=0) if null else np.full(layers, np.nan)
    return Scores([Component("resid_post", layer) for layer in range(layers)], values, low, high, threshold, turn,
                  "magnitude.block_influence", "1 - cosine", task=name, cost=1.0, seconds=time.perf_counter() - began,
                  null="an update of the same length in a random direction" if null else "", seed=seed,
                  why="" if null else "No null was asked for.",
                  columns={"growth": growth.mean(1), "update": update.mean(1)})  # fmt: skip


def _streams(names, rows: int):
    def body():
        before, found = names.place("resid_pre", 0, rows).get().float(), []
        for layer in range(names.n_layers):
            after = names.place("resid_post", layer, rows).get().float()
            lengths = [x.norm(dim=-1) for x in (before, after, after - before)]
            base = lengths[0].clamp(min=1e-12)
            cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
            found.append(torch.stack([cosine, lengths[1] / base, lengths[2] / base]))
            before = after
        return torch.stack(found)

    return body


def expert_use(model, task, *, null: bool = True, draws: int = DRAWS, seed: int = 0) -> Scores:
    """Which experts of a mixture do tokens go to? Each expert's share of the router's choices, by layer.

    The null: what the share of one expert reaches if each token picks as many different experts at random.

    Args:
        task: a task, its name, or a list of texts; padding and BOS do not count. For two kinds of texts, run it on each.
    Returns:
        Scores of `expert.0.0`, `expert.0.1`, ...; the shares of a layer sum to 1. Cost: one pass. What an expert does for
        an answer is another question: `locate.causal.ablate(model, task, "expert.*.*", "zero")`.
    Raises:
        ValueError: for a model that is no mixture of experts, or keeps them in a form of its own.
    Source:
        Jiang et al. 2024, "Mixtral of Experts", section on routing.
    """
    began = time.perf_counter()
    config, names = model.hf.config, model.names
    if not names.experts:
        names.validate(Component("expert", "*", "*"))  # says why there are none
    experts, mixtures = names.n_experts, [names.mixture(layer)[0] for layer in names.experts]
    prompts, name = texts(model, task)
    chosen = config.num_experts_per_tok
    shares, tokens = [], 0
    for part in prompts.chunks():
        mask = counted(model, part).to(model.hf.device)
        shares.append(model.trace(model.inputs(part), _routes(mixtures, mask, experts, chosen)).cpu())
        tokens += int(mask.sum())
    per_prompt = torch.cat(shares, 1).permute(0, 2, 1).flatten(0, 1).double().numpy()
    values, low, high = measure.mean_interval(per_prompt.T, seed=seed)
    reach = np.nan
    if null:
        # one expert's choices among independent tokens
        reach = np.quantile(np.random.default_rng(seed + 1).binomial(tokens, chosen / experts, draws), 0.95)
        reach = reach / (tokens * chosen)
    found = [Component("expert", layer, i) for layer in names.experts for i in range(experts)]
    return Scores(found, values, low, high, np.full(len(found), reach), per_prompt, "magnitude.expert_use",
                  "share of the router's choices", task=name, cost=1.0, seconds=time.perf_counter() - began, seed=seed,
                  null=f"each token picks {chosen} of {experts} experts at random" if null else "",
                  why="" if null else "No null was asked for.")  # fmt: skip


def _routes(mixtures: list, mask: torch.Tensor, experts: int, chosen: int):
    def body():
        found = []
        for mixture in mixtures:
            _, picks, _ = mixture.inputs[0]  # fused experts are given tokens, the chosen ones, their weights
            picked = torch.nn.functional.one_hot(picks.reshape(*mask.shape, chosen), experts).sum(2).float()
            found.append((picked * mask[..., None]).sum(1) / mask.sum(1)[:, None] / chosen)
        return torch.stack(found)

    return body
