"""Exercise checks: a sentence at once, right or not, and what to look at next."""

from __future__ import annotations

import os

from workbench.teach import first, improve, steer
from workbench.teach.copies import student_copies

__all__ = ["CHECKS", "check", "student_copies"]

CHECKS = first.CHECKS | steer.CHECKS | improve.CHECKS


def check(exercise: str, answer, *given) -> None:
    """Is this the answer to an exercise? Prints a sentence, with a hint when it is not.

    Args:
        exercise: its name, as the notebook gives it, for example "00.carrier".
        given: the live values that the exercise is about.
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
        why = str(error) if isinstance(answer, str) else f"A {type(answer).__name__} is no answer here."
        right, hint = False, f"{why} {hint}"
    if right:
        print(f"{exercise}: right{_echo(answer)}. {praise}")
    else:
        print(f"{exercise}: {'no answer yet' if missing else 'not yet'}. Hint: {hint}")
    if not right and os.environ.get("WORKBENCH_STRICT") == "1":
        raise AssertionError(f"{exercise}: {answer!r} is not right. {hint}")


def _echo(answer) -> str:
    """A short answer, said again."""
    if hasattr(answer, "item") and getattr(answer, "size", 0) == 1:
        answer = answer.item()
    if isinstance(answer, float):
        return f": {answer:.3g}" if not abs(answer) < 1e-3 else ": about 0"  # what rounding leaves differs by machine
    said = str(answer) if isinstance(answer, (bool, int, str)) or hasattr(answer, "canonical") else ""
    return f": {said}" if 0 < len(said) <= 30 else ""
