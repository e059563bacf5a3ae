"""Exercises of notebooks 20 to 22: steering."""

from __future__ import annotations


def _change_of_persona(model, change) -> float:
    """Mean change of the logit difference on persona (test)."""
    from workbench.task import Task

    task = Task.load("persona").split("test")
    return float((task.score(model, change) - task.score(model)).mean())


def _best_places(by_place: dict) -> list[str]:
    """The places whose columns sum to the most."""
    sums = {place: sum(row.values()) for place, row in by_place.items() if place != "untouched"}
    return [place for place in sums if sums[place] > max(sums.values()) - 1e-6]


# exercise -> (is the answer right?, what to say when it is, a hint when it is not); the live values follow the answer
CHECKS = {
    "20.heads": (
        lambda answer, rows: (
            answer == min((k for k, who in rows if who == "strongest" and rows[k, who]["cheer"] >= 0.9), default=None)
        ),
        "Fewer leave the habit, and every further one may cost something else.",
        "The first row of the table whose cheer, under 'strongest', is 0.90 or more; its number stands at the left.",
    ),
    "20.dose": (
        lambda answer, doses: answer == max(doses, key=lambda f: doses[f]["cheer"] + doses[f]["persona"]),
        "There the habit is nearly gone, and the skill mostly kept.",
        "Add cheer and persona of the neurons in each row, and take the row with the largest sum.",
    ),
    "20.shared": (
        lambda answer, table: int(answer) == int(table["above its null"].sum()),
        "The fault and the skill are read by the same neurons.",
        "Count the rows of the table with True.",
    ),
    "21.zero": (
        lambda answer, table: abs(float(answer) - -table.harmless[6] / (table.harmful[6] - table.harmless[6])) < 0.01,
        "Zero is neither side's place: projecting out moves everybody there.",
        "Minus the harmless mean, divided by (harmful - harmless), from the row of layer 6.",
    ),
    "21.both": (
        lambda answer, table: int(answer) == int((table[["helpful", "person_city"]] >= 0.85).all(axis=1).sum()),
        "Count what is wanted and what must stay in the same rows.",
        "Count the rows of the left half in which both columns are 0.85 or more.",
    ),
    "21.gate": (
        lambda answer, model, change, gate: abs(float(answer) - _change_of_persona(model, change.gated(gate))) < 0.01,
        "The gate was never shown such prompts, and lets them all be changed.",
        "The mean of task.score(model, off.gated(gate)) - task.score(model) for persona, split test.",
    ),
    "22.place": (
        lambda answer, by_place: answer in _best_places(by_place),
        "Nothing else is so little disturbed there.",
        "Sum the five columns of each place; the untouched model does not count.",
    ),
    "22.weight": (
        lambda answer, ten: answer["asked"] < 0.7 and answer["own other facts"] >= 0.9,
        "Dear enough, and the edits themselves are what is given up.",
        "opt.memit(..., weight=3, ...) and then effects(edits, made): the new cities should hardly be said.",
    ),
    "22.guard": (
        lambda answer, table: abs(float(answer) - (1 - table[["persona", "refusal", "ioi"]].min().min())) < 0.006,
        "A target can be reached at very different prices.",
        "1 - table[['persona', 'refusal', 'ioi']].min().min()",
    ),
}
