"""Locate, steer, improve: open a language model, find what causes a behaviour, change it, prove that it helped."""

from workbench import improve, locate, steer, teach
from workbench.attend import Attend, Window
from workbench.component import Component
from workbench.gate import Gate
from workbench.intervention import Intervention
from workbench.model import Model, load, revisions
from workbench.operations import Add, Affine, Clamp, Delta, Mean, ProjectOut, Replace, Scale, Zero
from workbench.recipe import Recipe
from workbench.report import Report
from workbench.sae import SAE
from workbench.scores import Scores
from workbench.task import Task

__all__ = [
    "SAE", "Add", "Affine", "Attend", "Clamp", "Component", "Delta", "Gate", "Intervention", "Mean", "Model", "ProjectOut",
    "Recipe", "Replace", "Report", "Scale", "Scores", "Task", "Window", "Zero", "improve", "load", "locate", "revisions", "show",
    "steer", "teach",
]  # fmt: skip


def show(value, *args, **kwargs):
    """What does this value look like, with a mouse? See `workbench.views.show`."""
    from workbench.views import show as view

    return view(value, *args, **kwargs)
