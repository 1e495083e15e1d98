"""The encoder against equations 1-4 written out, and the properties that follow from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridvit.contracts import Tokens
from hybridvit.encoder.mlp import GatedMlp, make_activation
from hybridvit.encoder.model import Encoder, HybridViT
from hybridvit.stems.linear import LinearStem

GRID = (2, 3)


def encoder(**options: Any) -> Encoder:
    """A small float64 encoder in eval mode, every parameter drawn anew."""
    torch.manual_seed(0)
    module = Encoder(**({"grid": GRID, "dim": 8, "depth": 2, "heads": 2} | options)).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.5)
    return module.eval()


def patches(batch: int = 2, grid: tuple[int, int] = GRID) -> Tokens:
    generator = torch.Generator().manual_seed(1)
    count = grid[0] * grid[1]
    return Tokens(torch.randn(batch, count, 8, generator=generator, dtype=torch.float64), grid)


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


# --- positions and order ---


@pytest.mark.parametrize("position", ["none", "learned_1d"])
def test_only_positions_tell_the_order_of_patches(position: str) -> None:
    model, tokens = encoder(position=position), patches()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    z, permuted = model(tokens), model(tokens._replace(x=tokens.x[:, order]))
    gap = (z[:, 0] - permuted[:, 0]).abs().max()
    assert (gap < 1e-12) == (position == "none")
    if position == "none":
        torch.testing.assert_close(permuted[:, 1:], z[:, 1:][:, order])


@pytest.mark.parametrize("on_prefix", [True, False])
def test_positions_follow_their_tokens_by_index(on_prefix: bool) -> None:
    model, tokens = encoder(position_on_prefix=on_prefix), patches()
    order = torch.stack([torch.randperm(6), torch.randperm(6)])  # another one for each image
    shuffled = Tokens(tokens.x.gather(1, order[..., None].expand(-1, -1, 8)), GRID, order)
    z, permuted = model(tokens), model(shuffled)
    torch.testing.assert_close(permuted[:, 0], z[:, 0])
    expected = z[:, 1:].gather(1, order[..., None].expand(-1, -1, 8))
    torch.testing.assert_close(permuted[:, 1:], expected)


def test_a_subset_of_tokens_keeps_its_positions() -> None:
    model, tokens = encoder(), patches()
    kept = torch.tensor([[4, 1, 2], [0, 5, 3]])
    x = tokens.x.gather(1, kept[..., None].expand(-1, -1, 8))
    full, part = model.embed(tokens), model.embed(Tokens(x, GRID, kept))
    assert part.shape == (2, 4, 8)
    for b in range(2):
        torch.testing.assert_close(part[b, 1:], full[b, 1:][kept[b]])


# --- training ---


def test_stochastic_depth_drops_branches_of_whole_images_and_keeps_the_mean() -> None:
    model = Encoder(grid=GRID, dim=8, depth=3, heads=2, drop_path=0.4)
    blocks: list[Any] = list(model.blocks)
    assert [block.drop_path for block in blocks] == pytest.approx([0.0, 0.2, 0.4])
    torch.manual_seed(0)
    branch = torch.ones(20_000, 2, 3)
    out = blocks[2].skip(branch)
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 1 / 0.6]))
    assert torch.equal(out.amax((1, 2)), out.amin((1, 2)))  # an image at once
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    assert blocks[2].eval().skip(branch) is branch
    assert blocks[0].skip(branch) is branch


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


# --- the whole model ---


def hybrid(head: nn.Module | None = None) -> HybridViT:
    stem = LinearStem(dim=8, patch=4).double()
    model = HybridViT(stem, encoder(), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), head=head)
    return model.double().eval()


def test_images_are_normalised_inside() -> None:
    model, images = hybrid(), torch.rand(2, 3, 8, 12, dtype=torch.float64)
    tokens = model.tokens(images)
    normalised = torch.stack(
        [(images[:, c] - m) / s for c, (m, s) in enumerate([(0.1, 0.4), (0.2, 0.5), (0.3, 0.6)])],
        dim=1,
    )
    torch.testing.assert_close(tokens.x, model.stem(normalised).x, rtol=1e-6, atol=1e-6)
    assert tokens.grid == (2, 3)
    assert model.image_size == (8, 12)


def test_head_reads_the_features() -> None:
    head = nn.Linear(8, 5).double()
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    model = hybrid()
    features = model(images)
    assert features.shape == (2, 8)
    torch.testing.assert_close(features, model.encoder(model.tokens(images))[:, 0])
    model.head = head
    torch.testing.assert_close(model(images), features @ head.weight.T + head.bias)
