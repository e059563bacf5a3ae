"""Locate: which components cause a behaviour?"""

from workbench.locate import causal

__all__ = ["causal"]
