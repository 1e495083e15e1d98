"""Packed sets unpacked into a file: found again, never wrong, never in the way."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridvit.data import files, packed
from hybridvit.data.catalog import datasets_table
from hybridvit.data.packed import Arrays


@pytest.fixture(autouse=True)
def files_have_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SETTLED", 0.0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of packed files: pixels, and labels, of which half are for testing."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "pixels").write_bytes(bytes(range(240)))
    (folder / "labels").write_bytes(bytes([3, 1, 4, 1]))
    return folder


READ: list[Path] = []


def load(folder: Path, name: str = "numbers") -> Arrays:
    def read() -> Arrays:
        READ.append(folder)
        images = torch.tensor(list((folder / "pixels").read_bytes())).byte().view(4, 3, 4, 5)
        labels = torch.tensor(list((folder / "labels").read_bytes()))
        return Arrays((images[:2], labels[:2]), (images[2:], labels[2:]), ["ape", 'bee\'s, "cat"'])

    READ.clear()
    return packed.load(name, [folder / "pixels", folder / "labels"], read)


def tensors(arrays: Arrays) -> list[Tensor]:
    return [*arrays.train, *arrays.test]


def same(one: Arrays, other: Arrays) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return one.classes == other.classes and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs
    )


def test_a_set_is_read_once_and_mapped_into_memory(source: Path, cache_folder: Path) -> None:
    first = load(source)
    assert READ
    again = load(source)
    assert not READ
    assert same(first, again)
    assert again.train[0].flatten().tolist() == list(range(120))
    assert again.test[1].tolist() == [4, 1]
    kept = next(cache_folder.glob("*.arrays"))
    if Path("/proc/self/maps").exists():
        assert str(kept) in Path("/proc/self/maps").read_text()
    again.train[0][0] = 9  # a process's own copy
    assert same(load(source), Arrays((torch.arange(120).byte().view(2, 3, 4, 5), again.train[1]),
                                     again.test, again.classes))  # fmt: skip


def test_a_copy_elsewhere_is_found_again(source: Path, tmp_path: Path) -> None:
    first = load(source)
    shutil.copytree(source, tmp_path / "copy")
    assert same(load(tmp_path / "copy"), first)
    assert not READ
    load(tmp_path / "copy", name="other")  # whose classes may be called otherwise
    assert READ


@pytest.mark.parametrize("file", ["pixels", "labels"])
def test_a_changed_byte_shows(file: str, source: Path) -> None:
    load(source)
    content = (source / file).read_bytes()
    (source / file).write_bytes(bytes([2]) + content[1:])
    changed = load(source)
    assert READ
    assert 2 in (changed.train[0][0, 0, 0, 0], changed.train[1][0])
    (source / file).write_bytes(content)
    assert load(source).train[1].tolist() == [3, 1]
    assert not READ


@pytest.mark.parametrize("damage", ["pixel", "label", "cut", "empty", "foreign"])
def test_a_damaged_file_is_made_again(damage: str, source: Path, cache_folder: Path) -> None:
    first = copy.deepcopy(load(source))  # in memory of its own
    kept = next(cache_folder.glob("*.arrays"))
    content = kept.read_bytes()
    place = {"pixel": content.index(bytes(range(50, 80))), "label": content.index(b"\3" + bytes(7))}
    if damage in place:
        at = place[damage]
        kept.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        kept.write_bytes({"cut": content[:-9], "empty": b"", "foreign": b"x" * 999}[damage])
    assert same(load(source), first)
    assert READ
    assert same(load(source), first)
    assert not READ


@pytest.mark.parametrize("event", ["changes", "comes"])
def test_what_changes_or_comes_as_it_is_read_is_not_kept(
    event: str, source: Path, cache_folder: Path
) -> None:
    """Nothing would say that what was read is what is there now."""
    pixels, labels = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    arrays = Arrays((pixels, labels), (pixels.clone(), labels.clone()), [])
    late = source / ("labels" if event == "changes" else "downloaded")

    def read() -> Arrays:
        late.write_bytes(b"new")
        return arrays

    assert packed.load("numbers", [source / "pixels", late], read) is arrays
    assert not list(cache_folder.glob("*.arrays"))
    assert packed.load("numbers", [source / "pixels", late], lambda: arrays) is not arrays


def test_where_a_file_cannot_be_read_the_reader_says_so(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: str) -> str:
        raise PermissionError(path)

    monkeypatch.setattr(files, "digest", refused)
    assert load(source).train[1].tolist() == [3, 1]
    (source / "labels").unlink()
    with pytest.raises(FileNotFoundError):
        load(source)


def test_without_files_or_cache_it_is_read(
    source: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path
) -> None:
    arrays = load(source)
    absent = [source / "pixels", source / "absent"]
    assert packed.load("numbers", absent, lambda: arrays) is arrays
    shutil.rmtree(cache_folder)
    monkeypatch.setenv("HYBRIDVIT_CACHE", "")
    assert same(load(source), arrays)
    assert READ
    assert not cache_folder.exists()


def test_a_folder_that_cannot_be_made_is_one_line(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYBRIDVIT_CACHE", str(tmp_path / "file" / "below"))
    assert load(source).train[1].tolist() == [3, 1]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_real_sets_are_unpacked_once(
    name: str, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = datasets_table()[name]
    first = build(root=str(data_root))

    def refused(*_: object) -> None:
        raise AssertionError("unpacked again")

    for function in ("_open_torchvision", "_read_idx"):
        monkeypatch.setattr(f"hybridvit.data.catalog.{function}", refused)
    again = build(root=str(data_root))
    assert again.classes == first.classes
    for one, other in ((first.train, again.train), (first.test, again.test)):
        assert torch.equal(one.labels, other.labels)
        assert list(one.identity()) == list(other.identity())
