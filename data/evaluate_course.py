"""Measures the bundled model on the task files, with plain transformers code, and prints the table of the card.

    python evaluate_course.py                (Markdown; add --split fit to see what was trained)

Columns: how often the answer is the most probable next word after the clean prompt, the foil after the corrupted one,
and, for rows with a "completion" (the whole right reply), how often greedy decoding gives exactly that. Where many words are
right (rows with "right", such as greater-than) any of them counts, and the second figure is the probability of all of them.
Tasks for other models are left out.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent


@torch.no_grad()
def last_logits(model, tokenizer, texts: list[str], batch: int = 50) -> torch.Tensor:
    """The logits after each text, [text, d_vocab]. Texts are padded on the right, which changes nothing before it."""
    found = []
    for start in range(0, len(texts), batch):
        ids = [tokenizer(text).input_ids for text in texts[start : start + batch]]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
        ends = torch.tensor([len(row) - 1 for row in ids])
        found.append(model(input_ids=padded.to(model.device)).logits.cpu()[torch.arange(len(ids)), ends].float())
    return torch.cat(found)


def accuracy(model, tokenizer, rows: list[dict], prompt: str = "clean", right: str = "answer") -> torch.Tensor:
    """1 where the right word is the most probable next word, else 0; [row]."""
    answers = torch.tensor([tokenizer.convert_tokens_to_ids(row[right]) for row in rows])
    return (last_logits(model, tokenizer, [row[prompt] for row in rows]).argmax(-1) == answers).float()


def among(model, tokenizer, rows: list[dict]) -> torch.Tensor:
    """Whether the most probable word is one of the right ones, and the probability of the right ones; [2, row]."""
    found = []
    for row, logits in zip(rows, last_logits(model, tokenizer, [row["clean"] for row in rows]), strict=True):
        right = tokenizer.convert_tokens_to_ids(row["right"])
        found.append([float(logits.argmax().item() in right), logits.softmax(-1)[right].sum().item()])
    return torch.tensor(found).T


@torch.no_grad()
def exact(model, tokenizer, rows: list[dict]) -> torch.Tensor:
    """1 where greedy decoding gives the whole completion, else 0; [row]. Each wanted word must be the most probable."""
    right = []
    for row in rows:
        prompt = tokenizer(row["clean"]).input_ids
        whole = torch.tensor([*prompt, *tokenizer(row["completion"], add_special_tokens=False).input_ids])
        predicted = model(input_ids=whole[None]).logits[0].argmax(-1)
        right.append(float(torch.equal(predicted[len(prompt) - 1 : -1], whole[len(prompt) :])))
    return torch.tensor(right)


@torch.no_grad()
def loss(model, tokenizer, rows: list[dict]) -> float:
    """Mean cross-entropy per word, in nats."""
    total, count = 0.0, 0
    for row in rows:
        ids = tokenizer(row["text"], return_tensors="pt").input_ids
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def measure(model, tokenizer, rows: list[dict]) -> str:
    """The cell of one task and split."""
    if not rows:
        return "-"
    if "label" in rows[0]:
        return f"{len({row['label'] for row in rows})} labels ({len(rows)})"
    if "text" in rows[0]:
        return f"{loss(model, tokenizer, rows):.2f} nats ({len(rows)})"
    if "right" in rows[0]:
        return " / ".join(f"{c.mean():.3f}" for c in among(model, tokenizer, rows)) + f" ({len(rows)})"
    cells = [accuracy(model, tokenizer, rows), accuracy(model, tokenizer, rows, "corrupted", "foil")]
    if "completion" in rows[0]:
        cells.append(exact(model, tokenizer, rows))
    return " / ".join(f"{c.mean():.3f}" for c in cells) + f" ({len(rows)})"


def example(row: dict) -> str:
    """One row, for the table."""
    if "label" in row:
        return f"`{row['text']}` {row['label']}"
    return f"`{row['text']}`" if "text" in row else f"`{row['clean']}` {row['answer']} ({row['foil']})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=HERE / "course")
    parser.add_argument("--split", action="append", help="instead of test and ood")
    args = parser.parse_args()
    splits = args.split or ["test", "ood"]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    print(f"| task | prompt, answer (foil) | {' | '.join(splits)} |\n|---|---|{'---|' * len(splits)}")
    for path in sorted((HERE / "tasks").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if (
            path.stem == "modular_addition"
            or tokenizer.unk_token_id in tokenizer(rows[0].get("clean", rows[0].get("text"))).input_ids
        ):
            continue
        cells = [measure(model, tokenizer, [row for row in rows if row["split"] == split]) for split in splits]
        first = min(rows[:20], key=lambda row: len(row.get("clean", row.get("text"))))
        print(f"| {path.stem} | {example(first)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
