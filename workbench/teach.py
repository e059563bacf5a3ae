"""Exercise checks: a sentence at once, right or not, and what to look at next."""

from __future__ import annotations

import os

from workbench.component import Component


def _object_of(answer, wanted: str) -> bool:
    return str(Component.parse(answer)) == wanted


# exercise -> (is the answer right?, what to say when it is, a hint when it is not); `given` are the live values
CHECKS = {
    "00.carrier": (
        lambda answer, scores: Component.parse(answer) == scores.top(1)[0],
        "This is the component whose restored activation moves the answer most.",
        "Read the darkest cell of the grid, or scores.frame: the first row is the strongest.",
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
        lambda answer: abs(float(answer)) < 1e-3,
        "The stream is a sum: what a block writes is what it adds.",
        "Compare resid_pre + attn_out + mlp_out with resid_post; their difference should be nearly 0.",
    ),
}


def check(exercise: str, answer, *given) -> bool:
    """Is this the answer to an exercise? Prints a sentence, with a hint when it is not.

    Args:
        exercise: its name, as the notebook gives it, for example "00.carrier".
        given: the live values that the exercise is about.
    Returns:
        Whether it is right.
    Raises:
        KeyError: for an unknown exercise.
        AssertionError: for a wrong or missing answer, where WORKBENCH_STRICT=1 is set (for autograders).
    """
    if exercise not in CHECKS:
        raise KeyError(f"There is no exercise {exercise!r}. Exercises: {', '.join(CHECKS)}.")
    test, praise, hint = CHECKS[exercise]
    missing = answer is None or answer is ...
    try:
        right = not missing and bool(test(answer, *given))
    except (ValueError, TypeError, KeyError) as error:
        right, hint = False, f"{error} {hint}"
    print(
        f"{exercise}: {'right. ' + praise if right else ('no answer yet' if missing else 'not yet') + '. Hint: ' + hint}"
    )
    if not right and os.environ.get("WORKBENCH_STRICT") == "1":
        raise AssertionError(f"{exercise}: {answer!r} is not right. {hint}")
    return right
