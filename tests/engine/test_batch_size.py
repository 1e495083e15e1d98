from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import dying
import pytest
import torch

from hybridvit import config
from hybridvit.cli import main
from hybridvit.engine import batch_size as module
from hybridvit.engine.batch_size import (
    Trial,
    find_batch_size,
    measure,
    out_of_memory,
    search,
    within,
)

SMALL = ["encoder.args.dim=16", "encoder.args.depth=1", "encoder.args.heads=2"]
MB = 10**6


def machine(
    memory: Callable[[int], float], limit: float
) -> tuple[list[int], Callable[[int], Trial]]:
    """Sizes that were tried, and trying one where training takes `memory` of its size."""
    tried: list[int] = []

    def attempt(size: int) -> Trial:
        tried.append(size)
        return within(int(limit), Trial(size, 100.0, int(memory(size))))

    return tried, attempt


def test_the_largest_batch_is_found_to_an_eighth() -> None:
    generator = random.Random(0)
    for _ in range(300):
        base, slope = generator.uniform(1, 500) * MB, 10 ** generator.uniform(-2, 2) * MB
        limit, most = base + generator.uniform(0, 3000) * MB, generator.randint(1, 50_000)
        tried, attempt = machine(lambda n, b=base, s=slope: b + s * n, limit)  # type: ignore[misc]
        trials = search(attempt, most, int(limit))
        # Brute force: every size there is, one by one.
        sizes = [n for n in range(1, most + 1) if base + slope * n <= limit]
        found = [trial.batch_size for trial in trials if trial.fits]
        assert [trial.batch_size for trial in trials] == sorted(set(tried))
        assert len(tried) == len(set(tried)) <= 20
        assert bool(found) == bool(sizes)
        if not found:
            assert min(tried) == 1
            continue
        assert max(tried) <= most
        assert max(found) <= max(sizes)
        step = max(8, max(found) // 8)
        assert max(sizes) - max(found) < (step + 8 if max(found) >= 8 else max(found) + 1)
        # Two sizes suffice to foresee that a third would not fit.
        assert sum(not trial.fits for trial in trials) <= 1 or max(found) < 8


def test_running_out_of_memory_ends_the_doubling() -> None:
    """Where no limit is known, a GPU's own error is the only sign."""
    tried: list[int] = []

    def attempt(size: int) -> Trial:
        tried.append(size)
        return Trial(size, 100.0, 10 * MB) if size <= 300 else Trial(size, None, None)

    trials = search(attempt, 100_000)
    assert tried == [8, 16, 32, 64, 128, 256, 512, 384, 320, 288]
    assert max(trial.batch_size for trial in trials if trial.fits) == 288


def test_a_batch_is_never_larger_than_the_training_set() -> None:
    for most, largest in ((5, 5), (8, 8), (100, 96), (1294, 1288)):
        tried, attempt = machine(lambda n: n, 1e9)
        search(attempt, most, 10**9)
        assert max(tried) == largest


def fake(monkeypatch: pytest.MonkeyPatch, limit: int | None) -> None:
    """A machine of 100 MB where 64 images are fastest, and 1 MB an image."""

    def measured(loaded: config.RunConfig, size: int, seconds: float, beside_load: bool) -> Trial:
        return Trial(size, 1000.0 - abs(size - 64), 100 * MB + size * MB)

    monkeypatch.setattr(module, "measure", measured)
    monkeypatch.setattr(module, "memory_limit", lambda: limit)


def test_the_fastest_is_named_and_the_config_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, 420 * MB)
    assert main(["bench", "digits.yaml", *SMALL, "--find-batch-size", "--beside-load"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines[:-2]] == [8, 16, 32, 64, 128, 256, 320]
    assert "largest that fits in 0.4 GiB, 80% of what is available: 320; fastest: 64" in lines[-2]
    assert "still has train.batch_size=64" in lines[-1]
    arguments = ["bench", "digits.yaml", *SMALL, "--find-batch-size", "--beside-load", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["largest"], found["fastest"], found["memory_limit"]) == (320, 64, 420 * MB)


def test_a_set_of_few_images_is_the_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, 9000 * MB)
    arguments = ["bench", "digits.yaml", *SMALL, "data.train_images=101", "--find-batch-size"]
    assert main([*arguments, "--beside-load"]) == 0
    assert "largest of 101 training images: 96; fastest: 64" in capsys.readouterr().out


def test_no_batch_at_all_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, 50 * MB)
    assert main(["bench", "digits.yaml", *SMALL, "--find-batch-size", "--beside-load"]) == 2
    captured = capsys.readouterr()
    assert "not even one image fits" in captured.err
    assert [line.split()[0] for line in captured.out.splitlines()] == ["8", "4", "2", "1"]


def test_a_real_process_trains() -> None:
    loaded = config.load("digits.yaml", [*SMALL, "data.train_images=12"])
    found = find_batch_size(loaded, seconds=0.1, beside_load=True)
    (trial,) = found["trials"]
    assert trial["batch_size"] == found["largest"] == 8
    assert trial["images_per_second"] > 0
    if found["memory_limit"] is not None:  # of a CPU, where the interpreter is counted, too
        assert 100 * MB < trial["memory_bytes"] < found["memory_limit"]


def test_a_process_that_the_system_kills_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = config.load("digits.yaml", SMALL)
    monkeypatch.setattr(module, "_train", dying.killed)
    assert measure(loaded, 8, 0.1, True) == Trial(8, None, None)
    monkeypatch.setattr(module, "_train", dying.stopped)
    with pytest.raises(ValueError, match="a batch of 8 images was not measured: its process died"):
        measure(loaded, 8, 0.1, True)


def test_what_a_config_does_wrong_is_said() -> None:
    loaded = config.load("digits.yaml", [*SMALL, "optim.freeze=[nothing]"])
    with pytest.raises(ValueError, match=r"a batch of 8 images was not measured: .*'nothing'"):
        find_batch_size(loaded, seconds=0.1, beside_load=True)


def test_errors_that_mean_no_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not out_of_memory(RuntimeError("shapes do not match"))
    recording = RuntimeError("the graph cannot be recorded")
    recording.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert out_of_memory(recording)


def test_available_memory_is_that_of_the_machine() -> None:
    total = 0
    try:
        total = 1024 * int(Path("/proc/meminfo").read_text().split()[1])
    except OSError:
        pytest.skip("no /proc/meminfo here")
    assert 0 < module.available_memory() < total
    assert module.memory_limit() is None or module.memory_limit() < total
