"""Efficient inference in miniature: a smaller cache, fewer blocks, fewer neurons, fewer bits, earlier exits; all measured.

    python data/applications/inference.py

Between seeds the texts differ that heads, blocks, neurons and layers are scored on (a random part of `fit`), the rows that
are measured, and all random controls. How much is taken away is chosen on split "select". How
the gates are trained, the fewest heads to choose from (14) and the number of rows of the headline were settled after first
figures of test and ood had been seen.
"""

from __future__ import annotations

import numpy as np
import torch
from lines import line, main

import workbench as wb
from workbench import measure
from workbench.improve import efficiency as fast

TASKS = ("retrieval", "induction", "ioi", "context", "agreement", "person_city", "refusal", "mood")
SPLITS, SINK, WINDOW, BEFORE = ("test", "ood"), 1, 16, 48
ROWS = 10  # of each task


class Rows:
    """Prompts of all tasks, after at least `before` words of unrelated prose: ids, answers, and what they are of."""

    def __init__(self, model, split: str, before: int, seed: int, count: int = ROWS):
        rng = np.random.default_rng([seed, before, len(split)])
        prose = [row["text"] for row in wb.Task.load("background").split("test" if split in SPLITS else "fit")]
        self.texts, self.answers, self.task, self.groups = [], [], [], ([], [])
        for name in TASKS:
            pairs = wb.Task.load(name).split(split).on(model)
            for i in rng.permutation(len(pairs.task))[:count]:
                words, row = [], pairs.task.rows[i]
                while len(" ".join(words).split()) < before:
                    words.append(prose[rng.integers(len(prose))])
                self.texts.append(" ".join([*words, row["clean"]]))
                self.answers.append(int(pairs.answer[i]))
                self.task.append(name)
                self.groups[0].append(f"{name} {row['entity']}")
                self.groups[1].append(f"{name} {row['template']}")

    def right(self, logits) -> np.ndarray:
        return measure.accuracy(logits, torch.tensor(self.answers)).numpy().astype(float)

    def surprise(self, logits) -> float:
        """Mean nats by which the answers are missed."""
        return -measure.log_prob(logits, torch.tensor(self.answers)).mean().item()

    def worst(self, before, after) -> str:
        drops = {name: (after - before)[np.array(self.task) == name].mean() for name in TASKS}
        name = min(drops, key=drops.get)
        return f"worst task {name} {drops[name]:+.3f}"


def told(claim, rows, seed, split, before, after, others, aim, saved, said, least=0.0, **more) -> dict:
    """A line: accuracy before and after, with the best control."""
    change, low, high = measure.mean_interval(after - before, rows.groups, seed=seed)
    best = max(others, key=lambda name: others[name].mean())
    clear = measure.mean_interval(after - others[best], rows.groups, seed=seed)[1] > 0
    reached = "no" if change < -0.01 or saved < least else "yes" if clear and low >= -0.01 else "unclear"
    return line(claim, seed=seed, split=split, metric="accuracy, mean over tasks", before=before.mean(), after=after.mean(), change=change,
                ci_lo=low, ci_hi=high, control=best, control_after=others[best].mean(), aim=aim, reached=reached, n=len(after),
                collateral=f"{said}; {rows.worst(before, after)}", **more)  # fmt: skip


def run(model, seed: int):
    rng = np.random.default_rng(seed)
    fit, select = Rows(model, "fit", BEFORE, seed), Rows(model, "select", BEFORE, seed)
    gates = fast.retrieval_heads(
        model, fit.texts, sink=SINK, window=WINDOW, penalty=0.1, steps=30, rows=8, lr=0.1, seed=seed
    )
    order = sorted(gates.components, key=lambda one: gates[one])
    with_all = select.surprise(model.logits(select.texts))
    for count in (20, 18, 16, 14):  # 14 is what saves 30 %
        heads = order[:count]
        if select.surprise(fast.stream(model, select.texts, heads, sink=SINK, window=WINDOW)) < with_all + 0.03:
            break
    drawn = [[order[i] for i in rng.permutation(len(order))[:count]] for _ in range(3)]
    yield from streamed(model, seed, heads, drawn)
    yield from smaller(model, seed, rng)


def streamed(model, seed, heads, drawn):
    """The headline: heads that stream."""
    for split in SPLITS:
        rows, how = Rows(model, split, BEFORE, seed, 2 * ROWS), {"sink": SINK, "window": WINDOW}
        before, after = rows.right(model.logits(rows.texts)), rows.right(fast.stream(model, rows.texts, heads, **how))
        others = {f"{len(heads)} random heads, draw {i + 1} of 3": rows.right(fast.stream(model, rows.texts, one, **how))
                  for i, one in enumerate(drawn)}  # fmt: skip
        plain, small = (fast.costs(model, rows.texts[:: 2 * ROWS], one, **how) for one in (None, heads))
        saved = small.saved(plain)["cache_bytes"]
        yield told("a third to a half of the heads stream", rows, seed, split, before, after, others, "30 % of the cache at a point or less", saved,
                   f"cache {plain.cache_bytes / 1e3:.0f} -> {small.cache_bytes / 1e3:.0f} kB ({-saved:.0%}) of {plain.tokens:.0f} tokens",
                   least=0.3, object=f"{len(heads)} of 36 heads", locate="efficiency.retrieval_heads",
                   steer="efficiency.StreamingCache", headline=True)  # fmt: skip


def smaller(model, seed, rng):
    """Fewer blocks, neurons, bits and layers, on the prompts as they are."""
    names, fit, select = model.names, Rows(model, "fit", 0, seed), Rows(model, "select", 0, seed)
    influence = wb.locate.magnitude.block_influence(model, fit.texts, null=False)
    least = min(influence.components, key=lambda one: influence[one]).layer
    dropped = {
        f"block {b}": fast.shrink(model, [b])
        for b in [least, *rng.permutation([b for b in range(8) if b != least])[:2].tolist()]
    }
    wanda = wb.locate.magnitude.wanda(model, fit.texts, "neuron.*.*", null=False)
    full = select.right(model.logits(select.texts)).mean()
    for share in (0.5, 0.44, 0.38, 0.3, 0.2, 0.1):
        cut = int(share * names.d_mlp)
        off = [one for layer in range(names.n_layers) for one in
               sorted((c for c in wanda.components if c.layer == layer), key=lambda one: wanda[one])[:cut]]  # fmt: skip
        narrow = fast.shrink(model, neurons=off)
        if select.right(narrow.logits(select.texts)).mean() >= full - 0.01:
            break
    chance = fast.shrink(
        model,
        neurons=[f"neuron.{layer}.{i}" for layer in range(names.n_layers) for i in rng.permutation(names.d_mlp)[:cut]],
    )
    effects = fast.quantization_effects(model, fit.texts, bits=3, seed=seed)
    firm = [one.layer for one in sorted(effects.components, key=lambda one: effects[one])]
    bits = [{layer: 3 if layer in few else 8 for layer in firm} for few in (firm[:4], firm[4:])]
    rounded, size = zip(*(fast.quantize(model, one) for one in bits), strict=True)
    bytes_saved = 1 - size[0] / fast.costs(model, fit.texts[:1]).weight_bytes
    for split in SPLITS:
        rows = Rows(model, split, 0, seed)
        before, plain = rows.right(model.logits(rows.texts)), fast.costs(model, rows.texts[::ROWS])
        for claim, arms, least_saved, locate, what in (
            ("one block dropped", dropped, 0, "magnitude.block_influence", "resid_post"),
            ("FFN narrower", {f"{cut} neurons of each layer": narrow, f"{cut} random neurons of each layer": chance}, 0.2,
             "magnitude.wanda", "neuron"),
        ):  # fmt: skip
            (own, small), *others = arms.items()
            saved = fast.costs(small, rows.texts[::ROWS]).saved(plain)
            yield told(claim, rows, seed, split, before, rows.right(small.logits(rows.texts)),
                       {key: rows.right(one.logits(rows.texts)) for key, one in others}, "operations saved at a point or less"
                       if not least_saved else "20 % of operations at a point or less", saved["token_operations"],
                       f"operations {-saved['token_operations']:.0%}, weights {-saved['weight_bytes']:.0%}", least=least_saved,
                       object=own if what == "resid_post" else f"{what}: {own}", locate=locate, steer="efficiency.shrink")  # fmt: skip
        right = [rows.right(model.logits(rows.texts, one)) for one in rounded]
        yield told("3 bits in half of the layers, 8 in the others", rows, seed, split, before, right[0], {"3 bits in the other half": right[1]},
                   "bytes of weights saved at a point or less", bytes_saved, f"weights of fp32 {-bytes_saved:.0%}",
                   object=f"3 bits: layers {sorted(firm[:4])}", locate="efficiency.quantization_effects", steer="efficiency.quantize")  # fmt: skip
        said, ran = fast.exit_early(model, rows.texts, 0.95, start=4)
        depth = int(ran.float().mean().round())
        fixed, _ = fast.exit_early(model, rows.texts, 0.0, start=min(depth, names.n_layers) - 1)
        yield told("exit when sure", rows, seed, split, before, rows.right(said), {f"always after {depth} layers": rows.right(fixed)},
                   "layers saved at a point or less", 1 - ran.float().mean().item() / names.n_layers,
                   f"{ran.float().mean():.2f} of {names.n_layers} layers run", object="resid_post.4 to .6@-1", locate="vocabulary.logit_lens",
                   steer="efficiency.exit_early")  # fmt: skip


if __name__ == "__main__":
    main(run, "inference")
