"""What an evaluation returns: target and guards before and after, beside their controls."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from workbench import storage
from workbench.measure import share_bound


@dataclass(frozen=True)
class Aim:
    """What a target is judged by.

    Attributes:
        metrics: what is measured on the target, the one that decides first. moved: what tells, prompt by prompt, which way
            it went, and chooses the best random control.
        better: 1 where more is better, -1 where less is. claim: that it got better. said: the metric before its figures.
    """

    metrics: tuple[str, ...]
    moved: str
    better: int
    claim: str
    said: str = ""

    @property
    def metric(self) -> str:
        return self.metrics[0]


AIMS = {
    "answer": Aim(("accuracy", "logit_diff"), "logit_diff", 1, "helps"),
    "even": Aim(("gap", "mass", "logit_diff"), "gap", -1, "narrows the gap", "gap "),
}
FULL = "full tuning"  # a control to compare with, that need not be beaten


@dataclass(frozen=True, eq=False)
class Report:
    """Did it help, and what did it cost?

    Attributes:
        name: of the recipe.
        frame: arm, role, task, split, metric, before, after, change, ci_lo, ci_hi, n (p95, p99 for KL; wrong_way for the
            logit difference: the share of prompts that were moved away from the answer; for the gap: of those that became
            more uneven, and relative, relative_lo, relative_hi: its change as a share of the mean gap before). The arm
            "recipe" is the change itself, the others are its controls.
        against: on the target, recipe minus control, paired, with intervals.
        examples: every prompt of every task, before and after (for texts, means over its tokens).
        settings: aim, seed, draws, tolerances; missing: tuning controls that did not succeed, and why.
    """

    name: str
    frame: pd.DataFrame
    against: pd.DataFrame
    examples: pd.DataFrame
    settings: dict

    @property
    def aim(self) -> Aim:
        return AIMS[self.settings.get("aim", "answer")]

    def row(self, task: str | None = None, split: str = "ood", metric: str | None = None, arm: str = "recipe") -> dict:
        """One line of the table; by default the target's, and what the task is judged by: accuracy, the gap of a target that
        should become even, the probability of an answer that should be still, the loss of texts.

        Raises:
            KeyError: when there is none.
        """
        table = self.frame[(self.frame.arm == arm) & (self.frame.split == split)]
        table = table[table.role == "target"] if task is None else table[table.task == task]
        table = table if metric is None else table[table.metric == metric]
        if table.empty:
            raise KeyError(f"No line for task {task!r}, split {split!r}, metric {metric!r}, arm {arm!r}.")
        return table.iloc[0].to_dict()

    @property
    def checks(self) -> pd.DataFrame:
        """Which claims hold? claim, task, split, holds ("yes", "no" or "unclear"), why.

        helps: the accuracy on the target rises, its interval clear of zero. narrows the gap (in its place, with aim="even"):
        the mean |logit difference| falls, its interval clear of zero. beats controls: and it is better than every control,
        its interval clear of zero (full tuning is named beside them, and need not be beaten). keeps mass: where odds are made
        even, answer and foil together lose no more probability than the tolerance or, where they have little, a tenth of it:
        a mere flattening narrows every gap.
        keeps accuracy: by Clopper-Pearson, the share of prompts that were right and no longer are is within the tolerance.
        keeps margin: the interval of the logit difference's change is within its share of the margin. keeps probability: the
        interval of its change is within the tolerance on both sides. keeps loss: the interval of the loss is within its
        tolerance. "no" is a change beyond the tolerance whose interval is clear of zero; between the two, more prompts are
        needed to say.
        """
        own = self.frame[self.frame.arm == "recipe"]
        found = [_check(self, row) for _, row in own.iterrows()]
        rows = [line for lines in found for line in lines]
        return pd.DataFrame(rows, columns=["claim", "role", "task", "split", "holds", "why"])

    @property
    def accepted(self) -> bool:
        """Whether it helps on every split, beyond every control, and no guard is broken."""
        checks = self.checks
        return bool((checks[checks.role == "target"].holds == "yes").all() and (checks.holds != "no").all())

    @property
    def verdict(self) -> str:
        """In words: does it help, the target on each split, the best control, and every guard."""
        checks = self.checks
        failed = checks[(checks.role == "target") & (checks.holds != "yes")]
        broken = checks[(checks.role == "guard") & (checks.holds == "no")]
        open_ = checks[(checks.role == "guard") & (checks.holds == "unclear") & ~checks.task.isin(broken.task)]
        said = "; ".join(f"{row.claim} on {row.task} ({row.split}): {row.holds}" for _, row in failed.iterrows())
        beyond = (
            "beyond every control"
            if (checks.claim == "beats controls").any()
            else "and no control was drawn to compare with"
        )
        first = [f"NOT shown to help: {said}." if said else f"It {self.aim.claim}, {beyond}."]
        harm = {what: list(dict.fromkeys(broken[broken.claim == f"keeps {what}"].task))
                for what in ("accuracy", "margin", "probability", "loss")}  # fmt: skip
        harm["margin"] = [task for task in harm["margin"] if task not in harm["accuracy"]]
        lost = "; ".join(f"{', '.join(tasks)} (in {what})" for what, tasks in harm.items() if tasks)
        first.append(f"It HARMS {lost}." if lost else "No guard is broken.")
        if len(open_):
            first.append(f"Open, for want of prompts: {', '.join(dict.fromkeys(open_.task))}.")
        lines = [" ".join(first)]
        for (role, task, split), part in checks.groupby(["role", "task", "split"], sort=False):
            head = f"{task} ({split})" if role == "target" else f"guard {task} ({split})"
            lines.append(f"{head}: {'; '.join(part.why)}")
        if not (self.frame.metric == "kl").any():
            lines.append("no background text was measured: give a task of plain texts among the guards")
        lines += [f"control {name} is missing: {why}" for name, why in self.settings.get("missing", {}).items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        target = self.frame[(self.frame.role == "target") & (self.frame.metric == self.aim.metric)]
        moves = ", ".join(f"{row.split} {self.aim.said}{row.before:.2f} -> {row.after:.2f}" for _, row in
                          target[target.arm == "recipe"].iterrows())  # fmt: skip
        return f"Report({self.name} on {target.task.iloc[0]}: {moves})"

    def __str__(self) -> str:
        return f"{self!r}\n{self.verdict}"

    def plot(self):
        """A forest plot of every change beside its controls, as a matplotlib figure."""
        from workbench.plot import forest

        return forest(self)

    def html(self, path) -> Path:
        """Write everything into one HTML file that needs nothing from the network: verdict, picture, tables."""
        import base64
        import html

        from workbench.plot import png

        def table(frame) -> str:
            return frame.to_html(index=False, float_format=lambda x: f"{x:.4g}", border=0, na_rep="")

        words = "".join(f"<li>{html.escape(line)}</li>" for line in self.verdict.splitlines())
        picture = base64.b64encode(png(self.plot())).decode()
        parts = [("What was claimed", self.checks), ("Before and after", self.frame), ("Against the controls", self.against),
                 ("Every prompt", self.examples)]  # fmt: skip
        tables = "".join(f"<details{' open' if i < 3 else ''}><summary>{name}</summary>{table(frame)}</details>"
                         for i, (name, frame) in enumerate(parts))  # fmt: skip
        text = (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self.name)}</title><style>{STYLE}</style>'
                f'<h1>{html.escape(self.name)}</h1><ul>{words}</ul>'
                f'<img alt="changes with intervals, recipe and controls" src="data:image/png;base64,{picture}">{tables}'
                f'<p>{html.escape(json.dumps(self.settings))}</p></html>')  # fmt: skip
        Path(path).write_text(text, encoding="utf-8")
        return Path(path)

    def save(self, folder) -> Path:
        """Write `report.json` and its three tables as CSV: all of it, or nothing."""
        about = {"name": self.name, "settings": self.settings, "verdict": self.verdict.splitlines()}
        return storage.write(folder, {f"{name}.csv": getattr(self, name) for name in TABLES} | {"report.json": about})

    @classmethod
    def load(cls, folder) -> Report:
        """Read a report back.

        Raises:
            FileNotFoundError: when `folder` holds none.
            ValueError: for a report of a newer version.
        """
        about = storage.read(cls, folder, "report.json")
        tables = {name: pd.read_csv(Path(folder) / f"{name}.csv") for name in TABLES}
        return cls(about["name"], settings=about["settings"], **tables)


TABLES = ("frame", "against", "examples")
TOLERANCES = {"accuracy": 0.05, "margin": 0.1, "loss": 0.02, "probability": 0.02}  # what may go and still count as kept
STYLE = ("body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222831}img{max-width:100%}"
         "table{border-collapse:collapse;font-size:13px}td,th{padding:.15em .7em;text-align:right;border-bottom:1px solid #ddd}"
         "summary{cursor:pointer;font-weight:600;margin:1em 0 .3em}@media(prefers-color-scheme:dark){body{background:#1b1e23;"
         "color:#e6e6e6}img{background:#fff}td,th{border-color:#444}}")  # fmt: skip


def _check(report: Report, row) -> list[tuple]:
    """The claims that one line of the table settles."""
    tolerances, aim = TOLERANCES | report.settings.get("tolerances", {}), report.aim
    place, moved = (row.role, row.task, row.split), f"{row.before:.2f} -> {row.after:.2f}, {_change(row)}"
    if row.role == "target":
        found = []
        if row.metric == aim.metric:
            full = report.against[(report.against.split == row.split) & (report.against.metric == row.metric)]
            full = full[full.control == FULL].control_after
            beside = "".join(f"; {FULL} {after:.2f}" for after in full)
            found.append((aim.claim, *place, _sign(*_better(row, aim)), f"{aim.said}{moved}{_relative(row)}{beside}"))
            found += _beaten(report, row, place)
        if row.metric == aim.moved:
            right = "yes" if aim.better * row.change > 0 else "no"
            found.append(("moves the right way", *place, right, f"{row.wrong_way:.0%} of prompts moved the wrong way"))
        if row.metric == "mass":
            allowed = min(
                tolerances["probability"], 0.1 * row.before
            )  # a small mass can be lost whole within any tolerance
            holds = "yes" if row.ci_lo >= -allowed else "no" if row.change < -allowed and row.ci_hi < 0 else "unclear"
            said = f"answer or foil {row.before:.3f} -> {row.after:.3f}, {_change(row, 3)}"
            found.append(("keeps mass", *place, holds, said))
        return found
    if row.metric == "prob":
        allowed = tolerances["probability"]
        clear = abs(row.change) > allowed and (row.ci_lo > 0 or row.ci_hi < 0)
        holds = "yes" if -allowed <= row.ci_lo and row.ci_hi <= allowed else "no" if clear else "unclear"
        each = _each(report, row)
        alone = f"single prompts by {(each.after - each.before).abs().mean():.2f}"  # what a mean may cancel
        said = f"probability {row.before:.2f} -> {row.after:.2f}, {_change(row, 3)}, {alone}"
        return [("keeps probability", *place, holds, said)]
    if row.role == "guard" and row.metric == "accuracy":
        each = _each(report, row)
        lost = int(((each.before > 0.5) & (each.after < 0.5)).sum())
        low, high = share_bound(lost, len(each))
        allowed = tolerances["accuracy"]
        broken = low > allowed or (row.change < -allowed and row.ci_hi < 0)
        holds = "no" if broken else "yes" if high <= allowed else "unclear"
        return [("keeps accuracy", *place, holds, f"{moved}, {lost} of {len(each)} lost")]
    if row.role == "guard" and row.metric == "logit_diff" and row.before > 0:
        share, low, high = (x / row.before for x in (row.change, row.ci_lo, row.ci_hi))
        allowed = -tolerances["margin"]
        holds = "yes" if low >= allowed else "no" if share < allowed and high < 0 else "unclear"
        return [("keeps margin", *place, holds, f"margin {share:+.0%} [{low:+.0%}, {high:+.0%}]")]
    if row.metric == "loss":
        kl = report.row(row.task, row.split, "kl")
        allowed = tolerances["loss"]
        holds = "yes" if row.ci_hi <= allowed else "no" if row.change > allowed and row.ci_lo > 0 else "unclear"
        return [("keeps loss", *place, holds, f"loss {row.change:+.3f} nats per token, KL {kl['after']:.4f} (p99 {kl['p99']:.3f})")]  # fmt: skip
    return []


def _each(report: Report, row) -> pd.DataFrame:
    """The prompts behind one line of the table."""
    each = report.examples[report.examples.arm == row.arm]
    return each[(each.task == row.task) & (each.split == row.split) & (each.metric == row.metric)]


def _beaten(report: Report, row, place: tuple) -> list[tuple]:
    """The claim against the controls, by what decides on the target; full tuning is named beside them."""
    aim, against = report.aim, report.against[report.against.control != FULL]
    beaten = against[(against.split == row.split) & (against.metric == row.metric)]
    if beaten.empty:
        return []
    best = beaten.loc[(aim.better * beaten.difference).idxmin()]
    clear = _sign(*(side.min() for side in _better(beaten, aim)))
    word = "clear of every control" if clear == "yes" else "NOT clear of its controls"
    word = "too few prompts for an interval" if beaten.ci_lo.isna().any() else word
    said = f"best control {best.control_after:.2f} ({best.control}), {word}"
    return [("beats controls", *place, clear, said)]


def _better(row, aim: Aim) -> tuple:
    """The interval, with what is better upwards; of one line or of each line of a table."""
    return (row.ci_lo, row.ci_hi) if aim.better > 0 else (-row.ci_hi, -row.ci_lo)


def _sign(low: float, high: float) -> str:
    return "yes" if low > 0 else "no" if high <= 0 else "unclear"


def _change(row, digits: int = 2) -> str:
    interval = "" if row.ci_lo != row.ci_lo else f" [{row.ci_lo:+.{digits}f}, {row.ci_hi:+.{digits}f}]"
    return f"change {row.change:+.{digits}f}{interval}"


def _relative(row) -> str:
    """The change as a share of what there was, for metrics that have one."""
    share, low, high = (row.get(name, float("nan")) for name in ("relative", "relative_lo", "relative_hi"))
    interval = "" if low != low else f" [{low:+.0%}, {high:+.0%}]"
    return "" if share != share else f", relative {share:+.0%}{interval}"
