"""Values on disk: whole or not at all, with a version."""

import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from workbench import storage
from workbench.component import Component
from workbench.report import Report
from workbench.scores import Scores


class Value:
    """Stands for what saves itself."""


FILES = {"a.json": {"name": "é", "list": [{"x": 1}, {"x": 2}], "empty": []}, "b.safetensors": {"t": torch.arange(6.0).view(2, 3).T},
         "a.safetensors": {"t": np.arange(6.0).reshape(2, 3).T}, "c.csv": pd.DataFrame({"x": [1, 2]}), "d.txt": "as it is"}  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_read(tmp_path):
    folder = storage.write(tmp_path / "new" / "er", FILES)
    assert sorted(contents(folder)) == sorted(FILES)
    assert (
        storage.read(Value, folder, "a.json") == FILES["a.json"]
        and json.loads((folder / "a.json").read_text())["version"]
    )
    assert torch.equal(storage.read_tensors(folder / "b.safetensors")["t"], FILES["b.safetensors"]["t"])
    assert storage.read_arrays(folder / "b.safetensors")["t"].tolist() == FILES["b.safetensors"]["t"].tolist()
    assert pd.read_csv(folder / "c.csv").x.tolist() == [1, 2] and (folder / "d.txt").read_text() == "as it is"
    one = storage.write_file(tmp_path / "one.json", {"x": 1})
    assert storage.read(Value, one) == {"x": 1}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("trouble", ["value", "interrupt"])
def test_all_or_nothing(tmp_path, monkeypatch, trouble, there):
    """A value that JSON cannot hold after others are written, and an interrupt between two files."""
    folder = tmp_path / "x"
    if there:
        storage.write(folder, {"a.json": {"old": 1}, "d.txt": "old"})
        (folder / "mine.txt").write_text("of the user")
    before = contents(folder) if there else None
    if trouble == "value":
        with pytest.raises(TypeError, match="not JSON serializable"):
            storage.write(folder, FILES | {"z.json": {"bad": object()}})
    else:
        real, calls = os.replace, []

        def interrupted(source, target):
            calls.append(target)
            if len(calls) == 3:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            storage.write(folder, FILES)
    assert (contents(folder) if there else folder.exists()) == (before if there else False)


def test_refusals_say_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no a\.json\. Value\.load takes the folder that save\(\) wrote"):
        storage.read(Value, tmp_path, "a.json")
    with pytest.raises(FileNotFoundError, match=r"Value\.load takes the file"):
        storage.read(Value, tmp_path / "a.json")
    for text, why in (("[1]", "holds no Value"), ("{", "is no JSON"), ('{"version": 99}', "newer version")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=why):
            storage.read(Value, tmp_path, "a.json")


def test_numpy_arrays_keep_their_kind(tmp_path):
    arrays = {"i": np.arange(3), "f": np.ones((2, 2), np.float32), "b": np.array([True, False])}
    storage.write(tmp_path, {"x.safetensors": arrays})
    back = storage.read_arrays(tmp_path / "x.safetensors")
    assert all(back[k].dtype == v.dtype and (back[k] == v).all() for k, v in arrays.items())


def test_a_failed_save_leaves_the_old_scores_and_report(tmp_path):
    one, nothing = np.array([1.0]), pd.DataFrame({"arm": [], "metric": [], "role": []})
    scores = Scores([Component.parse("z.0.0")], one, one, one, one, one[:, None], "test", "logit_diff")
    report = Report("old", nothing, nothing, nothing, {})
    for value, bad in ((scores, replace(scores, values=2 * one, seed=object())),
                       (report, replace(report, examples=nothing.assign(x=[]), settings={"seed": object()}))):  # fmt: skip
        before = contents(value.save(tmp_path / type(value).__name__))
        with pytest.raises(TypeError, match="not JSON"):
            bad.save(tmp_path / type(value).__name__)
        assert contents(tmp_path / type(value).__name__) == before


def test_files_are_as_open_as_the_umask_lets_them(tmp_path):
    for mask in (0o077, 0o027, 0o022):
        before = os.umask(mask)
        try:
            folder = storage.write(tmp_path / oct(mask), FILES)
        finally:
            os.umask(before)
        assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {oct(0o666 & ~mask)}
