"""The table of what folds, in the README, is what comes out when it is tried."""

import sys

import pytest
from tiny import CONFIGS

from workbench.task import DATA

sys.path.insert(0, str(DATA))
import fold_table


def published() -> dict[str, dict[str, str]]:
    """Architecture -> label -> mark, as the README has it."""
    text = fold_table.README.read_text(encoding="utf-8").split(fold_table.START)[1].split(fold_table.END)[0]
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    found = {}
    for i, names in enumerate(lines[0][1:], 1):
        column = {line[0]: line[i] for line in lines[2:]}
        found |= dict.fromkeys(names.split(", "), column)
    return found


def test_the_table_names_every_architecture():
    assert sorted(published()) == sorted(CONFIGS)


@pytest.mark.parametrize("architecture", [
    name if name in ("llama", "gemma2") else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS
])  # fmt: skip
def test_the_table_is_what_comes_out(architecture):
    marks = fold_table.column(architecture)
    assert len(marks) >= 15 and "●" in marks.values()
    assert {label: published()[architecture][label] for label in marks} == marks
