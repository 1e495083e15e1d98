"""The limit of the device: FLOPs a second of large bf16 matrix products."""

from __future__ import annotations

import time

from turns import Turns, device, memory_used

from hybridvit.engine.bench import matrix_peak


def product() -> Turns:
    """The best product in each turn."""

    def turn(seconds: float) -> float:
        until, best = time.perf_counter() + seconds, 0.0
        while True:
            best = max(best, matrix_peak(device(), "bf16"))
            if time.perf_counter() >= until:
                return best

    turn(0)
    return Turns(turn, memory_used)
