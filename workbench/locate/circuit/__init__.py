"""Circuits: which edges between heads, FFNs, embedding and logits make the model do it?"""

from workbench.locate.circuit.attribution import eap, eap_ig, flow
from workbench.locate.circuit.edge import Edge
from workbench.locate.circuit.evaluation import SIZES, curve, faithfulness, minimality, stability
from workbench.locate.circuit.exact import acdc, exact
from workbench.locate.circuit.feature_edges import feature_edges
from workbench.locate.circuit.features import keep, nodes
from workbench.locate.circuit.graph import Circuit
from workbench.locate.circuit.learned import masks
from workbench.locate.circuit.results import Curve, Faithfulness

__all__ = ["SIZES", "Circuit", "Curve", "Edge", "Faithfulness", "acdc", "curve", "eap", "eap_ig", "exact", "faithfulness",
           "feature_edges", "flow", "keep", "masks", "minimality", "nodes", "stability"]  # fmt: skip
