"""The tuned lens: an affine translator for each layer, trained to say early what the model says in the end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from workbench import measure, storage
from workbench.component import Component
from workbench.locate.vocabulary.readout import Readout, run
from workbench.model.plan import Prompts
from workbench.task import Task

ROWS = 256  # tokens in one step of training
TRIAL = 50  # steps between two looks at the validation texts
ARRAYS = ("A", "b")


@dataclass(frozen=True, eq=False)
class TunedLens:
    """A translator x + A x + b for each stream before the last; the last is read as it is.

    Attributes:
        components: the streams that have one. A: [component, d_model, d_model], b: [component, d_model].
        logit_kl, tuned_kl: mean KL(final || lens) on held-out texts, in nats, without and with the translator.
        ci_lo, ci_hi: 95 % interval of their difference (tuned minus logit lens), over held-out texts.
        steps: of training that were kept (the best on validation texts; 0 keeps the logit lens).
        fingerprint: of the model. texts: how many tokens were trained on and held out, in words.
    """

    components: list[Component]
    A: torch.Tensor
    b: torch.Tensor
    logit_kl: np.ndarray
    tuned_kl: np.ndarray
    ci_lo: np.ndarray
    ci_hi: np.ndarray
    steps: list[int]
    fingerprint: str
    texts: str
    seconds: float = float("nan")
    seed: int = 0

    def translate(self, component, x: torch.Tensor) -> torch.Tensor:
        """The stream [..., d_model] in the basis of the last one; the last stream as it is.

        Raises:
            ValueError: for a stream without a translator.
        """
        one = Component.parse(component).at(None).canonical
        layer = max(other.layer for other in self.components)
        if one.kind == "resid_post" and one.layer == layer + 1:
            return x
        if one not in self.components:
            raise ValueError(f"{one} has no translator; this lens has {self.components[0]} to {self.components[-1]}.")
        c = self.components.index(one)
        y = x.to(self.A)
        return (y + y @ self.A[c].T + self.b[c]).to(x.dtype)

    def check(self, model) -> None:
        """Was it trained on this model?

        Raises:
            ValueError: naming both fingerprints.
        """
        if model.fingerprint != self.fingerprint:
            raise ValueError(f"This lens was trained on model {self.fingerprint}, this one is {model.fingerprint}. Train one: "
                             "wb.locate.vocabulary.tuned_lens(model).")  # fmt: skip

    @property
    def frame(self):
        """A pandas table: held-out KL to the final prediction of both lenses, by stream."""
        import pandas as pd

        return pd.DataFrame({
            "component": [str(one) for one in self.components], "logit_lens": self.logit_kl, "tuned_lens": self.tuned_kl,
            "difference": self.tuned_kl - self.logit_kl, "ci_lo": self.ci_lo, "ci_hi": self.ci_hi, "steps": self.steps,
        })  # fmt: skip

    def __repr__(self) -> str:
        return (f"TunedLens({len(self.components)} streams, held-out KL {self.logit_kl.mean():.2f} -> "
                f"{self.tuned_kl.mean():.2f} nats, {self.texts})")  # fmt: skip

    def plot(self):
        """Held-out KL of both lenses by stream, as a matplotlib figure."""
        from workbench.locate.vocabulary.draw import curves

        lines = {"logit lens": self.logit_kl, "tuned lens": self.tuned_kl}
        return curves(lines, [str(one) for one in self.components], f"How far from the final prediction? ({self.texts})",
                      "KL(final || lens), nats")  # fmt: skip

    def save(self, folder) -> Path:
        """Write `tuned_lens.json` and `tuned_lens.safetensors`."""
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self.__dict__.items() if k not in ARRAYS}
        plain["components"] = [str(one) for one in self.components]
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return storage.write(folder, {"tuned_lens.safetensors": arrays, "tuned_lens.json": plain})

    @classmethod
    def load(cls, folder) -> TunedLens:
        """Read it back.

        Raises:
            FileNotFoundError: when `folder` holds none.
        """
        plain = storage.read(cls, folder, "tuned_lens.json")
        plain["components"] = [Component.parse(one) for one in plain["components"]]
        plain |= {name: np.array(plain[name]) for name in ("logit_kl", "tuned_kl", "ci_lo", "ci_hi")}
        return cls(**plain, **storage.read_tensors(Path(folder) / "tuned_lens.safetensors"))


def tuned_lens(model, texts=None, *, steps: int = 300, lr: float = 1e-3, tokens: int = 12_000, seed: int = 0,
               progress: bool = True) -> TunedLens:  # fmt: skip
    """How would each stream be read fairly? Train one affine translator per layer (a tuned lens).

    The logit lens reads an early stream as if it were the last one, but the basis drifts from layer to layer. A tuned
    lens reads x + A x + b instead, with A and b trained so that the reading comes near the model's own final prediction,
    by KL(final || lens), Adam, from A = 0 and b = 0. Validation texts choose, for each layer, how far to go: where training
    does not help there, the logit lens stays. Held-out texts, seen by neither, give the figures.

    A translator learns what *can* be told from a stream, by a linear map; that a later layer tells it, it does not show.

    Args:
        texts: what the model usually reads: a list of texts, or a task (its `test` rows are held out). By default all
            bundled texts and prompts that the model's tokenizer knows; for a model of your own give texts of its kind.
        steps: of 256 tokens each. lr: of Adam, falling linearly to 0. tokens: how many to train on, at most.
    Returns:
        TunedLens; `logit_lens(model, prompts, tuned=lens)` reads through it.
    Raises:
        ValueError: for fewer than 10 texts, or a model that its norm and unembedding do not describe.
    Source:
        Belrose et al. 2023, "Eliciting latent predictions from transformers with the tuned lens", section 3.
    """
    began, readout = time.perf_counter(), Readout(model)
    train, trial, held = _split(model, texts, tokens, np.random.default_rng(seed))
    n_layers = model.names.n_layers
    if n_layers < 2:
        raise ValueError("This model has one layer, so there is only its last stream, which needs no translator.")
    found = [Component("resid_pre", 0), *(Component("resid_post", layer) for layer in range(n_layers - 1))]
    x, final, _ = _streams(model, readout, train, found)
    check, check_final, _ = _streams(model, readout, trial, found)
    A, b, kept = _train(readout, x, final, (check, check_final), steps, lr, seed, progress)
    del x, final
    y, y_final, owner = _streams(model, readout, held, found)
    rows = []
    with torch.no_grad():
        for c in range(len(found)):
            pair = [_kl(readout, y[c], y_final), _kl(readout, y[c] + y[c] @ A[c].T + b[c], y_final)]
            # a mean over tokens: texts are resampled with all their tokens
            rows.append([pair[0].mean().item(), pair[1].mean().item(),
                         *measure.mean_interval((pair[1] - pair[0]).numpy(), owner, draws=500, seed=seed)[1:]])  # fmt: skip
    logit, tuned, low, high = np.array(rows).T
    said = f"{sum(map(len, train))} tokens trained on, {sum(map(len, held))} held out"
    return TunedLens(
        found, A, b, logit, tuned, low, high, kept, model.fingerprint, said, time.perf_counter() - began, seed
    )


def _split(model, texts, tokens: int, rng) -> tuple[list, list, list]:
    """Ids to train on, to choose by, and to hold out."""
    if texts is None:
        rows = [row for name in Task.names() for row in Task.load(name)]
    elif isinstance(texts, (str, Task)):
        rows = list(Task.of(texts))
    else:
        rows = [{"text": text} for text in texts]
    rows = [rows[i] for i in rng.permutation(len(rows))][: max(2000, tokens // 4)]  # more than enough
    words = [row.get("text") or row["clean"] for row in rows]
    unknown, start = model.tokenizer.unk_token_id, [model.tokenizer.bos_token_id] if model.bos else []
    ids = [start + list(one) for one in model.tokenizer(words, add_special_tokens=False).input_ids]
    usable = [(torch.tensor(one), row.get("split")) for one, row in zip(ids, rows) if one and unknown not in one]
    if len(usable) < 10:
        raise ValueError(f"A tuned lens needs at least 10 texts that this model's tokenizer knows; got {len(usable)} of "
                         f"{len(rows)}.")  # fmt: skip
    held = [one for one, split in usable if split == "test"]
    rest = [one for one, split in usable if split != "test"] if held else [one for one, _ in usable]
    if not held or len(rest) < 5:
        fifth = max(1, len(usable) // 5)
        held, rest = [one for one, _ in usable[:fifth]], [one for one, _ in usable[fifth:]]
    tenth = max(1, len(rest) // 8)
    return (
        _up_to(rest[tenth:], tokens),
        _up_to(rest[:tenth], max(512, tokens // 8)),
        _up_to(held, max(1024, tokens // 4)),
    )


def _up_to(texts: list, tokens: int) -> list:
    total = np.cumsum([len(ids) for ids in texts])
    return texts[: max(1, int((total <= tokens).sum()))]


def _streams(model, readout: Readout, texts: list, found) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """(streams [component, token, d_model], last stream [token, d_model], text number of each token)."""
    last = Component("resid_post", model.names.n_layers - 1)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    parts, finals, owner, done = [], [], [], 0
    for start in range(0, len(order), 64):
        own = order[start : start + 64]
        for part, seen, logits in run(model, Prompts([texts[i] for i in own]), [*found, last]):
            real = torch.arange(part.width)[None] >= torch.tensor(part.pads)[:, None]
            finals.append(seen[last][real].float().cpu())
            with torch.no_grad():
                readout.check(readout(seen[last])[real], logits[real])
            parts.append(torch.stack([seen[one][real].float().cpu() for one in found]))
            owner.append(np.repeat(np.array(order[done : done + len(part.ids)]), [len(ids) for ids in part.ids]))
            done += len(part.ids)
    return torch.cat(parts, 1), torch.cat(finals), np.concatenate(owner)


def _kl(readout: Readout, x: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """KL(final || lens) of each token [token], in pieces."""
    pieces = []
    for a, b in zip(x.split(ROWS), last.split(ROWS), strict=True):
        final, said = readout(b).float().log_softmax(-1), readout(a).float().log_softmax(-1)
        pieces.append((final.exp() * (final - said)).sum(-1).cpu())
    return torch.cat(pieces)


def _train(readout, x, last, trial, steps: int, lr: float, seed: int, progress: bool):
    """A, b [component, ...] and the number of steps kept, each layer's best on the validation texts."""
    from workbench.model.sweep import bar

    layers, width = len(x), x.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    size = x.square().mean((1, 2)).sqrt()  # b in units of the stream's own size, so that one rate suits all layers
    A = torch.zeros(layers, width, width, requires_grad=True)
    b = torch.zeros(layers, width, requires_grad=True)
    optimizer = torch.optim.Adam([A, b], lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    best = [(_kl(readout, trial[0][c], trial[1]).mean().item(), 0, A[c].detach().clone(), b[c].detach().clone())
            for c in range(layers)]  # fmt: skip
    with bar(steps, progress) as show:
        for step in range(1, steps + 1):
            rows = torch.randint(len(last), (min(ROWS, len(last)),), generator=generator)
            with torch.no_grad():
                final = readout(last[rows]).float().softmax(-1)
            with torch.enable_grad():
                for c in range(layers):  # one layer's logits at a time in memory
                    y = x[c][rows]
                    said = readout(y + y @ A[c].T + size[c] * b[c]).float()
                    torch.nn.functional.cross_entropy(said, final).backward()  # KL up to the final entropy, a constant
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            show.update(1)
            if step % TRIAL == 0 or step == steps:
                with torch.no_grad():
                    for c in range(layers):
                        y = trial[0][c]
                        now = _kl(readout, y + y @ A[c].T + size[c] * b[c], trial[1]).mean().item()
                        if now < best[c][0]:
                            best[c] = (now, step, A[c].detach().clone(), b[c].detach().clone())
    return (torch.stack([one[2] for one in best]), torch.stack([size[c] * one[3] for c, one in enumerate(best)]),
            [one[1] for one in best])  # fmt: skip
