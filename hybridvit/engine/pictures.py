"""Pictures of what a run does, written beside its metrics."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_SIDE = 64  # pixels; smaller images are enlarged, without smoothing


def write_rows(rows: dict[str, Tensor], path: Path) -> None:
    """Rows of images (B, 3, H, W) in [0, 1], one below the other, as one PNG.

    The rows' names go into the file's metadata.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    zoom = max(1, -(-MIN_SIDE // next(iter(rows.values())).shape[-1]))
    lines = []
    for images in rows.values():
        large = F.interpolate(images.float().cpu(), scale_factor=zoom, mode="nearest")
        padded = F.pad(large, (2, 2, 2, 2), value=1.0)
        lines.append(torch.cat(list(padded), dim=-1))  # (3, H, B W)
    picture = (torch.cat(lines, dim=1).clamp(0, 1) * 255).round().byte()
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    text.add_text("rows", ", ".join(rows))
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, pnginfo=text)
