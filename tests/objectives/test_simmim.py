from __future__ import annotations

import pytest
import torch
from conftest import make_batch, make_objective

from hybridvit.contracts import Tokens
from hybridvit.objectives.simmim import SimMIM

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def make(stem: str = "linear", **args: object) -> SimMIM:
    objective = make_objective("simmim", stem, **args)
    assert isinstance(objective, SimMIM)
    return objective


@pytest.mark.parametrize("unit", [1, 2])
def test_loss_and_every_gradient_equal_a_loop(unit: int) -> None:
    objective, batch = make(unit=unit).double(), make_batch(2)
    batch.images = batch.images.double()
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.normal_(std=0.2)
    hidden = objective.masking.draw(batch.key)
    tokens = objective.model.tokens(batch.images)  # of the whole images: the stem is patch-local
    rows = [
        [objective.mask_token[0, 0] if hidden[b, n // 4, n % 4] else tokens.x[b, n]
         for n in range(16)]
        for b in range(2)
    ]  # fmt: skip
    x = torch.stack([torch.stack(row) for row in rows])
    outputs = objective.decoder(objective.model.encoder(Tokens(x, tokens.grid))[:, 1:])
    images, errors = batch.images.tolist(), []
    mean, std = (torch.tensor(x).tolist() for x in (MEAN, STD))  # in float32, as models keep them
    for b in range(2):
        for row in range(16):
            for column in range(16):
                if not hidden[b, row // 4, column // 4]:
                    continue
                for c in range(3):
                    n = 4 * (row // 4) + column // 4
                    k = 16 * c + 4 * (row % 4) + column % 4
                    pixel = (images[b][c][row][column] - mean[c]) / std[c]
                    errors.append((outputs[b, n, k] - pixel).abs())
    expected = torch.stack(errors).mean()
    loss = objective(batch).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    parameters = dict(objective.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()))
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    for name, ours, theirs in zip(parameters, found, gradients, strict=True):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("stem", ["linear", "resnet"])
def test_whole_units_of_two_patches_are_hidden(stem: str) -> None:
    prediction = make(stem).predict(make_batch(5))
    units = prediction.hidden.unflatten(2, (2, 2)).unflatten(1, (2, 2))  # (B, 2, 2, 2, 2)
    share = units.float().mean(dim=(2, 4))
    assert set(share.flatten().tolist()) == {0.0, 1.0}
    assert share.sum(dim=(1, 2)).tolist() == [3.0] * 5  # ceil(4 * 0.6)
    assert prediction.tokens.shape[1] == 16


def test_an_error_names_the_valid_units() -> None:
    with pytest.raises(ValueError, match=r"unit=3 does not tile .* choose from 1, 2$"):
        make(unit=3)
