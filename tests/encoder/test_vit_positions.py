"""Positions in the encoder: which tokens get them, where they enter, what they cost."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from small_encoders import AT, COMBINE, GRID, IN_ATTENTION, ON_TOKENS, POSITIONS, encoder, patches
from torch import Tensor

from hybridvit.contracts import Tokens
from hybridvit.encoder import attention
from hybridvit.encoder.positions import places_of, sincos_2d
from hybridvit.encoder.vit import Encoder
from hybridvit.engine.optim import decays
from hybridvit.patches import take


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


@pytest.mark.parametrize("name", POSITIONS)
def test_a_model_in_bf16_gives_bf16(name: str) -> None:
    model, tokens = encoder(**POSITIONS[name]), patches(grid=(3, 4))
    part = tokens._replace(x=tokens.x[:, :4], index=torch.tensor([[4, 11, 2, 8], [0, 5, 10, 3]]))
    for each in (tokens, part):
        z = copy.deepcopy(model).bfloat16()(each._replace(x=each.x.bfloat16()))
        assert z.dtype == torch.bfloat16
        exact = model(each)
        assert (z - exact).norm() < 5 * 2**-8 * exact.norm()  # a few roundings to 8 bits


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
