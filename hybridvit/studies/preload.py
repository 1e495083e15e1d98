"""What every cell imports, for the fork server to import once."""

import scipy.stats
import sklearn.linear_model
import sklearn.neighbors

import hybridvit.engine.pixels
import hybridvit.engine.run
import hybridvit.studies.cells
import hybridvit.studies.timing
from hybridvit.engine.runlog import git_state

# Remembers the commit of the code that was just imported. Nothing here may touch a GPU: CUDA that
# was started before a fork cannot be used after it.
git_state()

__all__ = ["hybridvit", "scipy", "sklearn"]
