"""What `Objective` promises, as checks."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybridvit.analysis import cost
from hybridvit.analysis.leakage import leakage
from hybridvit.conformance.outputs import (
    check_holds_model,
    check_loss,
    check_metrics,
    check_picture,
    check_prediction,
)
from hybridvit.conformance.suite import (
    MODES,
    Suite,
    batch,
    check_copy,
    check_gradients,
    check_meta,
    check_state,
    enliven,
    on,
    one_objective,
    reason_of,
    relative,
    require,
    seeded,
)
from hybridvit.contracts import Batch, Objective, Prediction, StepOutput
from hybridvit.encoder.model import HybridViT


class Setting(NamedTuple):
    """What an objective or a target is tried on."""

    stem: str
    stem_args: dict[str, Any]
    size: tuple[int, int]  # (H, W) of the images
    channels: int = 3


SMALL_CONV = {"channels": [8, 8, 8], "norm": "group"}  # stride 8; its norms see whole images
LINEAR = Setting("linear", {"patch": 8}, (32, 32))
SETTINGS = {
    "on the linear stem": LINEAR,
    "on a stem that mixes patches": Setting("conv", SMALL_CONV, (32, 48)),
    "on grey images": Setting("linear", {"patch": 8}, (32, 32), channels=1),
}


class ObjectiveConformance(Suite):
    """An objective's checks, on a patch-local stem, on one that mixes, and on grey images.

    `class TestMine(ObjectiveConformance): factory = MyObjective` runs them in pytest.
    """

    registry = "objectives"
    gates = ("test_builds", "test_views", "test_loss")

    def test_builds(self) -> None:
        self.check_arguments()
        for where, setting in SETTINGS.items():
            with on(where):
                check_holds_model(self.fresh(setting))

    def test_views(self) -> None:
        objective, data = self.lively(LINEAR)
        with on(f"a batch of {objective.views} view(s), as declared"):
            objective(data)
        for i, view in enumerate(data.others):
            others = (*data.others[:i], 1 - view, *data.others[i + 1 :])
            changed = dataclasses.replace(data, others=others)
            losses = [quiet_loss(objective.eval(), one) for one in (data, changed)]
            require(
                not torch.equal(*losses),
                f"declares views={objective.views}, but the loss does not depend on view {i + 2}: "
                "declare how many it uses",
            )

    def test_loss(self) -> None:
        for where, objective, data in self.everywhere():
            with on(where):
                output = objective(data)
                require(
                    isinstance(output, StepOutput),
                    f"gives {type(output).__name__}: return StepOutput(loss, metrics)",
                )
                check_loss(output.loss)
                check_metrics(output.metrics)

    def test_evaluated(self) -> None:
        objective, data = self.lively(LINEAR)
        network = getattr(objective, objective.evaluated, None)
        require(
            isinstance(network, HybridViT),
            f"declares evaluated={objective.evaluated!r}, which is {type(network).__name__}: "
            "name an attribute that holds a HybridViT",
        )
        assert isinstance(network, HybridViT)
        with torch.no_grad():
            features = network.eval().features(data.images)
        require(features.isfinite().all(), "its features are not finite")

    def test_gradients(self) -> None:
        for where, objective, data in self.everywhere("train", count=8):
            with on(where):
                objective(data).loss.backward()
                check_gradients(objective)

    def test_draws(self) -> None:
        """Random draws come from the images' keys: global seeds change no loss."""
        for where, objective, data in self.everywhere():
            without_dropout(objective)
            with on(where):
                losses = [quiet_loss(objective, data, seed=seed) for seed in (1, 2)]
                require(
                    torch.equal(*losses),
                    "the loss of a batch changes with the global seed: draw from batch.key (see "
                    "hybridvit.draws), and drop out by nn.Dropout",
                )

    def test_neighbours(self) -> None:
        """What is hidden and predicted of an image does not depend on the images beside it."""
        for where, objective, data in self.everywhere("eval"):
            with on(where), torch.no_grad():
                together = objective.predict(data)
                alone = objective.predict(mapped(data, lambda x: x[2:]))
                if together is None or alone is None:
                    self.note = HIDES_NOTHING
                    return
                for name, a, b in zip(Prediction._fields, alone, together, strict=True):
                    require(
                        a.shape == b[2:].shape and relative(a, b[2:]) < 1e-4,
                        f"`{name}` of an image changes with its neighbours in the batch: draw for "
                        "each image from its own key",
                    )

    def test_prediction(self) -> None:
        for where, objective, data in self.everywhere():
            with on(where):
                prediction = objective.predict(data)
                if prediction is None:
                    self.note = HIDES_NOTHING
                    return
                check_prediction(prediction, objective, data)

    def test_hidden_pixels(self) -> None:
        """No token and no prediction depends on a hidden pixel of any image of the batch."""
        for where, objective, data in self.everywhere():
            with on(where):
                found = leakage(objective, data, training=objective.training)
                if found is None:
                    self.note = HIDES_NOTHING
                    return
                require(isfinite(found.gradient), "gradients are not finite")
                require(
                    found.is_zero,
                    f"{found.tokens:.0%} of the tokens and {found.outputs:.0%} of the predictions "
                    f"change with hidden pixels, {found.gradient:.2%} of their squared gradient "
                    "is on them: choose patches by batch.key, and fill them before the stem "
                    "(hybridvit.objectives.hiding.Fill)",
                )

    def test_trains_what_it_predicts(self) -> None:
        """forward shows the stem what predict shows it: leakage is measured on predict."""
        for where, objective, data in self.everywhere():
            with on(where):
                if objective.predict(data) is None:
                    self.note = HIDES_NOTHING
                    return
                predicted = stem_inputs(objective, "predict", data)
                trained = stem_inputs(objective, "forward", data)
                require(
                    all(any(torch.equal(a, b) for b in trained) for a in predicted),
                    "forward shows the stem other images than predict does, so that what predict "
                    "hides says nothing of what is trained: let forward call predict",
                )

    def test_after_step(self) -> None:
        for where, objective, data in self.everywhere("train"):
            with on(where):
                before, model = trainable(objective), objective.model
                for step in (1, 2):
                    train_step(objective, data, step)
                check_loss(objective(data).loss)
                after = trainable(objective)
                kept = after.keys() == before.keys() and all(after[n] is before[n] for n in after)
                require(
                    kept and objective.model is model,
                    "after_step replaces, freezes or frees parameters, which the optimizer does "
                    "not see: change values in place, under torch.no_grad()",
                )

    def test_pictures(self) -> None:
        for where, objective, data in self.everywhere("eval"):
            with on(where):
                pictures = objective.pictures(data)
                for name, row in pictures.items():
                    check_picture(name, row, data.images)
                if not pictures:
                    self.note = "gives none"

    def test_constant_images(self) -> None:
        for where, objective, data in self.everywhere("train"):
            with on(f"{where}, images of one colour"):
                for color in (0.0, 0.5, 1.0):
                    objective.zero_grad()
                    flat = torch.full_like(data.images, color)
                    others = (flat,) * len(data.others)
                    loss = objective(dataclasses.replace(data, images=flat, others=others)).loss
                    check_loss(loss)
                    loss.backward()
                    check_gradients(objective, reached=False)

    def test_batch_is_kept(self) -> None:
        for where, objective, data in self.everywhere():
            before = copy.deepcopy(data)
            with on(where):
                objective(data)
                objective.pictures(data)
                for field in dataclasses.fields(Batch):
                    now, then = getattr(data, field.name), getattr(before, field.name)
                    require(
                        all(map(torch.equal, now, then)),
                        f"changes batch.{field.name} in place: others use it, too; copy first",
                    )

    def test_bf16(self) -> None:
        for where, objective, data in self.everywhere("train"):
            with on(f"{where}, bf16 autocast"):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = objective(data).loss
                check_loss(loss)
                loss.backward()
                check_gradients(objective, reached=False)

    def test_compile(self) -> None:
        """torch.compile takes it and computes the same; breaks of the graph are only slow."""
        objective, data = self.lively(LINEAR)
        expected = quiet_loss(objective.eval(), data)
        with on("torch.compile"):
            try:
                loss = compiled_loss(objective, data, fullgraph=True)
            except Exception as error:  # dynamo's own, or the objective's, which comes again
                self.note = f"breaks the graph, which is slow: {reason_of(error)}"
                loss = compiled_loss(objective, data, fullgraph=False)
            gap = relative(loss, expected)
            require(gap < 1e-4, f"the loss differs once compiled ({gap:.1%})")

    def test_checkpoint(self) -> None:
        for where, setting in SETTINGS.items():
            objective, data = self.lively(setting)
            with on(where):
                for step in (1, 2):
                    train_step(objective.train(), data, step)
                check_state(objective, self.fresh(setting, seed=1), partial(shown, data=data))

    def test_copy(self) -> None:
        objective, data = self.lively(LINEAR)
        train_step(objective.train(), data, 1)
        check_copy(objective, partial(shown, data=data))

    def test_device(self) -> None:
        objective = self.fresh(LINEAR)
        self.note = check_meta(lambda: on_meta(objective, LINEAR.size))
        if not self.note and cost.measure(objective, LINEAR.size, 4).forward_flops is None:
            self.note = f"FLOPs cannot be counted: {cost.UNCOUNTED}"

    def fresh(self, setting: Setting, *, seed: int = 0) -> Objective:
        """The objective as a run would build it."""
        return one_objective(
            self.parts,
            (self.name, self.args),
            (setting.stem, setting.stem_args),
            setting.size,
            channels=setting.channels,
            seed=seed,
        )

    def lively(self, setting: Setting, count: int = 4) -> tuple[Objective, Batch]:
        """The objective with weights that all matter, and a batch for it."""
        objective = self.fresh(setting)
        enliven(objective)
        views = objective.views
        return objective, batch(setting.size, count=count, channels=setting.channels, views=views)

    def everywhere(self, *modes: str, count: int = 4) -> Iterator[tuple[str, Objective, Batch]]:
        """In each setting and mode: where that is, the objective, and a batch."""
        for setting_name, setting in SETTINGS.items():
            for mode in modes or MODES:
                where = f"{setting_name}, {mode} mode"
                with on(where):
                    objective, data = self.lively(setting, count)
                yield where, objective.train(MODES[mode]), data


HIDES_NOTHING = "nothing to check: predict returns None, so nothing is hidden"


def mapped(data: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """A batch with every tensor changed."""
    others = tuple(map(change, data.others))
    return Batch(
        change(data.images), change(data.labels), change(data.index), change(data.key), others
    )


def without_dropout(objective: Objective) -> None:
    """Turn nn.Dropout off, which may draw from torch's global generator."""
    for module in objective.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def quiet_loss(objective: Objective, data: Batch, *, seed: int = 0) -> Tensor:
    """Loss of a copy, with the global generators seeded."""
    with seeded(seed):
        loss: Tensor = copy.deepcopy(objective)(copy.deepcopy(data)).loss.detach()
    return loss


def compiled_loss(objective: Objective, data: Batch, *, fullgraph: bool) -> Tensor:
    """Loss of a compiled copy."""
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(objective), backend="eager", fullgraph=fullgraph)
    with seeded(0), warnings.catch_warnings():
        # After a break of the graph dynamo asks tensors for gradients that they do not have.
        warnings.simplefilter("ignore")
        loss: Tensor = compiled(data).loss.detach()
    return loss


def stem_inputs(objective: Objective, method: str, data: Batch) -> list[Tensor]:
    """The images that enter the model's stem in one of the objective's methods."""
    probe, inputs = copy.deepcopy(objective), []

    def note(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        inputs.append((args[0] if args else kwargs["images"]).detach().clone())

    probe.model.stem.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad(), seeded(0):
        getattr(probe, method)(data)
    return inputs


def train_step(objective: Objective, data: Batch, step: int) -> None:
    """One step of gradient descent, and what comes after it."""
    objective.zero_grad()
    objective(data).loss.backward()
    with torch.no_grad():
        for p in objective.parameters():
            if p.requires_grad and p.grad is not None:
                p.sub_(1e-3 * p.grad)
    objective.after_step(step)


def trainable(objective: Objective) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: p for name, p in objective.named_parameters() if p.requires_grad}


def shown(objective: Objective, data: Batch) -> Tensor:
    """Loss, predictions and features in eval mode, as one row; its state stays."""
    objective.eval()
    state = copy.deepcopy(objective.state_dict())
    with torch.no_grad(), seeded(0):
        prediction = objective.predict(data)
        seen = [objective(data).loss, getattr(objective, objective.evaluated)(data.images)]
        seen += [] if prediction is None else [prediction.outputs]
    objective.load_state_dict(state)
    return torch.cat([x.flatten().float() for x in seen])


def on_meta(objective: Objective, size: tuple[int, int]) -> None:
    """One forward pass of shapes alone."""
    data = mapped(batch(size, views=objective.views), lambda x: x.to("meta"))
    copy.deepcopy(objective).to("meta").train()(data)
