"""What a timm `VisionTransformer` is: its options, read from its modules, or an error that names
the option without a counterpart here."""

from __future__ import annotations

import copy
import math
import re
from typing import Any, Literal, NamedTuple

import torch
from timm.layers.activations import GELU as TimmGELU
from timm.layers.activations import GELUTanh
from timm.layers.activations import QuickGELU as TimmQuickGELU
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.classifier import ClassifierHead
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.norm import LayerNorm
from timm.layers.norm_act import GroupNormAct
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pool2d_same import MaxPool2dSame
from timm.layers.std_conv import StdConv2dSame
from timm.models.resnetv2 import Bottleneck, DownsampleConv, ResNetStage, ResNetV2
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from hybridvit.contracts import Stem
from hybridvit.encoder.gelu import GELU
from hybridvit.encoder.mlp import Activation, QuickGELU
from hybridvit.encoder.vit import Encoder
from hybridvit.stems.linear import LinearStem
from hybridvit.stems.resnet import ResNetStem
from hybridvit.stems.timm import FeatureMapStem

POOLS: dict[str, Literal["token", "mean", "map"]] = {"token": "token", "avg": "mean", "map": "map"}
_ACTIVATIONS: dict[type, Activation] = {
    nn.GELU: "gelu",
    GELU: "gelu",
    TimmGELU: "gelu",
    GELUTanh: "gelu_tanh",
    TimmQuickGELU: "quick_gelu",
    QuickGELU: "quick_gelu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}
# Names of timm's ResNetV2 to those of ResNetStem, applied in turn.
_RESNET_NAMES = (
    (r"^(stem\.)?conv\.", "root."),
    (r"^(stem\.)?norm\.", "root_norm."),
    (r"\.blocks\.", "."),
    (r"\.downsample\.conv\.", ".downsample.0."),
    (r"\.downsample\.norm\.", ".downsample.1."),
)
# What gives away the option of a class that is not VisionTransformer, by its parts' names.
_FOREIGN = {
    "dist_token": "distillation token",
    "rope": "rope",
    "rel_pos": "relative position",
    "relative_position": "relative position",
}


# --- the model: checks ---


def _need(condition: bool, option: str) -> None:
    if not condition:
        raise ValueError(f"from_timm: {option} has no counterpart here")


def class_name(module: object) -> str:
    return type(module).__name__


def is_identity(module: object) -> bool:
    return module is None or type(module) is nn.Identity


def _only(module: nn.Module, *names: str) -> None:
    """Refuse parts that this timm does not have, unless they do nothing."""
    for name, part in module.named_children():
        _need(
            name in names or is_identity(part),
            f"{name}={class_name(part)} of {class_name(module)}",
        )


def check_model(model: Any) -> None:
    if type(model) is not VisionTransformer:
        parts = [n for n, _ in (*model.named_modules(), *model.named_parameters())]
        found = [what for mark, what in _FOREIGN.items() if any(mark in part for part in parts)]
        option = f" ({found[0]})" if found else ""
        _need(False, f"{class_name(model)}{option} instead of VisionTransformer")
    _only(model, "patch_embed", "pos_drop", "patch_drop", "norm_pre", "blocks", "norm", "attn_pool",
          "fc_norm", "head_drop", "head")  # fmt: skip
    pool, prefix = model.global_pool, model.num_prefix_tokens
    _need(pool in POOLS, f"global_pool={pool!r}")
    _need((pool == "map") == (model.attn_pool is not None), f"attn_pool with global_pool={pool!r}")
    unread = pool == "token" or prefix == 0
    _need(unread or not getattr(model, "pool_include_prefix", False), "pool_include_prefix=True")
    _need(len(model.blocks) > 0, "depth=0")
    _need(
        is_identity(model.head) or type(model.head) is nn.Linear, f"head={class_name(model.head)}"
    )
    _check_embed(model)


def _check_embed(model: Any) -> None:
    embed = model.patch_embed
    _need(type(embed) in (PatchEmbed, HybridEmbed), f"embed_layer={class_name(embed)}")
    _only(embed, "proj", "norm", "backbone")
    _need(is_identity(getattr(embed, "norm", None)), "embed_norm_layer")
    _need(not embed.dynamic_img_pad, "dynamic_img_pad=True")
    # Not embed.in_chans: a linear embedding has none, and its convolution tells the truth.
    linear = type(embed) is PatchEmbed
    channels = embed.proj.in_channels if linear else getattr(model, "in_chans", 3)
    _need(channels == 3, f"in_chans={channels}")
    stride = embed.feat_ratio(as_scalar=False)
    _need(stride[0] == stride[1], f"patch_size={tuple(embed.patch_size)}, which is not square,")
    covered = tuple(n * s for n, s in zip(embed.grid_size, stride, strict=True))
    _need(
        covered == tuple(embed.img_size),
        f"img_size={tuple(embed.img_size)}, of which patches of {stride[0]} px leave a rest,",
    )


def norm_eps(model: Any) -> float:
    """The epsilon that all layer norms share."""
    norms = [model.norm_pre, model.norm, model.fc_norm]
    for block in model.blocks:
        norms += [block.norm1, block.norm2, block.attn.q_norm, block.attn.k_norm]
    norms += [] if model.attn_pool is None else [getattr(model.attn_pool, "norm", None)]
    norms = [norm for norm in norms if not is_identity(norm)]
    for norm in norms:
        known = type(norm) in (nn.LayerNorm, LayerNorm)
        _need(known and norm.bias is not None, f"norm_layer={class_name(norm)}")
    eps: set[float] = {norm.eps for norm in norms}
    _need(len(eps) <= 1, f"norm_layer with several eps {sorted(eps)}")
    return eps.pop() if eps else 1e-6


class _BlockSpec(NamedTuple):
    """What one set of `Encoder` arguments must say about all blocks."""

    heads: int
    hidden: int  # of both halves for "swiglu"
    mlp: Literal["mlp", "swiglu"]
    activation: Activation
    qkv_bias: bool
    qk_norm: bool
    layer_scale: bool


def common_block(model: Any) -> _BlockSpec:
    specs = [_block_spec(block, model.embed_dim) for block in model.blocks]
    for i, spec in enumerate(specs):
        _need(spec == specs[0], f"a block {i} that differs from block 0")
    return specs[0]


def _block_spec(block: Any, dim: int) -> _BlockSpec:
    _need(type(block) is Block, f"block_fn={class_name(block)}")
    _only(block, "norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    attn = block.attn
    _need(type(attn) is Attention, f"attn_layer={class_name(attn)}")
    _only(attn, "qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")
    _need(getattr(attn, "gate", None) is None, "gated attention")
    _need(is_identity(getattr(attn, "norm", None)), "scale_attn_norm=True")
    _need(attn.head_dim * attn.num_heads == dim, f"attn_head_dim={attn.head_dim}")
    _need(attn.scale == attn.head_dim**-0.5, f"attention scale={attn.scale}")
    _need(attn.proj.bias is not None and block.mlp.fc2.bias is not None, "proj_bias=False")
    for scale in (block.ls1, block.ls2):
        _need(is_identity(scale) or type(scale) is LayerScale, f"layer scale={class_name(scale)}")
    hidden, kind, activation = _mlp_spec(block.mlp)
    return _BlockSpec(
        heads=attn.num_heads,
        hidden=hidden,
        mlp=kind,
        activation=activation,
        qkv_bias=attn.qkv.bias is not None,
        qk_norm=not is_identity(attn.q_norm),
        layer_scale=not is_identity(block.ls1),
    )


def _mlp_spec(mlp: Any) -> tuple[int, Literal["mlp", "swiglu"], Activation]:
    _need(type(mlp) in (Mlp, GluMlp, SwiGLU), f"mlp_layer={class_name(mlp)}")
    _need(is_identity(mlp.norm), "scale_mlp_norm=True")
    activation = activation_name(mlp.act)
    _only(mlp, "fc1", "fc1_g", "fc1_x", "act", "drop1", "norm", "fc2", "drop2")
    width: int = mlp.fc2.in_features
    if isinstance(mlp, Mlp):
        return width, "mlp", activation
    _need(not getattr(mlp, "gate_last", False), "mlp_layer=GluMlp with gate_last=True")
    _need(activation == "silu", f"mlp_layer={class_name(mlp)} with act_layer={class_name(mlp.act)}")
    return 2 * width, "swiglu", activation


def activation_name(module: nn.Module) -> Activation:
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return "gelu_tanh"
    _need(type(module) in _ACTIVATIONS, f"act_layer={class_name(module)}")
    return _ACTIVATIONS[type(module)]


def check_pool(pool: Any, spec: _BlockSpec) -> None:
    _need(type(pool) is AttentionPoolLatent, f"attn_pool={class_name(pool)}")
    _only(pool, "q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp")
    same = pool.mlp is not None and (
        _mlp_spec(pool.mlp) == (spec.hidden, "mlp", spec.activation)
        and pool.num_heads == spec.heads
        and pool.latent_len == 1
        and pool.pool == "token"
        and pool.pos_embed is None
        and is_identity(pool.q_norm)
        and is_identity(pool.k_norm)
    )
    _need(same, "attn_pool with other heads, MLP, norms, positions or latents than the blocks")


# --- the model: from timm ---


def read_encoder(model: Any, spec: _BlockSpec, eps: float) -> Encoder:
    registers = 0 if model.reg_token is None else model.reg_token.shape[1]
    return Encoder(
        grid=tuple(model.patch_embed.grid_size),
        dim=model.embed_dim,
        depth=len(model.blocks),
        heads=spec.heads,
        mlp_ratio=ratio(spec.hidden, model.embed_dim),
        mlp=spec.mlp,
        activation=spec.activation,
        norm_eps=eps,
        qkv_bias=spec.qkv_bias,
        qk_norm=spec.qk_norm,
        layer_scale=1.0 if spec.layer_scale else None,
        class_token=model.cls_token is not None,
        registers=registers,
        position="none" if model.pos_embed is None else "learned_1d",
        position_on_prefix=not model.no_embed_class,
        pre_norm=not is_identity(model.norm_pre),
        final_norm=not (is_identity(model.norm) and is_identity(model.fc_norm)),
        fc_norm=not is_identity(model.fc_norm),
        pool=POOLS[model.global_pool],
    )


def ratio(hidden: int, dim: int) -> float:
    """A ratio with `int(dim * ratio) == hidden`, which the quotient itself may just miss."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def read_head(head: Any) -> nn.Linear | None:
    if is_identity(head):
        return None
    return nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)


def read_stem(embed: Any) -> Stem:
    if type(embed) is PatchEmbed:
        with torch.device("meta"):
            dim, bias = embed.proj.out_channels, embed.proj.bias is not None
            return LinearStem(dim=dim, patch=embed.patch_size[0], bias=bias)
    _need(
        type(embed.proj) in (nn.Conv2d, nn.Identity),
        f"proj={class_name(embed.proj)} of HybridEmbed",
    )
    options = _resnet_options(embed.backbone)
    if options is not None and isinstance(embed.proj, nn.Conv2d):
        with torch.device("meta"):
            dim, patch = embed.proj.out_channels, embed.patch_size[0]
            stem = ResNetStem(dim=dim, patch=patch, **options)
        state = {f"backbone.{key}": value for key, value in embed.backbone.state_dict().items()}
        state |= {f"proj.{key}": value for key, value in embed.proj.state_dict().items()}
        shapes = {our_name(f"patch_embed.{k}", stem): v.shape for k, v in state.items()}
        if shapes == {f"stem.{key}": value.shape for key, value in stem.state_dict().items()}:
            return stem
    # A small image measures the stride as well as a large one.
    size = 8 * embed.feature_ratio[0]
    mapped = FeatureMapStem(copy.deepcopy(embed.backbone), copy.deepcopy(embed.proj), size)
    _need(mapped.patch_px == embed.feat_ratio(), "a backbone whose stride depends on the image")
    return mapped


def _resnet_options(backbone: Any) -> dict[str, Any] | None:
    """Arguments of the `ResNetStem` that computes the same, or None for any other backbone."""
    whole = type(backbone) is ResNetV2
    root: Any = backbone.stem if whole else backbone
    stages: list[Any] = list(backbone.stages) if whole else []
    parts = [name for name, _ in root.named_children()]
    if parts not in (["conv", "norm"], ["conv", "norm", "pool"]):
        return None
    groups = getattr(root.norm, "num_groups", 0)
    if not all(_is_bit(module, groups) for module in backbone.modules()):
        return None
    blocks = [list(stage.blocks) for stage in stages]
    return {
        "blocks": tuple(len(stage) for stage in blocks),
        "strides": tuple(stage[0].conv2.stride[0] for stage in blocks),
        "width": groups / 32,
        "root_kernel": root.conv.kernel_size[0],
        "root_stride": root.conv.stride[0],
        "root_pool": "pool" in parts,
    }


def _is_bit(module: Any, groups: int) -> bool:
    """Whether a part of a ResNetV2 is as in BiT's post-activation form, with SAME padding."""
    if type(module) is StdConv2dSame:
        plain = module.eps == 1e-8 and module.bias is None and module.groups == 1
        square = len({*module.kernel_size}) == len({*module.stride}) == 1
        # SAME padding is symmetric, and then fixed, for stride 1 and odd kernels.
        fixed = module.stride == (1, 1) and module.padding[0] == module.kernel_size[0] // 2
        same = module.same_pad or fixed
        return plain and square and same and module.dilation == (1, 1)
    if type(module) is GroupNormAct:
        return module.num_groups == groups and module.eps == 1e-5 and module.affine
    if type(module) is MaxPool2dSame:
        return (module.kernel_size, module.stride) == ((3, 3), (2, 2)) and not module.ceil_mode
    if type(module) is Bottleneck:
        inner = type(module.norm1.act) is type(module.norm2.act) is nn.ReLU
        return inner and is_identity(module.norm3.act) and is_identity(module.drop_path)
    if type(module) is ResNetV2:
        return is_identity(module.norm)
    # The head does nothing: HybridEmbed takes feature maps, not pooled features or logits.
    head = (ClassifierHead, SelectAdaptivePool2d, nn.Dropout)
    return type(module) in (nn.Sequential, ResNetStage, DownsampleConv, nn.ReLU, nn.Identity, *head)


def our_name(key: str, stem: Stem) -> str:
    """The name here of a parameter or buffer of timm's model."""
    if key.startswith("head."):
        return key
    if not key.startswith("patch_embed."):
        return f"encoder.{key}"
    key = key.removeprefix("patch_embed.")
    if key.startswith("backbone.") and isinstance(stem, ResNetStem):
        key = key.removeprefix("backbone.")
        for pattern, name in _RESNET_NAMES:
            key = re.sub(pattern, name, key)
    return f"stem.{key}"
