"""Contrast between layers: what the last layer says beyond an earlier one (DoLa). It changes logits, not activations."""

from __future__ import annotations

import math

import torch

from workbench.component import Component
from workbench.locate.vocabulary.readout import Readout, run
from workbench.model import Prompts


def dola(model, prompts, *interventions, layers="high", alpha: float = 0.1, spans=None) -> torch.Tensor:
    """What does the model say next beyond what an earlier layer says already? log p(last) - log p(early), where the early
    layer is the one whose prediction differs most from the last one's (by Jensen-Shannon divergence), prompt by prompt.

    Only tokens at least `alpha` times as probable as the most probable one stay in the running; others get -inf.

    Args:
        prompts: a text, a list of texts or of id tensors. interventions: as for `model.logits`.
        layers: candidates, counted from 0 as for resid_post: a list of layers, or every second one of the "low" or "high"
            half (the last left out), as the authors take for long and for short answers.
    Returns:
        [prompt, d_vocab], logits of the next token.
    Raises:
        ValueError: for layers that are not there, an alpha not between 0 and 1, or an architecture whose streams cannot be
            read out.
    Source:
        Chuang et al. 2024, "DoLa: decoding by contrasting layers", eq. 3-5.
    """
    return contrast(model, model._prompts(prompts, spans), interventions, layers, alpha)[0]


def contrast(model, prompts: Prompts, interventions, layers, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [prompt, d_vocab], the early layer chosen [prompt]), at the last token of each."""
    chosen = _layers(model.names.n_layers, layers)
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha}: give a share above 0, up to 1.")
    readout, found, early = Readout(model), [], []
    wanted = [Component("resid_post", layer) for layer in [*chosen, model.names.n_layers - 1]]
    for _, seen, logits in run(model, prompts, wanted, interventions):
        with torch.no_grad():
            final = logits[:, -1].float()
            streams = torch.stack([readout(seen[one][:, -1]).float() for one in wanted])
            readout.check(streams[-1], final)
            last, before = final.log_softmax(-1), streams[:-1].log_softmax(-1)
            which = _divergence(last, before).argmax(0)
            contrasted = last - before.gather(0, which.view(1, -1, 1).expand(1, *last.shape))[0]
            kept = last >= last.amax(-1, keepdim=True) + math.log(alpha)
            found.append(contrasted.masked_fill(~kept, -torch.inf).cpu())
            early.append(torch.tensor(chosen)[which.cpu()])
    return torch.cat(found), torch.cat(early)


def dola_generate(
    model, prompts, *interventions, max_new_tokens: int = 20, layers="high", alpha: float = 0.1, spans=None
):
    """What does the model say when every token is chosen by `dola`, greedily? One full pass for every token.

    Args:
        interventions, layers, alpha: as for `dola`.
    Returns:
        The continuation, for one text; a list of them for several.
    """
    given = model._prompts(prompts, spans)
    stop = model.hf.generation_config.eos_token_id
    stop = {*(stop if isinstance(stop, list) else [stop]), model.tokenizer.eos_token_id}
    ids, alive = list(given.ids), list(range(len(given.ids)))
    for _ in range(max_new_tokens):
        part = Prompts([ids[i] for i in alive], [given.lengths[i] for i in alive], [given.spans[i] for i in alive])
        new = contrast(model, part, interventions, layers, alpha)[0].argmax(-1)
        for i, token in zip(alive, new, strict=True):
            ids[i] = torch.cat([ids[i], token[None]])
        alive = [i for i in alive if int(ids[i][-1]) not in stop]
        if not alive:
            break
    texts = []
    for one, length in zip(ids, given.lengths, strict=True):
        said = one[length:].tolist()
        ends = [k for k, token in enumerate(said) if token in stop]
        texts.append(model.tokenizer.decode(said[: ends[0]] if ends else said, skip_special_tokens=True).strip())
    return texts[0] if isinstance(prompts, str) else texts


def _layers(n: int, layers) -> list[int]:
    if isinstance(layers, str):
        halves = {"low": range(0, n // 2, 2), "high": range(n // 2, n - 1, 2)}
        if layers not in halves:
            raise ValueError(
                f"layers={layers!r} is unknown; choose 'low', 'high' or a list of layers from 0 to {n - 2}."
            )
        layers = halves[layers]
    layers = list(layers)
    if not layers or not all(isinstance(one, int) and 0 <= one < n - 1 for one in layers):
        raise ValueError(f"layers={layers}: give layers from 0 to {n - 2}, before the last one.")
    return layers


def _divergence(last: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of log-probabilities [row, d_vocab] and [layer, row, d_vocab]; [layer, row], in nats."""
    middle = torch.logaddexp(last, before) - math.log(2)
    one = (last.exp() * (last - middle)).sum(-1)
    return (one + (before.exp() * (before - middle)).sum(-1)) / 2
