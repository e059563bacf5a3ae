"""A wheel, built and installed elsewhere, has the bundled model and its tasks."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_has_the_bundled_model(tmp_path):
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", ROOT, "--no-deps", "--no-build-isolation", "-w", tmp_path], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    code = "import workbench as wb; print(wb.__file__); print(wb.load('course').generate('the capital of kenya is', max_new_tokens=1)); print(len(wb.Task.names()))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    where, answer, tasks = done.stdout.split()
    assert Path(where).is_relative_to(site) and answer == "nairobi" and int(tasks) > 5
