"""Networks from timm, by name: feature maps for stems, teachers for targets."""

from __future__ import annotations

import difflib
from typing import Any


def create_timm(name: str, pretrained: bool, **args: Any) -> Any:
    """`timm.create_model`, with the error of an unknown name or a failed download in one line.

    Raises:
        ValueError: timm has no such model, refuses the arguments, or cannot load its weights.
    """
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"timm has no model {name!r}{hint}")
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except Exception as error:  # timm, its hub and the network each raise types of their own
        reason = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        )
        what = "load the pretrained weights of" if pretrained else "make"
        raise ValueError(f"timm could not {what} {name!r} ({reason})") from error
