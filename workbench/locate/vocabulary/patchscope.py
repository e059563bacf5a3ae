"""Patchscope: put a hidden state into another prompt and let the model itself say what it holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from workbench import measure
from workbench.component import Component, components
from workbench.locate.vocabulary.readout import Readout, asked, others, rank_of
from workbench.model.plan import TOKENS_PER_PASS

STREAMS = ("embed", "resid_pre", "resid_post")


@dataclass(frozen=True, eq=False)
class Patchscope:
    """What the model says about hidden states.

    Attributes:
        components: where the states come from. into: where they go, in the target prompt, in words.
        target: the target prompt; {} is the place. tokens: for each prompt the token at whose place the state was taken
            (for each component [component][prompt]). answers: for each prompt the answer.
        top, top_prob: most probable tokens [component, prompt, k] and their probabilities.
        prob, rank: of the answer; own_rank: of the token at whose place the state was taken; other_rank: of another
            prompt's answer, what chance gives [component, prompt].
        repeats: the share of prompts whose answer the target prompt repeats when the answer itself, as a word, stands at the
            place: what the target prompt can do at best, where it is to repeat. repeats_own: the same for the own token.
        words: token id -> text.
    """

    components: list[Component]
    into: str
    target: str
    tokens: list[list[str]]
    answers: list[str]
    top: np.ndarray
    top_prob: np.ndarray
    prob: np.ndarray
    rank: np.ndarray
    own_rank: np.ndarray
    other_rank: np.ndarray
    repeats: float
    repeats_own: float
    words: dict[int, str]
    task: str = ""
    cost: float = 1.0

    @property
    def frame(self):
        """A pandas table: a row for each prompt and state."""
        import pandas as pd

        return pd.DataFrame([
            {"prompt": i, "component": str(one), "layer": one.layer, "token": self.tokens[c][i],
             "says": self.words[int(self.top[c, i, 0])], "says_prob": self.top_prob[c, i, 0], "answer": self.answers[i],
             "prob": self.prob[c, i], "rank": float(self.rank[c, i]), "own_rank": float(self.own_rank[c, i])}
            for i in range(self.prob.shape[1]) for c, one in enumerate(self.components)
        ])  # fmt: skip

    def by_layer(self):
        """A pandas table: each state over all prompts: the share where the answer, the token itself, or another prompt's
        answer (chance) is said first, with a 95 % interval for the answer."""
        import pandas as pd

        share, low, high = measure.mean_interval((self.rank == 1).T.astype(float))
        return pd.DataFrame({
            "component": [str(one) for one in self.components], "first": share, "ci_lo": low, "ci_hi": high,
            "prob": self.prob.mean(1), "own_first": (self.own_rank == 1).mean(1),
            "other_first": (self.other_rank == 1).mean(1), "n": self.rank.shape[1],
        })  # fmt: skip

    def __repr__(self) -> str:
        best = self.by_layer().sort_values("first", kind="stable").iloc[-1]
        return (f"Patchscope({self.rank.shape[1]} prompts, {len(self.components)} states into {self.into} of {self.target!r}, "
                f"answer most often at {best.component} ({best['first']:.0%}))")  # fmt: skip

    def plot(self):
        """Shares by source as a matplotlib figure: the answer, the token itself, another prompt's answer."""
        from workbench.locate.vocabulary.draw import curves

        table = self.by_layer()
        lines = {
            "another prompt's answer (chance)": table.other_first,
            "answer": table["first"],
            "token itself": table.own_first,
        }
        return curves(lines, list(table.component), f"said first, in {self.target!r}", "share of prompts")


def patchscope(model, prompts, at="resid_post.*@-1", *, target: str | None = None, into: str | None = None, answers=None,
               through=None, k: int = 5, seed: int = 0, spans=None) -> Patchscope:  # fmt: skip
    """What does the model itself say a hidden state holds? A patchscope.

    Takes the state from each prompt, sets it in the place of {} in a target prompt, lets the remaining layers run, and reads
    the next token. A target that makes the model repeat what stands at {} reads the state's word ("cat -> cat ; dog -> dog ;
    {} ->"); a bare "{}" lets the layers above finish the prediction alone; a question reads an attribute. Unlike the logit
    lens it uses the layers above, so it can tell what *they* make of the state, also what nothing had yet spelled out.

    Args:
        prompts: a text, a list, a task or its name (clean prompts of pairs, and their answers).
        at: where states come from: embed, resid_pre or resid_post with a position ("resid_post.*@-1", "@subject").
        target: the target prompt with {} once. By default random words of the model's own, "a {} b c d e a": a model with
            induction heads repeats the word at {}, whatever it is.
        into: "resid_pre.2", the stream that takes the state; by default the same as it came from, with `through` "embed".
        answers: for all or one each; by default what the model itself predicts after the prompt.
        through: words that the state is read through: it is read by the logit lens among these words alone, and what is set
            is their embeddings, weighted by the softmax. So a late state, which is written for the way out, can be set at
            an early layer, which reads words. For a word or a list, of one token each.
        seed: of the random words, and of the word that the state replaces.
    Returns:
        Patchscope, with what the target can do at best (`repeats`) and what chance gives (`other_first`).
    Raises:
        ValueError: for a target without one {}, a state without a position, a kind that is no stream, no word in
            `through`, or one that is not one token.
    Source:
        Ghandeharioun et al. 2024, "Patchscopes: a unifying framework for inspecting hidden representations".
    """
    if through is not None:
        through, into = [through] if isinstance(through, str) else list(through), into or "embed"
        if not through:
            raise ValueError(
                "through=[] holds no word to read the state by; give some, such as through=['cat', 'dog']."
            )
    found, answer, task = asked(model, prompts, answers, spans)
    given, names = components(at), model.names
    for one in [*given, *([Component.parse(into)] if into else [])]:
        if one.kind not in STREAMS:
            raise ValueError(f"{one} is no stream that can be taken or set; kinds are {', '.join(STREAMS)}.")
    for one in given:
        if one.position is None:
            raise ValueError(
                f"{one}: a patchscope takes one state from each prompt; name a position, such as {one.at(-1)}."
            )
    wanted = sorted(names.expand(given))
    goal = names.expand([Component.parse(into).at(None)]) if into else None
    if into and (Component.parse(into).is_family or len(goal) > 1):
        raise ValueError(f"into={into!r} is several streams; a state goes into one, such as {str(goal[0])!r}.")
    answer = model.logits(found).argmax(-1) if answer is None else answer
    left, right, said = _target(model, target, np.random.default_rng(seed))
    place = torch.tensor([int(_ordinary(model)[np.random.default_rng(seed + 1).integers(len(_ordinary(model)))])])
    states = model.activations(found, wanted)
    if through is not None:
        ids = torch.tensor([_single(model, word) for word in through])
        states = {one: _in_words(model, x, ids) for one, x in states.items()}
    own = torch.stack([_own(found, one) for one in wanted])
    partner = others(answer)
    made = {name: [] for name in ("top", "top_prob", "prob", "rank", "own_rank", "other_rank")}
    for c, one in enumerate(wanted):
        logits = _patched(
            model, torch.cat([left, place, right]), len(left), goal[0] if goal else one.at(None), states[one]
        )
        said_here = logits.float().log_softmax(-1).cpu()
        top = said_here.topk(k, -1)
        made["top"].append(top.indices.numpy().astype(np.int32))
        made["top_prob"].append(top.values.exp().numpy())
        made["prob"].append(said_here.gather(1, answer[:, None])[:, 0].exp().numpy())
        for name, ids in (("rank", answer), ("own_rank", own[c]), ("other_rank", partner)):
            rank = rank_of(said_here, said_here.gather(1, ids.clamp(min=0)[:, None]))
            made[name].append(torch.where(ids < 0, torch.nan, rank).numpy())
    made = {name: np.stack(parts) for name, parts in made.items()}

    def repeated(ids) -> float:
        rows = [torch.cat([left, torch.tensor([i]), right]) for i in ids.tolist()]
        return float((model.logits(rows).argmax(-1) == ids).float().mean())

    return Patchscope(wanted, str(goal[0]) if goal else "the same stream", said,
                      [[model.token(i) for i in row] for row in own], [model.token(i) for i in answer],
                      repeats=repeated(answer), repeats_own=repeated(own[-1]),
                      words={int(i): model.token(i) for i in np.unique(made["top"])}, task=task, cost=4.0 + len(wanted), **made)  # fmt: skip


def _patched(model, ids: torch.Tensor, column: int, at: Component, states: torch.Tensor) -> torch.Tensor:
    """Logits [prompt, d_vocab] at the end of the target, with each prompt's state set at a column."""
    names, nn, found = model.names, model.nnsight, []
    for part in states.split(max(1, TOKENS_PER_PASS // len(ids))):

        def body(part=part):
            place = names.place(at.kind, at.layer, len(part))
            x = place.get().clone()
            x[:, column] = part.to(x)
            place.set(x)
            return nn.output.logits[:, -1].clone()

        found.append(model.trace(model.inputs(ids[None].repeat(len(part), 1)), body))
    return torch.cat(found)


def _single(model, word: str) -> int:
    ids = model.tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == model.tokenizer.unk_token_id:
        raise ValueError(f"through: {word!r} is not one token of this model; give words of one token each (a leading space "
                         "counts, where a tokenizer writes it into the token).")  # fmt: skip
    return ids[0]


def _in_words(model, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """States [prompt, d_model] as mixtures of the words' embeddings, by what the logit lens reads among them."""
    with torch.no_grad():
        weights = Readout(model)(x)[:, ids].float().softmax(-1)
    embed = model.hf.get_input_embeddings()  # called, since some families scale what it gives
    with torch.no_grad():
        return weights @ embed(ids.to(embed.weight.device)).to(weights)


def _ordinary(model) -> np.ndarray:
    special = set(model.tokenizer.all_special_ids)
    return np.array([i for i in range(min(len(model.tokenizer), model.names.d_vocab)) if i not in special])


def _target(model, target: str | None, rng) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Ids before and after the place (BOS included), and the target as text."""
    start = (
        [model.tokenizer.bos_token_id]
        if model.bos or (target is None and model.tokenizer.bos_token_id is not None)
        else []
    )
    if target is None:
        first, *rest = rng.choice(_ordinary(model), 5, replace=False).tolist()
        before, after = [first], [*rest, first]
        text = " ".join([model.token(first), "{}", *(model.token(i) for i in after)])
    else:
        if target.count("{}") != 1:
            raise ValueError(f"target={target!r} must hold {{}} once, where the state goes; for example "
                             "'cat -> cat ; dog -> dog ; {} ->'.")  # fmt: skip
        text = target
        before, after = (model.tokenizer(side.rstrip() if i == 0 else side, add_special_tokens=False).input_ids if side.strip() else []
                         for i, side in enumerate(target.split("{}")))  # fmt: skip
        unknown = model.tokenizer.unk_token_id
        if unknown is not None and unknown in [*before, *after]:
            model.ids(target.replace("{}", " "))  # says which word is unknown, and the nearest
    return torch.tensor([*start, *before], dtype=torch.long), torch.tensor(after, dtype=torch.long), text


def _own(prompts, one: Component) -> torch.Tensor:
    """The token at a component's position, for each prompt (the last of a span)."""
    found = []
    for row, ids in enumerate(prompts.ids):
        column = prompts.columns(one, row)[-1] - prompts.pads[row]
        found.append(ids[column])
    return torch.stack(found)
