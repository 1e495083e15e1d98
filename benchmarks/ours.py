"""hybridvit as a contestant: config, overrides, and what `hybridvit train` builds of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from cases import Input, Training
from torch import Tensor
from turns import Turns, ready

from hybridvit import config
from hybridvit.analysis import cost
from hybridvit.config import RunConfig
from hybridvit.contracts import Objective
from hybridvit.engine.bench import Steps

STEMS = {
    "linear": "stem={{name: linear, args: {{patch: {patch}}}}}",
    "r26": "stem={{name: resnet, args: {{blocks: [2, 2, 2, 2]}}}}",
    "r50": "stem={{name: resnet, args: {{blocks: [3, 4, 9]}}}}",
}


def training(job: Training, overrides: list[str]) -> Turns:
    """Training steps on one batch that stays on the device."""
    run = training_config(job, overrides)
    steps = Steps(run)
    steps.batches = itertools.repeat(next(steps.batches))

    def step() -> int:
        steps.run(lambda _: None)
        return job.batch

    objective = steps.session.objective
    return ready(
        step,
        parameters=sum(p.numel() for p in objective.parameters() if p.requires_grad),
        flops_per_image=flops_per_image(objective, job),
    )


def flops_per_image(objective: Objective, job: Training) -> float:
    """FLOPs of a step, forward and backward."""
    counted = cost.measure(objective, (job.image, job.image))
    assert counted.forward_flops is not None
    assert counted.backward_flops is not None
    return counted.forward_flops + counted.backward_flops


def training_config(job: Training, overrides: list[str]) -> RunConfig:
    """The config of a job."""
    model = job.model
    encoder = f"dim: {model.dim}, depth: {model.depth}, heads: {model.heads}"
    objective = "objective={name: supervised}"
    if job.decoder is not None:
        encoder += ", position: sincos_2d"  # as in the paper and in both peers
        decoder = f"decoder_dim: {job.decoder.dim}, decoder_depth: {job.decoder.depth}"
        heads = f"decoder_heads: {job.decoder.heads}"
        objective = f"objective={{name: mae, args: {{{decoder}, {heads}}}}}"
    return config.load(
        "base.yaml",
        [
            *data(job.batch, job.image, job.classes, job.batch),
            STEMS[job.stem].format(patch=job.patch),
            f"encoder={{name: vit, args: {{{encoder}}}}}",
            objective,
            "optim.clip_norm=null",  # as in the peers' steps
            *overrides,
        ],
    )


def inputs(job: Input, overrides: list[str]) -> Turns:
    """Augmented batches of a resident set, normalised as the model does it."""
    steps = Steps(input_config(job, overrides))
    batches, together = normalised(steps), steps.session.loader.together
    # All that are augmented together: one alone of them takes nothing, or the time of all.
    return ready(lambda: sum(len(next(batches)) for _ in range(together)))


def normalised(steps: Steps) -> Iterator[Tensor]:
    """The images of training batches as they enter a stem."""
    model = steps.session.objective.model
    return ((batch.images - model.mean).div_(model.std) for batch in steps.batches)


def input_config(job: Input, overrides: list[str]) -> RunConfig:
    """The config of a job; its model is not trained."""
    policy = {
        "flip": "data.augment={crop: pad, pad: 4, flip: true}",
        "randaugment": "data.augment={crop: resized, scale: [0.08, 1.0], flip: true, "
        "policy: rand, policy_ops: 2, policy_magnitude: 27}",
    }[job.policy]
    return config.load(
        "base.yaml",
        [
            *data(job.images, job.image, 10, job.batch),
            "stem={name: linear, args: {patch: 4}}",
            "encoder={name: vit, args: {dim: 8, depth: 1, heads: 1}}",
            policy,
            "data.resident=true",
            *overrides,
        ],
    )


def data(images: int, size: int, classes: int, batch: int) -> list[str]:
    """Overrides for random images."""
    return [
        'plugins=["noise:register"]',
        f"data={{name: noise, args: {{images: {images}, size: {size}, classes: {classes}}}}}",
        "data.val_fraction=0",
        f"train.batch_size={batch}",
    ]
