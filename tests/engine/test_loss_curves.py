"""Accuracy is not traded for speed: fast paths train as the plain one does, from one seed.

Tolerances are the mean distance of two loss curves over what the plain loss falls by. Another seed
is 0.07 to 0.3 away. Of attention along axes and with a bias there is no curve: `test_attention.py`
has its values.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvit import config
from hybridvit.encoder import attention, layout, linear
from hybridvit.encoder.vit import Encoder
from hybridvit.engine.compile import compiler
from hybridvit.engine.run import train

PLAIN = [
    "train.batch_size=64", "train.log_every=10", "encoder.args.dim=32", "encoder.args.depth=2",
    "encoder.args.heads=2", "train.epochs=6", "train.threads=1",
]  # fmt: skip
OBJECTIVES = {
    "supervised": [],
    "masked_patch": [],
    # One block: with its decoder's it has all kinds, and each more is ten kernels to compile.
    "mae": [
        "objective.args={decoder_dim: 32, decoder_depth: 1, decoder_heads: 2}",
        "encoder.args.depth=1",
    ],
}
ROUNDING = 1e-3  # of sums in another order, which training amplifies
BF16 = 0.01  # of 8 bits at every step, no bias
CONV = ["stem={name: conv, args: {channels: [8, 8]}}", "train.epochs=3"]


def curve(out: Path, objective: str, *overrides: str) -> Tensor:
    named = [f"objective.name={objective}", *OBJECTIVES[objective]]
    setup = config.load("digits.yaml", [*PLAIN, *named, *overrides])
    path = train(setup, name="a", out=out, show=False).path
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([x["train/loss"] for x in lines if "train/loss" in x])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """In float32, nothing compiled, two matrix products an attention, every token computed."""
    out = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "prefers_fused", lambda *_: False)
        patch.setattr(Encoder, "_tokens_are_alone", lambda *_: False)
        found = {name: curve(out / name, name) for name in OBJECTIVES}
    assert all(losses[-1] < 0.8 * losses[0] for losses in found.values())
    return found


def distance(ours: Tensor, exact: Tensor) -> float:
    return ((ours - exact).abs().mean() / (exact[0] - exact[-1])).item()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        ([], ROUNDING),  # the last block computes what is read alone
        (["train.grad_checkpointing=true"], ROUNDING),
        (["data.resident=false", "data.workers=0"], ROUNDING),
        (["train.accumulate=2"], ROUNDING),
        (["train.precision=bf16"], BF16),
        (["train.precision=bf16_params"], BF16),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_fast_path_trains_as_the_plain_one(
    overrides: list[str],
    tolerance: float,
    objective: str,
    plain: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bf16 linear layers are our own; where oneDNN has no bf16, with torch's product in its
    place."""
    monkeypatch.setattr(linear, "threads", lambda: 2)
    monkeypatch.setattr(linear, "FEW", 1)
    if not linear.joins_bias():
        monkeypatch.setattr(linear, "joins_bias", lambda: True)
        monkeypatch.setattr(linear, "joined", F.linear)
    fast = curve(tmp_path / "run", objective, *overrides)
    assert distance(fast, plain[objective]) < tolerance


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", ROUNDING), ("bf16", BF16)])
def test_so_does_a_stem_of_convolutions_with_channels_last(
    precision: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(layout, "prefers_channels_last", lambda *_: False)
        plain = curve(tmp_path / "plain", "supervised", *CONV)
    fast = curve(tmp_path / "run", "supervised", *CONV, f"train.precision={precision}")
    assert distance(fast, plain) < tolerance


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_so_does_fused_attention(
    objective: str, plain: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "prefers_fused", lambda *_: True)
    fast = curve(tmp_path / "run", objective)
    assert distance(fast, plain[objective]) < ROUNDING


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler, which torch needs on a CPU")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's, as it traces
@pytest.mark.parametrize(
    ("objective", "compiled", "precision", "tolerance"),
    [
        ("supervised", "blocks", "fp32", ROUNDING),
        ("supervised", "blocks", "bf16", BF16),
        ("supervised", "whole", "bf16_params", BF16),
        ("mae", "whole", "bf16_params", BF16),
    ],
)
def test_so_does_compiled_code(
    objective: str,
    compiled: str,
    precision: str,
    tolerance: float,
    plain: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bf16 the gradients of weights are sums of two parts. C++ is compiled as users have it:
    torch 2.15 stores 32 lanes of bf16 by a mask shifted by 64 bits, which is undefined. When they
    optimise, g++ and clang make it all lanes; g++ makes it none when it does not."""
    monkeypatch.setattr(linear, "threads", lambda: 2)
    monkeypatch.setattr(linear, "FEW", 1)
    torch.compiler.reset()
    setup = [f"train.compile={compiled}", f"train.precision={precision}"]
    fast = curve(tmp_path / "run", objective, *setup)
    assert distance(fast, plain[objective]) < tolerance


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_measure_sees_another_seed(
    objective: str, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    other = curve(tmp_path / "run", objective, "seed=1")
    assert distance(other, plain[objective]) > 3 * BF16
