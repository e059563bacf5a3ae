"""Token pruning: after a few layers most tokens of a prompt go no further."""

from __future__ import annotations

import inspect
from operator import attrgetter

import torch

from workbench.improve.efficiency.streaming import own_layers
from workbench.locate.vocabulary.readout import asked
from workbench.model.edit import LOCK
from workbench.model.names import first

ALONG = ("position_ids", "cache_position", "alibi")  # what a block is given for each token, its last axis


def prune_tokens(model, prompts, keep: float = 0.5, *, after: int = 2, by: str = "attention",
                 seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What does the model predict next, if most tokens of the prompt stop after some layers?

    Up to layer `after` all is as ever. Then the tokens that the last token attends to least there (mean over heads) are taken
    out of the sequence, and later layers run on the rest, at their old positions: shorter matrices, not masks. The last token
    always stays. Prompts run one by one.

    Args:
        prompts: a text, a list of texts or ids, a task or the name of a bundled one (clean prompts of pairs).
        keep: the share of tokens that go on, above 0 and at most 1 (then nothing changes).
        after: the last layer that sees all tokens, and whose attention chooses.
        by: "attention", which layer `after` has to pay to all tokens; "random" is the control, "recent" keeps the latest.
    Returns:
        (logits [prompt, d_vocab], how many tokens went on [prompt]).
    Raises:
        ValueError: for another share, layer or way; where attention gives no weights to choose by, or is local and a prompt
            longer than its window.
    Source:
        Chen et al. 2024, "An image is worth 1/2 tokens after layer 2" (FastV), there for image tokens.
    """
    names, blocks = model.names, attrgetter(model.names.row.layers)(model.hf)
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep!r}: give the share of tokens that go on, above 0 and at most 1, such as 0.5.")
    if not 0 <= after < names.n_layers - 1:
        raise ValueError(
            f"after={after}: choose a layer from 0 to {names.n_layers - 2}, so that one is left to be shorter."
        )
    if by not in ("attention", "random", "recent"):
        raise ValueError(f"by={by!r} is unknown; choose 'attention', 'random' or 'recent'.")
    rows, own = asked(model, prompts)[0].ids, own_layers(model)
    if by == "attention" and keep < 1 and own[after].is_sliding and max(map(len, rows)) > own[after].sliding_window:
        whole = [f"after={layer} or " for layer in range(names.n_layers - 1) if not own[layer].is_sliding]
        raise ValueError(f"Layer {after} is local: the last token sees {own[after].sliding_window} tokens there, and cannot choose among all. "
                         f"Write {''.join(whole[:1])}by='recent'.")  # fmt: skip
    rng, chosen, weights, length = torch.Generator().manual_seed(seed), [], [], []

    def watch(module, inputs, output):
        if not isinstance(output, tuple) or len(output) < 2 or output[1] is None:
            raise ValueError(f"Attention of {model.hf.config.model_type!r} gives no weights to choose tokens by. Write by='recent', or "
                             "hf.set_attn_implementation('eager') before wb.load.")  # fmt: skip
        weights[:] = [output[1][0, :, -1].float().mean(0)]  # [key]

    def choose(n: int) -> torch.Tensor:
        if by == "attention":
            order = weights[0].cpu()
        else:
            order = torch.rand(n, generator=rng) if by == "random" else torch.arange(n).float()
        order = order.clone()
        order[-1] = torch.inf
        return order.topk(max(1, round(keep * n))).indices.sort().values

    def shorten(module, args, kwargs):
        given = dict(zip(inspect.signature(type(module).forward).parameters, (module, *args))) | kwargs
        stream = given.pop("hidden_states")
        if layer_of[module] == after + 1:
            chosen[:] = [choose(stream.shape[1]).to(stream.device)]
            stream = stream[:, chosen[0]]
        cut = {name: _cut(name, value, chosen[0]) for name, value in given.items() if name != "self"}
        return (stream,), cut

    def spread(module, inputs, output):
        """Back to the old length, zeros between, for some families reshape what the blocks return."""
        short = first(output)
        whole = short.new_zeros(1, length[0], short.shape[-1])
        whole[:, chosen[0]] = short
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    layer_of = {block: i for i, block in enumerate(blocks)}
    found, counts = [], []
    with LOCK:  # another thread's pass would meet the hooks
        hooks = [block.register_forward_pre_hook(shorten, with_kwargs=True) for block in list(blocks)[after + 1 :]]
        hooks.append(blocks[-1].register_forward_hook(spread))
        if by == "attention":
            hooks.append(attrgetter(names.row.attn)(blocks[after]).register_forward_hook(watch))
        try:
            for ids in rows:
                length[:] = [len(ids)]
                with torch.no_grad():
                    out = model.hf(input_ids=ids[None].to(model.hf.device), use_cache=False, logits_to_keep=1)
                found.append(out.logits[0, -1].float().cpu())
                counts.append(len(chosen[0]))
        finally:
            for one in hooks:
                one.remove()
    return torch.stack(found), torch.tensor(counts)


def _cut(name: str, value, kept: torch.Tensor):
    """What a block is given beside the stream, for the kept tokens only."""
    if name == "position_embeddings" and value is not None:
        return tuple(one[:, kept] for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    if name in ALONG:
        return value[..., kept]
    if name == "attention_mask" and value.dim() == 4:
        return value[:, :, kept][..., kept]
    return value
