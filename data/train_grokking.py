"""Trains the bundled model "grokking" in a minute: addition modulo 59, memorised first and understood much later.

    OMP_NUM_THREADS=1 nice -n 5 python train_grokking.py --seed 0

Example prompt and answer:  "17 + 52 ="  ->  "10", because 17 + 52 = 69 = 59 + 10
The model sees two fifths of all pairs, all of them in every step. It soon knows those by heart (step 80) and is wrong
on nearly all others. Only much later accuracy on the others rises to 100 % (steps 800 to 1320). What it has found by
then are clock hands. Each number becomes an angle 2 pi k a / 59, for a few frequencies k, and the logit of c grows with
cos(2 pi k (a + b - c) / 59). The usual explanation is weight decay: for the same loss the clock needs less weight than
a table. (LayerNorm hides that here: the column `weight` does not simply fall.) Spikes of the loss on the way are
genuine; the learning rate is high, so that it all takes a minute. Seeds differ in when they get there: seed 1 is not
done before the learning rate falls, and stays half-way.

Written: grokking/ (final model, checkpoints, progress.csv) and tasks/modular_addition.jsonl.

Source: Power et al. 2022, "Grokking: generalization beyond overfitting on small algorithmic datasets" (the
phenomenon); Nanda et al. 2023, "Progress measures for grokking via mechanistic interpretability", arXiv 2301.05217
(the one-layer model, the algorithm in it, restricted and excluded loss). Unlike theirs, this model is a stock GPT-2
with LayerNorm, and a pair and its mirror image are trained or held out together: if 52 + 17 were trained, a model that
only knows that order does not matter would be right on 17 + 52.
"""

import argparse
import csv
import json
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

HERE = Path(__file__).parent
P = 59  # a prime, so that all frequencies are alike: each just renames the numbers
PLUS, EQUALS, UNK = P, P + 1, P + 2  # the numbers are their own ids
TRAINED = 0.4  # share of the pairs
STEPS, DECAY, RATE = 3000, 1000, 3e-3  # the learning rate falls to 0 over the last DECAY steps
EVERY = 20  # steps between two points of the curve
KEY = 0.02  # a key frequency carries at least this share of the final logits; the others carry next to nothing
ROWS = {"fit": 120, "select": 60, "test": 120}  # rows of the task


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token: the numbers, the two signs, and a word for all that the model does not know."""
    words = [*(str(n) for n in range(P)), "+", "=", "<unk>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", clean_up_tokenization_spaces=False,
                                   model_input_names=["input_ids", "attention_mask"])  # fmt: skip


def build_model() -> GPT2LMHeadModel:
    """One layer with four heads and ReLU neurons, no dropout; embedding and unembedding are two matrices."""
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=P + 3, n_positions=8, n_embd=64, n_layer=1, n_head=4, n_inner=256, activation_function="relu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None))  # fmt: skip


def split_pairs(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The trained and the held-out pairs (a, b); (a, b) and (b, a) are always on the same side."""
    unordered = [(a, b) for a in range(P) for b in range(a, P)]
    random.Random(seed).shuffle(unordered)
    cut = round(TRAINED * len(unordered))
    both_orders = ([*dict.fromkeys(q for a, b in part for q in ((a, b), (b, a)))]
                   for part in (unordered[:cut], unordered[cut:]))  # fmt: skip
    return tuple(both_orders)


def logits_of(model, pairs: torch.Tensor) -> torch.Tensor:
    """Logits right after "a + b =", [pair, word]: what the model's own forward pass gives, six times as fast.

    With one layer, the last position sees only keys and values of single words at their positions. There are 2 P + 2 of
    them, however many the pairs, and FFN and unembedding are needed at the last position alone. In double precision at
    the end, because losses of what is known by heart get very small.
    """
    body, block = model.transformer, model.transformer.h[0]
    words, places = body.wte.weight, body.wpe.weight
    stream = torch.cat([words[:P] + places[0], words[:P] + places[2], words[PLUS, None] + places[1],
                        words[EQUALS, None] + places[3]])  # fmt: skip
    heads = block.attn.num_heads
    query, key, value = block.attn.c_attn(block.ln_1(stream)).unflatten(1, (3, heads, -1)).unbind(1)
    weight = ((query[-1] * key).sum(-1) / key.shape[-1] ** 0.5).exp()[..., None]  # [word, head, 1], softmax to come
    seen = [pairs[:, 0], pairs[:, 1] + P, torch.tensor([2 * P]), torch.tensor([2 * P + 1])]
    z = sum((weight * value)[i] for i in seen) / sum(weight[i] for i in seen)
    stream = stream[-1] + block.attn.c_proj(z.flatten(1))
    stream = stream + block.mlp(block.ln_2(stream))
    return model.lm_head(body.ln_f(stream)).double()


@torch.no_grad()
def check(model) -> float:
    """The largest difference between `logits_of` and the model's own forward pass."""
    pairs = torch.cartesian_prod(torch.arange(P), torch.arange(P))
    prompts = torch.tensor([[a, PLUS, b, EQUALS] for a, b in pairs.tolist()])
    difference = (logits_of(model, pairs) - model(input_ids=prompts).logits[:, -1]).abs().max().item()
    assert difference < 1e-3, difference
    return difference


def train(model, pairs: torch.Tensor) -> dict[int, dict[str, torch.Tensor]]:
    """Full-batch AdamW with strong weight decay; the weights in fp16 every EVERY steps, by step."""
    answers = pairs.sum(1) % P
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=2.0)
    history = {}
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            history[step] = {name: value.half() for name, value in model.state_dict().items()}
        if step == STEPS:
            return history
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 10, (STEPS - step) / DECAY)
        loss = torch.nn.functional.cross_entropy(logits_of(model, pairs), answers)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            print(f"step {step} train loss {loss.item():.4f}", flush=True)


def waves() -> torch.Tensor:
    """cos and sin of 2 pi k n / P for k = 1 .. (P - 1) / 2, as unit vectors over the numbers n: [frequency, 2, n]."""
    angles = 2 * torch.pi / P * torch.outer(torch.arange(1, P // 2 + 1), torch.arange(P)).double()
    return torch.stack([angles.cos(), angles.sin()], dim=1) * (2 / P) ** 0.5


def embedding_power(model) -> torch.Tensor:
    """How much of the number embeddings (their mean left out) swings with each frequency? Shares, [frequency]."""
    power = (waves() @ model.transformer.wte.weight[:P].double()).square().sum((1, 2))
    return power / power.sum()


def clock(table: torch.Tensor, keys: list[int]) -> torch.Tensor:
    """The part of a table of logits [a, b, word] that goes with cos and sin of 2 pi k (a + b) / P, for k in `keys`."""
    total = torch.arange(P)[:, None] + torch.arange(P)
    basis = waves()[[k - 1 for k in keys]].flatten(0, 1)[:, total % P] / P**0.5  # [wave, a, b], of length 1
    return torch.einsum("wab,wn->abn", basis, torch.einsum("wab,abn->wn", basis, table))


def clock_power(table: torch.Tensor) -> torch.Tensor:
    """How much of the logits over the numbers (their mean left out) swings with a + b at each frequency? Shares."""
    varying = table[..., :P] - table[..., :P].mean((0, 1))
    varying = varying - varying.mean(2, keepdim=True)
    return torch.stack([clock(varying, [k]).square().sum() for k in range(1, P // 2 + 1)]) / varying.square().sum()


def gini(shares: torch.Tensor) -> float:
    """0 if all are equal, near 1 if few have it all."""
    rank = torch.arange(1, len(shares) + 1)
    return float(
        2 * (rank * shares.sort().values).sum() / (len(shares) * shares.sum()) - (len(shares) + 1) / len(shares)
    )


def loss_accuracy(table: torch.Tensor, pairs: torch.Tensor) -> tuple[float, float]:
    """Mean loss and accuracy on some pairs of a table of logits [a, b, word]."""
    logits, answers = table[pairs[:, 0], pairs[:, 1]], pairs.sum(1) % P
    loss = torch.nn.functional.cross_entropy(logits, answers)
    return loss.item(), (logits.argmax(1) == answers).double().mean().item()


@torch.no_grad()
def measure(model, keys: list[int], trained: torch.Tensor, held_out: torch.Tensor) -> dict[str, float]:
    """One point of the curve.

    fourier_keys: how much of the embedding swings with the key frequencies? fourier_gini: is it made of few at all?
    restricted_*: on all held-out pairs, when only the key frequencies' waves in a + b (and each word's mean) are left
    of the logits: how good is the clock by itself?
    excluded_*: on the trained pairs, when just these waves are taken out: how much is known by heart?
    weight: the sum of all squared weights, which weight decay pulls at.
    """
    table = logits_of(model, torch.cartesian_prod(torch.arange(P), torch.arange(P))).unflatten(0, (P, P))
    hands, power = clock(table, keys), embedding_power(model)
    point = {}
    for name, logits, pairs in (("train", table, trained), ("test", table, held_out),
                                ("restricted", hands + table.mean((0, 1)), held_out),
                                ("excluded", table - hands, trained)):  # fmt: skip
        point[f"{name}_loss"], point[f"{name}_accuracy"] = loss_accuracy(logits, pairs)
    weight = sum(p.square().sum() for p in model.parameters()).item()
    share = power[[k - 1 for k in keys]].sum().item()
    return point | {"fourier_keys": share, "fourier_gini": gini(power), "weight": weight}


def choose(curve: list[dict]) -> dict[str, int]:
    """The steps worth a checkpoint. Moments at which training stumbles (loss spikes) are passed over."""

    def first(column: str, least: float) -> int:
        calm = (p for p in curve if column == "train_accuracy" or p["train_accuracy"] > 0.99)
        return next((p["step"] for p in calm if p[column] >= least), STEPS)

    memorised, rise = first("train_accuracy", 1), first("test_accuracy", 0.2)
    calm = [p["step"] for p in curve if p["train_accuracy"] == 1]
    plateau = min(calm, key=lambda step: abs(step - (memorised + rise) / 2))
    return {"before": first("train_accuracy", 0.2), "memorised": memorised, "plateau": plateau, "rise": rise,
            "half": first("test_accuracy", 0.6), "grokked": first("test_accuracy", 0.99), "end": STEPS}  # fmt: skip


def task_rows(trained, held_out, seed: int) -> list[dict]:
    """Pairs of prompts with another second number; both sides of a row are trained (fit), or both are held out."""
    rng = random.Random(seed)
    held_sets = sorted({tuple(sorted(pair)) for pair in held_out})
    rng.shuffle(held_sets)
    chosen = set(held_sets[: len(held_sets) // 3])  # mirror images are in the same split here, too
    kept = {"fit": trained, "select": [pair for pair in held_out if tuple(sorted(pair)) in chosen],
            "test": [pair for pair in held_out if tuple(sorted(pair)) not in chosen]}  # fmt: skip
    rows = []
    for split, number in ROWS.items():
        for a, b in rng.sample(sorted(kept[split]), number):
            other = rng.choice(sorted(y for x, y in kept[split] if x == a and y != b))
            clean, start = f"{a} + {b} =", len(f"{a} + ")
            spans = {"a": [0, len(str(a))], "b": [start, start + len(str(b))], "end": [len(clean) - 1, len(clean)]}
            rows.append({"clean": clean, "corrupted": f"{a} + {other} =", "answer": str((a + b) % P),
                         "foil": str((a + other) % P), "template": "{a} + {b} =", "entity": f"{a} + {b}",
                         "split": split, "spans": spans})  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    trained, held_out = split_pairs(args.seed)
    folder, tasks = args.out / "grokking", args.out / "tasks"
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    tasks.mkdir(exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in task_rows(trained, held_out, args.seed)]
    (tasks / "modular_addition.jsonl").write_text("".join(lines), encoding="utf-8")

    trained, held_out = torch.tensor(trained), torch.tensor(held_out)
    model = build_model()
    model.set_attn_implementation("eager")
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(trained)} pairs trained, {len(held_out)} not")
    start = time.time()
    history = train(model, trained)
    print(f"{(time.time() - start) / 60:.1f} minutes ({time.process_time() / 60:.1f} of computing); logits differ from "
          f"the forward pass of transformers by at most {check(model):.1e}")  # fmt: skip

    with torch.no_grad():
        table = logits_of(model, torch.cartesian_prod(torch.arange(P), torch.arange(P))).unflatten(0, (P, P))
        power = clock_power(table)
    keys = [int(k) + 1 for k in power.argsort(descending=True) if power[k] >= KEY]
    shares = ", ".join(f"{k} ({power[k - 1]:.2f})" for k in keys)
    print(
        f"key frequencies, with their share of the logits: {shares}; together {power[[k - 1 for k in keys]].sum():.2f}"
    )
    full = measure(model, keys, trained, held_out)
    curve = []
    for step, weights in history.items():  # the curve is that of the fp16 weights: what is stored is what was measured
        model.load_state_dict(weights)
        curve.append({"step": step, **measure(model, keys, trained, held_out)})
    print(f"fp32 test loss {full['test_loss']:.6f} accuracy {full['test_accuracy']:.4f}; "
          f"fp16 {curve[-1]['test_loss']:.6f} {curve[-1]['test_accuracy']:.4f}")  # fmt: skip
    with (folder / "progress.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, curve[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: v if k == "step" else float(f"{v:.5g}") for k, v in point.items()} for point in curve)

    model.half().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    for old in (folder / "checkpoints").glob("*.safetensors"):
        old.unlink()
    for name, step in choose(curve).items():
        save_file(history[step], folder / "checkpoints" / f"step{step}.safetensors")
        point = curve[step // EVERY]
        print(f"step {step} ({name}): " + ", ".join(f"{k} {v:.3g}" for k, v in point.items() if k != "step"))
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


if __name__ == "__main__":
    main()
