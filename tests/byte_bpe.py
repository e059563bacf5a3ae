"""A GPT-2-style model with a byte-level BPE tokenizer, made from scratch in seconds.

It stands in for "your own model" in the tests: words begin with a space, rare words are cut into several tokens, and
there is no beginning-of-sequence token. It has learnt indirect objects among a few names.

    python tests/byte_bpe.py FOLDER
"""

import itertools
import sys

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

NAMES = ["john", "nora", "alice", "tom", "lucy", "peter"]
TEMPLATES = ["when {a} and {b} went to the {place} , {s} gave the {thing} to",
             "then {a} and {b} had a walk in the {place} , and {s} gave a {thing} to"]  # fmt: skip
PLACES, THINGS = ["store", "park", "school"], ["book", "ball", "drink"]
RARE = "a hippopotamus and an encyclopedia are words of several tokens"


def sentences(rng: torch.Generator, n: int) -> list[str]:
    """Whole sentences: the name that was not repeated gets the thing."""

    def pick(items):
        return items[int(torch.randint(len(items), (1,), generator=rng))]

    found, orders = [], list(itertools.permutations(NAMES, 2))
    for _ in range(n):
        (a, b), template = pick(orders), pick(TEMPLATES)
        s = pick([a, b])
        text = template.format(a=a, b=b, s=s, place=pick(PLACES), thing=pick(THINGS))
        found.append(f"{text} {a if s == b else b}")
    return found


def build(folder) -> float:
    """Train and save model and tokenizer; returns the share of right last names on new sentences.

    Now and then so small a model does not find out that names repeat; then the next seed is tried.
    """
    for seed in range(1, 6):
        accuracy = _train(folder, 800, seed)
        if accuracy > 0.9:
            break
    return accuracy


def _train(folder, steps: int, seed: int) -> float:
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator([*sentences(rng, 2000), RARE], vocab_size=420, min_frequency=20, show_progress=False,
                            special_tokens=["<|endoftext|>"])  # fmt: skip
    tokenizer = GPT2TokenizerFast(tokenizer_object=raw._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>",
                                  unk_token="<|endoftext|>")  # fmt: skip
    size = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **size)
    config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        ids, last = _batch(tokenizer, sentences(rng, 32))
        logits = model(ids).logits[:, :-1]
        everything = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
        rows = torch.arange(len(ids))
        names = torch.nn.functional.cross_entropy(logits[rows, last - 1], ids[rows, last])
        optimizer.zero_grad()
        (0.2 * everything + names).backward()
        optimizer.step()
        if names < 0.01:
            break
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids, last = _batch(tokenizer, sentences(rng, 200))
    rows = torch.arange(len(ids))
    with torch.no_grad():
        return (model(ids).logits[rows, last - 1].argmax(-1) == ids[rows, last]).float().mean().item()


def _batch(tokenizer, texts) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [tokenizer(text).input_ids for text in texts]
    block = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    for row, one in enumerate(ids):
        block[row, : len(one)] = torch.tensor(one)
    return block, torch.tensor([len(one) - 1 for one in ids])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"accuracy on new sentences: {build(sys.argv[1]):.3f}")
