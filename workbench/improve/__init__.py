"""Improve: prove that a change helped, on held-out evidence, beside what it cost; plant known truth, to test locators with."""

from workbench.improve.evaluation import evaluate
from workbench.improve.planting import Planted, plant

__all__ = ["Planted", "evaluate", "plant"]
