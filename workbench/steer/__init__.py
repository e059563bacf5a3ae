"""Steer: change what a component does. Functions here fit an intervention from data."""

from workbench.steer import vector

__all__ = ["vector"]
