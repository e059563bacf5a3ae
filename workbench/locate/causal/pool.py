"""What an ablation puts in a component's place: zeros, means over matched prompts, other prompts' activations."""

from __future__ import annotations

import numpy as np
import torch

from workbench.locate.causal.optimal import optimal_constants
from workbench.model.plan import TOKENS_PER_PASS
from workbench.model.sweep import Run, capture, span
from workbench.task import Task

METHODS = ("mean", "resample", "zero", "optimal")
FEW = 8  # a mean over fewer prompts than this is taken over more alike ones
PAIRWISE = ("attn_scores", "pattern")  # sites with an axis of key positions: only prompts of one length compare


class Pool:
    """Prompts to take means or activations from, and which of them match a given prompt.

    Args:
        pairs: the prompts to ablate. reference: further prompts (a task of pairs or texts), or None for both sides of the
            pairs themselves. found: the components; cells: their patches, for the optimal constants.
    """

    def __init__(self, model, pairs, reference, found, method: str, seed: int, cells=()):
        self.model, self.found, self.method, self.seed = model, found, method, seed
        self.cost, self.note = 0.0, ""
        self.own = {i: i for i in range(len(pairs.clean))} if reference is None else {}  # no prompt is its own match
        if reference is None or Task.of(reference).kind == "pairs":
            others = pairs if reference is None else Task.of(reference).on(model)
            self.prompts, templates = [*others.clean, *others.corrupted], others.task.column("template") * 2
        else:
            texts = Task.of(reference)
            self.prompts, templates = [model.ids(row["text"]) for row in texts], texts.column("template")
        self.keys = [(len(ids), template) for ids, template in zip(self.prompts, templates)]
        self.levels = [self._level(len(ids), template) for ids, template in
                       zip(pairs.clean, pairs.task.column("template"))]  # fmt: skip
        if method in MATCH:
            kinds = [level[0] for level in self.levels]
            counts = [(kinds.count(kind), how) for kind, how in MATCH[method].items()]
            self.note = f"Matched: {'; '.join(f'{count} of {len(kinds)} {how}' for count, how in counts if count)}."
        if method == "mean":
            self._average()
        elif method == "optimal":
            self.cells = cells
            fitted_on = pairs if reference is None else Task.of(reference).on(model)
            self.constants, self.cost, self.note = optimal_constants(model, fitted_on, found, seed)

    def _level(self, length: int, template) -> tuple:
        """How well a prompt is matched: by template and length, by length, or only by distance from the end."""
        alike = sum(key == (length, template) for key in self.keys) if template is not None else 0
        same = sum(key[0] == length for key in self.keys)
        if alike >= FEW:
            return "template", length, template
        return ("length", length, None) if same >= FEW else ("end", length, None)

    def _average(self) -> None:
        """Sums and counts of every site, lined up at the prompts' ends, for each kind of match that is needed."""
        self.sums: dict[tuple, dict] = {}
        wanted = {level if level[0] != "end" else ("end", None, None) for level in self.levels}
        wanted |= {("length", level[1], None) for level in self.levels}
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        step = max(1, TOKENS_PER_PASS // max(map(len, self.prompts)))
        for start in range(0, len(order), step):
            part = order[start : start + step]
            run = capture(self.model, [self.prompts[i] for i in part], self.found)
            self.cost += 1
            for row, i in enumerate(part):
                length, template = self.keys[i]
                for key in wanted & {("template", length, template), ("length", length, None), ("end", None, None)}:
                    for site, x in run.acts.items():
                        if site[0] in PAIRWISE and key[0] == "end":
                            continue
                        own = _cut(site, x[row], length).double()
                        total, count = self.sums.setdefault(key, {}).get(
                            site, (own.new_zeros(0, *own.shape[1:]), own.new_zeros(0))
                        )
                        if len(total) < length:  # shorter prompts have no such column
                            more = length - len(total)
                            total = torch.cat([total.new_zeros(more, *own.shape[1:]), total])
                            count = torch.cat([count.new_zeros(more), count])
                        total[len(total) - length :] += own
                        count[len(count) - length :] += 1
                        self.sums[key][site] = (total, count)

    def sources(self, base: Run, group: list[int], draws: int):
        """What to take instead of the base run's activations: one (run, donors) per draw.

        Prompts without a match keep their own activations.
        """
        own = torch.arange(len(group))
        if self.method == "zero":
            yield base.with_acts({site: torch.zeros_like(x) for site, x in base.acts.items()}), own
        elif self.method == "mean":
            yield base.with_acts({site: self._means(site, x, group) for site, x in base.acts.items()}), own
        elif self.method == "optimal":
            acts = {site: x.clone() for site, x in base.acts.items()}
            for one, cell in zip(self.found, self.cells):
                for row, i in enumerate(group):
                    columns = [p + base.pads[row] for p in cell.parts[one][i]]
                    acts[one.site][row, columns, span(self.model.names, one, acts[one.site].shape[-1])] = (
                        self.constants[one]
                    )
            yield base.with_acts(acts), own
        else:
            for draw in range(draws):
                rng = np.random.default_rng([self.seed, draw, group[0]])
                chosen = [self._other(i, rng) for i in group]
                ids = [
                    base.ids[k][base.mask[k] == 1] if one is None else self.prompts[one] for k, one in enumerate(chosen)
                ]
                self.cost += len(group) / len(self.levels)
                yield capture(self.model, ids, self.found), own

    def _other(self, i: int, rng) -> int | None:
        kind, length, template = self.levels[i]
        same = [j for j, key in enumerate(self.keys)
                if key[0] == length and (kind != "template" or key[1] == template) and j != self.own.get(i)]  # fmt: skip
        return int(rng.choice(same)) if same else None

    def _means(self, site, x: torch.Tensor, group: list[int]) -> torch.Tensor:
        out = x.clone()
        for row, i in enumerate(group):
            kind, length, template = self.levels[i]
            key = (kind, length, template) if kind != "end" else ("end", None, None)
            key = ("length", length, None) if key[0] == "end" and site[0] in PAIRWISE else key
            if site not in self.sums.get(key, {}):
                continue
            total, count = self.sums[key][site]
            length = min(length, len(total))
            mean = (total[len(total) - length :] / count[len(count) - length :].view(-1, *[1] * (total.dim() - 1))).to(
                x
            )
            if site[0] in PAIRWISE:
                out[row, -length:].unflatten(-1, (mean.shape[1], -1))[..., -length:] = mean
            else:
                out[row, -length:] = mean
        return out


MATCH = {
    "mean": {"template": "by position and template", "length": f"by position and length (fewer than {FEW} of their template)",
             "end": f"by distance from the end (fewer than {FEW} of their length)"},
    "resample": {"template": "with one of their template", "length": f"with one of their length (fewer than {FEW} of their template)",
                 "end": f"with one of their length, of which there are fewer than {FEW}"},
}  # fmt: skip


def _cut(site, x: torch.Tensor, length: int) -> torch.Tensor:
    """One prompt's activations without the columns left of it, [position, ...]; patterns also without those keys."""
    if site[0] not in PAIRWISE:
        return x[-length:]
    return x.unflatten(-1, (-1, x.shape[0]))[-length:, :, -length:]
