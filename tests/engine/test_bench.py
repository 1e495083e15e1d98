from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridvit import config
from hybridvit.cli import main
from hybridvit.engine import bench as module
from hybridvit.engine import idle
from hybridvit.engine.bench import PHASES, Steps, bench, bench_text, kind_of, profile

SMALL = ["encoder.args.dim=16", "encoder.args.depth=1", "encoder.args.heads=2"]


def load(*overrides: str) -> config.RunConfig:
    return config.load("digits.yaml", [*SMALL, *overrides])


def test_what_a_step_spends_adds_up() -> None:
    found = bench(load("train.accumulate=2"), seconds=0.2, beside_load=True)
    assert list(found["milliseconds"]) == list(PHASES)
    assert min(found["milliseconds"].values()) > 0
    total = sum(found["milliseconds"].values()) / 1000
    assert found["images_per_second"] == pytest.approx(found["batch_size"] / total, rel=0.5)
    low, high = found["quartiles"]
    assert low <= found["images_per_second"] <= high
    reached = found["flops_per_image"] * found["images_per_second"]
    assert found["share_of_peak"] == pytest.approx(reached / found["peak_flops_per_second"])
    assert "GFLOPs an image" in bench_text(found)


def test_memory_is_the_most_that_steps_took(monkeypatch: pytest.MonkeyPatch) -> None:
    held = 2**29  # bytes, far more than these steps take and earlier tests may have left
    with contextlib.suppress(OSError):  # on a CPU it is the most that the process ever took
        Path("/proc/self/clear_refs").write_text("5")
    small = bench(load(), seconds=0.01, beside_load=True)["memory_bytes"]
    of_step = Steps.run

    def run(steps: Steps, phase: Any) -> None:
        torch.ones(held, dtype=torch.uint8)
        of_step(steps, phase)

    monkeypatch.setattr(Steps, "run", run)
    found = bench(load(), seconds=0.01, beside_load=True)
    assert held / 2 < found["memory_bytes"] - small < 2 * held
    assert f"memory at the most {found['memory_bytes'] / 2**30:.2f} GiB" in bench_text(found)


@pytest.mark.parametrize("command", ["bench", "profile"])
def test_load_that_comes_meanwhile_is_refused(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(idle, "busy_seconds", lambda: loads[-1])
    monkeypatch.setattr(idle, "own_seconds", lambda: 0.0)
    loads = [0.0]
    of_step = Steps.run

    def run(steps: Steps, phase: Any) -> None:
        of_step(steps, phase)
        loads.append(loads[-1] + 10)

    monkeypatch.setattr(Steps, "run", run)
    arguments = ["--seconds", "0.1"] if command == "bench" else ["--out", str(tmp_path / "p")]
    assert main([command, "digits.yaml", *SMALL, *arguments]) == 2
    said = capsys.readouterr().err
    assert "other processes use" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "p").exists()
    assert main([command, "digits.yaml", *SMALL, *arguments, "--beside-load"]) == 0


def test_each_step_has_its_share_of_what_is_augmented_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first of a block would else pay for all, which a median does not see."""
    steps = Steps(load())
    drawn: list[int] = []
    of_block = steps.session.loader.batches

    def batches(start: int, count: int) -> Any:
        drawn.append(count)
        return of_block(start, count)

    monkeypatch.setattr(steps.session.loader, "batches", batches)
    taken = module.timed_steps(steps, 0.01)
    assert len({spent["data"] for spent in taken}) == 1
    assert set(drawn) == {steps.session.loader.together}
    assert steps.session.loader.together > 1


def test_a_gpu_is_not_waited_for_within_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    steps: Any = SimpleNamespace(
        fabric=SimpleNamespace(device=torch.device("cuda")),
        session=SimpleNamespace(loader=SimpleNamespace(together=4)),
        run=lambda phase: events.append("step"),
    )
    monkeypatch.setattr(module, "wait_for_device", lambda: events.append("wait"))
    taken = module.whole_steps(steps, [], 0.0)
    assert len(taken) == module.LEAST
    assert events == ["wait", *["step"] * 12, "wait"] * module.LEAST


def test_steps_train_as_a_run_does() -> None:
    steps = Steps(load("optim.lr=1"))
    before = [p.clone() for p in steps.session.objective.parameters()]
    seen: list[str] = []
    steps.run(seen.append)
    assert tuple(seen) == PHASES
    after = steps.session.objective.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_profile_leaves_a_trace_and_names_ten_costs(tmp_path: Path) -> None:
    costs = profile(load(), tmp_path / "p", count=1, beside_load=True)
    assert len(costs) == 10
    shares = [share for _, share, _ in costs]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    assert {kind for _, _, kind in costs} & {"matrix products", "optimizer"}
    assert json.loads((tmp_path / "p" / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::native_group_norm_backward", "normalisation"),
        ("aten::to", "copies and casts"),
        ("aten::_upsample_bilinear2d_aa", "resizing"),
        ("## Call CompiledFxGraph f3 ##", "compiled, fused"),
        ("triton_poi_fused_add_0", "compiled, fused"),
        ("aten::topk", "other"),
    ],
)
def test_kinds_of_work(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind


def test_the_command_says_what_costs_most_and_where_the_trace_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "p"), "--beside-load"]
    assert main(["profile", "digits.yaml", *SMALL, *arguments]) == 0
    *costs, _, last = capsys.readouterr().out.splitlines()
    assert len(costs) == 10
    assert all(" %  " in line for line in costs)
    assert str(tmp_path / "p" / "trace.json") in last
    assert (tmp_path / "p" / "trace.json").exists()


def test_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "digits.yaml", *SMALL, "--seconds", "0.1", "--beside-load", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["device"]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_no_time_to_measure_is_a_mistake(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "digits.yaml", "--beside-load", f"--seconds={seconds}"]) == 2
    assert f"--seconds {seconds} should be above 0" in capsys.readouterr().err
