"""Context parallelism: one sequence over many ranks, on torch.distributed; exact, with gradients.

Every scheme has one interface: `dispatch` (whole sequence to own rows), `attend` (own q, k, v to a
State), `undispatch`, and `measure` for facts. Start the processes with torchrun.
"""

from .attention import Parallel
from .comm import Comm, RankLost, device, expect, started
from .facts import measure
from .placement import Piece, Placement, Run, local_rows, pieces, place, restrict
from .schemes import NODE, SCHEMES, Load, Shape, divisors, hops_home, sent, shape

__all__ = [
    "NODE",
    "SCHEMES",
    "Comm",
    "Load",
    "Parallel",
    "Piece",
    "Placement",
    "RankLost",
    "Run",
    "Shape",
    "device",
    "expect",
    "hops_home",
    "measure",
    "pieces",
    "divisors",
    "local_rows",
    "place",
    "restrict",
    "sent",
    "shape",
    "started",
]
