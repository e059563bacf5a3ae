"""Locate: which components cause a behaviour? Six methods, and the features of sparse autoencoders."""

from workbench.locate import causal, circuit, features, gradient, magnitude, probing, vocabulary

__all__ = ["causal", "circuit", "features", "gradient", "magnitude", "probing", "vocabulary"]
