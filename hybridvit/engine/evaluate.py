"""What a run's network is worth on its images: accuracy of its head, probes of its features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from hybridvit.config import RunConfig
from hybridvit.contracts import Batch, Objective
from hybridvit.data.dataset import Dataset
from hybridvit.data.loader import Decoders, eval_batches
from hybridvit.data.resident import Resident
from hybridvit.data.splits import ArraySplit, DecodedSplit, Split
from hybridvit.encoder.model import HybridViT
from hybridvit.engine import ranks
from hybridvit.engine.fabric import Fabric
from hybridvit.evaluation import probes
from hybridvit.evaluation.accuracy import accuracy, predictions


class Evaluator:
    """Evaluates networks on the training, validation and test images of a run. Ranks share the
    images, and rank 0 has the results.

    Args:
        resident: the training images as the run keeps them, if it does; the others are then
            decoded once, too.
        show: a progress bar while they are.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        train: Split,
        val: Split,
        fabric: Fabric,
        *,
        resident: Resident | None,
        show: bool,
    ) -> None:
        self.config, self.dataset, self.fabric, self.show = config, dataset, fabric, show
        self.train, self.val = train, val
        self.stored: dict[Split, Resident] = {} if resident is None else {train: resident}
        splits = [train, val, dataset.test]
        # Images in memory need no process of their own.
        in_memory = all(isinstance(split, ArraySplit) for split in splits)
        self.decoders = Decoders(splits, fabric.device, 0 if in_memory else config.data.workers)

    def validation(self, model: HybridViT) -> dict[str, float]:
        """Validation accuracy, or that of a k-NN probe where the model has no head."""
        metric = validation_metric(model, self.config)
        if len(self.val) == 0 or metric is None:
            return {}
        with self.fabric.autocast():
            if model.head is not None:
                said = self._shared(predictions, model, self.val)
                return {} if said is None else {metric: accuracy(*said)}
            bank = self._shared(probes.extract, model, self.train)
            val = self._shared(probes.extract, model, self.val)
            if bank is None or val is None:
                return {}
            return {metric: accuracy(self._knn(bank, val[0]), val[1])}

    def head(self, model: HybridViT) -> dict[str, Tensor]:
        """What the model's head says of each test image, (N,) classes; nothing without one."""
        if model.head is None:
            return {}
        with self.fabric.autocast():
            said = self._shared(predictions, model, self.dataset.test)
        return {} if said is None else {"test/accuracy": said[0]}

    def probe(self, model: HybridViT, prefix: str) -> dict[str, Tensor]:
        """What the configured probes of a model's frozen features say of each test image."""
        with self.fabric.autocast():
            bank = self._shared(probes.extract, model, self.train)
            test = self._shared(probes.extract, model, self.dataset.test)
            predicted: dict[str, Tensor] = {}
            if bank is None or test is None:
                return predicted
            if "knn" in self.config.eval.probes:
                predicted[f"{prefix}/knn"] = self._knn(bank, test[0])
            if "linear" in self.config.eval.probes:
                predicted[f"{prefix}/linear"] = probes.linear(bank, test[0])
        return predicted

    def _shared(
        self,
        look: Callable[[HybridViT, Iterable[Batch]], tuple[Tensor, Tensor]],
        model: HybridViT,
        split: Split,
    ) -> tuple[Tensor, Tensor] | None:
        """What a look at a model gives of a split, on rank 0; each rank looks at some batches."""
        ranks.take_buffers(model)
        share = ranks.share(math.ceil(len(split) / self.config.eval.batch_size))
        some = share.start < share.stop
        parts = ranks.gathered(look(model, self.batches(split, share)) if some else None)
        if parts is None:
            return None
        values, labels = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(labels)

    def batches(self, split: Split, share: slice = slice(None)) -> Iterator[Batch]:
        """A split, or some of its batches, in order, not augmented; decoded once where the training
        images are resident."""
        known = any(split is each for each in self.decoders.splits)
        return eval_batches(
            self._stored(split),
            self.dataset.image_size,
            self.config.eval.batch_size,
            self.fabric.device,
            self.decoders if known else None,
            share,
        )

    def _stored(self, split: Split) -> Split | Resident:
        """Images to evaluate on; validation and test images of files stay on the host, mapped."""
        whole = split is self.val or split is self.dataset.test
        keeps = self.train in self.stored and isinstance(split, DecodedSplit)
        if whole and keeps and split not in self.stored:
            self.stored[split] = Resident(split, "cpu", progress=self.show)
        return self.stored.get(split, split)

    def _knn(self, bank: tuple[Tensor, Tensor], features: Tensor) -> Tensor:
        return probes.knn(bank, features, len(self.dataset.classes), self.fabric.device)


def evaluated(objective: Objective, config: RunConfig) -> HybridViT:
    """The network of an objective that evaluation looks at.

    Raises:
        ValueError: the objective names none of its own.
    """
    network = getattr(objective, objective.evaluated, None)
    if not isinstance(network, HybridViT):
        raise ValueError(
            f"objective {config.objective.name!r} declares evaluated="
            f"{objective.evaluated!r}, which is no HybridViT of its own"
        )
    return network


def validation_metric(model: HybridViT, config: RunConfig) -> str | None:
    """What is said of a model's validation images; none without a head or a k-NN probe."""
    if model.head is not None:
        return "val/accuracy"
    return "val/knn" if "knn" in config.eval.probes else None
