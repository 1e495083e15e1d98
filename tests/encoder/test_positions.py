"""Interpolation of position embeddings."""

from __future__ import annotations

import pytest
import torch

from hybridvit.encoder.positions import interpolate


def test_same_grid_is_untouched() -> None:
    embedding = torch.randn(1, 7, 4)
    assert interpolate(embedding, (2, 3), (2, 3), 1) is embedding


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("new", [(3, 8), (12, 4), (2, 2)])
def test_prefix_rows_are_kept_and_constants_stay_constant(
    prefix: int, new: tuple[int, int]
) -> None:
    embedding = torch.cat([torch.randn(1, prefix, 4), torch.full((1, 24, 4), 0.7)], dim=1)
    out = interpolate(embedding, (4, 6), new, prefix)
    assert out.shape == (1, prefix + new[0] * new[1], 4)
    assert torch.equal(out[:, :prefix], embedding[:, :prefix])
    torch.testing.assert_close(out[:, prefix:], torch.full((1, new[0] * new[1], 4), 0.7))


def test_rows_and_columns_are_not_swapped() -> None:
    # Channel 0 is the row and channel 1 the column, in units of the image.
    def ramp(h: int, w: int) -> torch.Tensor:
        rows, columns = (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).view(1, h * w, 2)

    out = interpolate(ramp(8, 12), (8, 12), (16, 18), 0).view(16, 18, 2)
    expected = ramp(16, 18).view(16, 18, 2)
    inner = (slice(4, 12), slice(4, 14))  # at the border the ramp ends
    torch.testing.assert_close(out[inner], expected[inner], rtol=0, atol=1e-3)


def test_dtype_and_gradient_are_kept() -> None:
    embedding = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    out = interpolate(embedding, (2, 2), (3, 3), 1)
    assert out.dtype == torch.float64
    out.sum().backward()
    assert embedding.grad is not None
    assert embedding.grad.abs().min() > 0
