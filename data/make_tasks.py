"""Writes the task files tasks/NAME.jsonl from the small world, the same for the same seed.

    python make_tasks.py --seed 0

Example row of a pair task (capital.jsonl):
    {"clean": "the capital of france is", "corrupted": "the capital of japan is", "answer": "paris", "foil": "tokyo",
     "template": "the capital of {subject} is", "entity": "france", "split": "fit", "spans": {"subject": [15, 21], ...}}
Splits: fit (trained combinations), select and test (held out of training), ood (held out, in templates never trained).
"""

import argparse
import json
import random
from pathlib import Path

from grammar import patterns, tasks

HERE = Path(__file__).parent
ROWS = {"fit": 120, "select": 60, "test": 120, "ood": 120}


def check(rows: list[dict]) -> None:
    """Every word is known, clean and corrupted are equally long and differ, answers are one word, spans hold words."""
    known = set(patterns.Induction.vocabulary)
    for row in rows:
        for column in ("text", "clean", "corrupted"):
            unknown = set(row.get(column, "").split()) - known
            assert not unknown, (unknown, row)
        if "clean" in row:
            clean, corrupted = row["clean"].split(), row["corrupted"].split()
            assert len(clean) == len(corrupted) and clean != corrupted, row
            assert {row["answer"], row["foil"]} <= known and row["answer"] != row["foil"], row
            for start, end in row["spans"].values():
                assert f" {row['clean']} "[start] == " " == f" {row['clean']} "[end + 1], row


def select(rows: list[dict], seed: int) -> list[dict]:
    """At most as many rows of each split as ROWS says. Rows of a labelled task stay together in groups of one prompt."""
    size = len({row["label"] for row in rows}) if "label" in rows[0] else 1
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    unique = list({json.dumps(group[0], sort_keys=True): group for group in groups}.values())
    chosen = []
    for split, number in ROWS.items():
        some = [group for group in unique if group[0]["split"] == split]
        some = random.Random(f"{seed} {split}").sample(some, min(len(some), number // size))
        chosen += [row for group in some for row in group]
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "tasks")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    for name, rows in tasks(args.seed).items():
        rows = select(rows, args.seed)
        check(rows)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts = ", ".join(f"{split} {sum(row['split'] == split for row in rows)}" for split in ROWS)
        print(f"{name}: {len(rows)} rows ({counts})")


if __name__ == "__main__":
    main()
