"""FLOPs of a training step counted by hand: from sizes alone, without any of the models' code.

All counts are of one image. A matrix product of (m, k) and (k, n), and a convolution with m output
positions, k inputs and n outputs, take 2 m k n forward; backward, once more for each of the two
operands that has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

SIDE, PATCH = 16, 4  # pixels
N = (SIDE // PATCH) ** 2  # patches
D, DEPTH, HEADS, HIDDEN = 16, 2, 2, 64  # of the encoder
CLASSES = 10
PIXELS = 3 * PATCH**2  # numbers of a patch


@dataclass(frozen=True)
class Flops:
    """Forward and backward."""

    forward: float = 0
    backward: float = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Flops:
        return Flops(times * self.forward, times * self.backward)


NOTHING = Flops()


def product(m: float, k: int, n: int, gradients: int = 2) -> Flops:
    """`gradients`: of how many operands."""
    return Flops(2 * m * k * n, gradients * 2 * m * k * n)


def conv(side: int, kernel: int, before: int, after: int, gradients: int = 2) -> Flops:
    """Of a map of `side` x `side` positions, after the stride."""
    return product(side**2, kernel**2 * before, after, gradients)


def depthwise(side: int, kernel: int, channels: int) -> Flops:
    return product(side**2 * channels, kernel**2, 1)


def bottleneck(side: int, stride: int, before: int, mid: int, after: int) -> Flops:
    """With a projection as its shortcut; the 3x3 convolution has the stride."""
    small = side // stride
    return (
        conv(side, 1, before, mid)
        + conv(small, 3, mid, mid)
        + conv(small, 1, mid, after)
        + conv(small, 1, before, after)
    )


def convnext_block(side: int, channels: int) -> Flops:
    layers = product(side**2, channels, 4 * channels) + product(side**2, 4 * channels, channels)
    return depthwise(side, 7, channels) + layers


# Stems that see patches one by one, of so many patches; images have no gradient.
LOCAL = {
    "linear": lambda n: product(n, PIXELS, D, 1),
    "mlp": lambda n: product(n, PIXELS, 8, 1) + product(n, 8, D),
    "raw": lambda n: product(n, PIXELS, D, 0),  # its matrix is fixed
}
# All others compute the whole map.
MIXING = {
    "resnet": conv(16, 3, 3, 8, 1)
    + bottleneck(16, 2, 8, 8, 32)
    + bottleneck(8, 2, 32, 16, 64)
    + conv(4, 1, 64, D),
    "conv": conv(8, 3, 3, 4, 1) + conv(4, 3, 4, 8) + conv(4, 1, 8, D),
    "overlap": conv(4, 7, 3, D, 1),
    "cct": conv(8, 7, 3, D, 1),
    "convnext": conv(8, 2, 3, 4, 1)
    + convnext_block(8, 4)
    + conv(4, 2, 4, 8)
    + convnext_block(4, 8)
    + conv(4, 1, 8, D),
    # timm's test_resnet up to its first stage: three 3x3 convolutions at half the size, a pool,
    # one basic block.
    "timm": conv(8, 3, 3, 16, 1)
    + conv(8, 3, 16, 16)
    + conv(8, 3, 16, 32)
    + conv(4, 3, 32, 32)
    + conv(4, 3, 32, 32)
    + conv(4, 1, 32, D),
    "blur": conv(16, 9, 3, 8, 1) + conv(4, 4, 8, D),
}


def stem(name: str, patches: int = N) -> Flops:
    """Tokens of so many patches, or of all where the stem mixes them."""
    return LOCAL[name](patches) if name in LOCAL else MIXING[name]


def block(
    tokens: int,
    dim: int = D,
    hidden: int = HIDDEN,
    pairs: int | None = None,
    gated: bool = False,
    read: int | None = None,
) -> Flops:
    """Attention and MLP.

    Args:
        pairs: of queries and keys, by default all.
        read: tokens that are computed, by default all.
    """
    read = tokens if read is None else read
    pairs = read * tokens if pairs is None else pairs
    half = hidden // 2
    mlp = product(read, dim, hidden) + product(read, hidden, dim)
    if gated:
        mlp = product(read, dim, 2 * half) + product(read, half, dim)
    return (
        product(read, dim, dim)  # q
        + product(tokens, dim, 2 * dim)  # k and v
        + product(pairs, dim, 1) * 2  # scores and weighted sum, of all heads
        + product(read, dim, dim)
        + mlp
    )


def encoder(patches: int = N, read: int | None = None) -> Flops:
    """With a class token; its last block computes the tokens that are read."""
    return block(1 + patches) * (DEPTH - 1) + block(1 + patches, read=read)


def supervised(name: str, images: int) -> Flops:
    return stem(name) + encoder(read=1) + product(1, D, CLASSES)


def masked_patch(name: str, images: int, outputs: int = 8**3) -> Flops:
    """Half of the patches are predicted; all tokens enter the encoder."""
    return stem(name) + encoder(read=N // 2) + product(N // 2, D, outputs)


def masked_features(name: str, images: int) -> Flops:
    """Another network, which has no gradient, sees the whole image."""
    teacher = stem(name) + encoder()
    return masked_patch(name, images, D) + Flops(teacher.forward)


MAE_DIM, MAE_DEPTH = 32, 1


def mae(name: str, images: int) -> Flops:
    """A quarter of the patches enters the encoder, all of them and the class token the decoder."""
    kept = N // 4
    return (
        stem(name, kept)
        + encoder(kept)
        + product(1 + kept, D, MAE_DIM)
        + block(1 + N, MAE_DIM, 4 * MAE_DIM, read=N - kept) * MAE_DEPTH  # 1
        + product(N - kept, MAE_DIM, PIXELS)
    )


def simmim(name: str, images: int) -> Flops:
    """Three of four units of 2 x 2 patches are hidden (60 %, rounded up)."""
    hidden = 3 * N // 4
    return stem(name, N - hidden) + encoder(read=hidden) + product(hidden, D, PIXELS)


def simclr(name: str, images: int) -> Flops:
    """Two views; a head of 512 and 128; similarities of all pairs of 2 B views."""
    view = stem(name) + encoder(read=1) + product(1, D, 512) + product(1, 512, 128)
    return view * 2 + product((2 * images) ** 2 / images, 128, 1)


def dino(name: str, images: int) -> Flops:
    """Two views of student and teacher, heads of 512, 512, 256 and 4096, and the products of both
    views' outputs, of which the student's have a gradient."""
    head = product(1, D, 512) + product(1, 512, 512) + product(1, 512, 256)
    view = stem(name) + encoder(read=1) + head + product(1, 256, 4096)
    return view * 2 + Flops(2 * view.forward) + product(4, 4096, 1, 1)


def upper_half(name: str, images: int) -> Flops:
    return stem(name) + encoder() + product(N // 2, D, PIXELS)


OBJECTIVES = {
    "supervised": supervised,
    "masked_patch": masked_patch,
    "mae": mae,
    "simmim": simmim,
    "simclr": simclr,
    "dino": dino,
    "upper_half": upper_half,
}
