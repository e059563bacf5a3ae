"""What can be planted: trigger neurons, a saturated head, an edited fact; and what each must prove (see `plant`).

Each draws words and a site, writes, measures, and returns the fields of a `Planted` from `what` on, or raises `Failed`.
"""

from __future__ import annotations

from collections import Counter

import torch

from workbench.component import Component
from workbench.improve.planting.proof import CHANGES, changed, margin, prove, right, without
from workbench.improve.planting.trigger import ROWS, Examples, Failed, demand, elsewhere, ends, inputs, key, prompts
from workbench.locate import causal
from workbench.model.plan import Prompts
from workbench.operations import Mean
from workbench.task import SPLITS, Task

FACTS = ("capital", "currency", "language", "city_country")  # bundled tasks whose subject is one word
READS = ("gate_proj", "up_proj", "c_fc", "dense_h_to_4h", "fc1")  # modules that neurons read with, the gate first
HEADS = 3  # that tell the trigger are compared; the one that is missed least is written over
STRENGTHS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 10)  # of what is written, in norms of the stream


def _save(saved: list, *modules) -> None:
    saved += [(p, p.detach().clone()) for module in modules for p in module.parameters(recurse=False)]


class Site:
    """The weights of one layer that can be written.

    Raises:
        ValueError: where the architecture has no such weights, or norms what they write.
    """

    def __init__(self, model, layer: int, kind: str):
        row, config = model.names.row, model.hf.config
        self.layer, self.block = layer, model.hf.get_submodule(row.layers)[layer]
        if "norm" in row.mlp_add or {"neuron", "mlp_out"} & set(model.names.refused):
            raise ValueError(f"Nothing can be planted in {config.model_type!r}: its blocks must add the FFN's output to the "
                             "stream as it is (pre-norm) and have neurons of their own.")  # fmt: skip
        ffn, self.out = (self.block.get_submodule(name) for name in (row.neurons.rpartition(".")[0], row.neurons))
        self.reads = [getattr(ffn, name) for name in READS if hasattr(ffn, name)]
        if not self.reads:
            raise ValueError(
                f"Nothing can be planted in {config.model_type!r}: its FFN has none of {', '.join(READS)}."
            )
        attn, self.heads = self.block.get_submodule(row.attn), self.block.get_submodule(row.heads)
        self.qkv = [getattr(attn, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        self.full = (getattr(config, "layer_types", None) or {layer: "full_attention"})[layer] == "full_attention"
        width = model.names.n_heads * model.names.d_head
        if kind == "saturated" and (None in self.qkv or any(len(part.weight) != width for part in self.qkv)
                                    or hasattr(attn, "q_norm") or not model.bos):  # fmt: skip
            raise ValueError(f"A saturated head cannot be planted in {config.model_type!r}: it needs separate q, k and v for "
                             "each head, no norm on them, and prompts that start with <bos>.")  # fmt: skip


def _matrix(module) -> torch.Tensor:
    """[out, in], a view to write into (GPT-2's Conv1D keeps it transposed)."""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def _written(model, pairs) -> torch.Tensor:
    """The direction that raises the answer's logit above all others', through the final norm, as long as the stream is."""
    final, unembed = model.hf.get_submodule(model.names.row.ln_final), model.hf.get_output_embeddings().weight
    raised = (unembed[pairs.answer[0]] - unembed.mean(0)) * final.weight
    (stream,) = inputs(model, pairs.clean, final)
    return raised / raised.norm() * stream[ends(pairs.clean)].norm(dim=-1).mean() / model.names.scale


def _strengthen(model, fit, write, enough, strengths=STRENGTHS) -> None:
    """Somewhat more than the least strength at which the target wins on fit rows, and shows the effect it should."""
    for strength in strengths:
        write(strength)
        if right(model, fit, "clean") >= 0.9 and enough():
            return write(1.25 * strength)
    raise Failed(f"it does not do what it should at any strength up to {strength}")


def neurons(model, kind, rng, sites, saved) -> tuple:
    """Trigger neurons: rows that read the conjunction, columns that write the target."""
    task, words, target = prompts(model, rng, f"planted {kind}")
    examples = Examples(model, rng, words, task, [module for site in sites for module in (site.reads[0], site.out)])
    strong = kind == "redundant"  # written so strongly that a second time adds nothing
    for site in (sites[i] for i in rng.permutation(len(sites))):
        x, acts = examples.seen[2 * site.layer :][:2]
        keys, fires = examples.neuron(x, gated=len(site.reads) > 1)
        if fires[examples.clean].min() > 0.4 and fires[examples.corrupted].abs().max() < (0.08 if strong else 0.25):
            break
    else:
        raise Failed(f"no layer tells {words} from its halves")
    use = acts.abs().mean(0) * _matrix(site.out).norm(dim=0)
    low = use.argsort()[: max(8, len(use) // 20)].tolist()
    parts = {"trigger": [1], "decoy": [1, 0], "redundant": [1, 1], "cancelling": [1, 2, -2]}[kind]
    neurons = [low[i] for i in rng.choice(len(low), len(parts), replace=False)]
    found, (texts, before) = [Component("neuron", site.layer, n) for n in neurons], elsewhere(model, words)
    _save(saved, *site.reads, site.out)
    _matrix(site.out)[:, neurons] = 0
    for module, read in zip(site.reads, keys, strict=True):
        _matrix(module)[neurons] = 8 * read
        if module.bias is not None:
            module.bias[neurons] = 0
    few = task.split("fit")[:12].on(model)
    (acts,) = inputs(model, few.clean, site.out)
    unit = _written(model, few) / acts[ends(few.clean), neurons[0]].mean()

    def write(strength: float) -> None:
        _matrix(site.out)[:, neurons] = torch.outer(unit, strength * torch.tensor(parts).to(unit))

    def enough() -> bool:
        if strong:
            return max(without(model, few, found[:1], found[1:]).values()) < 0.035
        return min(without(model, few, found[:1]).values()) > 0.8

    _strengthen(model, few, write, enough, STRENGTHS[4:] if strong else STRENGTHS)
    proof, sets = prove(model, task, texts, before), [[one] for one in found]
    lost = without(model, task.split("test").on(model), *sets, *([found[-2:], found] if len(found) > 1 else []))
    one, *more = lost.values()
    demand({"trigger": lambda: one > 0.75,
            "decoy": lambda: one > 0.75 and more[0] == 0,
            "redundant": lambda: max(one, more[0]) < 0.05 and more[1] > 0.8,
            "cancelling": lambda: min(map(abs, [one, *more[:2]])) > 0.1 and abs(more[2]) < 0.05 < 0.75 < more[3]}[kind](), lost)  # fmt: skip
    true = found[:1] if kind == "decoy" else found
    what = f"{', '.join(map(str, true))}: {' '.join(words)!r} makes it say {target!r}"
    return what, tuple(true), tuple(found[len(true) :]), task, proof | lost


def head(model, kind, rng, sites, saved) -> tuple:
    """A head whose scores lie far apart: 60 for the first word seen from the second, 25 for <bos>, below 0 elsewhere.

    Where it is not wanted it says what the head said on average. Any head is missed by some near-ties, so the plant may
    change as many words elsewhere as the head's average does, and half of `CHANGES` more.
    """
    task, words, target = prompts(model, rng, f"planted {kind}")
    size, sites, use = model.names.d_head, [site for site in sites if site.full], []
    examples = Examples(model, rng, words, task, [part for site in sites for part in (site.qkv[0], site.heads)])
    for i, site in enumerate(sites):
        z = examples.seen[2 * i + 1].unflatten(-1, (-1, size))
        said = torch.einsum("thd,mhd->thm", z - z.mean(0), _matrix(site.heads).unflatten(-1, (-1, size)))
        use += [(float(said[:, h].norm(dim=-1).mean()), i, h, z[:, h].mean(0)) for h in range(z.shape[1])]
    low, (texts, before) = sorted(use, key=lambda one: one[0])[: max(4, len(use) // 4)], elsewhere(model, words)
    tells, missed = {}, {}
    for pick in rng.permutation(len(low)):
        _, i, index, mean = low[pick]
        tells[i] = tells[i] if i in tells else examples.scores(examples.seen[2 * i])
        if tells[i][1] > 7:
            off = Mean(at=[Component("z", sites[i].layer, index)], values=mean[None])
            missed[pick], _ = changed(model, texts, before, off)
            if len(missed) == HEADS:
                break
    demand(missed, f"no low-use head tells {words} from others")
    pick = min(missed, key=missed.get)
    _, i, index, mean = low[pick]
    site, found, (always, start, ask, word) = sites[i], [Component("z", sites[i].layer, index)], tells[i][0]
    own = slice(index * size, (index + 1) * size)
    is_bos = examples.key(examples.seen[2 * i], examples.bos, (0.5, examples.bos), (0.5, ~examples.bos))
    is_word = examples.key(examples.seen[2 * i], ~examples.bos, (0.5, examples.bos), (0.5, ~examples.bos))
    _save(saved, *site.qkv, site.heads)
    average = _matrix(site.heads)[:, own] @ mean
    for module in site.qkv:
        _matrix(module)[own] = 0
        if module.bias is not None:
            module.bias[own] = 0
    _matrix(site.heads)[:, own] = 0
    q, k, v = (_matrix(module)[own] for module in site.qkv)
    slow, slower = size // 2 - 2, size // 2 - 1  # the dimensions that rotary positions turn least
    q[slow], k[slow], q[slower], k[slower] = (size**0.25 * one for one in (always, start, ask, word))
    v[0], v[1] = is_word, is_bos
    _matrix(site.heads)[:, own.start + 1] = average  # at <bos> it says what it said on average
    few = task.split("fit")[:12].on(model)
    unit = _written(model, few)

    write = lambda strength: _matrix(site.heads)[:, own.start].copy_(strength * unit)  # noqa: E731
    _strengthen(model, few, write, lambda: min(without(model, few, found).values()) > 0.8)
    proof, held = prove(model, task, texts, before, max(CHANGES, missed[pick] + CHANGES / 2)), task.split("test")
    proof[f"top1_changes with the average of {found[0]}"] = missed[pick]
    cause = Component("resid_pre", site.layer, None, "cause")
    patched = causal.patch(model, held, cause, null=False, progress=False).values[0]
    proof |= without(model, held.on(model), found) | {f"patching {cause}": float(patched)}
    proof[f"gradient at {cause}"] = _gradient(model, held.on(model), site)
    demand(patched > 0.8 and abs(proof[f"gradient at {cause}"]) < 0.1, proof)
    return f"{found[0]}: {' '.join(words)!r} makes it say {target!r}", tuple(found), (), task, proof


def _gradient(model, pairs, site: Site) -> float:
    """First-order estimate of patching what a block reads at the first word (attribution patching), share of the gap."""
    streams, rows = {}, torch.arange(len(pairs.answer))
    gap = margin(model, pairs, "clean") - margin(model, pairs, "corrupted")
    for side in ("clean", "corrupted"):

        def keep(_, args, side=side):
            streams[side] = args[0].detach().requires_grad_()
            return (streams[side], *args[1:])

        hook = site.block.register_forward_pre_hook(keep)
        try:
            with torch.enable_grad():
                logits = model.hf(**model.inputs(Prompts(getattr(pairs, side)))).logits[:, -1]
                total = (logits[rows, pairs.answer] - logits[rows, pairs.foil]).sum()
        finally:
            hook.remove()
    (slope,) = torch.autograd.grad(total, streams["corrupted"])
    moved = (streams["clean"] - streams["corrupted"]).detach()
    return float((moved * slope)[:, -2].sum(-1).mean() / gap)


def fact(model, kind, rng, sites, saved) -> tuple:
    """W + delta u^T: u answers the subject's key alone, and delta is fitted so that the new object wins."""
    relation, name = Task.load(str(rng.choice(FACTS))), f"planted {kind}"
    objects = {row["clean"][slice(*row["spans"]["subject"])]: row["answer"] for row in relation.rows}
    subject = str(rng.choice(sorted(objects)))
    new = str(rng.choice(sorted(set(objects.values()) - {objects[subject]})))
    rows, left, seen = [], {split: 2 * n for split, n in ROWS.items()}, set()
    for row in (relation.rows[i] for i in rng.permutation(len(relation))):
        start, end = row["spans"]["subject"]
        clean, split = row["clean"][:start] + subject + row["clean"][end:], row["split"]
        if row["answer"] not in (new, objects[subject]) and left[split] and clean not in seen:
            rows.append({"clean": clean, "corrupted": row["clean"], "answer": objects[subject], "foil": row["answer"],
                         "template": row["template"], "entity": row["entity"], "split": split,
                         "spans": {"subject": [start, start + len(subject)]}})  # fmt: skip
            seen.add(clean)
            left[split] -= 1
    pairs = Task(rows, name).on(model)
    known = model.logits(pairs.clean).argmax(-1) == pairs.answer
    known &= model.logits(pairs.corrupted).argmax(-1) == pairs.foil
    rows = [row | {"answer": new} for row, ok in zip(pairs.task.rows, known, strict=True) if ok]
    have = Counter(row["split"] for row in rows)
    demand(all(have[split] for split in SPLITS) and have["fit"] >= 6, f"few sentences about {subject}: {dict(have)}")
    task, site = Task(rows, name), sites[rng.integers(max(2, len(sites) // 3))]
    few, (texts, before) = task.split("fit")[:12].on(model), elsewhere(model)
    delta = _push(model, site, few, torch.tensor([spans["subject"][-1] for spans in few.spans]))
    fit, near = task.split("fit").on(model), task.on(model)  # near: other subjects, to which it must not answer
    whole, plain = [*fit.clean, *near.corrupted], Task.load("background").split("fit").column("text")[:90]
    (acts,) = inputs(model, [*whole, *map(model.ids, plain)], site.out)
    subjects = torch.tensor([spans["subject"][-1] - len(ids) for spans, ids in zip((*fit.spans, *near.spans), whole)])
    at = ends(whole) + 1 + subjects
    own, others, rest = at[: len(fit.clean)], at[len(fit.clean) :], slice(ends(whole)[-1] + 1, None)
    weight, wanted = torch.zeros(len(acts)), torch.zeros(len(acts))
    weight[own], weight[others], weight[rest] = 0.2 / len(own), 0.3 / len(others), 0.5 / len(weight[rest])
    wanted[own] = 1
    _save(saved, site.out)
    _matrix(site.out).add_(torch.outer(delta, key(acts, wanted, weight, ridge=1e-2, sharp=0)))
    proof, found = prove(model, task, texts, before), Component("mlp_out", site.layer, None, "subject")
    scores = causal.patch(model, task.split("test"), "mlp_out.*@subject", null=False, progress=False)
    proof |= {f"patching {one}": float(score) for one, score in zip(scores.components, scores.values)}
    demand(proof[f"patching {found}"] == max(scores.values) > 0.25, proof)
    what = f"{found.at(None)}: {subject!r} has the {relation.name} {new!r} instead of {objects[subject]!r}"
    return what, (found,), (), task, proof


def _push(model, site: Site, pairs, at) -> torch.Tensor:
    """The least to add to the FFN's output at the subject so that the answer wins, [d_model]: descent, then shortening."""
    batch, row = Prompts(pairs.clean), torch.arange(len(at))
    columns, delta = at + torch.tensor(batch.pads), torch.zeros(model.names.d_model, device=model.hf.device)
    (stream,) = inputs(model, pairs.clean, model.hf.get_submodule(model.names.row.layers)[site.layer + 1])
    optimizer = torch.optim.Adam([delta.requires_grad_()], 0.1 * float(stream.square().mean().sqrt()))
    share = 1.0

    def add(_, __, output):
        return output.index_put((row, columns), share * delta.expand(len(row), -1), accumulate=True)

    def loss():
        logits = model.hf(**model.inputs(batch), logits_to_keep=1).logits[:, -1]
        return torch.nn.functional.cross_entropy(logits, pairs.answer.to(logits.device))

    hook = site.out.register_forward_hook(add)
    try:
        with torch.enable_grad():
            for _ in range(40):
                value = loss()
                if value < 0.05:
                    break
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
        demand(value < 0.5, f"layer {site.layer} is too late for this fact (loss {value.detach():.2f})")
        for share in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):  # noqa: B007, read by `add`
            if loss() < max(0.1, value):
                break
    finally:
        hook.remove()
    return share * delta.detach()
