"""What the tests of the benchmarks share."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
from cases import Contestant, Input, Model, Training


def needs(framework: str) -> None:
    """Skip where a peer is missing that only the extra `bench` installs."""
    if framework == "transformers" and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed; it comes with the extra 'bench'")


def tiny(contestant: Contestant) -> Contestant:
    """The same contestant with little to do."""
    job = contestant.job
    small = Model(16, 1, 2)
    if isinstance(job, Training):
        image = {"linear": 16, "r26": 32, "r50": 16}[job.stem]
        decoder = small if job.decoder else None
        job = replace(job, image=image, patch=4, batch=2, model=small, classes=5, decoder=decoder)
    elif isinstance(job, Input):
        job = replace(job, images=16, batch=4, workers=0)
    return replace(contestant, job=job)
