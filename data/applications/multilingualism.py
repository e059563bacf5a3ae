"""Multilingualism: forced output language, language neurons, latent language.

The language is set along one direction (wanted language against the two others), `share` times the way to its mean. A line
is reached when its figures are, and when its interval is clear of the best control. Of five random draws the worst on
`select` is the control.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import torch
from lines import line, main

import workbench as wb
from workbench.measure import mean_interval

NAMES = {"en": "english", "fr": "french", "de": "german"}
AIM = "0.90 in the language, 0.80 with content"
ONE = r"(?<!> )(<\w+>) [:=]"  # a sign that is asked alone
TEXTS = {code: wb.Task.load(f"text_{name}") for code, name in NAMES.items()}
ASKED, CONCEPT = wb.Task.load("language_word"), wb.Task.load("language_concept")
WORD = {
    (code, sign): word
    for code in NAMES
    for row in TEXTS[code]
    for sign, word in re.findall(ONE + r" (\w+)", row["text"])
}
WORD |= {tuple(row["entity"].split()): row["answer"] for row in [*ASKED, *CONCEPT]}
SPOKEN = {code: {word for (lang, _), word in WORD.items() if lang == code} for code in NAMES}


def targets(split: str) -> list[dict]:
    """Prompts, and the word in the language that the answer shall have; `corrupted` is the same prompt in that one."""
    found = []
    for row in ASKED.split(split):
        source, sign = row["entity"].split()
        into = [code for code in NAMES if code != source and WORD.get((code, sign)) == row["foil"]]
        if len(into) == 1:  # otherwise the word is in two languages
            found.append(row | {"way": (source, into[0]), "word": row["foil"], "own": row["answer"]})
    return found


def judged(model, rows: list[dict], way=None, side: str = "clean") -> np.ndarray:
    """[row, 2]: is the word said in the wanted language (and not the prompt's own)? is it the right one?"""
    found = np.zeros((len(rows), 2))
    for pair in {row["way"] for row in rows}:
        some = [i for i, row in enumerate(rows) if row["way"] == pair]
        ids = model.logits([rows[i][side] for i in some], *([way(*pair)] if way else [])).argmax(-1).tolist()
        for i, word in zip(some, (model.tokenizer.decode([one]).strip() for one in ids)):
            found[i] = word in SPOKEN[pair[1]] and word != rows[i]["own"], word == rows[i]["word"]
    return found


def in_text(model, split: str, way=None, number: int = 8) -> np.ndarray:
    """[word, 3]: twenty tokens go on after the first sign of a text; wanted language? right word? which text?"""
    found = []
    for number_, (source, into) in enumerate((a, b) for a in NAMES for b in NAMES if a != b):
        cut = [re.search(f"^(.*?{ONE})", row["text"]) for row in TEXTS[source].split(split)]
        starts = [match.group(1) for match in cut if match][:number]
        more = model.generate(starts, *([way(source, into)] if way else []), max_new_tokens=20)
        for i, (start, text) in enumerate(zip(starts, more)):
            for sign, word in re.findall(ONE + r" (\w+)", f"{start[start.rindex('<') - 2 :]} {text}"):
                own, right = WORD[source, sign], WORD[into, sign]
                if own != right:
                    found.append((word in SPOKEN[into] and word != own, word == right, 100 * number_ + i))
    return np.array(found, float)


def against_rest(fit, wanted: str, labels=None) -> wb.Task:
    labels = labels or [row["entity"][:2] for row in fit]
    return wb.Task(
        [{"text": row["clean"], "label": "this" if one == wanted else "rest"} for row, one in zip(fit, labels)]
    )


def setting(model, fit, at, share, to=None, labels=None):
    found = {}
    for code in NAMES:
        task, place = against_rest(fit, code, labels), {"at": at, "positive": "this"}
        longer = 1.0
        if labels:  # as far as the real one
            real, dealt = (
                wb.steer.vector.difference_of_means(model, one, **place).vector.norm()
                for one in (against_rest(fit, code), task)
            )
            longer = float(real / dealt)
        found[code] = wb.steer.vector.set_to_mean(model, task, **place, share=share * longer, to=to)
    return lambda source, into: found[into]


def random_setting(model, fit, at, share, rng):
    """Set along a random direction, as far from the mean as the real one goes."""
    seen = model.activations([row["clean"] for row in fit], at).reshape(len(fit), -1)
    unit = torch.nn.functional.normalize(torch.as_tensor(rng.standard_normal(seen.shape[1]), dtype=seen.dtype), dim=0)
    far = {
        code: wb.steer.vector.difference_of_means(model, against_rest(fit, code), at, positive="this").vector.norm()
        for code in NAMES
    }
    flat, mean = torch.eye(len(unit)) - torch.outer(unit, unit), seen.mean(0) @ unit
    return lambda source, into: wb.Affine(at, flat, (mean + share * far[into]) * unit)


def measured(claim: str, after, before, clusters, control: str, level: float, seed: int, good: bool, **more) -> dict:
    change, low, high = mean_interval(after - before, clusters, seed=seed)
    reached = "yes" if good and before.mean() + low > level else "no"
    return line(claim, seed=seed, before=before.mean(), after=after.mean(), change=change, ci_lo=low, ci_hi=high, control=control,
                control_after=level, n=len(after), **{"reached": reached} | more)  # fmt: skip


def output_language(model, fit, seed: int, rng):
    select, labels = targets("select"), [row["entity"][:2] for row in fit]
    texts = {code: [row["clean"] for row in fit if row["entity"][:2] == code] for code in NAMES}

    def chosen(ways: dict):  # the first of the best
        return max(ways, key=lambda name: judged(model, select, ways[name])[:, 1].mean())

    layer, share = chosen(
        {(n, s): setting(model, fit, f"resid_post.{n}@-1", s) for n in (4, 5, 6, 7) for s in (1.0, 1.25, 1.5, 2.0)}
    )
    stream, at = f"resid_post.{layer}", f"resid_post.{layer}@-1"
    mean = {code: model.activations(some, at).reshape(len(some), -1).mean(0) for code, some in texts.items()}

    def arithmetic(strength, push=None):
        def way(source, into):
            real = mean[into] - mean[source]
            return wb.Add(at, real if push is None else push / push.norm() * real.norm(), strength)

        return way

    strength = chosen({s: arithmetic(s) for s in (1.0, 1.25, 1.5, 2.0)})
    noise = {i: random_setting(model, fit, at, share, rng) for i in range(5)}
    pushes = {
        i: arithmetic(strength, torch.as_tensor(rng.standard_normal(len(mean["en"])), dtype=torch.float32))
        for i in range(5)
    }
    controls = {"random direction (worst of 5)": noise[chosen(noise)],
                "shuffled languages, equal norm": setting(model, fit, at, share, labels=list(rng.permutation(labels)))}  # fmt: skip
    everywhere = setting(model, fit, at, share, to=stream)
    ways = {"output language forced": (setting(model, fit, at, share), controls),
            "language arithmetic: add one mean, subtract the other": (arithmetic(strength), {"random direction (worst of 5)": pushes[chosen(pushes)]})}  # fmt: skip
    for split in ("test", "ood"):
        rows = targets(split)
        clusters = [[row["entity"] for row in rows], [row["template"] for row in rows]]
        before, asked = judged(model, rows), judged(model, rows, side="corrupted").mean(0)
        for name, (way, others) in ways.items():
            after = judged(model, rows, way)
            tried = {one: judged(model, rows, other).mean(0) for one, other in others.items()}
            good = after[:, 0].mean() >= 0.9 and after[:, 1].mean() >= 0.8
            what = f"asked in that language {asked[0]:.2f} / {asked[1]:.2f}; {costs(model, way, split)}"
            steer = f"Add, strength {strength:g}" if "arithmetic" in name else f"vector.set_to_mean, share {share:g}"
            for k, end in enumerate(("", ", right concept")):
                control = max(tried, key=lambda one: tried[one][k])
                yield measured(name + end, after[:, k], before[:, k], clusters, control, tried[control][k], seed, good, split=split,
                               metric="share of prompts", object=at, locate="vocabulary.logit_lens", steer=steer, collateral=what,
                               aim=AIM, headline=name + end == "output language forced")  # fmt: skip
        said, plain = in_text(model, split, everywhere), in_text(model, split)
        random = in_text(model, split, lambda s, i: replace(noise[0](s, i), at=stream))
        good = said[:, 0].mean() >= 0.9 and said[:, 1].mean() >= 0.8
        yield measured("running text forced, right concept", said[:, 1], np.full(len(said), plain[:, 1].mean()), said[:, 2], "random direction",
                       random[:, 1].mean(), seed, good, split=split, metric="share of words", object=stream, locate="vocabulary.logit_lens",
                       steer=f"vector.set_to_mean, share {share:g}", collateral=f"in the language {said[:, 0].mean():.2f}", aim=AIM)  # fmt: skip


def costs(model, way, split: str) -> str:
    """Change of accuracy of tasks without languages, the worst of six ways."""
    found = []
    for name in ("person_city", "ioi"):
        task = wb.Task.load(name).split(split)[:60]
        after = [task.score(model, way(a, b), metric="accuracy").mean() for a in NAMES for b in NAMES if a != b]
        found.append(f"{name} {min(after) - task.score(model, metric='accuracy').mean():+.2f}")
    return ", ".join(found)


def neurons(model, seed: int, rng):
    texts = {
        code: rng.permutation([row["text"] for row in task.split("fit")])[:96] for code, task in TEXTS.items()
    }  # 80 %
    task = wb.Task([{"text": str(text), "label": code} for code, some in texts.items() for text in some])
    table = wb.locate.magnitude.language_neurons(model, task, bar=0.5, null=False, draws=20).frame.dropna(
        subset=["score"]
    )
    told = {
        split: [r for task in (ASKED, CONCEPT) for r in task.split(split) if "{told" in r["template"]]
        for split in ("select", "test", "ood")
    }
    spoken = {split: np.array([row["entity"][:2] for row in rows]) for split, rows in told.items()}
    before = {split: -wb.Task(rows).score(model, metric="log_prob") for split, rows in told.items()}

    def lost(at, split):
        """By the words' language."""
        change = -wb.Task(told[split]).score(model, wb.Zero(at), metric="log_prob") - before[split]
        return {code: change[spoken[split] == code] for code in NAMES}

    def of(share):
        top = table.head(round(share * model.names.n_layers * model.hf.config.intermediate_size))
        return {code: list(top.component[top.label == code]) for code in NAMES}

    def least(share):
        change = {code: {o: x.mean() for o, x in lost(at, "select").items()} for code, at in of(share).items()}
        return min(c[code] - max(c[o] for o in NAMES if o != code) for code, c in change.items())

    share = max((0.04, 0.08, 0.12), key=least)
    for code, at in of(share).items():
        draws = [wb.steer.amplitude.random_like(at, model, seed=100 * seed + i) for i in range(5)]
        worst = max(draws, key=lambda one: lost(one, "select")[code].mean())
        for split in ("test", "ood"):
            change = lost(at, split)
            own, mine = change.pop(code), spoken[split] == code
            other = {f"{NAMES[o]} words": x.mean() for o, x in change.items()} | {
                "random neurons (worst of 5)": lost(worst, split)[code].mean()
            }
            name = max(other, key=other.get)
            rows, base = [row for row, yes in zip(told[split], mine) if yes], before[split][mine]
            _, low, _ = mean_interval(own, [[r["entity"] for r in rows], [r["template"] for r in rows]], seed=seed)
            reached = "yes" if low > max(other[name], 0) and own.mean() >= 5 * other[name] else "no"
            yield measured(f"{NAMES[code]} neurons off: {NAMES[code]} words", base + own, base, [[r["entity"] for r in rows], [r["template"] for r in rows]],
                           name, base.mean() + other[name], seed, True, split=split, metric="loss in nats", object=f"{len(at)} neurons",
                           locate=f"magnitude.language_neurons, share {share:g}", steer="Zero", aim="5 times others and random", reached=reached,
                           collateral=", ".join(f"{key} {value:+.3f}" for key, value in other.items()))  # fmt: skip


def latent(model, seed: int, rng):
    def asked(task, split):
        """Prompts for French or German, with the asked, the English and the third language's word."""
        for row in task.split(split):
            *source, into, sign = row["entity"].split()
            third = "de" if into == "fr" else "fr"
            words = [WORD.get((code, sign)) for code in (into, "en", third)]
            if into != "en" and source in ([], [third]) and len(set(words)) == 3 and None not in words:
                yield row | {"words": words}

    def lens(rows):
        """[stream, row, word] probabilities: asked, English, third, another prompt's English."""
        words = [[row["words"][k] for row in rows] for k in range(3)]
        words.append([str(word) for word in rng.permutation(words[1])])
        prompts = [row["clean"] for row in rows]
        return np.stack(
            [
                wb.locate.vocabulary.logit_lens(model, prompts, at="resid_post.*", answers=some, k=1).prob[:, :, -1]
                for some in words
            ],
            -1,
        )

    for tasks, what in (((ASKED, CONCEPT), "signs"), ((wb.Task.load("translation"),), "translations")):
        half = lens([row for task in tasks for row in asked(task, "select")]).mean(1)
        layer = int((half[:, 1] - half[:, 0]).argmax())
        for split in ("test", "ood"):
            rows = [row for task in tasks for row in asked(task, split)]
            prob = lens(rows)[layer]
            names = {0: "the asked word", 2: "third language's word", 3: "another prompt's English word"}
            k = max(names, key=lambda one: prob[:, one].mean())
            _, low, _ = mean_interval(
                prob[:, 1] - prob[:, k], [[r["entity"] for r in rows], [r["template"] for r in rows]], seed=seed
            )
            yield measured(f"latent English, {what}: English word ahead on the way", prob[:, 1], prob[:, 0], [[r["entity"] for r in rows], [r["template"] for r in rows]],
                           names[k], prob[:, k].mean(), seed, True, split=split, metric="probability in the lens", object=f"resid_post.{layer}@-1",
                           locate="vocabulary.logit_lens", aim="above the asked word and the controls", reached="yes" if low > 0 else "no",
                           collateral=", ".join(f"{name} {prob[:, one].mean():.3f}" for one, name in names.items()))  # fmt: skip


def run(model, seed: int):
    rng = np.random.default_rng(seed)
    fit = ASKED.split("fit").rows
    fit = [fit[i] for i in sorted(rng.permutation(len(fit))[: round(0.8 * len(fit))])]
    yield from output_language(model, fit, seed, rng)
    yield from neurons(model, seed, rng)
    yield from latent(model, seed, rng)


if __name__ == "__main__":
    main(run, "multilingualism")
