"""What frozen features are worth: k nearest neighbours and a linear classifier."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvit.contracts import Batch
from hybridvit.encoder.model import HybridViT
from hybridvit.evaluation.accuracy import over

NEIGHBOURS, TEMPERATURE = 20, 0.1
PROTOCOL = {
    "knn": f"{NEIGHBOURS} nearest neighbours, cosine similarity, weights exp(s / {TEMPERATURE})",
    "linear": "logistic regression (L2, C = 1) on standardised features",
    "pixels/knn": "5 nearest neighbours, Euclidean, on raw pixels",
    "pixels/logistic_regression": "logistic regression (L2, C = 1) on raw pixels in [0, 1]",
}


@torch.no_grad()
def extract(model: HybridViT, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Frozen features (N, D) float32 and labels (N,) on the CPU."""
    return over(model, batches, lambda images: model.features(images).float())


def knn(
    train: tuple[Tensor, Tensor],
    features: Tensor,
    classes: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Classes (M,) of features (M, D) by weighted k-NN (Wu et al. 2018) among labelled ones.

    Similarities are computed on `device` in float32, under autocast, too, whose rounding would
    choose among near neighbours.
    """
    bank, labels = F.normalize(train[0], dim=1).mT.to(device), train[1].to(device)
    neighbours = min(NEIGHBOURS, bank.shape[1])
    predicted = []
    with torch.autocast(bank.device.type, enabled=False):
        for part in features.split(1024):
            similarity, nearest = (F.normalize(part, dim=1).to(device) @ bank).topk(neighbours)
            weights = (similarity / TEMPERATURE).exp()
            # A vote each, then their sum: scattering adds in another order each time on a GPU.
            votes = weights.new_zeros(len(part), neighbours, classes)
            votes.scatter_(2, labels[nearest][..., None], weights[..., None])
            predicted.append(votes.sum(dim=1).argmax(dim=1).cpu())
    return torch.cat(predicted)


def linear(train: tuple[Tensor, Tensor], features: Tensor) -> Tensor:
    """Classes (M,) of features (M, D) by a linear classifier on standardised features."""
    spread = train[0].std(dim=0, correction=min(1, len(train[0]) - 1))  # 0 of one image
    mean, std = train[0].mean(dim=0), spread.clamp(min=1e-6)
    scaled = (((train[0] - mean) / std).numpy(), train[1].numpy())
    return torch.from_numpy(logistic_regression(scaled, ((features - mean) / std).numpy()))


def logistic_regression(train: tuple[np.ndarray, np.ndarray], features: np.ndarray) -> np.ndarray:
    """Classes (M,) by scikit-learn's multinomial logistic regression with C = 1."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(train[1])) == 1:  # the solver wants two classes
        return np.full(len(features), train[1][0])
    with warnings.catch_warnings():
        # The solver's last digits do not matter here; 1,000 steps are ample for an accuracy.
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier = LogisticRegression(max_iter=1000).fit(*train)
    predicted: np.ndarray = classifier.predict(features)
    return predicted


def nearest_pixels(train: tuple[np.ndarray, np.ndarray], features: np.ndarray) -> np.ndarray:
    """Classes (M,) by 5 nearest neighbours."""
    from sklearn.neighbors import KNeighborsClassifier

    predicted: np.ndarray = (
        KNeighborsClassifier(min(5, len(train[1]))).fit(*train).predict(features)
    )
    return predicted
