"""The model: loaded, named, run with interventions. The only folder that imports nnsight."""

from workbench.model.loading import load, revisions
from workbench.model.plan import Prompts
from workbench.model.run import Model

__all__ = ["Model", "Prompts", "load", "revisions"]
