"""Probing: what can be read off a site, is it needed (erasure), and does the model use it (alignment search)?"""

from workbench.locate.probing.alignment import Alignment, das
from workbench.locate.probing.curves import curves
from workbench.locate.probing.erasure import Erasure, erase
from workbench.locate.probing.probes import probe, random_weights

__all__ = ["Alignment", "Erasure", "curves", "das", "erase", "probe", "random_weights"]
