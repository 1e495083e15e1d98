from typing import Any

import pytest
import torch
from conftest import make_batch, make_objective

from hybridvit.targets.features import FeatureTarget


def test_the_moving_average_follows_the_model_as_momentum_says() -> None:
    model = make_objective().model
    target = FeatureTarget(model=model, momentum=0.9)
    before = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    target.after_step(model)
    for teacher, old in zip(target.teacher.parameters(), before, strict=True):
        torch.testing.assert_close(teacher, old + 0.1)
    target.after_step(model)
    for teacher, old in zip(target.teacher.parameters(), before, strict=True):
        torch.testing.assert_close(teacher, old + 0.19)


def test_batch_statistics_are_copied() -> None:
    objective = make_objective("masked_patch", "resnet", stem_args={"norm": "batch"},
                               target="features")  # fmt: skip
    objective(make_batch())
    objective.after_step(1)
    teacher = objective.target.teacher
    stem = objective.model.stem
    copied = dict(teacher.stem.named_buffers())
    assert copied
    for name, buffer in stem.named_buffers():
        assert torch.equal(copied[name], buffer)


def test_targets_are_normalised_tokens_of_the_whole_image() -> None:
    model, batch = make_objective().model, make_batch()
    target = FeatureTarget(model=model)
    tokens = model.encoder(model.tokens(batch.images))[:, 1:]
    expected = (tokens - tokens.mean(-1, keepdim=True)) / (
        tokens.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(target.encode(batch.images), expected)


def test_the_teacher_stays_frozen_and_in_eval_mode() -> None:
    target = FeatureTarget(model=make_objective().model).train()
    assert target.training
    assert not any(module.training for module in target.teacher.modules())
    assert not any(p.requires_grad for p in target.parameters())


NETWORKS = ["vit_tiny_patch16_224", "resnet18", "vit_small_patch14_dinov2", "mambaout_femto"]


@pytest.mark.parametrize("name", NETWORKS)  # the last one's maps have their channels last
def test_timm_teachers_give_tokens_on_our_grid(name: str) -> None:
    model = make_objective().model
    target = FeatureTarget(model=model, teacher=name, pretrained=False)
    encoded = target.encode(torch.rand(2, 3, 16, 16))
    assert encoded.shape == (2, 16, target.outputs)
    torch.testing.assert_close(encoded.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)


def test_a_timm_teacher_sees_its_own_normalisation_and_size() -> None:
    target = FeatureTarget(
        model=make_objective().model, teacher="vit_tiny_patch16_224", pretrained=False
    )
    network = target.teacher.network
    images = torch.rand(2, 3, 16, 16)
    large = torch.nn.functional.interpolate(images, (64, 64), mode="bilinear", antialias=True)
    tokens = network.forward_features((large - 0.5) / 0.5)[:, 1:]  # timm's mean and std: 0.5
    expected = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])
    torch.testing.assert_close(target.encode(images), expected, rtol=1e-4, atol=1e-4)


def test_equal_tokens_have_equal_colors() -> None:
    model, batch = make_objective().model, make_batch()
    target = FeatureTarget(model=model)
    encoded = target.encode(batch.images)
    everywhere = torch.arange(16).expand(4, -1)
    picture = target.decode(encoded, batch.images, everywhere)
    assert picture.shape == (4, 16, 3, 4, 4)
    assert torch.equal(picture, target.decode(encoded, batch.images, everywhere))
    assert float(picture.flatten(2).std(dim=(0, 1)).mean()) > 0.1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"momentum": 1.5}, "momentum=1.5 should be in"),
        ({"teacher": "resnet_1"}, "target 'features': timm has no model 'resnet_1'"),
        ({"teacher": "coat_tiny", "pretrained": False}, r"features \(list\) are no map of tokens"),
        ({"teacher": "mixer_s32_224", "pretrained": False}, "refuses images of 128 x 128 px"),
    ],
)
def test_errors(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureTarget(model=make_objective().model, **args)
