"""Everything a cell imports, for the fork server to import once."""

import lightly.utils.benchmarking.knn
import scipy.stats
import sklearn.linear_model
import sklearn.neighbors

import hybridvit.engine.pixels
import hybridvit.engine.run

__all__ = ["hybridvit", "lightly", "scipy", "sklearn"]
