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
def test_the_loss_equals_a_loop(unit: int) -> None:
    objective, batch = make(unit=unit).double(), make_batch(3)
    batch.images = batch.images.double()
    with torch.no_grad():
        objective.decoder.weight.normal_()
    hidden = objective.masking.draw(batch.key)
    tokens = objective.model.tokens(batch.images)  # of the whole images: the stem is patch-local
    x = tokens.x.clone()
    for b in range(3):
        for n in range(16):
            if hidden[b, n // 4, n % 4]:
                x[b, n] = objective.mask_token[0, 0]
    outputs = objective.decoder(objective.model.encoder(Tokens(x, tokens.grid))[:, 1:]).tolist()
    images = batch.images.tolist()
    total, count = 0.0, 0
    for b in range(3):
        for row in range(16):
            for column in range(16):
                if not hidden[b, row // 4, column // 4]:
                    continue
                for c in range(3):
                    n = 4 * (row // 4) + column // 4
                    k = 16 * c + 4 * (row % 4) + column % 4
                    pixel = (images[b][c][row][column] - MEAN[c]) / STD[c]
                    total += abs(outputs[b][n][k] - pixel)
                    count += 1
    assert objective(batch).loss.item() == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("stem", ["linear", "resnet"])
def test_whole_units_of_two_patches_are_hidden(stem: str) -> None:
    prediction = make(stem).predict(make_batch(5))
    units = prediction.hidden.unflatten(2, (2, 2)).unflatten(1, (2, 2))  # (B, 2, 2, 2, 2)
    share = units.float().mean(dim=(2, 4))
    assert set(share.flatten().tolist()) == {0.0, 1.0}
    assert share.sum(dim=(1, 2)).tolist() == [3.0] * 5  # ceil(4 * 0.6)
    assert prediction.tokens.shape[1] == 16


def test_an_error_names_the_valid_units() -> None:
    with pytest.raises(ValueError, match=r"unit=3 does not tile .* choose from 1, 2, 4"):
        make(unit=3)
