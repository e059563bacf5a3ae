"""Opening a model: a bundled one, a folder, a name on the hub or a module; its checkpoints along training."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import torch

from workbench.model.run import Model
from workbench.task import DATA


def bundled() -> list[str]:
    """The names of the models that come with the workbench."""
    return sorted(p.parent.name for p in DATA.glob("*/config.json"))


def revisions(name) -> list[str]:
    """Which checkpoints along its training does a bundled model (or a folder) have? In the order of training.

    `wb.load(name, revision=...)` opens one: ["step20", "step80", ...] for "grokking".
    """
    folder = (DATA / str(name) if str(name) in bundled() else Path(name).expanduser()) / "checkpoints"
    return sorted((p.stem for p in folder.glob("*.safetensors")), key=lambda s: int("0" + re.sub(r"\D", "", s)))


def load(name, *, revision: str | None = None, tokenizer=None, bos: bool | None = None, dtype=torch.float32,
         device: str | None = None) -> Model:  # fmt: skip
    """Which model do I want to open?

    Args:
        name: "course" or "grokking" (bundled, offline), a folder, a Hugging Face name such as "gpt2" (fetched by transformers when
            you have access), or an `nn.Module` with `tokenizer=` (it is set to eval and its parameters are frozen).
        revision: a checkpoint along training: of a bundled model or a folder one of `revisions(name)`, of a hub model a
            branch or tag ("step3000" of Pythia). None is the final model.
        bos: whether prompts start with the beginning-of-sequence token; None leaves it to the tokenizer.
        dtype: of the weights; "auto" keeps what the checkpoint has.
        device: "cpu" or "cuda"; None leaves the model where transformers puts it.
    Raises:
        ValueError: for a name that is neither bundled, nor a folder, nor to be had from the hub; for a revision it does
            not have; for an architecture that cannot be named; for a model with adapters of peft in it.
    """
    if isinstance(name, torch.nn.Module):
        _refuse_wrapped(name)
        if tokenizer is None:
            raise ValueError("A model given as a module needs its tokenizer: wb.load(module, tokenizer=...).")
        if revision is not None:
            raise ValueError("A model given as a module has its weights already; leave out revision=.")
        return Model(name.eval().to(device) if device else name.eval(), tokenizer, bos=bos)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    path = DATA / str(name) if str(name) in bundled() else Path(name).expanduser()
    _refuse_misspelt(str(name), path)
    where, hub = (str(path), {}) if path.is_dir() else (str(name), {"revision": revision or "main"})
    if path.is_dir() and revision is not None and revision not in revisions(name):
        known = ", ".join(revisions(name)) or "none, only the final model"
        raise ValueError(f"{str(name)!r} has no revision {revision!r}. It has: {known}.")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        hf = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, attn_implementation="eager", **hub).eval()
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(where, **hub)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"No model {str(name)!r} could be loaded. Bundled: {', '.join(bundled())}. A folder needs config.json, "
            f"weights and tokenizer; a hub name needs a network or a local copy. ({reason})"
        ) from None
    finally:
        if bars:
            logging.enable_progress_bar()
    _refuse_wrapped(hf)  # of a folder with an adapter in it, transformers makes one where peft is installed
    if path.is_dir() and revision is not None:
        _set_weights(hf, path / "checkpoints" / f"{revision}.safetensors")
    model = Model(hf.to(device) if device else hf, tokenizer, bos=bos)
    model.revision = revision
    return model


def _refuse_wrapped(hf) -> None:
    """A model with adapters of peft still in it; what is left after merging or unloading them is a plain one."""
    if any(type(one).__module__.split(".")[0] == "peft" for one in hf.modules()):
        raise ValueError("This model has adapters of peft in it. Put them into its weights, wb.load(peft_model.merge_and_unload(), "
                         "tokenizer=...), or load the base model without them and read the adapter as a recipe: "
                         "wb.Recipe.from_peft(wb.load(base), folder).")  # fmt: skip


def _set_weights(hf, file: Path) -> None:
    """Weights of a checkpoint; matrices may be int8 rows beside their scales (name + ".scale"). Tied weights need
    not be in the file."""
    from safetensors.torch import load_file

    stored = load_file(file)
    weights = {name: value.float() * stored[f"{name}.scale"].float() if f"{name}.scale" in stored else value.float()
               for name, value in stored.items() if not name.endswith(".scale")}  # fmt: skip
    unknown = hf.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{file.name} does not fit this model: it has {unknown[0]!r}.")


def _refuse_misspelt(name: str, path: Path) -> None:
    """A folder that is not there, or nearly the name of a bundled model: said at once, before any network is asked."""
    if path.is_dir():
        return
    near, hint = difflib.get_close_matches(name, bundled(), 1, 0.75), ""
    if name.startswith(("/", ".", "~")):
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, 1, 0.6)
        hint = f" Did you mean {str(path.parent / close[0])!r}?" if close else ""
    elif near:
        hint = f" Did you mean {near[0]!r}?"
    else:
        return
    raise ValueError(f"No model {name!r}: there is no such folder.{hint} Bundled: {', '.join(bundled())}.")
