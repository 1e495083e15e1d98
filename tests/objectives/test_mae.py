from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from conftest import make_batch, make_objective
from lightly.models import utils as lightly_utils
from lightly.models.modules import (
    MaskedVisionTransformerDecoderTIMM,
    MaskedVisionTransformerTIMM,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybridvit.contracts import Batch, DataSpec
from hybridvit.interop.timm import from_timm
from hybridvit.objectives.mae import MAE
from hybridvit.patches import patchify, take

SMALL = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def make(stem: str = "linear", **args: object) -> MAE:
    objective = make_objective("mae", stem, **(SMALL | args))
    assert isinstance(objective, MAE)
    return objective


def redraw(module: nn.Module) -> None:
    """Give every parameter a value that matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + 0.1)


class Lightly(nn.Module):
    """MAE of lightly's modules, put together as in lightly's example."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.backbone = MaskedVisionTransformerTIMM(vit)
        self.decoder_embed = nn.Linear(24, 16)
        self.decoder = MaskedVisionTransformerDecoderTIMM(16, 16, depth=2, num_heads=2)
        self.decoder_pred = nn.Linear(16, 48)

    def forward(self, images: Tensor, keep: Tensor, mask: Tensor) -> Tensor:
        """Loss of normalised images; positions count the class token."""
        encoded = self.decoder_embed(self.backbone.encode(images=images, idx_keep=keep))
        full = lightly_utils.repeat_token(self.decoder.mask_token, (len(images), 17))
        full = lightly_utils.set_at_index(full, keep, encoded.type_as(full))
        decoded = lightly_utils.get_at_index(self.decoder(full), mask)
        target = lightly_utils.get_at_index(lightly_utils.patchify(images, 4), mask - 1)
        centred = target - target.mean(-1, keepdim=True)
        target = centred / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        return nn.functional.mse_loss(self.decoder_pred(decoded), target)


def test_loss_and_every_gradient_equal_lightlys() -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24,
                            depth=2, num_heads=3, num_classes=0)  # fmt: skip
    theirs = Lightly(vit).double()
    vit.pos_embed.requires_grad_()  # lightly freezes it
    positions = theirs.decoder.pos_embed.clone()
    redraw(theirs)
    data = DataSpec(10, (16, 16), 3, (0.5,) * 3, (0.5,) * 3)
    ours = MAE(
        model=from_timm(vit), data=data, decoder_dim=16, decoder_depth=2, decoder_heads=2
    ).double()
    torch.testing.assert_close(ours.decoder_pos, positions, rtol=0, atol=1e-6)
    with torch.no_grad():
        theirs.decoder.pos_embed.copy_(positions)
        ours.decoder_pos.copy_(positions)  # both were rounded to float32
        for name, parameter in ours.named_parameters():
            if not name.startswith("model."):
                parameter.copy_(as_ours(name, theirs.get_parameter(their_name(name))))

    batch = make_batch(3)
    batch.images = batch.images.double()
    hidden = ours.masking.draw(batch.key).flatten(1)
    keep, mask = (torch.stack([torch.where(row)[0] for row in h]) + 1 for h in (~hidden, hidden))
    keep = torch.cat([torch.zeros(3, 1, dtype=torch.long), keep], dim=1)
    expected = theirs((batch.images - 0.5) / 0.5, keep, mask)
    expected.backward()
    loss = ours(batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for name, parameter in ours.named_parameters():
        gradient = theirs.get_parameter(their_name(name)).grad
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad, as_ours(name, gradient), rtol=1e-9, atol=1e-12, msg=name
        )


def their_name(name: str) -> str:
    """Lightly's name of a parameter of ours."""
    if name == "mask_token":
        return "decoder.mask_token"
    name = name.replace("model.stem.proj", "backbone.vit.patch_embed.proj")
    return name.replace("model.encoder", "backbone.vit")


def as_ours(name: str, tensor: Tensor) -> Tensor:
    """Lightly flattens a patch as (row, column, channel), we as (channel, row, column)."""
    if name == "model.stem.proj.weight":
        return tensor.flatten(1)
    if name.startswith("decoder_pred"):
        flat: Tensor = tensor.unflatten(0, (4, 4, 3)).movedim(2, 0).flatten(0, 2)
        return flat
    return tensor


def test_sincos_positions_are_those_of_the_paper() -> None:
    # Half of the channels for the column, half for the row; sin then cos, 10000^(-2i/D).
    pos = make(decoder_dim=16, decoder_heads=2).decoder_pos[0, 1:]
    for n in range(16):
        for half, place in enumerate((n % 4, n // 4)):
            for i in range(4):
                angle = place / 10000 ** (i / 4)
                assert float(pos[n, 8 * half + i]) == pytest.approx(math.sin(angle), abs=1e-6)
                assert float(pos[n, 8 * half + 4 + i]) == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("stem", ["linear", "resnet"])
def test_the_encoder_gets_visible_tokens_alone(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = make(stem, ratio=0.75), make_batch(3)
    lengths = []
    objective.model.encoder.register_forward_hook(lambda _m, _i, z: lengths.append(z.shape[1]))
    prediction = objective.predict(batch)
    assert lengths == [1 + 4]
    assert prediction.tokens.shape[1] == 4
    assert prediction.outputs.shape == (3, 12, 48)
    shown = torch.ones(3, 16, dtype=torch.bool).scatter(1, prediction.where, False)
    assert torch.equal(shown, ~prediction.hidden.flatten(1))


@pytest.mark.parametrize("prefix", [{"class_token": False, "pool": "mean"}, {"registers": 3}])
def test_any_number_of_prefix_tokens(prefix: dict[str, object]) -> None:
    objective = make_objective("mae", encoder_args=prefix, **SMALL)
    objective(make_batch()).loss.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name


def test_decoded_tokens_stand_where_they_belong() -> None:
    # A decoder without blocks moves nothing: each position holds its own token or the mask token.
    objective, batch = make(decoder_depth=0), make_batch(2)
    prediction = objective.predict(batch)
    tokens = objective.model.encoder(
        objective.model.tokens(batch.images, keep=(~prediction.hidden.flatten(1)).nonzero()[:, 1]
                               .view(2, -1)))[:, 1:]  # fmt: skip
    norm = objective.decoder.norm
    for b in range(2):
        kept = (~prediction.hidden[b].flatten()).nonzero()[:, 0].tolist()
        shown = objective.model.tokens(batch.images, keep=torch.tensor(kept).expand(2, -1))
        everywhere = torch.arange(16).expand(2, -1)
        z = objective.decode(objective.model.encoder(shown), shown, everywhere)
        for n in range(16):
            own = (
                objective.decoder_embed(tokens[b, kept.index(n)])
                if n in kept
                else objective.mask_token[0, 0]
            )
            expected = norm(own + objective.decoder_pos[0, 1 + n])
            torch.testing.assert_close(z[b, n], expected, rtol=1e-4, atol=1e-5)


def test_class_and_register_tokens_are_decoded_first_and_without_a_position() -> None:
    sizes = SMALL | {"decoder_depth": 0}
    objective = make_objective("mae", encoder_args={"registers": 2}, **sizes)
    images = make_batch(2).images
    shown = objective.model.tokens(images, keep=torch.tensor([[5, 1], [9, 15]]))
    encoded = objective.model.encoder(shown)
    z = objective.decode(encoded, shown, torch.tensor([[-3, -2, -1]] * 2))
    expected = objective.decoder.norm(objective.decoder_embed(encoded[:, :3]))
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)


def test_a_decoder_writes_all_its_tokens_once() -> None:
    objective = make(decoder_depth=0)
    shown = objective.model.tokens(make_batch(2).images, keep=torch.tensor([[5, 1], [9, 15]]))
    encoded = objective.model.encoder(shown)
    writes = Writes((2, 17, objective.decoder.dim))
    with writes:
        objective.decode(encoded, shown, torch.tensor([[0], [0]]))
    assert writes.found == ["aten.scatter.src"]


class Writes(TorchDispatchMode):
    """Operations whose result has a shape and memory of its own."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.found = shape, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.shape == self.shape and 0 not in made.stride():
            self.found.append(str(func))
        return made


def test_pictures_of_a_right_answer_are_the_image() -> None:
    objective, batch = make(), make_batch(2)
    target = objective.target.encode(batch.images)

    class Known(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            where = (~objective.masking.draw(batch.key).flatten(1)).to(torch.int8)
            index = torch.argsort(where, dim=1, stable=True)[:, : x.shape[1]]
            return take(target, index)

    objective.decoder_pred = Known()  # type: ignore[assignment]
    rows = objective.pictures(batch)
    torch.testing.assert_close(rows["prediction"], batch.images, rtol=1e-4, atol=1e-4)
    mean = torch.tensor([0.4, 0.5, 0.6]).view(3, 1).expand(3, 16).reshape(-1)
    where = objective.predict(batch).where
    seen = take(patchify(rows["seen"], 4), where)
    assert torch.equal(seen, mean.expand_as(seen))


@pytest.mark.parametrize("stem", ["linear", "resnet"])
@pytest.mark.parametrize("target_patch", [2, 4, 8, 16])
def test_any_target_patch_that_fits_the_grid(stem: str, target_patch: int) -> None:
    loss = make(stem, target_patch=target_patch)(make_batch()).loss
    assert torch.isfinite(loss)


def test_it_learns() -> None:
    objective, batch = make(ratio=0.5), make_batch(32)
    columns = torch.rand(32, 1, 1, 16, generator=torch.Generator().manual_seed(1))
    batch.images = columns.expand(-1, 3, 16, -1).contiguous()  # rows are all alike
    losses = train(objective, batch)
    assert losses[-1] < 0.5 * losses[0]


def train(objective: MAE, batch: Batch) -> list[float]:
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = objective(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"ratio": 1.0}, "ratio=1.0"),
        ({"unit": 3}, "unit=3 does not tile the grid of 4 x 4 patches; choose from 1, 2$"),
        ({"decoder_heads": 3}, "objective 'mae', its decoder: .*heads=3 must divide dim=16"),
        ({"decoder_dim": 18, "decoder_heads": 3}, "decoder_dim=18 .* multiple of 4"),
        ({"target_patch": 3}, "windows of 3 px"),
        ({"fill": "learned"}, "would never be trained"),
    ],
)
def test_errors(args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**args)
