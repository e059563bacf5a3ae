"""Writes three tiny GPT-2 models whose weights are set by hand, so that their circuits are known exactly. Nothing is trained.

    python data/planted/make_circuits.py

    folder        prompt                                            next word   circuit
    induction/    `... pen cup ... hat fox ... pen`                 cup         z.0.1 (previous token) -> z.1.2 (induction)
    lookup/       `oak of spain elm japan is`                       madrid      z.0.2 (mark) -> z.1.0 (fetch) -> neurons
    inhibition/   `anna and paul met , then anna gave it to`        paul        z.0.0 -> z.1.1 -> z.2.2

The stream has named blocks of dimensions, and each head is written as: from this block at the query it looks for that block
at the key, else it rests at <bos>; what it finds there in one block it copies into another. LayerNorm would undo
such sums, so two dimensions hold a large constant (+64 and -64) beside which everything else is small, and one dimension
holds minus the sum of all others: the mean is 0 and the norm nearly the same everywhere, which is verified. The other heads
attend at random and write a little noise.

Each folder has the model (config.json, model.safetensors, tokenizer), task.jsonl, and circuit.json, which says which heads
and edges there are. Before it is written, each model must answer every row; fail without any one head of its circuit;
not need any other head; and patching must rank its circuit first.
"""

import itertools
import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

HERE = Path(__file__).parent
WIDTH, HEADS, SIZE, PLACES, CONSTANT = 96, 3, 32, 20, 64.0
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
ROWS = {"fit": 40, "select": 20, "test": 40, "ood": 20}  # ood: longer prompts
SHARP = 20.0  # how far the score of what is looked for lies above <bos>, and <bos> above the rest


class Sketch:
    """A GPT-2 to be filled in: blocks of the stream by name, heads as matches and copies.

    Args:
        words: the vocabulary after the special tokens. blocks: name -> number of dimensions.
    """

    def __init__(self, words: list[str], layers: int, blocks: dict[str, int], inner: int = 4):
        torch.manual_seed(0)
        self.words = [*SPECIAL, *words]
        self.at, start = {}, 3  # +constant, -constant, balance
        for name, size in {"bos": 1, "place": PLACES, **blocks}.items():
            self.at[name] = range(start, start := start + size)
        assert start <= WIDTH, start
        config = GPT2Config(vocab_size=len(self.words), n_embd=WIDTH, n_layer=layers, n_head=HEADS, n_inner=inner,
                            n_positions=PLACES, activation_function="relu", tie_word_embeddings=False, bos_token_id=1,
                            eos_token_id=2, pad_token_id=0)  # fmt: skip
        self.model = GPT2LMHeadModel(config).eval()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(False).zero_()
            if "ln_" in name and name.endswith("weight"):  # undoes the division by the standard deviation
                parameter[3:] = CONSTANT * (2 / WIDTH) ** 0.5
        self.body = self.model.transformer
        self.body.wpe.weight[range(PLACES), self.at["place"]] = 1
        self.body.wte.weight[:, 0], self.body.wte.weight[:, 1] = CONSTANT, -CONSTANT
        self.body.wte.weight[1, self.at["bos"]] = 1
        for layer, index in itertools.product(range(layers), range(HEADS)):
            self._idle(layer, index)
        for block in self.body.h:  # idle neurons write a little noise, too
            block.mlp.c_fc.weight[3:] = torch.randn(WIDTH - 3, inner) * 0.5
            block.mlp.c_proj.weight[:, 3:] = torch.randn(inner, WIDTH - 3) * 0.01

    def word(self, word: str, *dimensions: int) -> None:
        """The word's embedding has a 1 in these dimensions."""
        self.body.wte.weight[self.words.index(word), list(dimensions)] = 1

    def head(self, layer: int, index: int, match: list, copy: list, steady: list = ()) -> None:
        """Write one head.

        Args:
            match: (query dimension, key dimension, score) where both are 1. copy: (from, to) dimensions.
            steady: (key dimension, score) whatever the query is.
        """
        attention, own = self.body.h[layer].attn, index * SIZE
        for part in range(3):
            attention.c_attn.weight[:, part * WIDTH + own : part * WIDTH + own + SIZE] = 0
        attention.c_proj.weight[own : own + SIZE] = 0
        channels = itertools.count(own)
        for query, key, score in match:  # a dimension of the head for each query dimension would do, too
            channel = next(channels)
            attention.c_attn.weight[query, channel] = score * SIZE**0.5
            attention.c_attn.weight[key, WIDTH + channel] = 1
        channel = next(channels)
        attention.c_attn.bias[channel] = SIZE**0.5
        for key, score in [(self.at["bos"][0], SHARP), *steady]:
            attention.c_attn.weight[key, WIDTH + channel] = score
        assert channel < own + SIZE and len(copy) <= SIZE
        for i, (source, target) in enumerate(copy):
            attention.c_attn.weight[source, 2 * WIDTH + own + i] = 1
            attention.c_proj.weight[own + i, target] = 1

    def _idle(self, layer: int, index: int) -> None:
        """A head that attends anywhere and writes a little noise."""
        attention, own = self.body.h[layer].attn, index * SIZE
        for part, size in enumerate((0.5, 0.5, 0.1)):
            columns = slice(part * WIDTH + own, part * WIDTH + own + SIZE)
            attention.c_attn.weight[3:, columns] = torch.randn(WIDTH - 3, SIZE) * size
        attention.c_proj.weight[own : own + SIZE, 3:] = torch.randn(SIZE, WIDTH - 3) * 0.01

    def says(self, words: list[str], block: str) -> None:
        """Dimension i of the block makes the i-th of these words probable."""
        for word, dimension in zip(words, self.at[block], strict=True):
            self.model.lm_head.weight[self.words.index(word), dimension] = 20

    def balance(self) -> None:
        """Everything written to the stream gets its negative sum in the third dimension."""
        rows = [self.body.wte.weight, self.body.wpe.weight]
        rows += [part.weight for block in self.body.h for part in (block.attn.c_proj, block.mlp.c_proj)]
        for matrix in rows:
            matrix[:, 2] = -matrix[:, 3:].sum(-1)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One word, one token; <bos> before every text."""
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(self.words)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
        return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False,
                                       model_input_names=["input_ids", "attention_mask"], **names)  # fmt: skip


WORDS = "pen cup hat fox map key bag box bus car cow dog cat egg fan hen ham ink jar kit leg net oil pan"
TREES = "oak elm ash fir yew box bay fig nut palm"
NAMES = "anna paul mary john lucy peter nora simon"
OTHERS = "and with met saw , then later so gave it sent a book letter to today happily"


def induction():
    """z.0.1 writes at each token which one came before; z.1.2 looks for the token that came after the present one."""
    words = WORDS.split()
    n = len(words)
    sketch = Sketch(words, 2, {"word": n, "before": n, "out": n})
    at = sketch.at
    for word, dimension in zip(words, at["word"], strict=True):
        sketch.word(word, dimension)
    places = list(at["place"])
    sketch.head(0, 1, [(here, there, 2 * SHARP) for there, here in itertools.pairwise(places)],
                list(zip(at["word"], at["before"])))  # fmt: skip
    sketch.head(1, 2, [(now, before, 2 * SHARP) for now, before in zip(at["word"], at["before"])],
                list(zip(at["word"], at["out"])))  # fmt: skip
    sketch.says(words, "out")
    circuit = {
        "heads": {"z.0.1": "previous token", "z.1.2": "induction"},
        "edges": [["embed", "z.0.1", "v"], ["z.0.1", "z.1.2", "k"], ["embed", "z.1.2", "q"], ["embed", "z.1.2", "v"],
                  ["z.1.2", "logits", ""]],
    }  # fmt: skip

    def row(rng: random.Random, split: str) -> dict:
        a, b, c, d, *rest = rng.sample(words, 14 if split == "ood" else 9)
        cut = sorted(rng.sample(range(len(rest) + 1), 2))
        gaps = [" ".join(rest[i:j]) for i, j in itertools.pairwise([0, *cut, len(rest)])]
        first = rng.random() < 0.5
        one, two = (f"{a} {b}", f"{c} {d}") if first else (f"{c} {d}", f"{a} {b}")
        other_one, other_two = (f"{c} {b}", f"{a} {d}") if first else (f"{a} {d}", f"{c} {b}")
        clean, corrupted = (" ".join(f"{gaps[0]} {x} {gaps[1]} {y} {gaps[2]} {a}".split())
                            for x, y in ((one, two), (other_one, other_two)))  # fmt: skip
        place = clean.index(f"{a} {b}") + len(a) + 1
        return {"clean": clean, "corrupted": corrupted, "answer": b, "foil": d, "template": "... A B ... C D ... A",
                "entity": f"{a} {b}", "spans": {"first": [place, place + len(b)], "end": [len(clean) - len(a), len(clean)]}}  # fmt: skip

    return sketch, circuit, row


CAPITALS = {"spain": "madrid", "japan": "tokyo", "france": "paris", "italy": "rome", "egypt": "cairo", "kenya": "nairobi",
            "norway": "oslo", "poland": "warsaw", "greece": "athens", "peru": "lima"}  # fmt: skip


def lookup():
    """z.0.2 marks the country after "of"; z.1.0 fetches the marked country to "is"; neurons of layer 1 know its capital."""
    trees = TREES.split()
    n = len(CAPITALS)
    sketch = Sketch([*CAPITALS, *CAPITALS.values(), *trees, "of", "is"], 2,
                    {"country": n, "of": 1, "marked": 1, "asked": n, "out": n}, inner=n)  # fmt: skip
    at = sketch.at
    for country, dimension in zip(CAPITALS, at["country"], strict=True):
        sketch.word(country, dimension)
    sketch.word("of", at["of"][0])
    places = list(at["place"])
    sketch.head(0, 2, [(here, there, 2 * SHARP) for there, here in itertools.pairwise(places)],
                [(at["of"][0], at["marked"][0])])  # fmt: skip
    sketch.head(1, 0, [], list(zip(at["country"], at["asked"])), steady=[(at["marked"][0], 2 * SHARP)])
    mlp = sketch.body.h[1].mlp
    mlp.c_fc.weight[:], mlp.c_proj.weight[:] = 0, 0
    for i, (asked, out) in enumerate(zip(at["asked"], at["out"], strict=True)):
        mlp.c_fc.weight[asked, i], mlp.c_fc.bias[i], mlp.c_proj.weight[i, out] = 2, -1, 1
    sketch.says(list(CAPITALS.values()), "out")
    circuit = {
        "heads": {"z.0.2": "mark what follows `of`", "z.1.0": "fetch what is marked"},
        "neurons": {f"neuron.1.{i}": f"{country}: {capital}" for i, (country, capital) in enumerate(CAPITALS.items())},
        "edges": [["embed", "z.0.2", "v"], ["z.0.2", "z.1.0", "k"], ["embed", "z.1.0", "v"], ["z.1.0", "mlp_out.1", ""],
                  ["mlp_out.1", "logits", ""]],
    }  # fmt: skip

    def row(rng: random.Random, split: str) -> dict:
        one, two = rng.sample(list(CAPITALS), 2)
        while True:
            slots = [rng.choice(trees) for _ in range(8 if split == "ood" else 5)]
            first, second = sorted(rng.sample(range(len(slots)), 2))
            if second - first > 1 and first > 0:
                break
        clean = [*slots[:first], one, *slots[first + 1 : second], two, *slots[second + 1 :], "is"]
        corrupted = list(clean)
        corrupted[second - 1] = clean[first - 1] = "of"  # what is asked for is the country after "of"
        start = len(" ".join(clean[:first])) + 1
        clean, corrupted = " ".join(clean), " ".join(corrupted)
        return {"clean": clean, "corrupted": corrupted, "answer": CAPITALS[one], "foil": CAPITALS[two],
                "template": "... of COUNTRY ... COUNTRY ... is", "entity": one,
                "spans": {"subject": [start, start + len(one)], "end": [len(clean) - 2, len(clean)]}}  # fmt: skip

    return sketch, circuit, row


def inhibition():
    """z.0.0 finds a name's earlier place, z.1.1 tells the end which name was there twice, z.2.2 copies another name.

    Indirect objects in little (Wang et al. 2022): duplicate token head, inhibition head, name mover.
    """
    names = NAMES.split()
    n = len(names)
    sketch = Sketch([*names, *OTHERS.split()], 3, {"name": n, "is_name": 1, "twice": n, "not": n, "out": n})
    at = sketch.at
    for name, dimension in zip(names, at["name"], strict=True):
        sketch.word(name, dimension, at["is_name"][0])
    itself = [(place, place, -4 * SHARP) for place in at["place"]]
    sketch.head(0, 0, [(d, d, 2 * SHARP) for d in at["name"]] + itself, list(zip(at["name"], at["twice"])))
    sketch.head(1, 1, [], list(zip(at["twice"], at["not"])), steady=[(d, 2 * SHARP) for d in at["twice"]])
    sketch.head(2, 2, [(no, name, -2 * SHARP) for no, name in zip(at["not"], at["name"])],
                list(zip(at["name"], at["out"])), steady=[(at["is_name"][0], 2 * SHARP)])  # fmt: skip
    sketch.says(names, "out")
    circuit = {
        "heads": {"z.0.0": "duplicate token", "z.1.1": "inhibition", "z.2.2": "name mover"},
        "edges": [["embed", "z.0.0", "q"], ["embed", "z.0.0", "k"], ["embed", "z.0.0", "v"], ["z.0.0", "z.1.1", "k"],
                  ["z.0.0", "z.1.1", "v"], ["z.1.1", "z.2.2", "q"], ["embed", "z.2.2", "k"], ["embed", "z.2.2", "v"],
                  ["z.2.2", "logits", ""]],
    }  # fmt: skip
    templates = ["{a} and {b} met , then {s} gave it to", "{a} saw {b} , so {s} sent a letter to",
                 "{a} met with {b} , later {s} gave a book to"]  # fmt: skip
    longer = ["today {a} and {b} met , then later {s} happily gave a book to"]

    def row(rng: random.Random, split: str) -> dict:
        template = rng.choice(longer if split == "ood" else templates)
        a, b = rng.sample(names, 2)
        s, io = (a, b) if rng.random() < 0.5 else (b, a)
        clean, corrupted = (template.format(a=a, b=b, s=name) for name in (s, io))
        second, first = clean.rindex(s), clean.index(s)
        spans = {"io": [clean.index(io), clean.index(io) + len(io)], "s1": [first, first + len(s)],
                 "s2": [second, second + len(s)], "end": [len(clean) - 2, len(clean)]}  # fmt: skip
        return {"clean": clean, "corrupted": corrupted, "answer": io, "foil": s, "template": template,
                "entity": f"{a} {b}", "spans": spans}  # fmt: skip

    return sketch, circuit, row


def rows(row, seed: int = 0) -> list[dict]:
    rng, found, seen = random.Random(seed), [], set()
    for split, count in ROWS.items():
        while count:
            one = row(rng, split)
            if one["clean"] not in seen:
                seen.add(one["clean"])
                found.append(one | {"split": split})
                count -= 1
    return found


def verify(folder: Path) -> dict:
    """The figures of a written folder; refuses a model that is not what it claims to be."""
    sys.path.insert(0, str(HERE.parents[1]))
    import workbench as wb

    model, task = wb.load(folder), wb.Task.load(folder / "task.jsonl")
    circuit = json.loads((folder / "circuit.json").read_text())
    pairs, heads = task.on(model), list(circuit["heads"])
    assert len(pairs.clean) == len(task)

    def right(side: str, *off) -> float:
        wanted = pairs.answer if side == "clean" else pairs.foil
        return float((model.logits(getattr(pairs, side), *off).argmax(-1) == wanted).float().mean())

    every = [f"z.{layer}.{index}" for layer in range(model.names.n_layers) for index in range(HEADS)]
    without = {head: right("clean", wb.Zero(at=head)) for head in every}
    places = [f"resid_post.{model.names.n_layers - 1}@-1", *(f"resid_pre.{i}@-1" for i in range(model.names.n_layers))]
    norms = torch.cat([x.norm(dim=-1) for x in model.activations(pairs.clean, places).values()])
    scores = wb.locate.causal.patch(model, task, "z.*.*", null=False, progress=False)
    order = sorted(zip(map(str, scores.components), scores.values), key=lambda one: -abs(one[1]))
    assert right("clean") == right("corrupted") == 1, (right("clean"), right("corrupted"))
    assert all(without[head] <= 0.6 for head in heads), without
    assert all(without[head] == 1 for head in set(every) - set(heads)), without
    assert {head for head, _ in order[: len(heads)]} == set(heads), order
    assert all(abs(score) > 0.9 for _, score in order[: len(heads)]) and abs(order[len(heads)][1]) < 0.1, order
    spread = float(norms.max() / norms.min() - 1)
    assert spread < 0.02, spread
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size < 300_000, size
    return {"rows": len(task), "bytes": size, "norm spread": round(spread, 4),
            **{f"without {h}": round(v, 2) for h, v in without.items() if h in heads},
            "patched": {h: round(float(v), 3) for h, v in order[: len(heads) + 1]}}  # fmt: skip


def main():
    logging.disable_progress_bar()
    for make in (induction, lookup, inhibition):
        sketch, circuit, row = make()
        sketch.balance()
        folder = HERE / make.__name__
        folder.mkdir(exist_ok=True)
        sketch.model.half().save_pretrained(folder)
        sketch.tokenizer().save_pretrained(folder)
        about = {"name": make.__name__, "what": make.__doc__.strip().splitlines()[0], **circuit}
        (folder / "circuit.json").write_text(json.dumps(about, indent=1) + "\n")
        (folder / "task.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows(row)))
        print(make.__name__, verify(folder))


if __name__ == "__main__":
    main()
