"""Trains the bundled model "course" from scratch on the small world of grammar/, in about two and a half hours on one CPU core.

    OMP_NUM_THREADS=1 python train_course.py --seed 0 --compile
    python train_course.py --seed 0 --compile --device cuda --out /tmp/course        (980 steps a minute on an H200)

Example of one packed row of 96 tokens (positions restart and attention is cut at every <bos>):
    <bos> the city of lyon is in france . <eos> <bos> user : i am tired today . where is ... <eos> <pad> <pad>
"""

import argparse
import copy
import math
import os
import random
import time
from pathlib import Path

import torch
from evaluate_course import accuracy, among
from grammar import PARTS, World, patterns, tasks
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader, IterableDataset
from transformers import MinistralConfig, MinistralForCausalLM, PreTrainedTokenizerFast

LENGTH, BATCH = 96, 48  # tokens of a packed row, rows of a step
LOCAL = 2  # layers that see two tokens
CHECKPOINTS = (200, 500, 550, 600, 700, 1500)  # steps; induction heads form between 500 and 700
PEAKS = {"learn": 1.0, "polish": 0.3, "finish": 0.5}  # of the learning rate, by part
PAD, BOS, EOS, UNK = range(4)
CHAT = ("{{ bos_token }}{% for m in messages %}{{ ' ' + m['role'] + ' : ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' assistant :' }}{% endif %}")  # fmt: skip


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token; <bos> before every text."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *patterns.Induction.vocabulary]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                        unk_token="<unk>", model_input_names=["input_ids", "attention_mask"],
                                        clean_up_tokenization_spaces=False)  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


def build_model(d_vocab: int) -> MinistralForCausalLM:
    """A Llama whose first two layers see two tokens, itself and the one before: they make clean previous-token heads."""
    return MinistralForCausalLM(MinistralConfig(
        vocab_size=d_vocab, hidden_size=192, intermediate_size=384, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=6, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, sliding_window=2,
        layer_types=["sliding_attention"] * LOCAL + ["full_attention"] * (8 - LOCAL),
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rms_norm_eps=1e-6,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, initializer_range=0.02))  # fmt: skip


def pack(documents: list[tuple[list[int], list[bool]]]) -> list[list]:
    """Best fit: each document, longest first, goes into the fullest row that still has room."""
    rows, room = [], [[] for _ in range(LENGTH + 1)]  # room[n]: rows with n free places
    for document in sorted(documents, key=lambda d: -len(d[0])):
        size = len(document[0])
        free = next((n for n in range(size, LENGTH + 1) if room[n]), None)
        row = room[free].pop() if free is not None else []
        if free is None:
            rows.append(row)
        row.append(document)
        room[(LENGTH if free is None else free) - size].append(row)
    return rows


def batches(world: World, seed: int, ids: dict[str, int]):
    """Endless batches: tokens, targets (-100 where there is no loss), positions, the number of each token's document."""
    shuffle = random.Random(seed)
    while True:
        drawn = (world.generate() for _ in range(8000))
        rows = pack([([BOS, *(ids[w] for w in d.words), EOS], [False, *d.learn, True]) for d in drawn])
        shuffle.shuffle(rows)
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            tokens = torch.full((BATCH, LENGTH), PAD)
            targets = torch.full((BATCH, LENGTH), -100)
            positions = torch.zeros(BATCH, LENGTH, dtype=torch.long)
            owner = torch.full((BATCH, LENGTH), -1)
            for i, row in enumerate(rows[start : start + BATCH]):
                at = 0
                for number, (document, learn) in enumerate(row):
                    end = at + len(document)
                    tokens[i, at:end] = torch.tensor(document)
                    following = [t if keep else -100 for t, keep in zip(document[1:], learn[1:], strict=True)]
                    targets[i, at : end - 1] = torch.tensor(following)
                    positions[i, at:end] = torch.arange(len(document))
                    owner[i, at:end] = number
                    at = end
            yield tokens, targets, positions, owner


def masks(owner: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is added to the attention scores of each kind of layer, so that documents of one row do not see each other."""
    ones = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=owner.device)
    seen = (owner[:, :, None] == owner[:, None, :]) & ones.tril()
    kinds = {"full_attention": seen, "sliding_attention": seen & ones.triu(-1)}
    return {kind: torch.zeros(m.shape, device=m.device).masked_fill(~m, -1e9)[:, None] for kind, m in kinds.items()}


class Stream(IterableDataset):
    """The batches as a dataset, so that a process beside a GPU can make them; the same ones in the same order."""

    def __init__(self, seed: int, part: str, ids: dict[str, int]):
        self.seed, self.part, self.ids = seed, part, ids

    def __iter__(self):
        return batches(World(self.seed, self.part), self.seed, self.ids)


class Muon:
    """Momentum whose update is made orthogonal by five Newton-Schulz steps; for matrices, grouped by shape."""

    def __init__(self, matrices, momentum=0.95, decay=0.01):
        self.momentum, self.decay, self.groups = momentum, decay, {}
        for p in matrices:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.average = {shape: torch.zeros(len(ps), *shape, device=ps[0].device) for shape, ps in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float):
        for shape, ps in self.groups.items():
            grad, average = torch.stack([p.grad for p in ps]), self.average[shape]
            average.lerp_(grad, 1 - self.momentum)
            x = grad.lerp(average, self.momentum).bfloat16()  # Nesterov
            wide = shape[0] <= shape[1]
            x = x if wide else x.mT
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
            x = (x if wide else x.mT).float() * max(1, shape[0] / shape[1]) ** 0.5
            for p, update in zip(ps, x, strict=True):
                p.mul_(1 - rate * self.decay).sub_(update, alpha=rate)


def export(model, tokenizer, out: Path):
    """The model in fp16 and the tokenizer; file by file, so that readers never see half a file."""
    fresh = out.with_name(out.name + ".new")
    copy.deepcopy(model).half().save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    out.mkdir(exist_ok=True)
    for file in fresh.iterdir():
        file.chmod(0o644)
        os.replace(file, out / file.name)
    fresh.rmdir()


def save_checkpoint(model, path: Path):
    """Weights along the way, in 8 bits: each row of a matrix as int8 with an fp16 scale (name + ".scale"), the rest as fp16."""
    tensors = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":  # tied to the embedding
            continue
        if value.ndim == 2:
            scale = value.abs().amax(1, keepdim=True) / 127
            tensors[f"{name}.scale"] = scale.half()
            tensors[name] = (value / tensors[f"{name}.scale"].float().clamp(min=1e-12)).round().clamp(-127, 127).char()
        else:
            tensors[name] = value.half()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    path.chmod(0o644)


def table(model, tokenizer, rows: dict[str, list[dict]], limit: int = 60) -> str:
    """Accuracy of each task on test and ood, on a few rows."""
    cells = []
    for name, candidates in rows.items():
        if "clean" not in candidates[0]:
            continue
        for split in ("test", "ood"):
            some = [row for row in candidates if row["split"] == split]
            some = random.Random(0).sample(some, min(limit, len(some)))
            if not some:
                continue
            right = among(model, tokenizer, some)[0] if "right" in some[0] else accuracy(model, tokenizer, some)
            cells.append(f"{name}/{split} {right.mean():.2f}")
    return "  ".join(cells)


class Trainer:
    """Model, optimizers and the log of a training."""

    def __init__(self, model, compiled: bool, out: Path, rows: dict):
        self.model, self.forward, self.out, self.rows = model, torch.compile(model) if compiled else model, out, rows
        self.start, self.step, self.seen = time.time(), 0, 0

    def run(self, data, part: str, steps: int, tokenizer) -> None:
        """So many steps with fresh optimizers; the rate warms up over 100 steps and falls to 2 % of its peak as a cosine."""
        layers = [p for name, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in self.model.named_parameters() if p.ndim != 2 or "embed" in name]
        muon, adam = Muon(layers), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0)
        losses = []
        for step in range(1, steps + 1):
            self.step += 1
            scale = PEAKS[part] * min(1, step / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            tokens, targets, positions, owner = (x.to(self.model.device) for x in next(data))
            with torch.autocast(self.model.device.type, torch.bfloat16):
                logits = self.forward(
                    input_ids=tokens, position_ids=positions, attention_mask=masks(owner), use_cache=False
                ).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            muon.step(0.02 * scale)
            adam.param_groups[0]["lr"] = 3e-3 * scale
            adam.step()
            self.model.zero_grad()
            self.seen += (tokens != PAD).sum()
            losses = [*losses[-49:], loss.detach()]  # looked at now and then: each look waits for a GPU
            if step % 50 == 0:
                minutes, mean, millions = (
                    (time.time() - self.start) / 60,
                    torch.stack(losses).mean(),
                    int(self.seen) / 1e6,
                )
                print(f"step {self.step} loss {mean:.3f} tokens {millions:.2f} M minutes {minutes:.1f}", flush=True)
            if part == PARTS[0] and step in CHECKPOINTS:
                save_checkpoint(self.model, self.out / "checkpoints" / f"step{self.step}.safetensors")
            if step % max(1, steps // 10) == 0 or step == steps:
                print(table(self.model, tokenizer, self.rows), flush=True)
                export(self.model, tokenizer, self.out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=3, default=(8000, 2200, 4000), metavar=("LEARN", "POLISH", "FINISH"),
                        help="of the three parts; in the later ones what is hard comes more often")  # fmt: skip
    parser.add_argument("--start", type=Path, help="a model of this script to go on from, with --steps 0 0 N")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "course")
    parser.add_argument("--threads", type=int, default=1, help="two are not repeatable to the last bit")
    parser.add_argument("--compile", action="store_true", help="compile the model: a minute first, then faster")
    parser.add_argument("--device", default="cpu", help="cuda is eight times as fast, but no run is like another")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    model, ids = build_model(len(tokenizer)).to(args.device), tokenizer.get_vocab()
    model.set_attn_implementation("eager")  # for training: twice as fast as sdpa's backward pass on a CPU
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} words", flush=True)
    trainer = Trainer(model, args.compile, args.out, tasks(args.seed))
    for number, (part, steps) in enumerate(zip(PARTS, args.steps, strict=True)):
        if not steps:
            continue
        if part != PARTS[0]:  # from the stored half-precision weights, so that it can also be done later
            stored = load_file((args.start or args.out) / "model.safetensors")
            model.load_state_dict({name: value.float() for name, value in stored.items()}, strict=False)
            args.start = None
        workers = int(args.device != "cpu")  # beside a GPU batches are made by a process of their own
        data = DataLoader(Stream(args.seed + number, part, ids), batch_size=None, num_workers=workers)
        trainer.run(iter(data), part, steps, tokenizer)


if __name__ == "__main__":
    main()
