"""Training objectives. One file an objective; hiding and masking are shared by the masked ones."""

from collections.abc import Callable

from hybridvit.contracts import Objective
from hybridvit.objectives.dino import DINO
from hybridvit.objectives.mae import MAE
from hybridvit.objectives.masked_patch import MaskedPatch
from hybridvit.objectives.simclr import SimCLR
from hybridvit.objectives.simmim import SimMIM
from hybridvit.objectives.supervised import Supervised

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "supervised": Supervised,
    "masked_patch": MaskedPatch,
    "mae": MAE,
    "simmim": SimMIM,
    "simclr": SimCLR,
    "dino": DINO,
}
