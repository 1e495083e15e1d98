"""Image folders: what is read, and one clear line for each thing that can be wrong."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from hybridvit.data.folders import image_folder, imagenet
from hybridvit.data.splits import fingerprint


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (9, 7), colour: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if len(mode) == 1 else (colour,) * len(mode)).save(path)


def make(root: Path, counts: dict[str, int], mode: str = "RGB") -> Path:
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            save(root / name / f"{i:02}.png", mode, (9 + i, 20 - i), 40 * label + i)
    return root


def error_of(root: Path | str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - callers check the text
        image_folder(str(root), image_size=8)
    message = str(caught.value)
    assert "\n" not in message
    return message


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises pixels that it does not hold."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


def test_holds_out_a_fifth_of_each_class(tmp_path: Path) -> None:
    data = image_folder(str(make(tmp_path, {"b": 10, "a": 5})), image_size=8)
    assert data.classes == ["a", "b"]
    assert data.train.labels.bincount().tolist() == [4, 8]
    assert data.test.labels.bincount().tolist() == [1, 2]
    assert data.image_size == data.train.size == (8, 8)
    assert data.channels == 3
    assert "3 of 15 images are held out" in data.notes[0]
    # The colour of an image says which class it was made for: a is the second one made.
    for split in (data.train, data.test):
        for i in range(len(split)):
            assert int(split.read(i)[0, 0, 0]) // 40 == 1 - int(split.labels[i])


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_uses_the_test_split_that_is_there(tmp_path: Path, test_name: str) -> None:
    make(tmp_path / "train", {"a": 3, "b": 2})
    make(tmp_path / test_name, {"a": 1, "b": 4})
    data = image_folder(str(tmp_path), image_size=8)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.test.labels.tolist() == [0, 1, 1, 1, 1]
    assert data.notes == []


def test_test_goes_before_val(tmp_path: Path) -> None:
    for name, count in (("train", 3), ("test", 1), ("val", 2)):
        make(tmp_path / name, {"a": count, "b": count})
    data = image_folder(str(tmp_path), image_size=8)
    assert len(data.test) == 2
    assert any("val/ is not used" in note for note in data.notes)


def test_train_alone_is_divided(tmp_path: Path) -> None:
    data = image_folder(str(make(tmp_path / "train", {"a": 5, "b": 5}).parent), image_size=8)
    assert (len(data.train), len(data.test)) == (8, 2)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    data = image_folder(str(make(tmp_path, {"bus": 5, "train": 5})), image_size=8)
    assert data.classes == ["bus", "train"]


def test_grey_only_if_all_are(tmp_path: Path) -> None:
    make(tmp_path, {"a": 5, "b": 5}, mode="L")
    grey = image_folder(str(tmp_path), image_size=8)
    assert grey.channels == 1
    assert grey.train.read(0).shape == (1, 8, 8)
    assert len(set(grey.mean)) == 1
    save(tmp_path / "a" / "colour.png", "RGBA")
    colour = image_folder(str(tmp_path), image_size=8)
    assert colour.channels == 3
    assert colour.train.read(0).shape == (3, 8, 8)


def test_statistics_are_those_of_the_training_images(tmp_path: Path) -> None:
    data = image_folder(str(make(tmp_path, {"a": 5, "b": 5})), image_size=8)
    pixels = torch.stack([data.train.read(i) for i in range(len(data.train))]).double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    assert torch.allclose(torch.tensor(data.mean, dtype=torch.float64), mean)
    assert torch.allclose(torch.tensor(data.std, dtype=torch.float64), std)


def test_constant_images_keep_a_deviation(tmp_path: Path) -> None:
    for name in "ab":
        for i in range(3):
            save(tmp_path / name / f"{i}.png", colour=0)
    assert image_folder(str(tmp_path), image_size=8).std == (1 / 255,) * 3


def test_notes_tell_what_was_decided(tmp_path: Path) -> None:
    make(tmp_path, {"a": 5, "b": 5, "rare": 2, "single": 1})
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / ".hidden.png").write_text("no image")
    (tmp_path / "b" / "scan.tif").write_text("x")
    save(tmp_path / ".cache" / "0.png")
    save(tmp_path / "loose.png")
    data = image_folder(str(tmp_path), image_size=8)
    assert data.classes == ["a", "b", "rare", "single"]
    assert data.notes[0] == (
        "files that are ignored: 1 hidden, 1 .txt, 1 .tif, 1 images in hidden folders, 1 images "
        "outside of class folders"
    )
    assert data.notes[-1] == "classes of too few images for a test image: 'rare', 'single'"
    assert [data.train.labels.tolist().count(label) for label in (2, 3)] == [2, 1]
    assert set(data.test.labels.tolist()) == {0, 1}


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    assert "does not exist" in error_of(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "is a file" in error_of(tmp_path / "file")
    (tmp_path / "flat").mkdir()
    save(tmp_path / "flat" / "x.png")
    assert "has no class folders" in error_of(tmp_path / "flat")
    make(tmp_path / "single", {"only": 3})
    assert "has one class, 'only'" in error_of(tmp_path / "single")
    make(tmp_path / "empty", {"a": 3})
    (tmp_path / "empty" / "b").mkdir()
    assert f"{str(tmp_path / 'empty' / 'b')!r} has no images" in error_of(tmp_path / "empty")
    make(tmp_path / "splits", {"train": 3, "val": 3})
    assert "has images in train and val, without class folders" in error_of(tmp_path / "splits")
    assert "data.args.root='~nobody0/x': there is no such user" in error_of("~nobody0/x")
    make(tmp_path / "few", {"a": 1, "b": 1})
    assert "takes none of 2 images" in error_of(tmp_path / "few")


def test_test_folders_must_match(tmp_path: Path) -> None:
    make(tmp_path / "train", {"a": 2, "b": 2})
    make(tmp_path / "test", {"a": 2, "c": 2})
    assert "train/ lacks: 'c'" in error_of(tmp_path)
    (tmp_path / "test" / "c").rename(tmp_path / "hidden")
    data = image_folder(str(tmp_path), image_size=8)
    assert "classes without test images: 'b'" in data.notes
    (tmp_path / "test" / "a").rename(tmp_path / "hidden2")
    assert "has no images" in error_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"this is no image", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    make(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "a" / "bad.jpg").write_bytes(content)
    message = error_of(tmp_path)
    assert str(tmp_path / "a" / "bad.jpg") in message
    assert "cannot be decoded" in message


def test_a_cut_off_image_is_named(tmp_path: Path) -> None:
    make(tmp_path, {"a": 3, "b": 3})
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8).numpy()
    for i in range(3):
        Image.fromarray(noise).save(tmp_path / "a" / f"cut{i}.jpg")
        whole = (tmp_path / "a" / f"cut{i}.jpg").read_bytes()
        (tmp_path / "a" / f"cut{i}.jpg").write_bytes(whole[: len(whole) // 2])
    message = error_of(tmp_path)
    assert "cut" in message
    assert "cannot be decoded" in message


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8500, 11_000, 60_000])
def test_bombs_are_refused_before_decoding(tmp_path: Path, side: int) -> None:
    make(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "b" / "bomb.png").write_bytes(png_header(side, side))
    message = error_of(tmp_path)
    assert "bomb.png" in message
    assert "scale it down" in message


def test_special_files_and_other_formats_are_refused(tmp_path: Path) -> None:
    make(tmp_path, {"a": 3, "b": 3})
    os.mkfifo(tmp_path / "b" / "pipe.png")
    assert "no regular file" in error_of(tmp_path)
    os.unlink(tmp_path / "b" / "pipe.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b" / "really.png", format="TIFF")
    assert "really.png" in error_of(tmp_path)


def test_image_size_is_checked(tmp_path: Path) -> None:
    root = str(make(tmp_path, {"a": 5, "b": 5}))
    for size in (0, -4, 10**6):
        with pytest.raises(ValueError, match=f"image_size={size} should be 1 to 4096"):
            image_folder(root, image_size=size)


def test_fingerprint_follows_paths_and_sizes(tmp_path: Path) -> None:
    make(tmp_path / "x", {"a": 5, "b": 5})
    make(tmp_path / "y", {"a": 5, "b": 5})
    first, moved = (fingerprint(image_folder(str(tmp_path / n)).train) for n in "xy")
    assert first == moved
    paths = list((tmp_path / "x" / "a").iterdir())
    for path in paths:  # some are tested on
        path.write_bytes(path.read_bytes() + b"\0")
    assert fingerprint(image_folder(str(tmp_path / "x")).train) != first


def test_imagenet_reads_train_and_val(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "imagenet" / "train", {"n01": 3, "n02": 3})
    make(tmp_path / "imagenet" / "val", {"n01": 1, "n02": 1})
    make(tmp_path / "imagenet" / "test", {".": 2})  # as it is handed out: without labels
    for root in (tmp_path, tmp_path / "imagenet"):
        data = imagenet(str(root), image_size=16)
        assert (len(data.train), len(data.test)) == (6, 2)
        assert "2 class folders, where ImageNet-1k has 1000" in data.notes
        assert not any("val/ is not used" in note for note in data.notes)
    monkeypatch.setenv("HYBRIDVIT_DATA", str(tmp_path / "other"))
    with pytest.raises(ValueError, match="'imagenet' was not found") as caught:
        imagenet()
    assert str(tmp_path / "other") in str(caught.value)
