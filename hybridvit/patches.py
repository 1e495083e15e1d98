"""Images cut into square patches and back."""

from __future__ import annotations

from torch import Tensor


def check_divides(images: Tensor, patch_px: int) -> None:
    """Refuse images that a patch size (or a stem's total stride) does not divide.

    Raises:
        ValueError: H or W is no multiple of `patch_px`.
    """
    height, width = images.shape[-2:]
    if height % patch_px or width % patch_px:
        raise ValueError(
            f"a stride of {patch_px} px does not divide images of {height} x {width} px; "
            f"set data.args.image_size to a multiple, such as {_nearest(height, patch_px)}, "
            "or change the stem's stride"
        )


def patchify(images: Tensor, patch_px: int) -> Tensor:
    """(B, C, H, W) to (B, N, C * patch_px**2), row-major; a patch is flattened as (C, row, column).

    Raises:
        ValueError: `patch_px` does not divide H and W.
    """
    check_divides(images, patch_px)
    b, c, height, width = images.shape
    h, w = height // patch_px, width // patch_px
    x = images.reshape(b, c, h, patch_px, w, patch_px)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, c * patch_px**2)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_px: int) -> Tensor:
    """The inverse of `patchify`: (B, h * w, C * patch_px**2) to (B, C, H, W)."""
    b, _, length = patches.shape
    h, w = grid
    c = length // patch_px**2
    x = patches.reshape(b, h, w, c, patch_px, patch_px).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c, h * patch_px, w * patch_px)


def take(patches: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, M) of patches (B, N, L): (B, M, L)."""
    return patches.gather(1, index[:, :, None].expand(-1, -1, patches.shape[-1]))


def put(patches: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Patches (B, N, L), whose rows `index` (B, M) are replaced by others (B, M, L)."""
    return patches.scatter(1, index[:, :, None].expand_as(rows), rows)


def _nearest(size: int, patch_px: int) -> int:
    return max(1, round(size / patch_px)) * patch_px
