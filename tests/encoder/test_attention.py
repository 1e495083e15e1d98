"""Attention against PyTorch's own modules and loops over pairs of tokens, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hybridvit.contracts import Tokens
from hybridvit.encoder import attention as attention_module
from hybridvit.encoder.attention import AXES, Attention, Axis, attend, prefers_fused
from hybridvit.encoder.pooling import AttentionPool
from hybridvit.encoder.positions import (
    Position,
    places_of,
    relative_logits,
    rope_angles,
    rotate,
)

GRID = (3, 4)
DIM, HEADS = 8, 2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["chosen", "fused"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that is chosen here, and the fused one, which GPUs always take."""
    if request.param == "fused":
        monkeypatch.setattr(attention_module, "prefers_fused", lambda *_: True)


def attention(qk_norm: bool = False, dropout: float = 0.0) -> Attention:
    module = Attention(12, 3, bias=True, qk_norm=qk_norm, norm_eps=1e-6, dropout=dropout).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.2)
    return module


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "dropout", "biased", "fused"),
    [
        ("cpu", torch.bfloat16, 65, 0.0, False, False),
        ("cpu", torch.bfloat16, 1025, 0.0, False, False),
        ("cpu", torch.float32, 65, 0.0, False, False),
        ("cpu", torch.float32, 197, 0.0, False, True),
        ("cpu", torch.float32, 197, 0.1, False, False),
        ("cpu", torch.float32, 197, 0.0, True, False),
        ("meta", torch.float32, 197, 0.0, False, False),
    ],
)
def test_the_fused_kernel_is_chosen_where_it_is_faster(
    device: str, dtype: torch.dtype, tokens: int, dropout: float, biased: bool, fused: bool
) -> None:
    """By the table of docs/decisions/0010."""
    q = torch.empty(1, 2, tokens, 8, dtype=dtype, device=device)
    bias = torch.zeros(1, 2, tokens, tokens) if biased else None
    assert prefers_fused(q, q, dropout, bias) == fused


@pytest.mark.usefixtures("kernel")
def test_attend_is_scaled_dot_product_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64).unbind(0)
    expected = F.scaled_dot_product_attention(q, k[:, :, :3], v[:, :, :3])
    torch.testing.assert_close(attend(q, k[:, :, :3], v[:, :, :3]), expected)


@pytest.mark.parametrize("tokens", [7, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_faster_kernel_gives_the_same(dtype: torch.dtype, tokens: int) -> None:
    q, k, v = torch.randn(3, 2, 2, tokens, 8).unbind(0)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    found = attend(q.to(dtype), k.to(dtype), v.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("kernel")
def test_attend_adds_a_bias_to_the_logits_and_minus_infinity_hides() -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64).unbind(0)
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    hidden = torch.rand(2, 1, 5, 5) < 0.5
    hidden[:, :, range(5), range(5)] = False
    bias = bias + torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(attend(q, k, v, bias=bias), expected)
    changed = attend(q, k, v + 1e3 * hidden[:, :, :1].mT, bias=bias)  # unseen by the first query
    assert torch.equal(changed[:, :, 0], attend(q, k, v, bias=bias)[:, :, 0])


@pytest.mark.usefixtures("kernel")
def test_equals_torchs_multihead_attention() -> None:
    ours, theirs = attention(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_qk_norm_normalises_each_head_of_queries_and_keys() -> None:
    ours, x = attention(qk_norm=True), torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (part.view(2, 5, 3, 4).transpose(1, 2) for part in ours.qkv(x).chunk(3, dim=-1))
    q = F.layer_norm(q, (4,), ours.q_norm.weight, ours.q_norm.bias, 1e-6)
    k = F.layer_norm(k, (4,), ours.k_norm.weight, ours.k_norm.bias, 1e-6)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours(x), ours.proj(out))


@pytest.mark.usefixtures("kernel")
def test_dropout_acts_in_training_alone_and_keeps_the_mean() -> None:
    module, x = attention(dropout=0.5), torch.randn(1, 4, 12, dtype=torch.float64)
    many = module(x.expand(20_000, -1, -1))
    clean = module.eval()(x)
    assert (many[0] - many[1]).abs().max() > 1e-3
    torch.testing.assert_close(many.mean(0), clean[0], rtol=0, atol=5 * many.std().item() / 141)
    assert torch.equal(module(x), clean)


@pytest.mark.usefixtures("kernel")
def test_pooling_is_one_query_with_residual_mlp() -> None:
    ours = AttentionPool(12, 3, mlp_ratio=2.0, norm_eps=1e-6, activation=nn.GELU()).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, mean=0.1)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    y = theirs(ours.latent.expand(2, -1, -1), x, x, need_weights=False)[0][:, 0]
    normed = F.layer_norm(y, (12,), ours.norm.weight, ours.norm.bias, 1e-6)
    fc1, fc2 = ours.mlp.fc1, ours.mlp.fc2
    hidden = F.gelu(F.linear(normed, fc1.weight, fc1.bias))
    torch.testing.assert_close(ours(x), y + F.linear(hidden, fc2.weight, fc2.bias))
    assert hidden.shape == (2, 24)


# --- positions and axes ---


def by_pairs(
    module: Attention, x: Tensor, index: Tensor, prefix: int, position: str, axis: Axis | None
) -> Tensor:
    """Attention of x (B, P + N, D) over the pairs that may see each other, one by one."""
    d = DIM // HEADS
    out = torch.zeros_like(x)
    for b, head in itertools.product(range(len(x)), range(HEADS)):
        q, k, v = (part[head * d : (head + 1) * d].T for part in module.qkv(x[b]).T.chunk(3))
        places = [None] * prefix + [divmod(int(at), GRID[1]) for at in index[b]]
        if position == "rope_2d":
            q, k = (torch.stack(list(map(turned, part, places))) for part in (q, k))
        for i, here in enumerate(places):
            logits, values = [], []
            for j, there in enumerate(places):
                logit = q[i] @ k[j] / d**0.5
                if here and there:
                    if axis and here[AXES.index(axis)] != there[AXES.index(axis)]:
                        continue
                    logit = logit + of_offset(module, position, head, q[i], here, there)
                logits.append(logit)
                values.append(v[j])
            weights = torch.stack(logits).softmax(0)
            out[b, i, head * d : (head + 1) * d] = weights @ torch.stack(values)
    expected: Tensor = module.proj(out)
    return expected


def turned(x: Tensor, place: tuple[int, int] | None) -> Tensor:
    if place is None:
        return x
    row, column = torch.tensor(place, dtype=x.dtype)
    angles = rope_angles(row, column, len(x))
    return rotate(x, (angles.cos(), angles.sin()))


def of_offset(
    module: Any, position: str, head: int, q: Tensor, here: tuple[int, int], there: tuple[int, int]
) -> Tensor | float:
    (h, w), d = GRID, len(q)
    dy, dx = here[0] - there[0], here[1] - there[1]
    if position == "relative":
        r: Tensor = module.position.pos_embed[0, dy * w + dx + h * w - 1]
        return q @ r[head * d : (head + 1) * d] / d**0.5
    if position == "relative_bias":
        numbers: Tensor = module.position.pos_embed[0].view(2 * h - 1, 2 * w - 1, HEADS)
        return numbers[dy + h - 1, dx + w - 1, head]
    return 0.0


@pytest.mark.parametrize("position", ["none", "relative", "relative_bias", "rope_2d"])
@pytest.mark.parametrize("axis", [None, *AXES])
@pytest.mark.parametrize("kept", [None, 5])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.usefixtures("kernel")
def test_attention_is_a_sum_over_pairs(
    position: Position, axis: Axis | None, kept: int | None, prefix: int
) -> None:
    module = Attention(
        DIM, HEADS, bias=True, qk_norm=False, norm_eps=1e-6, dropout=0.0, axis=axis,
        position=relative_logits(position, GRID, DIM, HEADS),
    ).double()  # fmt: skip
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    order = torch.stack([torch.randperm(12), torch.randperm(12)])
    index = order[:, :kept] if kept else torch.arange(12).expand(2, -1)
    x = torch.randn(2, prefix + index.shape[1], DIM, dtype=torch.float64)
    tokens = Tokens(x[:, prefix:], GRID, index if kept else None)
    attention = "full" if axis is None else "axial"
    places = places_of(tokens, prefix, position, attention, DIM // HEADS)
    found = module(x, places)
    torch.testing.assert_close(found, by_pairs(module, x, index, prefix, position, axis))
    if axis and not kept:  # the grid in order has its own way
        assert (places.masks is None) == (position in ("none", "rope_2d"))
        masked = places_of(tokens._replace(index=index), prefix, position, attention, DIM // HEADS)
        assert masked.masks is not None
        torch.testing.assert_close(module(x, masked), found)


@pytest.mark.parametrize("axis", AXES)
def test_no_row_of_an_axial_mask_is_empty(axis: Axis) -> None:
    diagonal = torch.tensor([[0, 5, 10]])  # no two share a row or a column
    for prefix in (0, 1):
        tokens = Tokens(torch.empty(1, 3, DIM), GRID, diagonal)
        masks = places_of(tokens, prefix, "none", "axial", 4).masks
        assert masks is not None
        seen = masks[axis][0, 0] == 0
        assert torch.equal(seen[prefix:, prefix:], torch.eye(3, dtype=torch.bool))
        assert seen[:prefix].all()
        assert seen[:, :prefix].all()


def test_axial_attention_saves_the_pairs_that_it_does_not_see() -> None:
    def flops(axis: Axis | None) -> int:
        module = Attention(64, 1, bias=True, qk_norm=False, norm_eps=1e-6, dropout=0.0, axis=axis)
        tokens = Tokens(torch.empty(1, 256, 64, device="meta"), (16, 16))
        places = places_of(tokens, 1, "none", "full" if axis is None else "axial", 64)
        with FlopCounterMode(display=False) as counter:
            module.to("meta")(torch.empty(1, 257, 64, device="meta"), places)
        return int(counter.get_total_flops())

    layers = 2 * 257 * 64 * 4 * 64
    assert flops(None) == layers + 4 * 64 * 257**2
    for axis in AXES:  # 17 keys for a patch, 257 for the class token
        assert flops(axis) == layers + 4 * 64 * (256 * 17 + 257)
