"""Edges: what each part writes to the stream, what each part reads, and runs in which every read is a mixture.

The stream that a part reads is a sum of what earlier parts wrote. So one edge, from a source to a target, can be switched
between two runs by exchanging that one term in what that one target reads. Sources are the embedding, every head and every
FFN; targets are the query, key and value of every head (each with a stream and a norm of its own), every FFN and the logits.
"""

from workbench.model.edges.dictionaries import Code, Swap, look, slope, swapped, view, whole
from workbench.model.edges.mixture import mixed, wiring
from workbench.model.edges.parts import FLOATS, Wiring, Writes, capture, sources, targets
from workbench.model.edges.slopes import attribution

__all__ = ["FLOATS", "Code", "Swap", "Wiring", "Writes", "attribution", "capture", "look", "mixed", "slope", "sources",
           "swapped", "targets", "view", "whole", "wiring"]  # fmt: skip
