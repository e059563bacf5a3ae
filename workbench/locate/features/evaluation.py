"""How good is a dictionary? What it leaves out, and what that costs the model, beside a random dictionary and PCA."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch

from workbench import measure
from workbench.locate.features.tokens import at_place, batches, kept, known
from workbench.model.features import write
from workbench.model.plan import TOKENS_PER_PASS
from workbench.plot import picture
from workbench.sae import SAE


@dataclass(frozen=True, eq=False)
class Quality:
    """What a dictionary keeps, and what the model loses when it works from the reconstruction alone.

    Attributes:
        rows: one dict per reconstruction: "sae", "random" (as many active features from random directions of the same
            lengths), "pca" (as many principal components), "mean", "zero" (nothing).
        density: [d_sae], share of tokens at which each feature is active. at, name: of the SAE. n_texts, n_tokens.
        loss: of the untouched model, nats per token. cost: forward-pass equivalents.
    """

    rows: list[dict]
    density: np.ndarray
    name: str
    at: str
    n_texts: int
    n_tokens: int
    loss: float
    cost: float
    seconds: float
    notes: dict = field(default_factory=dict)

    @property
    def frame(self):
        """A pandas table, one row per reconstruction.

        l0: active features per token. explained_variance, cosine: of the activations. loss_change: nats per token that
        the model gets worse, with its interval over texts. kl: how far its predictions move, nats per token.
        loss_recovered: 1 - loss_change / that of zero, which flatters, for zero is far worse than anything real;
        recovered_from_mean is the same against the mean activation. dead: share of features that never fire here.
        """
        import pandas as pd

        return pd.DataFrame(self.rows).set_index("reconstruction")

    def __repr__(self) -> str:
        sae = self.rows[0]
        return (f"Quality({self.name!r} at {self.at}, {self.n_tokens} tokens: L0 {sae['l0']:.1f}, explained variance "
                f"{sae['explained_variance']:.3f}, loss {self.loss:.3f} {sae['loss_change']:+.3f} nats, KL {sae['kl']:.3f}, "
                f"{sae['dead']:.1%} dead)")  # fmt: skip

    def plot(self):
        """Explained variance and loss change by reconstruction, and how often features fire. Returns the Figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 2.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        names = [row["reconstruction"] for row in self.rows]
        colours = ["#2166ac"] + ["#9aa3ad"] * (len(names) - 1)
        left.barh(names[::-1], [row["explained_variance"] for row in self.rows][::-1], color=colours[::-1])
        left.set_xlabel("explained variance")
        middle.barh(names[::-1], [row["kl"] for row in self.rows][::-1], color=colours[::-1])
        middle.set_xlabel("KL to the untouched model (nats)")
        right.hist(np.log10(self.density[self.density > 0]), bins=30, color="#2166ac")
        right.set_xlabel("log10 share of tokens at which a feature fires")
        right.set_ylabel("features")
        figure.suptitle(f"{self.name} at {self.at}: {self.n_tokens} held-out tokens", fontsize=10)
        return picture(figure)


def evaluate(model, sae: SAE, prompts, *, seed: int = 0) -> Quality:
    """Does this dictionary keep what the model needs? Measured on held-out texts, beside what no dictionary would keep.

    The tensor is replaced by its reconstruction at every token but the first. Controls work on the same tensor with the
    same number of active features: directions drawn at random with the lengths of the decoder's rows (the features
    that fit a token best are taken, with one factor for all, fitted to these texts), and the first principal components
    (also of these texts, in their favour).

    Args:
        prompts: held-out texts, a task or its name.
    Returns:
        Quality.
    Raises:
        ValueError: for an SAE that does not fit the model, or texts the tokenizer does not know.
    Source:
        Gao et al. 2024; Karvonen et al. 2025 (SAEBench); Korznikov et al. 2025 on random dictionaries.
    """
    began = time.perf_counter()
    ids = known(model, prompts)
    mine = _fitting(model, sae)
    budget = max(1, min(TOKENS_PER_PASS, 2**27 // model.names.d_vocab))
    parts = list(batches(model, ids, budget))
    pairs = [_read(model, mine, part) for _, part in parts]
    x, y = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    arms, density, l0 = _arms(mine, x, y, seed)
    sums = {name: [] for name in arms}
    base, done = [], 0
    for _, part in parts:
        keep = kept(part)
        now = slice(done, done + int(keep.sum()))
        done = now.stop
        before = _logits(model, mine, part, None, keep)
        base.append(_losses(before, part))
        for name, make in arms.items():
            after = _logits(model, mine, part, make(x[now], y[now]), keep)
            sums[name].append(torch.stack([_losses(after, part), _moved(before, after, part)]))
    base = torch.cat(base, 1)
    per_text = {name: torch.cat(parts_, 2) for name, parts_ in sums.items()}
    rows = _rows(arms, per_text, base, x, y, density, l0, seed)
    return Quality(rows, density.numpy(), sae.name, str(sae.at), len(ids), len(x), float(base[0].sum() / base[1].sum()),
                   1.5 + len(arms), time.perf_counter() - began, {"seed": seed})  # fmt: skip


def _fitting(model, sae: SAE) -> SAE:
    """The SAE as attaching it would make it, checked; nothing stays attached."""
    if model.saes.get(sae.name) is sae:
        return sae.to("cpu")
    name = next(f"{sae.name}_{i}" for i in range(99) if f"{sae.name}_{i}" not in model.saes)
    try:
        return model.attach(sae, name).to("cpu")
    finally:
        if name in model.saes:
            model.detach(name)


def _read(model, sae: SAE, part):
    """What is encoded and what is to be rebuilt, [token, width] each."""
    places = [sae.source] if sae.reads is None else [sae.source, sae.at]
    found = [x[kept(part)] for x in at_place(model, part, *places)]
    return found[0], found[-1]


def _arms(sae: SAE, x: torch.Tensor, y: torch.Tensor, seed: int):
    """Ways to rebuild y, as functions of (x, y) [token, width]; how often each feature fires; their mean number."""
    fired, active = torch.zeros(sae.d_sae), 0
    for some in x.split(4096):
        f = sae.encode(some)
        fired += (f > 0).sum(0)
        active += int((f > 0).sum())
    l0 = max(1, round(active / len(x)))
    mean = y.mean(0)
    rng = torch.Generator().manual_seed(seed)
    random = (
        torch.nn.functional.normalize(torch.randn(sae.W_dec.shape, generator=rng), dim=1)
        * sae.W_dec.norm(dim=1)[:, None]
    )

    def best(y):
        fits = (y - mean) @ torch.nn.functional.normalize(random, dim=1).T
        top = fits.topk(min(l0, sae.d_sae), dim=1)
        return torch.zeros_like(fits).scatter(1, top.indices, top.values.relu()) @ random

    sample = y[torch.randperm(len(y), generator=rng)[:4096]]
    rough = best(sample)
    factor = ((sample - mean) * rough).sum() / rough.pow(2).sum().clamp(min=1e-9)
    basis = torch.linalg.svd(sample - mean, full_matrices=False).Vh[:l0]
    return (
        {
            "sae": lambda x, y: sae.decode(sae.encode(x), x),
            "random": lambda x, y: mean + factor * best(y),
            "pca": lambda x, y: mean + (y - mean) @ basis.T @ basis,
            "mean": lambda x, y: mean.expand_as(y),
            "zero": lambda x, y: torch.zeros_like(y),
        },
        fired / len(x),
        active / len(x),
    )


def _logits(model, sae: SAE, part, new: torch.Tensor | None, keep: torch.Tensor) -> torch.Tensor:
    """Logits [row, column, d_vocab] with the tokens that are kept replaced by `new` [token, width]."""
    names, rows = model.names, len(part.ids)

    def make(old):
        changed = old.clone()
        changed[keep.to(old.device)] = new.to(old)
        return changed

    def body():
        if new is not None:
            write(names, sae.at, rows, make)
        return names.nn.output.logits.clone()

    return model.trace(model.inputs(part), body).float().cpu()


def _losses(logits: torch.Tensor, part) -> torch.Tensor:
    """[2, row]: summed loss of each text's tokens after the second, and their number."""
    found = torch.zeros(2, len(part.ids))
    for row, (ids, pad) in enumerate(zip(part.ids, part.pads, strict=True)):
        found[0, row] = torch.nn.functional.cross_entropy(logits[row, pad + 1 : -1], ids[2:], reduction="sum")
        found[1, row] = len(ids) - 2
    return found


def _moved(before, after, part) -> torch.Tensor:
    """[2, row]: summed KL(before || after) over each text's tokens, and their number."""
    found = torch.zeros(2, len(part.ids))
    for row, (ids, pad) in enumerate(zip(part.ids, part.pads, strict=True)):
        found[0, row] = measure.kl(before[row, pad + 1 :], after[row, pad + 1 :]).sum()
        found[1, row] = len(ids) - 1
    return found


def _rows(arms, per_text, base, x, y, density, l0, seed) -> list[dict]:
    total = (y - y.mean(0)).pow(2).sum()
    rows, change, low, high, moved = [], {}, {}, {}, {}
    count = base[1].numpy()
    for name, ((losses, _), (kl, tokens)) in per_text.items():
        # a ratio of sums, resampled over texts together, so that long texts count as much as they are long
        ratio, lo, hi = measure.ratio_of_means((losses - base[0]).numpy()[None], count, seed=seed)
        change[name], low[name], high[name] = float(ratio[0]), float(lo[0]), float(hi[0])
        moved[name] = float(kl.sum() / tokens.sum())
    for name, make in arms.items():
        left, cosine = 0.0, 0.0
        for some_x, some_y in zip(x.split(4096), y.split(4096)):
            made = make(some_x, some_y)
            left += (some_y - made).pow(2).sum()
            cosine += torch.cosine_similarity(some_y, made, dim=1).sum()
        rows.append({
            "reconstruction": name, "l0": {"mean": 0.0, "zero": 0.0, "sae": l0}.get(name, float(max(1, round(l0)))),
            "explained_variance": float(1 - left / total), "cosine": float(cosine / len(x)),
            "loss_change": change[name], "ci_lo": low[name], "ci_hi": high[name], "kl": moved[name],
            "loss_recovered": 1 - change[name] / change["zero"],
            "recovered_from_mean": 1 - change[name] / change["mean"],
            "dead": float((density == 0).float().mean()) if name == "sae" else float("nan"),
        })  # fmt: skip
    return rows
