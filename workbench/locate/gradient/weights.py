"""Which weights does the answer depend on? |weight times gradient| and Fisher information, example by example."""

from __future__ import annotations

import time
from operator import attrgetter

import numpy as np
import torch

from workbench import measure
from workbench.component import components
from workbench.locate.causal.null import draws_of
from workbench.locate.causal.patching import name_of
from workbench.locate.causal.places import batches
from workbench.locate.gradient.passes import refuse_without_slope, tokens_per_pass
from workbench.model.plan import Prompts
from workbench.model.run import LOCK
from workbench.model.weights import columns
from workbench.scores import Scores
from workbench.task import Task

RULES = ("snip", "fisher")
BY_DEFAULT = ("q", "k", "v", "z", "mlp_out")
KINDS = ("q", "k", "v", "z", "attn_out", "neuron", "mlp_out")
NUMBERS_AT_ONCE = 2**25  # of per-example gradients
DRAWS = 2


def weight_importance(model, task, at=None, *, rule: str = "snip", metric="log_prob", null=True,
                      seed: int = 0) -> Scores:  # fmt: skip
    """Which weights does the answer depend on? Gradients of the weights, example by example, added up by component.

    - "snip": mean over prompts of |w dm/dw|, how much the metric would change if the weight were taken out, to first order.
    - "fisher": mean over prompts of (dm/dw)^2, with metric="log_prob" the diagonal of the (empirical) Fisher information:
      how sharply the prediction depends on the weight. The square of a mean gradient would be something else.

    A head's queries, keys, values and output are its parts of W_Q, W_K, W_V (`q`, `k`, `v`) and W_O (`z`); a neuron is its
    keys (W_gate, W_in) and its value (W_out); `attn_out` and `mlp_out` are all matrices of a block. Scores are shares of
    all weights of all blocks (ratios of means); biases, norms and embeddings do not count.

    The null: the same for the next word at a random earlier position of the same prompts. Above it, a weight matters for
    this answer more than for words in general.

    Args:
        task: pairs (their clean side). at: a kind, component, family or a list of them, without positions; by default q, k,
            v, z and mlp_out, as far as the model offers them.
        metric: "log_prob" (the loss, but for its sign), "logit_diff", "prob" or a function (logits, answer, foil).
    Returns:
        Scores, with the column `per_weight`: how many times the importance of an average weight. Cost: one pass forward
        and one back, and one back for each draw of the null.
    Raises:
        ValueError: for other kinds, a position, a metric without gradient, a remote model, fused experts.
    Source:
        Lee et al. 2019 (SNIP), per example as in Wei et al. 2024; Kirkpatrick et al. 2017 for the diagonal Fisher.
    """
    began, names, rng = time.perf_counter(), model.names, np.random.default_rng(seed)
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; choose {' or '.join(map(repr, RULES))}.")
    refuse_without_slope(metric)
    if model.remote is not None or names.row.neurons is None:
        raise ValueError("Gradients of weights need the model here (model.remote = None), with neurons of its own (no fused "
                         "experts).")  # fmt: skip
    at = [kind for kind in BY_DEFAULT if kind not in names.refused] if at is None else at
    for one in components(at):
        if one.kind not in KINDS or one.position is not None:
            raise ValueError(f"{one}: weights belong to {', '.join(KINDS)}, without a position.")
    wanted, task, draws = sorted(names.expand(components(at))), Task.of(task), DRAWS if null is True else draws_of(null)
    pairs, of = task.on(model), measure.metric(metric)
    n, values = len(pairs.clean), np.zeros(len(pairs.clean))
    found, totals = np.zeros((1 + draws, len(wanted), n)), np.zeros((1 + draws, n))
    for group in batches(pairs, 1, tokens_per_pass(names)):
        prompts = Prompts([pairs.clean[i] for i in group])
        answer, foil = (ids[group].to(model.hf.device) for ids in (pairs.answer, pairs.foil))
        with Weights(model, prompts) as weights, torch.enable_grad():
            value = of(weights.logits[:, -1], answer, foil)
            values[group] = value.detach().cpu().numpy()
            for draw in range(1 + draws):
                loss = value.sum() if draw == 0 else _elsewhere(weights.logits, prompts, rng)
                units, total = weights.importance(loss, rule, keep=draw < draws)
                found[draw][:, group] = np.stack([_of(names, units, one) for one in wanted])
                totals[draw, group] = total
    score, low, high = measure.ratio_of_means(found[0], totals[0], pairs.task.clusters(), seed=seed)
    limit, why = np.full(len(wanted), np.nan), "" if draws else "No null was asked for."
    if draws and n == 1:
        why = "One prompt: neither interval nor null."
    elif draws:
        limit = measure.null_threshold(found[1:] / totals[1:].mean(1)[:, None, None])
    size = np.array([_of(names, weights.sizes, one) for one in wanted])
    return Scores(wanted, score, low, high, limit, found[0], f"gradient.weight_importance, {rule}", name_of(metric),
                  float(values.mean()), np.nan, "", "the same for the next word at random earlier positions" if draws else "",
                  {}, task.name, 2.0 + draws, time.perf_counter() - began, seed, why,
                  {"per_weight": score * weights.count / size})  # fmt: skip


class Weights:
    """One pass with what is needed for per-example gradients of all block matrices: their inputs, and slopes of outputs.

    The gradient of a matrix in x @ W is the sum over tokens of x times the slope of the output, so no gradient is ever
    kept for more than a few examples at once.

    Attributes:
        logits: [row, position, d_vocab]. sizes: as `importance` gives units, their numbers of weights. count: all of them.
    """

    def __init__(self, model, prompts: Prompts):
        self.model, self.prompts, self.hooks, self.seen = model, prompts, [], {}
        row, names = model.names.row, model.names
        self.modules = []  # (layer, what, module, whether units are its inputs)
        for layer, block in enumerate(attrgetter(row.layers)(model.hf)):
            for what, paths in (("qkv", row.qkv), ("z", (row.heads,)), ("in", row.mlp_in), ("out", (row.neurons,))):
                for i, path in enumerate(paths):
                    self.modules.append(((layer, what, i), attrgetter(path)(block), what in ("z", "out")))
        self.sizes = {key: np.full(w.shape[0 if by_input else 1], w.shape[1 if by_input else 0])
                      for key, module, by_input in self.modules for w in [_matrix(module)]}  # fmt: skip
        self.count = sum(int(size.sum()) for size in self.sizes.values())
        self.names = names

    def __enter__(self) -> Weights:
        for key, module, _ in self.modules:
            self.hooks.append(module.register_forward_hook(self._keep(key)))
        embed = attrgetter(self.names.row.embed)(self.model.hf)
        self.hooks.append(embed.register_forward_hook(lambda module, args, out: out.detach().requires_grad_(True)))
        try:
            with LOCK, torch.enable_grad():
                self.logits = self.model.hf(**self.model.inputs(self.prompts), use_cache=False).logits.float()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()
        self.seen.clear()

    def _keep(self, key):
        def keep(module, args, out):
            self.seen[key] = (args[0].detach(), out)

        return keep

    def importance(self, loss, rule: str, keep: bool) -> tuple[dict, np.ndarray]:
        """(layer, what, number) -> [unit, row], units being columns or rows of the matrix; and the sum over all, [row]."""
        rows = len(self.prompts.ids)
        slopes = torch.autograd.grad(loss, [self.seen[key][1] for key, _, _ in self.modules], retain_graph=keep)
        found, total = {}, np.zeros(rows)
        for (key, module, by_input), slope in zip(self.modules, slopes, strict=True):
            x, w = self.seen[key][0].reshape(rows, -1, self.seen[key][0].shape[-1]).float(), _matrix(module).float()
            slope = slope.reshape(rows, x.shape[1], -1).float()
            parts = []
            step = max(1, NUMBERS_AT_ONCE // w.numel())
            for start in range(0, rows, step):
                gradient = torch.einsum("nti,nto->nio", x[start : start + step], slope[start : start + step])
                each = (gradient * w).abs() if rule == "snip" else gradient**2
                parts.append(each.sum(2 if by_input else 1))
            found[key] = torch.cat(parts).double().cpu().numpy().T
            total += found[key].sum(0)
        return found, total


def _matrix(module) -> torch.Tensor:
    """[in, out]; transformers' Conv1D of GPT-2 keeps it so, Linear the other way round."""
    return module.weight.detach().T if isinstance(module, torch.nn.Linear) else module.weight.detach()


def _of(names, units: dict, one) -> np.ndarray:
    """What belongs to one component, summed: [row] (or a number, of sizes)."""
    layer, kind = one.layer, one.kind
    if kind in ("attn_out", "mlp_out"):
        whats = ("qkv", "z") if kind == "attn_out" else ("in", "out")
        return sum(x.sum(0) for key, x in units.items() if key[0] == layer and key[1] in whats)
    if kind == "neuron":
        keys = [
            x.reshape(-1, names.d_mlp, *x.shape[1:])[:, one.index].sum(0)
            for key, x in units.items()
            if key[:2] == (layer, "in")
        ]
        return sum(keys) + units[layer, "out", 0][one.index]
    if kind == "z":
        start, end = one.index * names.d_head, (one.index + 1) * names.d_head
        return units[layer, "z", 0][start:end].sum(0)
    start, end = columns(names, kind, one.index)
    return units[layer, "qkv", "qkv".index(kind) if len(names.row.qkv) == 3 else 0][start:end].sum(0)


def _elsewhere(logits, prompts: Prompts, rng) -> torch.Tensor:
    """Log-probability of the next word at one random earlier position of each prompt, summed."""
    total = 0.0
    for row, ids in enumerate(prompts.ids):
        if len(ids) > 1:
            at = int(rng.integers(len(ids) - 1))
            total = total + logits[row, prompts.pads[row] + at].log_softmax(-1)[int(ids[at + 1])]
    return total
