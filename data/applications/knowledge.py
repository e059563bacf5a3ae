"""Knowledge in miniature: a switch between note and memory, one fact edited and a hundred, what follows, what is forgotten.

    python data/applications/knowledge.py

The seed draws which facts are edited and forgotten, to what, by which prompts; which rows of `fit` find the heads; and the order
of training. Facts are asked for in trained sentences that no edit was given ("test") and in sentences never trained ("ood").
Heads, the layer of an edit and the weight of a hundred are chosen on split "select", or on facts and sentences used for
nothing else. While this was made, figures of test and ood were seen too: those of one fact with seed 0 (then its other facts were
added to what is kept), and of other draws of a hundred (from which the two layers and the range of weights come).
"""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import torch
from lines import line, main

import workbench as wb
from workbench import measure
from workbench.model.edit import edited

optimization = wb.steer.optimization
RELATIONS, SPLITS = ("person_city", "person_job", "person_sport"), ("test", "ood")
TASKS = {name: wb.Task.load(name) for name in RELATIONS}
FACTS = {name: {row["entity"]: row["answer"] for row in task} for name, task in TASKS.items()}
FORMS = {
    name: {split: sorted(set(task.split(split).column("template"))) for split in ("fit", "ood")}
    for name, task in TASKS.items()
}
PEOPLE = sorted(set.intersection(*map(set, FACTS.values())))
COUNTRY = {row["entity"]: row["answer"] for row in wb.Task.load("city_country")}
ASKED = {"note": ("this comes from a careful letter .", "according to a trusted message ,", "we found a reliable note ."),
         "memory": ("this comes from a careless letter .", "according to a sloppy message ,", "we found an unreliable note .")}  # fmt: skip
FILLERS, PREFIXES = (
    ("", ", after a long walk ,", ", as you know ,", ", to be honest ,"),
    ("", "in fact ,", "as you know ,"),
)


def say(form: str, subject: str, rng=None) -> str:
    before, filler = (rng.choice(PREFIXES), rng.choice(FILLERS)) if rng else ("", "")
    return " ".join(f"{before} {form}".replace("{subject}", subject).replace("{filler}", filler).split())


def right(model, asked, *changes) -> np.ndarray:
    """1 where the answer is the most probable word; asked: (prompt, answer, ...)."""
    top = model.logits([one[0] for one in asked], *changes).argmax(-1).cpu()
    return (top == torch.tensor([int(model.ids(one[1])[-1]) for one in asked])).float().numpy()


def judged(low: float, high: float, aim: float) -> str:
    return "yes" if low >= aim else "no" if high < aim else "unclear"


# note or memory


def believed(task: wb.Task, side: str) -> wb.Task:
    """Prompts on one side, with what is not said there as the answer: the note where it is unreliable, memory where it is."""
    if side == "note":
        return wb.Task(
            [row | {"clean": row["corrupted"], "corrupted": row["clean"], "spans": {}} for row in task],
            "follow the note",
        )
    return wb.Task([row | {"answer": row["foil"], "foil": row["answer"]} for row in task], "follow memory")


def asked(task: wb.Task, words: str) -> wb.Task:
    """The same rows with words before both prompts."""
    return wb.Task(
        [row | {"spans": {}} | {side: f"{words} {row[side]}" for side in ("clean", "corrupted")} for row in task],
        task.name,
    )


def switch(model, fit: wb.Task, heads) -> dict:
    """Heads set to their mean where the note is reliable ("note") and where it is not ("memory")."""
    sides = {"note": fit.column("clean"), "memory": fit.column("corrupted")}
    return {way: wb.Recipe([wb.Mean(head, model.activations(texts, head).reshape(len(fit), -1).mean(0)) for head in heads])
            for way, texts in sides.items()}  # fmt: skip


def note_or_memory(model, seed):
    rng, context, other = np.random.default_rng(seed), wb.Task.load("context"), wb.Task.load("note_other")
    fit = context.split("fit")
    fit = wb.Task([fit.rows[i] for i in sorted(rng.permutation(len(fit))[: int(0.8 * len(fit))])], "context")
    found = wb.locate.causal.patch(model, fit[:30], "z", null=False, progress=False)
    ranked = [str(head) for head in found.top(12) if head.layer >= 2][:4]  # layers 0 and 1 see two tokens only

    def least(recipes, split):
        tasks = {way: believed(context.split(split), way) for way in recipes}
        return min(tasks[way].score(model, one, metric="accuracy").mean() for way, one in recipes.items())

    made = {k: switch(model, fit, [f"{head}@-1" for head in ranked[:k]]) for k in (1, 2, 3)}
    count = max(made, key=lambda k: (least(made[k], "select"), -k))
    heads, recipes = ranked[:count], made[count]
    drawn = []
    while len(drawn) < 5:
        places = [f"z.{head.split('.')[1]}.{rng.integers(6)}" for head in heads]
        if not set(places) & set(heads) and len(set(places)) == count:
            drawn.append(switch(model, fit, [f"{place}@-1" for place in places]))
    said = {way: max(words, key=lambda one: asked(believed(context.split("select"), way), one).score(model, metric="accuracy").mean())
            for way, words in ASKED.items()}  # fmt: skip
    for split in SPLITS:
        rows, prompts = {}, {}
        for way, recipe in recipes.items():
            task = believed(context.split(split), way)
            before, after = (task.score(model, *given, metric="accuracy").astype(float) for given in ([], [recipe]))
            change, low, high = measure.mean_interval(after - before, task.clusters(), seed=seed)
            controls = {f"{count} random heads of the same layers (best of 5)": max(float(task.score(model, one[way], metric="accuracy").mean())
                                                                               for one in drawn),
                        f"asking: {said[way]}": float(asked(task, said[way]).score(model, metric="accuracy").mean())}  # fmt: skip
            prompts[way], best = controls, max(controls, key=controls.get)
            kept = other.split(split).score(model, recipe, metric="accuracy").mean()
            rows[way] = dict(seed=seed, split=split, metric="accuracy", before=before.mean(), after=after.mean(), change=change, ci_lo=low,
                             ci_hi=high, control=best, control_after=controls[best], aim="+50 points", reached=judged(low, high, 0.5),
                             n=len(task), object=" ".join(f"{head}@-1" for head in heads), locate="causal.patch", steer="Mean",
                             collateral=f"somebody else's note: memory in {kept:.2f}")  # fmt: skip
        worse = min(rows.values(), key=lambda row: row["change"])
        both = {
            name.split(":")[0]: min(x, y)
            for (name, x), (_, y) in zip(*(own.items() for own in prompts.values()), strict=True)
        }
        best = max(both, key=both.get)  # a control, too, is to work both ways
        yield line("the switch of heads: the worse of the two ways", headline=True,
                   **(worse | {"control": f"{best}, the worse way", "control_after": both[best]}))  # fmt: skip
        yield line("an unreliable note is followed", **rows["note"])
        yield line("a reliable note is not followed: memory", **rows["memory"])


# facts


class Fact:
    """One fact to change, and everything that is asked about it."""

    def __init__(self, rng, relation: str, subject: str, given: int = 3):
        self.relation, self.subject = relation, subject
        self.new = rng.choice(sorted(set(FACTS[relation].values()) - {FACTS[relation][subject]}))
        forms = rng.sample(FORMS[relation]["fit"], len(FORMS[relation]["fit"]))
        asked = {
            "edit": forms[:given],
            "select": forms[given : given + 1],
            "test": forms[given + 1 :],
            "ood": FORMS[relation]["ood"] * 2,
        }
        self.asked = {
            split: [(say(form, subject, rng), self.new, self.label) for form in own] for split, own in asked.items()
        }

    @property
    def label(self) -> str:
        return f"{self.subject} {self.relation}"

    def row(self) -> dict:
        return {"prompt": [prompt for prompt, *_ in self.asked["edit"]], "target_new": self.new}


class Rest:
    """Facts that are to stay: for each, two trained sentences given to the editor and others that are asked."""

    def __init__(self, rng):
        self.given, self.asked = {}, {}
        for relation in RELATIONS:
            for subject in PEOPLE:
                forms, right = FORMS[relation], FACTS[relation][subject]
                own = rng.sample(forms["fit"], len(forms["fit"]))
                self.given[relation, subject] = [say(form, subject, rng) for form in own[:2]]
                self.asked[relation, subject] = {split: [(say(form, subject, rng), right, subject) for form in some] for split, some in
                                                 {"select": own[2:3], "test": own[3:5], "ood": forms["ood"]}.items()}  # fmt: skip

    def task(self, keys) -> wb.Task:
        rows = [dict(clean=text, corrupted=text, answer=FACTS[key[0]][key[1]], foil="unknown", entity=key[1])
                for key in keys for text in self.given[key]]  # fmt: skip
        return wb.Task(rows, "facts that stay")

    def ask(self, keys, split) -> list:
        return [one for key in keys for one in self.asked[key][split]]


def near(rng, fact: Fact) -> list:
    """Others who share a name with the subject, or have the old or the new object; and twelve more."""
    table, names = FACTS[fact.relation], set(fact.subject.split())
    close = [
        p
        for p in PEOPLE
        if p != fact.subject and (names & set(p.split()) or table[p] in (fact.new, table[fact.subject]))
    ]
    return close + rng.sample([p for p in PEOPLE if p != fact.subject and p not in close], 12)


def all_lines(which, aims: dict, before: dict, after: dict, control: dict, seed: int, **about):
    """A line for each claim and split that was measured: (name, split) -> list of (label, 0 or 1)."""
    for (name, split), own in after.items():
        labels, new = zip(*own, strict=True)
        old, other = (
            float(np.mean([x for _, x in one[name, split]])) if (name, split) in one else float("nan")
            for one in (before, control)
        )
        mean, low, high = measure.mean_interval(np.array(new, float), list(labels), seed=seed)
        aim = aims.get(name)
        yield line(f"{which}: {name}", seed=seed, split=split, metric="accuracy", before=old, after=mean, change=mean - old, ci_lo=low - old,
                   ci_hi=high - old, control="the same edit without neighbours in C", control_after=other, n=len(new), locate="sweep over sites on other facts",
                   aim=f"{aim:.0%}" if aim else "reported", reached=judged(low, high, aim) if aim else "unclear", **about)  # fmt: skip


def follows(fact: Fact) -> dict:
    """What should follow from a new city, (prompt, new, old): in a question, at once, the other way round."""
    who, old, direct = (
        fact.subject,
        FACTS[fact.relation][fact.subject],
        sorted(set(wb.Task.load("two_hop_memorised").column("template"))),
    )
    return {"asked as a question": [(f"question : where does {who} live ? answer :", fact.new, old)],
            "two hops at once": [(say(form, who), COUNTRY[fact.new], COUNTRY[old]) for form in direct],
            "the other way round": [(f"in {fact.new} lives", who.split()[0], None)]}  # fmt: skip


def one_fact(model, seed, facts: int = 12):
    rng = random.Random(seed)
    rest, drawn = Rest(rng), rng.sample(PEOPLE, facts + 3)
    about = lambda fact: [(relation, fact.subject) for relation in RELATIONS[1:]]  # noqa: E731
    stay = rest.task(
        [("person_city", one) for one in PEOPLE] + [(r, one) for r in RELATIONS[1:] for one in rng.sample(PEOPLE, 40)]
    )

    def asked(fact, others, split):
        return {("paraphrase", split): fact.asked[split], ("neighbours", split): rest.ask([("person_city", p) for p in others], split),
                ("the subject's other facts", split): rest.ask(about(fact), split)}  # fmt: skip

    def edit(fact, at, neighbours):
        row = fact.row() | {"subject": fact.subject, "keep": [text for key in about(fact) for text in rest.given[key]]}
        return optimization.rome(model, row, at, neighbours=neighbours, progress=False)

    def worth(at):
        total = 0.0
        for fact, others in choosing:
            with edited(model, edit(fact, at, stay)):
                total += sum(right(model, own).mean() for own in asked(fact, others, "select").values())
        return total

    choosing = [(fact, near(rng, fact)) for fact in (Fact(rng, "person_city", one) for one in drawn[facts:])]
    at = max(("mlp_out.4@-1", "mlp_out.5@-1", "mlp_out.6@-1"), key=worth)
    before, after, control, drift = defaultdict(list), defaultdict(list), defaultdict(list), []
    texts = wb.Task.load("background").split("ood").column("text")[:20]
    plain = model.logits(texts, positions="all")
    for fact in (Fact(rng, "person_city", one) for one in drawn[:facts]):
        others = near(rng, fact)
        every = {("efficacy", "test"): fact.asked["edit"]} | asked(fact, others, "test") | asked(fact, others, "ood")
        told = f"question : what country does {fact.subject} live in ? steps : {fact.subject} lives in"

        def note(where, wanted, fact=fact, told=told):
            for key, own in wanted.items():
                where[key] += [(fact.label, x) for x in right(model, own)]
            if where is not control:
                said = f"answer is {COUNTRY[fact.new]}" in model.generate(told, max_new_tokens=14)
                where["two hops, written out", "ood"].append((fact.label, float(said)))
                for name, own in follows(fact).items():
                    new, old = right(model, own), right(model, [(text, before or after) for text, after, before in own])
                    where[name, "ood"] += [(fact.label, x) for x in new]
                    if own[0][2]:  # broken: neither what was said nor what is to be said
                        where[f"{name}: neither old nor new", "ood"] += [
                            (fact.label, float(not (x or y))) for x, y in zip(new, old, strict=True)
                        ]

        note(before, every)
        with edited(model, edit(fact, at, stay)):
            note(after, every)
            drift.append(
                float(
                    torch.cat(
                        [measure.kl(a, b) for a, b in zip(plain, model.logits(texts, positions="all"), strict=True)]
                    ).mean()
                )
            )
        with edited(model, edit(fact, at, ())):
            note(control, every)
    aims = {"efficacy": 0.98, "paraphrase": 0.9, "neighbours": 0.95, "the subject's other facts": 0.95}
    yield from all_lines("one fact", aims, before, after, control, seed, object=at, steer="optimization.rome",
                         collateral=f"background KL {np.mean(drift):.4f} nats (worst {max(drift):.4f})")  # fmt: skip


def hundred_facts(model, seed, count: int = 100, at=("mlp_out.5@-1", "mlp_out.6@-1")):
    rng = random.Random(100 + seed)
    rest, keys = Rest(rng), [(relation, person) for relation in RELATIONS for person in PEOPLE]
    rng.shuffle(keys)
    facts, stays = [Fact(rng, *key, given=4) for key in keys[:count]], keys[count:]
    touched = {fact.subject for fact in facts}
    groups = {"neighbours": [key for key in stays if key[1] not in touched],
              "the subjects' other facts": [key for key in stays if key[1] in touched]}  # fmt: skip
    rows, stay = [fact.row() for fact in facts], rest.task(stays)

    def scores(*splits):
        found = {("efficacy", "test"): [one for fact in facts for one in fact.asked["edit"]]}
        for split in splits:
            found["paraphrase", split] = [one for fact in facts for one in fact.asked[split]]
            found |= {(name, split): rest.ask(own, split) for name, own in groups.items()}
        return {key: [(one[2], x) for one, x in zip(own, right(model, own), strict=True)] for key, own in found.items()}

    def made(weight, neighbours):
        with edited(
            model,
            optimization.memit(model, rows, list(at), weight=weight, neighbours=neighbours, reach=0.1, progress=False),
        ):
            return min(np.mean([x for _, x in own]) for own in scores("select").values()), scores(*SPLITS)

    tried = {weight: made(weight, stay) for weight in (0.1, 0.2, 0.4)}
    weight = max(tried, key=lambda one: tried[one][0])
    yield from all_lines("a hundred facts", {"neighbours": 0.9}, scores(*SPLITS), tried[weight][1], made(weight, ())[1], seed,
                         object=" ".join(at), steer=f"optimization.memit, weight {weight:g}")  # fmt: skip


def forgotten(model, seed, count: int = 20):
    """Where twenty people live is unlearnt; then half of them are taught again, and the other half is asked."""
    rng = random.Random(200 + seed)
    gone = rng.sample(PEOPLE, count)
    others = [person for person in PEOPLE if person not in gone]

    def task(name, relation, people, **each):
        table, forms, rows = FACTS[relation], FORMS[relation], []
        pools = {"fit": forms["fit"][:6], "select": forms["fit"][6:7], "test": forms["fit"][7:], "ood": forms["ood"]}
        for split, person, number in ((split, person, number) for split, number in each.items() for person in people):
            for form in rng.sample(pools[split], number):
                other, clean = rng.choice([p for p in others if table[p] != table[person]]), say(form, person)
                rows.append(dict(clean=clean, corrupted=say(form, other), answer=table[person], foil=table[other], split=split, entity=person,
                                 template=form, spans={"subject": [clean.index(person), clean.index(person) + len(person)]}))  # fmt: skip
        return wb.Task(rows, name)

    forget = task("forgotten", "person_city", gone, fit=4, select=1, test=1, ood=2)
    keep = [task("other people", "person_city", others, fit=1, select=1, test=1, ood=1),
            task("their jobs", "person_job", gone, fit=2, select=1, test=1, ood=2)]  # fmt: skip
    delta = optimization.npo(
        model, forget, keep, steps=200, lr=1e-3, patience=20, budget=0.1, seed=seed, progress=False
    )
    back = optimization.relearn(
        model, delta, forget.split("ood"), steps=20, every=20, lr=1e-3, seed=seed, progress=False
    )
    again = {arm: float(own[own.step == 20].rest.iloc[0]) for arm, own in back.groupby("arm")}
    for split in SPLITS:
        asked = forget.split(split)
        before, after = (asked.score(model, *given, metric="accuracy").astype(float) for given in ([], [delta]))
        change, low, high = measure.mean_interval(after - before, asked.clusters(), seed=seed)
        kept = ", ".join(
            f"{one.name} {one.split(split).score(model, delta, metric='accuracy').mean():.2f}" for one in keep
        )
        about = dict(seed=seed, split=split, metric="accuracy", n=len(asked), object="all weights", steer="optimization.npo",
                     locate="", collateral=kept, aim="reported")  # fmt: skip
        yield line("unlearnt: where twenty people live", before=before.mean(), after=after.mean(), change=change, ci_lo=low, ci_hi=high,
                   control="untouched model", control_after=before.mean(), reached="unclear", **about)  # fmt: skip
    nan = float("nan")
    yield line("unlearnt: the untaught half after the attack", before=0.0, after=again["taught"], change=again["taught"], ci_lo=nan, ci_hi=nan,
               control="taught shuffled answers", control_after=again["shuffled"], reached="unclear", **about)  # fmt: skip


def run(model, seed):
    for part in (note_or_memory, one_fact, hundred_facts, forgotten):
        yield from part(model, seed)


if __name__ == "__main__":
    main(run, "knowledge")
