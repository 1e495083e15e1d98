"""Everything a cell imports, for the fork server to import once."""

import lightly.utils.benchmarking.knn
import scipy.stats
import sklearn.linear_model
import sklearn.neighbors

import hybridvit.engine.pixels
import hybridvit.engine.run
from hybridvit.engine.runlog import environment

environment()  # remembers the commit of the code that was just imported

__all__ = ["hybridvit", "lightly", "scipy", "sklearn"]
