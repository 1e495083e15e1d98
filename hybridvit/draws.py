"""Random numbers as pure functions of integers: the same on every device, worker and rank.

A key is an int64 that names a place in the experiment, such as (seed, epoch, image). Everything
random about an image comes from its key and a stream name, so nothing has to be saved to resume
and nothing depends on who computes it. The mixing function is the finaliser of SplitMix64
(Steele, Lea, Flood 2014).
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_KEY = 31 * pow(_GOLDEN, -1, 2**64) % 2**64  # _KEY * _GOLDEN = 31 modulo 2^64; below 2^63


def stream(name: str) -> int:
    """The number of a named stream; draws of different streams are unrelated."""
    return zlib.crc32(name.encode())


def fold(key: Tensor, value: Tensor | int) -> Tensor:
    """A new key from a key and an integer; shapes broadcast, dtype int64."""
    if isinstance(value, int):
        # As Python's integer: a tensor of it would have to be copied to the device.
        step = (value + 1) * _GOLDEN % 2**64
        return _mix(key * 31 + (step - 2**64 if step >= 2**63 else step))
    # That is key * 31 + (value + 1) * _GOLDEN. Values may be an arange, which torch.compile would
    # multiply as an index, in signed arithmetic: an overflow is undefined there, and g++ then
    # writes past the end.
    return _mix((key * _KEY + value + 1) * _GOLDEN)


def image_keys(seed: int, epoch: Tensor, index: Tensor) -> Tensor:
    """(B,) keys of images `index` in epochs `epoch`, both (B,) int64."""
    return fold(fold(_mix(torch.full_like(index, seed) + _GOLDEN), epoch), index)


def uniform(key: Tensor, stream: int, count: int) -> Tensor:
    """(B, count) float32 in [0, 1) with 24 random bits, for keys (B,)."""
    return (_bits(key, stream, count) >> 40 & 0xFFFFFF).float() * 2.0**-24


def integers(key: Tensor, stream: int, count: int, high: int) -> Tensor:
    """(B, count) int64 in [0, high), for keys (B,)."""
    return (_bits(key, stream, count) >> 1 & 0x7FFFFFFFFFFFFFFF) % high


def permutation(key: Tensor, stream: int, count: int) -> Tensor:
    """(B, count) int64: a random order of 0 .. count-1 for each key (B,)."""
    return torch.argsort(_bits(key, stream, count), dim=1, stable=True)


def _bits(key: Tensor, stream: int, count: int) -> Tensor:
    counter = torch.arange(count, device=key.device)
    return fold(fold(key, stream)[:, None], counter[None, :])


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    # int64 shifts copy the sign bit; the mask makes it a shift of unsigned numbers.
    return (x >> bits) & ((1 << (64 - bits)) - 1)
