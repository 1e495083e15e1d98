"""DINO (Caron et al. 2021): a student predicts what its moving average says of another view."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, remove_weight_norm

from hybridvit.contracts import Batch, Objective, StepOutput
from hybridvit.encoder.attention import Attention
from hybridvit.encoder.block import Block
from hybridvit.objectives.views import both_views, no_autocast, picture_rows, spread, widened

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT


class DINO(Objective):
    """Self-distillation of two augmented views, by lightly's DINO loss, heads and EMA update.

    The student is `model`, the teacher its moving average, which evaluation probes. Both see both
    views; there are no smaller crops. The teacher has no dropout and no stochastic depth; its
    stem's BatchNorm takes the batch's statistics. The centre of the teacher's outputs moves with
    each micro-batch, the teacher with each optimizer step.

    Args:
        hidden_dim, bottleneck_dim, output_dim: widths of the projection heads; the paper's are
            2048, 256 and 65,536.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's softmax, at first and after `temperature_steps`
            optimizer steps; linear between.
        momentum: of the teacher's weights.
        momentum_steps: optimizer steps in which it rises to 1 by a cosine; by default it stays.
        center_momentum: of the centre.
    """

    views = 2
    evaluated = "teacher"

    def __init__(
        self,
        *,
        model: HybridViT,
        hidden_dim: int = 512,
        bottleneck_dim: int = 256,
        output_dim: int = 4096,
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.04),
        temperature_steps: int = 0,
        momentum: float = 0.996,
        momentum_steps: int | None = None,
        center_momentum: float = 0.9,
    ) -> None:
        from lightly.loss import DINOLoss
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        _check(
            (hidden_dim, bottleneck_dim, output_dim),
            (student_temperature, *teacher_temperature),
            (temperature_steps, momentum_steps or 0),
            {"momentum": momentum, "center_momentum": center_momentum},
        )
        self.momentum, self.momentum_steps = momentum, momentum_steps
        self.step = 0  # optimizer steps taken
        self.model = model
        self.head = make_head(model.encoder.dim, hidden_dim, bottleneck_dim, output_dim)
        self.teacher, self.teacher_head = copy.deepcopy(self.model), copy.deepcopy(self.head)
        without_noise(self.teacher)
        deactivate_requires_grad(self.teacher)
        deactivate_requires_grad(self.teacher_head)
        first, last = teacher_temperature
        self.criterion = DINOLoss(
            output_dim, first, last, temperature_steps, student_temperature, center_momentum
        )

    def forward(self, batch: Batch) -> StepOutput:
        """Cross-entropy of each view's student and the other view's teacher; `spread` of the
        teacher's features tells of a collapse."""
        images = both_views(batch, "dino")
        with torch.no_grad():
            features = self.teacher.features(images)
            target = self.teacher_head(features)
        from hybridvit.objectives.uncompiled import outside

        output: StepOutput = outside(
            self._compare, target, self.head(self.model.features(images)), features
        )
        return output

    def after_step(self, step: int) -> None:
        """Move the teacher towards the student."""
        from lightly.models.utils import update_momentum
        from lightly.utils.scheduler import cosine_schedule

        momentum = self.momentum
        if self.momentum_steps is not None:
            done = min(step - 1, self.momentum_steps)
            momentum = cosine_schedule(done, self.momentum_steps, momentum, 1.0)
        update_momentum(self.model, self.teacher, momentum)
        update_momentum(self.head, self.teacher_head, momentum)
        self.step = step

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The two views."""
        return picture_rows(batch)

    def get_extra_state(self) -> Tensor:
        """The step, for checkpoints: the teacher's temperature follows from it."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from a checkpoint's step."""
        self.step = int(state)

    # lightly's loss replaces the centre's data, which would break the graph.
    def _compare(self, target: Tensor, output: Tensor, features: Tensor) -> StepOutput:
        with no_autocast(output):
            # lightly's temperature schedule counts epochs; here it is given steps.
            views = widened(target).chunk(2), widened(output).chunk(2)
            loss = self.criterion(*views, epoch=self.step)
        return StepOutput(loss, {"loss": loss.detach(), "spread": spread(features)})


def make_head(dim: int, hidden_dim: int, bottleneck_dim: int, output_dim: int) -> nn.Module:
    """lightly's projection head; its last layer is weight-normalised with a fixed norm of 1."""
    from lightly.models.modules.heads import DINOProjectionHead

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the old weight_norm
        head: nn.Module = DINOProjectionHead(dim, hidden_dim, bottleneck_dim, output_dim)
    # The old weight_norm leaves a tensor with a gradient behind, which copy.deepcopy refuses.
    last = head.get_submodule("last_layer")
    if not parametrize.is_parametrized(last):
        weights = last.state_dict()
        parametrizations.weight_norm(remove_weight_norm(last)).load_state_dict(weights)
        last.get_parameter("parametrizations.weight.original0").requires_grad_(False)
    return head


def without_noise(teacher: HybridViT) -> None:
    """Turn dropout and stochastic depth off for good, in training mode, too.

    Not by eval mode: a stem's BatchNorm should take the statistics of the batch, as the student's
    does, and whoever evaluates the teacher sets the mode of all of it.
    """
    for module in teacher.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, Attention):
            module.dropout = 0.0
        elif isinstance(module, Block):
            module.drop_path = 0.0


def _check(
    widths: tuple[int, int, int],
    temperatures: tuple[float, ...],
    steps: tuple[int, int],
    momenta: dict[str, float],
) -> None:
    if min(widths) < 1:
        raise ValueError(
            "objective 'dino': hidden_dim, bottleneck_dim and output_dim should be at least 1, "
            f"not {widths}"
        )
    if min(temperatures) <= 0:
        raise ValueError(
            "objective 'dino': student_temperature and the two of teacher_temperature should be "
            f"above 0, e.g. 0.1 and [0.04, 0.07], not {temperatures[0]} and {temperatures[1:]}"
        )
    if min(steps) < 0:
        raise ValueError(
            "objective 'dino': temperature_steps and momentum_steps should be at least 0, "
            f"not {steps}"
        )
    for name, value in momenta.items():
        if not 0 <= value <= 1:
            raise ValueError(f"objective 'dino': {name}={value} should be in [0, 1]")
