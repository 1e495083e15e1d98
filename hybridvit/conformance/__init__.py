"""Does a part keep what its contract promises? Checks for parts from outside the package.

Each suite is a class whose `test_*` methods are its checks: `hybridvit check` runs them and prints
a table; in a test file, a subclass that names a factory runs them in pytest:

    class TestMyStem(StemConformance):
        factory = MyStem
"""

from hybridvit.conformance.objectives import ObjectiveConformance
from hybridvit.conformance.stems import StemConformance
from hybridvit.conformance.targets import TargetConformance

__all__ = ["ObjectiveConformance", "StemConformance", "TargetConformance"]
