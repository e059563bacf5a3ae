"""The eight applications over several seeds: what was claimed, what was measured, beside its control and its cost.

    python data/applications/safety.py         measures one application for seeds 0, 1, 2 and writes safety.csv
    python data/applications/lines.py          prints the table of the eight from those files; --write puts it into README

A script of this folder has `run(model, seed)`, which yields lines; what differs between seeds is which rows of `fit` are
used, every random draw, and the order in training.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
START, END = "<!-- applications: python data/applications/lines.py --write -->", "<!-- end of applications -->"
COLUMNS = ["claim", "headline", "object", "locate", "steer", "seed", "split", "metric", "before", "after", "change", "ci_lo",
           "ci_hi", "control", "control_after", "collateral", "aim", "reached", "n"]  # fmt: skip
ORDER = ("safety", "fairness", "persona", "multilingualism", "knowledge", "reasoning", "training", "inference")


def line(claim: str, *, seed: int, split: str, metric: str, before: float, after: float, change: float, ci_lo: float, ci_hi: float,
         control: str, control_after: float, aim: str, reached: str, n: int, object: str = "", locate: str = "", steer: str = "",
         collateral: str = "", headline: bool = False) -> dict:  # fmt: skip
    """One measured claim on one split with one seed.

    Args:
        claim: in words, such as "over-refusal down"; the same for all its seeds and splits.
        headline: the line that stands for the application in README (one claim for each application).
        object, locate, steer: the component and the two calls, such as "resid_post.5@-1", "magnitude.contrast".
        before, after, change, ci_lo, ci_hi: of `metric`; the interval is of `change`.
        control: the best control's name, control_after: what it reaches in the same metric.
        collateral: the worst guard in words, such as "persona -.33, background +.003 nats".
        aim: what was to be reached, such as "-70 %, guards within a point"; reached: "yes", "no" or "unclear".
    """
    if reached not in ("yes", "no", "unclear"):
        raise ValueError(f"reached is 'yes', 'no' or 'unclear', not {reached!r}.")
    given = locals()
    return {name: given[name] for name in COLUMNS}


def main(run, name: str) -> None:
    """The command of one script: seeds, then the file beside it."""
    import workbench as wb

    parser = argparse.ArgumentParser(description=f"Measures {name} over seeds and writes {name}.csv.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default=HERE / f"{name}.csv")
    args, rows, start = parser.parse_args(), [], time.time()
    model = wb.load("course")
    for seed in range(args.seeds):
        rows += list(run(model, seed))
        print(f"seed {seed}: {len(rows)} lines, {time.time() - start:.0f} s", file=sys.stderr)
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.to_csv(args.out, index=False, float_format="%.4f")
    print(
        table[["claim", "seed", "split", "before", "after", "ci_lo", "ci_hi", "control_after", "reached"]].to_string(
            index=False
        )
    )


def tables() -> str:
    """One row for each application: its headline, over all its seeds."""
    rows = ["| application: claim | object | locate | steer | measure | test | ood | best control (ood) | cost elsewhere | aim | reached |",
            "|---|---|---|---|---|---|---|---|---|---|:-:|"]  # fmt: skip
    for name in ORDER:
        path = HERE / f"{name}.csv"
        if not path.exists():
            continue
        found = pd.read_csv(path, keep_default_na=False, na_values=["", "nan"])
        own = found[found.headline].astype({"collateral": object})
        first, parts = own.iloc[0], {split: part for split, part in own.groupby("split")}
        ood = parts.get("ood", own)
        costs, falls = ood.collateral.dropna(), ood.after.mean() < ood.before.mean() - 0.05  # the less, the better
        best = ood.loc[ood.control_after.idxmin() if falls else ood.control_after.idxmax()]
        rows.append(f"| **{name}**: {first.claim} | {_code(first.object)} | {_code(first.locate)} | {_code(first.steer)} | {_escaped(first.metric)} | "
                    f"{_moved(parts.get('test'))} | {_moved(parts.get('ood'))} | {best.control_after:.2f} ({best.control}) | "
                    f"{costs.iloc[0] if len(costs) else '–'} | {first.aim} | {_reached(own)} |")  # fmt: skip
    return "\n".join(rows)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _moved(part) -> str:
    """Means over seeds, and the widest interval of the change."""
    if part is None:
        return "–"
    return f"{part.before.mean():.2f} → {part.after.mean():.2f} [{part.ci_lo.min():+.2f}, {part.ci_hi.max():+.2f}]"


def _reached(own) -> str:
    """The word, or how many of the seeds and splits say which."""
    counts = own.reached.value_counts()
    said = [word for word in ("yes", "unclear", "no") if word in counts]
    return said[0] if len(said) == 1 else ", ".join(f"{counts[word]} {word}" for word in said)


def _code(text) -> str:
    return f"`{text}`" if isinstance(text, str) and text else "–"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md")
    if not parser.parse_args().write:
        print(tables())
        sys.exit()
    before, rest = README.read_text(encoding="utf-8").split(START)
    README.write_text(f"{before}{START}\n{tables()}\n{END}{rest.split(END)[1]}", encoding="utf-8")
