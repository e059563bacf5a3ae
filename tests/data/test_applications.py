"""What is said about the eight applications: every line is complete, over three seeds, and README says what the files say."""

import re
import sys

import pandas as pd
import pytest

from workbench.task import DATA

sys.path.insert(0, str(DATA / "applications"))
import lines


@pytest.mark.parametrize("name", lines.ORDER)
def test_every_line_is_complete(name):
    found = pd.read_csv(DATA / "applications" / f"{name}.csv")
    assert list(found.columns) == lines.COLUMNS
    assert found.seed.nunique() >= 3 and set(found.reached) <= {"yes", "no", "unclear"}
    assert found[found.headline].claim.nunique() == 1, "one claim stands for the application"
    assert {"test", "ood"} <= set(found[found.headline].split), "on both held-out splits"
    told = found.dropna(subset=["change", "ci_lo", "ci_hi"])
    assert (told.ci_lo <= told.change + 1e-3).all() and (told.change <= told.ci_hi + 1e-3).all()
    assert len(told) > 0.6 * len(found) and (found.n > 0).all()
    headline = found[found.headline]
    assert headline[["before", "after", "control_after"]].notna().all().all() and headline.aim.notna().all()


def test_readme_has_the_table():
    said = lines.README.read_text(encoding="utf-8").split(lines.START)[1].split(lines.END)[0]
    assert said.strip() == lines.tables().strip()


def test_every_script_has_a_run_and_a_notebook():
    for name in lines.ORDER:
        script = (DATA / "applications" / f"{name}.py").read_text(encoding="utf-8")
        assert re.search(r"^def run\(model, seed", script, re.M) and f'main(run, "{name}")' in script
        assert list((DATA.parent / "notebooks").glob(f"3?_improve_{name}.ipynb"))
