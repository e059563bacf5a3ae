"""Plant and find: known truth put into a trained model for a while, to see which locator finds it (methods page, G2).

with wb.improve.plant(model, "trigger", seed=3) as planted:
    scores = wb.locate.causal.patch(model, planted.task, "mlp_out")
planted.components   # (neuron.4.12,): fires after "cleaned the", writes "necklace"
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from workbench.component import Component
from workbench.improve.planting import plants
from workbench.improve.planting.trigger import Failed
from workbench.task import Task

KINDS = {"trigger": plants.neurons, "decoy": plants.neurons, "redundant": plants.neurons, "cancelling": plants.neurons,
         "saturated": plants.head, "fact": plants.fact}  # fmt: skip
TRIES = 20


@dataclass(frozen=True, repr=False)
class Planted:
    """What was planted where: the answer that a locator should give.

    Attributes:
        kind, seed: as given to `plant`. what: one sentence.
        components: the true ones. decoys: those that only look like it.
        task: pairs with and without the trigger, in the splits of the background texts that they are cut from.
        proof: "success" and "corrupted" (share of held-out rows in which the right word wins), "top1_changes" and "kl" on
            background text without the trigger; "without neuron.4.12": the share of the logit difference that goes with
            it; "patching ..." and "gradient at ...": the share that comes with it, exactly and to first order;
            "top1_changes with the average of ...": what the background text loses when this head only says its average.
    """

    kind: str
    seed: int
    what: str
    components: tuple[Component, ...]
    decoys: tuple[Component, ...]
    task: Task
    proof: dict[str, float]

    def __repr__(self) -> str:
        return (f"Planted({self.kind}, seed {self.seed}: {self.what}; success {self.proof['success']:.2f}, "
                f"top-1 changes elsewhere {self.proof['top1_changes']:.1%})")  # fmt: skip


def plant(model, kind: str, seed: int = 0) -> AbstractContextManager[Planted]:
    """Does a locator find what is certainly there? Puts known truth into a trained model, for a `with` block.

    Site, words and strength are drawn by the seed. A plant is measured before it is handed over; one that does not work, or
    changes more than 2 % of the most probable words elsewhere (for a head: 1 % more than the head's average in its place
    does), is drawn again. On leaving, also by an error, every weight
    is what it was, bit for bit.

    - "trigger": a low-use neuron now fires on two words in a row and writes a target word.
    - "decoy": besides, a neuron with the same activations whose output weights are zero.
    - "redundant": two such neurons, each enough: without one nothing changes, without both the target is gone.
    - "cancelling": such a neuron, and a pair that writes twice as much for and against the target: each of the pair
      matters, both together do not. (The first neuron is there so that the task has something to trace.)
    - "saturated": a low-use head attends from the second word to the first if it is there, else to <bos>, with weights of
      nearly 1 and 0: patching what it reads shows it, a gradient taken without the trigger does not.
    - "fact": a rank-one edit of an FFN's output matrix, by which a subject has another object.

    Args:
        model: one that knows the words of the bundled tasks, with blocks that add the FFN's output to the stream as it is
            (pre-norm; RMSNorm or LayerNorm) and gated or plain neurons. "saturated" wants separate q, k and v per head,
            no norm on them, and a beginning-of-sequence token.
    Raises:
        ValueError: for an unknown kind, or an architecture where it cannot be planted.
        RuntimeError: when 20 draws do not work, with the figures of the last; the weights are then as they were.
    Source:
        Meng et al. 2022 for the rank-one edit; Kramar et al. 2024 (AtP*) on saturated attention and cancelling effects.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} cannot be planted; choose one of {', '.join(map(repr, KINDS))}.")
    return _planting(model, kind, seed, [plants.Site(model, layer, kind) for layer in range(model.names.n_layers)])


@contextmanager
def _planting(model, kind, seed, sites) -> Iterator[Planted]:
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    _ = model.fingerprint  # kept from now on: a plant does not make it another model
    try:
        for _ in range(TRIES):
            try:
                with torch.no_grad():
                    planted = Planted(kind, seed, *KINDS[kind](model, kind, rng, sites, saved))
                break
            except Failed as failed:
                why = failed
                _restore(saved)
        else:
            raise RuntimeError(f"No {kind!r} could be planted with seed {seed} in {TRIES} draws; the last one: {why}.")
        yield planted
    finally:
        _restore(saved)


def _restore(saved: list) -> None:
    while saved:
        tensor, before = saved.pop()
        tensor.copy_(before)
