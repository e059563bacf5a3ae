"""Runs in which every target reads its own mixture of two runs."""

from __future__ import annotations

from operator import attrgetter
from weakref import WeakKeyDictionary

import torch

from workbench.model.edges.parts import Wiring, Writes, capture, ffn_input, head_writes
from workbench.model.names import Names
from workbench.model.plan import Prompts
from workbench.model.run import Model

WIRINGS: WeakKeyDictionary = WeakKeyDictionary()


def wiring(model: Model) -> Wiring:
    """The wiring of a model, made once, and proved: with every edge from the clean run, the run is the clean run.

    Raises:
        ValueError: for an architecture where that fails.
    """
    if model not in WIRINGS:
        made = Wiring(model)
        ids = model.names.d_vocab // 2 + torch.arange(-6, 6).reshape(
            2, 6
        )  # no special token: their embedding may be zero
        clean, corrupted = capture(model, made, Prompts(ids)), capture(model, made, Prompts(ids.flip(0)))
        again = mixed(model, made, clean, corrupted, made.exists.float()[None].expand(2, -1, -1), torch.arange(2))
        near = max(1e-3, 16 * torch.finfo(model.hf.dtype).eps)  # of bf16 sums only two digits are right
        if not torch.allclose(again, clean.logits, rtol=near, atol=near * float(clean.logits.abs().max())):
            raise ValueError(f"Edges are not offered for this architecture ({model.hf.config.model_type}): what its parts "
                             "write does not sum to what they read.")  # fmt: skip
        WIRINGS[model] = made
    return WIRINGS[model]


def mixed(model: Model, wired: Wiring, clean: Writes, corrupted: Writes, masks: torch.Tensor, which: torch.Tensor,
          known: torch.Tensor | None = None, stop: int | None = None, keep: bool = False):  # fmt: skip
    """The run in which each target reads its own mixture: edges with mask 1 carry what their source writes in this very
    run, edges with mask 0 what it wrote in the corrupted run.

    Args:
        masks: [target, source] for all rows, or [row, target, source].
        which: [row], the prompt that each row runs on.
        known: how much the writes of the first sources are already known to differ from the corrupted run's, [source, row,
            position, d_model]: whole layers of them, which are then not run again. None: the embedding, as in the clean run.
        stop: the first layer in which every part reads the whole stream again, as in an ordinary run (the layers before
            those that are known must then be as in the clean run). None: nowhere.
        keep: also return what all writes differ by, for `known`.
    Returns:
        Logits at the last position [row, d_vocab], and with `keep` [source, row, position, d_model].
    """
    names, rows = model.names, len(which)
    known = (clean.writes[:1, which] - corrupted.writes[:1, which]) if known is None else known
    start, end = (len(known) - 1) // (names.n_heads + 1), names.n_layers if stop is None else stop
    streams = [corrupted.streams[layer][which] for layer in range(start, end)]
    middles = [corrupted.middles[layer][which] for layer in range(start, end)]
    base = corrupted.writes[:, which]
    last = corrupted.last[which] if stop is None else None
    begin = clean.streams[start][which] if start < names.n_layers else clean.last[which]

    def body():
        return _mix(names, wired, rows, start, end, masks, known, streams, middles, last, base, begin)

    logits, delta = model.trace(model.inputs(clean.inputs(which)), body, logits_to_keep=1)
    return (logits, delta) if keep else logits


def _mix(names, wired, rows, start, end, masks, known, streams, middles, last, base, begin):
    """Inside a trace: see `mixed`."""
    with torch.set_grad_enabled(masks.requires_grad):
        known = Growing(known, base, masks.requires_grad)
        for below in range(start):
            names.layers[below].skip(names.block_value(begin))
        for layer in range(start, end):
            done = layer - start
            if not done and start:
                names.layers[layer].input = begin
            mixture = blend(masks, wired.reads[layer], known.delta, streams[done])
            _set_heads(names, wired, layer, streams[done], *mixture)
            z = names.place("z", layer, rows).get()
            written, seen = head_writes(names, wired, layer, z), known.delta
            known.add(written)
            place, reader = ffn_input(names, layer, rows), wired.reads[layer].stop
            place.get()
            _, x = blend(masks, slice(reader, reader + 1), seen if wired.parallel else known.delta, middles[done])
            place.set(x[0] if len(x) else middles[done])
            written = names.place("mlp_out", layer, rows).get()
            known.add(written[None])
        if last is not None:
            _, x = blend(masks, slice(-1, None), known.delta, last)
            attrgetter(names.row.ln_final)(names.nn).input = x[0] if len(x) else last
        return names.nn.output.logits[:, -1].float().clone(), known.delta


class Growing:
    """What the sources run so far write beyond the corrupted run: `delta` [source, row, position, d_model]."""

    def __init__(self, known: torch.Tensor, base: torch.Tensor, with_gradients: bool):
        self.delta, self.base = known, base
        self.room = None if with_gradients else torch.empty_like(base)
        if self.room is not None:
            self.room[: len(known)] = known

    def add(self, written: torch.Tensor) -> None:
        many = len(self.delta)
        more = self.base[many : many + len(written)]
        if self.room is None:
            self.delta = torch.cat([self.delta, written - more])
        else:
            torch.sub(written, more, out=self.room[many : many + len(written)])
            self.delta = self.room[: many + len(written)]


def blend(masks: torch.Tensor, part: slice, delta: torch.Tensor, stream: torch.Tensor):
    """What some targets read: (which of them read anything beyond the corrupted run, [target, row, position, d_model])."""
    masks = masks[..., part, : len(delta)].to(delta)
    used = masks.detach() != 0
    used = used if used.dim() == 2 else used.any(0)
    targets, columns = used.any(1).nonzero()[:, 0], used.any(0).nonzero()[:, 0]
    masks = masks[..., targets, :]
    if 2 * len(columns) < len(delta):
        masks, delta = masks[..., columns], delta[columns]
    if masks.dim() == 2:
        x = (masks @ delta.flatten(1)).unflatten(1, delta.shape[1:])
    else:
        x = torch.einsum("rts,srpd->trpd", masks, delta)
    return targets, x + stream if x.requires_grad else x.add_(stream)


def _set_heads(
    names: Names, wired: Wiring, layer: int, stream: torch.Tensor, active: torch.Tensor, x: torch.Tensor
) -> None:
    """Inside a trace: give the queries, keys and values of a layer their streams: x [target, row, position, d_model] to the
    active ones, the common stream to the others."""
    norm, (weights, biases) = wired.norms[layer], wired.weights(layer)
    idle = torch.ones(len(weights), dtype=torch.bool)
    idle[active.cpu()] = False
    found = x.new_empty(len(weights), *stream.shape[:-1], weights.shape[-1])
    found[idle] = norm.project(stream[None], weights[idle], biases[idle])
    found[active] = norm.project(x, weights[active], biases[active])
    for path, whole in wired.layout:
        attrgetter(path)(names.layers[layer]).output = found[whole].permute(1, 2, 0, 3).flatten(2)
