"""What an evaluation returns: target and guards before and after, beside their controls."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd


@dataclass(frozen=True, eq=False)
class Report:
    """Did it help, and what did it cost?

    Attributes:
        name: of the recipe.
        frame: arm, role, task, split, metric, before, after, change, ci_lo, ci_hi, n (p95, p99 for KL). The arm
            "recipe" is the change itself, the others are its controls.
        against: on the target, recipe minus control, paired, with intervals.
        examples: every prompt of every task of pairs, before and after.
        settings: seed and draws.
    """

    name: str
    frame: pd.DataFrame
    against: pd.DataFrame
    examples: pd.DataFrame
    settings: dict

    def row(self, task: str | None = None, split: str = "ood", metric: str = "accuracy", arm: str = "recipe") -> dict:
        """One line of the table; the target's by default.

        Raises:
            KeyError: when there is none.
        """
        table = self.frame[(self.frame.arm == arm) & (self.frame.split == split) & (self.frame.metric == metric)]
        table = table[table.role == "target"] if task is None else table[table.task == task]
        if table.empty:
            raise KeyError(f"No line for task {task!r}, split {split!r}, metric {metric!r}, arm {arm!r}.")
        return table.iloc[0].to_dict()

    @property
    def verdict(self) -> str:
        """In words: the target on each split, the best control, and every guard."""
        lines = []
        own = self.frame[(self.frame.arm == "recipe") & (self.frame.metric == "accuracy")]
        for _, row in own[own.role == "target"].iterrows():
            beaten = self.against[(self.against.split == row.split) & (self.against.metric == "accuracy")]
            clear = bool(len(beaten)) and bool((beaten.ci_lo > 0).all())
            worst = f"{beaten.control_after.max():.2f}" if len(beaten) else "not run"
            word = "clear of every control" if clear else "NOT clear of its controls"
            word = "too few prompts for an interval" if beaten.ci_lo.isna().any() else word
            lines.append(f"{row.task} ({row.split}): {row.before:.2f} -> {row.after:.2f}, {_change(row)}; "
                         f"best control {worst}, {word}")  # fmt: skip
        for _, row in own[own.role == "guard"].iterrows():
            lines.append(f"guard {row.task} ({row.split}): {row.before:.2f} -> {row.after:.2f}, {_change(row)}")
        for _, row in self.frame[(self.frame.arm == "recipe") & (self.frame.metric == "kl")].iterrows():
            loss = self.row(row.task, row.split, "loss")
            lines.append(f"guard {row.task} ({row.split}): loss {loss['change']:+.3f} nats per token, KL {row.after:.4f} "
                         f"(p99 {row.p99:.3f})")  # fmt: skip
        return "\n".join(lines)

    def __repr__(self) -> str:
        target = self.frame[(self.frame.role == "target") & (self.frame.metric == "accuracy")]
        moves = ", ".join(f"{row.split} {row.before:.2f} -> {row.after:.2f}" for _, row in
                          target[target.arm == "recipe"].iterrows())  # fmt: skip
        return f"Report({self.name} on {target.task.iloc[0]}: {moves})"

    def __str__(self) -> str:
        return f"{self!r}\n{self.verdict}"

    def plot(self):
        """A forest plot of every change beside its controls, as a matplotlib figure."""
        from workbench.plot import forest

        return forest(self)

    def save(self, folder) -> Path:
        """Write `report.json` and its three tables as CSV."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            getattr(self, name).to_csv(folder / f"{name}.csv", index=False)
        about = {"name": self.name, "settings": self.settings, "verdict": self.verdict.splitlines()}
        (folder / "report.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder) -> Report:
        """Read a report back.

        Raises:
            FileNotFoundError: when `folder` holds none.
        """
        folder = Path(folder)
        if not (folder / "report.json").is_file():
            raise FileNotFoundError(f"{folder} holds no report.json. Report.load takes the folder that save() wrote.")
        about = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        tables = {name: pd.read_csv(folder / f"{name}.csv") for name in TABLES}
        return cls(about["name"], settings=about["settings"], **tables)


TABLES = ("frame", "against", "examples")


def _change(row) -> str:
    interval = "" if row.ci_lo != row.ci_lo else f" [{row.ci_lo:+.2f}, {row.ci_hi:+.2f}]"
    return f"change {row.change:+.2f}{interval}"
