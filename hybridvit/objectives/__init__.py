"""Training objectives. One file an objective; masking and targets are shared by the masked ones."""

from collections.abc import Callable

from hybridvit.contracts import Objective
from hybridvit.objectives.masked_patch import MaskedPatch
from hybridvit.objectives.supervised import Supervised

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "supervised": Supervised,
    "masked_patch": MaskedPatch,
}
