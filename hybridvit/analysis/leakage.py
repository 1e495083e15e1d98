"""What a stem gives away of other patches, and what a run sees of the pixels that it hides.

Two numbers, kept apart. *Mixing* is the stem's: how much a token depends on pixels outside its
patch. *Leakage* is the run's: how much of the pixels that its objective hides reaches the tokens
that enter the encoder, or the predictions. It is 0 where they are hidden before the stem, however
much the stem mixes. Both are measured on copies and draw no global random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridvit import draws
from hybridvit.contracts import Batch, Objective, Prediction, Stem
from hybridvit.patches import as_pixels, grid_of, patchify

THRESHOLD = 0.01  # of a token's norm
PROBED = 4  # patches: the middle one, a corner, and two others
PICTURED = 16  # rows and columns of a picture, at most
_PLACES = draws.stream("leakage.places")
_NOISE = draws.stream("leakage.noise")


@dataclass(frozen=True)
class Mixing:
    """How much a stem's tokens depend on pixels outside their patch.

    A token's *change* is the length by which it moves, relative to its norm and at most 1, when
    the pixels of one patch are replaced by noise; it *moved* if that is more than `threshold`. Its
    *Jacobian* is that of its numbers with respect to the pixels. Distances are Chebyshev's, in
    patches: entry d of a list is for pairs of patches at distance d, 0 being a patch itself.
    """

    training: bool  # mode that the stem was in
    threshold: float
    tokens: int  # N
    moved: float  # share of all tokens; 1 / N for a patch-local stem
    change: float  # mean over the other patches' tokens
    jacobian_outside: float  # share of the squared Jacobian outside a token's patch
    moved_by_distance: tuple[float, ...]
    jacobian_by_distance: tuple[float, ...]  # sums to 1, less the share on other images
    # (h, w) change of each token when the middle patch [h // 2][w // 2] is edited; of a large grid
    # only the middle.
    picture: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Leakage:
    """What a run sees of the pixels that it hides; all 0 where hidden means hidden."""

    tokens: float  # share of the tokens that change with the hidden pixels, if ever so little
    outputs: float  # share of the predictions that do
    gradient: float  # share of the squared gradient of both that is on hidden pixels

    @property
    def is_zero(self) -> bool:
        return self.tokens == self.outputs == self.gradient == 0


@torch.enable_grad()
def mixing(
    stem: Stem, images: Tensor, *, training: bool = False, threshold: float = THRESHOLD
) -> Mixing:
    """Measure a stem, fresh or trained, at `PROBED` patches of an image.

    The Jacobian is estimated from its product with one random vector of signs for each patch.

    Args:
        images: (B, 3, H, W), normalised. The stem is measured on their device and in their
            precision, at the first one; others matter where it couples the batch.

    Raises:
        ValueError: the stem's stride does not divide the images.
    """
    h, w = grid_of(images.shape[-2:], stem.patch_px)
    probe = copy.deepcopy(stem).to(images).train(training)
    places = _places(h, w)
    generator = torch.Generator().manual_seed(_NOISE)
    change = _changes(probe, images.detach(), places, generator)
    share = _jacobian(probe, images.detach(), places, generator)
    apart = _distances(places, h, w)
    rings = [apart == d for d in range(int(apart.max()) + 1)]
    moved = (change > threshold).double()
    return Mixing(
        training=training,
        threshold=threshold,
        tokens=h * w,
        moved=float(moved.mean()),
        change=float(change[apart > 0].mean()) if h * w > 1 else 0.0,
        jacobian_outside=float(1 - share[rings[0]].mean()),
        moved_by_distance=tuple(float(moved[ring].mean()) for ring in rings),
        jacobian_by_distance=tuple(float(share[r].sum()) / len(places) for r in rings),
        picture=_middle(change[0].view(h, w)),
    )


@torch.enable_grad()
def leakage(objective: Objective, batch: Batch, *, training: bool = True) -> Leakage | None:
    """Measure what a run sees of what it hides, under whatever protection it has.

    Hidden pixels are replaced twice, by noise and by flat patches far out of [0, 1], which move
    every maximum, with all random numbers fixed: what changes has seen them, also where `detach`
    or argmax keep that from the gradients.

    Args:
        batch: on whose device the objective is measured; a coupled batch shows from two images on.

    Returns:
        None for an objective that hides nothing.
    """
    if type(objective).predict is Objective.predict:
        return None  # without a copy of all its weights
    probe = copy.deepcopy(objective).to(batch.images.device).train(training)
    images = batch.images.detach().clone().requires_grad_()
    base = _predict(probe, batch, images)
    if base is None:
        return None
    generator = torch.Generator().manual_seed(_NOISE)
    hidden = as_pixels(base.hidden, images)  # (B, 1, H, W)
    squares = _squared_gradient((base.tokens, base.outputs), images, generator)
    noise = torch.rand(images.shape, generator=generator)
    flat = 10 * torch.randn((*images.shape[:2], *base.hidden.shape[1:]), generator=generator)
    tokens = torch.zeros_like(base.tokens[:, :, 0], dtype=torch.bool)
    outputs = torch.zeros_like(base.outputs[:, :, 0], dtype=torch.bool)
    for content in (noise, F.interpolate(flat, images.shape[-2:])):
        # With gradients as before: without them other kernels may run, and round in other ways.
        edited = torch.where(hidden, content.to(images), images).detach().requires_grad_()
        after = _predict(probe, batch, edited)
        assert after is not None
        tokens |= _differ(after.tokens, base.tokens)
        outputs |= _differ(after.outputs, base.outputs) | _differ(after.where, base.where)
        if not torch.equal(after.hidden, base.hidden):  # what is hidden was chosen by its content
            tokens[:] = outputs[:] = True
    on_hidden, total = (squares * hidden).sum(), squares.sum()
    return Leakage(
        tokens=float(tokens.double().mean()),
        outputs=float(outputs.double().mean()),
        gradient=float(on_hidden / total) if total else 0.0,
    )


@torch.no_grad()
def _changes(probe: Stem, images: Tensor, places: list[int], generator: torch.Generator) -> Tensor:
    """(K, N) change of each token of the first image when a place's pixels become noise."""
    p, columns = probe.patch_px, images.shape[-1] // probe.patch_px
    with _same_draws(images.device):
        before: Tensor = copy.deepcopy(probe)(images).x[0]  # its state may move in training
    changes = []
    for place in places:
        top, left = place // columns * p, place % columns * p
        edited = images.clone()
        noise = torch.randn((3, p, p), generator=generator).to(images)  # as normalised pixels are
        edited[0, :, top : top + p, left : left + p] = noise
        with _same_draws(images.device):
            after: Tensor = copy.deepcopy(probe)(edited).x[0]
        change = (after - before).norm(dim=-1) / before.norm(dim=-1)
        change = change.nan_to_num(1).clamp(max=1)
        changes.append(change.masked_fill((after == before).all(dim=-1), 0))  # 0 / 0 among them
    return torch.stack(changes).cpu().double()


def _jacobian(probe: Stem, images: Tensor, places: list[int], generator: torch.Generator) -> Tensor:
    """(K, N) share of the squared gradient of the tokens at K places on each patch of their image.

    Rows sum to 1, less the share on other images. Where there is no gradient, none is outside.
    """
    images = images.clone().requires_grad_()
    with _same_draws(images.device):
        tokens: Tensor = probe(images).x
    shares = []
    for place in places:
        squares = _squared_gradient([tokens[0, place]], images, generator)
        mass = patchify(squares, probe.patch_px).sum(dim=-1)  # (B, N)
        if not mass.any():
            mass[0, place] = 1
        shares.append((mass / mass.sum())[0])
    return torch.stack(shares).cpu()


def _squared_gradient(
    outputs: Sequence[Tensor], images: Tensor, generator: torch.Generator
) -> Tensor:
    """Squared gradient of the outputs times random signs, (B, 3, H, W).

    Its mean over the signs is the squared Jacobian, summed over the outputs.
    """
    depend = [x for x in outputs if x.requires_grad]
    zeros = torch.zeros_like(images, dtype=torch.float64)
    if not depend:
        return zeros
    signs = [2 * torch.randint(2, x.shape, generator=generator).to(x) - 1 for x in depend]
    (gradient,) = torch.autograd.grad(depend, images, signs, retain_graph=True, allow_unused=True)
    # In double precision, where the square of a small number is not 0.
    return zeros if gradient is None else gradient.double().square()


def _predict(probe: Objective, batch: Batch, images: Tensor) -> Prediction | None:
    with _same_draws(images.device):
        # A copy: statistics that move in training mode would look like hidden pixels.
        return copy.deepcopy(probe).predict(replace(batch, images=images))


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """(B, N) bool: which rows of b (B, N, ...) are not those of a, bit by bit."""
    if a.shape != b.shape:
        return torch.ones(b.shape[:2], dtype=torch.bool, device=b.device)
    return (a != b).view(*b.shape[:2], -1).any(dim=2)


def _places(h: int, w: int) -> list[int]:
    drawn = draws.permutation(torch.zeros(1, dtype=torch.int64), _PLACES, h * w)[0].tolist()
    return list(dict.fromkeys((h // 2 * w + w // 2, 0, *drawn)))[:PROBED]


def _distances(places: list[int], h: int, w: int) -> Tensor:
    """(K, N) Chebyshev distances of K places from all."""
    here, there = torch.tensor(places)[:, None], torch.arange(h * w)
    return torch.maximum((here // w - there // w).abs(), (here % w - there % w).abs())


def _middle(change: Tensor) -> tuple[tuple[float, ...], ...]:
    top, left = (max(0, side // 2 - PICTURED // 2) for side in change.shape)
    return tuple(map(tuple, change[top:, left:][:PICTURED, :PICTURED].tolist()))


@contextmanager
def _same_draws(device: torch.device) -> Iterator[None]:
    """Torch's generators in one state inside, as they were outside: for dropout."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(0)
        for one in devices:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(0)
        yield
