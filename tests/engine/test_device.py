"""How fast a device multiplies, and who is told that it is slow."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridvit.cli import main
from hybridvit.config import Precision
from hybridvit.engine import device as module
from hybridvit.engine.device import matrix_peak, slow_precision

CPU = torch.device("cpu")


def emulated(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """A machine whose bf16 products take `factor` times as long as those in float32."""

    def peak(device: torch.device, precision: Precision, **_: object) -> float:
        return 1e11 if precision == "fp32" else 1e11 / factor

    monkeypatch.setattr(module, "matrix_peak", peak)


def test_the_peak_is_that_of_the_best_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.2, 0.05, 0.02, 0.05, 0.05, 0.05, 0.05, 0.05])
    sizes = set()

    def product(a: Tensor, b: Tensor) -> None:
        sizes.add((a.dtype, a.shape, b.shape))
        time.sleep(next(seconds))

    monkeypatch.setattr(torch, "mm", product)
    found = matrix_peak(CPU, "bf16", size=10)
    assert sizes == {(torch.bfloat16, (10, 10), (10, 10))}
    assert 0.5 < found / (2 * 10**3 / 0.02) <= 1


def test_slow_products_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, of which the first one is not counted as time: it loads libraries."""
    calls: list[float] = []

    def product(a: Tensor, b: Tensor) -> None:
        calls.append(0.03)
        time.sleep(calls[-1])

    monkeypatch.setattr(torch, "mm", product)
    matrix_peak(CPU, "fp32", size=10, seconds=0.01)
    assert len(calls) == 2


def test_bf16_is_slow_where_torch_has_no_instructions_for_it() -> None:
    """What is measured agrees with what torch's library of products says of the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two would wait for each other beside other tests
    try:
        told = slow_precision("bf16")
    finally:
        torch.set_num_threads(threads)
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (told is None) == (supported or torch.cuda.is_available())


def test_the_line_says_how_slow_and_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device", lambda: CPU)
    emulated(monkeypatch, 113)
    assert slow_precision("bf16_params") == (
        "train.precision=bf16_params makes matrix products 113 times as slow as fp32 on this CPU, "
        "which has no instructions for it; set train.precision=fp32"
    )
    assert slow_precision("fp32") is None
    emulated(monkeypatch, 3)
    assert slow_precision("bf16") is None


def test_a_gpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device", lambda: torch.device("cuda"))
    emulated(monkeypatch, 113)
    assert slow_precision("bf16") is None


COMMANDS = {
    "train": ["train", "{config}", "out={folder}/run"],
    "bench": ["bench", "{config}", "--seconds=0", "--beside-load"],
    "find-batch-size": ["bench", "{config}", "--find-batch-size", "--seconds=0", "--beside-load"],
    "profile": ["profile", "{config}", "--out={folder}/profile", "--beside-load"],
    "study": ["study", "{folder}/study.yaml", "--out={folder}/runs"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_train_tell_beforehand(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once, before they read any data, which here are not there."""
    monkeypatch.setattr(module, "device", lambda: CPU)
    emulated(monkeypatch, 113)
    config = tmp_path / "config.yaml"
    absent = f"data: {{name: image_folder, args: {{root: {tmp_path}/absent}}}}\n"
    config.write_text(f"extends: [base.yaml]\n{absent}train: {{precision: bf16}}\n")
    (tmp_path / "study.yaml").write_text(
        "title: T\nquestion: Q?\nconfig: config.yaml\nseeds: [0]\n"
        "axes: {lr: {low: {optim: {lr: 0.1}}, high: {optim: {lr: 0.2}}}}\n"
    )
    places = {"config": config, "folder": tmp_path}
    main([argument.format(**places) for argument in COMMANDS[command]])
    told = capsys.readouterr().err
    assert told.startswith("warning: train.precision=bf16 makes matrix products 113 times")
    assert told.count("113 times") == 1
