"""What Fabric imports, and what it does to batches."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridvit.config import Precision
from hybridvit.contracts import Batch
from hybridvit.engine.fabric import make_fabric

LOOK = """
import sys
import hybridvit.engine.run
import hybridvit.studies.preload
assert not {"torchmetrics", "lightly", "pytorch_lightning"} & sys.modules.keys()
from lightning_fabric.utilities import imports
assert imports._TORCHMETRICS_GREATER_EQUAL_1_0_0
import torchmetrics
print(torchmetrics.Accuracy)
"""


def test_torchmetrics_is_not_imported_and_can_be() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Accuracy" in done.stdout


class Looks(nn.Module):
    """Keeps what it is given, and a product of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))

    def forward(self, batch: Batch) -> Tensor:
        self.seen = batch
        self.product = batch.images @ self.weight
        return self.product.float().sum()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_params"])
def test_images_reach_the_objective_as_they_are(precision: Precision) -> None:
    """In float32, whatever products are computed in: targets are made of them."""
    fabric, module = make_fabric(precision), Looks()
    wrapped: Any = fabric.setup(module)
    integers = torch.arange(2, device=fabric.device)
    images = torch.rand(2, 3, 3, 3, device=fabric.device)
    loss = wrapped(Batch(images, integers, integers, integers, (images / 3,)))
    assert torch.equal(module.seen.images, images)
    assert torch.equal(module.seen.others[0], images / 3)
    expected = torch.float32 if precision == "fp32" else torch.bfloat16
    assert module.product.dtype == expected
    assert loss.dtype == torch.float32


def test_a_process_with_a_slurm_job_of_several_tasks_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, said in {"NTASKS": "2", "JOB_ID": "5", "JOB_NAME": "foo", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", said)
    assert make_fabric("fp32").world_size == 1


def test_convolutions_are_as_exact_as_matrix_products() -> None:
    """By default torch computes float32 convolutions in TF32 on GPUs, and products where an
    environment variable says so."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    make_fabric("fp32")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
