"""timm's `VisionTransformer` as a `HybridViT`, and back, with equal outputs.

Written against timm 1.0.31, `models/vision_transformer.py` and `vision_transformer_hybrid.py`. What
decides is the class and the attributes of each module, never a model's name, and every
parameter and buffer has to find its place: an option that is not known here is an error, not a
different output.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from timm.layers.activations import GELU, GELUTanh
from timm.layers.activations import QuickGELU as TimmQuickGELU
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.classifier import ClassifierHead
from timm.layers.drop import DropPath
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from timm.layers.norm import LayerNorm
from timm.layers.norm_act import GroupNormAct
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pool2d_same import MaxPool2dSame
from timm.layers.std_conv import StdConv2dSame
from timm.models.resnetv2 import Bottleneck, DownsampleConv, ResNetStage, ResNetV2
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from hybridvit.contracts import Stem
from hybridvit.encoder.model import Activation, Encoder, HybridViT, QuickGELU
from hybridvit.encoder.model import GatedMlp as OurGatedMlp
from hybridvit.stems.linear import LinearStem
from hybridvit.stems.resnet import ResNetStem
from hybridvit.stems.timm import FeatureMapStem, create_timm

_POOLS: dict[str, Literal["token", "mean", "map"]] = {"token": "token", "avg": "mean", "map": "map"}
_ACTIVATIONS: dict[type, Activation] = {
    GELU: "gelu",
    GELUTanh: "gelu_tanh",
    TimmQuickGELU: "quick_gelu",
    QuickGELU: "quick_gelu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}
_ACTIVATION_LAYERS: dict[Activation, type[nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": GELUTanh,
    "quick_gelu": TimmQuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
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


def from_timm(model_or_name: nn.Module | str, pretrained: bool = False) -> HybridViT:
    """A timm `VisionTransformer` as a `HybridViT` with copies of its weights.

    The result takes images in [0, 1] and normalises them with the mean and std of the model's
    `pretrained_cfg` (by 0 and 1 where it has none), so that
    `from_timm(m)(images) == m((images - mean) / std)`. Data types, device and train or eval mode
    are the model's. Image sizes that the model refuses (`dynamic_img_size=False`) are accepted:
    the position embedding is interpolated. Dropout and stochastic depth keep their rates, except
    for the two that have no counterpart and act in training only, `drop_rate` (before the head)
    and `patch_drop_rate`.

    Args:
        model_or_name: a model whose class is `VisionTransformer`, with a linear patch embedding
            or a hybrid one (`HybridEmbed`, any backbone); or a name for `timm.create_model`.
        pretrained: with a name, load timm's weights (downloads them).

    Raises:
        ValueError: an unknown name, a failed download, or an option without counterpart.
    """
    if isinstance(model_or_name, str):
        model: Any = create_timm(model_or_name, pretrained)
    elif pretrained:
        raise ValueError("from_timm: pretrained=True needs a name, not a model")
    else:
        model = model_or_name
    _check_model(model)
    spec = _common_block(model)
    eps = _norm_eps(model)
    if model.attn_pool is not None:
        _check_pool(model.attn_pool, spec)
    stem = _stem(model.patch_embed)
    with torch.device("meta"):  # no time for initial values that are replaced
        encoder = _encoder(model, spec, eps)
        head = _head(model.head)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    mean, std = cfg.get("mean", (0.0, 0.0, 0.0)), cfg.get("std", (1.0, 1.0, 1.0))
    ours = HybridViT(stem, encoder, mean=mean, std=std, head=head)
    state = {_our_name(k, stem): v for k, v in _fused_gates(model.state_dict()).items()}
    if isinstance(stem, LinearStem):
        state["stem.proj.weight"] = state["stem.proj.weight"].flatten(1)
    like = next(model.parameters())
    state["mean"] = like.new_tensor(mean).view(1, -1, 1, 1)
    state["std"] = like.new_tensor(std).view(1, -1, 1, 1)
    _assign(ours, state)
    _copy_rates(model, encoder)
    ours.train(model.training)
    if isinstance(stem, FeatureMapStem):
        _copy_modes(model.patch_embed.backbone, stem.backbone)
    return ours


def to_timm(model: HybridViT) -> Any:
    """A `HybridViT` as a timm `VisionTransformer` with copies of its weights.

    It takes normalised images of any size that the stride divides (`dynamic_img_size=True`); mean,
    std and image size are in its `pretrained_cfg`. `from_timm` of the result has the state dict of
    `model`, bit by bit.

    Raises:
        ValueError: a head that is no linear layer, or a stem or an encoder that timm has not.
    """
    encoder, head = model.encoder, model.head
    if head is not None and type(head) is not nn.Linear:
        raise ValueError(f"to_timm: the head must be nn.Linear or None, not {_name(head)}")
    if encoder.depth == 0:
        raise ValueError("to_timm: an encoder with depth=0 has no timm counterpart")
    (height, width), stem = model.image_size, model.stem
    embed_layer, patch = _timm_embed(stem)
    vit: Any = VisionTransformer(
        img_size=(height, width),
        patch_size=patch,
        embed_layer=embed_layer,
        num_classes=0 if head is None else head.out_features,
        **_timm_options(encoder),
    )
    if head is not None:
        vit.head = copy.deepcopy(head)  # it may have no bias
    ours, names = model.state_dict(), vit.state_dict()
    state = {key: ours[_our_name(key, stem)] for key in names if _our_name(key, stem) in ours}
    if isinstance(stem, LinearStem):
        weight = state["patch_embed.proj.weight"]
        state["patch_embed.proj.weight"] = weight.reshape(len(weight), 3, patch, patch)
    _assign(vit, state)
    _write_rates(encoder, vit)
    vit.train(model.training)
    if isinstance(stem, FeatureMapStem):
        _copy_modes(stem.backbone, vit.patch_embed.backbone)
    vit.pretrained_cfg = vit.default_cfg = {
        "input_size": (3, height, width),
        "fixed_input_size": False,
        "num_classes": vit.num_classes,
        "mean": tuple(model.mean.flatten().tolist()),
        "std": tuple(model.std.flatten().tolist()),
    }
    return vit


# --- the model: checks ---


def _need(condition: bool, option: str) -> None:
    if not condition:
        raise ValueError(f"from_timm: {option} has no counterpart here")


def _name(module: object) -> str:
    return type(module).__name__


def _is_identity(module: object) -> bool:
    return module is None or type(module) is nn.Identity


def _only(module: nn.Module, *names: str) -> None:
    """Refuse parts that this timm does not have, unless they do nothing."""
    for name, part in module.named_children():
        _need(name in names or _is_identity(part), f"{name}={_name(part)} of {_name(module)}")


def _check_model(model: Any) -> None:
    if type(model) is not VisionTransformer:
        parts = [n for n, _ in (*model.named_modules(), *model.named_parameters())]
        found = [what for mark, what in _FOREIGN.items() if any(mark in part for part in parts)]
        option = f" ({found[0]})" if found else ""
        _need(False, f"{_name(model)}{option} instead of VisionTransformer")
    _only(model, "patch_embed", "pos_drop", "patch_drop", "norm_pre", "blocks", "norm", "attn_pool",
          "fc_norm", "head_drop", "head")  # fmt: skip
    pool, prefix = model.global_pool, model.num_prefix_tokens
    _need(pool in _POOLS, f"global_pool={pool!r}")
    _need((pool == "map") == (model.attn_pool is not None), f"attn_pool with global_pool={pool!r}")
    unread = pool == "token" or prefix == 0
    _need(unread or not getattr(model, "pool_include_prefix", False), "pool_include_prefix=True")
    _need(len(model.blocks) > 0, "depth=0")
    _need(_is_identity(model.head) or type(model.head) is nn.Linear, f"head={_name(model.head)}")
    _check_embed(model)


def _check_embed(model: Any) -> None:
    embed = model.patch_embed
    _need(type(embed) in (PatchEmbed, HybridEmbed), f"embed_layer={_name(embed)}")
    _only(embed, "proj", "norm", "backbone")
    _need(_is_identity(getattr(embed, "norm", None)), "embed_norm_layer")
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


def _norm_eps(model: Any) -> float:
    """The epsilon that all layer norms share."""
    norms = [model.norm_pre, model.norm, model.fc_norm]
    for block in model.blocks:
        norms += [getattr(block, name, None) for name in ("norm1", "norm2")]
        norms += (
            [getattr(block.attn, name, None) for name in ("q_norm", "k_norm")]
            if hasattr(block, "attn")
            else []
        )
    norms += [] if model.attn_pool is None else [getattr(model.attn_pool, "norm", None)]
    norms = [norm for norm in norms if not _is_identity(norm)]
    for norm in norms:
        known = type(norm) in (nn.LayerNorm, LayerNorm)
        _need(known and norm.bias is not None, f"norm_layer={_name(norm)}")
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


def _common_block(model: Any) -> _BlockSpec:
    specs = [_block_spec(block, model.embed_dim) for block in model.blocks]
    for i, spec in enumerate(specs):
        _need(spec == specs[0], f"a block {i} that differs from block 0")
    return specs[0]


def _block_spec(block: Any, dim: int) -> _BlockSpec:
    _need(type(block) is Block, f"block_fn={_name(block)}")
    _only(block, "norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    attn = block.attn
    _need(type(attn) is Attention, f"attn_layer={_name(attn)}")
    _only(attn, "qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")
    _need(getattr(attn, "gate", None) is None, "gated attention")
    _need(_is_identity(getattr(attn, "norm", None)), "scale_attn_norm=True")
    _need(attn.head_dim * attn.num_heads == dim, f"attn_head_dim={attn.head_dim}")
    _need(attn.scale == attn.head_dim**-0.5, f"attention scale={attn.scale}")
    _need(attn.proj.bias is not None and block.mlp.fc2.bias is not None, "proj_bias=False")
    for scale in (block.ls1, block.ls2):
        _need(_is_identity(scale) or type(scale) is LayerScale, f"layer scale={_name(scale)}")
    hidden, kind, activation = _mlp_spec(block.mlp)
    return _BlockSpec(
        heads=attn.num_heads,
        hidden=hidden,
        mlp=kind,
        activation=activation,
        qkv_bias=attn.qkv.bias is not None,
        qk_norm=not _is_identity(attn.q_norm),
        layer_scale=not _is_identity(block.ls1),
    )


def _mlp_spec(mlp: Any) -> tuple[int, Literal["mlp", "swiglu"], Activation]:
    _need(type(mlp) in (Mlp, GluMlp, SwiGLU), f"mlp_layer={_name(mlp)}")
    _need(_is_identity(mlp.norm), "scale_mlp_norm=True")
    activation = _activation(mlp.act)
    _only(mlp, "fc1", "fc1_g", "fc1_x", "act", "drop1", "norm", "fc2", "drop2")
    width: int = mlp.fc2.in_features
    if isinstance(mlp, Mlp):
        return width, "mlp", activation
    _need(not getattr(mlp, "gate_last", False), "mlp_layer=GluMlp with gate_last=True")
    _need(activation == "silu", f"mlp_layer={_name(mlp)} with act_layer={_name(mlp.act)}")
    return 2 * width, "swiglu", activation


def _activation(module: nn.Module) -> Activation:
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return "gelu_tanh"
    if type(module) is nn.GELU:
        return "gelu"
    _need(type(module) in _ACTIVATIONS, f"act_layer={_name(module)}")
    return _ACTIVATIONS[type(module)]


def _check_pool(pool: Any, spec: _BlockSpec) -> None:
    _need(type(pool) is AttentionPoolLatent, f"attn_pool={_name(pool)}")
    _only(pool, "q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp")
    same = pool.mlp is not None and (
        _mlp_spec(pool.mlp) == (spec.hidden, "mlp", spec.activation)
        and pool.num_heads == spec.heads
        and pool.latent_len == 1
        and pool.pool == "token"
        and pool.pos_embed is None
        and _is_identity(pool.q_norm)
        and _is_identity(pool.k_norm)
    )
    _need(same, "attn_pool with other heads, MLP, norms, positions or latents than the blocks")


# --- the model: from timm ---


def _encoder(model: Any, spec: _BlockSpec, eps: float) -> Encoder:
    registers = 0 if model.reg_token is None else model.reg_token.shape[1]
    return Encoder(
        grid=tuple(model.patch_embed.grid_size),
        dim=model.embed_dim,
        depth=len(model.blocks),
        heads=spec.heads,
        mlp_ratio=_ratio(spec.hidden, model.embed_dim),
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
        pre_norm=not _is_identity(model.norm_pre),
        final_norm=not (_is_identity(model.norm) and _is_identity(model.fc_norm)),
        fc_norm=not _is_identity(model.fc_norm),
        pool=_POOLS[model.global_pool],
    )


def _ratio(hidden: int, dim: int) -> float:
    """A ratio with `int(dim * ratio) == hidden`, which the quotient itself may just miss."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _head(head: Any) -> nn.Linear | None:
    if _is_identity(head):
        return None
    return nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)


def _stem(embed: Any) -> Stem:
    if type(embed) is PatchEmbed:
        with torch.device("meta"):
            dim, bias = embed.proj.out_channels, embed.proj.bias is not None
            return LinearStem(dim=dim, patch=embed.patch_size[0], bias=bias)
    _need(type(embed.proj) in (nn.Conv2d, nn.Identity), f"proj={_name(embed.proj)} of HybridEmbed")
    options = _resnet_options(embed.backbone)
    if options is not None and isinstance(embed.proj, nn.Conv2d):
        with torch.device("meta"):
            dim, patch = embed.proj.out_channels, embed.patch_size[0]
            stem = ResNetStem(dim=dim, patch=patch, **options)
        state = {f"backbone.{key}": value for key, value in embed.backbone.state_dict().items()}
        state |= {f"proj.{key}": value for key, value in embed.proj.state_dict().items()}
        shapes = {_our_name(f"patch_embed.{k}", stem): v.shape for k, v in state.items()}
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
        return inner and _is_identity(module.norm3.act) and _is_identity(module.drop_path)
    if type(module) is ResNetV2:
        return _is_identity(module.norm)
    # The head does nothing: HybridEmbed takes feature maps, not pooled features or logits.
    head = (ClassifierHead, SelectAdaptivePool2d, nn.Dropout)
    return type(module) in (nn.Sequential, ResNetStage, DownsampleConv, nn.ReLU, nn.Identity, *head)


def _fused_gates(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which the two gate matrices of timm's `SwiGLU` are one, as in `GluMlp`."""
    fused = {}
    for key, value in state.items():
        if re.match(r"blocks\.\d+\.mlp\.fc1_g\.", key):
            value = torch.cat([value, state[key.replace("fc1_g", "fc1_x")]])
            fused[key.replace("fc1_g", "fc1")] = value
        elif not re.match(r"blocks\.\d+\.mlp\.fc1_x\.", key):
            fused[key] = value
    return fused


# --- both directions ---


def _our_name(key: str, stem: Stem) -> str:
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


def _assign(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a module copies of tensors, with their type and device; each must have its place."""
    own = module.state_dict()
    for key in sorted(own.keys() | state.keys()):
        if key not in own or key not in state or own[key].shape != state[key].shape:
            raise ValueError(f"timm conversion: {key} of {_name(module)} has no counterpart")
    module.load_state_dict({k: v.detach().clone() for k, v in state.items()}, assign=True)


def _copy_modes(source: nn.Module, target: nn.Module) -> None:
    """Train or eval of each part: a frozen BatchNorm stays frozen."""
    for old, new in zip(source.modules(), target.modules(), strict=True):
        new.training = old.training


def _copy_rates(model: Any, encoder: Encoder) -> None:
    encoder.dropout.p = model.pos_drop.p
    ours: Any
    for block, ours in zip(model.blocks, encoder.blocks, strict=True):
        ours.attn.dropout = block.attn.attn_drop.p
        ours.dropout.p = block.attn.proj_drop.p
        ours.mlp.dropout.p = block.mlp.drop1.p
        ours.drop_path = getattr(block.drop_path1, "drop_prob", 0.0)


def _write_rates(encoder: Encoder, model: Any) -> None:
    model.pos_drop.p = encoder.dropout.p
    ours: Any
    for block, ours in zip(model.blocks, encoder.blocks, strict=True):
        block.attn.attn_drop.p = ours.attn.dropout
        block.attn.proj_drop.p = ours.dropout.p
        block.mlp.drop1.p = block.mlp.drop2.p = ours.mlp.dropout.p
        for name in ("drop_path1", "drop_path2") if ours.drop_path else ():
            setattr(block, name, DropPath(ours.drop_path))


# --- to timm ---


def _timm_options(encoder: Encoder) -> dict[str, Any]:
    """Arguments of `VisionTransformer`, read from the encoder's modules."""
    block: Any = encoder.blocks[0]
    gated = isinstance(block.mlp, OurGatedMlp)
    layer_scale, fc_norm = not _is_identity(block.ls1), not _is_identity(encoder.fc_norm)
    return {
        "global_pool": {ours: theirs for theirs, ours in _POOLS.items()}[encoder.pool_kind],
        "embed_dim": encoder.dim,
        "depth": encoder.depth,
        "num_heads": block.attn.heads,
        "mlp_ratio": _ratio(block.mlp.fc1.out_features, encoder.dim),
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not _is_identity(block.attn.q_norm),
        "init_values": 1.0 if layer_scale else None,
        "class_token": encoder.cls_token is not None,
        "reg_tokens": 0 if encoder.reg_token is None else encoder.reg_token.shape[1],
        "pos_embed": "none" if encoder.pos_embed is None else "learn",
        "no_embed_class": not encoder.position_on_prefix,
        "pre_norm": not _is_identity(encoder.norm_pre),
        "final_norm": fc_norm or not _is_identity(encoder.norm),
        "fc_norm": fc_norm,
        "dynamic_img_size": True,
        "norm_layer": partial(LayerNorm, eps=block.norm1.eps),
        "act_layer": _ACTIVATION_LAYERS[_activation(block.mlp.act)],
        "mlp_layer": SwiGLUPacked if gated else Mlp,
    }


def _timm_embed(stem: Stem) -> tuple[Callable[..., nn.Module], int]:
    """timm's patch embedding of a stem, to be called by `VisionTransformer`, and its patch size."""
    proj: Any = getattr(stem, "proj", None)
    if isinstance(stem, LinearStem):
        return _with_bias(PatchEmbed, proj.bias is not None), stem.patch_px
    if isinstance(stem, ResNetStem):
        backbone: nn.Module = _timm_resnet(stem)
        options: dict[str, Any] = {}
    elif isinstance(stem, FeatureMapStem):
        # float32 on the CPU, because HybridEmbed tries the backbone; the copied tensors replace it
        backbone = copy.deepcopy(stem.backbone).float().cpu()
        options = {"proj": isinstance(proj, nn.Conv2d)}
    else:
        raise ValueError(f"to_timm: the stem {_name(stem)} has no timm counterpart")
    embed = partial(HybridEmbed, backbone=backbone, **options)
    has_bias = getattr(proj, "bias", None) is not None
    return _with_bias(embed, has_bias), proj.stride[0] if isinstance(proj, nn.Conv2d) else 1


def _with_bias(layer: Callable[..., nn.Module], bias: bool) -> Callable[..., nn.Module]:
    # VisionTransformer ties the embedding's bias to pre_norm; ours is free.
    return lambda **options: layer(**(options | {"bias": bias}))


def _timm_resnet(stem: ResNetStem) -> nn.Module:
    """timm's backbone of a `ResNetStem`, its weights not yet copied."""
    groups = stem.root_norm.num_groups
    if groups % 4:  # timm rounds the inner channels, 2 * groups, to multiples of 8
        raise ValueError(f"to_timm: width={groups / 32} is no multiple of 1/8, as timm's must be")
    parts: dict[str, Any] = {
        "act_layer": nn.ReLU,
        "conv_layer": partial(StdConv2dSame, eps=1e-8),
        "norm_layer": partial(GroupNormAct, num_groups=groups),
    }
    root = nn.Sequential()
    kernel, stride = stem.root.kernel_size[0], stem.root.stride[0]
    root.add_module("conv", parts["conv_layer"](3, 2 * groups, kernel, stride=stride))
    root.add_module("norm", parts["norm_layer"](2 * groups))
    if stem.root_pool:
        root.add_module("pool", MaxPool2dSame(3, 2))
    if len(stem.stages) == 0:
        return root
    # Its own root and strides are fixed.
    backbone: Any = ResNetV2([], preact=False, num_classes=0, global_pool="")
    backbone.stem, channels = root, 2 * groups
    blocks: Any
    for i, blocks in enumerate(stem.stages):
        out = 8 * groups * 2**i
        stage = ResNetStage(channels, out, blocks[0].conv2.stride[0], 1, depth=len(blocks),
                            block_fn=Bottleneck, **parts)  # fmt: skip
        backbone.stages.add_module(str(i), stage)
        channels = out
    backbone.num_features = channels
    return backbone  # type: ignore[no-any-return]
