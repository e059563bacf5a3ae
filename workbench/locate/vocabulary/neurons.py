"""What do an FFN's neurons say, in words? What their values promote, what their keys match, what they fire on."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch

from workbench import storage
from workbench.component import Component, components
from workbench.locate.vocabulary.circuits import Space, own_basis
from workbench.locate.vocabulary.readout import gain_of, last_of
from workbench.model.plan import Prompts

DRAWS = 200
MOST = 512  # neurons at a time


@dataclass(frozen=True, eq=False)
class NeuronVocabulary:
    """Neurons in words.

    Attributes:
        neurons: as they were asked for. sides: "promotes" and "suppresses" (the value, W_out), "opens" (the gate's key;
            "matches" where there is no gate) and "fires" (the activation on the token alone).
        words: side -> per neuron its k tokens with their scores: standard deviations above the mean over the vocabulary;
            for "fires" activations with their sign (a gated neuron can be negative, and then suppresses what it promotes).
        null_p95: side -> what the first score reaches in 95 % of random mixtures of the layer's keys or values [neuron]: a
            neuron beyond it has more of a word than such a mixture. NaN for "fires".
    """

    neurons: list[Component]
    words: dict[str, list[list[tuple[str, float]]]]
    null_p95: dict[str, np.ndarray]

    @property
    def sides(self) -> list[str]:
        return list(self.words)

    @property
    def frame(self):
        """A pandas table: a row for each neuron and side."""
        import pandas as pd

        return pd.DataFrame([
            {"neuron": str(one), "side": side, "tokens": " ".join(word for word, _ in self.words[side][i]),
             "score": self.words[side][i][0][1], "null_p95": float(self.null_p95[side][i])}
            for i, one in enumerate(self.neurons) for side in self.sides
        ])  # fmt: skip

    def __repr__(self) -> str:
        first = self.words["promotes"][0]
        beyond = np.mean([top[0][1] for top in self.words["promotes"]] > self.null_p95["promotes"])
        return (f"NeuronVocabulary({len(self.neurons)} neurons, {beyond:.0%} promote a word beyond the null; "
                f"{self.neurons[0]} promotes {' '.join(word for word, _ in first[:3])})")  # fmt: skip

    def plot(self, n: int = 8):
        """The first n neurons as a matplotlib figure: their tokens, shaded by score."""
        from workbench.locate.vocabulary.draw import cells

        lines = [
            (f"{one} {side}", self.words[side][i]) for i, one in enumerate(self.neurons[:n]) for side in self.sides[:3]
        ]
        lines = lines[::-1]
        shade = np.array([[abs(score) for _, score in line] for _, line in lines])
        return cells([[word for word, _ in line] for _, line in lines], shade, [name for name, _ in lines],
                     [str(i + 1) for i in range(shade.shape[1])], "neurons in words", "standard deviations")  # fmt: skip

    def save(self, path) -> Path:
        """Write one JSON file."""
        null = {side: values.tolist() for side, values in self.null_p95.items()}
        plain = {"neurons": [str(one) for one in self.neurons], "words": self.words, "null_p95": null}
        return storage.write_file(path, plain)

    @classmethod
    def load(cls, path) -> NeuronVocabulary:
        """Read it back."""
        plain = storage.read(cls, path)
        words = {side: [[(w, s) for w, s in line] for line in lines] for side, lines in plain["words"].items()}
        return cls([Component.parse(one) for one in plain["neurons"]], words,
                   {side: np.array(values) for side, values in plain["null_p95"].items()})  # fmt: skip


def neuron_vocabulary(model, at, *, k: int = 10, embedding: str = "alone", seed: int = 0) -> NeuronVocabulary:
    """What do these neurons say: which words do they promote and suppress, and on which do they fire?

    A neuron's value (its row of W_out) is read through the final norm's gain and the unembedding, its key (its column of
    the gate, or of W_in) is compared with the tokens as the FFN finds them. What later layers make of it is not in it.

    Args:
        at: neurons: "neuron.5.120", a list, or a family such as "neuron.5.*".
        embedding: "alone" (each token as the FFN finds it when it stands alone after BOS) or "W_E" (bare embeddings;
            "fires" needs "alone").
    Returns:
        NeuronVocabulary.
    Raises:
        ValueError: for what is no neuron, or a model that does not offer them.
    Source:
        Geva et al. 2021 and 2022, "Transformer feed-forward layers are key-value memories" and "... build predictions by
        promoting concepts in the vocabulary space".
    """
    given = components(at)
    for one in given:
        if one.kind != "neuron" or one.position is not None:
            raise ValueError(
                f"{one} is no neuron; write for example 'neuron.5.120' or 'neuron.5.*', without a position."
            )
    neurons, names = model.names.expand(given), model.names
    kind = "resid_mid" if "resid_mid" not in names.refused else "resid_pre"
    space = Space(model, {one.layer for one in neurons}, embedding, seed, kind)
    gated = _gated(model)
    sides = ["promotes", "suppresses", "opens" if gated else "matches", *(["fires"] if embedding == "alone" else [])]
    words: dict[str, list] = {side: [None] * len(neurons) for side in sides}
    null = {side: np.full(len(neurons), np.nan) for side in sides}
    for layer in {one.layer: None for one in neurons}:
        mine = [i for i, one in enumerate(neurons) if one.layer == layer]
        index, block = [neurons[i].index for i in mine], attrgetter(names.row.layers)(model.hf)[layer]
        generator = torch.Generator().manual_seed(seed)
        keys = model.weight("W_gate" if gated else "W_in", layer).T.cpu()  # [neuron, d_model]
        values = own_basis(model.weight("W_out", layer).cpu(), names.row.mlp_add, block,
                           (names.row.neurons, names.row.neurons.rpartition(".")[0]), names)  # fmt: skip
        tokens = _found(model, space, layer)
        for side, rows, columns, ids, sign in (("promotes", values, space.out, None, 1), ("suppresses", values, space.out, None, -1),
                                               (sides[2], keys, tokens.T, space.ids, 1)):  # fmt: skip
            mixed = torch.randn(DRAWS, len(rows), generator=generator) @ rows
            null[side][mine] = np.quantile(_standard(mixed @ columns).amax(1).numpy(), 0.95)
            for part in range(0, len(mine), MOST):
                table = _standard(sign * (rows[index[part : part + MOST]] @ columns))
                for i, line in zip(mine[part : part + MOST], _top(model, table, k, ids), strict=True):
                    words[side][i] = line
        if "fires" in sides:
            acts = last_of(model, Prompts(space.rows(space.ids)), "neuron", layer).T[index]
            for i, line in zip(mine, _top(model, acts, k, space.ids, signed=True), strict=True):
                words["fires"][i] = line
    return NeuronVocabulary(neurons, words, null)


def _found(model, space: Space, layer: int) -> torch.Tensor:
    """Tokens as the FFN of a layer reads them, without their mean, [token, d_model]."""
    x, norm = space.streams[layer], model.names.norm("norm_mlp", layer)
    if norm is not None:
        gain, _, centred = gain_of(norm, x.shape[1])
        x = x - x.mean(1, keepdim=True) if centred else x
        x = x / x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12) * gain.float().cpu()
    return x - x.mean(0)


def _gated(model) -> bool:
    try:
        model.weight("W_gate", 0)
    except ValueError:
        return False
    return True


def _standard(table: torch.Tensor) -> torch.Tensor:
    return (table - table.mean(1, keepdim=True)) / table.std(1, keepdim=True).clamp(min=1e-12)


def _top(model, table: torch.Tensor, k: int, ids=None, signed: bool = False) -> list:
    """The k first tokens of each row with their scores; with `signed` by size, the score keeping its sign."""
    usable = min(table.shape[1], len(model.tokenizer))
    table = table[:, :usable]
    index = (table.abs() if signed else table).topk(min(k, usable), 1).indices
    score = table.gather(1, index)
    return [[(model.token(int(i) if ids is None else int(ids[i])), float(s)) for i, s in zip(line, values)]
            for line, values in zip(index.tolist(), score.tolist())]  # fmt: skip
