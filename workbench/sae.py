"""Sparse autoencoders: a wider, sparse code for one tensor of the model, in the folder layout that SAELens reads and writes.

A feature f_j is a number per token; its decoder row W_dec[j] is what it stands for in the stream. What the dictionary
does not explain, x - decode(encode(x)), is the error term; interventions here always leave it in place.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from workbench import storage
from workbench.component import TL_HOOKS, Component

DATA = next(p for p in (Path(__file__).parent / "data", Path(__file__).parents[1] / "data") if p.is_dir())
ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
HOOKS = {kind: hook for hook, kind in TL_HOOKS.items()}
FORMAT = "6.0.0"  # the version of the SAELens layout that `save` writes


@dataclass(frozen=True, eq=False, repr=False)
class SAE:
    """A dictionary of features for one tensor of a model; for a transcoder, from one tensor to another.

    encode: f = act((x - b_dec) W_enc + b_enc), decode: f W_dec + b_dec, x [..., d_in] and f [..., d_sae].

    Attributes:
        W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]: float32, as `x @ W_enc`, `f @ W_dec`.
        at: the component that the features are written to, and read from unless `reads` says otherwise.
        architecture: "standard" (ReLU), "topk" (the k largest of each token), "jumprelu" (those above `threshold`
            [d_sae]) or "batchtopk" (trained with k per token on average; used like jumprelu, with one threshold).
        apply_b_dec_to_input: whether b_dec is subtracted before encoding.
        normalize: per token before encoding, undone after decoding: "none", "layer_norm" or "constant_norm_rescale".
        reads: for a transcoder, the component it reads; `Component("mlp_in", 5)` is what the FFN of block 5 is given.
        before_gain: its input was taken before the norm's gain (TransformerLens' ln2.hook_normalized).
        W_skip: [d_out, d_in], the linear part of a skip transcoder.
        name: as in feature.NAME.77. fingerprint: of the model it was trained on, where known. notes: provenance.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    at: Component
    architecture: str = "standard"
    k: int | None = None
    threshold: torch.Tensor | None = None
    apply_b_dec_to_input: bool = True
    normalize: str = "none"
    reads: Component | None = None
    before_gain: bool = False
    W_skip: torch.Tensor | None = None
    name: str = "sae"
    fingerprint: str = ""
    notes: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", Component.parse(self.at))
        for tensor in TENSORS:
            if getattr(self, tensor) is not None:
                object.__setattr__(self, tensor, torch.as_tensor(getattr(self, tensor)).detach().float())
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture={self.architecture!r} is unknown; choose {', '.join(ARCHITECTURES)}.")
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize={self.normalize!r} is unknown; choose {', '.join(NORMALIZATIONS)}.")
        if self.architecture == "topk" and not self.k:
            raise ValueError("A topk SAE needs k, the number of features that may be active at a token.")
        if self.architecture in ("batchtopk", "jumprelu") and self.threshold is None:
            raise ValueError(f"A {self.architecture} SAE needs its threshold [d_sae].")
        if not re.fullmatch(r"[A-Za-z_][\w-]*", self.name):
            raise ValueError(f"{self.name!r} cannot stand in feature.NAME.77: a name has letters, digits, _ and -.")
        wanted = {"b_enc": (self.d_sae,), "W_dec": (self.d_sae, len(self.b_dec)), "threshold": (self.d_sae,)}
        for tensor, shape in wanted.items():
            value = getattr(self, tensor)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{tensor} has shape {list(value.shape)}; with W_enc {list(self.W_enc.shape)} it "
                                 f"must be {list(shape)}.")  # fmt: skip
        if self.apply_b_dec_to_input and len(self.b_dec) != self.d_in:
            raise ValueError("b_dec can be subtracted from the input only if both have the same width.")

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """How many features."""
        return self.W_enc.shape[1]

    @property
    def source(self) -> Component:
        """The component it reads."""
        return self.reads or self.at

    def __repr__(self) -> str:
        how = f"{self.architecture}{f', k={self.k}' if self.k else ''}"
        where = str(self.at) if self.reads is None else f"{self.reads} -> {self.at}"
        return f"SAE({self.name!r}, {where}, {self.d_in} -> {self.d_sae} features, {how})"

    def feature(self, index: int) -> Component:
        """The address of one feature, once this is attached to a model."""
        return Component("feature", None, int(index), None, self.name)

    # the code

    def encode(self, x: torch.Tensor, features=None) -> torch.Tensor:
        """Which features are active? [..., d_sae], or [..., n] for a list of n features (then only these are computed)."""
        x, _, _ = self._normalized(x.float())
        x = x - self.b_dec if self.apply_b_dec_to_input else x
        if self.architecture == "topk":  # whether a feature is among the largest depends on all
            pre = x @ self.W_enc + self.b_enc
            top = pre.topk(self.k, dim=-1)
            f = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
            return f if features is None else f[..., features]
        part = slice(None) if features is None else features
        pre = x @ self.W_enc[:, part] + self.b_enc[part]
        return pre.relu() if self.threshold is None else pre.relu() * (pre > self.threshold[part])

    def decode(self, f: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """What do these features stand for? [..., d_out].

        Args:
            x: what was encoded; needed where tokens are normalized, and for a skip transcoder.
        """
        if x is None and (self.normalize != "none" or self.W_skip is not None):
            raise ValueError("This SAE decodes relative to what was encoded: sae.decode(features, x).")
        out = f @ self.W_dec + self.b_dec
        if self.normalize != "none" and self.reads is None:
            _, shift, scale = self._normalized(x.float())
            out = out * scale + shift
        return out if self.W_skip is None else out + x.float() @ self.W_skip.T

    def change(self, difference: torch.Tensor, x: torch.Tensor, features=None) -> torch.Tensor:
        """How does `at` move when features move by `difference` and the error term stays? [..., d_out].

        Args:
            difference: f' - f [..., n] of the given features (of all, without a list); x: what was encoded.
        """
        rows = self.W_dec if features is None else self.W_dec[features]
        return (difference @ rows) * self._out_scale(x)

    def slope(self, gradient: torch.Tensor, x: torch.Tensor, features=None) -> torch.Tensor:
        """Gradient with respect to the features, from the gradient [..., d_out] at `at`, the error term held fixed."""
        rows = self.W_dec if features is None else self.W_dec[features]
        return (gradient.float() * self._out_scale(x)) @ rows.T

    def _out_scale(self, x: torch.Tensor):
        return self._normalized(x.float())[2] if self.normalize != "none" and self.reads is None else 1.0

    def _normalized(self, x: torch.Tensor):
        """(x as the encoder sees it, shift, scale), decoded = scale * out + shift."""
        if self.normalize == "layer_norm":
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
            return (x - mean) / (std + 1e-5), mean, std
        if self.normalize == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.d_in**0.5
            return x / scale, 0.0, scale
        return x, 0.0, 1.0

    def to(self, device) -> SAE:
        """The same SAE with its tensors on another device."""
        return replace(self, **{n: getattr(self, n).to(device) for n in TENSORS if getattr(self, n) is not None})

    # files

    def save(self, folder, dtype=torch.float32) -> Path:
        """Write `cfg.json` and `sae_weights.safetensors`, as SAELens reads them (batchtopk goes out as jumprelu).

        Args:
            dtype: of the stored numbers; torch.float16 halves the file and rounds them.
        """
        stored = {n: getattr(self, n).to("cpu", dtype) for n in TENSORS if getattr(self, n) is not None}
        plain = "jumprelu" if self.architecture == "batchtopk" else self.architecture
        kind = plain if self.reads is None else "_".join(
            [*(["jumprelu"] if plain == "jumprelu" else []), *(["skip"] if self.W_skip is not None else []), "transcoder"]
        )  # fmt: skip
        cfg = {"architecture": kind, "d_in": self.d_in, "d_sae": self.d_sae, "dtype": str(dtype).removeprefix("torch."),
               "device": "cpu", "apply_b_dec_to_input": self.apply_b_dec_to_input,
               "normalize_activations": self.normalize, "reshape_activations": "hook_z" if self.at.kind == "z" else "none",
               **({"k": self.k} if plain == "topk" else {}),
               **({} if self.reads is None else {"d_out": len(self.b_dec)}),
               "metadata": {"sae_lens_version": FORMAT, "hook_name": _hook(self.source, self.before_gain),
                            "hook_head_index": self.at.index if isinstance(self.at.index, int) else None,
                            **({} if self.reads is None else {"hook_name_out": _hook(self.at)})},
               "workbench": {"name": self.name, "architecture": self.architecture, "k": self.k,
                             "fingerprint": self.fingerprint, "notes": self.notes}}  # fmt: skip
        text = json.dumps(cfg, indent=2) + "\n"  # SAELens' format, not ours
        return storage.write(folder, {"sae_weights.safetensors": stored, "cfg.json": text})

    @classmethod
    def names(cls) -> list[str]:
        """The SAEs that come with the workbench."""
        return sorted(path.parent.name for path in (DATA / "sae").glob("*/cfg.json"))

    @classmethod
    def load(cls, folder, *, at=None, scale: float | None = None, name: str | None = None) -> SAE:
        """Read an SAE or transcoder: a bundled name, a folder in SAELens' layout, or one with Gemma Scope's params.npz.

        Args:
            folder: `SAE.names()` has the bundled ones. From the hub: download the folder first, for example
                `huggingface_hub.snapshot_download(repo, allow_patterns="blocks.8.hook_resid_pre/*")`.
            at: the component it belongs to, where the folder does not say (params.npz never does).
            scale: what activations are to be multiplied by before encoding, for a folder that asks for
                "expected_average_only_in": sqrt(d_in) / mean norm of the activations; 1 if it is folded in already.
        Raises:
            FileNotFoundError: when there is no such folder, with the nearest bundled name.
            ValueError: for an architecture that cannot be read, or a place that no component names.
        """
        path = DATA / "sae" / str(folder) if str(folder) in cls.names() else Path(folder).expanduser()
        given = {"name": name} if name else {}
        if (path / "params.npz").is_file() and not (path / "cfg.json").is_file():
            return _from_npz(path / "params.npz", at, given)
        if not (path / "cfg.json").is_file():
            near = difflib.get_close_matches(str(folder), cls.names(), 1, 0.5)
            raise FileNotFoundError(f"{folder} holds no cfg.json." + (f" Did you mean {near[0]!r}?" if near else "")
                                    + f" SAE.load takes a folder in SAELens' layout, or one of: "
                                    f"{', '.join(cls.names()) or '(none bundled)'}.")  # fmt: skip
        cfg = json.loads((path / "cfg.json").read_text(encoding="utf-8"))
        sae = _from_saelens(cfg, storage.read_tensors(path / "sae_weights.safetensors"), at, scale, path)
        return replace(sae, **given) if given else sae


def _from_saelens(cfg: dict, stored: dict, at, scale, path: Path) -> SAE:
    """From a configuration of any SAELens version: keys lie flat before version 6, under "metadata" since."""
    flat = {**cfg, **(cfg.get("meta") or {}), **(cfg.get("metadata") or {})}
    ours = cfg.get("workbench", {})
    stored = {key: tensor.float() for key, tensor in stored.items()}
    kind = flat.get("architecture", "standard")
    activation = flat.get("activation_fn_str", flat.get("activation_fn", "relu"))
    settings: dict = {"apply_b_dec_to_input": bool(flat.get("apply_b_dec_to_input", True))}
    if kind == "topk" or activation == "topk":
        settings |= {"architecture": "topk", "k": int(flat.get("k") or flat["activation_fn_kwargs"]["k"])}
    elif "topk_threshold" in stored:  # a training checkpoint of a BatchTopK SAE
        settings |= {"architecture": "batchtopk",
                     "threshold": stored["topk_threshold"].expand(stored["b_enc"].shape).clone()}  # fmt: skip
    elif "threshold" in stored or "log_threshold" in stored:
        threshold = stored["threshold"] if "threshold" in stored else stored["log_threshold"].exp()
        settings |= {"architecture": "jumprelu", "threshold": threshold}
    elif kind not in ("standard", "transcoder", "skip_transcoder"):
        raise ValueError(
            f"{path}: architecture {kind!r} cannot be read; {', '.join(ARCHITECTURES)} and transcoders can."
        )
    if ours:
        settings |= {key: ours[key] for key in ("name", "architecture", "k", "fingerprint", "notes")}
    if "transcoder" in kind or flat.get("is_transcoder"):
        hook_in, hook_out = flat.get("hook_name", flat.get("hook_point")), flat.get("hook_name_out")
        settings |= {"reads": _place(hook_in, path), "before_gain": str(hook_in).endswith("ln2.hook_normalized"),
                     "apply_b_dec_to_input": False, "W_skip": stored.get("W_skip")}  # fmt: skip
    else:
        hook_out = flat.get("hook_name", flat.get("hook_point"))
    settings["at"] = Component.parse(at) if at is not None else _place(hook_out, path, flat.get("hook_head_index"))
    W_enc, b_enc, W_dec, b_dec = (stored[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec"))
    if "scaling_factor" in stored:
        W_dec = W_dec * stored["scaling_factor"][:, None]
    if flat.get("rescale_acts_by_decoder_norm"):  # as if the rows of the decoder had length 1
        norm = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
        if "threshold" in settings and "topk_threshold" not in stored:
            settings["threshold"] = settings["threshold"] * norm
    normalize = flat.get("normalize_activations") or "none"
    if normalize in (True, "expected_average_only_in"):
        if scale is None:
            raise ValueError(f"{path} was trained on activations times a factor that the folder does not hold. Give it: "
                             "scale=sqrt(d_in) / (mean norm of the activations), or scale=1 if it is folded in.")  # fmt: skip
        W_enc, W_dec, b_dec, normalize = W_enc * scale, W_dec / scale, b_dec / scale, "none"
    return SAE(W_enc, b_enc, W_dec, b_dec, normalize=normalize, **settings)


def _from_npz(file: Path, at, given: dict) -> SAE:
    import numpy as np

    if at is None:
        raise ValueError(f"{file.name} does not say where it belongs; give at=, for example at='resid_post.12'.")
    with np.load(file) as data:
        stored = {key: torch.tensor(data[key]) for key in data}
    return SAE(*(stored[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec")), at=at, architecture="jumprelu",
               threshold=stored["threshold"], apply_b_dec_to_input=False, **given)  # fmt: skip


def _place(hook: str | None, path: Path, head: int | None = None) -> Component:
    """The component of a hook name, of TransformerLens or of transformers (model.layers.5 is a block's output)."""
    hook = str(hook)
    if block := re.fullmatch(r"(?:model|transformer|gpt_neox)\.(?:layers|h)\.(\d+)", hook):
        return Component("resid_post", int(block[1]))
    if normed := re.fullmatch(r"blocks\.(\d+)\.(?:ln2\.hook_normalized|mlp\.hook_in)", hook):
        return Component("mlp_in", int(normed[1]))
    if middle := re.fullmatch(r"blocks\.(\d+)\.hook_mlp_in", hook):
        return Component("resid_mid", int(middle[1]))
    try:
        one = Component.parse(hook)
    except ValueError:
        raise ValueError(f"{path} belongs at {hook!r}, which names no component here; give at=, for example "
                         "at='resid_post.5'.") from None  # fmt: skip
    return replace(one, index=head) if head is not None else one


def _hook(one: Component, before_gain: bool = False) -> str:
    if one.kind == "mlp_in":
        return f"blocks.{one.layer}.{'ln2.hook_normalized' if before_gain else 'mlp.hook_in'}"
    return f"blocks.{one.layer}.{HOOKS[one.kind]}" if one.kind in HOOKS else str(one)
