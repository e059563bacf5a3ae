"""What does a feature stand for? The texts where it fires most, and the words its decoder row promotes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path

import torch

from workbench import storage
from workbench.component import Component
from workbench.locate.causal.places import STREAM
from workbench.locate.features.tokens import at_place, batches, kept, known
from workbench.locate.vocabulary.circuits import own_basis
from workbench.locate.vocabulary.readout import Readout
from workbench.plot import picture
from workbench.sae import SAE


@dataclass(frozen=True, eq=False)
class Contexts:
    """One feature, seen from both sides.

    Attributes:
        component: its address.
        rows: strongest first, one dict per text: tokens and activations (equally long, around the peak), peak (which of
            them), text (its number among the prompts), max (activation at the peak).
        promoted, suppressed: (token, logit) that the decoder row adds to most and least, through the final norm's gain.
        density: share of tokens at which it fires; max: largest activation; n_tokens: how many were looked at.
    """

    component: Component
    rows: list[dict]
    promoted: list[tuple]
    suppressed: list[tuple]
    density: float
    max: float
    n_tokens: int

    @property
    def frame(self):
        """A pandas table: activation, token at the peak, the text around it with the peak in **stars**, text number."""
        import pandas as pd

        return pd.DataFrame([{"activation": row["max"], "token": row["tokens"][row["peak"]], "context": _marked(row),
                              "text": row["text"]} for row in self.rows],
                            columns=["activation", "token", "context", "text"])  # fmt: skip

    def __repr__(self) -> str:
        peaks = ", ".join(dict.fromkeys(repr(row["tokens"][row["peak"]].strip()) for row in self.rows[:5])) or "nothing"
        words = ", ".join(repr(token.strip()) for token, _ in self.promoted[:3])
        return f"Contexts({self.component}, fires at {self.density:.2%} of tokens, most at {peaks}; promotes {words})"

    def plot(self):
        """The texts with each token shaded by the feature's activation. Returns the Figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 0.32 * len(self.rows) + 1.1), layout="constrained")
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set(xlim=(0, 100), ylim=(len(self.rows) + 0.5, -0.5))
        for line, row in enumerate(self.rows):
            at = 0.0
            for token, value in zip(row["tokens"], row["activations"], strict=True):
                shade = min(1.0, max(0.0, value) / (self.max or 1.0))  # values are rounded
                axes.text(at, line, token, fontsize=8, family="monospace", va="center",
                          bbox={"facecolor": (1.0, 0.75, 0.3, shade), "edgecolor": "none", "pad": 1.5})  # fmt: skip
                at += 1.15 * (len(token) + 1)
        words = "  ".join(f"{token.strip()} {value:+.2f}" for token, value in self.promoted[:6])
        axes.set_title(
            f"{self.component}   fires at {self.density:.2%} of tokens\npromotes: {words}", fontsize=9, loc="left"
        )
        return picture(figure)

    def save(self, path) -> Path:
        """Write one JSON file."""
        plain = asdict(self) | {"component": str(self.component)}
        return storage.write_file(path, plain)

    @classmethod
    def load(cls, path) -> Contexts:
        """Read it back."""
        plain = storage.read(cls, path)
        plain["component"] = Component.parse(plain["component"])
        for side in ("promoted", "suppressed"):
            plain[side] = [tuple(pair) for pair in plain[side]]
        return cls(**plain)


def contexts(model, sae: SAE, index, prompts, *, k: int = 8, window: int = 12, words: int = 8):
    """Where does this feature fire, and which words does it promote?

    Args:
        sae: an SAE that fits the model (attached or not), or the name of an attached one.
        index: number of a feature, or a list of them; one pass over the texts serves all.
        prompts: texts, a task or its name.
        k: texts to keep, each with `window` tokens on either side of its peak. words: promoted tokens to name.
    Returns:
        Contexts, or a list of them for a list. A feature that fires nowhere has no rows.
    Raises:
        ValueError: for a feature that the SAE does not have, or an SAE that writes neither to the stream nor to z.
    """
    sae = (sae if isinstance(sae, SAE) else model.saes[sae]).to("cpu")
    single = isinstance(index, int)
    wanted = [index] if single else [int(one) for one in index]
    for one in wanted:
        if not 0 <= one < sae.d_sae:
            raise ValueError(f"{sae.name!r} has features 0 to {sae.d_sae - 1}; got {one}.")
    ids = known(model, prompts)
    best: list[list] = [[] for _ in wanted]
    fired, total = torch.zeros(len(wanted)), 0
    for numbers, part in batches(model, ids):
        (x,) = at_place(model, part, sae.source)
        keep = kept(part)
        f = torch.where(keep[..., None], sae.encode(x, wanted), 0.0)
        fired += (f > 0).sum((0, 1))
        total += int(keep.sum())
        peaks = f.max(1)
        for j in range(len(wanted)):
            for row in peaks.values[:, j].topk(min(k, len(numbers))).indices.tolist():
                if peaks.values[row, j] > 0:
                    own = f[row, part.pads[row] :, j]
                    best[j].append((float(peaks.values[row, j]), numbers[row], int(own.argmax()), own))
            best[j] = sorted(best[j], key=lambda one: (-one[0], one[1]))[:k]
    logits = promoted(model, sae, wanted)
    found = []
    for j, one in enumerate(wanted):
        rows = [_row(model, ids, *peak, window) for peak in best[j]]
        up, down = logits[j].topk(words), (-logits[j]).topk(words)
        found.append(Contexts(
            sae.feature(one), rows, [(model.token(i), float(v)) for v, i in zip(up.values, up.indices)],
            [(model.token(i), -float(v)) for v, i in zip(down.values, down.indices)], float(fired[j] / total),
            rows[0]["max"] if rows else 0.0, total))  # fmt: skip
    return found[0] if single else found


def promoted(model, sae: SAE, features) -> torch.Tensor:
    """Decoder rows through the final norm's gain and the unembedding: [feature, d_vocab], each feature's mean removed.

    What a feature adds to the logits directly; what later layers make of it is not in it. Rows at z go through W_O first,
    rows at ln_final have the gain behind them.

    Raises:
        ValueError: for an SAE that writes neither to the stream nor to z.
    """
    rows, names, at = sae.W_dec[features].to("cpu"), model.names, sae.at
    if at.kind == "z":
        heads = [at.index] if isinstance(at.index, int) else range(names.n_heads)
        rows = rows @ torch.cat([model.weight("W_O", at.layer, head) for head in heads]).cpu()
        block = attrgetter(names.row.layers)(model.hf)[at.layer]
        rows = own_basis(rows, names.row.attn_add, block, (names.row.attn, names.row.heads), names)
    elif at.kind not in (*STREAM, "embed", "ln_final"):
        raise ValueError(f"{sae!r} does not write to the stream, so its features promote no words directly.")
    readout = Readout(model)
    matrix = model.weight("W_U").cpu() * readout.factor if at.kind == "ln_final" else readout.matrix().cpu()
    logits = rows @ matrix
    return logits - logits.mean(1, keepdim=True)


def _row(model, ids, value: float, number: int, peak: int, own: torch.Tensor, window: int) -> dict:
    start, end = max(0, peak - window), peak + window + 1
    tokens = [model.token(i) for i in ids[number][start:end]]
    return {"tokens": tokens, "activations": [round(v, 4) for v in own[start:end].tolist()], "peak": peak - start,
            "text": number, "max": value}  # fmt: skip


def _marked(row: dict) -> str:
    return " ".join(f"**{t.strip()}**" if i == row["peak"] else t.strip() for i, t in enumerate(row["tokens"]))
