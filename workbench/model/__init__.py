"""The model: loaded, named, run with interventions. The only folder that imports nnsight."""

from workbench.model.plan import Prompts
from workbench.model.run import Model, load, revisions

__all__ = ["Model", "Prompts", "load", "revisions"]
