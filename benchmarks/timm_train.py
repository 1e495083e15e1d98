"""Train a small vision transformer as a user of timm does, on timm's own factories.

Model, augmentation, optimizer and schedule are those of configs/fashion_mnist.yaml and
configs/cifar10.yaml: python timm_train.py cifar10 FOLDER --images 5000 --epochs 5
"""

from __future__ import annotations

import argparse
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.data.transforms import ToNumpy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torchvision import transforms

BATCH, LR, WEIGHT_DECAY, BETAS, CLIP = 128, 2e-3, 0.05, (0.9, 0.95), 1.0
SIZE = {"fashion_mnist": 28, "cifar10": 32}
STATISTICS = {
    "fashion_mnist": ((0.286,) * 3, (0.353,) * 3),
    "cifar10": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
}
AUGMENT = {
    "fashion_mnist": [transforms.RandomHorizontalFlip()],
    "cifar10": [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()],
}


def make_model(data: str) -> nn.Module:
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE[data],
        patch_size=4,
        embed_dim=128,
        depth=4,
        num_heads=4,
        global_pool="avg",
        fc_norm=False,
        num_classes=10,
    )
    return model


def make_loader(args: argparse.Namespace, device: torch.device, train: bool) -> Any:
    data = create_dataset(f"torch/{args.data}", args.root, split="train" if train else "test")
    if train:
        data.data, data.targets = data.data[: args.images], data.targets[: args.images]
    loader = create_loader(
        data,
        input_size=(3, SIZE[args.data], SIZE[args.data]),
        batch_size=BATCH if train else 512,
        is_training=train,
        mean=STATISTICS[args.data][0],
        std=STATISTICS[args.data][1],
        num_workers=args.workers,
        device=device,
    )
    augment = AUGMENT[args.data] if train else []
    data.transform = transforms.Compose([in_colour, *augment, ToNumpy()])
    return loader


def in_colour(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def make_scheduler(optimizer: torch.optim.Optimizer, epochs: int, steps: int) -> Any:
    """One epoch of warm-up, then a cosine from the peak to the end; `steps` in an epoch."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=max(1, epochs - 1),
        warmup_epochs=1,
        warmup_prefix=True,
        warmup_lr=1e-5,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return scheduler


def train(args: argparse.Namespace, model: nn.Module, loader: Any, device: torch.device) -> None:
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY, betas=BETAS
    )
    scheduler = make_scheduler(optimizer, args.epochs, len(loader))
    model.train()
    step = 0
    for epoch in range(args.epochs):
        for images, labels in loader:
            with torch.autocast(device.type, torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            step += 1
            scheduler.step_update(step)
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")


def accuracy(model: nn.Module, loader: Any, device: torch.device) -> float:
    model.eval()
    right = 0
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        for images, labels in loader:
            right += int((model(images).argmax(1) == labels).sum())
    return right / len(loader.dataset)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=SIZE)
    parser.add_argument("root")
    parser.add_argument("--images", type=int)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(args.data).to(device)
    train(args, model, make_loader(args, device, train=True), device)
    found = accuracy(model, make_loader(args, device, train=False), device)
    print(f"test/accuracy {found:.1%}")


if __name__ == "__main__":
    main()
