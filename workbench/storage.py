"""Values on disk: plain settings as JSON, numbers as safetensors, tables as CSV; written whole or not at all, never pickle."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

VERSION = 1


def write(folder, files: dict) -> Path:
    """Put files into a folder: all of them, or none and the folder as it was, also after an error or an interrupt.

    Args:
        files: name -> content. For a name that ends in .json plain values by name (the version is added), in .safetensors
            tensors or arrays by name, in .csv a table; a text is written as it is, under any name.
    Raises:
        TypeError: for what JSON cannot hold, before anything changes.
    """
    folder = Path(folder)
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder, prefix=".draft-"))
    begun: list[str] = []  # the files that are no longer as they were
    try:
        for name, content in files.items():
            _put(draft / name, content)
            if (folder / name).exists():
                shutil.copy2(folder / name, draft / f"old {name}")
        for name in files:
            begun.append(name)
            os.replace(draft / name, folder / name)
    except BaseException:
        for name in begun:
            (folder / name).unlink(missing_ok=True)
            if (draft / f"old {name}").exists():
                shutil.move(draft / f"old {name}", folder / name)
        shutil.rmtree(draft, ignore_errors=True)
        if fresh:
            folder.rmdir()
        raise
    shutil.rmtree(draft, ignore_errors=True)
    return folder


def write_file(path, content) -> Path:
    """Put one file into its place, whole or not at all; content as for `write`."""
    path = Path(path)
    write(path.parent, {path.name: content})
    return path


def read(made, path, name: str = "") -> dict:
    """The plain values of a JSON file that `made.save` wrote: `path`, or `name` in the folder `path`.

    Raises:
        FileNotFoundError: when it is not there.
        ValueError: for a file of a newer version, or one that holds no such values.
    """
    file, what = Path(path) / name, "folder" if name else "file"
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no {name or made.__name__.lower()}. {made.__name__}.load takes the {what} that "
                                "save() wrote.")  # fmt: skip
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} is no JSON: {error}. {made.__name__}.load takes the {what} that save() wrote."
        ) from None
    if not isinstance(plain, dict):
        raise ValueError(f"{file} holds no {made.__name__}. {made.__name__}.load takes the {what} that save() wrote.")
    version = plain.pop("version", VERSION)
    if version > VERSION:
        raise ValueError(f"{path} was written by a newer version ({version}); this one reads {VERSION}.")
    return plain


def read_tensors(file) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name."""
    from safetensors.torch import load_file

    return load_file(file)


def read_arrays(file) -> dict:
    """The same as numpy arrays."""
    return {name: tensor.numpy() for name, tensor in read_tensors(file).items()}


def _put(file: Path, content) -> None:
    if isinstance(content, str):
        file.write_text(content, encoding="utf-8")
    elif file.suffix == ".safetensors":
        from safetensors.torch import save_file

        file.touch()
        mode = file.stat().st_mode  # as the umask has it; safetensors lets only its owner read what it writes
        save_file({name: _own(one) for name, one in content.items()}, file)
        file.chmod(mode & 0o777)
    elif file.suffix == ".csv":
        content.to_csv(file, index=False)
    else:
        lines = [f" {json.dumps(key)}: {_json(value)}" for key, value in {"version": VERSION, **content}.items()]
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _own(one) -> torch.Tensor:
    """Alone in its memory, as the format demands."""
    return one.contiguous().clone() if isinstance(one, torch.Tensor) else torch.tensor(one).contiguous()


def _json(value) -> str:
    """On one line; a list of settings with one of them a line."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, dict) for one in value):
        return "[\n  " + ",\n  ".join(json.dumps(one, ensure_ascii=False) for one in value) + "\n ]"
    return json.dumps(value, ensure_ascii=False)
