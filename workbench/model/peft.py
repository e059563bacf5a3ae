"""LoRA adapters in the layout of the package `peft`, read as a recipe and written from one; peft itself is not needed."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from numbers import Integral, Real
from pathlib import Path

import torch
from safetensors import SafetensorError

from workbench import storage
from workbench.model.fold import reached
from workbench.model.plan import check_recipe
from workbench.operations import Delta
from workbench.recipe import Recipe, flatten

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
USED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
# where the adapter came from, how it was trained and which layers were chosen: the tensors say the rest
NO_MATTER = ("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version",
             "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config",
             "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core",
             "qalora_group_size")  # fmt: skip
STARTS = (True, "gaussian", "eva", "orthogonal")  # the others take a part out of the model's own weights
READS = (f"Read are adapters of type LORA on linear layers, GPT-2's Conv1D and embeddings, with {', '.join(USED)}. Any other: "
         "let peft put it into the weights, PeftModel.from_pretrained(hf, folder).merge_and_unload(), save that and open it with "
         "wb.load(folder). Where it changes one side of tied embeddings, merging changes both.")  # fmt: skip


def from_peft(model, folder) -> Recipe:
    """What does an adapter that peft trained change? Its factors as a Delta for this model, acting as peft runs it, unmerged:
    of tied embeddings only the side changes that the adapter names.

    Args:
        folder: a local one, with adapter_config.json and adapter_model.safetensors.
    Returns:
        A recipe for this model, one Delta in factors; its notes hold the adapter's config.
    Raises:
        FileNotFoundError: when `folder` holds no adapter.
        ValueError: listing what is no plain LoRA (DoRA, biases, modules saved whole and the like), and what does not fit the
            model; for damaged files.
    Source:
        Hu et al. 2022, "LoRA"; Kalajdzievski 2023, rsLoRA (alpha / sqrt(r)); peft, src/peft/tuners/lora/layer.py.
    """
    folder = Path(folder).expanduser()
    config, tensors = _opened(folder)
    refused = [(f"{key}={value!r}", "more than two factors, or a start from other weights than the model's") for key, value in config.items()
               if key not in (*USED, *NO_MATTER) and value and value != "none"
               and not (key == "init_lora_weights" and value in STARTS)]  # fmt: skip
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    weights = dict(model.hf.named_parameters(remove_duplicate=False))
    for key, tensor in tensors.items():
        if found := FACTOR.fullmatch(key):
            pairs.setdefault(found[1], {})[found[2]] = tensor
        else:  # peft saves an embedding's own weights beside its factors
            own = weights.get(key.removeprefix("base_model.model.").replace(".base_layer.", "."))
            if own is None or not torch.equal(own.detach().cpu().to(tensor.dtype), tensor):
                refused.append((f"{key} {list(tensor.shape)}", "no factor, and no weight that this model has already"))
    ranks, alphas = _by_module(folder, config, "r"), _by_module(folder, config, "lora_alpha")
    refused += [(path, reason) for path, pair in pairs.items() if (reason := _misfit(model, path, pair, ranks(path)))]
    if refused or not pairs:
        lines = _listed(refused) or [f"- {folder / TENSORS} holds no lora_A and lora_B."]
        raise ValueError("\n".join([f"No recipe was made of {folder}:", *lines, READS]))
    factors = {}
    for path, pair in pairs.items():
        name, (rank, _), alpha = f"{path}.weight", pair["A"].shape, alphas(path)
        left = pair["B"].float() * (alpha / (rank**0.5 if config.get("use_rslora") else rank))
        sides = _turned(model, path, left, pair["A"].float())
        factors |= {f"{name}.{side}": one for side, one in zip(("left", "right"), sides, strict=True)}
        for other in weights:  # a weight tied to this one stays what it is
            if weights[other] is weights[name] and other != name and other.removesuffix(".weight") not in pairs:
                factors |= {f"{other}.left": 0 * sides[0][:, :1], f"{other}.right": 0 * sides[1][:1]}
    return Recipe([Delta(weights=factors)], folder.name, notes={"peft": config}).for_model(model)


def to_peft(model, recipe, folder, rank: int | None = None, tolerance: float = 1e-5) -> Path:
    """Write the recipe's changes of weights as an adapter: `peft.PeftModel.from_pretrained(hf_model, folder)` applies it.

    Every changed matrix is decomposed (SVD, in float64) and keeps as many directions as it needs. All are stored with the
    rank of the largest, filled up with zeros, and alpha = rank: programs that know no rank by layer read the same. Of tied
    embeddings each side has factors of its own. Do not merge such an adapter (a warning says so): peft would put all of them
    into the one weight of both sides. `bake` writes whole weights instead.

    Args:
        rank: the most directions a matrix may take; None allows as many as make an adapter smaller than the matrix.
        tolerance: the largest part of a change (Frobenius norm, a share of its own) that may be lost.
    Returns:
        The folder, with adapter_config.json and adapter_model.safetensors: both, or nothing.
    Raises:
        ValueError: listing what is no change of a matrix, and changes of higher rank with what they would lose; for another
            rank or tolerance than these.
    """
    check_recipe(model, recipe)
    if rank is not None and (not isinstance(rank, Integral) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank={rank!r}: give a whole number from 1, or None for as many as a change needs.")
    if not isinstance(tolerance, Real) or not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r}: give a share from 0 to below 1; 1e-5 is usual.")
    refused, changes, larger = [], {}, {}
    weights = dict(model.hf.named_parameters(remove_duplicate=False))
    for one in [one for one in flatten(recipe) if not one.does_nothing]:
        if isinstance(one, Delta):
            for name, own in reached(weights, one).items():
                changes.setdefault(name, []).append((one, own))
        else:
            refused.append((repr(one), "an adapter changes weights, not activations; bake it, or leave it out"))
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, parts in changes.items():
        path = name.removesuffix(".weight")
        if path == name or not _carries(model.hf.get_submodule(path)):
            refused.append((name, "LoRA changes matrices of linear layers, Conv1D and plain embeddings only"))
            continue
        left, sizes, right = _decomposed(parts)
        lost = sizes.square().flip(0).cumsum(0).flip(0).sqrt() / sizes.norm().clamp(min=1e-300)  # from this one on
        need = int((lost > tolerance).sum())
        rows, width = weights[name].shape
        most = (rows * width - 1) // (rows + width) if rank is None else rank
        if need > most:
            larger.setdefault(most, []).append((float(lost[most]), need, name))
        elif need:
            root = sizes[:need].sqrt()
            kept[path] = _turned(model, path, left[:, :need] * root, root[:, None] * right[:need])
    for most, found in larger.items():
        reason = (f"rank {most}{' (the most that saves anything)' if rank is None else ''} loses {'up to ' if len(found) > 1 else ''}"
                  f"{max(found)[0]:.2g} of the change, more than tolerance={tolerance:g}; give rank={max(need for _, need, _ in found)} "
                  "or a larger tolerance")  # fmt: skip
        refused += [(name, reason) for *_, name in found]
    if refused or not kept:
        lines = _listed(refused) or ["- the recipe changes no weight; an adapter holds wb.Delta(weights=...)."]
        raise ValueError("\n".join(["No adapter was written:", *lines, "recipe.bake(model, folder) writes whole weights instead, for changes "
                                    "of any rank and for activations where they fold."]))  # fmt: skip
    size, tensors = max(len(right) for _, right in kept.values()), {}
    for path, (left, right) in kept.items():
        more = size - len(right)
        embeds = isinstance(model.hf.get_submodule(path), torch.nn.Embedding)
        key = f"base_model.model.{path}.lora_" + ("embedding_{}" if embeds else "{}.weight")
        tensors[key.format("A")] = torch.nn.functional.pad(right, (0, 0, 0, more)).float()
        tensors[key.format("B")] = torch.nn.functional.pad(left, (0, more)).float()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.hf.name_or_path or None,
              "inference_mode": True, "r": size, "lora_alpha": size, "lora_dropout": 0.0, "bias": "none", "use_rslora": False,
              "init_lora_weights": True, "target_modules": sorted(kept),
              "fan_in_fan_out": any(isinstance(model.hf.get_submodule(path), _carriers()[1]) for path in kept)}  # fmt: skip
    tied = [name for name in map("{}.weight".format, kept) if sum(one is weights[name] for one in weights.values()) > 1]
    if tied:
        warnings.warn(f"{', '.join(tied)}: tied, one weight under two names. Do not merge this adapter: merge_and_unload puts all "
                      "changes into the one weight of both sides. recipe.bake(model, folder) writes whole weights.", stacklevel=3)  # fmt: skip
    return storage.write(folder, {TENSORS: tensors, CONFIG: json.dumps(config, indent=2) + "\n"})


def _opened(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}. Give the folder that peft's save_pretrained wrote (with "
                                    "safe_serialization=True); one of the hub comes with huggingface_hub.snapshot_download(name).")  # fmt: skip
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is no JSON: {error}.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{folder} holds an adapter of type {kind!r}. {READS}")
    try:
        return config, storage.read_tensors(folder / TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is damaged: {error}. Save or download it again.") from None


def _by_module(folder: Path, config: dict, key: str):
    """Which rank ("r") or alpha ("lora_alpha") has a module? That of the first pattern that its path matches, as peft looks it
    up: a function of the path."""
    patterns = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]
    try:
        given = [*(config.get(patterns) or {}).items(), (".*", config.get(key, 8))]
        values = [(re.compile(rf"(.*\.)?({pattern})$"), float(value)) for pattern, value in given]
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"{folder / CONFIG}: {key} and {patterns} must be a number and numbers by the path of a module "
                         f"or a pattern of it ({error}). {READS}") from None  # fmt: skip
    return lambda path: next(value for pattern, value in values if pattern.match(path))


def _listed(refused: list[tuple[str, str]], most: int = 5) -> list[str]:
    """A line for each reason with the first that it holds for, at most `most` lines."""
    by: dict[str, list[str]] = {}
    for what, reason in refused:
        by.setdefault(reason, []).append(what)
    lines = [
        f"- {', '.join(what[:3])}{f' and {len(what) - 3} more' if what[3:] else ''}: {reason}."
        for reason, what in by.items()
    ]
    return lines if len(lines) <= most else [*lines[: most - 1], f"- ... and {len(lines) - most + 1} more reasons."]


def _misfit(model, path: str, pair: dict[str, torch.Tensor], said: float) -> str | None:
    """Why these factors are none of this model's module."""
    modules = dict(model.hf.named_modules())
    if path not in modules:
        return "this model has no such module; the adapter is another model's"
    if not _carries(modules[path]):
        return f"a {type(modules[path]).__name__} takes no LoRA here"
    paired = set(pair) == {"A", "B"} and all(one.dim() == 2 for one in pair.values())
    if not (paired and 0 < len(pair["A"]) == pair["B"].shape[1]):
        given = ", ".join(f"lora_{side} {list(one.shape)}" for side, one in pair.items())
        return f"lora_A [r, in] and lora_B [out, r] are needed, but given is {given}"
    if len(pair["A"]) != said:
        return f"its factors have rank {len(pair['A'])}, but {CONFIG} says {said:g} (r, rank_pattern); one of them is another adapter's"
    left, right = _turned(model, path, pair["B"], pair["A"])
    given, own = [len(left), right.shape[1]], list(modules[path].weight.shape)
    return None if given == own else f"its weight is {own}, but the factors make {given}; they are another model's"


def _decomposed(parts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of some differences as left * sizes @ right, in float64; what is given in factors stays in factors."""
    whole, lefts, rights = 0, [], []
    for delta, name in parts:
        if name in delta.weights:
            whole = whole + delta.strength * delta.weights[name].double()
        else:
            lefts.append(delta.strength * delta.weights[f"{name}.left"].double())
            rights.append(delta.weights[f"{name}.right"].double())
    if isinstance(whole, torch.Tensor):
        whole = whole + sum(left @ right for left, right in zip(lefts, rights, strict=True))
        return torch.linalg.svd(whole, full_matrices=False)
    (q, a), (p, b) = torch.linalg.qr(torch.cat(lefts, 1)), torch.linalg.qr(torch.cat(rights).T)
    left, sizes, right = torch.linalg.svd(a @ b.T, full_matrices=False)
    return q @ left, sizes, right @ p.T


def _turned(model, path: str, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Between peft's factors, B [out, r] and A [r, in], and those of the weight as it is stored; the same both ways.
    Conv1D and embeddings are stored [in, out]."""
    return (left, right) if isinstance(model.hf.get_submodule(path), torch.nn.Linear) else (right.T, left.T)


def _carries(module) -> bool:
    """Can peft put factors beside it? It gives them what `forward` is given, one tensor (OPT's positions take more)."""
    return isinstance(module, _carriers()) and len(inspect.signature(type(module).forward).parameters) == 2


def _carriers() -> tuple:
    from transformers.pytorch_utils import Conv1D

    return torch.nn.Linear, Conv1D, torch.nn.Embedding
