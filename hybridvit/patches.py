"""Images cut into square patches and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def grid_of(size: Sequence[int], patch_px: int) -> tuple[int, int]:
    """(h, w) patches of images of size (H, W), by the side of a patch or a stem's total stride.

    Raises:
        ValueError: H or W is no multiple of `patch_px`.
    """
    height, width = size
    if height % patch_px or width % patch_px:
        nearest = max(1, round(height / patch_px)) * patch_px
        raise ValueError(
            f"a stride of {patch_px} px does not divide images of {height} x {width} px; "
            f"set data.args.image_size to a multiple, such as {nearest}, "
            "or change the stem's stride"
        )
    return height // patch_px, width // patch_px


def patchify(images: Tensor, patch_px: int) -> Tensor:
    """(B, C, H, W) to (B, N, C * patch_px**2), row-major; a patch is flattened as (C, row, column).

    Raises:
        ValueError: `patch_px` does not divide H and W.
    """
    h, w = grid_of(images.shape[-2:], patch_px)
    b, c = images.shape[:2]
    x = images.reshape(b, c, h, patch_px, w, patch_px)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, c * patch_px**2)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_px: int) -> Tensor:
    """The inverse of `patchify`: (B, h * w, C * patch_px**2) to (B, C, H, W)."""
    b, _, length = patches.shape
    h, w = grid
    c = length // patch_px**2
    x = patches.reshape(b, h, w, c, patch_px, patch_px).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c, h * patch_px, w * patch_px)


def as_pixels(patches: Tensor, images: Tensor) -> Tensor:
    """(B, h, w) values of patches to (B, 1, H, W) of the pixels of images or features."""
    p = images.shape[-1] // patches.shape[-1]
    return patches.repeat_interleave(p, dim=1).repeat_interleave(p, dim=2)[:, None]


def take(patches: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, M) of patches (B, N, L): (B, M, L)."""
    return patches.gather(1, index[:, :, None].expand(-1, -1, patches.shape[-1]))


def put(patches: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Patches (B, N, L), whose rows `index` (B, M) are replaced by others (B, M, L)."""
    return patches.scatter(1, index[:, :, None].expand_as(rows), rows)
