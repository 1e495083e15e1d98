"""SimCLR (Chen et al. 2020): two views of an image should be nearer than those of others."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch.fx.experimental._config as fx_config
from torch import Tensor, nn

from hybridvit.contracts import Batch, Objective, StepOutput
from hybridvit.objectives.views import both_views, no_autocast, picture_rows, spread, widened

if TYPE_CHECKING:
    from hybridvit.encoder.model import HybridViT


class SimCLR(Objective):
    """Contrastive learning of two augmented views, by lightly's NT-Xent loss and projection head.

    The negatives of a view are the other images of its micro-batch, on all ranks, so
    `train.accumulate` changes the loss: it divides their number. Probes read the features before
    the projection head.

    Args:
        temperature: of the softmax over similarities.
        hidden_dim, output_dim: widths of the projection head; the paper's are the features' and
            128.
        layers: of the projection head: 2 in the paper, 3 in its successor.
        batch_norm: after each layer of the projection head, over both views.
    """

    views = 2

    def __init__(
        self,
        *,
        model: HybridViT,
        temperature: float = 0.5,
        hidden_dim: int = 512,
        output_dim: int = 128,
        layers: int = 2,
        batch_norm: bool = True,
    ) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import SimCLRProjectionHead

        super().__init__()
        if temperature <= 0:
            raise ValueError(
                f"objective 'simclr': temperature={temperature} should be above 0, e.g. 0.5"
            )
        if min(hidden_dim, output_dim) < 1 or layers < 2:
            raise ValueError(
                f"objective 'simclr': hidden_dim={hidden_dim} and output_dim={output_dim} should "
                f"be at least 1, layers={layers} at least 2"
            )
        self.model = model
        self.head = SimCLRProjectionHead(
            model.encoder.dim, hidden_dim, output_dim, num_layers=layers, batch_norm=batch_norm
        )
        self.criterion = NTXentLoss(temperature, gather_distributed=True)

    def forward(self, batch: Batch) -> StepOutput:
        """NT-Xent of the projected views; `spread` of the features tells of a collapse."""
        images = both_views(batch, "simclr")
        if len(batch.images) < 2:
            raise ValueError(
                "objective 'simclr': a micro-batch of 1 image has no negatives; set "
                "train.batch_size to at least 2 times train.accumulate"
            )
        features = self.model.features(images)
        from hybridvit.objectives.uncompiled import outside

        output: StepOutput = outside(self._compare, self.head(features), features)
        return output

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The two views."""
        return picture_rows(batch)

    # lightly's loss selects by a mask, which would break the graph.
    def _compare(self, projected: Tensor, features: Tensor) -> StepOutput:
        with no_autocast(projected), _masks_of_ones() if projected.is_meta else nullcontext():
            loss = self._criterion(projected)(*widened(projected).chunk(2))
        return StepOutput(loss, {"loss": loss.detach(), "spread": spread(features)})

    def _criterion(self, projected: Tensor) -> nn.Module:
        """The loss; where costs are counted, by one rank as of all images, it gathers nothing."""
        from lightly.loss import NTXentLoss

        counted = projected.is_meta
        loss: nn.Module = NTXentLoss(self.criterion.temperature) if counted else self.criterion
        return loss


def _masks_of_ones() -> AbstractContextManager[None]:
    """Let meta tensors, on which costs are counted, be selected by masks; without it they refuse.

    lightly's mask leaves out the similarity of an image with itself: no FLOP depends on it.
    """
    option = "meta_nonzero_assume_all_nonzero"
    if not hasattr(fx_config, option):  # torch may drop it; the cost is then unknown
        return nullcontext()
    # torch gives its config modules `patch` at run time, where mypy cannot see it.
    patched: AbstractContextManager[None] = fx_config.patch(option, True)  # type: ignore[attr-defined]
    return patched
