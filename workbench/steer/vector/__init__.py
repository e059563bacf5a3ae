"""Vector arithmetic: push activations along a direction, set or take out what lies along it, add differences of weights.

- Directions from data: `difference_of_means`, `pca`, `probe_direction`, `feature_direction` of an SAE; from heads:
  `function_vector` (by `indirect_effects`), `inference_time_intervention`.
- Taking out: `directional_ablation`, `set_to_mean` (affine concept editing), `leace`.
- Choosing: `choose` (place and strength within limits), `fit_gate` (for which prompts).
- Weights: `task_vector`, `ties`, `dare`. Decoding: `dola`, `dola_generate`.
"""

from workbench.steer.vector.choosing import Choice, choose
from workbench.steer.vector.decoding import dola, dola_generate
from workbench.steer.vector.directions import feature_direction, pca, probe_direction
from workbench.steer.vector.gates import fit_gate
from workbench.steer.vector.heads import function_vector, indirect_effects, inference_time_intervention
from workbench.steer.vector.means import difference_of_means, directional_ablation, leace, set_to_mean
from workbench.steer.vector.weights import dare, task_vector, ties

__all__ = [
    "Choice", "choose", "dare", "difference_of_means", "directional_ablation", "dola", "dola_generate", "feature_direction",
    "fit_gate", "function_vector", "indirect_effects", "inference_time_intervention", "leace", "pca", "probe_direction",
    "set_to_mean", "task_vector", "ties",
]  # fmt: skip
