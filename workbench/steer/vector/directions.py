"""Directions from more than means: the main component of differences, a probe, a dictionary's feature."""

from __future__ import annotations

import numpy as np
import torch

from workbench.component import Component
from workbench.locate.probing.fit import fitted
from workbench.operations import Add
from workbench.steer.vector.reading import one_place, refuse_equal, sides, states
from workbench.task import Task


def pca(model, task: Task, at, *, to=None, unit: str = "raw", phase: str | None = None, positive: str | None = None,
        seed: int = 0) -> Add:  # fmt: skip
    """Along which direction do pairs differ most? The first principal component of pairs centred on their own middle.

    Its sign is that by which most pairs have their positive side ahead; its length is what lies between the two sides'
    means along it, so that strength 1 moves one mean to the other there.

    Args:
        task, at, to, unit, phase, positive: as for `difference_of_means`.
        seed: how texts with labels are paired; pairs are pairs already.
    Raises:
        ValueError: for sides that do not differ there.
    Source:
        Zou et al. 2023, "Representation engineering"; centred by pair as in Lee et al. 2025 (CAST, "pca_pairwise").
    """
    at = one_place(at)
    yes, no = _both(model, task, at, positive)
    if Task.of(task).kind != "pairs":
        rng, n = np.random.default_rng(seed), min(len(yes), len(no))
        yes, no = yes[rng.permutation(len(yes))[:n]], no[rng.permutation(len(no))[:n]]
    return Add(to if to is not None else at, vector=_scaled(pca_direction(yes, no), yes, no), unit=unit, phase=phase)


def pca_direction(yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """The first principal component of pairs centred on their middle, of length 1, ahead on the side of `yes`; [width].

    Args:
        yes, no: [pair, width].
    """
    middle = (yes + no) / 2
    centred = torch.cat([yes - middle, no - middle]).double()
    first = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    ahead = ((yes - no).double() @ first).sign().sum()
    return (first if ahead >= 0 else -first).to(yes.dtype)


def probe_direction(model, task: Task, at, *, c: float = 0.1, to=None, unit: str = "raw", phase: str | None = None,
                    positive: str | None = None) -> Add:  # fmt: skip
    """Along which direction does a logistic probe tell the two sides apart? Its weights, scaled as in `pca`.

    A probe's direction is made to read a label; what a model reads may lie elsewhere (see `choose` and `locate.probing.das`).

    Args:
        task, at, to, unit, phase, positive: as for `difference_of_means`. c: scikit-learn's inverse penalty.
    Source:
        Li et al. 2023 (ITI) and Wu et al. 2025 (AxBench) steer along probes' weights.
    """
    at = one_place(at)
    yes, no = _both(model, task, at, positive)
    return Add(to if to is not None else at, vector=_scaled(probe_weights(yes, no, c), yes, no), unit=unit, phase=phase)


def probe_weights(yes: torch.Tensor, no: torch.Tensor, c: float) -> torch.Tensor:
    """The direction that a logistic probe reads, in units of the activations, [width], from rows [row, width]."""
    labels = np.repeat([1, 0], [len(yes), len(no)])
    probe = fitted("logistic", torch.cat([yes, no]).double().numpy(), labels, c)
    return torch.tensor(probe[-1].coef_[0] / probe[0].scale_, dtype=yes.dtype)


def feature_direction(
    model, feature, *, to=None, size: float = 1.0, unit: str = "raw", phase: str | None = None
) -> Add:
    """What does a feature of an attached SAE write? Its decoder row, `size` times, as a vector to add.

    Unlike `wb.Clamp("feature.NAME.77", value)` it acts whether the feature is active or not, by the same amount.

    Args:
        feature: "feature.NAME.77", with or without a position.
        to: where it acts; by default where the SAE writes, at the feature's position.
        size: in units of the feature's activation.
    """
    one = Component.parse(feature)
    if one.kind != "feature" or one.is_family:
        raise ValueError(
            f"{one} is no single feature; write feature.NAME.77 of an SAE attached with model.attach(sae)."
        )
    model.names.validate(one)
    sae = model.saes[one.name]
    return Add(
        to if to is not None else sae.at.at(one.position), size * sae.W_dec[one.index].cpu(), unit=unit, phase=phase
    )


def _both(model, task: Task, at: Component, positive) -> list[torch.Tensor]:
    yes, no = (states(model, side, at) for side in sides(model, task, positive))
    refuse_equal(yes.mean(0), no.mean(0), at)
    return [yes, no]


def _scaled(direction: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """The direction, as long as the two means are apart along it."""
    unit = direction / direction.norm()
    return ((yes.mean(0) - no.mean(0)) @ unit) * unit
