"""What has no counterpart here is refused in one line that names it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import (
    AttentionRope,
    GluMlp,
    RmsNorm,
    SwiGLUPacked,
)
from timm.models.vision_transformer import (
    DiffAttention,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from timm_models import (
    bn_backbone,
    hybrid,
    vit,
)
from torch import nn

import hybridvit

GEGLU = {"mlp_layer": SwiGLUPacked, "act_layer": nn.GELU}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "parallel": (partial(vit, block_fn=ParallelScalingBlock), "block_fn=ParallelScalingBlock"),
    "parallel_things": (partial(vit, block_fn=ParallelThingsBlock), "block_fn=ParallelThings"),
    "post_norm": (partial(vit, block_fn=ResPostBlock), "block_fn=ResPostBlock"),
    "diff": (partial(vit, attn_layer=DiffAttention), "attn_layer=DiffAttention"),
    "rope": (partial(vit, attn_layer=AttentionRope), "attn_layer=AttentionRope"),
    "scale_attn_norm": (partial(vit, scale_attn_norm=True), "scale_attn_norm"),
    "scale_mlp_norm": (partial(vit, scale_mlp_norm=True), "scale_mlp_norm"),
    "proj_bias": (partial(vit, proj_bias=False), "proj_bias=False"),
    "no_pool": (partial(vit, global_pool=""), "global_pool=''"),
    "max": (partial(vit, global_pool="max"), "global_pool='max'"),
    "avgmax": (partial(vit, global_pool="avgmax"), "global_pool='avgmax'"),
    "prr": (partial(vit, global_pool="prr"), "global_pool='prr'"),
    "prefix": (partial(vit, global_pool="avg", pool_include_prefix=True), "pool_include_prefix"),
    "prefix_map": (partial(vit, global_pool="map", pool_include_prefix=True), "pool_include_"),
    "pad": (partial(vit, dynamic_img_size=True, dynamic_img_pad=True), "dynamic_img_pad"),
    "embed_norm": (partial(vit, embed_norm_layer=nn.LayerNorm), "embed_norm_layer"),
    "rms": (partial(vit, norm_layer=RmsNorm), "norm_layer=RmsNorm"),
    "no_affine": (
        partial(vit, norm_layer=partial(nn.LayerNorm, elementwise_affine=False)),
        "norm_layer=LayerNorm",
    ),
    "mish": (partial(vit, act_layer=nn.Mish), "act_layer=Mish"),
    "glu": (partial(vit, mlp_layer=GluMlp, act_layer=nn.SiLU), "gate_last=True"),
    "geglu": (partial(vit, **GEGLU), "mlp_layer=GluMlp with act_layer=GELU"),
    "patch": (partial(vit, patch_size=(8, 4)), r"patch_size=\(8, 4\)"),
    "rest": (partial(vit, img_size=20), r"img_size=\(20, 20\)"),
    "grey": (partial(vit, in_chans=1), "in_chans=1"),
    "pooled": (
        lambda: hybrid(nn.Sequential(bn_backbone(), nn.AdaptiveAvgPool2d(4))),
        "stride depends on the image",
    ),
    "depth": (partial(vit, depth=0, global_pool="avg"), "depth=0"),
    "distilled": (partial(timm.create_model, "deit_tiny_distilled_patch16_224"), "distillation"),
    "relpos": (partial(timm.create_model, "vit_relpos_small_patch16_224", depth=1), "relative"),
    "relpos_mlp": (partial(timm.create_model, "vit_srelpos_small_patch16_224", depth=1), "relativ"),
    "eva": (partial(timm.create_model, "eva02_tiny_patch14_224", depth=1), "rope"),
    "not_a_vit": (partial(timm.create_model, "resnet18"), "ResNet instead of VisionTransformer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_options_are_refused_in_one_line_that_names_them(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        hybridvit.from_timm(make())
    assert "\n" not in str(caught.value)


def _edit(**changes: Any) -> Any:
    model = vit(global_pool="map", class_token=False, qk_norm=True, init_values=1.0)
    for path, value in changes.items():
        owner, _, name = path.replace("__", ".").rpartition(".")
        setattr(model.get_submodule(owner), name, value)
    return model


EDITED: dict[str, tuple[dict[str, Any], str]] = {
    "gate": ({"blocks__1__attn__gate": nn.Linear(16, 16)}, "gated attention"),
    "scale": ({"blocks__0__attn__scale": 1.0}, "attention scale"),
    "eps": ({"norm": nn.LayerNorm(16, eps=1.0)}, "norm_layer with several eps"),
    "block": ({"blocks__1__mlp__act": nn.ReLU()}, "a block 1 that differs"),
    "pool_act": ({"attn_pool__mlp__act": nn.ReLU()}, "attn_pool with other"),
    "pool_latents": ({"attn_pool__latent_len": 2}, "attn_pool with other"),
    "pool_q_norm": ({"attn_pool__q_norm": nn.LayerNorm(8)}, "attn_pool with other"),
    "pool_mlp": ({"attn_pool__mlp": None}, "attn_pool with other"),
    "new_part": ({"blocks__0__extra": nn.ReLU()}, "extra=ReLU of Block"),
    "new_parameter": ({"temperature": nn.Parameter(torch.ones(1))}, "temperature"),
    "new_buffer": ({"blocks__0__extra": nn.BatchNorm1d(3)}, "extra=BatchNorm1d"),
    "ls": ({"blocks__0__ls2": nn.Tanh()}, "layer scale=Tanh"),
    "missing_norm": ({"blocks__0__norm1": nn.Identity()}, "norm1"),
    "both_norms": ({"fc_norm": nn.LayerNorm(16, 1e-6)}, "encoder.norm"),
    "head": ({"head": nn.Sequential(nn.Linear(16, 2))}, "head=Sequential"),
    "positions": ({"pos_embed": nn.Parameter(torch.ones(1, 7, 16))}, "pos_embed"),
    "wrong_pool": ({"global_pool": "avg"}, "attn_pool with global_pool"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITED)
def test_edited_models_are_refused(name: str) -> None:
    changes, message = EDITED[name]
    with pytest.raises(ValueError, match=message) as caught:
        hybridvit.from_timm(_edit(**changes))
    assert "\n" not in str(caught.value)


def test_wrong_calls_end_in_one_line() -> None:
    with pytest.raises(ValueError, match="no model 'vit_tinny_patch16_224'; did you mean vit_tiny"):
        hybridvit.from_timm("vit_tinny_patch16_224")
    with pytest.raises(ValueError, match="pretrained=True needs a name"):
        hybridvit.from_timm(vit(), pretrained=True)


def test_a_failed_download_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ValueError, match="pretrained weights of 'vit_tiny_patch16_224'") as caught:
        hybridvit.from_timm("vit_tiny_patch16_224", pretrained=True)
    assert "no route to host" in str(caught.value)
    assert "\n" not in str(caught.value)
