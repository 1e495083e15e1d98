"""The encoder against equations 1-4 written out, and the properties that follow from them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridvit.contracts import Tokens
from hybridvit.encoder import attention
from hybridvit.encoder.mlp import GatedMlp, make_activation
from hybridvit.encoder.model import Encoder, HybridViT
from hybridvit.encoder.positions import places_of, sincos_2d
from hybridvit.engine.optim import decays
from hybridvit.patches import take
from hybridvit.stems.linear import LinearStem

GRID = (2, 3)
ON_TOKENS = ("learned_1d", "learned_2d", "sincos_2d")
IN_ATTENTION = ("relative", "relative_bias", "rope_2d")
AT = ("input", "every_layer", "every_layer_shared")
COMBINE = ("add", "multiply", "concat")
# Every way to tell the encoder where patches are.
POSITIONS: dict[str, dict[str, Any]] = (
    {
        f"{kind}-{at}-{how}": {
            "position": kind,
            "position_at": at,
            "position_combine": how,
            "position_dim": 4 if how == "concat" else None,
        }
        for kind, at, how in itertools.product(ON_TOKENS, AT, COMBINE)
    }
    | {kind: {"position": kind} for kind in IN_ATTENTION}
    | {
        f"axial-{kind}": {"position": kind, "attention": "axial"}
        for kind in ("none", *ON_TOKENS, *IN_ATTENTION)
    }
    | {"spared-prefix": {"position_on_prefix": False}}
)


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


@pytest.mark.parametrize("name", ["none", *POSITIONS])
def test_only_positions_tell_the_order_of_patches(name: str) -> None:
    model, tokens = encoder(**POSITIONS.get(name, {"position": "none"})), patches()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    z, permuted = model(tokens), model(tokens._replace(x=tokens.x[:, order]))
    gap = (z[:, 0] - permuted[:, 0]).abs().max()
    if name == "none":
        assert gap < 1e-12
        torch.testing.assert_close(permuted[:, 1:], z[:, 1:][:, order])
    else:
        assert gap > 1e-4


@pytest.mark.parametrize("grid", [GRID, (4, 5)])
@pytest.mark.parametrize("name", POSITIONS)
def test_positions_follow_their_tokens_by_index(name: str, grid: tuple[int, int]) -> None:
    model, tokens = encoder(registers=1, **POSITIONS[name]), patches(grid=grid)
    count = grid[0] * grid[1]
    order = torch.stack([torch.randperm(count), torch.randperm(count)])  # one for each image
    z, permuted = model(tokens), model(Tokens(take(tokens.x, order), grid, order))
    assert z.shape == (2, 2 + count, 8)
    torch.testing.assert_close(permuted[:, :2], z[:, :2])
    torch.testing.assert_close(permuted[:, 2:], take(z[:, 2:], order))


@pytest.mark.parametrize("name", POSITIONS)
def test_tokens_are_dropped_as_if_nobody_saw_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = encoder(**POSITIONS[name]), patches(grid=(3, 4))
    kept = torch.tensor([[4, 11, 2, 8], [0, 5, 10, 3]])
    part = model(Tokens(take(tokens.x, kept), (3, 4), kept))
    everything = torch.arange(12).expand(2, -1)  # an index: axial attention is a mask, too
    hidden = torch.ones(2, 13, dtype=torch.bool).scatter(1, kept + 1, False)
    hidden[:, 0] = False
    blind = torch.zeros(2, 13).masked_fill(hidden, -torch.inf)[:, None, None]
    original = attention.attend

    def attend(
        q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, bias: Tensor | None = None
    ) -> Tensor:
        # Hidden tokens see themselves, so that none sees nothing.
        own = torch.zeros(13, 13).masked_fill(~torch.eye(13, dtype=torch.bool), -torch.inf)
        mask = torch.where(hidden[:, None, :, None], own, blind)
        return original(q, k, v, dropout, mask if bias is None else mask + bias)

    monkeypatch.setattr(attention, "attend", attend)
    full = model(tokens._replace(index=everything))
    torch.testing.assert_close(part[:, 0], full[:, 0])
    torch.testing.assert_close(part[:, 1:], take(full[:, 1:], kept))


def test_a_subset_of_tokens_keeps_its_positions() -> None:
    model, tokens = encoder(), patches()
    kept = torch.tensor([[4, 1, 2], [0, 5, 3]])
    full, part = model.embed(tokens), model.embed(Tokens(take(tokens.x, kept), GRID, kept))
    assert part.shape == (2, 4, 8)
    for b in range(2):
        torch.testing.assert_close(part[b, 1:], full[b, 1:][kept[b]])


def positions_of(table: Any, kind: str, width: int) -> Tensor:
    """What class token and patches get, one by one, from a table for `GRID`."""
    rows = [torch.zeros(width, dtype=torch.float64)]  # the class token
    for r, c in itertools.product(range(2), range(3)):
        if kind == "learned_1d":
            rows[0] = table[0, 0]
            rows.append(table[0, 1 + 3 * r + c])
        elif kind == "learned_2d":
            rows.append(torch.cat([table[0, c], table[0, 3 + r]]))
        else:
            rows.append(sincos_2d(GRID, width)[0, 3 * r + c].double())
    return torch.stack(rows)


@pytest.mark.parametrize(("kind", "at", "how"), [*itertools.product(ON_TOKENS, AT, COMBINE)])
def test_positions_enter_where_and_how_their_options_say(kind: str, at: str, how: str) -> None:
    model, tokens = encoder(**POSITIONS[f"{kind}-{at}-{how}"]), patches()
    assert model.cls_token is not None
    z = torch.cat([model.cls_token.expand(2, -1, -1), tokens.x], dim=1)
    width = 4 if how == "concat" else 8
    block: Any
    for layer, block in enumerate(model.blocks):
        if layer == 0 or at != "input":
            holder = block if at == "every_layer" else model
            p = positions_of(holder.pos_embed, kind, width)
            if how == "concat":
                content = z @ holder.pos_embed_map.weight.T
                z = torch.cat([content, torch.stack([p, p])], dim=-1)
            else:
                z = z + p if how == "add" else z * (1 + p)
        z = block(z)
    torch.testing.assert_close(model(tokens), model.norm(z))
    tables = [key for key in dict(model.named_parameters()) if key.endswith("pos_embed")]
    expected = (
        ["blocks.0.pos_embed", "blocks.1.pos_embed"] if at == "every_layer" else ["pos_embed"]
    )
    assert tables == ([] if kind == "sincos_2d" else expected)


def test_axial_blocks_attend_along_rows_and_columns_by_turns() -> None:
    model = encoder(class_token=False, pool="mean", position="none", attention="axial", depth=4)
    place = torch.arange(6)
    row, column = place // 3, place % 3
    block: Any
    for i, block in enumerate(model.blocks):
        x = patches(1).x.requires_grad_()
        places = places_of(Tokens(x, GRID), 0, "none", "axial", 4)
        (of_the_fifth,) = torch.autograd.grad(block(x, places)[0, 4].sum(), x)
        line = row if i % 2 == 0 else column
        assert torch.equal(of_the_fifth[0].abs().amax(-1) > 0, line == line[4])


@pytest.mark.parametrize("kind", ["learned_1d", "learned_2d"])
@pytest.mark.parametrize("at", AT)
def test_factors_start_at_one(kind: Any, at: Any) -> None:
    model = Encoder(grid=GRID, dim=8, depth=2, heads=2, position=kind, position_at=at,
                    position_combine="multiply")  # fmt: skip
    without = Encoder(grid=GRID, dim=8, depth=2, heads=2, position="none")
    without.load_state_dict({k: v for k, v in model.state_dict().items() if "pos_embed" not in k})
    x = patches().x.float()
    assert torch.equal(model(Tokens(x, GRID)), without(Tokens(x, GRID)))


@pytest.mark.parametrize("at", AT)
def test_concatenation_starts_by_cutting_the_last_channels(at: Any) -> None:
    model = Encoder(grid=GRID, dim=8, depth=2, heads=2, position="sincos_2d", position_at=at,
                    position_combine="concat", position_dim=4)  # fmt: skip
    maps = [m for name, m in model.named_modules() if name.endswith("pos_embed_map")]
    assert len(maps) == (2 if at == "every_layer" else 1)
    x = torch.randn(3, 8)
    for module in maps:
        assert torch.equal(module(x), x[:, :4])


def test_what_positions_cost() -> None:
    def parameters(**options: Any) -> int:
        with torch.device("meta"):
            model = Encoder(grid=(14, 14), dim=768, depth=12, heads=12, registers=1, **options)
        return sum(p.numel() for p in model.parameters())

    none = parameters(position="none")
    concat = {"position_combine": "concat", "position_dim": 64}
    found = {
        "learned_1d": parameters(),
        "spared": parameters(position_on_prefix=False),
        "every_layer": parameters(position_at="every_layer"),
        "shared": parameters(position_at="every_layer_shared"),
        "learned_2d": parameters(position="learned_2d"),
        "sincos_2d": parameters(position="sincos_2d"),
        "concat": parameters(position="learned_2d", **concat),
        "concats": parameters(position="sincos_2d", position_at="every_layer", **concat),
        "relative": parameters(position="relative"),
        "relative_bias": parameters(position="relative_bias"),
        "rope_2d": parameters(position="rope_2d"),
        "axial": parameters(position="none", attention="axial"),
    }
    assert {key: count - none for key, count in found.items()} == {
        "learned_1d": 198 * 768,
        "spared": 196 * 768,
        "every_layer": 12 * 198 * 768,
        "shared": 198 * 768,
        "learned_2d": (14 + 14) * 384,
        "sincos_2d": 0,
        "concat": (14 + 14) * 32 + 768 * (768 - 64),
        "concats": 12 * 768 * (768 - 64),
        "relative": 12 * (2 * 196 - 1) * 768,
        "relative_bias": 12 * 27 * 27 * 12,
        "rope_2d": 0,
        "axial": 0,
    }


@pytest.mark.parametrize("name", POSITIONS)
def test_learned_positions_start_small_and_do_not_decay(name: str) -> None:
    torch.manual_seed(0)
    model = Encoder(grid=(9, 9), dim=16, depth=2, heads=2, **POSITIONS[name])
    for key, parameter in model.named_parameters():
        if key.endswith("pos_embed"):
            expected = 0.0 if "multiply" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.4)
            assert not decays(key, parameter)


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_run_without_values(name: str) -> None:
    with torch.device("meta"):
        model = Encoder(grid=GRID, dim=8, depth=2, heads=2, **POSITIONS[name])
        for grid, index in ((GRID, None), ((3, 4), None), (GRID, torch.empty(2, 6).long())):
            x = torch.empty(2, grid[0] * grid[1], 8)
            assert model(Tokens(x, grid, index)).shape == (2, x.shape[1] + 1, 8)


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_finite_in_bfloat16(name: str) -> None:
    model = encoder(**POSITIONS[name]).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = model.pool(model(Tokens(torch.randn(2, 12, 8).bfloat16(), (3, 4))))
    y.float().square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kept", [None, 3])
@pytest.mark.parametrize("name", [*IN_ATTENTION, "axial-none", "axial-relative"])
def test_fused_kernels_give_the_same(name: str, kept: int | None) -> None:
    index = None if kept is None else torch.tensor([[4, 1, 2], [0, 5, 3]])
    x = patches().x[:, :kept].float()
    found = {}
    for device in ("cpu", "cuda"):
        model = encoder(**POSITIONS[name]).float().to(device)
        of_index = None if index is None else index.to(device)
        z = model(Tokens(x.to(device), GRID, of_index))
        z.pow(3).sum().backward()
        found[device] = [z, *(p.grad for p in model.parameters())]
    for on_cpu, on_gpu in zip(*found.values(), strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


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


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("learned_2d-every_layer-concat", None),
        ("sincos_2d-every_layer_shared-multiply", 3),
        ("relative", 3),
        ("axial-rope_2d", None),
        ("axial-relative_bias", 3),
    ],
)
def test_positions_compile_to_one_graph(name: str, kept: int | None) -> None:
    model = encoder(registers=1, **POSITIONS[name])
    tokens = patches(grid=(3, 4))
    if kept is not None:
        index = torch.stack([torch.randperm(12), torch.randperm(12)])[:, :kept]
        tokens = Tokens(take(tokens.x, index), (3, 4), index)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))


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


@pytest.mark.parametrize("name", POSITIONS)
def test_gradient_reaches_every_row_of_every_table(name: str) -> None:
    model = encoder(registers=1, **POSITIONS[name]).train()
    # Of all tokens: relative logits of the last block are the patches' alone.
    model(patches()).pow(3).sum().backward()
    sparse = name in ("axial-relative", "axial-relative_bias")  # pairs in other lines do not meet
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        of_rows = parameter.grad.reshape(-1, parameter.shape[-1]).abs().amax(-1)
        if key.endswith("pos_embed") and not sparse:
            assert of_rows.min() > 1e-9, key
        assert of_rows.max() > 1e-9, key


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
