"""Exercises of notebooks 30 to 50: improving."""

from __future__ import annotations


def _share(model, at) -> float:
    """The weights of these components, as a share of all."""
    from workbench.steer.optimization import weight_masks

    own = sum(int(mask.sum()) for mask in weight_masks(model, at).values())
    return own / sum(weight.numel() for weight in model.hf.parameters())


def _reads(pair: dict, model) -> bool:
    """Whether the model can read the pair and is right on both sides."""
    from workbench.task import Task

    task = Task([pair])
    return task.score(model)[0] > 0 > task.score(model, prompt="corrupted")[0]


def _apart(table) -> list[int]:
    """The layers after which toys are helped with and harm is still refused."""
    return [int(layer) for layer, row in table.iterrows() if row.iloc[1] <= 0.05 and row.iloc[2] >= 0.95]


def _lost_at_most(report) -> float:
    """The upper end of the share of harmful requests that are no longer refused (ood, both guards together)."""
    from workbench.measure import share_bound

    rows = [report.row(name) for name in ("refusal", "refusal_objects")]
    return share_bound(sum(round((r["before"] - r["after"]) * r["n"]) for r in rows), sum(r["n"] for r in rows))[1]


def _fair(table) -> set[str]:
    """The ways that take 70 % of the gap and keep the other columns within a point of the first row's."""
    rest = table[["settled", "neutral she", "she or he"]]
    kept = (rest - rest.iloc[0]).abs().max(axis=1) <= 0.01
    return set(table.index[kept & (table["gap"] <= 0.3 * table["gap"].iloc[0])])


def _weakest(doses, enough: float) -> float:
    """The smallest strength at which the target's accuracy is at least `enough`."""
    own = doses.frame[(doses.frame.role == "target") & (doses.frame.metric == "accuracy")]
    return float(own[own.value >= enough].strength.min())


# exercise -> (is the answer right?, what to say when it is, a hint when it is not); the live values follow the answer
CHECKS: dict = {
    "30.layer": (
        lambda answer, table: int(answer) in _apart(table),
        "There toys stand apart from harm, and both can be told before the decision is mixed.",
        "The layer whose row has toys near 0 and, in the last column, harm near 1.",
    ),
    "30.bound": (
        lambda answer, report: abs(float(answer) - _lost_at_most(report)) < 0.001,
        "None lost is a bound, not a proof: more rows make it smaller.",
        "The second number of share_bound(lost, n), with lost and n summed over refusal and refusal_objects.",
    ),
    "30.sure": (
        lambda answer, model, prompts, change: (
            abs(float(answer) - float(model.logits(prompts, change).softmax(-1).max(-1).values.mean())) < 0.01
        ),
        "Compare it with the known people: what is invented is said less surely.",
        "model.logits(strangers, daring).softmax(-1).max(-1).values.mean()",
    ),
    "31.cheats": (
        lambda answer, cheats: (
            all(
                abs(cheats[one][answer] - cheats["untouched"][answer]) > 0.05
                for one in ("all towards he", "all logits / 6")
            )
            and abs(cheats["middle"][answer] - cheats["untouched"][answer]) <= 0.05
        ),
        "What nobody wanted to change has changed.",
        "It has to move in both cheats' rows, and to stay in the row of the middle.",
    ),
    "31.ways": (
        lambda answer, table: set(answer) == _fair(table),
        "A small gap is worth nothing where what is said is no longer heard.",
        "Rows with a gap of at most 0.3 times the first row's, and within a point of it in the three columns after.",
    ),
    "31.letter": (
        lambda answer, after: (
            abs(
                answer
                - sum(sign * (after[one]["a"] - after[one]["b"]) for one, sign in (("untouched", 1), ("constant", -1)))
            )
            < 0.01
        ),
        "Equal letters are what a model without knowledge should give.",
        "The lead before minus the lead after; each is the share of (a) minus that of (b).",
    ),
    "35.bridge": (
        lambda answer, table: int(answer) == int(table["city", "wrong"].idxmin()),
        "That is late: hardly a layer is left that could look the city up.",
        "Go down the column of the city in wrong prompts, and take the layer of its smallest rank.",
    ),
    "35.gain": (
        lambda answer, rows: (
            abs(float(answer) - (rows["through cities"].max() - rows["through all words"].max())) < 1e-6
        ),
        "The city is in the state, covered by what is about to be said.",
        "Subtract the largest number of 'through all words' from the largest of 'through cities'.",
    ),
    "35.end": (
        lambda answer, end: int(answer) == int(end.index[end > 0.5][0]),
        "From there on the end holds what the second number has to say.",
        "Go through the layers from 0 upwards and stop at the first score above 0.5.",
    ),
    "33.layer": (
        lambda answer, curves: int(answer) == int((curves["english"] - curves["asked"]).idxmax()),
        "Half-way up the word is English; the asked language comes after it.",
        "(curves['english'] - curves['asked']).idxmax()",
    ),
    "33.share": (
        lambda answer, table: float(answer) == min(share for share in table.columns if table.loc[6, share] >= 0.95),
        "Enough to change the language, and no more: further out the words get lost.",
        "In row 6 of the table, the first column from the left with 0.95 or more.",
    ),
    "33.ratio": (
        lambda answer, cost: (
            abs(
                float(answer)
                / min(cost.loc[f"{name} off", name] / cost.loc[f"{name} off"].drop(name).max() for name in cost)
                - 1
            )
            < 0.01
        ),
        "Even the weakest of the three is specific: its own language pays many times what another does.",
        "The diagonal over the largest other number in its row; then the smallest of the three.",
    ),
    "36.share": (
        lambda answer, model, at: abs(answer - _share(model, at)) < 1e-4,
        "That many numbers may move; all others keep every bit.",
        "Count what is True in the masks, and divide by the number of all weights: 0.05 means one in twenty.",
    ),
    "36.reading": (
        lambda answer, ood: (
            answer.strip("() ").lower() == ("b" if ood["random", 1e-2] > ood["random", 1e-3] + 0.2 else "a")
        ),
        "So a comparison at one rate measures the rate as much as the place.",
        "If random weights could not learn it, a larger rate would not help them.",
    ),
    "36.cost": (
        lambda answer, lines: (
            answer
            == (
                lines[lines.claim == "located forgets less than full, at equal steps"]
                .query("metric == 'accuracy lost elsewhere'")
                .reached
                == "yes"
            ).all()
        ),
        "An interval around zero is an answer too: it says what was not shown.",
        "Look for 'yes' three times in that row.",
    ),
    "50.pair": (
        lambda answer, model: _reads(answer, model),
        "It can be read, and the model prefers the answer after one prompt and the foil after the other.",
        "Take two towns of its world: 'oslo is in' and 'madrid is in', with their countries.",
    ),
    "50.fits": (
        lambda answer: abs(float(answer) - 16 * 2**30 * 0.8 / 2e9) < 0.1,
        "Weights first, the rest is for activations.",
        "Four fifths of 16 * 2**30 bytes, divided by two bytes, in billions.",
    ),
    "50.longest": (
        lambda answer, sizes: (
            answer
            == sizes.loc[sizes[sizes["parameters (B)"] == sizes["parameters (B)"].max()].seconds.idxmax(), "call"]
        ),
        "Take fewer pairs or fewer components first.",
        "sizes.seconds.idxmax() among the rows of the largest model.",
    ),
    "37.count": (
        lambda answer, curve: answer == max(curve.index[curve["smallest gates"] >= curve["smallest gates"].iloc[0]]),
        "As many heads can forget without one answer lost here; on other prompts that has to be shown again.",
        "The largest number whose row in 'smallest gates' is not below the first row.",
    ),
    "37.bytes": (
        lambda answer, model: answer == (200 - 16) * 2 * model.names.d_head * 4,
        "It grows with the text: that is why one does it.",
        "(200 tokens - 16 kept) times 2 times model.names.d_head times 4.",
    ),
    "37.rows": (
        lambda answer, table: (
            set(answer) == set(table.index[table.iloc[:, 1] < table.iloc[0, 1]]) and len(answer) == len(set(answer))
        ),
        "What is set to zero is still computed; what is cut out is not.",
        "A list of names: savings.index[savings['M operations a token'] < savings['M operations a token']['whole']].",
    ),
    "34.heads": (
        lambda answer, scores: list(map(str, answer)) == [str(one) for one in scores.top(12) if one.layer >= 2][:2],
        "Neither copies the note's word: they tell the end whether to believe it.",
        "[str(head) for head in scores.top(6) if head.layer >= 2][:2]",
    ),
    "34.trace": (
        lambda answer, where: int(answer) == max(where.index[where["another person"]["subject"] >= 0.5]),
        "After it the end of the sentence takes over.",
        "The largest layer whose 'subject' under 'another person' is 0.50 or more.",
    ),
    "34.spill": (
        lambda answer, table, rest: abs(float(answer) - (table.iloc[0, 1] - table.iloc[1, 1]) * len(rest)) < 0.6,
        "An edit is judged by the people it was not about.",
        "(before - without neighbours) in the second column, times len(rest).",
    ),
    "32.foreseen": (
        lambda answer, areas: int(answer) == min(one for one in areas if areas[one]["persona vector"] >= 0.95),
        "Before that layer the end of the prompt does not know how it will be answered.",
        "The first row whose 'persona vector' is 0.95 or more; its number stands at the left.",
    ),
    "32.strength": (
        lambda answer, doses: answer == _weakest(doses, 0.95),
        "More would change nothing in the target, and cost more elsewhere.",
        "In doses.frame, the rows with role 'target' and metric 'accuracy' whose value is 0.95 or more; the smallest strength.",
    ),
    "32.share": (
        lambda answer, model, at: abs(float(answer) - _share(model, at)) < 1e-4,
        "Less than one weight in a hundred.",
        "The sum of mask.sum() over the masks, divided by the sum of weight.numel() over model.hf.parameters().",
    ),
}
