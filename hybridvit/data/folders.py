"""Data sets that are folders: one folder of images a class."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hybridvit.data.dataset import (
    AbsentData,
    Dataset,
    check_image_size,
    data_root,
    from_files,
    hold_out,
)
from hybridvit.data.decode import Choice, choose
from hybridvit.data.files import SUFFIXES, ImageFiles, absolute, list_images, some

SPLITS = {"train", "val", "valid", "validation", "test"}  # names of folders of class folders
HEADERS_CHECKED = 100_000  # files; reading the headers of more takes minutes


def image_folder(root: str, image_size: int = 224, decoder: Choice = "pil") -> Dataset:
    """Your own images: one folder a class, below root or below root/train and root/test.

    Without root/test, root/val serves as test split; without both, 20 % of each class are held
    out. Files that are no images are ignored and noted.

    Raises:
        ValueError: no such folder, fewer than two classes, a class without images, a file that
            is no readable image.
    """
    folder = absolute(root, "data.args.root")
    return _from_folder("image_folder", folder, image_size, decoder)


def imagenet(root: str | None = None, image_size: int = 224, decoder: Choice = "pil") -> Dataset:
    """ImageNet-1k: 1.28 M photographs, 1000 classes, tested on its validation images.

    Reads extracted class folders, `train/` and `val/`, below root or root/imagenet; it cannot be
    downloaded without an account.

    Raises:
        ValueError: the folders are absent or hold no readable images.
    """
    folder = data_root(root)
    folder = folder / "imagenet" if (folder / "imagenet").is_dir() else folder
    if not ((folder / "train").is_dir() and (folder / "val").is_dir()):
        raise AbsentData(
            f"data set 'imagenet' was not found: {str(folder)!r} has no train/ and val/ with one "
            "folder a class; set data.args.root or the environment variable HYBRIDVIT_DATA to "
            "the folder that holds them (download: https://image-net.org, needs an account)"
        )
    data = _from_folder("imagenet", folder, image_size, decoder, tests=("val",))
    if len(data.classes) != 1000:
        data.notes.append(f"{len(data.classes)} class folders, where ImageNet-1k has 1000")
    return data


@dataclass
class _Listing:
    """Image files of a folder of class folders."""

    classes: list[str]
    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def _from_folder(
    name: str,
    root: Path,
    image_size: int,
    decoder: Choice,
    tests: tuple[str, ...] = ("test", "val"),
) -> Dataset:
    """`tests`: names that the folder of test images may have, the first one first."""
    check_image_size(image_size)  # before any file is read
    choose(decoder)
    _check_folder(root)
    notes: list[str] = []
    # A folder of images called 'train' is a class; one of folders is a split.
    if not (root / "train").is_dir() or not _subfolders(root / "train"):
        train, test_root = _list_classes(root), None
        if set(train.classes) <= SPLITS:
            raise ValueError(
                f"image folder {str(root)!r} has images in {' and '.join(train.classes)}, without "
                "class folders; put those of each class into a folder of their own below these"
            )
    else:
        train = _list_classes(root / "train")
        test_root = next((root / t for t in tests if (root / t).is_dir()), None)
        is_test = test_root is not None and test_root.name == "test"
        if is_test and (root / "val").is_dir():
            notes.append("val/ is not used: validation images are split off train/")
    test = None if test_root is None else _list_test(test_root, train.classes, notes)
    if ignored := train.ignored + (test.ignored if test else Counter()):
        kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(5))
        notes.append(f"files that are ignored: {kinds}")

    channels = 3
    listings = [train] if test is None else [train, test]
    if sum(len(listing.paths) for listing in listings) <= HEADERS_CHECKED:
        grey = [ImageFiles(str(root), listing.paths).are_grey() for listing in listings]
        channels = 1 if all(grey) else 3
    else:
        notes.append(f"more than {HEADERS_CHECKED} images: damaged ones are found when read")

    if test is None:
        labels = torch.tensor(train.labels)
        kept, held, held_notes = hold_out(labels, train.classes)
        notes += held_notes
        parts = [
            (ImageFiles(str(root), [train.paths[i] for i in index.tolist()]), labels[index])
            for index in (kept, held)
        ]
    else:
        parts = [
            (ImageFiles(str(root), listing.paths), torch.tensor(listing.labels))
            for listing in (train, test)
        ]
    return from_files(name, parts[0], parts[1], train.classes, channels, image_size, decoder, notes)


def _list_classes(folder: Path) -> _Listing:
    """All class folders and their images.

    Raises:
        ValueError: fewer than two class folders, or one without images.
    """
    listing = _Listing(_subfolders(folder))
    if not listing.classes:
        raise ValueError(
            f"image folder {str(folder)!r} has no class folders; put the images of each class "
            "into a folder of their own"
        )
    for label, name in enumerate(listing.classes):
        if not _add(listing, folder / name, label):
            raise ValueError(
                f"class folder {str(folder / name)!r} has no images; remove it, or fill it with "
                f"files that end in {' '.join(SUFFIXES)}"
            )
    listing.ignored += _outside(folder)
    if len(listing.classes) == 1:
        raise ValueError(
            f"image folder {str(folder)!r} has one class, {listing.classes[0]!r}; "
            "classification needs at least two class folders"
        )
    return listing


def _list_test(folder: Path, classes: list[str], notes: list[str]) -> _Listing:
    """Test images of the training classes.

    Raises:
        ValueError: a class folder that training does not have, or no image at all.
    """
    found = _subfolders(folder)
    if unknown := [name for name in found if name not in set(classes)]:
        raise ValueError(
            f"test folder {str(folder)!r} has class folders that train/ lacks: {some(unknown)}; "
            "add them to train/ or remove them"
        )
    listing = _Listing(classes)
    empty = [
        name
        for label, name in enumerate(classes)
        if name not in found or not _add(listing, folder / name, label)
    ]
    if not listing.paths:
        raise ValueError(
            f"test folder {str(folder)!r} has no images; fill its class folders or remove it"
        )
    if empty:
        notes.append(f"classes without test images: {some(empty)}")
    return listing


def _add(listing: _Listing, folder: Path, label: int) -> bool:
    """Add the images of one class folder; whether there are any."""
    paths, others = list_images(folder)
    listing.paths += paths
    listing.labels += [label] * len(paths)
    listing.ignored += others
    return bool(paths)


def _outside(folder: Path) -> Counter[str]:
    """How many images lie beside the class folders, or in hidden ones, which are no classes."""
    found = Counter[str]()
    for entry in os.scandir(folder):
        if not entry.is_dir():
            found["images outside of class folders"] += entry.name.lower().endswith(SUFFIXES)
        elif entry.name.startswith("."):
            found["images in hidden folders"] += len(list_images(Path(entry.path))[0])
    return +found


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    problem = "is a file" if folder.exists() else "does not exist"
    raise AbsentData(
        f"image folder {str(folder)!r} {problem}; set data.args.root to a folder of class folders"
    )


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones; links are followed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise ValueError(
            f"folder {str(folder)!r} cannot be read ({error.strerror}); check its permissions"
        ) from None
