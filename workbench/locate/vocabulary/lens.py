"""The logit lens: what would the model say if the stream ended here? Layer by layer, position by position."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from workbench import measure, storage
from workbench.component import Component, components
from workbench.locate.vocabulary.readout import Readout, asked, others, rank_of, run
from workbench.model.edit import with_weights

STREAMS = ("embed", "resid_pre", "resid_mid", "resid_post")
ARRAYS = ("top", "top_prob", "prob", "rank", "other_rank", "entropy", "kl")


@dataclass(frozen=True, eq=False)
class Lens:
    """What the stream says on its way, in words.

    Attributes:
        name: "logit lens" or "tuned lens". components: the streams read, in forward order.
        tokens: for each prompt its tokens as text. answers: for each prompt the answer as text.
        given: whether answers were given; otherwise they are what the model itself predicts at the end of the prompt.
        top, top_prob: most probable tokens [component, prompt, position, k] (ids) and their probabilities.
        prob, rank: of the answer [component, prompt, position]; rank 1 is the most probable token. other_rank: of another
            prompt's answer, what chance gives.
        entropy: in nats. kl: KL(final || lens) in nats, how far from what the model says in the end.
            Prompts are lined up at their ends: position -1 is the last of each; before a shorter prompt stands NaN.
        words: token id -> text, for `top`.
    """

    name: str
    components: list[Component]
    tokens: list[list[str]]
    answers: list[str]
    given: bool
    top: np.ndarray
    top_prob: np.ndarray
    prob: np.ndarray
    rank: np.ndarray
    other_rank: np.ndarray
    entropy: np.ndarray
    kl: np.ndarray
    words: dict[int, str]
    task: str = ""
    cost: float = 1.0

    @property
    def frame(self):
        """A pandas table: one row for each prompt, position and stream."""
        import pandas as pd

        rows = []
        width = self.prob.shape[2]
        for prompt, tokens in enumerate(self.tokens):
            for position, token in enumerate(tokens):
                at = width - len(tokens) + position
                for c, one in enumerate(self.components):
                    rows.append({
                        "prompt": prompt, "position": position, "token": token, "component": str(one), "layer": one.layer,
                        "says": self.words[int(self.top[c, prompt, at, 0])], "says_prob": self.top_prob[c, prompt, at, 0],
                        "answer": self.answers[prompt], "prob": self.prob[c, prompt, at],
                        "rank": float(self.rank[c, prompt, at]), "entropy": self.entropy[c, prompt, at],
                        "kl": self.kl[c, prompt, at],
                    })  # fmt: skip
        return pd.DataFrame(rows)

    def by_layer(self, position: int = -1):
        """A pandas table: each stream at one position (counted from the end), over all prompts.

        Columns: mean probability and median rank of the answer, the share of prompts where it is the most probable token
        (with a 95 % interval), the share where another prompt's answer is (chance), mean entropy and mean KL to the final
        prediction.
        """
        import pandas as pd

        first = self.rank[:, :, position] == 1
        share, low, high = measure.mean_interval(first.T.astype(float))
        return pd.DataFrame({
            "component": [str(one) for one in self.components], "prob": self.prob[:, :, position].mean(1),
            "rank": np.median(self.rank[:, :, position], 1), "first": share, "ci_lo": low, "ci_hi": high,
            "other_first": (self.other_rank[:, :, position] == 1).mean(1),
            "entropy": self.entropy[:, :, position].mean(1), "kl": self.kl[:, :, position].mean(1), "n": first.shape[1],
        })  # fmt: skip

    def said(self, component, prompt: int = 0, position: int = -1) -> list[tuple[str, float]]:
        """The most probable tokens of one stream at one position, with their probabilities."""
        c = self.components.index(Component.parse(component))
        column = position if position < 0 else position + self.prob.shape[2] - len(self.tokens[prompt])
        return [(self.words[int(t)], float(p))
                for t, p in zip(self.top[c, prompt, column], self.top_prob[c, prompt, column])]  # fmt: skip

    def __repr__(self) -> str:
        last = self.by_layer()
        half = last.component[(last["first"] >= 0.5).to_numpy()]
        when = f"first at {half.iloc[0]}" if len(half) else "nowhere first"
        whose = "answer" if self.given else "own prediction"
        return (f"Lens({self.name}, {len(self.tokens)} prompts, {len(self.components)} streams, {whose} {when} "
                "for half of the prompts)")  # fmt: skip

    def plot(self, prompt: int = 0, value: str = "says_prob"):
        """One prompt as a matplotlib figure: streams upwards, positions across, in each cell the most probable token.

        Args:
            value: the colour: "says_prob" (of the token shown), "prob" (of the answer), "entropy" or "kl".
        """
        from workbench.locate.vocabulary.draw import lens

        return lens(self, prompt, value)

    def save(self, folder) -> Path:
        """Write `lens.json` and `lens.safetensors`."""
        plain = {name: value for name, value in self.__dict__.items() if name not in ARRAYS}
        plain |= {"components": [str(one) for one in self.components], "words": list(self.words.items())}
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return storage.write(folder, {"lens.safetensors": arrays, "lens.json": plain})

    @classmethod
    def load(cls, folder) -> Lens:
        """Read it back."""
        plain = storage.read(cls, folder, "lens.json")
        plain["components"] = [Component.parse(one) for one in plain["components"]]
        plain["words"] = {int(i): text for i, text in plain["words"]}
        return cls(**plain, **storage.read_arrays(Path(folder) / "lens.safetensors"))


@with_weights
def logit_lens(model, prompts, *interventions, at=None, answers=None, k: int = 5, tuned=None, spans=None) -> Lens:
    """What would the model predict if it stopped here? The logit lens, at every layer and position.

    Reads each stream with the model's own final norm and unembedding (softcap and scaling included), so that the last
    stream says exactly what the model says. Early streams are not written to be read this way: a nonsense word there does
    not mean that nothing is there. `tuned_lens` reads them with a translator of their own.

    Args:
        prompts: a text, a list of texts or ids, a task or the name of one (clean prompts of pairs, and their answers).
        interventions: the run is read with them; KL is to the final prediction with them.
        at: streams: embed, resid_pre, resid_mid, resid_post; by default resid_pre.0 and resid_post.*.
        answers: for all or one each, as text or id: their probability and rank are followed. By default what the model
            itself predicts at the end.
        k: how many of the most probable tokens to keep.
        tuned: a `TunedLens` to read through.
    Returns:
        Lens.
    Raises:
        ValueError: for parts that are no stream, a position, or a model that its norm and unembedding do not describe.
    Source:
        nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023 for `tuned`.
    """
    readout, names = Readout(model), model.names
    found, answer, task = asked(model, prompts, answers, spans)
    wanted = _wanted(model, at)
    if tuned is not None:
        tuned.check(model)
    last, given = Component("resid_post", names.n_layers - 1), answer is not None
    if not given:
        answer = model.logits(found, *interventions).argmax(-1)
    shape, partner = (len(wanted), len(found.ids), found.width), others(answer)
    made = {name: np.full(shape, np.nan, np.float32) for name in ARRAYS[2:]}
    made |= {"top": np.zeros((*shape, k), np.int32), "top_prob": np.full((*shape, k), np.nan, np.float32)}
    done = 0
    for part, seen, logits in run(model, found, [*wanted, *([last] if last not in wanted else [])], interventions):
        rows, columns = slice(done, done + len(part.ids)), slice(found.width - part.width, None)
        final = logits.float().log_softmax(-1)
        target = torch.stack([answer[rows], partner[rows]], 1).to(final.device)[:, None].expand(-1, part.width, 2)
        real = torch.arange(part.width)[None] >= torch.tensor(part.pads)[:, None]
        with torch.no_grad():
            readout.check(readout(seen[last])[real], logits[real])
            for c, one in enumerate(wanted):
                x = seen[one] if tuned is None else tuned.translate(one, seen[one])
                _read_off(readout(x).float().log_softmax(-1), final, target, real, k, made, (c, rows, columns))
        done += len(part.ids)
    words = {int(i): model.token(i) for i in np.unique(made["top"])}
    tokens = [[model.token(i) for i in ids] for ids in found.ids]
    return Lens("logit lens" if tuned is None else "tuned lens", wanted, tokens, [model.token(i) for i in answer], given,
                words=words, task=task, cost=2.0 - given, **made)  # fmt: skip


def _read_off(said, final, target, real, k: int, made: dict, place: tuple) -> None:
    """Fill in what one stream says in one batch: log-probabilities said, final [row, column, d_vocab].

    Args:
        target: the answer, and another prompt's (-1 where there is none), [row, column, 2].
    """
    own, other = said.gather(-1, target.clamp(min=0)).split(1, -1)
    top = said.topk(k, -1)
    values = {
        "prob": own[..., 0].exp(), "rank": rank_of(said, own),
        "other_rank": rank_of(said, other).masked_fill(target[..., 1] < 0, float("nan")), "entropy": -(said.exp() * said).sum(-1),
        "kl": (final.exp() * (final - said)).sum(-1).clamp(min=0), "top_prob": top.values.exp(), "top": top.indices,
    }  # fmt: skip
    for name, value in values.items():
        value = value.cpu()
        if name != "top":
            value[~real] = float("nan")
        made[name][place] = value.numpy()


def _wanted(model, at) -> list[Component]:
    given = components(at if at is not None else ["resid_pre.0", "resid_post.*"])
    for one in given:
        if one.kind not in STREAMS:
            raise ValueError(f"{one} is no stream; the lens reads {', '.join(STREAMS)}. For what a part writes use "
                             "logit_attribution.")  # fmt: skip
        if one.position is not None:
            raise ValueError(f"{one}: the lens reads all positions; leave the position out.")
    return sorted(model.names.expand(given))
