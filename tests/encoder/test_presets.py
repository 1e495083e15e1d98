"""Encoder sizes against timm's."""

from __future__ import annotations

import pytest
import timm
import torch

from hybridvit.encoder.presets import ENCODERS

MODELS = {
    "tiny": ("vit_tiny_patch16_224", 16),
    "small": ("vit_small_patch16_224", 16),
    "base": ("vit_base_patch16_224", 16),
    "large": ("vit_large_patch16_224", 16),
    "huge": ("vit_huge_patch14_224", 14),
    "giant": ("vit_giant_patch14_224", 14),
}


@pytest.mark.parametrize("preset", MODELS)
def test_presets_have_the_parameters_of_timms_models(preset: str) -> None:
    name, patch = MODELS[preset]
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0)
        ours = ENCODERS[preset](grid=(224 // patch, 224 // patch))
    del theirs.patch_embed
    expected = {key: tuple(value.shape) for key, value in theirs.named_parameters()}
    assert {key: tuple(value.shape) for key, value in ours.named_parameters()} == expected
    assert ours.blocks[0].attn.heads == theirs.blocks[0].attn.num_heads


def test_vit_is_the_encoder_with_its_defaults() -> None:
    assert set(ENCODERS) == {*MODELS, "vit"}
    with torch.device("meta"):
        default, tiny = ENCODERS["vit"](grid=(4, 4)), ENCODERS["tiny"](grid=(4, 4))
    assert str(default) == str(tiny)
