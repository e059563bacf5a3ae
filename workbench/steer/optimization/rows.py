"""Rows to train on: prompts with what should follow, and passes over them with changed weights."""

from __future__ import annotations

import os

import torch
from tqdm import tqdm

from workbench import measure
from workbench.model import Prompts
from workbench.model.run import LOCK
from workbench.steer.optimization.requests import continued
from workbench.task import Task


class Rows:
    """Prompts and what follows, as token ids.

    Attributes:
        ids: prompt and continuation together. lengths: how many tokens are prompt (for plain texts one).
        spans: of the prompts. entities: whom a row is about, or None.
    """

    def __init__(self, ids, lengths, spans, entities, name: str = ""):
        self.ids, self.lengths, self.spans, self.entities, self.name = ids, lengths, spans, entities, name

    @classmethod
    def of(cls, model, task, split: str | None = None, begun: float = 0.0) -> Rows:
        """The rows of a split of a task, where it has splits: all of the others' rows where it has none.

        Pairs: the answer (the whole `completion` of a row that has one beginning with the answer) after the clean prompt.
        Texts: every token after the first, or after the share `begun`, which then counts as prompt.
        Raises:
            ValueError: for a task without rows of this split, or whose rows do not fit the model.
        """
        task = Task.of(task)
        task = task.split(split) if split and any(task.column("split")) else task
        if task.kind != "pairs":
            ids = [one for one in (model.ids(text) for text in task.column("text")) if len(one) > 1]
            return cls(
                ids, [max(1, int(begun * len(one))) for one in ids], [{}] * len(ids), task.column("entity"), task.name
            )
        pairs, ids, lengths = task.on(model), [], []
        for row, prompt, answer in zip(pairs.task.rows, pairs.clean, pairs.answer, strict=True):
            said = row.get("completion", "")
            if said.split()[:1] == row["answer"].split()[:1] and said != row["answer"]:
                ids.append(continued(model, row["clean"], said)[0])
            else:
                ids.append(torch.cat([prompt, answer[None]]))
            lengths.append(len(prompt))
        return cls(ids, lengths, pairs.spans, pairs.task.column("entity"), task.name)

    @classmethod
    def together(cls, some: list[Rows]) -> Rows:
        joined = [[x for rows in some for x in getattr(rows, key)] for key in ("ids", "lengths", "spans", "entities")]
        return cls(*joined, " + ".join(rows.name for rows in some))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, which) -> Rows:
        pick = lambda values: [values[int(i)] for i in which]  # noqa: E731
        return Rows(pick(self.ids), pick(self.lengths), pick(self.spans), pick(self.entities), self.name)

    def draw(self, size: int, rng: torch.Generator) -> Rows:
        """Some rows at random, no row twice."""
        return self.take(torch.randperm(len(self), generator=rng)[:size])

    def prompts(self) -> Prompts:
        """The batch to run: without the last token, which nothing follows."""
        return Prompts([one[:-1] for one in self.ids], [min(n, len(one) - 1) for n, one in zip(self.lengths, self.ids, strict=True)],
                       self.spans)  # fmt: skip

    def parts(self, tokens: int = 4096):
        """The rows in batches that fit one pass."""
        step = max(1, tokens // max(map(len, self.ids)))
        for start in range(0, len(self), step):
            yield self.take(range(start, min(start + step, len(self))))

    # reading logits [row, column, d_vocab] of `prompts()`

    def ahead(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities where a continuation is predicted [token, d_vocab], the right tokens, and the row of each."""
        at, wanted, of = [], [], []
        for row, (one, length) in enumerate(zip(self.ids, self.lengths, strict=True)):
            start = logits.shape[1] - (len(one) - 1) + length - 1
            at += [(row, column) for column in range(start, logits.shape[1])]
            wanted.append(one[length:])
            of += [row] * (len(one) - length)
        row, column = torch.tensor(at).T
        return logits[row, column].float().log_softmax(-1), torch.cat(wanted).to(logits.device), torch.tensor(of)

    def log_prob(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probability of each continuation, [row]."""
        logs, wanted, of = self.ahead(logits)
        picked = logs.gather(-1, wanted[:, None])[:, 0]
        return torch.zeros(len(self), device=picked.device).index_add(0, of.to(picked.device), picked)

    def nll(self, logits: torch.Tensor) -> torch.Tensor:
        """Mean loss of a token of the continuations."""
        logs, wanted, _ = self.ahead(logits)
        return -logs.gather(-1, wanted[:, None]).mean()

    def right(self, logits: torch.Tensor) -> torch.Tensor:
        """1 for each row whose first token of the continuation is the most probable one."""
        logs, wanted, of = self.ahead(logits)
        first = torch.tensor([of.tolist().index(row) for row in range(len(self))])
        return (logs[first].argmax(-1) == wanted[first]).float()


class _Traced(torch.nn.Module):
    """A traced pass as a module, so that its weights can be exchanged for one call as any module's can."""

    def __init__(self, model):
        super().__init__()
        self.hf, self.run = model.hf, model.trace

    def forward(self, batch, body):
        return self.run(batch, body)


def forward(model, prompts: Prompts, weights=None, inner: bool = False, during=(), **kwargs):
    """Logits with other weights (name -> tensor), with gradients to them; the model keeps its own.

    Args:
        inner: give the whole output of transformers, for example with hidden states.
        during: interventions that act in this pass.
    """
    if model.remote is not None:
        raise ValueError("Weights are learnt on this machine only; set model.remote = None.")
    if during:
        edits = model._edits(during, prompts)

        def body():
            with torch.enable_grad():
                return edits.visit_logits()

        own = {f"hf.{name}": weight for name, weight in (weights or {}).items()}
        with LOCK:
            return torch.func.functional_call(_Traced(model), own, (model.inputs(prompts), body))
    batch = dict(model.inputs(prompts), use_cache=False, **kwargs)
    with LOCK, torch.enable_grad():
        out = torch.func.functional_call(model.hf, weights or {}, (), batch)
    return out if inner else out.logits


@torch.no_grad()
def mean_of(model, rows: Rows, weights, what) -> float:
    """The mean of what(part, logits) [row] over rows."""
    found = [what(part, forward(model, part.prompts(), weights)).cpu() for part in rows.parts()]
    return float(torch.cat(found).mean())


@torch.no_grad()
def predictions(model, rows: Rows) -> list[torch.Tensor]:
    """The untouched log-probabilities where continuations are predicted, by row, in half precision."""
    found = []
    for part in rows.parts():
        logs, _, of = part.ahead(forward(model, part.prompts()))
        found += [logs[of == row].half().cpu() for row in range(len(part))]
    return found


def kl_from(part: Rows, logits: torch.Tensor, before: list[torch.Tensor]) -> torch.Tensor:
    """How far have the predictions of these rows moved? Mean KL(before || now), in nats."""
    logs, _, _ = part.ahead(logits)
    return measure.kl(torch.cat(before).to(logs), logs).mean()


def steps_bar(total: int, what: str, show: bool):
    """A progress bar for what takes more than five seconds; none in tests (WORKBENCH_STRICT=1)."""
    hidden = not show or os.environ.get("WORKBENCH_STRICT") == "1"
    return tqdm(total=total, desc=what, leave=False, delay=5, disable=hidden, mininterval=0.5)
