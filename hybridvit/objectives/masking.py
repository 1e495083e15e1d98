"""Which patches are corrupted, and how. Every draw is a function of the image's key."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridvit import draws

_WHICH = draws.stream("masking.which")
_HOW = draws.stream("masking.how")
_SOURCE = draws.stream("masking.source")


class Corruption(NamedTuple):
    """BERT's corruption of N patches an image, M of them corrupted."""

    corrupted: Tensor  # (B, M) int64, the positions to predict
    masked: Tensor  # (B, N) bool: to become the mask embedding
    source: Tensor  # (B, N) int64: the patch whose content stands here; its own unless replaced


def bert_corruption(
    key: Tensor, count: int, *, ratio: float = 0.5, masked: float = 0.8, replaced: float = 0.1
) -> Corruption:
    """Corrupt `ratio` of `count` patches (exact, rounded down) as in Appendix B.1.2 of the paper.

    Of the corrupted ones a share `masked` is masked and a share `replaced` replaced by another
    patch of the same image, drawn among those that are not hidden; the rest stays as it is.
    """
    m = int(count * ratio)
    corrupted = draws.permutation(key, _WHICH, count)[:, :m]
    how = draws.uniform(key, _HOW, m)
    none = torch.zeros(len(key), count, dtype=torch.bool, device=key.device)
    is_masked = none.scatter(1, corrupted, how < masked)
    is_replaced = none.scatter(1, corrupted, (how >= masked) & (how < masked + replaced))

    hidden = is_masked | is_replaced
    kept_first = torch.argsort(hidden.to(torch.int8), dim=1, stable=True)
    kept = count - hidden.sum(dim=1, keepdim=True)
    choice = (draws.uniform(key, _SOURCE, count) * kept).long()  # (B, N), each below `kept`
    own = torch.arange(count, device=key.device).expand_as(choice)
    return Corruption(
        corrupted, is_masked, torch.where(is_replaced, kept_first.gather(1, choice), own)
    )
