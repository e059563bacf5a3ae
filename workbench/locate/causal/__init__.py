"""Causal attribution: change one component, keep the rest, watch the answer (survey section on causal attribution).

- `patch`: which components carry what tells two prompts apart? `between`: ... what tells two models apart?
- `ablate`: which components does the answer need? `joint_ablation`: and which only together?
- `trace`: which states bring a fact back that noise has destroyed? `knockout`: which attention edges does it need?
- `path_patch`: along which paths does a component act?
"""

from workbench.locate.causal.ablation import ablate, joint_ablation
from workbench.locate.causal.edges import knockout
from workbench.locate.causal.joint import Joint
from workbench.locate.causal.patching import between, patch
from workbench.locate.causal.paths import path_patch
from workbench.locate.causal.places import PATCHABLE
from workbench.locate.causal.tracing import trace

__all__ = ["PATCHABLE", "Joint", "ablate", "between", "joint_ablation", "knockout", "patch", "path_patch", "trace"]
