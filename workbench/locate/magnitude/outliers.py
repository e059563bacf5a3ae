"""Are there outliers? Massive activations, attention sinks, super weights. "None found" is an answer.

They are known from large models; small ones often have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from workbench import measure, storage
from workbench.component import Component
from workbench.locate.magnitude.heads import PATTERNS, _attention, heads
from workbench.locate.magnitude.reading import texts
from workbench.plot import picture


@dataclass(frozen=True, eq=False)
class Outliers:
    """What was looked for, by which rule, what was found, and how near the rest came.

    Attributes:
        what: "massive activations", "attention sinks" or "super weights". rule: in words.
        hits: one dict per outlier, with its `component`; empty where none was found.
        layers: one dict per layer, what the rule looked at. nearest: the strongest that was seen, in words.
        task: what was run. cost: forward-pass equivalents.
    """

    what: str
    rule: str
    hits: tuple[dict, ...]
    layers: tuple[dict, ...]
    nearest: str
    task: str = ""
    cost: float = 1.0

    @property
    def frame(self):
        """A pandas table of what was found, strongest first."""
        import pandas as pd

        return pd.DataFrame(list(self.hits), columns=None if self.hits else ["component"])

    @property
    def components(self) -> list[Component]:
        """What was found, without duplicates, strongest first."""
        return list(dict.fromkeys(Component.parse(hit["component"]) for hit in self.hits))

    def __repr__(self) -> str:
        found = f"{len(self.hits)} found, first {self.hits[0]['component']}" if self.hits else "none found"
        return f"Outliers({self.what}: {found}; {self.nearest}; rule: {self.rule})"

    def plot(self):
        """The layer table as a matplotlib figure: one line a column, by layer."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.4, 3.2), dpi=110, layout="constrained")
        ax = figure.add_subplot()
        numbers = [one["layer"] for one in self.layers]
        for column in [key for key in self.layers[0] if key != "layer"]:
            ax.plot(numbers, [one[column] for one in self.layers], marker="o", markersize=3, label=column)
        if self.what != "attention sinks":
            ax.set_yscale("log")
        ax.set_xlabel("layer", fontsize=8.5)
        ax.set_title(f"{self.what}: {len(self.hits) or 'none'} found ({self.task})", fontsize=8.5, loc="left")
        ax.legend(fontsize=7, frameon=False)
        ax.tick_params(labelsize=8)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        return picture(figure)

    def save(self, path) -> Path:
        """Write one JSON file."""
        return storage.write_file(path, self.__dict__)

    @classmethod
    def load(cls, path) -> Outliers:
        """Read it back."""
        plain = storage.read(cls, path)
        return cls(**plain | {"hits": tuple(plain["hits"]), "layers": tuple(plain["layers"])})


def massive_activations(model, task, *, larger: float = 100.0, ratio: float = 1000.0) -> Outliers:
    """Are there dimensions of the stream that are enormous at some tokens? Massive activations.

    Looks at the stream behind every block, at every token (BOS and first tokens included: they sit there).

    Args:
        task: a task, its name, or a list of texts.
        larger, ratio: a hit is larger than `larger` in absolute value and than `ratio` times the layer's median.
    Returns:
        Outliers: hits by layer and dimension with the largest value, how many times the median, at how many tokens, how
        often at the first token, and the token of the largest; layers with the three largest dimensions and the median.
    Source:
        Sun et al. 2024, "Massive activations in large language models" (100 and 1000 are theirs).
    """
    _positive(larger=larger, ratio=ratio)
    prompts, name = texts(model, task)
    layers, hits = [[] for _ in range(model.names.n_layers)], {}
    for part in prompts.chunks():
        mask = _tokens(part).to(model.hf.device)
        seen = model.trace(model.inputs(part), _tops(model.names, mask, larger, ratio))
        for layer, (top, median, where, values) in enumerate(seen):
            layers[layer].append((top.cpu(), float(median), len(part.ids)))
            for (row, column, dimension), value in zip(where.tolist(), values.tolist()):
                token = model.token(part.ids[row][column - part.pads[row]])
                hits.setdefault((layer, dimension), []).append((value, column == part.pads[row], token))
    table = []
    for layer, parts in enumerate(layers):
        top = torch.stack([one[0] for one in parts]).amax(0).topk(3).values.tolist()
        median = float(np.average([one[1] for one in parts], weights=[one[2] for one in parts]))
        table.append({"layer": layer, "largest": top[0], "second": top[1], "third": top[2], "median": median})
    found = []
    for (layer, dimension), seen in hits.items():
        value, _, token = max(seen, key=lambda one: abs(one[0]))
        found.append({"component": f"resid_post.{layer}", "dimension": dimension, "value": value,
                      "times_median": abs(value) / table[layer]["median"], "tokens": len(seen),
                      "at_first": float(np.mean([one[1] for one in seen])), "token": token})  # fmt: skip
    found.sort(key=lambda hit: -abs(hit["value"]))
    most = max(table, key=lambda one: one["largest"] / max(one["median"], 1e-30))
    nearest = (f"largest {most['largest']:.3g}, {most['largest'] / max(most['median'], 1e-30):.0f} times the median, "
               f"at resid_post.{most['layer']}")  # fmt: skip
    rule = f"larger than {larger:g} and than {ratio:g} times the median"
    return Outliers("massive activations", rule, tuple(found), tuple(table), nearest, name)


def sinks(model, task, *, threshold: float = 0.3) -> Outliers:
    """Which heads rest on the first token? Attention sinks.

    Args:
        task: a task, its name, or a list of texts. Short prompts make sinks of all heads: attention has few other places.
        threshold: a hit gives the first token more than this much of its attention, averaged over queries from the third
            token on, and more than twice what attention spread evenly would give.
    Returns:
        Outliers: heads with their attention to the first token, its interval over prompts, and even attention; layers
        with the largest and the mean of their heads.
    Raises:
        ValueError: where the model offers no patterns, or prompts have fewer than three tokens.
    Source:
        Xiao et al. 2024, "Efficient streaming language models with attention sinks"; 0.3 as in Gu et al. 2025.
    """
    _positive(threshold=threshold)
    wanted = heads(model, "z.*.*")
    run, name = texts(model, task)
    seen, valid = _attention(model, run, run)
    used = valid[PATTERNS.index("first")]
    if not used.any():
        raise ValueError("These prompts have fewer than three tokens each; a sink shows in longer ones.")
    x = seen[PATTERNS.index("first")][used]
    even = float(np.mean([np.mean(1 / np.arange(3, len(ids) + 1)) for ids, ok in zip(run.ids, used) if ok]))
    mean, low, high = measure.mean_interval(x)
    found = [{"component": str(one), "attention": float(mean[i]), "ci_lo": float(low[i]), "ci_hi": float(high[i]),
              "even": even}
             for i, one in enumerate(wanted) if mean[i] > max(threshold, 2 * even)]  # fmt: skip
    found.sort(key=lambda hit: -hit["attention"])
    rows = mean.reshape(model.names.n_layers, -1)
    table = [{"layer": i, "largest": float(r.max()), "mean": float(r.mean()), "even": even} for i, r in enumerate(rows)]
    nearest = f"largest {mean.max():.2f} at {wanted[int(mean.argmax())]}, even attention {even:.2f}"
    rule = f"attention to the first token above {threshold:g} and twice even attention"
    return Outliers("attention sinks", rule, tuple(found), tuple(table), nearest, name)


def super_weights(model, task, *, larger: float = 100.0, ratio: float = 1000.0) -> Outliers:
    """Is there a single weight that makes a massive activation? Super weights.

    In each layer takes the largest output of the FFN's last matrix and the one weight that contributes most to it.

    Args:
        task: a task, its name, or a list of texts.
        larger, ratio: as for `massive_activations`, of the output; and the weight alone must give more than half of it.
    Returns:
        Outliers: hits name the neuron, the `dimension` it writes to, the weight, the neuron's activation and the output
        there, and the weight's share of it; layers with the largest output, its median, and the largest activation.
    Raises:
        ValueError: where the model offers no neurons.
    Source:
        Yu et al. 2024, "The super weight in large language models".
    """
    _positive(larger=larger, ratio=ratio)
    model.names.validate(Component("neuron", 0, 0))
    prompts, name = texts(model, task)
    best: list[dict] = [{"output": 0.0} for _ in range(model.names.n_layers)]
    medians = [[] for _ in best]
    for part in prompts.chunks():
        mask = _tokens(part).to(model.hf.device)
        for layer, (output, dimension, acts, median) in enumerate(
            model.trace(model.inputs(part), _spikes(model.names, mask))
        ):
            medians[layer].append(float(median))
            if abs(float(output)) > abs(best[layer]["output"]):
                best[layer] = {"output": float(output), "dimension": int(dimension), "acts": acts.float().cpu()}
    found, table = [], []
    for layer, one in enumerate(best):
        if "acts" not in one:
            table.append({"layer": layer, "output": 0.0, "median": 0.0, "activation": 0.0, "share": 0.0})
            continue
        weights = model.weight("W_out", layer)[:, one["dimension"]].cpu()
        given, median = weights * one["acts"], float(np.mean(medians[layer]))
        j = int(given.abs().argmax())
        hit = {"component": f"neuron.{layer}.{j}", "dimension": one["dimension"], "weight": float(weights[j]),
               "activation": float(one["acts"][j]), "output": one["output"],
               "share": float(given[j] / one["output"])}  # fmt: skip
        table.append({"layer": layer, "output": abs(one["output"]), "median": median, "activation": abs(hit["activation"]),
                      "share": hit["share"]})  # fmt: skip
        if abs(one["output"]) > max(larger, ratio * median) and hit["share"] > 0.5:
            found.append(hit)
    found.sort(key=lambda hit: -abs(hit["output"]))
    most = max(table, key=lambda one: one["output"] / max(one["median"], 1e-30))
    nearest = (f"largest output {most['output']:.3g}, {most['output'] / max(most['median'], 1e-30):.0f} times the median, "
               f"in layer {most['layer']}, one weight giving {most['share']:.0%} of it")  # fmt: skip
    rule = f"output larger than {larger:g} and than {ratio:g} times the median, more than half of it by one weight"
    return Outliers("super weights", rule, tuple(found), tuple(table), nearest, name)


def _positive(**settings) -> None:
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r}: give a number above 0.")


def _tokens(part) -> torch.Tensor:
    """[row, column], true for tokens (BOS too), false for padding."""
    return torch.arange(part.width)[None] >= torch.tensor(part.pads)[:, None]


def _tops(names, mask: torch.Tensor, larger: float, ratio: float):
    def body():
        found = []
        for layer in range(names.n_layers):
            x = names.place("resid_post", layer, len(mask)).get().float()
            size = x.abs() * mask[..., None]
            median = size[mask].median()
            where = ((size > larger) & (size > ratio * median)).nonzero()
            found.append((size.amax((0, 1)), median, where, x[tuple(where.T)]))
        return found

    return body


def _spikes(names, mask: torch.Tensor):
    def body():
        found = []
        for layer in range(names.n_layers):
            acts = names.place("neuron", layer, len(mask)).get()
            out = names.part("neurons", layer).output
            out = (out.unflatten(0, (len(mask), -1)) if out.dim() == 2 else out).float()
            size = out.abs() * mask[..., None]
            place = int(size.argmax())
            row, column, dimension = np.unravel_index(place, tuple(size.shape))
            found.append((out[row, column, dimension], dimension, acts[row, column].clone(), size[mask].median()))
        return found

    return body
