"""Improve: prove that a change helped, on held-out evidence, beside what it cost."""

from workbench.improve.evaluation import evaluate

__all__ = ["evaluate"]
