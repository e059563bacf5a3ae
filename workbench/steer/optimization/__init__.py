"""Targeted optimization: change located weights or activations by gradient or in closed form; the model itself stays as it is."""

from workbench.steer.optimization.editing import alphaedit, memit, rome
from workbench.steer.optimization.masks import random_masks, weight_masks
from workbench.steer.optimization.representation import bias_only, loreft, steering_vector
from workbench.steer.optimization.tuning import finetune, lora
from workbench.steer.optimization.unlearning import npo, relearn, rmu
from workbench.steer.optimization.values import target_values

__all__ = ["alphaedit", "bias_only", "finetune", "lora", "loreft", "memit", "npo", "random_masks", "relearn", "rmu", "rome",
           "steering_vector", "target_values", "weight_masks"]  # fmt: skip
