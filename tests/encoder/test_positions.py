"""Position embeddings against loops, lightly's and timm's."""

from __future__ import annotations

import cmath
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightly.models.utils import get_2d_sine_cosine_positional_embedding
from timm.layers.pos_embed_rel import RelPosBias
from torch import Tensor, nn

from hybridvit.contracts import Tokens
from hybridvit.encoder.positions import (
    Places,
    RelativeBias,
    RelativePosition,
    TokenPositions,
    interpolate,
    places_of,
    rope_angles,
    rotate,
    sincos_2d,
)
from hybridvit.encoder.vit import Encoder

# --- interpolation ---


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


# --- on tokens ---


def table(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed sines and cosines, one number after the other."""
    h, w = grid
    out = torch.zeros(h * w, dim, dtype=torch.float64)
    for r, c, k in itertools.product(range(h), range(w), range(dim // 4)):
        frequency = 10_000 ** (-4 * k / dim)
        for axis, at in enumerate((c, r)):
            out[r * w + c, axis * dim // 2 + k] = math.sin(at * frequency)
            out[r * w + c, axis * dim // 2 + dim // 4 + k] = math.cos(at * frequency)
    return out


@pytest.mark.parametrize(("grid", "dim"), [((3, 5), 16), ((1, 4), 4), ((2, 2), 12)])
def test_sincos_2d_is_the_formula(grid: tuple[int, int], dim: int) -> None:
    torch.testing.assert_close(
        sincos_2d(grid, dim)[0].double(), table(grid, dim), rtol=0, atol=1e-6
    )


def test_sincos_2d_is_that_of_mae() -> None:
    theirs = get_2d_sine_cosine_positional_embedding(32, 7, cls_token=False)
    torch.testing.assert_close(
        sincos_2d((7, 7), 32)[0].double(), torch.from_numpy(theirs).double(), rtol=0, atol=1e-6
    )


def on_tokens(kind: Any, how: Any = "add", dim: int = 8, **options: Any) -> TokenPositions:
    return TokenPositions(kind, how, (2, 3), dim, prefix=2, own_rows=True, **options)


def vectors(positions: TokenPositions, grid: tuple[int, int]) -> Tensor:
    """The patches' vectors of a new table in which every number is another."""
    torch.manual_seed(0)
    made = positions.table()
    if isinstance(made, nn.Parameter):
        nn.init.normal_(made)
    of_prefix, of_patches = positions.of(made, Tokens(torch.empty(1, grid[0] * grid[1], 8), grid))
    assert (of_prefix is None) == (positions.kind != "learned_1d")
    if of_prefix is not None:
        assert torch.equal(of_prefix, made[:, :2])
    return of_patches.detach()


def test_learned_2d_concatenates_the_columns_and_the_rows_vectors() -> None:
    positions = on_tokens("learned_2d")
    x = vectors(positions, (2, 3))
    torch.manual_seed(0)
    made = torch.randn(1, 3 + 2, 4)
    for r, c in itertools.product(range(2), range(3)):
        assert torch.equal(x[0, 3 * r + c], torch.cat([made[0, c], made[0, 3 + r]]))


def test_learned_2d_is_interpolated_along_each_axis() -> None:
    x = vectors(on_tokens("learned_2d"), (5, 7)).view(5, 7, 8)
    torch.testing.assert_close(x[:, :, :4], x[:1, :, :4].expand(5, -1, -1))
    torch.testing.assert_close(x[:, :, 4:], x[:, :1, 4:].expand(-1, 7, -1))
    assert x[0, :, :4].std(0).min() > 0.05
    torch.manual_seed(0)
    of_columns = torch.randn(1, 5, 4)[:, :3].mT  # (1, 4, 3): a picture of one row
    wide = F.interpolate(of_columns[:, :, None], (1, 7), mode="bicubic", antialias=True)[0, :, 0]
    torch.testing.assert_close(x[0, :, :4], wide.mT)


def test_sincos_2d_is_computed_for_another_grid() -> None:
    x = vectors(on_tokens("sincos_2d"), (4, 5))
    torch.testing.assert_close(x[0].double(), table((4, 5), 8), rtol=0, atol=1e-6)


def test_fixed_tables_are_not_saved_but_follow_the_models_type() -> None:
    encoder = Encoder(grid=(2, 3), dim=8, depth=1, heads=2, position="sincos_2d").bfloat16()
    assert not any("pos" in key for key in encoder.state_dict())
    assert encoder.pos_embed is not None
    assert encoder.pos_embed.dtype == torch.bfloat16
    for grid in ((2, 3), (3, 4)):
        x = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.bfloat16)
        assert encoder(Tokens(x, grid)).dtype == torch.bfloat16


def test_add_multiply_and_concatenate() -> None:
    z, p = torch.randn(2, 5, 8), torch.randn(1, 5, 8)
    assert torch.equal(on_tokens("learned_1d").combine(z, p, None), z + p)
    assert torch.equal(on_tokens("learned_1d", "multiply").combine(z, p, None), z * (1 + p))
    concat = on_tokens("learned_1d", "concat", dim=3)
    to_content = concat.map(8)
    assert to_content is not None
    assert to_content.weight.shape == (5, 8)
    out = concat.combine(z, p[..., :3], to_content)
    assert out.shape == z.shape
    torch.testing.assert_close(out[..., :5], z @ to_content.weight.T)
    assert torch.equal(out[..., 5:], p[..., :3].expand(2, -1, -1))


def test_tokens_without_positions_stay_or_get_zeros() -> None:
    z = torch.randn(2, 3, 8)
    assert on_tokens("learned_2d").combine(z, None, None) is z
    assert on_tokens("learned_2d", "multiply").combine(z, None, None) is z
    concat = on_tokens("learned_2d", "concat", dim=4)
    assert not concat.combine(z, None, concat.map(8))[..., 4:].any()


# --- in attention ---


def placed(position: Any, grid: tuple[int, int], index: Tensor | None = None) -> Places:
    tokens = Tokens(torch.empty(1, grid[0] * grid[1], 8, dtype=torch.float64), grid, index)
    return places_of(tokens, 0, position, "full", 8)


def relative(grid: tuple[int, int]) -> tuple[RelativePosition, RelativeBias]:
    torch.manual_seed(0)
    modules = RelativePosition(grid, 8, 2).double(), RelativeBias(grid, 2).double()
    for module in modules:
        nn.init.normal_(module.pos_embed)
    return modules


def test_relative_is_the_query_times_the_embedding_of_the_raster_offset() -> None:
    module, _ = relative((2, 3))
    assert module.pos_embed.shape == (1, 11, 8)
    q = torch.randn(2, 2, 6, 4, dtype=torch.float64)
    logits = module(q, placed("relative", (2, 3)))
    for b, head, i, j in itertools.product(range(2), range(2), range(6), range(6)):
        r = module.pos_embed[0, i - j + 5, 4 * head : 4 * head + 4]
        torch.testing.assert_close(logits[b, head, i, j], q[b, head, i] @ r / 2)


def test_relative_bias_is_a_number_for_each_offset_of_row_and_column() -> None:
    _, module = relative((2, 3))
    bias = module(torch.empty(1), placed("relative_bias", (2, 3)))
    assert bias.shape == (1, 2, 6, 6)
    numbers = module.pos_embed[0].view(3, 5, 2)
    for i, j in itertools.product(range(6), range(6)):
        dy, dx = i // 3 - j // 3, i % 3 - j % 3
        assert torch.equal(bias[0, :, i, j], numbers[dy + 1, dx + 2])


def test_relative_bias_is_swins() -> None:
    theirs = RelPosBias((3, 4), 2)
    _, ours = relative((3, 4))
    with torch.no_grad():
        theirs.relative_position_bias_table.copy_(ours.pos_embed[0])
    bias = ours.float()(torch.empty(1), placed("relative_bias", (3, 4)))
    assert torch.equal(bias, theirs.get_bias())


@pytest.mark.parametrize("grid", [(2, 3), (4, 5)])
def test_relative_logits_follow_their_tokens(grid: tuple[int, int]) -> None:
    count = grid[0] * grid[1]
    index = torch.stack([torch.randperm(count), torch.randperm(count)])[:, :5]
    q = torch.randn(2, 2, count, 4, dtype=torch.float64)
    kept = q.gather(2, index[:, None, :, None].expand(-1, 2, -1, 4))
    for module, kind in zip(relative((2, 3)), ("relative", "relative_bias"), strict=True):
        full = module(q, placed(kind, grid)).expand(2, -1, -1, -1)
        part = module(kept, placed(kind, grid, index))
        for b in range(2):
            torch.testing.assert_close(part[b], full[b][:, index[b]][:, :, index[b]])


def test_tables_of_offsets_are_stretched_with_the_grid() -> None:
    # Both tables hold the offset in units of the image: rows / h, columns / w and their like.
    (h, w), (new_h, new_w) = (6, 8), (12, 12)
    dy, dx = torch.arange(1 - h, h) / h, torch.arange(1 - w, w) / w
    bias = RelativeBias((h, w), 2)
    both = torch.stack(torch.meshgrid(dy, dx, indexing="ij"), dim=-1)
    bias.pos_embed = nn.Parameter(both.view(1, -1, 2))
    raster = RelativePosition((h, w), 1, 1)
    raster.pos_embed = nn.Parameter(torch.arange(1.0 - h * w, h * w).view(1, -1, 1) / (h * w))
    found = bias(torch.empty(1), placed("relative_bias", (new_h, new_w)))[0]
    ones = torch.ones(1, 1, new_h * new_w, 1)
    of_raster = raster(ones, placed("relative", (new_h, new_w)))[0, 0]
    row, column = torch.arange(new_h * new_w) // new_w, torch.arange(new_h * new_w) % new_w
    # Centres of the 2 h - 1 offsets lie (2 h - 1) / (2 new_h - 1) old steps from each other.
    down = (row[:, None] - row) * (2 * h - 1) / (2 * new_h - 1) / h
    right = (column[:, None] - column) * (2 * w - 1) / (2 * new_w - 1) / w
    inner = (down.abs() < 0.6) & (right.abs() < 0.6)  # at the border the ramp ends
    assert inner.sum() > 1000
    close = {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(found[0][inner], down[inner], **close)
    torch.testing.assert_close(found[1][inner], right[inner], **close)
    torch.testing.assert_close(of_raster[inner], (down + right / h)[inner], **close)


def test_rotation_turns_pairs_of_channels_as_complex_numbers() -> None:
    x = torch.randn(1, 1, 6, 8, dtype=torch.float64)
    rotation = placed("rope_2d", (2, 3)).rotation
    assert rotation is not None
    out = rotate(x, rotation)
    for i, k in itertools.product(range(6), range(4)):
        at = i % 3 if k < 2 else i // 3  # two frequencies of the column, then two of the row
        turn = cmath.exp(1j * at * 100 ** (-(k % 2) / 2))
        expected = complex(x[0, 0, i, k], x[0, 0, i, k + 4]) * turn
        found = complex(out[0, 0, i, k], out[0, 0, i, k + 4])
        assert abs(found - expected) < 1e-12


def test_rotated_queries_and_keys_know_their_offset_alone() -> None:
    q, k = torch.randn(2, 16, dtype=torch.float64).unbind(0)
    at = torch.arange(5, dtype=torch.float64)
    row, column = torch.meshgrid(at, at, indexing="ij")
    angles = rope_angles(row, column, 16)
    turn = angles.cos(), angles.sin()
    a, b = rotate(q.expand(5, 5, 16), turn), rotate(k.expand(5, 5, 16), turn)
    products = torch.einsum("rcd,RCd->rcRC", a, b)
    for dr, dc in itertools.product(range(4), range(4)):
        first = products[0, 0, dr, dc]
        torch.testing.assert_close(products[1, 1, dr + 1, dc + 1], first)
        torch.testing.assert_close(products[1, 0, dr + 1, dc], first)
    assert (products[0, 0] - products[0, 0].mT).abs().max() > 0.1  # rows are not columns
    torch.testing.assert_close(a.norm(dim=-1), q.norm().expand(5, 5))


def test_class_and_register_tokens_have_no_place_in_attention() -> None:
    tokens = Tokens(torch.empty(1, 6, 8), (2, 3))
    places = places_of(tokens, 2, "rope_2d", "axial", 8)
    assert places.rotation is not None
    x = torch.randn(1, 1, 8, 8)
    out = rotate(x, places.rotation)
    assert torch.equal(out[:, :, :2], x[:, :, :2])
    assert (out[:, :, 3:] - x[:, :, 3:]).abs().amax(-1).min() > 1e-3
