"""The backward lens: what would a step of gradient descent on an FFN write into its weights, in words?"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch

from workbench.component import Component
from workbench.locate.vocabulary.circuits import own_basis
from workbench.locate.vocabulary.readout import Readout, asked, others, rank_of
from workbench.model.plan import Prompts

WEIGHTS = ("W_out", "W_in", "W_gate")


@dataclass(frozen=True, eq=False)
class BackwardLens:
    """The gradient of log p(answer) with respect to one matrix of each FFN, as vectors of the stream, in words.

    Attributes:
        weight: "W_out", "W_in" or "W_gate". components: the FFNs, mlp_out.LAYER.
        tokens: for each prompt its tokens. answers: for each prompt the answer.
        up, down: what the vector reads in the vocabulary on either side: token ids [component, prompt, position, k]. For
            W_out what a step towards the answer makes the FFN write more, and less; for W_in and W_gate the input that
            is imprinted on the keys.
        size: Frobenius norm of the position's part of the gradient [component, prompt, position].
        rank, other_rank: of the answer, and of another prompt's answer, in `up` [component, prompt, position].
            Prompts are lined up at their ends; before a shorter one stands NaN.
        words: token id -> text.
    """

    weight: str
    components: list[Component]
    tokens: list[list[str]]
    answers: list[str]
    up: np.ndarray
    down: np.ndarray
    size: np.ndarray
    rank: np.ndarray
    other_rank: np.ndarray
    words: dict[int, str]
    task: str = ""
    cost: float = 3.0

    @property
    def frame(self):
        """A pandas table: a row for each prompt, position and FFN, largest part of the gradient first."""
        import pandas as pd

        rows, width = [], self.size.shape[2]
        share = self.size / np.nansum(self.size, (0, 2), keepdims=True).clip(min=1e-30)
        for prompt, tokens in enumerate(self.tokens):
            for position, token in enumerate(tokens):
                at = width - len(tokens) + position
                for c, one in enumerate(self.components):
                    up, down = ([self.words[int(i)] for i in side[c, prompt, at]] for side in (self.up, self.down))
                    rows.append({"prompt": prompt, "position": position, "token": token, "component": str(one),
                                 "layer": one.layer, "share": share[c, prompt, at], "up": " ".join(up),
                                 "down": " ".join(down), "answer": self.answers[prompt],
                                 "rank": float(self.rank[c, prompt, at])})  # fmt: skip
        table = pd.DataFrame(rows)
        return table.sort_values(["prompt", "share"], ascending=[True, False], kind="stable").reset_index(drop=True)

    def by_layer(self, position: int = -1):
        """A pandas table: each FFN at one position (counted from the end), over all prompts.

        Columns: its mean share of the gradient's size, median rank of the answer in `up`, the share of prompts where it is
        first, and the same for another prompt's answer (what chance would give).
        """
        import pandas as pd

        part = self.size[:, :, position] / np.nansum(self.size, (0, 2)).clip(min=1e-30)
        return pd.DataFrame({
            "component": [str(one) for one in self.components], "share": part.mean(1),
            "rank": np.median(self.rank[:, :, position], 1), "first": (self.rank[:, :, position] == 1).mean(1),
            "other_first": (self.other_rank[:, :, position] == 1).mean(1), "n": len(self.tokens),
        })  # fmt: skip

    def __repr__(self) -> str:
        last = self.by_layer()
        return (f"BackwardLens({self.weight}, {len(self.tokens)} prompts, {len(self.components)} FFNs, answer first at the "
                f"last position in {last['first'].iloc[-1]:.0%} of prompts in {self.components[-1]})")  # fmt: skip

    def plot(self, prompt: int = 0):
        """One prompt as a matplotlib figure: FFNs upwards, positions across, the first word of `up`, shaded by size."""
        from workbench.locate.vocabulary.draw import WIDEST, cells

        tokens = self.tokens[prompt][-WIDEST:]
        part = slice(-len(tokens), None)
        shade = self.size[:, prompt, part]
        words = [[self.words[int(i)] if size else "" for i, size in zip(line, sizes)]
                 for line, sizes in zip(self.up[:, prompt, part, 0], shade)]  # fmt: skip
        title = f"gradient of log p({self.answers[prompt]!r}) for {self.weight}, in words"
        return cells(words, shade, [str(one) for one in self.components], tokens, title,
                     "size of the gradient")  # fmt: skip


def backward_lens(model, prompts, *, answers=None, weight: str = "W_out", k: int = 5, spans=None) -> BackwardLens:
    """What would learning the answer write into each FFN, in words? The backward lens.

    The gradient of a matrix is a sum over positions of outer products: for W_out of the neurons' activations with the
    gradient δ at the FFN's output, for W_in and W_gate of the FFN's input x with the gradient at the neurons. Both δ and x
    are vectors of the stream, so the vocabulary can read them: a step towards the answer adds δ to the values of the
    neurons that are active (shift), and imprints x on keys. Read through the final norm's gain and the unembedding (δ also
    through that of a norm behind the FFN).

    Args:
        prompts: a text, a list, a task or its name (clean prompts of pairs, and their answers).
        answers: for all or one each; by default what the model itself predicts (then the gradient only sharpens it).
        weight: "W_out", "W_in" or "W_gate". k: words on either side.
    Returns:
        BackwardLens. The gradient is of log p(answer), so `up` is what a step of training adds.
    Raises:
        ValueError: for another weight, a gate where there is none, or fused experts.
    Source:
        Katz et al. 2024, "Backward lens: projecting language model gradients into the vocabulary space".
    """
    if weight not in WEIGHTS:
        raise ValueError(f"weight={weight!r} is unknown; choose {', '.join(map(repr, WEIGHTS))}.")
    names = model.names
    model.weight(weight, 0)  # refuses what is not there, with a reason
    found, answer, task = asked(model, prompts, answers, spans)
    answer = model.logits(found).argmax(-1) if answer is None else answer
    partner, matrix, done = others(answer), Readout(model).matrix(), 0
    shape = (names.n_layers, len(found.ids), found.width)
    made = {name: np.full(shape, np.nan, np.float32) for name in ("size", "rank", "other_rank")}
    made |= {name: np.zeros((*shape, k), np.int32) for name in ("up", "down")}
    for part in found.chunks():
        rows, columns = slice(done, done + len(part.ids)), slice(found.width - part.width, None)
        pads = torch.arange(part.width)[None] < torch.tensor(part.pads)[:, None]
        for layer, (before, after) in enumerate(outer_products(model, part, answer[rows], weight)):
            vector = before
            if weight == "W_out":  # as it reaches the stream, through a norm behind the FFN
                block = attrgetter(names.row.layers)(model.hf)[layer]
                inside = (names.row.neurons, names.row.neurons.rpartition(".")[0])
                vector = own_basis(after.cpu(), names.row.mlp_add, block, inside, names).to(matrix)
            logits = (vector @ matrix).cpu()
            own, other = (logits.gather(-1, ids[rows].clamp(min=0)[:, None, None].expand(-1, part.width, 1))
                          for ids in (answer, partner))  # fmt: skip
            size = (before.norm(dim=-1) * after.norm(dim=-1)).cpu()
            values = {
                "size": size,
                "rank": rank_of(logits, own),
                "other_rank": rank_of(logits, other),
            }
            values["other_rank"][partner[rows] < 0] = float("nan")
            for name, value in values.items():
                value[pads] = float("nan")
                made[name][layer, rows, columns] = value.numpy()
            for name, sign in (("up", 1), ("down", -1)):
                made[name][layer, rows, columns] = (sign * logits).topk(k, -1).indices.numpy()
        done += len(part.ids)
    words = {int(i): model.token(i) for i in np.unique(np.concatenate([made["up"].ravel(), made["down"].ravel()]))}
    return BackwardLens(weight, [Component("mlp_out", layer) for layer in range(names.n_layers)],
                        [[model.token(i) for i in ids] for ids in found.ids], [model.token(i) for i in answer],
                        words=words, task=task, **made)  # fmt: skip


def outer_products(
    model, prompts: Prompts, answer: torch.Tensor, weight: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer (before, after) of one matrix: the gradient of log p(answer) is the sum of before ⊗ after over positions.

    Args:
        answer: ids [prompt].
    Returns:
        [row, column, width in] and [row, column, width out] of each layer; 0 at padding.
    """
    names = model.names
    path = names.row.neurons if weight == "W_out" else names.row.mlp_in[0 if weight == "W_gate" else -1]
    fused = weight != "W_out" and len(names.row.mlp_in) == 1 and model.weight("W_in", 0).shape[1] == names.d_mlp

    def metric(logits):
        return logits.log_softmax(-1).gather(-1, answer.to(logits.device)[:, None])[:, 0]

    pairs = model.trace(model.inputs(prompts), _visit(names, path, len(prompts.ids), metric))
    real = torch.arange(prompts.width)[None] >= torch.tensor(prompts.pads)[:, None]
    found = []
    for before, after in pairs:
        if fused and after.shape[-1] == 2 * names.d_mlp:  # gate and up in one matrix
            after = after[..., : names.d_mlp] if weight == "W_gate" else after[..., names.d_mlp :]
        mask = real[..., None].to(after.device)
        found.append((before.float() * mask, after.float() * mask))
    return found


def _visit(names, path: str, rows: int, metric):
    """Inside a trace: (input, gradient at the output) of one linear map in each layer, [row, column, width]."""

    def body():
        inputs, outputs, kept = [], [], []
        with torch.enable_grad():
            for layer in range(names.n_layers):
                linear = attrgetter(path)(names.layers[layer])
                inputs.append(linear.input.detach().clone())
                y = linear.output
                y = y if y.requires_grad else y.detach().requires_grad_(True)
                linear.output = y
                outputs.append(y)
            value = metric(names.nn.output.logits[:, -1].float())
            slopes = torch.autograd.grad(value.sum(), outputs)
        for x, slope in zip(inputs, slopes, strict=True):
            if x.dim() == 2:  # OPT's FFN runs on [row * position, width]
                x, slope = x.unflatten(0, (rows, -1)), slope.unflatten(0, (rows, -1))
            kept.append((x, slope.detach()))
        return kept

    return body
