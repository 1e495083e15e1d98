from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from hybridvit.engine.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for step in range(25):
    if step == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(10, 2**20) for _ in range(3)]  # 40 MiB each, above glibc's own limit
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_blocks_are_not_cleared_again() -> None:
    pages = {}
    for how in ("keep", "as it is"):
        command = [sys.executable, "-c", SCRIPT, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        pages[how] = int(done.stdout)
    # 20 steps of 3 blocks of 40 MiB in pages of 4 KiB, or of 2 MiB where the kernel gives these.
    assert pages["as it is"] >= 20 * 3 * 20
    assert pages["keep"] < pages["as it is"] / 4
