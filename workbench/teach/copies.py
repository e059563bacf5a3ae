"""Copies of notebooks for a class: the exercises without their solutions, nothing executed."""

from __future__ import annotations

import sys
from pathlib import Path


def student_copies(notebooks, out) -> list[Path]:
    """Write notebooks as students should get them: cells tagged "solution" and all outputs are gone, the rest stays.

    Args:
        notebooks: one .ipynb file, a list of them, or a folder of them. out: a folder, made where it is missing.
    Returns:
        The files written.
    Raises:
        FileNotFoundError: where there is no notebook.
        ValueError: for two of one name, or a file that is no notebook.
        FileExistsError: when a file of that name is in `out` already: it may hold somebody's answers. Nothing is written then.
    """
    import nbformat

    given = [Path(one) for one in ([notebooks] if isinstance(notebooks, (str, Path)) else notebooks)]
    files = [file for one in given for file in (sorted(one.glob("*.ipynb")) if one.is_dir() else [one])]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise FileNotFoundError(f"No notebook at {', '.join(missing or map(str, given))}. Give a folder of .ipynb files, such as 'notebooks'.")  # fmt: skip
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        raise ValueError(f"Two notebooks are called {next(one for one in names if names.count(one) > 1)}. Copy the folders apart.")  # fmt: skip
    if Path(out).exists() and not Path(out).is_dir():
        raise FileExistsError(f"{out} is a file. Give a folder for the copies.")
    made = {Path(out) / file.name: _stripped(_read(file)) for file in files}
    taken = [file.name for file in made if file.exists()]
    if taken:
        raise FileExistsError(f"{out} already has {', '.join(taken)}, perhaps with answers in it. Choose another folder, or move them away.")  # fmt: skip
    Path(out).mkdir(parents=True, exist_ok=True)
    for file, notebook in made.items():
        nbformat.write(notebook, file)
    return list(made)


def _read(file: Path):
    import nbformat

    try:
        return nbformat.read(file, 4)
    except Exception as error:  # nbformat raises what the JSON reader or the schema raises
        raise ValueError(f"{file} is no notebook: {error}") from None


def _stripped(notebook):
    notebook.metadata.pop("widgets", None)  # the state of every widget, solutions included
    notebook.cells = [cell for cell in notebook.cells if "solution" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def main(arguments: list[str] | None = None) -> None:
    """The command: python -m workbench.teach NOTEBOOKS OUT"""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2:
        raise SystemExit("Usage: python -m workbench.teach NOTEBOOKS OUT\nfor example: python -m workbench.teach notebooks student_notebooks")  # fmt: skip
    try:
        made = student_copies(*arguments)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        raise SystemExit(str(error)) from None
    print(f"{len(made)} notebooks without solutions in {arguments[1]}")
