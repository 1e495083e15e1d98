"""The encoder against equations 1-4 written out, and the properties that follow from them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_encoders import AT, COMBINE, GRID, IN_ATTENTION, POSITIONS, encoder, patches
from torch import Tensor, nn

from hybridvit.contracts import Tokens
from hybridvit.encoder.mlp import GatedMlp, make_activation
from hybridvit.encoder.vit import Encoder
from hybridvit.patches import take

# --- equation 1 ---


def test_equation_1() -> None:
    model, tokens = encoder(), patches()
    z = model.embed(tokens)
    assert model.cls_token is not None
    assert model.pos_embed is not None
    assert z.shape == (2, 7, 8)
    for b in range(2):
        rows = [model.cls_token[0, 0], *tokens.x[b]]
        expected = torch.stack([row + model.pos_embed[0, i] for i, row in enumerate(rows)])
        torch.testing.assert_close(z[b], expected)


def test_registers_follow_the_class_token_and_positions_may_spare_them() -> None:
    model, tokens = encoder(registers=2, position_on_prefix=False), patches()
    assert model.cls_token is not None
    assert model.reg_token is not None
    assert model.pos_embed is not None
    assert model.pos_embed.shape == (1, 6, 8)
    z = model.embed(tokens)
    torch.testing.assert_close(z[0, 0], model.cls_token[0, 0])
    torch.testing.assert_close(z[1, 1:3], model.reg_token[0])
    torch.testing.assert_close(z[:, 3:], tokens.x + model.pos_embed)
    assert encoder(registers=2).embed(tokens).shape == (2, 9, 8)


def test_without_prefix_and_positions_tokens_pass_unchanged() -> None:
    model, tokens = encoder(class_token=False, position="none", pool="mean"), patches()
    assert torch.equal(model.embed(tokens), tokens.x)


def test_positions_are_interpolated_to_the_grid_of_the_tokens() -> None:
    assert encoder()(patches(grid=(4, 5))).shape == (2, 21, 8)


# --- equations 2-4 ---


def equations_2_to_4(model: Encoder, z: Tensor) -> Tensor:
    for block in model.blocks:
        b: Any = block
        norm = F.layer_norm(z, (8,), b.norm1.weight, b.norm1.bias, 1e-6)
        qkv = F.linear(norm, b.attn.qkv.weight, b.attn.qkv.bias).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in qkv)
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        z = z + F.linear(heads, b.attn.proj.weight, b.attn.proj.bias)
        norm = F.layer_norm(z, (8,), b.norm2.weight, b.norm2.bias, 1e-6)
        hidden = F.gelu(F.linear(norm, b.mlp.fc1.weight, b.mlp.fc1.bias))
        z = z + F.linear(hidden, b.mlp.fc2.weight, b.mlp.fc2.bias)
    last: Any = model.norm
    return F.layer_norm(z, (8,), last.weight, last.bias, 1e-6)


def test_equations_2_to_4() -> None:
    model, tokens = encoder(), patches()
    torch.testing.assert_close(model(tokens), equations_2_to_4(model, model.embed(tokens)))


def test_layer_scale_may_be_a_whole_number() -> None:
    block: Any = Encoder(grid=GRID, dim=8, depth=1, heads=2, layer_scale=1).blocks[0]
    assert torch.equal(block.ls1.gamma, torch.ones(8))


def test_layer_scale_multiplies_each_branch() -> None:
    model, tokens = encoder(depth=1, layer_scale=0.1), patches()
    block: Any = model.blocks[0]
    z = model.embed(tokens)
    middle = z + block.attn(block.norm1(z)) * block.ls1.gamma
    expected = middle + block.mlp(block.norm2(middle)) * block.ls2.gamma
    torch.testing.assert_close(block(z), expected)
    fresh: Any = Encoder(grid=GRID, dim=8, depth=1, heads=2, layer_scale=0.1).blocks[0]
    assert torch.equal(fresh.ls2.gamma, torch.full((8,), 0.1))


def test_gated_mlp_is_swiglu() -> None:
    model = encoder(mlp="swiglu", mlp_ratio=3.0)
    mlp: Any = model.blocks[0].mlp
    assert isinstance(mlp, GatedMlp)
    w, v = mlp.fc1.weight.chunk(2)
    bias_w, bias_v = mlp.fc1.bias.chunk(2)
    assert w.shape == (12, 8)
    x = torch.randn(5, 8, dtype=torch.float64)
    hidden = F.silu(x @ w.T + bias_w) * (x @ v.T + bias_v)
    torch.testing.assert_close(mlp(x), F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias))


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("quick_gelu", lambda x: x / (1 + torch.exp(-1.702 * x))),
        ("relu", lambda x: x.clamp(min=0)),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
    ],
)
def test_activations(name: Any, oracle: Any) -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    torch.testing.assert_close(make_activation(name)(x), oracle(x), rtol=1e-12, atol=1e-12)


# --- norms and pooling ---


def test_norms_sit_where_their_options_say() -> None:
    placed = {
        "default": encoder(),
        "pre_norm": encoder(pre_norm=True),
        "fc_norm": encoder(fc_norm=True, pool="mean"),
        "none": encoder(final_norm=False),
    }
    found = {
        key: [n for n in ("norm_pre", "norm", "fc_norm") if type(getattr(m, n)) is nn.LayerNorm]
        for key, m in placed.items()
    }
    assert found == {
        "default": ["norm"], "pre_norm": ["norm_pre", "norm"], "fc_norm": ["fc_norm"], "none": [],
    }  # fmt: skip
    model, tokens = placed["pre_norm"], patches()
    expected = equations_2_to_4(model, model.norm_pre(model.embed(tokens)))
    torch.testing.assert_close(model(tokens), expected)


def test_pooling_reads_the_class_token_or_the_patches() -> None:
    z = torch.randn(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(encoder(registers=2).pool(z), z[:, 0])
    mean = encoder(registers=2, pool="mean")
    torch.testing.assert_close(mean.pool(z), z[:, 3:].mean(1))
    mapped = encoder(registers=2, pool="map")
    assert mapped.attn_pool is not None
    torch.testing.assert_close(mapped.pool(z), mapped.attn_pool(z[:, 3:]))
    normed = encoder(registers=2, pool="mean", fc_norm=True)
    torch.testing.assert_close(normed.pool(z), normed.fc_norm(z[:, 3:].mean(1)))


# --- reading some tokens ---


@pytest.mark.parametrize("kept", [None, 3])
@pytest.mark.parametrize("options", [*POSITIONS.values(), {"depth": 0}, {"qk_norm": True},
                                     {"layer_scale": 0.5, "qkv_bias": False}])  # fmt: skip
def test_reading_some_tokens_changes_none_of_them(options: Any, kept: int | None) -> None:
    model = encoder(registers=1, **({"pool": "mean"} | options))
    tokens = patches()
    if kept is not None:
        index = torch.tensor([[4, 1, 2], [0, 5, 3]])
        tokens = Tokens(take(tokens.x, index), GRID, index)
    read = torch.tensor([[2, 0], [4, 1]])
    whole = take(model(tokens), read)
    found = model(tokens, read)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    for loss in (whole, found):
        model.zero_grad()
        loss.pow(3).sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if loss is whole:
            expected = [g.clone() for g in grads]
    assert all(torch.allclose(g, e, rtol=1e-9) for g, e in zip(grads, expected, strict=True))


def test_the_last_block_computes_no_tokens_that_nobody_reads() -> None:
    model, rows = encoder(pool="token"), []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _m, given, _o: rows.append(given[0].shape[1]))
    model.features(patches())
    assert rows == [7, 1]


@pytest.mark.parametrize("option", ["dropout", "attention_dropout"])
def test_reading_some_tokens_draws_dropout_as_for_all(option: str) -> None:
    model, read = encoder(**{option: 0.5}).train(), torch.tensor([[2, 0], [4, 1]])
    found = []
    for index in (read, torch.arange(7).expand(2, -1)):
        torch.manual_seed(5)
        found.append(model(patches(), index))
    assert torch.equal(found[0], take(found[1], read))


# --- training ---


def test_stochastic_depth_drops_branches_of_whole_images_and_keeps_the_mean() -> None:
    model = Encoder(grid=GRID, dim=8, depth=3, heads=2, drop_path=0.4)
    blocks: list[Any] = list(model.blocks)
    assert [block.drop_path for block in blocks] == pytest.approx([0.0, 0.2, 0.4])
    torch.manual_seed(0)
    z = torch.ones(20_000, 2, 3)
    factors = blocks[2].survivors(z)
    for factor in factors:
        assert factor.shape == (20_000, 1, 1)  # an image at once
        torch.testing.assert_close(factor.unique(), torch.tensor([0.0, 1 / 0.6]))
        assert factor.mean().item() == pytest.approx(1.0, abs=0.03)
    assert 0.3 < (factors[0] == factors[1]).double().mean() < 0.7  # drawn by themselves
    assert blocks[2].eval().survivors(z) == (None, None)
    assert blocks[0].survivors(z) == (None, None)


def test_a_dropped_branch_adds_nothing() -> None:
    model = Encoder(grid=GRID, dim=8, depth=1, heads=2)
    block, z = model.blocks[0], torch.randn(4, 5, 8)
    none, double = torch.zeros(4, 1, 1), torch.full((4, 1, 1), 2.0)
    assert torch.equal(block(z, survivors=(none, none)), z)
    attention = block.attn(block.norm1(z))
    torch.testing.assert_close(block(z, survivors=(double, none)), z + 2 * attention)
    mlp = block.mlp(block.norm2(z))
    torch.testing.assert_close(block(z, survivors=(none, double)), z + 2 * mlp)


def test_dropout_acts_at_its_four_places_in_training_alone() -> None:
    model = encoder(dropout=0.5)
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.5] * (1 + 2 * 2)  # embedding; each block's attention and MLP
    z, tokens = model.embed(patches()), patches()
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    dropped = model.embed(tokens)
    assert 0.2 < (dropped == 0).double().mean() < 0.8
    torch.testing.assert_close(dropped[dropped != 0], 2 * z[dropped != 0])
    mlp: Any = model.blocks[0].mlp
    out = mlp(torch.randn(50, 8, dtype=torch.float64))
    assert 0.3 < (out == 0).double().mean() < 0.7


def test_gradient_reaches_every_parameter() -> None:
    model = encoder(registers=1, layer_scale=1.0, qk_norm=True, pre_norm=True, pool="map").train()
    model.pool(model(patches())).square().sum().backward()
    for key, parameter in model.named_parameters():
        if not key.endswith("k_norm.bias"):  # softmax does not see it
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 1e-12, key


def test_first_weights_are_the_papers() -> None:
    torch.manual_seed(0)
    model = Encoder(grid=(14, 14), dim=192, depth=1, heads=3, registers=4)
    block: Any = model.blocks[0]
    bound = (6 / (192 + 3 * 192)) ** 0.5
    assert block.attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert block.attn.qkv.bias.abs().max() == 0
    assert model.pos_embed is not None
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.cls_token is not None
    assert model.cls_token.abs().max() == 0


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads=3 must divide dim=8"),
        ({"heads": 0}, "heads=0 must divide dim=8"),
        ({"dim": 0}, "must divide dim=0"),
        ({"depth": -1}, "depth=-1 and registers=0 must not be negative"),
        ({"registers": -1}, "depth=2 and registers=-1 must not be negative"),
        ({"class_token": False}, "pool='token' needs class_token=true"),
        ({"depth": 0}, "with depth=0 the class token sees no patch"),
        ({"depth": 0, "pool": "mean", "position_at": "every_layer"}, "'every_layer' needs a layer"),
        ({"depth": 0, "pool": "mean", "position": "rope_2d"}, "'rope_2d' acts in attention, of wh"),
        ({"depth": 3, "attention": "axial"}, "use an even depth, not 3"),
        ({"depth": 0, "pool": "mean", "attention": "axial"}, "use an even depth, not 0"),
        ({"position": "none", "position_at": "every_layer"}, "'none' puts nothing on tokens and"),
        ({"position": "none", "position_combine": "multiply"}, "position_combine='multiply'; lea"),
        ({"position_combine": "concat"}, "position_dim=None does not fit position_combine='conc"),
        ({"position_dim": 4}, "position_dim=4 does not fit position_combine='add'"),
        ({"position_combine": "concat", "position_dim": 8}, "at least 1 and less than dim=8"),
        ({"position_combine": "concat", "position_dim": 0}, "at least 1 and less than dim=8"),
        ({"dim": 9, "heads": 3, "position": "learned_2d"}, "dim=9 must be a multiple of 2"),
        ({"dim": 6, "position": "sincos_2d"}, "dim=6 must be a multiple of 4"),
        (
            {"position": "sincos_2d", "position_combine": "concat", "position_dim": 2},
            "position_dim=2 must be a multiple of 4",
        ),
        ({"dim": 12, "position": "rope_2d"}, "dim / heads=6 must be a multiple of 4"),
        ({"dropout": 1.0}, r"must be in \[0, 1\)"),
        ({"attention_dropout": 1.5}, r"must be in \[0, 1\)"),
        ({"drop_path": -0.1}, r"must be in \[0, 1\)"),
    ],
)
def test_wrong_options_end_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        encoder(**options)
    assert str(caught.value).startswith("encoder: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("position", IN_ATTENTION)
@pytest.mark.parametrize(
    ("at", "how"), [pair for pair in itertools.product(AT, COMBINE) if pair != ("input", "add")]
)
def test_positions_in_attention_take_neither_place_nor_combination(
    position: Any, at: Any, how: Any
) -> None:
    message = f"position='{position}' acts in attention and takes neither position_at='{at}' nor"
    with pytest.raises(ValueError, match=message) as caught:
        encoder(position=position, position_at=at, position_combine=how, position_dim=4)
    assert "\n" not in str(caught.value)
