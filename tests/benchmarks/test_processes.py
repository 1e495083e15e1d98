"""Whole trainings and commands, and the script on timm's factories."""

from __future__ import annotations

import gzip
from pathlib import Path

import processes
import pytest
import timm_train
import torch
from cases import CASES, Command, Whole

from hybridvit import build, cli, config
from hybridvit.engine.bench import Steps
from hybridvit.engine.optim import schedule

WHOLE = {name: case for name, case in CASES.items() if name.startswith("whole")}


def idx(path: Path, array: torch.Tensor) -> None:
    """An IDX file of bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.to(torch.uint8).numpy().tobytes())


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Fashion-MNIST in small."""
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 300), ("t10k", 60)):
        idx(raw / f"{part}-images-idx3-ubyte", torch.randint(256, (count, 28, 28)))
        idx(raw / f"{part}-labels-idx1-ubyte", torch.arange(count) % 10)
    return tmp_path / "data"


@pytest.mark.filterwarnings("ignore")
def test_the_script_on_timm_trains(fashion: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Whole("fashion_mnist", images=128, epochs=2)
    timm_train.main([*processes.timm_arguments(job, fashion), "--workers", "0"])
    said = capsys.readouterr().out
    assert said.count("epoch") == 2
    found = processes.ACCURACY.search(said)
    assert found
    assert 0 <= float(found[1]) <= 100


@pytest.mark.parametrize("case", WHOLE)
def test_both_train_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, batch size, rate, decay and steps are those of our config."""
    job = WHOLE[case].contestants["ours"].job
    assert isinstance(job, Whole)
    arguments = processes.our_arguments(job, [], Path("folder"))
    parsed = cli.parser().parse_args(arguments)
    run = config.load(parsed.config, [o for o in parsed.overrides if not o.startswith("out=")])
    size = timm_train.SIZE[job.data]
    parts, _ = build.make_parts(["noise:register"])
    like = config.PartConfig("noise", {"images": 256, "size": size})
    spec = parts.datasets.build(like.name, like.args).spec()
    objective = build.make_objective(build.resolve(run, parts), parts, spec)
    model = timm_train.make_model(job.data)
    ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (objective, model))
    assert ours == theirs
    assert run.train.batch_size == timm_train.BATCH
    assert run.optim.lr * run.train.batch_size / 256 == timm_train.LR
    assert run.optim.weight_decay == timm_train.WEIGHT_DECAY
    assert run.optim.betas == timm_train.BETAS
    assert run.optim.clip_norm == timm_train.CLIP
    assert run.train.precision == "bf16"
    assert (run.train.epochs, run.data.train_images, run.data.val_fraction) == (5, 5000, 0)
    assert (run.data.augment.crop == "pad") == (job.data == "cifar10")
    assert run.data.augment.flip


def test_both_have_one_schedule_after_the_warm_up() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = timm_train.make_scheduler(optimizer, 5, 39)
    for step in range(39, 195):
        theirs.step_update(step)  # of the step after it
        expected = 2 * schedule(step + 1, 195, 39, "cosine")
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-9)


def test_whole_trainings_keep_their_accuracy(
    fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, caches = [], []

    def run(command: list[str], **environment: str) -> str:
        commands.append(command)
        caches.append(environment["HYBRIDVIT_CACHE"])
        assert environment["HYBRIDVIT_DATA"] == str(fashion)
        return "val\ntest/accuracy 81.2%\n"

    monkeypatch.setenv("HYBRIDVIT_DATA", str(fashion))
    monkeypatch.setattr(processes, "run", run)
    for framework in ("ours", "timm"):
        turns = processes.training(framework, Whole("fashion_mnist"), ["train.epochs=1"])
        assert turns.turn(0) > 0
        assert turns.found["accuracy"] == [0.812]
    assert commands[0][:3] == processes.OURS
    assert "train.epochs=1" in commands[0]
    assert commands[1][:2] == processes.TIMM
    assert caches[0] != caches[1]


def test_a_training_compiled_before_starts_from_the_cache_of_one_that_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caches = []

    def run(command: list[str], **environment: str) -> str:
        caches.append(environment["HYBRIDVIT_CACHE"])
        return f"test/accuracy {len(caches)}%"

    monkeypatch.setattr(processes, "run", run)
    turns = processes.training("ours", Whole("fashion_mnist"), [], compiled=True)
    turns.turn(0)
    turns.turn(0)
    assert len(set(caches)) == 1
    assert turns.found["accuracy"] == [0.02, 0.03]


def test_packed_files_are_unpacked_beside(fashion: Path, tmp_path: Path) -> None:
    raw = fashion / "FashionMNIST" / "raw"
    content = {}
    for file in list(raw.iterdir()):
        content[file.name] = file.read_bytes()
        (raw / f"{file.name}.gz").write_bytes(gzip.compress(content[file.name]))
        file.unlink()
    (fashion / "other").mkdir()
    assert processes.unpacked(tmp_path / "nothing", tmp_path) == tmp_path / "nothing"
    copy = tmp_path / "copy"
    copy.mkdir()
    root = processes.unpacked(fashion, copy)
    assert root == copy
    found = {f.name: f.read_bytes() for f in (root / "FashionMNIST" / "raw").iterdir()}
    assert found == content
    assert (root / "other").is_dir()
    assert processes.unpacked(root, tmp_path) == root


def test_a_command_that_fails_is_reported() -> None:
    with pytest.raises(ValueError, match=r"failed: hybridvit: .*nothing.yaml"):
        processes.run([*processes.OURS, "train", "nothing.yaml"])


def test_a_short_command_is_timed() -> None:
    turns = processes.commands(Command("help"))
    assert 0.01 < turns.turn(0) < 100
    assert turns.memory() > 0


def test_runs_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of two short trainings are as many runs of two arms, told apart by their seeds."""
    from hybridvit.report import find_runs

    monkeypatch.setattr(processes, "run", lambda command: cli.main(command[len(processes.OURS) :]))
    processes.make_runs(tmp_path / "runs", 6)
    runs = find_runs([tmp_path / "runs"])
    assert len(runs) == 6
    assert len({run.hash for run in runs}) == 6
    assert sorted(run.seed for run in runs) == [0, 0, 1, 1, 2, 2]
    assert all(run.is_complete for run in runs)


def test_our_data_are_the_first_of_the_same_folder(
    fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many images, and the same test images, from the same files."""
    monkeypatch.setenv("HYBRIDVIT_DATA", str(fashion))
    job = Whole("fashion_mnist", images=200)
    overrides = processes.our_arguments(job, ["train.precision=fp32"], Path("folder"))[2:-1]
    session = Steps(config.load("fashion_mnist.yaml", overrides)).session
    assert len(session.train_split) == 200
    assert len(session.val_split) == 0
    assert len(session.dataset.test) == 60
