"""The metric's gradient at what every query, key, value, FFN and the logits read, times what their sources' writes change."""

from __future__ import annotations

from operator import attrgetter

import torch

from workbench.model.edges.parts import Wiring, ffn_input
from workbench.model.plan import Prompts
from workbench.model.run import Model


def attribution(model: Model, wired: Wiring, prompts: Prompts, site: tuple, values: torch.Tensor, deltas: list, read,
                known=None):  # fmt: skip
    """How much would the metric change, to first order, if one source's write to one target changed by its delta?

    Runs the prompts with a site set to each of several values, and multiplies the metric's gradient at what each target
    reads, averaged over the values, with the deltas.

    Args:
        site: kind and layer of what is set: ("resid_pre", 0), ("z", 3) or ("mlp_out", 3).
        values: [value, row, position, width].
        deltas: tensors [source, row, position, d_model].
        read: (logits [row, d_vocab], row numbers) -> [row], the metric.
        known: for each target how many of the deltas' sources come before it, if these are not the model's own.
    Returns:
        For each delta a tensor [row, target, source].
    """
    names, (many, rows) = model.names, values.shape[:2]
    repeated = Prompts(prompts.ids * many)
    repeated.width, repeated.pads = prompts.width, prompts.pads * many

    def body():
        return _slopes(names, wired, site, values.flatten(0, 1), read, torch.arange(rows).repeat(many))

    streams, outs, heads, ffns, last = model.trace(model.inputs(repeated), body, logits_to_keep=1)
    deltas = [delta.transpose(0, 1).flatten(2) for delta in deltas]  # [row, source, position * d_model]
    found = [delta.new_zeros(rows, len(wired.targets), delta.shape[1]) for delta in deltas]

    known = wired.known if known is None else known

    def score(part: slice, slope) -> None:
        before, slope = known[part.start], slope.transpose(0, 1).flatten(2).transpose(1, 2)
        for delta, table in zip(deltas, found, strict=True):
            table[:, part, :before] = (delta[:, :before] @ slope).transpose(1, 2)

    for layer in range(names.n_layers):
        if heads[layer] is not None:
            score(wired.reads[layer], _pull(wired, layer, streams[layer], outs[layer], heads[layer], many))
        if ffns[layer] is not None:
            reader = wired.reads[layer].stop
            score(slice(reader, reader + 1), ffns[layer].unflatten(0, (many, rows)).mean(0)[None])
    score(slice(len(wired.targets) - 1, len(wired.targets)), last.unflatten(0, (many, rows)).mean(0)[None])
    return found


def _slopes(names, wired, site, values, read, prompts) -> tuple:
    """Inside a trace: gradients at what the projections give, at what the FFNs read, and at what the final norm reads."""
    streams, outs, ffns, rows, leaf = [], [], [], len(values), values.requires_grad_(True)
    with torch.enable_grad():
        for layer in range(names.n_layers):
            place = names.place("resid_pre", layer, rows)
            if site == ("resid_pre", layer):
                place.set(leaf)
            streams.append(place.get().detach())
            outs.append([])
            for path, _ in wired.layout:
                out = attrgetter(path)(names.layers[layer]).output
                outs[-1].append(out)
            if site == ("z", layer):
                names.place("z", layer, rows).set(leaf)
            place = ffn_input(names, layer, rows)
            ffns.append(place.get().clone())  # a branch of its own: what goes on in the stream does not count
            place.set(ffns[-1])
            if site == ("mlp_out", layer):
                names.place("mlp_out", layer, rows).set(leaf)
        final = attrgetter(names.row.ln_final)(names.nn)
        last = final.input.clone()
        final.input = last
        value = read(names.nn.output.logits[:, -1].float(), prompts)
        wanted = [out for row in outs for out in row] + ffns + [last]
        reached = [one for one in wanted if one.requires_grad]
        grads = dict(zip(map(id, reached), torch.autograd.grad(value.sum(), reached, allow_unused=True)))
    heads = [[grads.get(id(out)) for out in row] for row in outs]
    heads = [None if row[0] is None else row for row in heads]
    outs = [[out.detach() for out in row] for row in outs]
    return streams, outs, heads, [grads.get(id(one)) for one in ffns], grads[id(last)]


def _pull(wired: Wiring, layer: int, x, outs: list, grads: list, many: int) -> torch.Tensor:
    """From gradients at the projections' outputs to those at the stream of each query, key and value, averaged over the
    values: [target, row, position, d_model].

    The transposed Jacobian of a norm is a multiplication by scale / size, less its part along x; both are taken in the
    space of the heads, where tensors are small, so that each target needs no stream of its own.
    """
    norm, (weights, biases) = wired.norms[layer], wired.weights(layer)
    order, found = [which for _, whole in wired.layout for which in whole], []
    if norm.eps is not None:
        normal, over = norm.normal(x)
        biases = biases + torch.einsum("d,tde->te", norm.shift, weights)
    for (_, whole), out, grad in zip(wired.layout, outs, grads, strict=True):
        out, grad = (one.unflatten(-1, (len(whole), -1)) for one in (out, grad / many))
        if norm.eps is None:
            found.append(torch.einsum("rpte,tde->trpd", grad.unflatten(0, (many, -1)).sum(0), weights[whole]))
            continue
        along = ((out - biases[whole]) * grad).sum(-1) * over / x.shape[-1]
        slope = (grad * over[..., None]).unflatten(0, (many, -1)).sum(0)
        slope = torch.einsum("rpte,tde->trpd", slope, weights[whole]) * norm.scale
        slope = slope - slope.mean(-1, keepdim=True) if norm.centres else slope
        part = torch.einsum("mrpt,mrpd->trpd", along.unflatten(0, (many, -1)), normal.unflatten(0, (many, -1)))
        found.append(slope - part)
    return torch.cat(found)[torch.tensor(order).argsort()]
