"""From the residual stream to the vocabulary: the model's own final norm, unembedding, scaling and softcap."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from operator import attrgetter

import torch

from workbench.model.plan import TOKENS_PER_PASS, Prompts
from workbench.task import Task, _answer


class Readout:
    """What does a model make of a stream, if it ends here?

    Attributes:
        norm, unembed: the model's own modules. cap: its softcap of logits, or None.
    """

    def __init__(self, model):
        self.names, config = model.names, model.hf.config
        self.norm = attrgetter(model.names.row.ln_final)(model.hf)
        self.unembed = model.hf.get_output_embeddings()
        self.divide, self.times = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.device, self.dtype = self.unembed.weight.device, self.unembed.weight.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [..., d_vocab] of streams [..., d_model]."""
        logits = self.unembed(self.norm(x.to(self.device, self.dtype)))
        if self.divide:
            logits = logits / self.divide
        if self.times:
            logits = logits * self.times
        if self.cap:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    @property
    def factor(self) -> float:
        """What multiplies the unembedding's output."""
        return (self.times or 1.0) / (self.divide or 1.0)

    def check(self, mine: torch.Tensor, logits: torch.Tensor) -> None:
        """Is this the way the model itself goes?

        Args:
            mine: read out of the last stream; logits: what the model gave there.
        Raises:
            ValueError: when they differ, for an architecture that does something further after its last block.
        """
        off = ((mine - logits).abs().max() / logits.abs().max().clamp(min=1e-30)).item()
        if not off < max(1e-4, 4 * torch.finfo(self.dtype).eps):
            raise ValueError(f"Final norm and unembedding do not give this architecture's own logits (off by {off:.1%} of the "
                             "largest): it does something further after its last block, so no stream can be read out. "
                             "wb.locate.probing reads streams without the unembedding.")  # fmt: skip

    def rows(self, tokens) -> torch.Tensor:
        """The direction of the normed stream that each token's logit reads, [..., d_model], float64."""
        return self.unembed.weight[torch.as_tensor(tokens).to(self.device)].double() * self.factor

    def bias(self, tokens) -> torch.Tensor:
        """The unembedding's bias of each token, mostly 0, float64."""
        tokens = torch.as_tensor(tokens).to(self.device)
        bias = self.unembed.bias
        return (
            torch.zeros(tokens.shape, device=self.device).double()
            if bias is None
            else bias[tokens].double() * self.factor
        )

    def matrix(self) -> torch.Tensor:
        """What a direction of the stream does to each logit, up to the norm's scale: [d_model, d_vocab], float32.

        The final norm's gain is folded in; what raises all logits alike, which no softmax sees, is taken out.
        """
        gain, _, centred = gain_of(self.norm, self.names.d_model)
        unembed = self.unembed.weight.float() * gain.float() * self.factor
        unembed = unembed - unembed.mean(1, keepdim=True) if centred else unembed
        return (unembed - unembed.mean(0)).T


@dataclass(frozen=True)
class Frozen:
    """A norm at the scale that it has on given rows: linear from here on.

    norm(x) = scale * gain * (x - mean(x)) + bias; an RMSNorm subtracts no mean and has no bias.

    Attributes:
        scale: [row]. gain, bias: [d_model]. centred: whether the mean is subtracted.
    """

    scale: torch.Tensor
    gain: torch.Tensor
    bias: torch.Tensor
    centred: bool

    def back(self, direction: torch.Tensor) -> torch.Tensor:
        """The direction before the norm [row, d_model] whose dot product is what `direction` reads after it."""
        direction = direction * self.gain.to(direction)
        direction = direction - direction.mean(-1, keepdim=True) if self.centred else direction
        return self.scale[:, None].to(direction) * direction


def gain_of(norm, width: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """(gain, bias [d_model], whether it subtracts the mean) of a LayerNorm or RMSNorm of any make, found by probing."""
    norm = copy.deepcopy(norm).float()
    device = next((p.device for p in norm.parameters()), torch.device("cpu"))
    probe = 1e3 * (1.0 - 2.0 * (torch.arange(width, device=device) % 2))
    with torch.no_grad():
        bias = norm(torch.zeros(1, width, device=device))[0].double()
        seen, moved = norm(probe[None])[0].double() - bias, norm(probe[None] + 1e3)[0].double() - bias
    centred = torch.allclose(seen, moved, rtol=1e-3, atol=1e-6)
    probe = probe.double()
    probe = probe - probe.mean() if centred else probe
    return seen * probe.square().mean().sqrt() / probe, bias, centred


def freeze(norm, x: torch.Tensor) -> Frozen:
    """A norm, frozen at the scale it has on the rows x [row, d_model].

    Raises:
        ValueError: for a norm that is neither a LayerNorm nor an RMSNorm.
    """
    gain, bias, centred = gain_of(norm, x.shape[-1])
    x = x.to(gain.device)
    with torch.no_grad():
        y = copy.deepcopy(norm).float()(x.float()).double() - bias
    base = gain * (x.double() - x.double().mean(-1, keepdim=True) if centred else x.double())
    scale = (y * base).sum(-1) / base.square().sum(-1).clamp(min=1e-30)
    if not (y - scale[:, None] * base).abs().max() <= 1e-4 * y.abs().max().clamp(min=1e-30):
        raise ValueError(f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm, so it cannot be frozen at a scale and "
                         "no part has a share of its own. Use wb.locate.causal.patch.")  # fmt: skip
    return Frozen(scale, gain, bias, centred)


def asked(model, prompts, answers=None, spans=None) -> tuple[Prompts, torch.Tensor | None, str]:
    """Prompts, one answer id for each (None where none was given), and the task's name.

    Args:
        prompts: a text, a list of texts or ids, a task or the name of a bundled one (clean prompts of pairs).
        answers: one for all or one each, as texts or ids; a task of pairs brings its own.
    Raises:
        ValueError: for answers that do not fit the prompts or are no single token.
    """
    if isinstance(prompts, str) and prompts in Task.names():
        prompts = Task.load(prompts)
    if isinstance(prompts, Task):
        task = prompts
        if task.kind == "pairs" and answers is None:
            pairs = task.on(model)
            return Prompts(pairs.clean, spans=pairs.spans), pairs.answer, task.name
        prompts, name = task.column("clean" if task.kind == "pairs" else "text"), task.name
    else:
        name = ""
    found = model._prompts(prompts, spans)
    if answers is None:
        return found, None, name
    answers = [answers] * len(found.ids) if isinstance(answers, (str, int)) else list(answers)
    if len(answers) != len(found.ids):
        raise ValueError(f"{len(found.ids)} prompts, but {len(answers)} answers: give one for all, or one each.")
    texts = found.ids if isinstance(prompts, Prompts) else [prompts] if isinstance(prompts, str) else list(prompts)
    ids = []
    for text, tokens, answer in zip(texts, found.ids, answers, strict=True):
        if isinstance(answer, str) and not isinstance(text, str):
            raise ValueError(f"Prompts given as ids need their answers as ids; got {answer!r}.")
        ids.append(_answer(text, answer, tokens, model) if isinstance(answer, str) else int(answer))
    return found, torch.tensor(ids), name


def run(model, prompts: Prompts, wanted, interventions=()):
    """One pass, in batches: yields (batch, component -> [row, column, width], logits [row, column, d_vocab])."""
    model._edits(interventions, prompts, wanted)  # refuses what cannot be done before anything runs
    for part in prompts.chunks(max(1, min(TOKENS_PER_PASS, 2**26 // model.names.d_vocab))):
        edits = model._edits(interventions, part, wanted)
        seen, logits = model.trace(model.inputs(part), _visit(edits, model.nnsight))
        yield part, seen, logits


def _visit(edits, nn):
    def body():
        found = edits.visit()
        return found, nn.output.logits.clone()

    return body


def last_of(model, prompts: Prompts, kind: str, layer: int) -> torch.Tensor:
    """A whole site at the last position, [prompt, width]."""
    found, names = [], model.names
    for part in prompts.chunks():
        rows = len(part.ids)
        found.append(
            model.trace(model.inputs(part), lambda rows=rows: names.place(kind, layer, rows).get()[:, -1].clone())
        )
    return torch.cat(found).float().cpu()


def rank_of(values: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Where `own` [..., 1] stands among values [..., token]: 1 is first; equals share the mean of their places."""
    return 1 + (values > own).sum(-1) + ((values == own).sum(-1).float() - 1) / 2


def others(answer: torch.Tensor) -> torch.Tensor:
    """For each prompt the answer of another one that differs from its own, -1 where there is none: what chance gives."""
    found = torch.full_like(answer, -1)
    for i, own in enumerate(answer.tolist()):
        rest = torch.cat([answer[i + 1 :], answer[:i]])
        rest = rest[rest != own]
        if len(rest):
            found[i] = rest[0]
    return found
