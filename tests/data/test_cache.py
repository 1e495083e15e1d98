"""Decoded images kept in files: found again, never wrong, never in the way."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hybridvit.data import cache, files
from hybridvit.data.folders import image_folder
from hybridvit.data.resident import Resident
from hybridvit.data.splits import ArraySplit, DecodedSplit, subset


def split(count: int = 300, size: int = 4, suffix: str = "") -> DecodedSplit:
    def decode(i: int) -> Image.Image:
        DECODED.append(i)
        return Image.new("RGB", (9, 9), (i % 256, i // 256, 7))

    return DecodedSplit(
        decode, torch.arange(count), (size, size), 3, version=lambda i: f"{i}{suffix}"
    )


DECODED: list[int] = []


@pytest.fixture(autouse=True)
def nothing_decoded() -> None:
    DECODED.clear()


def images(source: DecodedSplit) -> Tensor:
    return Resident(source, "cpu", progress=False).images()


def test_images_are_decoded_once(cache_folder: Path) -> None:
    first = images(split())
    assert len(DECODED) == 300
    again = images(split())
    assert len(DECODED) == 300
    assert torch.equal(first, again)
    assert torch.equal(again, split().read_many(range(300)))
    (kept,) = cache_folder.iterdir()
    assert kept.suffix == ".pixels"
    if Path("/proc/self/maps").exists():
        del first
        assert str(kept) in Path("/proc/self/maps").read_text()
    first = again.clone()
    again[0] = 9  # a process's own copy
    assert torch.equal(images(split()), first)


def test_what_pixels_depend_on_names_the_file() -> None:
    places = [
        cache.place(source)
        for source in (
            split(),
            split(size=5),
            split(suffix="x"),
            split(299),
            subset(split(), torch.arange(299, -1, -1)),
        )
    ]
    assert len(set(places)) == 5
    assert places[0] == cache.place(split())
    reordered = images(subset(split(), torch.arange(299, -1, -1)))
    assert torch.equal(reordered, images(split()).flip(0))


def test_what_is_not_kept(monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    assert cache.place(ArraySplit(torch.zeros(2, 1, 3, 3).byte(), torch.zeros(2))) is None
    nameless = DecodedSplit(lambda i: Image.new("L", (1, 1)), torch.zeros(2), (1, 1), 1)
    assert cache.place(nameless) is None
    monkeypatch.setenv("HYBRIDVIT_CACHE", "")
    images(split())
    assert list(cache_folder.iterdir()) == []
    monkeypatch.delenv("HYBRIDVIT_CACHE")
    assert cache.folder() == Path("~/.cache/hybridvit").expanduser()


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "empty", "folder"])
def test_a_damaged_file_is_made_again(damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    expected = images(split()).clone()
    path = cache.place(split())
    assert path is not None
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"cut": content[:-9], "longer": content + b"\0", "empty": b""}[damage])
    DECODED.clear()
    assert torch.equal(images(split()), expected)
    assert len(DECODED) >= 300
    if damage == "folder":  # cannot be replaced
        assert "are not kept" in capfd.readouterr().err
    else:
        assert path.read_bytes() == content


def test_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache_folder: Path
) -> None:
    original = tempfile.NamedTemporaryFile

    class Full:
        def __init__(self, **given: Any) -> None:
            self.file = original(**given)
            self.name = self.file.name

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.tempfile, "NamedTemporaryFile", Full)
    assert torch.equal(images(split()), split().read_many(range(300)))
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "No space left on device" in shown
    assert str(cache_folder) in shown
    assert list(cache_folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYBRIDVIT_CACHE", str(tmp_path / "file" / "below"))
    assert torch.equal(images(split()), split().read_many(range(300)))
    assert capsys.readouterr().err.count("\n") == 1


def test_an_image_that_cannot_be_decoded_leaves_nothing(cache_folder: Path) -> None:
    def decode(i: int) -> Image.Image:
        if i == 280:
            raise ValueError("image '280.jpg' cannot be decoded")
        return Image.new("L", (3, 3))

    broken = DecodedSplit(decode, torch.zeros(300), (3, 3), 1, version=str)
    with pytest.raises(ValueError, match=r"280\.jpg"):
        Resident(broken, "cpu", progress=False)
    assert list(cache_folder.iterdir()) == []


def test_several_at_once_decode_once(cache_folder: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(images, [split() for _ in range(6)]))
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(list(cache_folder.iterdir())) == 1
    assert len(DECODED) == 300


LOAD = """
import sys
from hybridvit.data.folders import image_folder
from hybridvit.data.resident import Resident
print(int(Resident(image_folder(sys.argv[1], image_size=8).train, "cpu", False).images().sum()))
"""


def test_processes_that_start_together_make_one_file(tmp_path: Path, cache_folder: Path) -> None:
    folder = a_folder(tmp_path / "set", 40)
    command = [sys.executable, "-c", LOAD, str(folder)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    sums = {process.communicate(timeout=100)[0] for process in started}
    expected = image_folder(str(folder), image_size=8).train.read_many(range(64)).sum()
    assert sums == {b"%d\n" % int(expected)}
    assert len(list(cache_folder.glob("*.pixels"))) == 1
    assert list(cache_folder.glob("*.part")) == []


def test_a_file_is_complete_when_it_appears(cache_folder: Path) -> None:
    path = cache_folder / "x.pixels"

    def chunks() -> Iterator[Tensor]:
        for _ in range(2):
            yield torch.ones(2, 1, 3, 3, dtype=torch.uint8)
            assert not path.exists()

    assert cache.write(path, chunks())
    kept = cache.read(path, (4, 1, 3, 3))
    assert kept is not None
    assert torch.equal(kept, torch.ones_like(kept))


def a_folder(root: Path, count: int = 10) -> Path:
    """Two classes of grey images."""
    for value, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), 5 * i + value).save(root / name / f"{i}.bmp")
    return root


def place_of(folder: Path) -> Path:
    path = cache.place(image_folder(str(folder), image_size=8).train)
    assert path is not None
    return path


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of change are trusted at once."""
    monkeypatch.setattr(files, "SETTLED", 0)


def change_a_byte(path: Path) -> None:
    """Same size, same time of modification."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_the_same_images_elsewhere_are_found_again(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "one")
    expected = place_of(folder)
    shutil.copytree(folder, tmp_path / "two")
    assert place_of(tmp_path / "two") == expected
    for path in (tmp_path / "two").glob("*/*.bmp"):
        os.utime(path, (1, 1))
    assert place_of(tmp_path / "two") == expected


@pytest.mark.parametrize("settled", [False, True])
def test_a_changed_byte_shows(
    settled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_folder(tmp_path / "set")
    if settled:
        settle(monkeypatch)
    before = images(image_folder(str(folder), image_size=8).train).clone()
    time.sleep(0.05)  # longer than the clock of a file system takes for a step
    for i in range(10):
        change_a_byte(folder / "a" / f"{i}.bmp")
    again = image_folder(str(folder), image_size=8).train
    assert torch.equal(images(again), again.read_many(range(len(again))))
    assert not torch.equal(images(again), before)


def test_images_that_change_places_show(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "set")
    expected = place_of(folder)
    for i, j in ((0, "x"), (1, 0), ("x", 1)):
        (folder / "a" / f"{i}.bmp").rename(folder / "a" / f"{j}.bmp")
    assert place_of(folder) != expected


def test_unchanged_files_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path
) -> None:
    folder, hashed = a_folder(tmp_path / "set"), []
    digest = files.ImageFiles.digest

    def counted(self: files.ImageFiles, i: int) -> str:
        hashed.append(i)
        return digest(self, i)

    monkeypatch.setattr(files.ImageFiles, "digest", counted)
    expected = place_of(folder)
    assert place_of(folder) == expected
    assert len(hashed) == 32  # made just now: what is next might come in the same instant
    settle(monkeypatch)
    hashed.clear()
    assert [place_of(folder), place_of(folder)] == [expected] * 2
    assert len(hashed) == 16
    (key,) = cache_folder.glob("*.key")
    for damage in ("", "no name", "../../elsewhere"):
        key.write_text(damage)
        assert place_of(folder) == expected
    assert len(hashed) == 64


def test_a_file_that_changes_meanwhile_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path
) -> None:
    """What was decoded is not what was hashed."""
    folder = a_folder(tmp_path / "set")
    source = image_folder(str(folder), image_size=8).train
    decode = source.decode

    def changing(i: int) -> Image.Image | Tensor:
        if i == 5:
            change_a_byte(folder / "b" / "3.bmp")
        return decode(i)

    source.decode = changing
    with pytest.raises(ValueError, match="changed while they were decoded"):
        images(source)
    assert list(cache_folder.glob("*.pixels")) == []


@pytest.mark.parametrize("kind", ["absent", "pipe"])
def test_an_image_that_is_no_file_is_named(kind: str, tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "set")
    source = image_folder(str(folder), image_size=8).train
    path = folder / "a" / "4.bmp"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ValueError, match=r"4\.bmp.*missing or no regular file"):
        images(source)


def test_a_home_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDVIT_CACHE", "~nobody0/x")
    with pytest.raises(ValueError, match="HYBRIDVIT_CACHE='~nobody0/x': there is no such user"):
        cache.folder()
