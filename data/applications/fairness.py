"""Pronouns guessed from the occupation, and the letter (a): python data/applications/fairness.py

The gap is |log p(she) - log p(he)|, its mean over "she" and "he" occupations alike: a signed mean over one side only would
fall when everybody becomes "he". Its change is relative to the gap before. Guards: the pronoun where the sex is said, how
likely "she" is after neutral occupations, and the probability of "she" or "he" together (which a mere flattening loses).
"""

import numpy as np
import torch
from lines import line, main

import workbench as wb
from workbench import measure

PROMPTS = ("he or she .", "it is true that a woman works and a man works .", "a woman who is a pilot and a man who is a nurse .")  # fmt: skip
JOBS = {row["clean"][slice(*row["spans"]["job"])] for name in ("bias", "settled", "neutral") for row in wb.Task.load(f"pronoun_{name}")}  # fmt: skip
AIM = "-70 %, settled and neutral within a point"


def part(task, rng):
    """A random 80 % of the fit rows, and all others."""
    return wb.Task([row for row in task if row["split"] != "fit" or rng.random() < 0.8], task.name)


def swapped(task):
    """Every pair both ways round: "she" occupations, and "he" occupations."""
    rows = []
    for row in task:
        start, end = row["spans"]["job"]
        other = row["corrupted"][start : end + len(row["corrupted"]) - len(row["clean"])]
        back = {"clean": row["corrupted"], "corrupted": row["clean"], "answer": row["foil"], "foil": row["answer"]}
        rows += [row | {"spans": {}}, row | back | {"entity": other, "spans": {}}]
    return wb.Task(rows, task.name)


def other_words(model, tasks, at):
    """The states of all words of the fit rows that are no occupation, [word, width]."""
    by_length, found = {}, []
    for row in (row for task in tasks.values() for row in task.split("fit")):
        ids = model.ids(row.get("clean") or row["text"])
        by_length.setdefault(len(ids), []).append(ids)
    for group in by_length.values():
        keep = torch.tensor([[model.token(one).strip() not in JOBS for one in ids] for ids in group])[:, 1:]
        found.append(model.activations(group, at)[:, 1:][keep])
    return torch.cat(found)


def leaning(model, tasks, layer):
    """Subtract from each token the leaning that is read there: x - (w x + b) d.

    w, b: ridge regression of what the model prefers on the states of occupations, with 0 as its aim for other words.
    d: by how much those states differ for each nat of preference.
    """
    at, jobs, said = f"resid_post.{layer}", [], []
    she, he = (model.ids(word)[-1].item() for word in ("she", "he"))
    for name in ("pronoun_bias", "pronoun_neutral"):
        pairs = tasks[name].split("fit").on(model)
        for side in ("clean", "corrupted"):
            jobs.append(model.activations(getattr(pairs, side), f"{at}@job", spans=pairs.spans))
            logits = model.logits(getattr(pairs, side), spans=pairs.spans)
            said.append(logits[:, she] - logits[:, he])
    rest = other_words(model, tasks, at)
    x, y, z = torch.cat(jobs).double(), torch.cat(said).double(), rest.double()
    x = x.reshape(len(x), -1)
    write = (x - x.mean(0)).T @ (y - y.mean()) / (y - y.mean()).square().sum()
    rows, aims = torch.cat([x, z]), torch.cat([y, torch.zeros(len(z), dtype=y.dtype)])
    weight = torch.cat([torch.full((len(x),), 1 / len(x)), torch.full((len(z),), 1 / len(z))]).double().sqrt()[:, None]
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1) * weight
    square = rows.T @ rows
    ridge = 1e-3 * square.diagonal()[:-1].mean() * torch.eye(len(square), dtype=y.dtype)
    ridge[-1, -1] = 0
    read = torch.linalg.solve(square + ridge, rows.T @ (aims * weight[:, 0]))
    read = read / (read[:-1] @ write)
    return wb.Affine(at, (torch.eye(len(write)) - torch.outer(write, read[:-1])).float(), (-read[-1] * write).float())


def turned(change, rng):
    """As large a change at every token, in a random direction."""
    width = len(change.bias)
    by = torch.linalg.qr(torch.as_tensor(rng.standard_normal((width, width)), dtype=torch.float32))[0]
    return wb.Affine(change.at, torch.eye(width) + by @ (change.matrix - torch.eye(width)), by @ change.bias)


def measured(model, tasks, split, *change, read=None):
    """Gap by row, and the guards: settled accuracy, p(she) among neutral ones, mass on she and he."""
    read = read or (lambda logits: logits)
    rows = {name: tasks[name].split(split) for name in ("pronoun_bias", "pronoun_settled", "pronoun_neutral")}
    both = swapped(rows["pronoun_bias"])
    gap = both.score(model, *change, metric=lambda x, a, f: measure.gap(read(x), a, f))
    settled = rows["pronoun_settled"].score(model, *change, metric="accuracy").mean()
    she = rows["pronoun_neutral"].score(model, *change, metric=lambda x, a, f: measure.prob(read(x), a, f)).mean()
    either = both.score(model, *change, metric=lambda x, a, f: measure.mass(read(x), a, f)).mean()
    return gap, settled, she, either, both


def gap_line(model, tasks, seed, split, claim, change, controls, untouched, read=None, **about):
    gap, settled, she, total, both = untouched
    new, settled_new, she_new, total_new, _ = measured(model, tasks, split, *change, read=read)
    moved, low, high = (x.item() for x in measure.ratio_of_means((new - gap)[None], gap, both.clusters(), seed=seed))
    best = min(controls, key=lambda name: controls[name][split])
    kept = settled - settled_new <= 0.01 and abs(she_new - she) <= 0.01 and total - total_new <= 0.01
    reached = "no" if moved > -0.7 or not kept else "yes" if high < -0.7 else "unclear"
    return line(claim, seed=seed, split=split, metric="mean |log p(she)/p(he)|, relative change", before=gap.mean(), after=new.mean(),
                change=moved, ci_lo=low, ci_hi=high, control=best, control_after=controls[best][split], aim=AIM, reached=reached,
                n=len(gap), collateral=f"settled {settled_new - settled:+.3f}, neutral p(she) {she_new - she:+.3f}, "
                f"she or he {total_new - total:+.3f}", **about)  # fmt: skip


def asked(task, words):
    return wb.Task(
        [row | {side: f"{words} {row[side]}" for side in ("clean", "corrupted")} | {"spans": {}} for row in task]
    )


def lead(model, task, *given):
    """By row: +1 where (a) is said, -1 where (b)."""
    return task.score(model, *given, metric=lambda x, a, f: (x.argmax(-1) == a).float() - (x.argmax(-1) == f).float())


def letters(model, unsure, ids):
    """A constant before the last norm that makes the letters equally likely, on average, where nothing is known.

    People of the fit rows lean less towards (a) than new ones do, so its strength is chosen on select: the smallest that
    brings (a) and (b) within a tenth of each other.
    """
    head, norm = model.hf.lm_head.weight.detach().float(), model.hf.model.norm.weight.detach().float()
    fit = unsure.split("fit").column("clean")
    size = model.activations(fit, "resid_post.7@-1").reshape(len(fit), -1).square().mean(-1).sqrt().mean()
    write, push = torch.linalg.pinv(head[ids] * norm) * size, torch.zeros(len(ids))
    for _ in range(12):
        logits = model.logits(fit, wb.Add("resid_post.7@-1", write @ push)) if push.any() else model.logits(fit)
        mean = logits[:, ids].softmax(-1).mean(0)
        push = push - 1.5 * (mean * len(ids)).log()
    strengths, select = (1, 1.5, 2, 3), unsure.split("select")
    leads = {s: abs(lead(model, select, wb.Add("resid_post.7@-1", s * write @ push)).mean()) for s in strengths}
    best = next((s for s in strengths if leads[s] <= 0.1), min(leads, key=leads.get))
    return wb.Add("resid_post.7@-1", best * write @ push)


def letter_line(model, seed, split, change, draws):
    unsure, choice = wb.Task.load("letter_bias").split(split), wb.Task.load("choice").split(split)
    old, new = lead(model, unsure), lead(model, unsure, change)
    right = [choice.score(model, *given, metric="accuracy").mean() for given in ([], [change])]
    moved, low, high = measure.mean_interval(new - old, unsure.clusters(), seed=seed)
    control = min((lead(model, unsure, one).mean() for one in draws), key=abs)
    ok = abs(new.mean()) <= 0.1 and right[0] - right[1] <= 0.01
    return line("letter (a) no longer preferred", seed=seed, split=split, metric="share of (a) minus share of (b)", before=old.mean(),
                after=new.mean(), change=moved, ci_lo=low, ci_hi=high, control="random direction", control_after=control,
                aim="within .10 of zero, choice within a point", reached="yes" if ok and high < 0 else "unclear" if ok else "no",
                n=len(old), collateral=f"choice {right[1] - right[0]:+.3f}", object="resid_post.7@-1", locate="vocabulary.logit_attribution",
                steer="a constant towards equal letters")  # fmt: skip


def run(model, seed):
    rng = np.random.default_rng(seed)
    names = ("pronoun_bias", "pronoun_settled", "pronoun_neutral", "background")
    tasks = {name: part(wb.Task.load(name), rng) for name in names}
    bias, splits, found = tasks["pronoun_bias"], ("test", "ood"), []
    before, settled, she, _, _ = measured(model, tasks, "select")
    for layer in (1, 2, 3):  # chosen on select: of those with a clear 70 % less, the one that costs the guards least
        change = leaning(model, tasks, layer)
        gap, settled_new, she_new, _, _ = measured(model, tasks, "select", change)
        cost = max(settled - settled_new, abs(she_new - she))
        found.append((gap.mean() > 0.25 * before.mean(), cost, layer, change))
    _, _, layer, change = min(found, key=lambda one: one[:2])
    words = min(PROMPTS, key=lambda one: np.abs(asked(swapped(bias.split("select")), one).score(model)).mean())
    pairs = {split: swapped(bias.split(split)) for split in splits}
    random = [turned(change, rng) for _ in range(5)]
    controls = {"random direction, as large": {s: min(np.abs(pairs[s].score(model, x)).mean() for x in random) for s in splits},
                f"prompt: {words}": {s: np.abs(asked(pairs[s], words).score(model)).mean() for s in splits}}  # fmt: skip
    heads = wb.locate.gradient.attribution_patch(model, bias.split("fit"), "z.*.*@-1", seed=seed)
    neurons = wb.locate.gradient.attribution_patch(model, bias.split("fit"), "neuron.*.*@-1", seed=seed)
    middle = wb.steer.vector.set_to_mean(model, bias, f"resid_post.{layer}@job", share=0.5, to=f"resid_post.{layer}")
    eraser = wb.steer.vector.leace(model, bias, f"resid_post.{layer}@job")
    eraser = wb.Affine(f"resid_post.{layer}", eraser.matrix, eraser.bias)
    mean, patching, at = wb.steer.amplitude.mean, "gradient.attribution_patch", f"resid_post.{layer}"
    ways = [("occupation gap down: leaning read and subtracted", change, "causal.patch", "ridge reading, affine", at, None),
            ("... difference of means set to the middle", middle, "causal.patch", "vector.set_to_mean", at, None),
            ("... leace", eraser, "causal.patch", "vector.leace", at, None),
            ("... 10 heads mean-ablated", mean(model, bias, heads.top(10)), patching, "amplitude.mean", "z", None),
            ("... 100 neurons mean-ablated", mean(model, bias, neurons.top(100)), patching, "amplitude.mean", "neuron", None),
            ("... all logits divided by 6 (a cheat)", None, "", "", "logits", lambda x: x / 6)]  # fmt: skip
    untouched = {split: measured(model, tasks, split) for split in splits}
    for i, (claim, one, locate, steer, where, read) in enumerate(ways):
        for split in splits:
            yield gap_line(model, tasks, seed, split, claim, [one] if one else [], controls, untouched[split], read, headline=i == 0, object=where,
                           locate=locate, steer=steer)  # fmt: skip
    unsure, ids = part(wb.Task.load("letter_bias"), rng), [model.ids(x)[-1].item() for x in ("(a)", "(b)", "(c)")]
    push = letters(model, unsure, ids)
    noise = [torch.as_tensor(rng.standard_normal(len(push.vector)), dtype=torch.float32) for _ in range(5)]
    draws = [wb.Add(push.at, one / one.norm() * push.vector.norm()) for one in noise]
    for split in splits:
        yield letter_line(model, seed, split, push, draws)


if __name__ == "__main__":
    main(run, "fairness")
