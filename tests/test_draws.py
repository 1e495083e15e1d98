import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from hybridvit import draws
from hybridvit.engine.compile import compiler

MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """The finaliser of SplitMix64 on unsigned Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def test_mixing_is_splitmix64() -> None:
    # First outputs of SplitMix64 with seed 1234567, from its authors' C code.
    state, expected = 1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for value in expected:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        assert mix(state) == value
        assert draws._mix(torch.tensor(signed(state))).item() == signed(value)


def test_fold_equals_integer_arithmetic() -> None:
    for key, value in [(0, 0), (5, 3), (-17, 2**31), (2**62, 1)]:
        expected = mix(((key * 31) + (value + 1) * 0x9E3779B97F4A7C15) & MASK)
        assert draws.fold(torch.tensor(key), value).item() == signed(expected)


def test_uniform_is_uniform_and_independent_of_its_neighbours() -> None:
    keys = draws.image_keys(3, torch.zeros(20000, dtype=torch.int64), torch.arange(20000))
    u = draws.uniform(keys, draws.stream("a"), 3)
    assert u.min() >= 0
    assert u.max() < 1
    for column in u.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-4
    other = draws.uniform(keys, draws.stream("b"), 3)
    everything = np.corrcoef(np.concatenate([u.T, other.T]))
    assert np.abs(everything - np.eye(6)).max() < 0.03


def test_draws_depend_on_the_key_alone() -> None:
    keys = torch.tensor([5, 9, 11])
    all_at_once = draws.uniform(keys, 1, 4)
    one_by_one = torch.cat([draws.uniform(keys[i : i + 1], 1, 4) for i in range(3)])
    assert torch.equal(all_at_once, one_by_one)


def test_image_keys_differ_in_every_argument() -> None:
    zero, index = torch.zeros(100, dtype=torch.int64), torch.arange(100)
    keys = torch.cat([draws.image_keys(s, zero + e, index) for s in range(3) for e in range(3)])
    assert keys.unique().numel() == 900


@pytest.mark.parametrize("high", [2, 7])
def test_integers_cover_their_range_evenly(high: int) -> None:
    values = draws.integers(torch.arange(1000), 2, 20, high)
    assert stats.chisquare(values.flatten().bincount(minlength=high).numpy()).pvalue > 1e-4


def test_permutations_are_permutations_and_uniform() -> None:
    order = draws.permutation(torch.arange(6000), 3, 3)
    assert torch.equal(order.sort(dim=1).values, torch.arange(3).expand(6000, 3))
    codes = (order * torch.tensor([9, 3, 1])).sum(dim=1).unique(return_counts=True)[1]
    assert len(codes) == 6
    assert stats.chisquare(codes.numpy()).pvalue > 1e-4


COMPILED = """
import torch
from hybridvit import draws
compiled = torch.compile(draws.permutation)
for i in range(100):  # what is written past an end shows in the allocations after it
    key = torch.arange(32) * 7919 + i
    assert torch.equal(compiled(key, 1, 196), draws.permutation(key, 1, 196))
    [torch.empty(size) for size in range(200)]
"""


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler, which torch needs on a CPU")
def test_compiled_draws_are_equal_and_stay_within_their_memory() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
