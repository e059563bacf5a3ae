"""Training a small part: does it matter which 5 % of the weights learn? Do progress measures see a skill coming?

    OMP_NUM_THREADS=1 python data/applications/training.py

The assistant repeats what a user claims. It is to say the truth instead, after 12 steps. All arms see the same rows in
the same order, with nothing held down. Each arm has its own rate: the smallest of its grid with which it gets 95 % of
`select` right (the best where none does), chosen with seed 0, as is the share of a change that stands for "equal gain".
"""

from __future__ import annotations

import random
import sys

import numpy as np
import pandas as pd
import torch
from lines import line, main

import workbench as wb
from workbench import measure

opt, gradient = wb.steer.optimization, wb.locate.gradient
STEPS, BATCH, SHARE, GUARD_ROWS, DRAWS = 12, 8, 0.05, 12, 2
WEIGHTS = (3e-3, 1e-2, 3e-2)  # rates; vectors and maps of activations have units of their own
RATES = {"full": (1e-4, 3e-4, 1e-3), "located": (3e-4, 1e-3, 3e-3, 1e-2), "LoReFT": (3e-2, 3e-1), "biases": (1e-1, 3e-1)}  # fmt: skip
CHOSEN: dict[str, float] = {}  # arm -> its rate
STRENGTHS = (0.3, 0.5, 0.7, 0.85)  # a learnt change turned down
COSTS = ("equal steps", "equal gain")
HEADLINE = "5 % of the weights, located by gradient: 95 % of full tuning's gain, with less forgetting"


def stem(arm: str) -> str:
    """An arm without the number of its draw."""
    return arm.rstrip(" 0123456789")


def truth(rows) -> wb.Task:
    """Claims of a user, with the truth as the answer (whole replies belong to the habit and go)."""
    kept = ("clean", "corrupted", "template", "entity", "split", "spans")
    return wb.Task([{k: row[k] for k in kept} | {"answer": row["foil"], "foil": row["answer"]} for row in rows], "truth")  # fmt: skip


def fill(model, scores, per_weight=None) -> list:
    """The components with the largest score for each of their weights, as many as fit into the share of all weights."""
    masks = {kind: opt.weight_masks(model, f"{kind}.0.0").values() for kind in ("neuron", "z")}
    size = np.array([sum(int(mask.sum()) for mask in masks[one.kind]) for one in scores.components])
    left, found = SHARE * sum(weight.numel() for weight in model.hf.parameters()), []
    for i in np.argsort(-(np.abs(scores.values) / size if per_weight is None else per_weight)):
        if size[i] <= left:
            found.append(scores.components[i])
            left -= size[i]
    return found


def same_layers(model, at, seed: int) -> list:
    """As many others of the same kind and layer (of another layer where none is left): is it the depth alone?"""
    rng, found = random.Random(seed), []
    for one in at:
        alike = model.names.expand([wb.Component.parse(f"{one.kind}.*.*")])
        rest = [c for c in alike if c not in at and c not in found]
        found.append(rng.choice([c for c in rest if c.layer == one.layer] or rest))
    return found


def arms(model, few: list[dict], seed: int) -> dict:
    """Arm -> what learns."""
    kinds, claims = ["neuron.*.*", "z.*.*"], wb.Task(few, "claims")
    importance = gradient.weight_importance(model, truth(few), kinds, null=False)
    own = fill(model, importance, importance.columns["per_weight"])
    found = {"full": "all", "located": own, "LoRA": None, "LoReFT": None, "biases": None,
             "by attribution": fill(model, gradient.attribution_patch(model, claims, kinds, null=False)),
             "by magnitude": fill(model, wb.locate.magnitude.wanda(model, claims.column("clean"), kinds, null=False)),
             "same layers": same_layers(model, own, seed)}  # fmt: skip
    for draw in range(DRAWS):
        found[f"random components {draw}"] = opt.random_masks(model, own, 100 * seed + draw)
        found[f"random weights {draw}"] = opt.random_masks(model, opt.weight_masks(model, own), 100 * seed + draw)
    return found


def learn(model, arm: str, at, task: wb.Task, rate: float, seed: int) -> wb.Recipe:
    how = dict(
        keep=(), batch=BATCH, steps=STEPS, every=STEPS, enough=-1, budget=np.inf, lr=rate, seed=seed, progress=False
    )
    if arm in ("LoRA", "LoReFT", "biases"):
        made = {"LoRA": lambda: opt.lora(model, task, rank=6, **how), "biases": lambda: opt.bias_only(model, task, **how),
                "LoReFT": lambda: opt.loreft(model, task, "resid_post.4", **how)}[arm]()  # fmt: skip
    else:
        made = opt.finetune(model, task, at, **how)
    return wb.Recipe(made if isinstance(made, list) else [made])


def trained(model, arm: str, at, task: wb.Task, seed: int) -> wb.Recipe:
    """At the arm's own rate."""
    name, best = stem(arm), (-1.0, None, None)
    for rate in [CHOSEN[name]] if name in CHOSEN else RATES.get(name, WEIGHTS):
        recipe = learn(model, arm, at, task, rate, seed)
        right = task.split("select").score(model, recipe, metric="accuracy").mean()
        best = (right, rate, recipe) if right > best[0] else best
        if right >= 0.95:
            break
    CHOSEN.setdefault(name, best[1])
    return best[2]


def turned_down(model, recipe: wb.Recipe, select: wb.Task) -> wb.Recipe:
    """The least of a learnt change that brings 90 % of `select`: equal gain for all, whatever the rate was."""
    for strength in STRENGTHS:
        less = wb.Recipe([strength * one for one in recipe])
        if select.score(model, less, metric="accuracy").mean() >= 0.9:
            return less
    return recipe


class Others:
    """What the untouched model does elsewhere: the next word of all other tasks, every word of background texts."""

    def __init__(self, model):
        left = ("sycophancy", "cheer", "modular_addition", "pronoun_neutral", "letter_bias")  # or no right answer
        tasks = [wb.Task.load(name) for name in wb.Task.names() if not name.startswith("english_") and name not in left]
        tasks = [wb.Task(task.split("ood").rows[:GUARD_ROWS], task.name) for task in tasks if task.kind == "pairs"]
        self.model, self.tasks, self.texts = model, tasks, wb.Task.load("background").split("ood").column("text")[:30]
        self.right = [task.on(model).answer for task in tasks]
        self.labels = [task.name for task in tasks for _ in task] + [f"text {i}" for i in range(len(self.texts))]
        self.before = self.now()

    def now(self, *recipe) -> tuple:
        logits = [self.model.logits(task.column("clean"), *recipe) for task in self.tasks]
        return logits, self.model.logits(self.texts, *recipe, positions="all")

    def forgotten(self, recipe) -> dict:
        """Accuracy lost [prompt of other tasks], KL [prompt and text], and the worst in words."""
        after, said = self.now(recipe)
        sides = zip(self.before[0], after, self.right, strict=True)
        lost = [(b.argmax(-1) == r).float() - (a.argmax(-1) == r).float() for b, a, r in sides]
        text = [float(measure.kl(b, a).mean()) for b, a in zip(self.before[1], said, strict=True)]
        kl = [float(x) for b, a in zip(self.before[0], after, strict=True) for x in measure.kl(b, a)] + text
        worst, name = max((float(one.mean()), task.name) for one, task in zip(lost, self.tasks, strict=True))
        return {"accuracy lost elsewhere": torch.cat(lost).numpy().astype(float), "KL elsewhere": np.array(kl),
                "words": f"{name} -{worst:.2f}, background KL {np.mean(text):.4f}"}  # fmt: skip


def tuning(model, seed: int) -> tuple[wb.Task, Others, dict]:
    """All arms once: right or not [prompt], and what is forgotten at equal steps and at equal gain."""
    claims = wb.Task.load("sycophancy")
    few = random.Random(seed).sample(claims.split("fit").rows, int(0.8 * len(claims.split("fit"))))
    task, others, found = truth(few + [row for row in claims if row["split"] != "fit"]), Others(model), {}
    right = lambda recipe, split: task.split(split).score(model, recipe, metric="accuracy").astype(float)  # noqa: E731
    for arm, at in arms(model, few[:40], seed).items():
        recipe = trained(model, arm, at, task, seed)
        one = found[arm] = {split: right(recipe, split) for split in ("test", "ood")}
        one[COSTS[0]] = others.forgotten(recipe)
        if arm in ("full", "located", "LoRA") or arm.startswith("random"):
            one[COSTS[1]] = others.forgotten(turned_down(model, recipe, task.split("select")))
        if arm.startswith("random"):
            same = learn(model, arm, at, task, CHOSEN["located"], seed)
            one |= {f"{split}, same rate": right(same, split) for split in ("test", "ood")}
        figures = [f"{split} {one[split].mean():.3f}" for split in one if split not in COSTS]
        print(seed, arm, CHOSEN[stem(arm)], *figures, file=sys.stderr)
    return task, others, found


def verdict(low: float, high: float) -> str:
    return "yes" if low > 0 else "no" if high < 0 else "unclear"


def run(model, seed: int):
    task, others, found = tuning(model, seed)
    own, full, drawn = found["located"], found["full"], [arm for arm in found if arm.startswith("random")]
    at = {"object": "neuron, z", "locate": "gradient.weight_importance", "steer": "optimization.finetune", "seed": seed}
    kl = [found[arm][COSTS[0]]["KL elsewhere"] for arm in ("full", "located")]
    _, saved_lo, saved_hi = measure.mean_interval(kl[0] - kl[1], others.labels)
    for split in ("test", "ood"):
        part = task.split(split)
        groups = [part.column("entity"), part.column("template")]
        same, untouched = f"{split}, same rate", part.score(model, metric="accuracy").mean()

        def beside(claim, arm, key=split, **more):
            change, low, high = measure.mean_interval(own[split] - found[arm][key], groups)  # noqa: B023
            rate = CHOSEN["located"] if key != split else CHOSEN[stem(arm)]  # noqa: B023
            given = {"split": split, "metric": "accuracy", "before": untouched, "after": own[split].mean(), "change": change,  # noqa: B023
                     "ci_lo": low, "ci_hi": high, "control": f"{arm}, rate {rate:g}", "control_after": found[arm][key].mean(),
                     "collateral": found[arm][COSTS[0]]["words"], "aim": "change over the control above 0", "n": len(part),  # noqa: B023
                     "reached": verdict(low, high)}  # fmt: skip
            return line(claim, **at | given | more)

        _, lo, hi = measure.mean_interval(own[split] - 0.95 * full[split], groups)
        gain, low, high = measure.mean_interval(own[split] - untouched, groups)
        best = {key: max(drawn, key=lambda arm, key=key: found[arm][key].mean()) for key in (split, same)}
        yield beside(HEADLINE, best[split], change=gain, ci_lo=low, ci_hi=high, collateral=own[COSTS[0]]["words"], headline=True,
                     aim=f"full is at {full[split].mean():.3f}: over 95 % of it by [{lo:+.3f}, {hi:+.3f}], KL elsewhere less by "
                     f"[{saved_lo:+.4f}, {saved_hi:+.4f}]", reached=verdict(min(lo, saved_lo), min(hi, saved_hi)))  # fmt: skip
        yield beside("located over the best random mask, each at its own rate", best[split])
        yield beside("located over the best random mask, at the rate of the located", best[same], same)
        for arm in [arm for arm in found if arm not in ("located", *drawn)]:
            yield beside(f"located over {arm}, each at its own rate", arm)
    for metric in ("accuracy lost elsewhere", "KL elsewhere"):
        for cost in COSTS:
            best = min(drawn, key=lambda arm: found[arm][cost][metric].mean())
            for arm, named in (("full", "full"), ("LoRA", "LoRA"), (best, "the best random mask")):
                a, b = found[arm][cost][metric], own[cost][metric]
                change, low, high = measure.mean_interval(b - a, others.labels[: len(a)])
                yield line(f"located forgets less than {named}, at {cost}", **at, split="ood", metric=metric, before=a.mean(),
                           after=b.mean(), change=change, ci_lo=low, ci_hi=high, control=arm, control_after=a.mean(), n=len(a),
                           collateral=own[cost]["words"], aim="change below 0", reached=verdict(-high, -low))  # fmt: skip
    yield from progress(seed)


def progress(seed: int):
    """The induction head against the loss on repeated random words; the clock of grokking against its test accuracy."""
    rng = np.random.default_rng(seed)
    block = torch.tensor(np.stack([rng.permutation(np.arange(4, 1490))[:20] for _ in range(48)]))
    ids = torch.cat([torch.full((48, 1), 1), block, block], 1)  # after <bos>
    found = [repeat_scores(wb.load("course", revision=step), ids) for step in ("step200", "step550", None)]
    head, loss = zip(*found, strict=True)
    way = [(now - start) / (end - start).mean() for start, now, end in (head, loss)]
    change, low, high = measure.mean_interval(way[0] - way[1])
    yield line("the induction head is ahead of the loss (step 550)", seed=seed, split="random words", metric="share of the way",
               before=way[1].mean(), after=way[0].mean(), change=change, ci_lo=low, ci_hi=high, object="pattern",
               locate="magnitude", control="the loss itself", control_after=way[1].mean(), aim="change above 0", n=48,
               reached=verdict(low, high))  # fmt: skip
    if seed:
        return  # one model, one curve: no seeds
    curve, count = pd.read_csv(wb.task.DATA / "grokking" / "progress.csv"), 2088  # held-out pairs
    last = curve[(curve.test_accuracy < 0.05) & (curve.train_accuracy > 0.99)].iloc[-1]
    seen, shown = (measure.share_bound(round(x * count), count) for x in (last.restricted_accuracy, last.test_accuracy))
    yield line(f"the clock is there before the test accuracy (step {last.step:.0f})", seed=0, split="held out", metric="accuracy",
               before=last.test_accuracy, after=last.restricted_accuracy, change=last.restricted_accuracy - last.test_accuracy,
               ci_lo=seen[0] - shown[1], ci_hi=seen[1] - shown[0], object="logits", locate="Fourier, the final frequencies",
               control="the clock alone at step 0", control_after=curve.restricted_accuracy[0], n=count, aim="change above 0",
               reached=verdict(seen[0] - shown[1], seen[1] - shown[0]))  # fmt: skip


@torch.no_grad()
def repeat_scores(model, ids: torch.Tensor) -> tuple:
    """Attention of the best induction head, and the loss on the second half; [prompt]."""
    out, half = model.hf(input_ids=ids, output_attentions=True), (ids.shape[1] - 1) // 2
    queries = torch.arange(half + 1, ids.shape[1])
    heads = torch.stack(out.attentions).transpose(1, 2).flatten(0, 1)[..., queries, queries - half + 1].mean(-1)
    ahead = out.logits[:, half + 1 : -1].transpose(1, 2)
    loss = torch.nn.functional.cross_entropy(ahead, ids[:, half + 2 :], reduction="none")
    return heads[heads.mean(1).argmax()].numpy(), loss.mean(-1).numpy()


if __name__ == "__main__":
    main(run, "training")
