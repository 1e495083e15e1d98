"""What importing Fabric imports."""

from __future__ import annotations

import subprocess
import sys

LOOK = """
import sys
import hybridvit.engine.run
assert "torchmetrics" not in sys.modules
from lightning_fabric.utilities import imports
assert imports._TORCHMETRICS_GREATER_EQUAL_1_0_0
import torchmetrics
print(torchmetrics.Accuracy)
"""


def test_torchmetrics_is_not_imported_and_can_be() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Accuracy" in done.stdout
