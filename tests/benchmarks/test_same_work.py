"""Contestants of a case do the same work: the same images, parameters and FLOPs."""

from __future__ import annotations

import random
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
import ours
import peers
import pytest
import torch
from bench_jobs import needs
from cases import CASES, Input, Model, Training
from noise import MEAN, STD, pictures
from settings import Setting
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hybridvit import build
from hybridvit.analysis import cost
from hybridvit.engine.bench import Steps

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own
JOBS = {
    (c.framework, c.job): f"{name}-{c.framework}"
    for name, case in CASES.items()
    for c in case.contestants.values()
    if isinstance(c.job, Training) and c.framework != "ours"
}


@pytest.mark.parametrize(("framework", "job"), JOBS, ids=JOBS.values())
def test_peers_train_the_same_model(framework: str, job: Training) -> None:
    """Parameters and FLOPs at full size, on the meta device."""
    needs(framework)
    parameters, flops = our_size(job)
    with torch.device("meta"):
        peer, loss_of = peers.PEERS[framework](job, Setting(plain_attention=True))
        images, labels = torch.empty(2, 3, job.image, job.image), torch.zeros(2).long()
    # lightly's encoder holds a mask token that its own masked autoencoder does not use.
    unused = job.model.dim if framework == "lightly" else 0
    assert trainable(peer) == parameters + unused
    with FlopCounterMode(display=False) as counter:
        loss_of(peer.train(), images, labels).backward()
    assert counter.get_total_flops() / 2 == flops + avoidable_flops(framework, job)


def avoidable_flops(framework: str, job: Training) -> int:
    """What a peer computes of an image and ours does not: the last block's tokens that nobody
    reads, that is, all but the class token, or but the hidden patches of a decoder. In masked
    autoencoders both peers embed hidden patches, transformers predicts kept ones and the class
    token, too."""
    patches, pixels = (job.image // job.patch) ** 2, 3 * job.patch**2
    if job.decoder is None:
        return unread_flops(job.model.dim, 1 + patches, patches)
    # Two a multiplication and addition; forward and for the weights, for the inputs, too, where
    # these are no images.
    embedded = 2 * 2 * (patches - patches // 4) * pixels * job.model.dim
    predicted = 2 * 3 * (patches // 4 + 1) * job.decoder.dim * pixels
    decoded = unread_flops(job.decoder.dim, 1 + patches, 1 + patches // 4)
    return embedded + decoded + (predicted if framework == "transformers" else 0)


def unread_flops(dim: int, tokens: int, unread: int) -> int:
    """Query, projection, MLP, scores and weighted sum of so many tokens of a block."""
    return 2 * 3 * unread * (10 * dim**2 + 2 * tokens * dim)


@cache
def our_size(job: Training) -> tuple[int, int]:
    """Trainable parameters, and FLOPs an image."""
    run = ours.training_config(replace(job, batch=2), [])
    parts, _ = build.make_parts(run.plugins)
    spec = build.make_dataset(run, parts).spec()
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(build, "seeded", lambda *_: nullcontext())  # a seed has to have a value
        objective = build.make_objective(build.resolve(run, parts), parts, spec)
    counted = cost.measure(objective, (job.image, job.image))
    assert counted.forward_flops is not None
    assert counted.backward_flops is not None
    return trainable(objective), counted.forward_flops + counted.backward_flops


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_all_train_on_the_same_images() -> None:
    job = Training(16, 4, 6, Model(16, 1, 2))
    theirs, their_labels = peers.normalised_batch(job)
    batch = next(Steps(ours.training_config(job, [])).batches)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    where = batch.index.cpu()  # ours come in another order
    torch.testing.assert_close((batch.images.cpu() - mean) / std, theirs.cpu()[where])
    assert torch.equal(batch.labels.cpu(), their_labels.cpu()[where])


def test_noise_has_the_statistics_that_peers_normalise_with() -> None:
    pixels = pictures(256, 32)[0] / 255
    for found, named in ((pixels.mean((0, 2, 3)), MEAN), (pixels.std((0, 2, 3)), STD)):
        torch.testing.assert_close(found, torch.tensor(named), atol=3e-3, rtol=0)


@pytest.mark.parametrize("policy", ["flip", "randaugment"])
def test_inputs_end_in_the_same_kind_of_tensor(
    policy: Literal["flip", "randaugment"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Normalised float32 of like moments.

    timm's policy fills with the mean that it normalises by, ours with black: with a mean of black
    they do the same work, and ours is moved to it.
    """
    import loaders

    moved = torch.zeros(3, 1, 1)
    if policy == "randaugment":
        monkeypatch.setattr(loaders, "MEAN", (0.0, 0.0, 0.0))
        moved = (torch.tensor(MEAN) / torch.tensor(STD)).view(3, 1, 1)
    random.seed(0)
    np.random.seed(0)  # timm chooses its operations with it
    torch.manual_seed(0)
    job = Input(policy, batch=512, images=512, workers=0)
    made = loaders.LOADERS["torchvision" if policy == "flip" else "timm"](job)
    theirs = next(iter(made))[0]
    images = next(ours.normalised(Steps(ours.input_config(job, [])))) + moved
    assert images.shape == theirs.shape == (512, 3, 32, 32)
    assert images.dtype == theirs.dtype == torch.float32
    near = 0.08 if policy == "flip" else 0.1
    for moment in (torch.mean, torch.std):
        assert moment(images).item() == pytest.approx(moment(theirs).item(), abs=near)


def test_a_peers_process_imports_nothing_of_ours() -> None:
    """Else it would run with our settings of process and allocator."""
    code = """
import worker, peers, loaders, sys
print([m for m in sys.modules if m.startswith('hybridvit')])
"""
    folder = peers.__file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
