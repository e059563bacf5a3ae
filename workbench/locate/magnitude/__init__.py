"""Magnitude analysis: how strongly does each part respond, and to what? (Survey section on magnitude analysis.)

One forward pass, no gradients. It finds what goes *with* a behaviour; whether it *causes* it is for `locate.causal`.
"""

from workbench.locate.magnitude.contrast import contrast
from workbench.locate.magnitude.heads import pattern_scores
from workbench.locate.magnitude.languages import language_neurons
from workbench.locate.magnitude.layers import block_influence, expert_use
from workbench.locate.magnitude.outliers import Outliers, massive_activations, sinks, super_weights
from workbench.locate.magnitude.weights import wanda, weight_norms

__all__ = [
    "Outliers", "block_influence", "contrast", "expert_use", "language_neurons", "massive_activations",
    "pattern_scores", "sinks", "super_weights", "wanda", "weight_norms",
]  # fmt: skip
