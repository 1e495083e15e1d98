"""Train a small vision transformer as a user of timm does, on timm's own factories.

The model, augmentation, optimizer and schedule are those of configs/fashion_mnist.yaml and
configs/cifar10.yaml: python timm_train.py cifar10 FOLDER --images 5000 --epochs 5
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.data.transforms import ToNumpy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torchvision import transforms

SIZE = {"fashion_mnist": 28, "cifar10": 32}
STATISTICS = {
    "fashion_mnist": ((0.286,) * 3, (0.353,) * 3),
    "cifar10": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
}
AUGMENT = {
    "fashion_mnist": [transforms.RandomHorizontalFlip()],
    "cifar10": [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()],
}


def make_loader(args: argparse.Namespace, device: torch.device, train: bool):
    data = create_dataset(f"torch/{args.data}", args.root, split="train" if train else "test")
    if train:
        data.data, data.targets = data.data[: args.images], data.targets[: args.images]
    loader = create_loader(
        data,
        input_size=(3, SIZE[args.data], SIZE[args.data]),
        batch_size=128 if train else 512,
        is_training=train,
        mean=STATISTICS[args.data][0],
        std=STATISTICS[args.data][1],
        num_workers=args.workers,
        device=device,
    )
    augment = AUGMENT[args.data] if train else []
    data.transform = transforms.Compose([transforms.Lambda(in_colour), *augment, ToNumpy()])
    return loader


def in_colour(image):
    return image.convert("RGB")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=SIZE)
    parser.add_argument("root")
    parser.add_argument("--images", type=int)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = (make_loader(args, device, is_train) for is_train in (True, False))
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE[args.data],
        patch_size=4,
        embed_dim=128,
        depth=4,
        num_heads=4,
        global_pool="avg",
        fc_norm=False,
        num_classes=10,
    ).to(device)
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=4e-3 * 128 / 256, weight_decay=0.05, betas=(0.9, 0.95)
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=args.epochs,
        warmup_epochs=1,
        warmup_lr=1e-5,
        step_on_epochs=False,
        updates_per_epoch=len(train),
    )

    step = 0
    for epoch in range(args.epochs):
        model.train()
        for images, labels in train:
            with torch.autocast(device.type, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            scheduler.step_update(step)
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

    model.eval()
    right = 0
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        for images, labels in test:
            right += (model(images).argmax(1) == labels).sum().item()
    print(f"test/accuracy {right / len(test.dataset):.1%}")


if __name__ == "__main__":
    main()
