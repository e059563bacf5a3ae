"""Target values: what the FFN would have to write at the site, for the model to say what is asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import trange

from workbench import measure
from workbench.component import Component, components
from workbench.locate.features.tokens import at_place
from workbench.steer.optimization.requests import Edit, layout, read_edits

ROWS_AT_ONCE = 512


@dataclass
class Values:
    """What is to be added at the site of each edit.

    Attributes:
        edits: the requests. layers: the FFNs that will be changed; the last is where `delta` was found.
        delta: [edit, d_model], in units of the stream. history: one dict per edit.
    """

    edits: list[Edit]
    layers: list[int]
    delta: torch.Tensor
    history: list[dict]


def target_values(model, requests, at, *, keep=None, keep_weight: float = 1.0, prefixes=(), steps: int = 100,
                  lr: float = 0.3, clamp: float = 3.0, decay: float = 0.01, reach: float = 0.05,
                  progress: bool = True) -> Values:  # fmt: skip
    """What must be added to an FFN's output at one token, so that the model says the target there? Adam on that vector.

    The loss of an edit is -log p(target), the mean over its prompts, + keep_weight * KL at the end of the prompts to keep
    + decay * |added|^2 / |stream|^2. An edit stops when the first two together are below `reach`.

    Args:
        requests: rows {"prompt" (a text or several), "subject", "target_new"}, or a task of pairs, whose foil becomes the
            answer after the clean prompt.
        at: "mlp_out.3@subject" (the last token of the subject) or "mlp_out.5@-1"; for several layers a list, of which the
            last is the place of the value.
        keep: what the model says about the same subject elsewhere and should go on saying: tasks or their names (the
            prompts in which the subject stands are taken), or texts, with "{subject}" or written out; also the column
            "keep" of a row. By default the reference's "{subject} is a", and nothing at a numbered position, such as @-1,
            where other prompts have other keys.
        prefixes: texts; each prompt also stands behind each of them.
        lr: step of Adam, in units of the stream's root mean square. clamp: the longest vector, in lengths of the stream.
        reach: -log p (nats) that counts as reached.
    Raises:
        ValueError: for a site that is no FFN output, and when a target is not reached, with what to try; nothing has
            been changed then.
    Source:
        Meng et al. 2022 (ROME), sec. 3.1 step 2; clamp in lengths of the stream, weight 1 for what is kept, and the
        demand that the target be reached are ours: the reference's settings fail silently on small models.
    """
    layers, site = sites(model, at)
    edits = read_edits(model, requests, site, prefixes, keep)
    delta, history = search(model, edits, site, keep_weight, steps, lr, clamp, decay, reach, progress)
    missed = [one for one in history if not one["reached"]]
    if missed:
        said = "; ".join(f"{one['edit']} (p = {np.exp(-one['nll']):.2g})" for one in missed[:3])
        raise ValueError(f"{len(missed)} of {len(edits)} targets were not reached at {site}, so nothing was changed: {said}. Try "
                         f"another layer or position, a larger clamp than {clamp:g}, more steps than {steps}, a smaller "
                         f"keep_weight than {keep_weight:g}, or a larger reach than {reach:g}.")  # fmt: skip
    return Values(edits, layers, delta, history)


def search(model, edits: list[Edit], site: Component, keep_weight, steps, lr, clamp, decay, reach, progress) -> tuple:
    """`target_values` for requests that are read: (delta [edit, d_model], history), also of targets not reached."""
    device = model.hf.device
    theta = torch.zeros(len(edits), model.names.d_model, device=device, requires_grad=True)
    streams = _streams(model, edits, site.layer)
    sites_of = [[x[p[2]] for x, p in zip(own, edit.prompts)] for own, edit in zip(streams, edits, strict=True)]
    stream = torch.stack([torch.stack(own).norm(dim=-1).mean() for own in sites_of]).to(device)[:, None]  # [edit, 1]
    adam, root = torch.optim.Adam([theta], lr), model.names.d_model**0.5
    before = _before(model, edits)
    best = [None] * len(edits)
    history: list[dict] = [{} for _ in edits]
    going = list(range(len(edits)))
    hidden = not progress or os.environ.get("WORKBENCH_STRICT") == "1"
    for step in trange(steps + 1, desc="target values", leave=False, delay=5, mininterval=0.5, disable=hidden):
        nll, kl = torch.zeros(len(edits)), torch.zeros(len(edits))
        gradient = torch.zeros_like(theta)
        for part in _parts(edits, going):
            losses = _losses(model, edits, part, site.layer, theta, stream / root, before, streams, keep_weight)
            nll[part], kl[part], gradient[part] = losses[0][part], losses[1][part], losses[2][part]
        for i in list(going):
            total, reached = float(nll[i] + keep_weight * kl[i]), float(nll[i]) <= reach
            if best[i] is None or (reached, -total) > best[i][:2]:
                best[i] = (reached, -total, theta[i].detach().clone())
                norm = float(theta[i].detach().norm()) / root
                history[i] = {"edit": edits[i].label, "layer": site.layer, "steps": step, "nll": float(nll[i]),
                              "keep_kl": float(kl[i]), "norm": norm, "reached": reached}  # fmt: skip
            if total <= reach:
                going.remove(i)
        if not going or step == steps:
            break
        quiet = torch.ones(len(edits), 1, device=device)
        quiet[going] = 0
        frozen = theta.detach().clone()
        theta.grad = (gradient + 2 * decay / root**2 * theta.detach()) * (1 - quiet)
        adam.step()
        with torch.no_grad():
            longest = clamp * root / theta.norm(dim=1, keepdim=True).clamp(min=1e-9)
            theta.mul_(longest.clamp(max=1))
            theta.copy_(torch.where(quiet.bool(), frozen, theta))
    delta = torch.stack([one[2] for one in best]) * stream / root
    return delta.cpu(), history


def sites(model, at) -> tuple[list[int], Component]:
    """The layers to change, in order, and the site of the value (the last of them).

    Raises:
        ValueError: for what is no FFN output with one position, and for architectures that norm what an FFN writes.
    """
    found = sorted(model.names.expand(components(at)))
    refused = model.names.refused
    for kind in ("neuron", "mlp_out"):
        if kind in refused:
            raise ValueError(f"Facts are edited in the FFN's output weights. {refused[kind]}")
    if "norm" in model.names.row.mlp_add:
        raise ValueError(f"Facts cannot be edited in {model.hf.config.model_type!r} in closed form: it norms what its FFNs write. "
                         "Use finetune or lora.")  # fmt: skip
    if any(one.kind != "mlp_out" or one.position is None for one in found) or len({one.position for one in found}) > 1:
        raise ValueError(f"An edit is made in FFNs at one position, for example 'mlp_out.3@subject', 'mlp_out.5@-1' or a list of "
                         f"such; got {', '.join(map(str, found))}.")  # fmt: skip
    return [one.layer for one in found], found[-1]


def _streams(model, edits, layer: int) -> list[list[torch.Tensor]]:
    """The stream after a block, for each row of each edit: [position, d_model]."""
    prompts, owner, _ = layout(edits, list(range(len(edits))))
    found, done = [[] for _ in edits], 0
    for part in prompts.chunks():
        (x,) = at_place(model, part, Component("resid_post", layer))
        for row, pad in enumerate(part.pads):
            found[owner[done + row]].append(x[row, pad:])
        done += len(part.ids)
    return found


def _before(model, edits) -> list[torch.Tensor]:
    """The untouched predictions at the end of the prompts to keep, [prompt, d_vocab] for each edit."""
    return [model.logits([one[0] for one in edit.keep]).log_softmax(-1) if edit.keep else None for edit in edits]


def _parts(edits, going):
    """The edits still going on, in groups that fit one pass."""
    part, rows = [], 0
    for i in going:
        size = len(edits[i].prompts) + len(edits[i].keep)
        if part and rows + size > ROWS_AT_ONCE:
            yield part
            part, rows = [], 0
        part.append(i)
        rows += size
    if part:
        yield part


def _losses(model, edits, part, layer: int, theta, unit, before, streams, keep_weight: float) -> tuple:
    """-log p(target) and KL of each edit (CPU), and the gradient of their weighted sum with respect to theta.

    What an FFN writes is added to the stream, so each pass takes the stream up after its block.
    """
    prompts, owner, kept = layout(edits, part)
    device, names, rows = theta.device, model.names, torch.arange(len(owner))
    stream = torch.zeros(len(owner), prompts.width, names.d_model, dtype=streams[part[0]][0].dtype)
    for row, one in enumerate(one for i in part for one in streams[i]):
        stream[row, prompts.pads[row] :] = one
    columns = torch.tensor([pad + spans["site"][0] for pad, spans in zip(prompts.pads, prompts.spans, strict=True)])
    targets = [edits[i].target_ids for i in owner]
    longest = max(len(one) for one in targets)

    def body():
        with torch.enable_grad():
            added = (theta * unit)[torch.tensor(owner).to(device)].to(stream.dtype)
            x = stream.to(device).index_put((rows.to(device), columns.to(device)), added, accumulate=True)
            for below in range(layer + 1):
                names.layers[below].skip(names.block_value(x))
            logs = names.nn.output.logits[:, -longest:].float().log_softmax(-1)
            nll, kl = torch.zeros(len(edits), device=device), torch.zeros(len(edits), device=device)
            seen = dict.fromkeys(part, 0)
            for row, i in enumerate(owner):
                if kept[row]:
                    kl[i] = kl[i] + measure.kl(before[i][seen[i]].to(device), logs[row, -1]) / len(edits[i].keep)
                    seen[i] += 1
                else:
                    wanted = targets[row].to(device)
                    here = logs[row, -len(wanted) :].gather(-1, wanted[:, None])
                    nll[i] = nll[i] - here.sum() / len(edits[i].prompts)
            (gradient,) = torch.autograd.grad((nll + keep_weight * kl).sum(), theta)
        return nll.detach().cpu(), kl.detach().cpu(), gradient

    return model.trace(model.inputs(prompts), body, logits_to_keep=longest)
