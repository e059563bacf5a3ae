"""Scores to look at: 3 layers by 5 heads, so that a transpose is caught."""

import numpy as np
import pytest

import workbench as wb


def build(names, values, null=0.1, **about):
    values = np.asarray(values, float)
    null = np.broadcast_to(np.asarray(null, float), values.shape)
    per_prompt = values[:, None] * np.array([0.9, 1.1])
    about = {"method": "causal.patch", "metric": "logit_diff", "clean": 3.0, "corrupted": -2.0} | about
    return wb.Scores([wb.Component.parse(one) for one in names], values, values - 0.05, values + 0.05, null, per_prompt,
                     **{"direction": "denoising", "task": "ioi", **about})  # fmt: skip


@pytest.fixture
def make_scores():
    """Builds scores from printed components and their values."""
    return build


@pytest.fixture
def heads():
    values = np.linspace(-0.7, 0.63, 15)
    values[7] = 0.0
    return build([f"z.{layer}.{head}" for layer in range(3) for head in range(5)], values)


@pytest.fixture
def places():
    names = [f"resid_pre.{layer}@{place}" for layer in range(3) for place in range(5)]
    tokens = dict(enumerate(["when", "anna", "<img src=x onerror=alert(1)>", "anna", "$x$"]))
    return build(names, np.linspace(0.63, -0.7, 15), labels=tokens)
