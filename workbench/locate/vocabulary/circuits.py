"""What do a head's weights say, in words? OV: which words it writes when it looks at a word; QK: at which words it looks.

A head's weights mean something only between the tokens as the head finds them and the logits. The first layers rewrite a
token thoroughly, so by default each token is run through the layers below, alone after BOS; `embedding="W_E"` takes the
bare embeddings instead, as papers on attention-only models do. Tokens enter through the norm in front of the head, and
leave through the final norm's gain and the unembedding; what later layers make of it is not in it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import numpy as np
import torch

from workbench.component import Component, components
from workbench.locate.vocabulary.readout import Readout, gain_of, rank_of
from workbench.scores import Scores

SAMPLE = 4096  # tokens that stand for the vocabulary, where it is larger
NUMBERS = 2**27  # of streams in memory
EMBEDDINGS = ("alone", "W_E")


@dataclass(frozen=True, eq=False)
class HeadVocabulary:
    """One head's weights as a table of tokens by tokens, of which the strongest entries of some rows are kept.

    Attributes:
        circuit: "OV" (token looked at -> tokens written) or "QK" (query token -> key tokens).
        head: as z. tokens: of the rows, as text. most, least: per row its strongest tokens on either side with their
            values, in logits before the final norm's scale for OV, in units of attention scores for QK.
        own_rank: [row], where the row's own token stands among all (1 is first). chance: what it would be on average.
        score: sum of the eigenvalues over the sum of their sizes, from -1 to 1: positive where a token leads to itself
            (copying for OV, looking at the same token for QK). null_p95: what |score| reaches with the vocabulary shuffled.
        eigenvalues: [d_head], complex. directions: for OV the strongest singular directions of W_V W_O: per direction
            (size, tokens it reads, tokens it writes, tokens it reads and writes with the other sign).
    """

    circuit: str
    head: Component
    tokens: list[str]
    most: list[list[tuple[str, float]]]
    least: list[list[tuple[str, float]]]
    own_rank: np.ndarray
    chance: float
    score: float
    null_p95: float
    eigenvalues: np.ndarray
    directions: tuple = ()

    @property
    def frame(self):
        """A pandas table: a row for each token asked for."""
        import pandas as pd

        names = ("writes", "suppresses") if self.circuit == "OV" else ("looks_at", "avoids")
        words = [[" ".join(word for word, _ in one) for one in side] for side in (self.most, self.least)]
        return pd.DataFrame({"token": self.tokens, names[0]: words[0], names[1]: words[1], "own_rank": self.own_rank})

    @property
    def singular(self):
        """A pandas table of the singular directions of W_V W_O (OV only)."""
        import pandas as pd

        columns = ["size", "reads", "writes", "reads_negative", "writes_negative"]
        return pd.DataFrame(
            [(s, *(" ".join(words) for words in rest)) for s, *rest in self.directions], columns=columns
        )

    def __repr__(self) -> str:
        what = "copying" if self.circuit == "OV" else "same-token"
        return (f"HeadVocabulary({self.circuit} of {self.head}, {what} score {self.score:+.2f} (null {self.null_p95:.2f}), own "
                f"token's median rank {np.median(self.own_rank):.0f} of {2 * self.chance - 1:.0f})")  # fmt: skip

    def plot(self):
        """The eigenvalues in the complex plane, as a matplotlib figure: to the right of 0 a token leads to itself."""
        from workbench.locate.vocabulary.draw import eigenvalues

        return eigenvalues(self)


def ov_circuit(model, head, *, tokens=None, k: int = 5, embedding: str = "alone", draws: int = 100,
               seed: int = 0) -> HeadVocabulary:  # fmt: skip
    """Which words does this head write when it looks at a word? The OV circuit, W_E W_V W_O W_U.

    Args:
        head: "z.5.3" (or "L5H3"). tokens: words or ids for the rows; by default all (a sample of 4096 where there are
            more). k: strongest tokens per row.
        embedding: "alone" (each token as the head finds it when it stands alone after BOS) or "W_E" (bare embeddings).
        draws: of the null, which gives each token the unembedding of another.
    Returns:
        HeadVocabulary with the copying score.
    Raises:
        ValueError: for what is no head, an unknown word, or a norm that cannot be folded.
    Source:
        Elhage et al. 2021, "A mathematical framework for transformer circuits"; singular directions as in Millidge and
        Black 2022.
    """
    return _one(model, head, "OV", tokens, k, embedding, draws, seed)


def qk_circuit(model, head, *, tokens=None, k: int = 5, embedding: str = "alone", draws: int = 100,
               seed: int = 0) -> HeadVocabulary:  # fmt: skip
    """At which words does this head look from a word? The QK circuit, W_E W_Q W_K^T W_E^T, at distance 0.

    With rotary embeddings the scores turn with the distance; these are those of a token and another in its own place.
    Learned positions, the biases of W_Q and W_K and ALiBi are left out: it is what the words alone say.

    Args: as for `ov_circuit`.
    Raises:
        ValueError: also where queries and keys are normalised behind their matrices (Qwen3, Gemma3, OLMo2).
    """
    return _one(model, head, "QK", tokens, k, embedding, draws, seed)


def copying_scores(model, at="z.*.*", *, embedding: str = "alone", draws: int = 100, seed: int = 0) -> Scores:
    """Which heads copy: write the word that they look at? From the weights, without data.

    The score is the sum of the eigenvalues of the OV circuit over the sum of their sizes: 1 if every direction that is
    read is written back with its own sign, about 0 for unrelated words, -1 for a head that suppresses what it sees.
    Computed as d_head x d_head, never as vocabulary x vocabulary.

    The null gives each token the unembedding of another, dealt at random: the same matrices, but nothing can be copied. `null_p95` is what |score| reaches under it in 95 % of the draws.

    Args:
        at: heads. embedding: "alone" (each token as the head finds it when it stands alone after BOS) or "W_E" (bare
            embeddings, which only the first layer reads).
    Returns:
        Scores with the columns `matching` (the same for QK, at distance 0: does the head look at its own token?) and
        `null_matching`, NaN where the model offers no fixed QK form. No prompts, hence no interval.
    Source:
        Elhage et al. 2021, "Summarizing OV/QK matrices"; Wang et al. 2022 use a copy score by ranks.
    """
    began, wanted = time.perf_counter(), sorted({_head(model, one) for one in model.names.expand(components(at))})
    space, table = Space(model, {one.layer for one in wanted}, embedding, seed), {"OV": [], "QK": []}
    for circuit, rows in table.items():
        for one in wanted:
            try:
                left, right = space.factors(circuit, one)
            except ValueError:
                if circuit == "OV":
                    raise
                rows.append((float("nan"), float("nan")))
                continue
            rows.append((_score(_eigenvalues(left, right)), space.null(circuit, one, draws)))
    (values, threshold), (matching, reach) = (np.array(rows).T for rows in table.values())
    nothing = np.full(len(wanted), np.nan)
    return Scores(wanted, values, nothing, nothing.copy(), threshold, values[:, None], "vocabulary.copying_scores",
                  "copying score (OV eigenvalues)", null="each token's unembedding dealt to another token",
                  direction=f"tokens: {embedding}", task="weights", cost=float(embedding == "alone"), seconds=time.perf_counter() - began, seed=seed,
                  why="Weights: there are no prompts to resample.",
                  columns={"matching": matching, "null_matching": reach})  # fmt: skip


class Space:
    """The vocabulary on both sides of the heads: embeddings as the heads read them, and what logits read of the stream."""

    def __init__(self, model, layers, embedding: str, seed: int, kind: str = "resid_pre"):
        if embedding not in EMBEDDINGS:
            raise ValueError(f"embedding={embedding!r} is unknown; choose {' or '.join(map(repr, EMBEDDINGS))}.")
        self.model, self.embedding, self.kind, names = model, embedding, kind, model.names
        layers, usable = sorted(layers), np.arange(min(names.d_vocab, len(model.tokenizer)))
        rng, size = np.random.default_rng(seed), min(SAMPLE, NUMBERS // (len(layers) * names.d_model))
        self.ids = usable if len(usable) <= size else np.sort(rng.choice(usable, size, replace=False))
        self.rng, self.permutations = np.random.default_rng(seed + 1), []
        self.embed, self.out = model.weight("W_E").cpu(), Readout(model).matrix().cpu()
        self.streams = self._streams(self.ids, layers)

    def rows(self, ids) -> list[torch.Tensor]:
        """Prompts of one token each, after BOS where the tokenizer has one."""
        bos = self.model.tokenizer.bos_token_id
        return [torch.tensor([int(i)] if bos is None else [bos, int(i)]) for i in ids]

    def _streams(self, ids, layers) -> dict[int, torch.Tensor]:
        """Layer -> tokens as they stand in it, [token, d_model]."""
        if self.embedding == "W_E":
            return dict.fromkeys(layers, self.embed[ids])
        at = [Component(self.kind, layer, None, -1) for layer in layers]
        return {one.layer: x for one, x in self.model.activations(self.rows(ids), at).items()}

    @cached_property
    def centred(self):
        """What logits read, for the sampled tokens, [d_model, token], without what raises all alike."""
        out = self.out[:, self.ids]
        return out - out.mean(1, keepdim=True)

    def read(self, layer: int, ids=None) -> torch.Tensor:
        """Tokens as the heads of a layer read them, [token, d_model]; the sampled ones by default."""
        x = self.streams[layer] if ids is None else self._streams(ids, [layer])[layer]
        norm = self.model.names.norm("norm_attn", layer)
        if norm is None:
            return x
        gain, bias, centred = gain_of(norm, x.shape[1])
        x = x - x.mean(1, keepdim=True) if centred else x
        x = x / x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12) * gain.float().cpu()
        return x + bias.float().cpu()

    def factors(self, circuit: str, head: Component, ids=None, onto=None) -> tuple[torch.Tensor, torch.Tensor]:
        """The circuit as left [token, d_head] @ right [d_head, token]; all sampled tokens by default."""
        model, names, layer, index = self.model, self.model.names, head.layer, head.index
        own = self.read(layer, ids)
        block = attrgetter(names.row.layers)(model.hf)[layer]
        if circuit == "OV":
            row, w_v = names.row, model.weight("W_V", layer, index).cpu()
            w = own_basis(model.weight("W_O", layer, index).cpu(), row.attn_add, block, (row.attn, row.heads), names)
            out = self.centred if onto is None else self.out[:, onto]
            return own @ w_v, w @ out
        attention = attrgetter(names.row.attn)(block)
        if any(getattr(attention, name, None) is not None for name in ("q_norm", "k_norm")):
            raise ValueError(f"qk_circuit: {model.hf.config.model_type} normalises queries and keys behind W_Q and W_K, so no "
                             "fixed matrix says at which words a head looks. wb.locate.magnitude.pattern_scores measures "
                             "it on prompts.")  # fmt: skip
        scale = getattr(attention, "scaling", None) or names.d_head**-0.5
        other = self.read(layer, onto)
        other = other - other.mean(0)  # the softmax over keys does not see what all keys share
        w_q, w_k = (model.weight(name, layer, index).cpu() for name in ("W_Q", "W_K"))
        return own @ w_q * scale, (other @ w_k).T

    def null(self, circuit: str, head: Component, draws: int) -> float:
        """What |score| reaches in 95 % of the draws in which each token is paired with another's other side."""
        left, right = self.factors(circuit, head)
        while len(self.permutations) < draws:
            self.permutations.append(torch.from_numpy(self.rng.permutation(len(self.ids))))
        cores = torch.stack([right @ left[self.permutations[i]] for i in range(draws)])
        return float(np.quantile([abs(_score(one)) for one in torch.linalg.eigvals(cores.double()).numpy()], 0.95))


def own_basis(w: torch.Tensor, adds: str, block, inside: tuple, names) -> torch.Tensor:
    """What a matrix writes [..., d_model] as it is added to the stream: a norm behind the block folded in, up to scale."""
    if adds in inside:
        return w
    gain, _, centred = gain_of(attrgetter(adds)(block), names.d_model)
    return (w - w.mean(-1, keepdim=True) if centred else w) * gain.float().cpu()


def _eigenvalues(left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """The eigenvalues of left @ right that are not 0: those of right @ left, [d_head]."""
    return torch.linalg.eigvals((right @ left).double()).numpy()


def _score(eigenvalues: np.ndarray) -> float:
    return float(eigenvalues.real.sum() / max(np.abs(eigenvalues).sum(), 1e-30))


def _head(model, at) -> Component:
    one = Component.parse(at)
    if one.kind != "z" or one.position is not None:
        raise ValueError(f"{one} is no head; write for example 'z.5.3' or 'L5H3'.")
    (one,) = [one] if one.is_family else model.names.expand([one])
    return one


def _one(model, head, circuit: str, tokens, k: int, embedding: str, draws: int, seed: int) -> HeadVocabulary:
    head = _head(model, head)
    if head.is_family:
        raise ValueError(f"{head} is several heads; give one, such as 'z.5.3'. copying_scores(model) ranks them all.")
    space = Space(model, [head.layer], embedding, seed)
    ids = space.ids if tokens is None else np.array([_token(model, one) for one in tokens])
    left, right = space.factors(circuit, head)
    rows = space.factors(circuit, head, ids)[0]
    every = np.arange(min(model.names.d_vocab, len(model.tokenizer)))
    columns = right if len(every) == len(space.ids) else space.factors(circuit, head, ids[:1], every)[1]
    most, least, rank = [], [], []
    for part in range(0, len(ids), 512):
        table = rows[part : part + 512] @ columns
        own = table.gather(1, torch.from_numpy(ids[part : part + 512])[:, None])
        rank += rank_of(table, own).tolist()
        for side, sign in ((most, 1), (least, -1)):
            top = (sign * table).topk(k, 1)
            side += [[(model.token(i), sign * v) for i, v in zip(line, values, strict=True)]
                     for line, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)]  # fmt: skip
    found = _eigenvalues(left, right)
    return HeadVocabulary(circuit, head, [model.token(i) for i in ids], most, least, np.array(rank), (len(every) + 1) / 2,
                          _score(found), space.null(circuit, head, draws), found,
                          _directions(model, space, head, k) if circuit == "OV" else ())  # fmt: skip


def _directions(model, space: Space, head: Component, k: int, n: int = 3) -> tuple:
    """The n strongest singular directions of W_V W_O, by the tokens that are read and written along them."""
    w_v, w_o = (model.weight(name, head.layer, head.index).cpu() for name in ("W_V", "W_O"))
    left, _ = torch.linalg.qr(w_v)
    right, _ = torch.linalg.qr(w_o.T)
    u, size, v = torch.linalg.svd(left.T @ w_v @ w_o @ right)  # d_head x d_head
    reads = space.read(head.layer) @ (left @ u[:, :n])
    row, block = model.names.row, attrgetter(model.names.row.layers)(model.hf)[head.layer]
    written = own_basis(v[:n] @ right.T, row.attn_add, block, (row.attn, row.heads), model.names)
    reads, writes = reads - reads.mean(0), written @ space.centred

    def words(values) -> list[str]:
        return [model.token(space.ids[i]) for i in values.topk(k).indices.tolist()]

    return tuple((float(size[i]), words(reads[:, i]), words(writes[i]), words(-reads[:, i]), words(-writes[i]))
                 for i in range(n))  # fmt: skip


def _token(model, word) -> int:
    if not isinstance(word, str):
        return int(word)
    ids = model.tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == model.tokenizer.unk_token_id:
        raise ValueError(f"{word!r} is no single token of this model: it is cut into {model.tokens(word)}. Give words of one "
                         "token, with their leading space where the tokenizer has one, or ids.")  # fmt: skip
    return ids[0]
