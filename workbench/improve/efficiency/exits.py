"""Early exit: stop at the first layer at which the stream already says the next word."""

from __future__ import annotations

from operator import attrgetter

import torch

from workbench.locate.vocabulary.readout import Readout
from workbench.model.names import first


class _Sure(Exception):
    """Raised inside a forward pass, so that no later layer runs."""


def exit_early(model, prompts, confidence: float = 0.9, *, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What does the model predict next, if it may stop as soon as it is sure?

    After each layer the last position is read with the model's own final norm and unembedding (the logit lens); when its
    largest probability reaches `confidence`, the pass ends there and later layers do not run. Prompts run one by one.

    Args:
        confidence: 0 to 1; above 1 nothing stops.
        start: the first layer after which it may stop; earlier streams are not read, and cost nothing.
    Returns:
        (logits [prompt, d_vocab], how many layers ran [prompt]). The reading itself costs one product with the unembedding for
        each layer read.
    Raises:
        ValueError: for a layer that is not there, or a model that the lens cannot read.
    Source:
        Schuster et al. 2022, "Confident adaptive language modeling"; nostalgebraist 2020 for the lens.
    """
    names, blocks = model.names, attrgetter(model.names.row.layers)(model.hf)
    if not 0 <= start < names.n_layers:
        raise ValueError(f"start is a layer from 0 to {names.n_layers - 1}; got {start}.")
    readout, said, ran, last = Readout(model), [], [], []

    def hook(module, inputs, output):
        depth = layer_of[module]
        if depth >= start or depth == names.n_layers - 1:
            logits = readout(first(output)[0, -1:])[0]
            last[:] = [logits]
            if depth < names.n_layers - 1 and logits.float().softmax(-1).max() >= confidence:
                said.append(logits.float().cpu())
                ran.append(depth + 1)
                raise _Sure

    layer_of = {block: i for i, block in enumerate(blocks)}
    hooks = [block.register_forward_hook(hook) for block in blocks]
    try:
        for ids in model._prompts(prompts).ids:
            try:
                with torch.no_grad():
                    out = model.hf(input_ids=ids[None].to(model.hf.device), use_cache=False, logits_to_keep=1)
            except _Sure:
                continue
            readout.check(last[0], out.logits[0, -1])
            said.append(out.logits[0, -1].float().cpu())
            ran.append(names.n_layers)
    finally:
        for one in hooks:
            one.remove()
    return torch.stack(said), torch.tensor(ran)
