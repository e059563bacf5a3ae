"""Every notebook keeps the house form, and its own-model cells run on a byte-BPE GPT-2.

That the notebooks run and give the committed outputs is nbval's business (`pytest notebooks`).
"""

import os
import re
from pathlib import Path

import byte_bpe
import nbformat
import pytest

from workbench.teach import CHECKS

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
KNOB = 'wb.load("course")'


def cells(path, tag=None):
    found = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    return found if tag is None else [cell for cell in found if tag in cell.metadata.get("tags", [])]


@pytest.fixture(scope="session")
def own_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own_model")
    assert byte_bpe.build(folder) > 0.9, "the stand-in should have learnt its task"
    return folder


def test_the_stand_in_cuts_words_as_gpt2_does(own_model):
    import workbench as wb

    model = wb.load(own_model)
    cut = model.tokens("when nora and john saw a hippopotamus")
    assert cut[:4] == ["when", " nora", " and", " john"] and len(cut) > 10 and not model.bos
    row = {"clean": "when nora and john", "corrupted": "when john and nora", "answer": "hippopotamus", "foil": "tom"}
    with pytest.raises(ValueError, match="no single token"):
        wb.Task([row]).on(model)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_own_model_cells_run_on_another_model(path, own_model, monkeypatch):
    monkeypatch.chdir(path.parent)
    chosen = cells(path, "own-model")
    assert chosen, "every notebook says what to change for another model"
    space: dict = {}
    replaced = 0
    for cell in [*cells(path, "setup"), *chosen]:
        source = cell.source
        if "own-model" in cell.metadata.tags:
            replaced += source.count(KNOB)
            source = source.replace(KNOB, f"wb.load({str(own_model)!r})")
        exec(compile(source, f"{path.name}", "exec"), space)
    assert replaced == 1, f"exactly one {KNOB} to change"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_house_form(path):
    notebook = nbformat.read(path, 4)
    code, prose = cells(path), [c.source for c in notebook.cells if c.cell_type == "markdown"]
    assert prose[0].startswith("# ") and prose[0].splitlines()[0].endswith("?"), "the title is a question"
    assert cells(path, "setup") and cells(path, "finding") and cells(path, "exercise")
    assert len(notebook.cells) <= 50 and sum(len(text.split()) for text in prose) <= 1700
    for cell in code:
        assert len(cell.source.splitlines()) <= 15, cell.source
        assert cell.execution_count, "committed executed, top to bottom"
        shown = nbformat.writes(nbformat.v4.new_notebook(cells=[cell]))
        assert not re.search(r"site-packages|Warning:|/tmp/|/home/", shown), cell.source
        assert all(output.output_type != "error" for output in cell.outputs)
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_exercises_are_open_and_their_solutions_folded_away(path):
    found = nbformat.read(path, 4).cells
    for cell, after in zip(found, [*found[1:], None]):
        tags = cell.metadata.get("tags", [])
        assert ("solution" in tags) == ("# A solution" in cell.source)
        if "exercise" not in tags:
            continue
        name = re.search(r'teach\.check\("(.+?)"', cell.source).group(1)
        assert "..." in cell.source and "nbval-skip" in tags, "an open question; strict checks would stop here"
        (said,) = (one.text for one in cell.outputs if name in one.get("text", ""))
        assert f"{name}: no answer yet. Hint: {CHECKS[name][2]}" in said
        assert "solution" in after.metadata.tags and name in after.source and "= ...\n" not in after.source
        assert after.metadata.jupyter == {"source_hidden": True, "outputs_hidden": True}


def test_checks_are_strict_here():
    assert os.environ["WORKBENCH_STRICT"] == "1"
