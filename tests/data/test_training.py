"""The training of the bundled model, run twice, gives the same weights to the last bit."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "data" / "train_course.py"


@pytest.mark.slow
def test_two_runs_of_all_three_parts_are_the_same_to_the_bit(tmp_path):
    """A few steps of each part: corpus, order, optimizers and the hand-over through stored weights all take part."""
    found = []
    for name in ("one", "two"):
        command = [sys.executable, str(SCRIPT), "--seed", "3", "--steps", "4", "3", "3", "--out", str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        found.append({str(path.relative_to(tmp_path / name)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files})  # fmt: skip
    assert found[0] == found[1] and "model.safetensors" in found[0]
