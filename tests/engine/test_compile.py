"""What training steps call: compiled blocks or graphs, with or without recomputation."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, make_objective
from torch import Tensor, nn

from hybridvit import config
from hybridvit.cli import main
from hybridvit.config import TrainConfig
from hybridvit.contracts import Batch, DataSpec, Objective
from hybridvit.encoder import attention, gelu, linear
from hybridvit.encoder.block import run_block
from hybridvit.encoder.vit import Encoder
from hybridvit.engine import compile as module
from hybridvit.engine.compile import (
    OPTIONS,
    blocks_run_by,
    check_compile,
    compiler,
    for_training,
)
from hybridvit.engine.describe import describe_model

# torch looks at .grad of what it traces, which warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

SMALL = ["encoder.args.dim=16", "encoder.args.depth=1", "encoder.args.heads=2"]
NOISE = {"dropout": 0.2, "attention_dropout": 0.2, "drop_path": 0.3}
CPU = torch.device("cpu")
ARGS: dict[str, dict[str, Any]] = {
    "mae": {"decoder_dim": 8, "decoder_depth": 3, "decoder_heads": 2},
    "dino": {"hidden_dim": 32, "bottleneck_dim": 16, "output_dim": 64},
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Graphs that were compiled, by a backend that computes as before; for `for_training`, too."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        found.append(graph)
        return graph

    original: Callable[..., Any] = torch.compile

    def compile_(
        model: Any, *, dynamic: bool | None = None, mode: str | None = None, options: Any = None
    ) -> Any:
        assert options == (OPTIONS if mode is None else None)
        return original(model, backend=backend, dynamic=dynamic)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", compile_)
    return found


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` traces forward and backward, and computes as before. (A plain backend
    would recompute with other random numbers: restoring them is a part of the traced graph.)"""
    original: Callable[..., Any] = torch.compile

    def compile_(
        model: Any, *, dynamic: bool | None = None, mode: str | None = None, options: Any = None
    ) -> Any:
        assert options == (OPTIONS if mode is None else None)
        return original(model, backend="aot_eager", dynamic=dynamic)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", compile_)


def batch_of(objective: Objective) -> Batch:
    others = tuple(make_batch(4, seed=view).images for view in range(1, objective.views))
    return dataclasses.replace(make_batch(4), others=others)


def gradients(called: Any, objective: Objective) -> dict[str, Tensor]:
    """Loss and gradients of one step, by the same random numbers."""
    torch.manual_seed(0)
    loss = called(batch_of(objective)).loss
    loss.backward()
    found = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def check_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# --- compile ---


@pytest.mark.parametrize(
    ("objective", "count"),
    [
        ("supervised", 2),  # the first block's branches are never dropped
        ("mae", 4),  # two of the encoder, and the decoder's: its last one computes what is read
        ("dino", 3),  # the teacher's without gradient and noise
    ],
)
def test_one_compiled_block_serves_all_that_differ_in_weights_alone(
    objective: str, count: int, graphs: list[Any]
) -> None:
    made = make_objective(objective, encoder_args={"depth": 5, **NOISE}, **ARGS.get(objective, {}))
    plain = copy.deepcopy(made)
    called = for_training(made, TrainConfig(compile="blocks"))
    check_equal(gradients(called, made), gradients(plain, plain))
    assert len(graphs) == count
    gradients(called, made)
    assert len(graphs) == count


@pytest.mark.parametrize("kind", ["whole", "graphs"])
def test_a_whole_objective_is_one_graph(kind: Any, graphs: list[Any]) -> None:
    made = make_objective("mae", encoder_args={"depth": 2}, **ARGS["mae"])
    plain = copy.deepcopy(made)
    called = for_training(made, TrainConfig(compile=kind))
    check_equal(gradients(called, made), gradients(plain, plain))
    assert len(graphs) == 1


def test_without_options_training_calls_the_objective_itself() -> None:
    made = make_objective()
    assert for_training(made, TrainConfig()) is made


def test_only_training_steps_run_what_was_lent(graphs: list[Any]) -> None:
    made = make_objective("mae", **ARGS["mae"])
    encoders = [m for m in made.modules() if isinstance(m, Encoder)]
    assert len(encoders) == 2
    for_training(made, TrainConfig(compile="blocks", grad_checkpointing=True))(batch_of(made))
    assert all(encoder.run_block is run_block for encoder in encoders)
    made.model.features(batch_of(made).images)  # as evaluation does
    count = len(graphs)
    made.model.features(batch_of(made).images[:1])
    assert len(graphs) == count

    def fail(*_: object) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), blocks_run_by(made, fail):
        made(batch_of(made))
    assert all(encoder.run_block is run_block for encoder in encoders)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("train.compile=true", "train.compile=True should be .*none.*blocks.*whole.*graphs"),
        ("train.compile=fast", "train.compile='fast' should be .*none.*blocks.*whole.*graphs"),
        ("train={compile: graphs, accumulate: 2}", "train.accumulate=2 should be 1 with .*graphs"),
    ],
)
def test_what_the_config_refuses(values: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.load("digits.yaml", [values])


def test_what_the_machine_cannot_do_is_said_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not torch.cuda.is_available():
        arguments = ["train", "digits.yaml", "train.compile=graphs", f"out={tmp_path / 'run'}"]
        assert main(arguments) == 2
        assert "there is no GPU here; use 'whole'" in capsys.readouterr().err
        assert not (tmp_path / "run" / "run.json").exists()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler: install no-such-compiler"):
        check_compile(TrainConfig(compile="blocks"), CPU)
    check_compile(TrainConfig(), CPU)
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(ValueError, match=f"{broken} is there and does not run; name another in"):
        check_compile(TrainConfig(compile="blocks"), CPU)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if name == "clang" else None)
    check_compile(TrainConfig(compile="graphs"), torch.device("cuda"))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C compiler, by which Triton"):
        check_compile(TrainConfig(compile="graphs"), torch.device("cuda"))


def test_compiling_without_pythons_headers_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_compile(TrainConfig(compile="blocks"), CPU)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    check_compile(TrainConfig(), CPU)
    with pytest.raises(ValueError, match=r"needs Python's headers, and there is no .*Python\.h"):
        check_compile(TrainConfig(compile="blocks"), CPU)


def test_graphs_are_for_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridvit.engine.ranks.count", lambda: 2)
    with pytest.raises(ValueError, match="is for one GPU, and there are 2 ranks"):
        check_compile(TrainConfig(compile="graphs"), torch.device("cuda"))


@pytest.fixture
def torchs_defaults() -> Iterator[None]:
    """What torch sets for code on GPUs, again as it was afterwards."""
    functorch: Any = torch._functorch.config
    dynamo: Any = torch._dynamo.config
    with functorch.patch(graphsafe_rng_functionalization=True), dynamo.patch(optimize_ddp=True):
        yield


@pytest.mark.usefixtures("torchs_defaults")
def test_what_torch_would_change_on_gpus_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generators of recomputed dropout that no seed reaches, and blocks in parts under DDP."""
    made = make_objective("supervised")
    for_training(made, TrainConfig(compile="blocks"))
    assert torch._functorch.config.graphsafe_rng_functionalization
    assert torch._dynamo.config.optimize_ddp
    for_training(made, TrainConfig(compile="blocks", grad_checkpointing=True))
    assert not torch._functorch.config.graphsafe_rng_functionalization
    monkeypatch.setattr("hybridvit.engine.ranks.count", lambda: 2)
    for_training(made, TrainConfig(compile="blocks"))
    assert not torch._dynamo.config.optimize_ddp


# --- recomputation ---


def saved_bytes(called: Any, objective: Objective) -> int:
    """What a forward pass keeps for the backward pass beside the weights, each storage once."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        called(batch_of(objective))
    weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    return sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("kind", ["none", "blocks", "whole"])
@pytest.mark.parametrize("objective", ["supervised", "mae", "dino"])
@pytest.mark.usefixtures("traced")
def test_recomputation_changes_no_bit(objective: str, kind: Any) -> None:
    made = make_objective(objective, encoder_args={"depth": 3, **NOISE}, **ARGS.get(objective, {}))
    plain = copy.deepcopy(made)
    called = for_training(made, TrainConfig(compile=kind, grad_checkpointing=True))
    ours, next_draw = gradients(called, made), torch.rand(1)
    check_equal(ours, gradients(plain, plain))
    if kind == "none":  # compiled code leaves the generator elsewhere; each step seeds it anew
        assert torch.equal(torch.rand(1), next_draw)


@pytest.mark.parametrize(("objective", "kind"), [("supervised", "blocks"), ("mae", "whole")])
@pytest.mark.usefixtures("traced")
def test_recomputation_in_bf16_changes_no_bit_and_keeps_what_it_does_with_torchs_layers(
    objective: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linear layers and GELU have functions of their own for autograd there."""
    monkeypatch.setattr(linear, "FEW", 1)
    monkeypatch.setattr(linear, "threads", lambda: 2)
    deep = {"depth": 3, "dropout": 0.1}
    made = make_objective(objective, encoder_args=deep, **ARGS.get(objective, {}))
    plain, theirs = copy.deepcopy(made), copy.deepcopy(made)
    recomputing = TrainConfig(compile=kind, grad_checkpointing=True)
    with torch.autocast("cpu", torch.bfloat16):
        step, whole = (
            for_training(made, recomputing),
            for_training(plain, TrainConfig(compile=kind)),
        )
        check_equal(gradients(step, made), gradients(whole, plain))
        kept = saved_bytes(step, made)
        assert kept < saved_bytes(whole, plain)
        torch.compiler.reset()
        monkeypatch.setattr(linear.Linear, "forward", nn.Linear.forward)
        monkeypatch.setattr(gelu.GELU, "forward", nn.GELU.forward)
        monkeypatch.setattr(attention, "linear", F.linear)
        of_theirs = saved_bytes(for_training(theirs, recomputing), theirs)
    if torch.__version__ >= torch.torch_version.TorchVersion("2.15"):  # 2.11 keeps their inputs
        assert kept == of_theirs
    else:
        assert kept > of_theirs


def test_recomputation_keeps_the_inputs_of_blocks_alone() -> None:
    depth, width, tokens = 6, 16, 17
    encoder = {"depth": depth, "dim": width, "heads": 2, "dropout": 0.1}
    made = make_objective(encoder_args=encoder)
    kept = saved_bytes(for_training(made, TrainConfig(grad_checkpointing=True)), made)
    whole = saved_bytes(made, made)
    assert kept < whole / 8
    # What another block adds: its input, and nothing else.
    deeper = make_objective(encoder_args={**encoder, "depth": depth + 1})
    called = for_training(deeper, TrainConfig(grad_checkpointing=True))
    assert saved_bytes(called, deeper) - kept == 4 * 4 * tokens * width


def test_a_description_knows_what_is_recomputed() -> None:
    def described(*overrides: str) -> dict[str, Any]:
        loaded = config.load("digits.yaml", ["encoder.args.depth=4", *overrides])
        made = make_objective(encoder_args={"depth": 4})
        spec = DataSpec(10, (16, 16), 3, (0.5,) * 3, (0.5,) * 3)
        return describe_model(made, spec, loaded)

    plain, less = described(), described("train.grad_checkpointing=true")
    assert less["activation_bytes"] < plain["activation_bytes"] / 2
    assert less["flops"] == plain["flops"]  # of the method, not of how it is computed


# --- the cache ---


def test_compiled_code_is_kept_where_decoded_images_are(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(module.CACHE, raising=False)
    module.keep_compiled()
    assert os.environ[module.CACHE] == str(cache_folder / "compiled")
    monkeypatch.setenv(module.CACHE, str(tmp_path / "mine" / "cache"))
    module.keep_compiled()
    assert os.environ[module.CACHE] == str(tmp_path / "mine" / "cache")
    monkeypatch.delenv(module.CACHE)
    monkeypatch.setenv("HYBRIDVIT_CACHE", "")
    module.keep_compiled()
    assert module.CACHE not in os.environ
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HYBRIDVIT_CACHE", str(tmp_path / "file"))
    module.keep_compiled()
    assert module.CACHE not in os.environ


def test_compiled_code_is_not_shared_with_other_users(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading it runs it."""
    monkeypatch.delenv(module.CACHE, raising=False)
    (cache_folder / "compiled").mkdir(mode=0o777)
    (cache_folder / "compiled").chmod(0o777)
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    module.keep_compiled()
    assert module.CACHE not in os.environ
    monkeypatch.setattr(os, "getuid", lambda: me)
    module.keep_compiled()
    assert module.CACHE not in os.environ  # where all may write
    (cache_folder / "compiled").chmod(0o775)
    module.keep_compiled()
    assert module.CACHE not in os.environ  # where others of a group may have
    (cache_folder / "compiled").rmdir()
    cache_folder.chmod(0o777)
    module.keep_compiled()
    assert module.CACHE not in os.environ  # where all may put another folder
    cache_folder.chmod(0o755)
    module.keep_compiled()
    assert os.environ[module.CACHE] == str(cache_folder / "compiled")
    assert (cache_folder / "compiled").stat().st_mode & 0o777 == 0o700


def test_linear_layers_are_found_again_wherever_the_user_keeps_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(module.CACHE, str(tmp_path))
    with torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=False):
        module.keep_compiled()
        assert torch._functorch.config.autograd_cache_allow_custom_autograd_functions
    assert os.environ[module.CACHE] == str(tmp_path)


START = """
import json, sys
from pathlib import Path
from hybridvit import config
from hybridvit.engine.run import train
loaded = config.load("digits.yaml", sys.argv[2:])
outcome = train(loaded, name="a", out=Path(sys.argv[1]), show=False)
from torch._dynamo.utils import counters
print(json.dumps({"status": outcome.status, **counters["inductor"], **counters["aot_autograd"]}))
"""


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler, which torch needs on a CPU")
def test_another_seed_starts_from_what_the_first_compiled(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, whose linear layers have functions of their own for autograd."""
    monkeypatch.delenv(module.CACHE, raising=False)

    def start(seed: int) -> dict[str, Any]:
        overrides = [*SMALL, "train.compile=blocks", "train.epochs=0.2", f"seed={seed}"]
        overrides += ["train.precision=bf16"]
        command = [sys.executable, "-c", START, str(tmp_path / f"{seed}"), *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    first, second = start(0), start(1)
    assert first["status"] == second["status"] == "complete"
    assert first["fxgraph_cache_miss"] > 0
    assert "fxgraph_cache_miss" not in second
    assert second["fxgraph_cache_hit"] == first["fxgraph_cache_miss"]
    assert "autograd_cache_miss" not in second
    assert second["autograd_cache_hit"] == first["autograd_cache_miss"]
    assert "autograd_cache_bypass" not in second
    assert any((cache_folder / "compiled").iterdir())
    assert not list(tmp_path.rglob("*.so"))
