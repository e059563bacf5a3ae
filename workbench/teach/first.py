"""Exercises of notebooks 00 to 16: the first steps, and locating."""

from __future__ import annotations

from workbench.component import Component


def _is_head(answer, wanted: Component) -> bool:
    """With or without its position, alone or in a list of one."""
    answer = answer[0] if isinstance(answer, (list, tuple)) and len(answer) == 1 else answer
    return Component.parse(answer) in (wanted, wanted.at(None))


def _object_of(answer, wanted: str) -> bool:
    return str(Component.parse(answer)) == wanted


def _without_direction(model, found) -> float:
    """Accuracy on refusal (test) with the direction of the last site projected out."""
    from workbench.operations import ProjectOut
    from workbench.task import Task

    site = found.scores.components[-1]
    off = ProjectOut(site, found.directions[site])
    return float(Task.load("refusal").split("test").score(model, off, metric="accuracy").mean())


def _stability(scores):
    from workbench.locate.circuit import stability

    return stability(scores, 0.05)


# exercise -> (is the answer right?, what to say when it is, a hint when it is not); the live values follow the answer
CHECKS = {
    "00.carrier": (
        lambda answer, scores: _is_head(answer, scores.top(1)[0]),
        "This is the component whose restored activation moves the answer most.",
        "The darkest cell of the grid: its row is the layer, its column the head. Or the first row of heads.frame.",
    ),
    "00.strength": (
        lambda answer, curve: answer == max((s for s in curve if curve[s] >= 0.9), default=None),
        "The least push that does it leaves the most of everything else alone.",
        "Go from 0 downwards and stop at the first accuracy of 0.90 or more.",
    ),
    "01.address": (
        lambda answer: _object_of(answer, "z.2.3@-1"),
        "kind z, layer 2, head 3, position -1: the last prompt token.",
        "An address is kind.layer.index@position; counting starts at 0, and -1 is the last token.",
    ),
    "01.sum": (
        lambda answer: 0 < abs(float(answer)) < 1e-3,
        "The stream is a sum: what a block writes is what it adds.",
        "Compare resid_pre.0 + attn_out + mlp_out of all layers with resid_post of the last; their difference is nearly 0, but rounding leaves something.",
    ),
    "10.clear": (
        lambda answer, scores: int(answer) == int((abs(scores.values) > scores.columns["null_best"]).sum()),
        "Compared with the best that chance can do, these stand out one by one.",
        "Count where abs(french.values) is larger than french.columns['null_best'].",
    ),
    "10.looks_back": (
        lambda answer, scores: Component.parse(answer) == scores.top(1)[0],
        "It gives nearly all its attention to the token before.",
        "The first row of back.frame; its component is written like 'z.1.3'.",
    ),
    "10.prune": (
        lambda answer, curve: answer == max((share for share in curve if curve[share] < 0.05), default=None),
        "That many neurons can go, for texts like these.",
        "Of the shares in the table, the largest whose cost in the first column is below 0.05.",
    ),
    "11.when": (
        lambda answer, table: (
            Component.parse(answer) == Component.parse(table.component[table["first"] >= 0.5].iloc[0])
        ),
        "From there on a fixed linear map is enough to read the answer in half of the prompts.",
        "Go down the column 'first' and stop at the first 0.5 or more; the address stands in 'component'.",
    ),
    "11.share": (
        lambda answer, scores: (
            abs(float(answer) - sum(scores[one] for one in scores.components if one.kind == "mlp_out") / scores.clean)
            < 0.01
        ),
        "The FFNs say most of it, but only what they were told by attention.",
        "Add up scores[one] for all one in scores.components with one.kind == 'mlp_out', and divide by scores.clean.",
    ),
    "11.indirect": (
        lambda answer, patched, scores: (
            Component.parse(answer)
            == next(one for one in patched.top(48) if abs(scores[one]) <= scores.null_p95[scores.components.index(one)])
        ),
        "It works through later parts: patching sees that, attribution cannot.",
        "Go down patched.frame; take the first head whose |score| in scores.frame is no larger than its null_p95.",
    ),
    "12.inside": (
        lambda answer, scores: (
            Component.parse(answer)
            == max((one for one in scores.components if one.kind in "qkv"), key=lambda one: abs(scores[one]))
        ),
        "The head looks where it always looks; what stands there differs.",
        "Of the rows q, k and v in inside.frame, take the largest score; write its address, such as 'k.3.1'.",
    ),
    "12.cut": (
        lambda answer, scores: int(answer) == scores.top(1)[0].layer,
        "There the end reads the city.",
        "The row of cut.frame with the largest score, which is cut.top(1); its layer is a number from 0 to 7.",
    ),
    "12.joint": (
        lambda answer, joint: (
            abs(float(answer) / float(joint.frame.joint[0] / joint.frame.sum_of_single[0]) - 1) < 0.05
        ),
        "That is how much the single effects hide.",
        "joint.frame.joint divided by joint.frame.sum_of_single; take the row 0.",
    ),
    "13.shared": (
        lambda answer, exact, quick: int(answer) == len(set(exact.top(5)) & set(quick.top(5))),
        "The estimate names nearly the same heads, for three passes.",
        "Count the components that stand in both exact.top(5) and quick.top(5).",
    ),
    "13.steps": (
        lambda answer, gaps: answer == min((steps for steps in gaps if gaps[steps] < 0.01), default=None),
        "From there on the tangent is short enough to follow the curve.",
        "The first row of the table with less than 1.00 %.",
    ),
    "13.fact": (
        lambda answer, table: abs(float(answer) - (1 - table.iloc[1, 0] / table.iloc[0, 0])) < 0.01,
        "A handful of thousands of neurons carries that much, and the answer survives without them.",
        "1 - (its neurons) / (nothing), both from the first column of the table.",
    ),
    "14.untrained": (
        lambda answer, scores: int(answer) == int((scores.columns["ood_lo"] > scores.columns["untrained_ood"]).sum()),
        "Only at such layers would training have added to what random mixing of tokens gives for free.",
        "Count the rows of language.frame where ood_lo is larger than untrained_ood.",
    ),
    "14.neuron": (
        lambda answer, scores: (
            Component.parse(answer) == Component.parse(scores.frame.sort_values("ood").units.iloc[-1])
        ),
        "One number, and it tells harmful from harmless in sentences the model has never seen.",
        "Sort single.frame by ood; the address stands in the column units.",
    ),
    "14.project": (
        lambda answer, model, found: abs(float(answer) - _without_direction(model, found)) < 1e-6,
        "Zero is not harmless: projecting out sets the coordinate to 0, which may be on either side of half-way.",
        "Build wb.ProjectOut(site, found.directions[site]) and score refusal, split test, with metric='accuracy'.",
    ),
    "15.size": (
        lambda answer, frame: abs(float(answer) - frame[frame.by_size >= 0.9]["size"].min()) < 1e-9,
        "That many edges, and the rest of the model may think of another prompt.",
        "The column by_size is the faithfulness of the edges with the largest |score|; take the first row with 0.9 or more.",
    ),
    "15.head": (
        lambda answer, worth: (
            str(answer)
            == str(
                max(
                    (e for e in worth if e.source.kind == "z" and e.target.kind in ("mlp_out", "logits")),
                    key=lambda e: worth[e],
                ).source
            )
        ),
        "This head brings the name to where it is said.",
        "Go through worth.frame from the top; the first edge that starts at a z and ends at an mlp_out or at the logits.",
    ),
    "15.stability": (
        lambda answer, scores: 0.05 < float(answer) <= 1 and abs(float(answer) - _stability(scores)) < 1e-6,
        "Compare it with 0.8, and with what chance would give.",
        "Call circuit.stability with the scores and the share 0.05.",
    ),
    "16.factor": (
        lambda answer, quality: abs(float(answer) / (quality.frame.kl["random"] / quality.frame.kl["sae"]) - 1) < 0.01,
        "Explained variance and loss recovered hide this; KL does not.",
        "Divide the KL of the row 'random' by that of the row 'sae', both in quality.frame.",
    ),
    "16.count": (
        lambda answer, scores: int(answer) == int((abs(scores.values) > scores.columns["null_max"]).sum()),
        "These would be surprising even as the best of all features.",
        "Count the rows of detect.frame where |score| is above null_max.",
    ),
}
