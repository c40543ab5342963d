"""Tensors in, tensors out: States and their algebra, masks, kernels, facts. Knows no model and
no framework.
"""

from .attend import attend, choose
from .facts import (
    FACTS,
    Collision,
    Columns,
    Distance,
    Entropy,
    Fact,
    Influence,
    LogSumExp,
    Mass,
    MaxLogit,
    MeanReceived,
    Received,
    Rows,
    Thumbnail,
    TopKeys,
    WindowedDistance,
    attend_and_measure,
    distance,
    entropy,
    measure,
    received,
)
from .identities import collision
from .identities import mass as segment_mass
from .kernels import KERNELS
from .mask import Mask
from .ranges import Range
from .state import State, mass, merge, rest, reweight

__all__ = [
    "FACTS",
    "KERNELS",
    "Collision",
    "Columns",
    "Distance",
    "Entropy",
    "Fact",
    "Influence",
    "LogSumExp",
    "Mask",
    "Mass",
    "MaxLogit",
    "MeanReceived",
    "Range",
    "Received",
    "Rows",
    "State",
    "Thumbnail",
    "TopKeys",
    "WindowedDistance",
    "attend",
    "attend_and_measure",
    "choose",
    "collision",
    "distance",
    "entropy",
    "mass",
    "measure",
    "merge",
    "received",
    "rest",
    "reweight",
    "segment_mass",
]
