"""The training steps of timm, lightly and transformers, as their users write them.

Each is imported by the function that needs it: a peer that is not installed is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import Model, Training
from noise import MEAN, STD, pictures
from settings import Setting
from torch import Tensor, nn
from turns import Turns, device, ready

Loss = Callable[[Any, Tensor, Tensor], Tensor]  # of model, normalised images and labels
HYBRIDS = {"r26": "vit_small_r26_s32_224", "r50": "vit_base_r50_s16_224"}


def training(framework: str, job: Training, setting: Setting) -> Turns:
    """Training steps of a peer on one batch that stays on the device."""
    where = device()
    model, loss_of = PEERS[framework](job, setting)
    model = model.to(where).train()
    optimizer = make_optimizer(framework, model, setting)
    images, labels = (tensor.to(where) for tensor in normalised_batch(job))
    called = torch.compile(model) if setting.compile else model

    def step() -> int:
        with torch.autocast(where.type, torch.bfloat16, enabled=setting.bf16):
            loss = loss_of(called, images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return job.batch

    return ready(step, parameters=sum(p.numel() for p in model.parameters() if p.requires_grad))


def normalised_batch(job: Training) -> tuple[Tensor, Tensor]:
    """The images that ours trains on, normalised (B, 3, H, W), and labels (B,)."""
    pixels, labels = pictures(job.batch, job.image, job.classes)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std, labels


def make_optimizer(framework: str, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    """AdamW, from timm's factory for timm."""
    fused: dict[str, Any] = {"fused": True} if setting.fused_optimizer else {}
    if framework != "timm":
        return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, **fused)
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, **fused)


# --- timm ---


def timm_model(job: Training, setting: Setting) -> tuple[nn.Module, Loss]:
    """A classifier of timm."""
    return timm_vit(job, setting, num_classes=job.classes), _classify


def timm_vit(job: Training, setting: Setting, **options: Any) -> Any:
    """A vision transformer of timm, by `create_model`."""
    import timm
    from timm.layers.config import set_fused_attn

    set_fused_attn(not setting.plain_attention)  # what TIMM_FUSED_ATTN=0 does
    name = HYBRIDS.get(job.stem, "vit_tiny_patch16_224")
    if job.stem == "linear":
        options["patch_size"] = job.patch
    model = job.model
    sizes: dict[str, Any] = {"embed_dim": model.dim, "depth": model.depth, "num_heads": model.heads}
    return timm.create_model(name, img_size=job.image, **sizes, **options)


def _classify(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


# --- lightly ---


def lightly_model(job: Training, setting: Setting) -> tuple[nn.Module, Loss]:
    """A masked autoencoder of lightly's modules over a transformer of timm."""
    assert job.decoder is not None
    vit = timm_vit(job, setting, num_classes=0)
    return make_lightly_mae(job.patch, job.decoder, vit), _reconstruct


def make_lightly_mae(patch: int, size: Model, vit: Any) -> nn.Module:
    """As lightly's example of its masked autoencoder, with normalised target pixels."""
    from lightly.models import utils
    from lightly.models.modules import (
        MaskedVisionTransformerDecoderTIMM,
        MaskedVisionTransformerTIMM,
    )

    class MAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = MaskedVisionTransformerTIMM(vit=vit)
            self.decoder_embed = nn.Linear(vit.embed_dim, size.dim)
            self.decoder = MaskedVisionTransformerDecoderTIMM(
                num_patches=vit.patch_embed.num_patches,
                embed_dim=size.dim,
                depth=size.depth,
                num_heads=size.heads,
            )
            self.prediction_head = nn.Linear(size.dim, 3 * patch**2)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            shape = (len(images), self.backbone.sequence_length)
            keep, masked = utils.random_token_mask(shape, 0.75, device=images.device)
            encoded = self.decoder_embed(self.backbone.encode(images, idx_keep=keep))
            tokens = utils.repeat_token(self.decoder.mask_token, shape)
            tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
            predicted = self.prediction_head(utils.get_at_index(self.decoder(tokens), masked))
            patches = utils.normalize_mean_var(utils.patchify(images, patch))
            return predicted, utils.get_at_index(patches, masked - 1)  # without the class token

    return MAE()


def _reconstruct(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(*model(images))


# --- transformers ---


def transformers_model(job: Training, setting: Setting) -> tuple[nn.Module, Loss]:
    """The masked autoencoder of transformers."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    assert job.decoder is not None
    options: dict[str, Any] = {"attn_implementation": "eager"} if setting.plain_attention else {}
    config = ViTMAEConfig(
        hidden_size=job.model.dim,
        num_hidden_layers=job.model.depth,
        num_attention_heads=job.model.heads,
        intermediate_size=4 * job.model.dim,
        image_size=job.image,
        patch_size=job.patch,
        decoder_hidden_size=job.decoder.dim,
        decoder_num_hidden_layers=job.decoder.depth,
        decoder_num_attention_heads=job.decoder.heads,
        decoder_intermediate_size=4 * job.decoder.dim,
        norm_pix_loss=True,
        **options,
    )
    return ViTMAEForPreTraining(config), _own_loss


def _own_loss(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = model(images).loss
    return loss


PEERS: dict[str, Callable[[Training, Setting], tuple[nn.Module, Loss]]] = {
    "timm": timm_model,
    "lightly": lightly_model,
    "transformers": transformers_model,
}
