"""The shape of the project: imports run one way, files stay small, heavy packages wait until needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "workbench"
ORDER = ["component storage", "gate", "intervention sae measure", "attend operations", "recipe task scores report plot", "model", "locate", "steer", "improve",
         "views teach"]  # fmt: skip
RANK = {name: i for i, names in enumerate(ORDER) for name in names.split()}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "data" not in path.relative_to(PACKAGE).parts)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "workbench":
            yield from (f"workbench.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    if path == PACKAGE / "__init__.py":
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "workbench" and len(parts) > 1 and parts[1] in RANK:
            assert RANK[parts[1]] <= RANK[room(path)], f"{path.name} imports {name}, which comes later"
        if parts[0] == "nnsight":
            assert room(path) == "model", f"{path.name} imports nnsight; only workbench/model may"
        if parts[0] in ("ipywidgets", "anywidget"):
            assert room(path) == "views", f"{path.name} imports {parts[0]}; only workbench/views may"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_say_what_they_are_for(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    assert ast.get_docstring(ast.parse(text)), f"{path.name} has no module docstring"


def test_heavy_imports_wait():
    code = ("import sys, workbench; "
            "print([m for m in ('matplotlib', 'ipywidgets', 'anywidget', 'sklearn') if m in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_ruff_is_content():
    for command in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
