from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from hybridvit.engine import checkpoint


def write(folder: Path, step: int = 3) -> Path:
    return checkpoint.save(
        folder,
        step,
        weights={"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1])},
        ema={"a": torch.zeros(2, 3)},
        optimizer={"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
        progress={"train_seconds": 1.5},
    )


def test_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert checkpoint.latest(tmp_path) == path
    assert checkpoint.read_manifest(path)["progress"] == {"train_seconds": 1.5}
    weights = checkpoint.read_weights(path)
    assert torch.equal(weights["a"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(checkpoint.read_weights(path, checkpoint.EMA)["a"], torch.zeros(2, 3))
    assert checkpoint.read_optimizer(path)["state"][0]["step"] == 1


def test_a_tensor_may_have_two_names(tmp_path: Path) -> None:
    """As in an objective that keeps `self.encoder = model.encoder`, or shares a decoder's weights;
    the other one is laid out in another order."""
    shared = torch.arange(6.0)
    weights = {"a": shared, "b": shared, "c": shared.reshape(2, 3).T}
    path = checkpoint.save(
        tmp_path, 3, weights=weights, ema=weights, optimizer={}, progress={}
    )  # fmt: skip
    for name in (checkpoint.WEIGHTS, checkpoint.EMA):
        read = checkpoint.read_weights(path, name)
        assert all(torch.equal(read[key], value) for key, value in weights.items())


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    write(tmp_path, 3)
    newest = write(tmp_path, 12)
    assert list(tmp_path.iterdir()) == [newest]


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.EMA, checkpoint.OPTIMIZER])
def test_one_flipped_bit_is_noticed(tmp_path: Path, name: str) -> None:
    path = write(tmp_path)
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        checkpoint.read_manifest(path)


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / checkpoint.WEIGHTS).unlink()
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read_manifest(path)


def test_an_interrupted_save_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = write(tmp_path, 3)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 4)
    assert checkpoint.latest(tmp_path) == older
    checkpoint.read_manifest(older)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"sha256": 3}', "\x00"])
def test_a_manifest_that_is_none_is_named(content: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / checkpoint.MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest of a checkpoint; remove"):
        checkpoint.read_manifest(path)


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.with_name("step-abc").mkdir()
    (path.with_name("step-abc") / checkpoint.MANIFEST).write_text("{}")
    assert checkpoint.latest(tmp_path) == path


def test_a_disk_too_small_for_the_weights_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors and torch have errors of their own for it."""
    for error in (SafetensorError("No space left on device"), RuntimeError("unexpected pos")):

        def full_disk(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(checkpoint, "save_file", full_disk)
        with pytest.raises(OSError, match=r"step-00000003 cannot be written .*Error: "):
            write(tmp_path)


def test_a_pickle_in_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    path = write(tmp_path)
    torch.save({"state": Evil()}, path / checkpoint.OPTIMIZER)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoint.read_optimizer(path)
    assert not (tmp_path / "ran").exists()
