"""Measures the phenomena that the course builds on, with the workbench, and prints them with their figures.

    python phenomena.py                      (all; or some: python phenomena.py emergence facts)

Every figure is from held-out rows (test and ood), and stands beside what it is to be compared with.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import workbench as wb

PROMPTS = 64


def show(title: str, rows: list[tuple]) -> None:
    print(f"\n### {title}\n")
    for row in rows:
        print("  ".join(f"{x:7.3f}" if isinstance(x, float) else f"{x!s:>7}" for x in row))


def layers(model) -> list[int]:
    return list(range(model.names.n_layers))


def held_out_all(name: str) -> list[dict]:
    return [row for row in wb.Task.load(name) if row["split"] in ("test", "ood")]


def held_out(name: str) -> wb.Task:
    """PROMPTS held-out rows of a task, spread over both splits."""
    rows = held_out_all(name)
    return wb.Task(rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS], name)


# emergence


@torch.no_grad()
def head_scores(model, ids: torch.Tensor, half: int) -> tuple[float, float, float, float]:
    """Of repeated random words: the best induction head and previous-token head (mean attention to the word after the first
    occurrence, to the word before), and loss and accuracy in the second half."""
    out = model.hf(input_ids=ids, output_attentions=True)
    length = ids.shape[1]
    queries = torch.arange(half + 1, length)
    patterns = torch.stack(out.attentions)  # [layer, prompt, head, query, key]
    induction = patterns[..., queries, queries - half + 1].mean((1, 3))
    before = patterns[..., torch.arange(2, length), torch.arange(1, length - 1)].mean((1, 3))
    logits, wanted = out.logits[:, half + 1 : -1], ids[:, half + 2 :]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    return induction.max().item(), before.max().item(), loss.item(), (logits.argmax(-1) == wanted).float().mean().item()


def emergence(_) -> None:
    """Induction heads form sharply, after previous-token heads."""
    rows, half, rng = [], 20, np.random.default_rng(0)
    for revision in [*wb.revisions("course"), None]:
        model = wb.load("course", revision=revision)
        if not rows:
            block = torch.tensor(
                np.stack([rng.permutation(np.arange(4, model.names.d_vocab))[:half] for _ in range(64)])
            )
            ids = torch.cat([torch.full((64, 1), 1), block, block], 1)  # after <bos>
        rows.append((revision or "final", *head_scores(model, ids, half)))
    show("Emergence: best induction head, best previous-token head, loss and accuracy on the repeat",
         [("step", "induct.", "previous", "loss", "top-1"), *rows])  # fmt: skip


# facts


def by_layer(model, task: wb.Task, place: str, metric: str = "prob") -> list[float]:
    """How much of the answer's probability comes back when the stream at `place` is restored, before each layer and at the end."""
    at = [f"resid_pre.{layer}@{place}" for layer in layers(model)] + [f"resid_post.{layers(model)[-1]}@{place}"]
    scores = wb.locate.causal.patch(model, task, at, metric=metric, null=False, progress=False)
    return [float(scores[component]) for component in at]


def with_names(task: wb.Task) -> wb.Task:
    """The spans of first and last name beside the whole subject."""
    rows = []
    for row in task:
        start, end = row["spans"]["subject"]
        cut = row["clean"].index(" ", start)
        rows.append(row | {"spans": row["spans"] | {"first": [start, cut], "last": [cut + 1, end]}})
    return wb.Task(rows, task.name)


def facts(model) -> None:
    """A fact sits at its subject in early layers and at the end in late ones."""
    columns = ("where", "embed", *layers(model))

    def far(row):  # text between subject and end, so that the two places are apart
        return len(row["clean"][row["spans"]["subject"][1] :].split()) >= 4

    cities = wb.Task([row for row in held_out_all("city_country") if far(row)][:PROMPTS], "city_country")
    show("One-token subjects (city -> country): restored, before the first layer and after each",
         [columns, *((place, *by_layer(model, cities, place)) for place in ("subject", "end"))])  # fmt: skip
    for name in ("person_city", "person_job"):
        people = with_names(wb.Task([row for row in held_out_all(name) if far(row)][:PROMPTS], name))
        places = ("subject", "first", "last", "end")
        show(f"Two-token subjects ({name})", [columns, *((place, *by_layer(model, people, place)) for place in places)])


# refusal


def share_exact(model, prompts: list[str], wanted: list[str], *recipe) -> float:
    """How often greedy decoding gives exactly the wanted reply."""
    said = model.generate(prompts, *recipe, max_new_tokens=max(len(w.split()) for w in wanted) + 1)
    return float(np.mean([s.startswith(w) for s, w in zip(said, wanted, strict=True)]))


def share_first(model, prompts: list[str], word: str, *recipe) -> float:
    """How often the next word is `word`."""
    wanted = model.tokenizer.convert_tokens_to_ids(word)
    return (model.logits(prompts, *recipe).argmax(-1) == wanted).float().mean().item()


def refusal(model) -> None:
    """One direction decides between refusing and helping. Set to what it is on harmless requests, the model helps, exactly; set
    to zero, which lies half-way here, it wavers (see Marshall et al. 2024, "Refusal in LLMs is an affine function")."""
    writes = ["resid_pre.0", "attn_out.*", "mlp_out.*"]
    harmful, harmless = held_out("refusal"), held_out("help")
    asked, fine = ([row["clean"] for row in task] for task in (harmful, harmless))
    content, exact = [row["content"] for row in harmful], [row["completion"] for row in harmless]
    fit = [row["corrupted"] for row in wb.Task.load("refusal") if row["split"] == "fit"]
    rows = [("layer", "refused", "exact", "fine", "random", "| zero:", "exact", "| minus:", "exact", "| plus:"),
            ("none", share_first(model, asked, "sorry"), share_exact(model, asked, content), share_exact(model, fine, exact))]  # fmt: skip
    for layer in layers(model):
        at = f"resid_post.{layer}@-1"
        try:
            push = wb.steer.vector.difference_of_means(model, "refusal", at)
        except ValueError:  # the request has not reached the last token yet
            rows.append((layer, "no direction yet"))
            continue
        noise = torch.randn(push.vector.shape, generator=torch.Generator().manual_seed(layer))
        mine, other = (_set_to_mean(model, direction / direction.norm(), at, fit) for direction in (push.vector, noise))
        zero = wb.ProjectOut(writes, push.vector)
        rows.append((layer, share_first(model, asked, "sorry", *mine), share_exact(model, asked, content, *mine),
                     share_exact(model, fine, exact, *mine), share_first(model, asked, "sorry", *other),
                     share_first(model, asked, "sorry", zero), share_exact(model, asked, content, zero),
                     share_first(model, asked, "sorry", -push), share_exact(model, asked, content, -push),
                     share_first(model, fine, "sorry", push)))  # fmt: skip
    show("Refusal: the direction after each layer at the last prompt token, set to its mean on harmless requests (harmful refused, "
         "harmful answered exactly, harmless answered exactly; harmful refused with a random direction); projected out of all writes; "
         "subtracted; added (harmless refused)", rows)  # fmt: skip


def _set_to_mean(model, unit: torch.Tensor, at: str, prompts: list[str]) -> tuple:
    mean = (model.activations(prompts, at) @ unit).mean()
    return wb.ProjectOut(at, unit), wb.Add(at, mean * unit)


# languages: LAPE (Tang et al. 2024)


@torch.no_grad()
def active(model, texts: list[str], rng) -> torch.Tensor:
    """How often each neuron's gate is open, over the words of these texts; [layer, neuron]."""
    total, count, handles = 0, 0, []
    seen: dict[int, torch.Tensor] = {}

    def watch(layer):
        return lambda module, inputs, output: seen.__setitem__(layer, (output[0] > 0).float().sum(0))

    for layer, block in enumerate(model.hf.model.layers):
        handles.append(block.mlp.gate_proj.register_forward_hook(watch(layer)))
    try:
        for text in rng.choice(texts, len(texts)):
            ids = model.ids(str(text))
            model.hf(input_ids=ids[None])
            total, count = total + torch.stack([seen[layer] for layer in layers(model)]), count + len(ids)
    finally:
        for handle in handles:
            handle.remove()
    return total / count


def lape(open_: torch.Tensor, number: int) -> list[list[tuple[int, int]]]:
    """The `number` neurons of lowest entropy over languages among those often active, each given to the language that opens it
    most; [language][neuron] as (layer, neuron)."""
    share = open_ / open_.sum(0, keepdim=True).clamp(min=1e-9)
    entropy = -(share * share.clamp(min=1e-9).log()).sum(0)
    entropy[open_.amax(0) < open_.flatten().quantile(0.5)] = torch.inf
    chosen = entropy.flatten().argsort()[:number]
    width = open_.shape[-1]
    found = [[] for _ in open_]
    for i in chosen.tolist():
        layer, neuron = divmod(i, width)
        found[int(share[:, layer, neuron].argmax())].append((layer, neuron))
    return found


def word_loss(model, rows: list[dict], *recipe) -> tuple[float, float, float]:
    """Loss of the right word, its lead over the best other word, and accuracy."""
    logits = model.logits([row["clean"] for row in rows], *recipe)
    right = torch.tensor(model.tokenizer.convert_tokens_to_ids([row["answer"] for row in rows]))
    own = logits.gather(1, right[:, None])[:, 0]
    others = logits.scatter(1, right[:, None], -torch.inf).amax(1)
    return (-logits.log_softmax(-1).gather(1, right[:, None]).mean().item(), (own - others).mean().item(),
            (own > others).float().mean().item())  # fmt: skip


def languages(model) -> None:
    """Neurons that open for one language only carry that language, and little else."""
    from grammar.languages import LANGUAGES, WORD

    told = [row for row in held_out_all("language_word") if "{told" in row["template"]]
    tests = {
        name: [row for row in told if row["entity"].startswith(code)][:PROMPTS] for code, name in LANGUAGES.items()
    }
    texts = {name: [row["text"] for row in wb.Task.load(f"text_{name}") if row["split"] == "fit"] for name in tests}
    width, total = model.hf.config.intermediate_size, model.names.n_layers * model.hf.config.intermediate_size
    before = {name: word_loss(model, rows) for name, rows in tests.items()}
    table = [
        (
            "share",
            "seed",
            "neurons of",
            "own",
            "others",
            "random",
            "lead own",
            "others",
            "acc. own",
            "others",
            "concept",
        )
    ]
    for share in (0.02, 0.04, 0.08, 0.12):
        for seed in range(3):
            rng = np.random.default_rng(seed)
            found = lape(torch.stack([active(model, texts[name], rng) for name in tests]), round(share * total))
            for name, neurons in zip(tests, found, strict=True):
                if not neurons:
                    continue
                off = wb.Zero([f"neuron.{layer}.{i}" for layer, i in neurons])
                draws = [divmod(int(i), width) for i in rng.choice(total, len(neurons), replace=False)]
                random_off = wb.Zero([f"neuron.{layer}.{i}" for layer, i in draws])
                after = {other: word_loss(model, rows, off) for other, rows in tests.items()}
                noise = max(word_loss(model, rows, random_off)[0] - before[o][0] for o, rows in tests.items())
                others = [o for o in tests if o != name]
                said = model.logits([row["clean"] for row in tests[name]], off).argmax(-1).tolist()
                said = model.tokenizer.convert_ids_to_tokens(said)
                kept = [
                    word in WORD[row["entity"].split()[1]].values() for word, row in zip(said, tests[name], strict=True)
                ]
                table.append((share, seed, f"{name} {len(neurons)}", after[name][0] - before[name][0],
                              max(after[o][0] - before[o][0] for o in others), noise, after[name][1] - before[name][1],
                              min(after[o][1] - before[o][1] for o in others), after[name][2],
                              min(after[o][2] for o in others), float(np.mean(kept))))  # fmt: skip
    show("Language neurons by LAPE, set to zero: change of the loss of the word (own language, worst other, as many random ones), "
         "of its lead over the best other word, accuracy, and how often the concept is right in whatever language", table)  # fmt: skip


# probes


def probe(model, train: tuple[list, list], test: tuple[list, list], at: str) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    fitted.fit(model.activations(train[0], at).numpy(), train[1])
    return float(fitted.score(model.activations(test[0], at).numpy(), test[1]))


def labelled(name: str, *splits: str) -> tuple[list[str], list]:
    """Texts and labels of a task; of pairs the clean and the corrupted side, with the right word's kind as the label."""
    kinds = {"is": "singular", "was": "singular", "are": "plural", "were": "plural", "sorry": "harm", "sure": "fine"}
    rows = [row for row in wb.Task.load(name) if row["split"] in splits]
    if "label" in rows[0]:
        return [row["text"] for row in rows], [row["label"] for row in rows]
    return ([row["clean"] for row in rows] + [row["corrupted"] for row in rows],
            [kinds[row["answer"]] for row in rows] + [kinds[row["foil"]] for row in rows])  # fmt: skip


def probes(model) -> None:
    """What can be read off the stream by a linear probe, layer by layer; fitted on "fit", measured on held-out rows."""
    rows = [("probe", "majority", "embed", *layers(model), "shuffled")]
    where = [f"resid_pre.{layer}@-1" for layer in layers(model)] + [f"resid_post.{layers(model)[-1]}@-1"]
    for name, what in (("refusal", "harm"), ("agreement", "number"), ("language_id", "language")):
        train, test = labelled(name, "fit", "select"), labelled(name, "test", "ood")
        majority = max(test[1].count(label) for label in set(test[1])) / len(test[1])
        shuffled = [str(label) for label in np.random.default_rng(0).permutation(train[1])]
        rows.append(
            (
                what,
                majority,
                *(probe(model, train, test, at) for at in where),
                probe(model, (train[0], shuffled), test, where[-2]),
            )
        )
    show("Probes at the last token of the prompt: accuracy before the first layer and after each", rows)


# multiple choice


def choices(model) -> None:
    """A letter alone needs the fact and then its place among the options, in one pass; with the word said first it is two passes."""
    rows = [("", "n", "letter alone", "word", "word and letter")]
    for split in ("test", "ood"):
        task = wb.Task.load("choice").split(split)
        written, wanted = [], []
        for row in task:
            start, end = row["spans"][row["answer"].strip("()")]
            words = row["clean"][row["spans"]["c"][1] + 1 :].split()  # the mark after the options, and the sentence
            offer = row["clean"][: row["spans"]["c"][1]]
            written.append(" ".join([offer, words[0], "in words :", *words[1:]]))
            wanted.append((f"{row['clean'][start:end]} ", f"{row['answer']} ."))
        letter = float(task.score(model, metric="accuracy").mean())
        word, both = (
            share_exact(model, written, some) for some in ([w for w, _ in wanted], ["".join(w) for w in wanted])
        )
        rows.append((split, len(task), letter, word, both))
    show("Multiple choice: the letter alone, or the word and then its letter", rows)


# indirect objects, personas


def indirect_objects(model) -> None:
    """No single head carries the indirect object; several together do."""
    task = held_out("ioi")
    scores = wb.locate.causal.patch(model, task, "z", progress=False)
    best = scores.frame.sort_values("score", ascending=False)
    rows = [("head", "score", "null p95")] + [
        (str(r.component), float(r.score), float(r.null_p95)) for r in best.head(6).itertuples()
    ]
    show("Indirect objects: single heads restored", rows)


def personas(model) -> None:
    """A vector turns whole sentences into a persona's style, with the content kept; by layer, at every token or the last one."""
    from grammar.words import STYLES

    def asked(row):  # the question without the system text
        return row["clean"][row["clean"].index("user :") :]

    def styled(row, name):  # the whole answer in another style
        words = dict(zip(next(s for s in STYLES.values() if s[0] == row["answer"]), STYLES[name], strict=True))
        return " ".join(words.get(word, word) for word in row["completion"].split())

    fit = [row for row in wb.Task.load("persona") if row["split"] == "fit"]
    test, rows = held_out("persona"), [("style", "where", *layers(model)[2:])]  # nothing has reached the end before
    for name in ("cheerful", "formal", "gloomy", "pirate"):
        texts = [{"text": asked(row), "label": "off"} for row in fit]
        texts += [{"text": f"system : be {name} . {asked(row)}", "label": "on"} for row in fit]
        for where in ("all", "last"):
            cells = []
            for layer in layers(model)[2:]:
                at = f"resid_post.{layer}"
                push = wb.steer.vector.difference_of_means(
                    model, wb.Task(texts, name), f"{at}@-1", to=at if where == "all" else None, positive="on"
                )
                cells.append(
                    share_exact(model, [asked(row) for row in test], [styled(row, name) for row in test], push)
                )
            rows.append((name, where, *cells))
    show(
        "Persona vectors added to a question without system text, after each layer: share of whole answers exactly right",
        rows,
    )


PHENOMENA = {f.__name__: f for f in (emergence, facts, refusal, languages, probes, choices, indirect_objects, personas)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(PHENOMENA)}; all by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, began = wb.load("course"), time.time()
    for name in args.names or PHENOMENA:
        PHENOMENA[name](model)
    print(f"\n{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
