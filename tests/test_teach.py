"""Exercise checks say right, not yet, or no answer yet."""

import nbformat
import numpy as np
import pandas as pd
import pytest

from workbench import teach
from workbench.teach.copies import main


def test_right_wrong_and_missing(capsys, monkeypatch):
    monkeypatch.delenv("WORKBENCH_STRICT")
    for answer, said in (
        ("z.2.3@-1", "right: z.2.3@-1. "),
        ("z.3.2", "not yet. Hint: "),
        ("zed", "names no component"),
        (..., "no answer yet. Hint: "),
    ):
        teach.check("01.address", answer)
        assert said in capsys.readouterr().out


def test_a_wrong_answer_raises_for_autograders():
    with pytest.raises(AssertionError, match="is not right"):
        teach.check("01.address", "z.3.2")
    with pytest.raises(AssertionError):
        teach.check("01.address", ...)
    with pytest.raises(KeyError, match="no exercise"):
        teach.check("99.nothing", 1)


def test_short_answers_are_said_again():
    found = [
        teach._echo(one) for one in (0.82217, 1e-7, np.float32(3), np.int64(7), 12, "x" * 31, [1, 2], pd.DataFrame())
    ]
    assert found == [": 0.822", ": about 0", ": 3", ": 7", ": 12", "", "", ""]


def notebook(folder, name="01_a.ipynb"):
    cell = nbformat.v4.new_code_cell
    cells = [nbformat.v4.new_markdown_cell("# ?"), cell("x = ...", metadata={"tags": ["exercise"]}, execution_count=1),
             cell("x = 2", metadata={"tags": ["solution"]}), cell("print(x)", outputs=[nbformat.v4.new_output("stream", text="2")])]  # fmt: skip
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {"state": "the solution"}}), folder / name
    )


def test_student_copies_have_no_solutions(tmp_path, capsys):
    notebook(tmp_path)
    main([str(tmp_path), str(tmp_path / "class" / "one")])
    assert "1 notebooks" in capsys.readouterr().out
    made = nbformat.read(tmp_path / "class" / "one" / "01_a.ipynb", 4)
    cells = made.cells
    assert "widgets" not in made.metadata
    assert [cell.source for cell in cells] == ["# ?", "x = ...", "print(x)"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells[1:])


def test_student_copies_never_overwrite_answers(tmp_path):
    notebook(tmp_path)
    (file,) = teach.student_copies(tmp_path / "01_a.ipynb", tmp_path / "out")
    file.write_text("my answers")
    notebook(tmp_path, "02_b.ipynb")
    with pytest.raises(FileExistsError, match="01_a"):
        teach.student_copies(tmp_path, tmp_path / "out")
    assert file.read_text() == "my answers" and not (tmp_path / "out" / "02_b.ipynb").exists()
    with pytest.raises(FileNotFoundError, match="notebooks"):
        teach.student_copies(tmp_path / "none", tmp_path / "out")
    with pytest.raises(SystemExit, match="No notebook at"):
        main([str(tmp_path / "out2"), "x"])
    with pytest.raises(SystemExit, match="Usage"):
        main([])
    (tmp_path / "more").mkdir()
    notebook(tmp_path / "more", "02_b.ipynb")
    with pytest.raises(ValueError, match="Two notebooks are called 02_b"):
        teach.student_copies([tmp_path, tmp_path / "more"], tmp_path / "out3")
    (tmp_path / "more" / "03_c.ipynb").write_text("{")
    with pytest.raises(SystemExit, match=r"03_c\.ipynb is no notebook"):
        main([str(tmp_path / "more"), str(tmp_path / "out3")])
    with pytest.raises(FileExistsError, match="is a file"):
        teach.student_copies(tmp_path / "01_a.ipynb", tmp_path / "02_b.ipynb")
    assert not (tmp_path / "out3").exists()
