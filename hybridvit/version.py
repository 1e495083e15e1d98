"""The release, and the version of what it computes."""

__version__ = "0.1.0"

# Part of every run's hash. Raised when a release changes what the same config computes, so that
# old and new results are never mixed in one comparison; the changelog says why.
RESULTS_VERSION = 6
