"""Exercises of notebooks 30 to 50: improving."""

from __future__ import annotations

# exercise -> (is the answer right?, what to say when it is, a hint when it is not); the live values follow the answer
CHECKS: dict = {}
