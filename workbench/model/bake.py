"""A recipe written out as an ordinary Hugging Face checkpoint, which loads without this package."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from workbench.model.edit import probe, refuse_unequal
from workbench.model.fold import Folded, untied
from workbench.model.plan import check_recipe

NOTE = "baked.json"


def bake(model, recipe, folder, dtype=torch.float32) -> Path:
    """What the recipe does, as weights on disk: config, weights, tokenizer and `baked.json`, which says what was folded.

    What was written is loaded again with plain transformers and compared with the model under the recipe before the
    folder appears; there is a whole checkpoint or none.

    Args:
        folder: new, empty, or an earlier result of `bake`, which is replaced.
        dtype: of the weights; folding is computed in float64.
    Returns:
        The folder.
    Raises:
        ValueError: listing what does not fold, why, and what to type instead; for biases that this architecture cannot
            store; for a folder that holds something else. Nothing is written then.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / NOTE).is_file() or not any(folder.iterdir()))):
        raise ValueError(f"{folder} exists and holds something else; bake into a new folder.")
    if model.made_from:
        raise ValueError(
            "This model is edited at the moment. Bake outside the `with`, with its interventions in the recipe."
        )
    check_recipe(model, recipe)
    folded = Folded(model, recipe)
    config, blank = _config(model, folded)
    expected = model.logits(probe(model), recipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".bake-"))
    try:
        with _without_bars():
            _write(model, folded, config, blank, draft, dtype)
            off = refuse_unequal(_logits_of(draft, model, dtype), expected, dtype)
        note = {"recipe": recipe.name, "notes": recipe.notes, "model": getattr(model.hf, "name_or_path", ""),
                "fingerprint": model.fingerprint, "folded": folded.said, "changed": sorted(folded.weights),
                "biases_added": sorted(folded.added), "untied": untied(model, folded.weights),
                "dtype": str(dtype).removeprefix("torch."), "begins_with_bos": model.bos,
                "tokenizer": _read_back(draft, model.tokenizer),
                "largest_difference_of_logits": f"{off:.1e} of the largest"}  # fmt: skip
        (draft / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        _move(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _config(model, folded: Folded):
    """The config of the new checkpoint and a model of it without storage: switches for biases on, untied where needed.

    Raises:
        ValueError: when this architecture has no switch for a bias that is needed.
    """
    config = copy.deepcopy(model.hf.config)
    if untied(model, folded.weights):
        config.tie_word_embeddings = False
    if not folded.added:
        return config, _blank(model, config)
    plain, switched = set(_blank(model, config).state_dict()), set()
    for switch in [name for name, value in vars(config).items() if "bias" in name and value is False]:
        with_it = copy.deepcopy(config)
        setattr(with_it, switch, True)
        new = set(_blank(model, with_it).state_dict()) - plain
        if new & set(folded.added):
            setattr(config, switch, True)
            switched |= new
    if missing := [name for name in folded.added if name not in switched]:
        lines = "\n".join(f"- {', '.join(folded.added[name])}: needs {name}." for name in missing)
        raise ValueError(
            f"A checkpoint of {config.model_type!r} has no place for these biases, so nothing was written:\n{lines}\nLeave these out "
            "of what is baked and keep them as interventions (recipe.save, recipe.to_code), or use `with model.edited(recipe):`, which "
            "adds the biases for the time being."
        )
    return config, _blank(model, config)


def _blank(model, config):
    with torch.device("meta"):
        return type(model.hf)(config)


def _write(model, folded: Folded, config, blank, draft: Path, dtype) -> None:
    own = dict(model.hf.state_dict()) | folded.weights
    state = {}
    for name, empty in blank.state_dict().items():
        value = own[name] if name in own else torch.zeros(empty.shape, dtype=dtype)
        state[name] = value.detach().to("cpu", dtype if value.is_floating_point() else None, copy=True)
    blank.load_state_dict(state, assign=True)
    blank.tie_weights()
    blank.config.dtype = dtype
    blank.generation_config = copy.deepcopy(model.hf.generation_config)
    blank.save_pretrained(draft)
    model.tokenizer.save_pretrained(draft)


def _logits_of(folder: Path, model, dtype) -> torch.Tensor:
    """What plain transformers makes of a checkpoint: logits of the probe at the last position."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=model.names.attention).eval()
    with torch.no_grad():
        return hf(torch.stack(probe(model))).logits[:, -1].float()


def _read_back(folder: Path, tokenizer) -> str:
    """Does plain transformers cut texts as this tokenizer does? For some architectures it insists on a class."""
    from transformers import AutoTokenizer

    text = tokenizer.decode(range(min(50, len(tokenizer))))
    again = AutoTokenizer.from_pretrained(folder)
    if again(text).input_ids == tokenizer(text).input_ids:
        return "as it was"
    said = (f"AutoTokenizer takes this tokenizer for a {type(again).__name__} and cuts texts differently; load it with "
            f"transformers.{type(tokenizer).__name__}.from_pretrained.")  # fmt: skip
    warnings.warn(said, stacklevel=3)
    return said


@contextmanager
def _without_bars():
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def _move(draft: Path, folder: Path) -> None:
    """The draft takes the place of the folder; should that fail, the old one is there again."""
    old = Path(f"{draft}-old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(draft, folder)
    except BaseException:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
