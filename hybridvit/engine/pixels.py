"""What raw pixels are worth without any network: the floor that every arm is shown beside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hybridvit import build
from hybridvit.config import RunConfig, config_hash, resolved
from hybridvit.data.dataset import Dataset
from hybridvit.data.loader import eval_batches
from hybridvit.data.splits import Split
from hybridvit.engine.describe import describe_data
from hybridvit.engine.runlog import RunDirectory, check_same_run, new_record
from hybridvit.engine.session import Outcome
from hybridvit.engine.signals import terminable
from hybridvit.evaluation import probes


def pixel_baseline(config: RunConfig, out: Path) -> Outcome:
    """Logistic regression and 5-NN on the pixels of a config's data, as a run directory.

    They see the training images without the validation part, as the arms do.
    """
    parts, plugins = build.make_parts(config.plugins)
    config = build.resolve(config, parts)
    directory = RunDirectory(out)
    with terminable(), directory.locked():
        check_same_run(directory, directory.read_record(), config_hash(config), plugins)
        dataset = build.make_dataset(config, parts)
        train_split, val_split = build.make_splits(config, dataset)
        record = new_record("pixels", "pixels", config_hash(config), config.seed, plugins)
        record["data"] = describe_data(dataset, len(train_split), len(val_split), tests=True)
        with directory.open_record(record):
            directory.write_config(resolved(config))
            labels, predicted = _predictions(train_split, dataset)
            results = {key: float((said == labels).mean()) for key, said in predicted.items()}
            directory.write_predictions(
                labels.tolist(), {k: v.tolist() for k, v in predicted.items()}
            )
            protocol = {k: v for k, v in probes.PROTOCOL.items() if k.startswith("pixels/")}
            directory.write_summary({"results": results, "protocol": protocol})
            directory.write_record({**record, "status": "complete"})
    return Outcome(out, "complete", "")


def _predictions(split: Split, dataset: Dataset) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Labels of the test images, and what each baseline says of them."""
    train, (test, labels) = (
        _pixels(split, dataset.channels),
        _pixels(dataset.test, dataset.channels),
    )
    return labels, {
        "test/logistic_regression": probes.logistic_regression(train, test),
        "test/knn": probes.nearest_pixels(train, test),
    }


def _pixels(split: Split, channels: int) -> tuple[np.ndarray, np.ndarray]:
    batches = list(eval_batches(split, split.size, 4096, torch.device("cpu")))
    images = torch.cat([b.images[:, :channels].flatten(1) for b in batches])
    return images.numpy(), torch.cat([b.labels for b in batches]).numpy()
