"""The built-in data sets, read from small copies of their layout or from real files."""

from __future__ import annotations

import csv
import gzip
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hybridvit import build
from hybridvit.config import DataConfig, RunConfig
from hybridvit.data.catalog import datasets_table
from hybridvit.data.dataset import Dataset
from hybridvit.registry import Registry

TABLE = datasets_table()
DOWNLOADED = sorted(TABLE.keys() - {"digits", "image_folder", "imagenet"})


def real(name: str) -> Dataset:
    """A data set from the real files, or a skipped test."""
    if "HYBRIDVIT_DATA" not in os.environ:
        pytest.skip("HYBRIDVIT_DATA is not set")
    try:
        return TABLE[name]()
    except ValueError as error:
        if "was not found" not in str(error):
            raise
        pytest.skip(str(error))


def save(path: Path, colour: int = 100, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour,) * 3).save(path)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(header + array.tobytes())


def write_mnist(folder: Path, suffix: str) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    for part, count in (("train", 7), ("t10k", 3)):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images[:count])
        labels = np.arange(count, dtype=np.uint8)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
    return images


FILE_SETS = {"flowers102", "oxford_iiit_pet", "food101", "eurosat", "dtd", "gtsrb"}


def test_factories_fit_the_registry() -> None:
    registry: Registry[Dataset] = Registry("dataset")
    for name, factory in TABLE.items():
        registry.add(name, factory)
        assert registry.owners[name].endswith(name)
        assert 20 < len(registry.summary(name)) <= 100
        assert registry.summary(name).endswith(".")
    for name in DOWNLOADED:
        expected = {"root": "/x", "download": False, "image_size": 64}
        decoder = {"decoder": "pil"} if name in FILE_SETS else {}
        assert registry.resolve(name, {"image_size": 64, "root": "/x"}) == expected | decoder
    with pytest.raises(ValueError, match="did you mean 'image_size'"):
        registry.resolve("cifar10", {"imagesize": 3})


def test_importing_is_light() -> None:
    code = (
        "import sys, hybridvit.data.catalog, hybridvit.data.loader, hybridvit.data.resident\n"
        "print([m for m in ('torchvision', 'PIL', 'sklearn', 'scipy') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_digits() -> None:
    data = TABLE["digits"]()
    assert len(data.train) + len(data.test) == 1797
    counts = data.train.labels.bincount() + data.test.labels.bincount()
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.image_size == (8, 8)
    assert data.channels == 1
    pixels = torch.stack([data.train.read(i) for i in range(len(data.train))])
    assert set(pixels.unique().tolist()) == {round(v * 255 / 16) for v in range(17)}
    assert data.spec().classes == 10
    again = TABLE["digits"]()
    assert torch.equal(again.test.labels, data.test.labels)
    assert torch.equal(again.test.read(5), data.test.read(5))


def test_digits_keeps_images_with_their_labels() -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    known = {
        tuple(np.rint(image * 255 / 16).astype(int).ravel()): int(label)
        for image, label in zip(source.images, source.target, strict=True)
    }
    for split in (TABLE["digits"]().train, TABLE["digits"]().test):
        for i in range(0, len(split), 17):
            assert known[tuple(split.read(i).flatten().tolist())] == int(split.labels[i])


def test_digits_can_be_enlarged() -> None:
    data = TABLE["digits"](image_size=16)
    assert data.train.read(0).shape == (1, 16, 16)
    assert data.image_size == (16, 16)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_absent_data_says_what_to_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"data set '{name}' was not found") as caught:
        TABLE[name](root=str(tmp_path))
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(tmp_path), "data.args.root", "HYBRIDVIT_DATA", "data.args.download=true"):
        assert part in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn", "dtd"])
def test_a_failed_download_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import urllib.error
    import urllib.request

    def refuse(*args: object, **options: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match=f"data set '{name}' could not be downloaded") as caught:
        TABLE[name](root=str(tmp_path), download=True)
    assert "\n" not in str(caught.value)
    assert "no route" in str(caught.value)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_image_size_is_checked_first(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size=0 should be 1 to 4096 pixels"):
        TABLE[name](root=str(tmp_path), image_size=0)


def test_root_defaults_to_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDVIT_DATA", str(tmp_path / "here"))
    with pytest.raises(ValueError, match=str(tmp_path / "here")):
        TABLE["mnist"]()
    monkeypatch.delenv("HYBRIDVIT_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=str(tmp_path / "data")):
        TABLE["mnist"]()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_is_read_compressed_or_not(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_mnist(tmp_path / "KMNIST" / "raw", suffix)
    before = sorted(tmp_path.rglob("*"))
    data = TABLE["kmnist"](root=str(tmp_path))
    assert torch.equal(data.train.read_many(range(7)), torch.from_numpy(images)[:, None])
    assert data.test.labels.tolist() == [0, 1, 2]
    assert data.classes[1] == "ki"
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written into the root
    check_unpacked_once("kmnist", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "does not start like an IDX file"),
        (b"\x80\x04 a pickle", "does not start like an IDX file"),
        (bytes([0, 0, 8, 3]) + b"\xff" * 12, "header says"),
        (bytes([0, 0, 8, 3]) + bytes([0, 0, 0, 1]) * 3, "header says"),
        (bytes([0, 0, 8, 3]) + bytes([0, 0, 0, 1]) * 3 + b"ab", "header says"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path: Path, content: bytes, problem: str) -> None:
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder, ".gz")
    damaged = folder / "t10k-images-idx3-ubyte.gz"
    damaged.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=problem) as caught:
        TABLE["mnist"](root=str(tmp_path))
    assert str(damaged) in str(caught.value)
    damaged.write_bytes(b"not even gzip")
    with pytest.raises(ValueError, match="is damaged"):
        TABLE["mnist"](root=str(tmp_path))


def test_labels_of_no_class_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder, "")
    for part, count in (("t10k", 3), ("train", 7)):
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(4, 4 + count, dtype=np.uint8))
    config = RunConfig(data=DataConfig("mnist", {"root": str(tmp_path)}))
    with pytest.raises(ValueError, match="training labels are 4 to 10, and should be 0 to 9"):
        build.make_dataset(config, build.make_parts([])[0])


def test_altered_pickles_are_never_opened(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return os.mkdir, (str(tmp_path / "attacked"),)

    import pickle

    for folder, names in (
        ("cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]),
        ("cifar-100-python", ["train", "test"]),
    ):
        (tmp_path / folder).mkdir()
        for file in (*names, "batches.meta", "meta"):
            (tmp_path / folder / file).write_bytes(pickle.dumps(Attack()))
    for name, first in (("cifar10", "data_batch_1"), ("cifar100", "train")):
        with pytest.raises(ValueError, match="is incomplete or damaged") as caught:
            TABLE[name](root=str(tmp_path))
        assert first in str(caught.value)
    assert not (tmp_path / "attacked").exists()


def check_unpacked_once(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set comes from the cache, without its files being opened, and is the same."""

    def refused(*_: object) -> None:
        raise AssertionError("opened again")

    one = TABLE[name](root=str(root))
    with monkeypatch.context() as patched:
        for function in ("_open_torchvision", "_read_idx"):
            patched.setattr(f"hybridvit.data.catalog.{function}", refused)
        other = TABLE[name](root=str(root))
    assert other.classes == one.classes
    for a, b in ((one.train, other.train), (one.test, other.test)):
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.read_many(range(len(a))), b.read_many(range(len(b))))


def test_array_sets_become_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
    from torchvision.datasets import STL10, SVHN

    for cls in (STL10, SVHN):
        monkeypatch.setattr(cls, "_check_integrity", lambda self: True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    for part in ("train", "test"):
        content = {"X": pixels.transpose(2, 3, 1, 0), "y": np.array([[10], [1], [2], [9]])}
        savemat(tmp_path / f"{part}_32x32.mat", content)
    data = TABLE["svhn"](root=str(tmp_path))
    assert torch.equal(data.train.read_many(range(4)), torch.from_numpy(pixels))
    assert data.test.labels.tolist() == [0, 1, 2, 9]
    assert data.classes == [str(i) for i in range(10)]
    check_unpacked_once("svhn", tmp_path, monkeypatch)

    large = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    (tmp_path / "stl10_binary").mkdir()
    for part in ("train", "test"):
        large.transpose(0, 1, 3, 2).tofile(tmp_path / "stl10_binary" / f"{part}_X.bin")
        np.array([1, 10], dtype=np.uint8).tofile(tmp_path / "stl10_binary" / f"{part}_y.bin")
    (tmp_path / "stl10_binary" / "class_names.txt").write_text("\n".join("abcdefghij") + "\n")
    data = TABLE["stl10"](root=str(tmp_path))
    assert torch.equal(data.test.read(1), torch.from_numpy(large[1]))
    assert data.test.labels.tolist() == [0, 9]
    check_unpacked_once("stl10", tmp_path, monkeypatch)


def test_cifar_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    for file in ("train", "test"):
        content = {"data": pixels.reshape(2, 3072), "fine_labels": [1, 0]}
        (folder / file).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bee"]}))
    data = TABLE["cifar100"](root=str(tmp_path))
    assert torch.equal(data.train.read_many([0, 1]), torch.from_numpy(pixels))
    assert data.test.labels.tolist() == [1, 0]
    assert data.classes == ["apple", "bee"]
    check_unpacked_once("cifar100", tmp_path, monkeypatch)


def make_eurosat(root: Path) -> None:
    for label, name in enumerate(("Forest", "River")):
        for i in range(5):
            save(root / "eurosat" / "2750" / name / f"{i}.jpg", 100 * label)


def make_gtsrb(root: Path) -> None:
    base = root / "gtsrb" / "GTSRB"
    for label in range(2):
        save(base / "Training" / f"{label:05}" / "0.ppm", 100 * label)
    save(base / "Final_Test" / "Images" / "0.ppm", 100)
    with open(root / "gtsrb" / "GT-final_test.csv", "w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([["Filename", "ClassId"], ["0.ppm", "1"]])


def make_food(root: Path) -> None:
    (root / "food-101" / "meta").mkdir(parents=True)
    for part in ("train", "test"):
        listed = {name: [f"{name}/{part}"] for name in ("apple_pie", "waffles")}
        (root / "food-101" / "meta" / f"{part}.json").write_text(json.dumps(listed))
        for label, name in enumerate(listed):
            save(root / "food-101" / "images" / name / f"{part}.jpg", 100 * label)


def make_dtd(root: Path) -> None:
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for part in ("train", "val", "test"):
        (base / "labels" / f"{part}1.txt").write_text(f"banded/{part}.jpg\ndotted/{part}.jpg\n")
        for label, name in enumerate(("banded", "dotted")):
            save(base / "images" / name / f"{part}.jpg", 100 * label)


def make_pet(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for part in ("trainval", "test"):
        lines = [f"cat_{part} 1 1 1", f"dog_{part} 2 2 1"]
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines))
        for label, name in enumerate(("cat", "dog")):
            save(base / "images" / f"{name}_{part}.jpg", 100 * label)


def make_flowers(root: Path) -> None:
    from scipy.io import savemat

    base = root / "flowers-102"
    base.mkdir(parents=True)
    savemat(base / "imagelabels.mat", {"labels": np.array([1, 2, 1, 2, 1, 2])})
    savemat(base / "setid.mat", {"trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6]})
    for i in range(1, 7):
        save(base / "jpg" / f"image_{i:05}.jpg", 100 * (1 - i % 2))


@pytest.mark.parametrize(
    ("name", "make", "counts", "size"),
    [
        ("eurosat", make_eurosat, (8, 2), 64),
        ("gtsrb", make_gtsrb, (2, 1), 48),
        ("food101", make_food, (2, 2), 224),
        ("dtd", make_dtd, (4, 2), 224),
        ("oxford_iiit_pet", make_pet, (2, 2), 224),
        ("flowers102", make_flowers, (4, 2), 224),
    ],
)
def test_file_sets_are_read_from_their_layout(
    name: str,
    make: Callable[[Path], None],
    counts: tuple[int, int],
    size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(tmp_path)
    if name == "flowers102":  # its lists are checked against their published MD5
        monkeypatch.setattr("torchvision.datasets.Flowers102._check_integrity", lambda self: True)
    data = TABLE[name](root=str(tmp_path))
    assert (len(data.train), len(data.test)) == counts
    assert data.image_size == (size, size)
    for split in (data.train, data.test):
        for i in range(len(split)):
            grey = float(split.read(i).float().mean())
            assert round(grey / 100) == int(split.labels[i])
    assert TABLE[name](root=str(tmp_path), image_size=12).train.read(0).shape == (3, 12, 12)


def test_real_fashion_mnist() -> None:
    data = real("fashion_mnist")
    assert data.train.labels.bincount().tolist() == [6000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert data.train.labels[:5].tolist() == [9, 0, 0, 3, 0]
    # The constants in common use: 0.2860 and 0.3530.
    assert data.mean == pytest.approx((0.2860,) * 3, abs=5e-5)
    assert data.std == pytest.approx((0.3530,) * 3, abs=5e-5)


def test_real_cifar10() -> None:
    data = real("cifar10")
    assert data.train.labels.bincount().tolist() == [5000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert data.classes[6] == "frog"
    assert data.train.labels[:3].tolist() == [6, 9, 9]
    # The constants in common use.
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=5e-5)
    assert data.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=5e-5)


def test_every_downloadable_set_has_the_same_arguments() -> None:
    """But for the decoder, which only image files need."""
    for names in (FILE_SETS, set(DOWNLOADED) - FILE_SETS):
        parameters = {tuple(inspect.signature(TABLE[name]).parameters) for name in names}
        files = ("decoder",) if names is FILE_SETS else ()
        assert parameters == {("root", "download", "image_size", *files)}
