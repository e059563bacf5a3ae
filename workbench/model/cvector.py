"""Pushes of the residual stream as a control vector that llama.cpp reads (GGUF)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from workbench.model.plan import check_recipe
from workbench.operations import Add


def to_gguf(model, recipe, file, hint: str | None = None) -> Path:
    """Write the recipe's pushes as a control vector: `llama-cli -m model.gguf --control-vector FILE`.

    llama.cpp adds tensor "direction.N" to the stream after block N, counted from 0, which is `resid_post.N` here, at every
    token. It keeps no direction for block 0. Several pushes at one place are added up, strengths included.

    Args:
        hint: the architecture's name in llama.cpp, for people and other tools; llama.cpp itself does not compare it.
    Returns:
        The file.
    Raises:
        ValueError: listing what is no push `Add(..., unit="raw")` of every token after a block from 1 on.
        ImportError: when the package `gguf` is not installed.
    Source:
        llama.cpp, common/common.cpp (loading), src/llama-adapter.cpp and the models' build_cvec (use),
        tools/cvector-generator (writing).
    """
    check_recipe(model, recipe)
    found: dict[int, torch.Tensor] = {}
    refused = []
    for one in recipe:
        if one.does_nothing:
            continue
        reason = None
        if not isinstance(one, Add):
            reason = "a control vector only adds; bake it, or leave it out"
        elif one.unit != "raw":
            reason = "what it adds follows each token; give unit='raw'"
        elif one.phase != "both" or one.gate is not None or any(place.position is not None for place in one.at):
            reason = "llama.cpp adds to every token; leave position, phase and gate out"
        for place in model.names.expand(one.at) if reason is None else ():
            place = place.canonical
            if place.kind != "resid_post" or place.layer == 0:
                reason = f"{place} has no direction in llama.cpp; places are resid_post.1 to resid_post.{model.names.n_layers - 1}"
                break
            if len(one.vector) != model.names.d_model:
                raise ValueError(
                    f"{place} is {model.names.d_model} numbers wide, but the vector is {len(one.vector)} wide."
                )
            found[place.layer] = found.get(place.layer, 0) + one.strength * one.vector.float()
        if reason:
            refused.append(f"- {one!r}: {reason}.")
    if refused or not found:
        raise ValueError("No control vector was written. " + ("\n".join(["These do not fit:", *refused]) if refused else
                         "The recipe pushes nothing: build it as wb.Recipe([wb.Add('resid_post.3', vector)])."))  # fmt: skip
    try:
        import gguf
    except ImportError:
        raise ImportError("Control vectors need the package gguf: pip install 'mi-workbench[gguf]'.") from None
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=file.parent, prefix=".gguf-")
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(draft, "controlvector")  # sets general.architecture
        writer.add_string("controlvector.model_hint", hint or model.hf.config.model_type)
        writer.add_int32("controlvector.layer_count", len(found))
        for layer, vector in sorted(found.items()):
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(draft, file)
    finally:
        Path(draft).unlink(missing_ok=True)
    return file
