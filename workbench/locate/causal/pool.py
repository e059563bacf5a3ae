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
            pairs themselves. found: the components; cells: their patches; without, all positions count.
    Attributes:
        used: the numbers of the prompts for which there is something to put in.
    Raises:
        ValueError: when that is fewer than half of them.
    """

    def __init__(self, model, pairs, reference, found, method: str, seed: int, cells=()):
        self.model, self.found, self.method, self.seed = model, found, method, seed
        self.cost, self.note = 0.0, ""
        if reference is None or Task.of(reference).kind == "pairs":
            others = pairs if reference is None else Task.of(reference).on(model)
            self.prompts, templates = [*others.clean, *others.corrupted], others.task.column("template") * 2
        else:
            texts = Task.of(reference)
            self.prompts, templates = [model.ids(row["text"]) for row in texts], texts.column("template")
        self.keys = [(len(ids), template) for ids, template in zip(self.prompts, templates)]
        self.levels = [self._level(len(ids), template) for ids, template in
                       zip(pairs.clean, pairs.task.column("template"))]  # fmt: skip
        self.used = list(range(len(self.levels)))
        if method in MATCH:
            self._choose(pairs.clean, cells)
            kinds, of = [self.levels[i][0] for i in self.used], len(self.levels)
            counts = [(kinds.count(kind), how) for kind, how in MATCH[method].items()]
            counts.append((of - len(self.used), "left out, for nothing there can take their place"))
            self.note = f"Matched: {'; '.join(f'{count} of {of} {how}' for count, how in counts if count)}."
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

    def _choose(self, clean, cells) -> None:
        """Which prompts to put in for each prompt (resample), and which prompts there is anything for."""
        lengths, pairwise = {len(ids) for ids in self.prompts}, any(one.kind in PAIRWISE for one in self.found)
        if self.method == "resample":  # no prompt is its own match
            texts, mine = ([tuple(ids.tolist()) for ids in some] for some in (self.prompts, clean))
            self.others = [[j for j, key in enumerate(self.keys)
                            if key[0] == length and (kind != "template" or key[1] == template) and texts[j] != own]
                           for own, (kind, length, template) in zip(mine, self.levels)]  # fmt: skip
            self.used = [i for i, others in enumerate(self.others) if others]
        elif pairwise:
            self.used = [i for i, ids in enumerate(clean) if len(ids) in lengths]
        else:  # from the end, as far as the longest goes
            places = [own for cell in cells for own in cell.parts.values()]
            first = [min((p for own in places for p in own[i]), default=0) for i in range(len(clean))]
            self.used = [i for i, ids in enumerate(clean) if len(ids) - first[i] <= max(lengths)]
        if len(self.used) * 2 < len(clean):
            raise ValueError(f"Only {len(self.used)} of {len(clean)} prompts find another in the reference to take "
                             f"{'activations' if self.method == 'resample' else 'means'} from: it takes one of the same length. "
                             "Give reference= a task with such prompts, or none; method='mean' takes means by distance "
                             "from the end, except of attention scores and patterns.")  # fmt: skip

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
        """What to take instead of the base run's activations: one (run, donors) per draw. Prompts that are not `used` keep
        their own."""
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
                chosen = [int(rng.choice(self.others[i])) if self.others[i] else None for i in group]
                ids = [
                    base.ids[k][base.mask[k] == 1] if one is None else self.prompts[one] for k, one in enumerate(chosen)
                ]
                self.cost += len(group) / len(self.levels)
                yield capture(self.model, ids, self.found), own

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
