"""Gradient detection: how does the answer change, to first order, with every part at once? (Survey section on gradients.)

- `attribution_patch`: which components would patching find? With the QK fix and GradDrop of AtP*. `relevance_patch`: ...
  if the way back follows the rules of relevance?
- `saliency`, `integrated_gradients`: which tokens does the answer hang on?
- `knowledge_neurons`: which neurons hold a fact?
- `weight_importance`: which weights does the answer depend on?
"""

from workbench.locate.gradient.attribution import attribution_patch, relevance_patch
from workbench.locate.gradient.neurons import knowledge_neurons
from workbench.locate.gradient.tokens import integrated_gradients, saliency
from workbench.locate.gradient.tokenscores import TokenScores
from workbench.locate.gradient.weights import weight_importance

__all__ = [
    "TokenScores", "attribution_patch", "integrated_gradients", "knowledge_neurons", "relevance_patch", "saliency",
    "weight_importance",
]  # fmt: skip
