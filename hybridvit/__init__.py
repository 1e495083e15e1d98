"""Pure and hybrid vision transformers under supervised and self-supervised objectives."""

from typing import TYPE_CHECKING, Any

from hybridvit.version import RESULTS_VERSION, __version__

if TYPE_CHECKING:
    from hybridvit.engine.load import load_run
    from hybridvit.interop.timm import from_timm, to_timm

__all__ = ["RESULTS_VERSION", "__version__", "from_timm", "load_run", "to_timm"]


def __getattr__(name: str) -> Any:
    # Lazy, because importing torch and timm takes seconds and `hybridvit --help` must not.
    if name in ("from_timm", "to_timm"):
        from hybridvit.interop import timm

        return getattr(timm, name)
    if name == "load_run":
        from hybridvit.engine.load import load_run

        return load_run
    raise AttributeError(f"module 'hybridvit' has no attribute {name!r}")
