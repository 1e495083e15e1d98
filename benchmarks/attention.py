"""Plain matrix products against the fused kernel, forward and backward: what
`hybridvit.encoder.attention.prefers_fused` rests on.

    python benchmarks/attention.py            # prints a table
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hybridvit.encoder import attention
from hybridvit.engine.device import wait_for_device
from hybridvit.engine.idle import check_unused

SIZES = (  # batch, heads, tokens, head width
    (128, 3, 17, 64),
    (128, 3, 65, 64),
    (128, 4, 65, 32),
    (32, 3, 50, 64),
    (32, 3, 197, 64),
    (8, 3, 785, 64),
    (4, 6, 1025, 64),
)
ROUNDS = 11


def seconds(qkv: Tensor, gradient: Tensor, fused: bool) -> float:
    """One forward and backward pass; on a GPU of many, or starting them would be measured."""
    attention.prefers_fused = lambda *_: fused  # type: ignore[assignment]
    count = 50 if qkv.is_cuda else 1
    wait_for_device()
    started = time.perf_counter()
    for _ in range(count):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention.attend(q, k, v).backward(gradient)
    wait_for_device()
    return (time.perf_counter() - started) / count


def main() -> None:
    """Time both kinds in turn, for each size and dtype."""
    check_unused()
    chosen: Callable[..., bool] = attention.prefers_fused
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| dtype | batch, heads, tokens, width | plain ms | fused ms | fused is chosen |")
    print("|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        for batch, heads, tokens, width in SIZES:
            qkv = torch.randn(batch, tokens, 3, heads, width, dtype=dtype, device=device)
            qkv.requires_grad_()
            gradient = torch.randn(batch, heads, tokens, width, dtype=dtype, device=device)
            taken: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(ROUNDS):
                for fused in taken:
                    taken[fused].append(seconds(qkv, gradient, fused))
            plain, fused_time = (1000 * statistics.median(taken[kind][2:]) for kind in taken)
            q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            choice = "yes" if chosen(q, k, 0.0, None) else "no"
            size = f"{batch}, {heads}, {tokens}, {width}"
            name = str(dtype).removeprefix("torch.")
            print(f"| {name} | {size} | {plain:.2f} | {fused_time:.2f} | {choice} |", flush=True)


if __name__ == "__main__":
    main()
