"""Lightning's Fabric, imported without torchmetrics, of which it reads the version alone.

Importing that takes 3 s, more than all else that a run imports.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec


@contextmanager
def _by_version_alone(package: str) -> Iterator[None]:
    """Have imports of an installed package inside find a module with its version and no more."""
    spec = None if package in sys.modules else find_spec(package)
    if spec is None:
        yield
        return
    module = module_from_spec(spec)  # not executed
    module.__version__ = version(package)  # type: ignore[attr-defined]
    sys.modules[package] = module
    try:
        yield
    finally:
        del sys.modules[package]


with _by_version_alone("torchmetrics"):
    from lightning_fabric import Fabric

__all__ = ["Fabric"]
