"""Attention against PyTorch's own modules, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybridvit.encoder.attention import Attention, attend
from hybridvit.encoder.pooling import AttentionPool


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attention(qk_norm: bool = False, dropout: float = 0.0) -> Attention:
    module = Attention(12, 3, bias=True, qk_norm=qk_norm, norm_eps=1e-6, dropout=dropout).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.2)
    return module


def test_attend_is_scaled_dot_product_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 6, dtype=torch.float64).unbind(0)
    expected = F.scaled_dot_product_attention(q, k[:, :, :3], v[:, :, :3])
    torch.testing.assert_close(attend(q, k[:, :, :3], v[:, :, :3]), expected)


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


def test_dropout_acts_in_training_alone_and_keeps_the_mean() -> None:
    module, x = attention(dropout=0.5), torch.randn(1, 4, 12, dtype=torch.float64)
    many = module(x.expand(20_000, -1, -1))
    clean = module.eval()(x)
    assert (many[0] - many[1]).abs().max() > 1e-3
    torch.testing.assert_close(many.mean(0), clean[0], rtol=0, atol=5 * many.std().item() / 141)
    assert torch.equal(module(x), clean)


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
