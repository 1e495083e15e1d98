"""The built-in data sets by name.

torchvision downloads and reads all sets but the digits and the folders; the table below says
what it calls them. Its pickles (CIFAR) are opened only after their published MD5 was checked.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from hybridvit.data import packed
from hybridvit.data.dataset import (
    AbsentData,
    Dataset,
    check_image_size,
    data_root,
    from_arrays,
    from_files,
    hold_out,
)
from hybridvit.data.decode import Choice, choose
from hybridvit.data.files import ImageFiles, one_line
from hybridvit.data.folders import image_folder, imagenet
from hybridvit.data.packed import Arrays

MAX_ARRAY_BYTES = 2**30  # of one IDX file; MNIST has 47 MB


def digits(image_size: int | None = None) -> Dataset:
    """Handwritten digits, 1797 grey scans of 8 x 8 pixels, in scikit-learn: needs no download.

    20 % of each class are held out for testing. Grey values 0 to 16 become 0 to 255.

    Raises:
        ValueError: the image size is not possible.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    images = (torch.from_numpy(source.images) * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(source.target).long()
    classes = [str(name) for name in source.target_names]
    train, test, notes = hold_out(labels, classes)
    return from_arrays(
        "digits",
        (images[train], labels[train]),
        (images[test], labels[test]),
        classes,
        image_size,
        notes,
    )


# Arguments that select the parts of the train and of the test split; parts are joined, and a test
# split without parts is held out of the training images.
_Splits = tuple[list[dict[str, object]], list[dict[str, object]]]


@dataclass(frozen=True)
class _Source:
    """How torchvision offers a data set."""

    summary: str
    cls: str  # class in torchvision.datasets
    place: str  # what it looks for below the root
    kind: str  # "idx", "arrays" or "files"
    splits: _Splits
    packed: tuple[str, ...] = ()  # below the root, what "idx" and "arrays" are read from
    image_size: int = 224  # of image files, whose own sizes differ


_BY_FLAG: _Splits = ([{"train": True}], [{"train": False}])
_BY_NAME: _Splits = ([{"split": "train"}], [{"split": "test"}])
# Validation images are split off training here, so that the two official parts are joined.
_JOINED: _Splits = ([{"split": "train"}, {"split": "val"}], [{"split": "test"}])

_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")  # fmt: skip
_BATCHES = ("batches.meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_BINARY = ("class_names.txt", "train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")


def _in(folder: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


_SOURCES = {
    "mnist": _Source(
        "Handwritten digits, 70,000 grey images of 28 x 28 pixels, 10 classes.",
        "MNIST", "MNIST/raw", "idx", _BY_FLAG, _in("MNIST/raw", _IDX),
    ),
    "fashion_mnist": _Source(
        "Clothes, 70,000 grey images of 28 x 28 pixels, 10 classes.",
        "FashionMNIST", "FashionMNIST/raw", "idx", _BY_FLAG, _in("FashionMNIST/raw", _IDX),
    ),
    "kmnist": _Source(
        "Cursive Japanese characters, 70,000 grey images of 28 x 28 pixels, 10 classes.",
        "KMNIST", "KMNIST/raw", "idx", _BY_FLAG, _in("KMNIST/raw", _IDX),
    ),
    "cifar10": _Source(
        "Animals and vehicles, 60,000 colour images of 32 x 32 pixels, 10 classes.",
        "CIFAR10", "cifar-10-batches-py", "arrays", _BY_FLAG,
        _in("cifar-10-batches-py", _BATCHES),
    ),
    "cifar100": _Source(
        "Objects, 60,000 colour images of 32 x 32 pixels, 100 classes.",
        "CIFAR100", "cifar-100-python", "arrays", _BY_FLAG,
        _in("cifar-100-python", ("meta", "train", "test")),
    ),
    "svhn": _Source(
        "House numbers, 99,289 colour images of 32 x 32 pixels, 10 classes.",
        "SVHN", "train_32x32.mat", "arrays", _BY_NAME,
        ("train_32x32.mat", "test_32x32.mat"),
    ),
    "stl10": _Source(
        "Animals and vehicles, 13,000 labelled colour images of 96 x 96 pixels, 10 classes.",
        "STL10", "stl10_binary", "arrays", _BY_NAME,
        _in("stl10_binary", _BINARY),
    ),
    "flowers102": _Source(
        "Flowers, 8,189 photographs, 102 classes; official train and val are joined.",
        "Flowers102", "flowers-102", "files", _JOINED,
    ),
    "oxford_iiit_pet": _Source(
        "Cats and dogs, 7,349 photographs, 37 breeds.",
        "OxfordIIITPet", "oxford-iiit-pet", "files", ([{"split": "trainval"}], [{"split": "test"}]),
    ),
    "food101": _Source(
        "Dishes, 101,000 photographs, 101 classes.",
        "Food101", "food-101", "files", _BY_NAME,
    ),
    "eurosat": _Source(
        "Land use, 27,000 satellite images of 64 x 64 pixels, 10 classes; 20 % held out.",
        "EuroSAT", "eurosat/2750", "files", ([{}], []), image_size=64,
    ),
    "dtd": _Source(
        "Textures, 5,640 photographs, 47 classes; partition 1, official train and val joined.",
        "DTD", "dtd/dtd", "files", _JOINED,
    ),
    "gtsrb": _Source(
        "German traffic signs, 39,270 photographs, 43 classes.",
        "GTSRB", "gtsrb/GTSRB", "files", _BY_NAME, image_size=48,
    ),
}  # fmt: skip


def datasets_table() -> dict[str, Callable[..., Dataset]]:
    """Name to factory; a factory's keyword arguments are what a config may set."""
    table: dict[str, Callable[..., Dataset]] = {
        "digits": digits,
        "image_folder": image_folder,
        "imagenet": imagenet,
    }
    return table | {name: _factory(name, source) for name, source in _SOURCES.items()}


def _factory(name: str, source: _Source) -> Callable[..., Dataset]:
    """A data set's factory; only one of image files has a decoder to choose."""

    def arrays(
        root: str | None = None, download: bool = False, image_size: int | None = None
    ) -> Dataset:
        if image_size is not None:
            check_image_size(image_size)  # before anything is downloaded
        folder = data_root(root)
        read = _read_idx_set if source.kind == "idx" else _read_arrays
        files = [_stored(folder / file) for file in source.packed]
        unpacked = packed.load(name, files, partial(read, name, source, folder, download))
        return from_arrays(name, *unpacked, image_size)

    def files(
        root: str | None = None,
        download: bool = False,
        image_size: int | None = None,
        decoder: Choice = "pil",
    ) -> Dataset:
        size = source.image_size if image_size is None else image_size
        check_image_size(size)
        choose(decoder)
        return _load_files(name, source, data_root(root), download, size, decoder)

    load = files if source.kind == "files" else arrays
    load.__doc__ = source.summary
    load.__name__ = load.__qualname__ = name
    return load


def _read_idx_set(name: str, source: _Source, root: Path, download: bool) -> Arrays:
    """MNIST-like sets, also where only the compressed files are present and root is read-only."""
    files = [root / file for file in source.packed]
    if not all(_stored(path).exists() for path in files):
        _open_torchvision(name, source, root, download, {"train": True})
    images, labels, test_images, test_labels = (_read_idx(_stored(path)) for path in files)
    import torchvision

    classes = list(getattr(torchvision.datasets, source.cls).classes)
    train, test = (images[:, None], labels.long()), (test_images[:, None], test_labels.long())
    return Arrays(train, test, classes)


def _read_arrays(name: str, source: _Source, root: Path, download: bool) -> Arrays:
    """Sets that torchvision holds as arrays."""
    parts = [
        _open_torchvision(name, source, root, download, arguments)
        for arguments in (*source.splits[0], *source.splits[1])
    ]
    arrays = []
    for part in parts:
        images = torch.from_numpy(part.data)
        if images.shape[-1] == 3:  # CIFAR keeps channels last
            images = images.permute(0, 3, 1, 2)
        labels = part.targets if hasattr(part, "targets") else part.labels
        arrays.append((images.contiguous(), torch.as_tensor(labels).long()))
    return Arrays(arrays[0], arrays[1], _classes(parts[0], arrays[0][1]))


def _load_files(
    name: str, source: _Source, root: Path, download: bool, image_size: int, decoder: Choice
) -> Dataset:
    opened = [
        [_open_torchvision(name, source, root, download, arguments) for arguments in split]
        for split in source.splits
    ]
    splits: list[tuple[ImageFiles, Tensor]] = []
    for parts in opened:
        listed = [_listing(part) for part in parts]
        files = ImageFiles(str(root), [str(path) for paths, _ in listed for path in paths])
        splits.append((files, torch.tensor([label for _, labels in listed for label in labels])))
    classes = _classes(opened[0][0], splits[0][1])
    notes: list[str] = []
    if not source.splits[1]:
        files, labels = splits[0]
        train, test, notes = hold_out(labels, classes)
        splits = [
            (ImageFiles(str(root), [files.paths[i] for i in index.tolist()]), labels[index])
            for index in (train, test)
        ]
    return from_files(name, splits[0], splits[1], classes, 3, image_size, decoder, notes)


def _open_torchvision(
    name: str, source: _Source, root: Path, download: bool, arguments: dict[str, object]
) -> Any:
    """A torchvision data set.

    Raises:
        ValueError: it is absent, damaged, or could not be downloaded.
    """
    import torchvision

    cls = getattr(torchvision.datasets, source.cls)
    where = (
        "set data.args.root or the environment variable HYBRIDVIT_DATA to the folder that holds "
        f"{source.place}"
    )
    try:
        return cls(str(root), **arguments, download=download)
    except Exception as error:  # a damaged file or a broken connection raises anything
        if download:
            problem = f"could not be downloaded to {str(root)!r} ({one_line(error)})"
            advice = f"check the connection, or {where}"
        elif not (root / source.place).exists():
            problem = f"was not found: {str(root)!r} has no {source.place}"
            advice = f"{where}, or data.args.download=true with a connection"
        else:
            damaged = _damaged(cls, root) or root / source.place
            problem = f"is incomplete or damaged: {str(damaged)!r} ({one_line(error)})"
            advice = "delete it, and restore it or set data.args.download=true with a connection"
        kind = AbsentData if problem.startswith("was not found") else ValueError
        raise kind(f"data set {name!r} {problem}; {advice}") from None


def _damaged(cls: Any, root: Path) -> Path | None:
    """The first file that is missing or has another MD5 than published, where these are known."""
    from torchvision.datasets.utils import check_integrity

    folder = root / getattr(cls, "base_folder", "")
    known = [*getattr(cls, "train_list", []), *getattr(cls, "test_list", [])]
    if meta := getattr(cls, "meta", None):
        known.append((meta["filename"], meta["md5"]))
    damaged = (folder / file for file, md5 in known if not check_integrity(folder / file, md5))
    return next(damaged, None)


def _listing(dataset: Any) -> tuple[list[Any], list[int]]:
    """Paths and labels; torchvision has no public name for them, and decodes for each label."""
    for pairs in ("samples", "_samples"):
        if hasattr(dataset, pairs):
            samples = getattr(dataset, pairs)
            return [path for path, _ in samples], [label for _, label in samples]
    paths = dataset._image_files if hasattr(dataset, "_image_files") else dataset._images
    return paths, dataset._labels


def _classes(dataset: Any, labels: Tensor) -> list[str]:
    """Class names; numbers where torchvision has none."""
    names = getattr(dataset, "classes", None)
    return list(names) if names else [str(i) for i in range(int(labels.max()) + 1)]


def _stored(path: Path) -> Path:
    """The file, or its compressed form where only that exists."""
    compressed = path.with_name(path.name + ".gz")
    return compressed if compressed.exists() and not path.exists() else path


def _read_idx(path: Path) -> Tensor:
    """The uint8 array of an IDX file, compressed or not (format: yann.lecun.com/exdb/mnist).

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else open(path, "rb")) as file:
            magic = file.read(4)
            # Two zero bytes, 8 for uint8, the number of dimensions; then each as big-endian int32.
            if magic[:3] != b"\0\0\x08" or magic[3] not in (1, 3):
                raise ValueError("it does not start like an IDX file of bytes")
            shape = [int.from_bytes(file.read(4), "big") for _ in range(magic[3])]
            # The size is read, not trusted: a small compressed file may unpack to terabytes.
            size = math.prod(shape)
            content = file.read(min(size, MAX_ARRAY_BYTES) + 1)
            if len(content) != size:
                raise ValueError(f"its header says {size} bytes, not what follows it")
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise ValueError(
            f"file {os.fspath(path)!r} is damaged ({one_line(error)}); delete it, and restore it "
            "or set data.args.download=true with a connection"
        ) from None
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(shape)
