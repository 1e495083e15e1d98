"""How fast a device multiplies, and who is told that it is slow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridvit.cli import main
from hybridvit.config import Precision
from hybridvit.engine import device as module
from hybridvit.engine import doctor
from hybridvit.engine.device import bf16_slowdown, matrix_peak
from hybridvit.studies import planner, tuning
from hybridvit.studies.executors import choice

CPU = torch.device("cpu")


def emulated(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """A machine whose bf16 products take `factor` times as long as those in float32."""

    def peak(device: torch.device, precision: Precision, *_: object, **__: object) -> float:
        return 1e11 if precision == "fp32" else 1e11 / factor

    monkeypatch.setattr(module, "matrix_peak", peak)
    monkeypatch.setattr(doctor, "matrix_peak", peak)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[tuple[Any, ...]]]:
    """Seconds that products will take, the last one for all that follow, and their operands."""
    seconds, operands, now = [0.0], [], [0.0]

    def product(a: Tensor, b: Tensor) -> None:
        operands.append((a.dtype, a.shape, b.shape))
        now[0] += seconds.pop(0) if len(seconds) > 1 else seconds[0]

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return seconds, operands


def test_the_peak_is_that_of_the_best_product(timed: Any) -> None:
    seconds, operands = timed
    seconds[:] = [9.0, 0.5, 0.25, 0.5]
    found = matrix_peak(CPU, "bf16", size=10, seconds=2)
    assert set(operands) == {(torch.bfloat16, (10, 10), (10, 10))}
    assert found == 2 * 10**3 / 0.25
    assert len(operands) == 6  # 0.5 + 0.25 + 3 * 0.5 s


def test_slow_products_are_few(timed: Any) -> None:
    """Two, of which the first one is not counted as time: it loads libraries."""
    seconds, operands = timed
    seconds[:] = [30.0]
    assert matrix_peak(CPU, "fp32", size=10) == 2 * 10**3 / 30
    assert len(operands) == 2


def test_bf16_is_slow_where_torch_has_no_instructions_for_it() -> None:
    """What is measured agrees with what torch's library of products says of the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two would wait for each other beside other tests
    try:
        slowdown = bf16_slowdown()
    finally:
        torch.set_num_threads(threads)
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (slowdown is None) == (supported or torch.cuda.is_available())


@pytest.mark.parametrize(
    ("factor", "device", "told"), [(113, "cpu", 113), (3, "cpu", None), (113, "cuda", None)]
)
def test_only_a_cpu_that_emulates_is_slow(
    factor: float, device: str, told: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "chosen_device", lambda: torch.device(device))
    emulated(monkeypatch, factor)
    found = bf16_slowdown()
    assert found is None if told is None else found == pytest.approx(told)


@pytest.mark.parametrize(
    ("factor", "text"),
    [
        (125, "100 GFLOP/s in fp32, 1 in bf16; set train.precision=fp32, bf16 is emulated"),
        (1 / 15, "100 GFLOP/s in fp32, 1,500 in bf16"),
    ],
)
def test_doctor_says_how_fast_products_are(
    factor: float, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated(monkeypatch, factor)
    assert ("products", True, text) in doctor.checks()


def test_doctor_survives_a_full_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")

    monkeypatch.setattr(doctor, "matrix_peak", full)
    assert ("products", False, "CUDA out of memory.") in doctor.checks()


COMMANDS = {
    "train": ["train", "{config}", "out={folder}/run"],
    "bench": ["bench", "{config}", "--seconds=1", "--beside-load"],
    "find-batch-size": ["bench", "{config}", "--find-batch-size", "--seconds=1", "--beside-load"],
    "profile": ["profile", "{config}", "--out={folder}/profile", "--beside-load"],
    "study": ["study", "{folder}/study.yaml", "--out={folder}/runs"],
    "probe": ["study", "{folder}/study.yaml", "--dry-run", "--probe"],
}
SILENT = {
    "fp32": ["train", "{config}", "train.precision=fp32"],
    "dry-run": ["study", "{folder}/study.yaml", "--dry-run"],
    "ray": ["study", "{folder}/study.yaml", "--executor=ray", "--out={folder}/runs"],
}


def run(
    command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> list[str]:
    """What a command says of how slow bf16 is, here 113 times as slow. Its data are not there."""
    monkeypatch.setattr(module, "chosen_device", lambda: CPU)
    monkeypatch.setattr(choice, "choose", lambda *_, **__: None)
    monkeypatch.setattr(planner, "plan", lambda study, *_: study)
    monkeypatch.setattr(tuning, "run_tuned", lambda study, *_, **__: (study, []))
    emulated(monkeypatch, 113)
    absent = f"data: {{name: image_folder, args: {{root: {folder}/absent}}}}\n"
    config = folder / "config.yaml"
    config.write_text(f"extends: [base.yaml]\n{absent}train: {{precision: bf16}}\n")
    params = "high: {train: {precision: bf16_params}}"
    (folder / "study.yaml").write_text(
        "title: T\nquestion: Q?\nconfig: config.yaml\nseeds: [0]\n"
        f"axes: {{precision: {{low: {{}}, {params}}}}}\n"
    )
    main([argument.format(config=config, folder=folder) for argument in command])
    return [line for line in capsys.readouterr().err.splitlines() if "warning" in line]


@pytest.mark.parametrize("command", [*COMMANDS, *SILENT])
def test_commands_that_train_here_in_bf16_tell_beforehand(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once, and no others."""
    arguments = (COMMANDS | SILENT)[command]
    many = " and bf16_params" if "study" in arguments else ""
    line = (
        f"warning: train.precision=bf16{many}: this CPU takes 113 times as long for matrix "
        "products in bf16 as in float32; set train.precision=fp32"
    )
    told = run(arguments, tmp_path, monkeypatch, capsys)
    assert told == ([] if command in SILENT else [line])
