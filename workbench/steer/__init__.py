"""Steer: change what a component does. Functions here fit an intervention from data."""

from workbench.steer import amplitude, optimization, vector

__all__ = ["amplitude", "optimization", "vector"]
