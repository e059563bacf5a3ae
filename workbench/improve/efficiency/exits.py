"""Early exit: stop at the first layer at which the stream already says the next word."""

from __future__ import annotations

from operator import attrgetter

import torch

from workbench.locate.vocabulary.readout import Readout, asked
from workbench.model.edit import LOCK
from workbench.model.names import first


class _Sure(Exception):
    """Raised inside a forward pass, so that no later layer runs."""


def exit_early(model, prompts, confidence: float = 0.9, *, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What does the model predict next, if it may stop as soon as it is sure?

    After each layer the last position is read with the model's own final norm and unembedding (the logit lens); when its
    largest probability reaches `confidence`, the pass ends there and later layers do not run. Prompts run one by one.

    Args:
        prompts: a text, a list of texts or ids, a task or the name of a bundled one (clean prompts of pairs).
        confidence: 0 to 1; above 1 nothing stops.
        start: the first layer after which it may stop; earlier streams are not read, and cost nothing.
    Returns:
        (logits [prompt, d_vocab], how many layers ran [prompt]). The reading itself costs one product with the unembedding for
        each layer read. Where every prompt leaves early, one of them is run to the end as well, to check the lens.
    Raises:
        ValueError: for a layer that is not there, a confidence below 0, or a model that the lens cannot read.
    Source:
        Schuster et al. 2022, "Confident adaptive language modeling"; nostalgebraist 2020 for the lens.
    """
    names, blocks = model.names, attrgetter(model.names.row.layers)(model.hf)
    if not 0 <= start < names.n_layers:
        raise ValueError(f"start is a layer from 0 to {names.n_layers - 1}; got {start}.")
    if not confidence >= 0:
        raise ValueError(
            f"confidence is a probability from 0 to 1, such as 0.9 (above 1 nothing stops); got {confidence}."
        )
    rows, readout, said, ran, last = asked(model, prompts)[0].ids, Readout(model), [], [], []

    def hook(module, inputs, output):
        depth = layer_of[module]
        if depth >= start or depth == names.n_layers - 1:
            logits = readout(first(output)[0, -1:])[0]
            last[:] = [logits]
            if depth < names.n_layers - 1 and logits.float().softmax(-1).max() >= enough:
                raise _Sure(logits.float().cpu(), depth + 1)

    def whole(ids):
        with torch.no_grad():
            out = model.hf(input_ids=ids[None].to(model.hf.device), use_cache=False, logits_to_keep=1).logits[0, -1]
        readout.check(last[0], out)
        return out.float().cpu(), names.n_layers

    layer_of, enough = {block: i for i, block in enumerate(blocks)}, confidence
    with LOCK:  # another thread's pass would meet the hooks
        hooks = [block.register_forward_hook(hook) for block in blocks]
        try:
            for ids in rows:
                try:
                    logits, layers = whole(ids)
                except _Sure as sure:
                    logits, layers = sure.args
                said.append(logits)
                ran.append(layers)
            if names.n_layers not in ran:
                enough = torch.inf
                whole(rows[0])
        finally:
            for one in hooks:
                one.remove()
    return torch.stack(said), torch.tensor(ran)
