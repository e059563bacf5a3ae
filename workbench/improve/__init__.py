"""Improve: prove that a change helped, on held-out evidence, beside what it cost; plant known truth, to test locators with."""

from workbench.improve import efficiency
from workbench.improve.dissociation import Dissociation, dissociation
from workbench.improve.doses import Doses, dose_response
from workbench.improve.evaluation import evaluate
from workbench.improve.planting import Planted, plant

__all__ = ["Dissociation", "Doses", "Planted", "dissociation", "dose_response", "efficiency", "evaluate", "plant"]
