import math

import pytest
import torch

from hybridvit.objectives.masking import bert_corruption
from hybridvit.patches import take

KEYS = torch.arange(2000) * 7919 + 11
COUNT = 49


def within(hits: int, trials: int, p: float) -> bool:
    """Inside five standard deviations of a binomial."""
    return abs(hits - trials * p) < 5 * math.sqrt(trials * p * (1 - p))


def test_half_of_the_patches_are_corrupted_exactly_and_once() -> None:
    corruption = bert_corruption(KEYS, COUNT)
    assert corruption.corrupted.shape == (2000, 24)
    assert all(len(set(row)) == 24 for row in corruption.corrupted.tolist())


def test_of_them_80_10_10_are_masked_replaced_and_kept() -> None:
    corruption = bert_corruption(KEYS, COUNT)
    own = torch.arange(COUNT)
    total = 2000 * 24
    masked = int(corruption.masked.sum())
    assert within(masked, total, 0.8)
    # A replaced patch never draws itself, because it is hidden.
    replaced = int((corruption.source != own).sum())
    assert within(replaced, total, 0.1)
    assert not (corruption.masked & (corruption.source != own)).any()


def test_only_corrupted_patches_are_touched() -> None:
    corruption = bert_corruption(KEYS, COUNT)
    touched = corruption.masked | (corruption.source != torch.arange(COUNT))
    allowed = torch.zeros_like(touched).scatter(1, corruption.corrupted, True)
    assert not (touched & ~allowed).any()


def test_every_position_is_equally_often_corrupted() -> None:
    counts = bert_corruption(KEYS, COUNT).corrupted.flatten().bincount(minlength=COUNT)
    for hits in counts.tolist():
        assert within(hits, 2000, 24 / 49)


def test_replacements_come_from_patches_that_are_not_hidden() -> None:
    corruption = bert_corruption(KEYS, COUNT)
    own = torch.arange(COUNT)
    for masked, source in zip(corruption.masked, corruption.source, strict=True):
        hidden = {int(i) for i in own if masked[i] or source[i] != i}
        for i in own.tolist():
            if int(source[i]) != i:
                assert int(source[i]) not in hidden


def test_sources_are_spread_evenly_over_the_visible_patches() -> None:
    corruption = bert_corruption(KEYS, COUNT)
    replaced = corruption.source != torch.arange(COUNT)
    counts = corruption.source[replaced].bincount(minlength=COUNT)
    for hits in counts.tolist():
        assert within(hits, int(replaced.sum()), 1 / 49)


def test_a_mask_is_a_function_of_its_key() -> None:
    together, alone = bert_corruption(KEYS[:3], 16), bert_corruption(KEYS[1:2], 16)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[1:2], b)


@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.9])
def test_ratio(ratio: float) -> None:
    assert bert_corruption(KEYS[:2], 16, ratio=ratio).corrupted.shape[1] == int(16 * ratio)


def test_take_equals_a_loop() -> None:
    patches, index = torch.rand(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    expected = torch.stack([patches[b, index[b]] for b in range(2)])
    assert torch.equal(take(patches, index), expected)
