"""Sparse autoencoders: train one, measure it, find the features of a behaviour, read what they stand for."""

from workbench.locate.features.contexts import Contexts, contexts
from workbench.locate.features.effects import Effects, effect
from workbench.locate.features.evaluation import Quality, evaluate
from workbench.locate.features.finding import find
from workbench.locate.features.training import fit, train

__all__ = ["Contexts", "Effects", "Quality", "contexts", "effect", "evaluate", "find", "fit", "train"]
