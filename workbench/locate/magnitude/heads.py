"""What does each head look at? Attention to the previous token, to duplicates, to what followed them, to the first token."""

from __future__ import annotations

import time

import numpy as np
import torch

from workbench import measure
from workbench.component import Component, components
from workbench.locate.magnitude.reading import texts
from workbench.model.plan import Prompts
from workbench.scores import Scores

PATTERNS = ("previous", "duplicate", "induction", "first")
DRAWS = 2  # of the null


def pattern_scores(model, pattern: str = "induction", task=None, at="z.*.*", *, prompts: int = 32, length: int = 24,
                   null: bool = True, seed: int = 0) -> Scores:  # fmt: skip
    """Which heads look back one token, at an earlier copy of the token, at what followed it, or at the first token?

    The score is how much attention a query gives to such keys, averaged over the queries that have one:
    - "previous": the token before.
    - "duplicate": earlier tokens that are the same as the query's.
    - "induction": tokens that followed an earlier copy of the query's token (prefix matching).
    - "first": the first token (BOS, where there is one): an attention sink.

    Without a task, prompts are random tokens that repeat after 16 to 24 tokens (for `length` 24), so that nothing but
    repetition can guide a head; the period differs from prompt to prompt, lest a fixed distance look like induction.

    Nulls: for "duplicate" and "induction" the same queries and keys in prompts of fresh random tokens, where nothing
    repeats; for "previous" and "first" another key, drawn among those that the query can see.

    Args:
        pattern: which of the four is the score; the others are columns.
        task: a task or a list of texts to measure on instead of random tokens.
        at: heads, "z.*.*" or "z.5.*"; they are named as z, so that they can be ablated and patched.
        prompts, length: how many random prompts, and of how many tokens, each repeated at least once.
    Returns:
        Scores between 0 and 1, with the other patterns as columns beside their nulls, and `entropy` (of the attention
        of a query, in nats). Cost: one pass, and two for the null.
    Raises:
        ValueError: where the model offers no patterns, an unknown pattern, texts in which it cannot occur.
    Source:
        Olsson et al. 2022, "In-context learning and induction heads" (prefix matching); Wang et al. 2022 (duplicate).
    """
    began = time.perf_counter()
    if pattern not in PATTERNS:
        raise ValueError(f"pattern={pattern!r} is unknown; choose one of {', '.join(map(repr, PATTERNS))}.")
    wanted = heads(model, at)
    if task is None:
        run, name = _repeated(model, prompts, length, seed), "repeated random tokens"
    else:
        run, name = texts(model, task)
    seen, valid = _attention(model, run, targets=run)
    main = PATTERNS.index(pattern)
    used = valid[main]
    if not used.any():
        raise ValueError(f"In none of these prompts can a head show {pattern!r}: no token repeats or they are too short. "
                         "Leave out the task to measure on repeated random tokens.")  # fmt: skip
    fresh = [_attention(model, _fresh(model, run, seed + 1 + i), targets=run)[0] for i in range(DRAWS if null else 0)]
    place = [one.layer * model.names.n_heads + one.index for one in wanted]
    columns, per_prompt = {}, seen[main][used][:, place]
    threshold = np.full(len(wanted), np.nan)
    for i, other in enumerate(PATTERNS):
        reach = np.full(len(wanted), np.nan)
        if null and valid[i].sum() > 1:
            elsewhere = [seen[len(PATTERNS) * (1 + draw) + i] for draw in range(DRAWS)]
            under = np.stack([one[i] for one in fresh] if other in ("duplicate", "induction") else elsewhere)
            reach = measure.null_threshold(under[:, valid[i]][..., place].swapaxes(1, 2))
        if i == main:
            threshold = reach
        else:
            columns |= {other: _mean(seen[i][valid[i]][:, place]), f"null_{other}": reach}
    columns["entropy"] = seen[-1][:, place].mean(0)
    values, low, high = measure.mean_interval(per_prompt, seed=seed)
    said = {"previous": "another key that the query can see", "first": "another key that the query can see"}
    said = said.get(pattern, "the same places in prompts of fresh tokens, where nothing repeats")
    return Scores(wanted, values, low, high, threshold, per_prompt.T, "magnitude.pattern_scores",
                  f"attention, {pattern}", null=said if null else "", task=name, cost=1.0 + len(fresh),
                  seconds=time.perf_counter() - began, seed=seed, why="" if null else "No null was asked for.",
                  columns=columns)  # fmt: skip


def heads(model, at) -> list[Component]:
    """The heads that `at` names, sorted.

    Raises:
        ValueError: for other kinds, positions, or a model that offers no patterns.
    """
    model.names.validate(Component("pattern", 0, 0))
    for one in components(at):
        if one.kind not in ("z", "pattern") or one.position is not None:
            raise ValueError(f"{one} is no head; write 'z.*.*' or 'z.5.2', without a position.")
    return sorted(model.names.expand([Component("z", one.layer, one.index) for one in components(at)]))


def _mean(x):
    return x.mean(0) if len(x) else np.full(x.shape[1], np.nan)


def _words(model) -> torch.Tensor:
    """Ids of ordinary tokens."""
    special = set(model.tokenizer.all_special_ids)
    return torch.tensor([i for i in range(min(len(model.tokenizer), model.names.d_vocab)) if i not in special])


def _repeated(model, prompts: int, length: int, seed: int) -> Prompts:
    words, rng = _words(model), np.random.default_rng(seed)
    longest = getattr(model.hf.config, "max_position_embeddings", None) or 2 * length + model.bos
    width = min(2 * length, longest - model.bos)
    length = min(width // 2, len(words))
    if length < 3 or prompts < 1:
        raise ValueError(f"Random prompts need length=3 or more and prompts=1 or more; here {length} and {prompts} (this "
                         f"model has {longest} positions and {len(words)} ordinary tokens).")  # fmt: skip
    start = [model.tokenizer.bos_token_id] if model.bos else []
    rows = []
    for _ in range(prompts):
        period = int(rng.integers(max(2, 2 * length // 3), length + 1))
        block = words[rng.choice(len(words), period, replace=False)]
        rows.append(torch.cat([torch.tensor(start, dtype=torch.long), block.repeat(width // period + 1)[:width]]))
    return Prompts(rows)


def _fresh(model, run: Prompts, seed: int) -> Prompts:
    """Prompts of the same lengths whose tokens do not repeat (as far as the vocabulary goes)."""
    words, rng = _words(model), np.random.default_rng(seed)
    rows = []
    for ids in run.ids:
        new = words[rng.choice(len(words), len(ids), replace=len(words) < len(ids))]
        new[: 1 if model.bos else 0] = ids[: 1 if model.bos else 0]
        rows.append(new)
    return Prompts(rows)


def looks(part: Prompts) -> torch.Tensor:
    """Which keys each pattern means, [pattern, row, query, key]; the first two tokens of a prompt are no queries."""
    block = -torch.ones(len(part.ids), part.width, dtype=torch.long) - torch.arange(
        part.width
    )  # padding equals nothing
    for row, ids in enumerate(part.ids):
        block[row, part.pads[row] :] = ids
    pads = torch.tensor(part.pads)[:, None, None]
    query, key = torch.arange(part.width)[None, :, None], torch.arange(part.width)[None, None, :]
    same = (block[:, :, None] == block[:, None, :]) & (key < query)
    before = torch.zeros_like(same)
    before[:, :, 1:] = same[:, :, :-1]
    found = [(key == query - 1).expand_as(same), same, before & (key < query), (key == pads).expand_as(same)]
    return torch.stack(found) & (query >= pads + 2) & (key >= pads)


def _attention(model, run: Prompts, targets: Prompts) -> tuple[list[np.ndarray], np.ndarray]:
    """Attention to what the patterns mean by the tokens of `targets`, then (in two draws) to another visible key instead, then the
    entropy, each [prompt, layer * head]; and which prompts have such keys, [pattern, prompt]."""
    parts, valid = [], []
    for part, aim in zip(run.chunks(4096), targets.chunks(4096), strict=True):
        mask = looks(aim).to(model.hf.device)
        seen = model.trace(model.inputs(part), _visit(model.names, len(part.ids), mask))
        parts.append(seen.permute(0, 2, 1, 3).flatten(2).cpu().numpy())
        valid.append(mask.any(-1).any(-1).cpu().numpy())
    return list(np.concatenate(parts, 1).astype(float)), np.concatenate(valid, 1)


def _visit(names, rows: int, mask: torch.Tensor):
    def body():
        found = []
        for layer in range(names.n_layers):
            pattern = names.place("pattern", layer, rows).get().unflatten(2, (names.n_heads, -1)).float()
            found.append(_scores(pattern.transpose(1, 2), mask))
        return torch.stack(found, 1)

    return body


def _scores(pattern: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[pattern, its other key in each draw, and entropy; row, head] from [row, head, query, key] and [pattern, row, query, key]."""
    queries = mask.any(-1)
    count = queries.sum(-1).clamp(min=1)[..., None]
    aimed = torch.einsum("rhqk,prqk->prh", pattern, mask.to(pattern)) / count
    visible = (pattern > 0).any(1) & ~mask  # for a query that sees nothing else, nothing is drawn
    instead, generator = [], torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        drawn = torch.where(visible, torch.rand(mask.shape, generator=generator).to(pattern.device), -1.0)
        other = torch.nn.functional.one_hot(drawn.argmax(-1), mask.shape[-1]).bool() & visible & queries[..., None]
        instead.append(torch.einsum("rhqk,prqk->prh", pattern, other.to(pattern)) / count)
    entropy = -(pattern * pattern.clamp(min=1e-12).log()).sum(-1)
    asked = queries[0].to(pattern)[:, None]  # every token but the first two and padding
    entropy = (entropy * asked).sum(-1) / asked.sum(-1).clamp(min=1)
    return torch.cat([aimed, *instead, entropy[None]])
