"""Batches as a pure function of a position in an endless stream of epochs.

Nothing is kept between calls: a run resumes from one integer, and the number of workers or ranks
changes no batch.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from hybridvit import draws
from hybridvit.contracts import Batch
from hybridvit.data.augment import Augment, augment, plain
from hybridvit.data.resident import Resident
from hybridvit.data.splits import Split

ORDER = draws.stream("data.order")
# Pixels of resident images that are augmented together, of several batches where these are small:
# what it costs to call so many small operations is then shared.
TOGETHER = 2**21
MOST_TOGETHER = 64  # batches: of 8 x 8 px, 512 took 0.03 ms less for each


def order(seed: int, epoch: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """(n,) int64: the order of n images in an epoch, a stable sort of hashes."""
    start = torch.full((1,), seed, device=device)  # not copied from the host, as a tensor of it is
    key = draws.fold(draws.fold(start, epoch), n)
    return draws.permutation(key, ORDER, n)[0]


class TrainLoader:
    """Augmented batches of a training split.

    Position p of the stream is place p mod n in the order of epoch p // n. A batch is the next
    `batch_size` positions, so it may straddle epochs; each epoch sees each image once. Rank r of
    `world` holds the r-th of equal contiguous slices of each micro-batch.

    Args:
        image_size: (H, W) of the batches.
        resident: keep all decoded images on the device; else they are decoded as needed, by
            `workers` processes if above 0.
        fill: colour of erased boxes, (3,) in [0, 1]; black if none.
        views: how often each image is in a batch, augmented anew: the first view is that of a
            loader with one, view v draws from the image's key folded with v.
        parts: micro-batches of a batch.

    Raises:
        ValueError: an empty split, views that cannot differ, or an argument out of range.
    """

    def __init__(
        self,
        split: Split,
        augment: Augment,
        image_size: tuple[int, int],
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        resident: bool,
        workers: int = 0,
        fill: Sequence[float] = (0.0, 0.0, 0.0),
        views: int = 1,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
    ) -> None:
        if len(split) == 0:
            raise ValueError("the training split has no images; use a smaller validation fraction")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} should be at least 1")
        if workers < 0:
            raise ValueError(f"workers={workers} should be 0 or more processes")
        if views > 1 and not augment.varies:
            raise ValueError(
                f"the objective compares {views} views of an image, which data.augment leaves "
                "equal; set at least data.augment.crop=resized"
            )
        assert 0 <= rank < world
        assert world == 1 or batch_size % (2 * world * parts) == 0, "whole pairs, mixup's partners"
        assert batch_size % parts == 0
        assert views >= 1
        augment.check(image_size)
        self.split = split
        self.augment = augment
        self.image_size = image_size
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.workers = workers
        self.fill = torch.tensor(fill, device=self.device)
        self.views = views
        self.share = batch_size // world  # images of this rank in a batch
        # Where they are in it: a slice of each part.
        each = batch_size // (world * parts)
        self.places = [(part * world + rank) * each for part in range(parts)]
        self.each = each
        self.resident = Resident(split, device, progress=rank == 0) if resident else None
        # Places are found where the images are, so that a resident set never waits for the host.
        self._home = self.device if resident else torch.device("cpu")
        self._labels, self._index = split.labels.to(self._home), split.index.to(self._home)
        # Workers run ahead of the training loop, hence more than one epoch is kept.
        self._order = lru_cache(maxsize=4)(
            partial(order, self.seed, n=len(split), device=self._home)
        )

    @property
    def together(self) -> int:
        """How many batches are augmented at once."""
        if self.resident is None:
            return 1
        pixels = self.image_size[0] * self.image_size[1] * self.share
        return min(max(1, TOGETHER // pixels), MOST_TOGETHER)

    def batches(self, start_position: int, steps: int) -> Iterator[Batch]:
        """`steps` batches from a position on; the next one is `steps * batch_size` further.

        Raises:
            ValueError: an image cannot be decoded; the message names its file.
        """
        stop = start_position + steps * self.batch_size
        starts = range(start_position, stop, self.batch_size)
        if self.resident is None:
            plan = (self._slots(start)[0].tolist() for start in starts)
            pictures = Decoders([self.split], self.device, self.workers)(self.split, plan)
            for start, images in zip(starts, pictures, strict=True):
                yield self._batch(*self._slots(start), images)
            return
        together = self.together
        for block in (starts[n : n + together] for n in range(0, steps, together)):
            slots, epochs = (torch.cat(each) for each in zip(*map(self._slots, block), strict=True))
            images = self.resident.images(slots)
            yield from self._batch(slots, epochs, images).split(self.share)

    def _batch(self, slots: Tensor, epochs: Tensor, images: Tensor) -> Batch:
        """Stored images of some places in the split, augmented."""
        index = self._index[slots]
        key = _to(draws.image_keys(self.seed, epochs, index), self.device)
        keys = (key, *(draws.fold(key, view) for view in range(1, self.views)))
        views = [augment(images, k, self.augment, self.image_size, self.fill) for k in keys]
        labels, index = _to(self._labels[slots], self.device), _to(index, self.device)
        return Batch(views[0], labels, index, key, tuple(views[1:]))

    def _slots(self, start: int) -> tuple[Tensor, Tensor]:
        """This rank's places in the split and their epochs, (share,) each, of the batch that starts
        at a position."""
        slots, epochs = [], []
        for place in self.places:
            at, stop = start + place, start + place + self.each
            while at < stop:
                epoch, offset = divmod(at, len(self.split))
                count = min(len(self.split) - offset, stop - at)
                slots.append(self._order(epoch)[offset : offset + count])
                epochs.append(torch.full((count,), epoch, device=self._home))
                at += count
        return torch.cat(slots), torch.cat(epochs)


def eval_batches(
    split: Split | Resident,
    image_size: tuple[int, int],
    batch_size: int,
    device: torch.device | str,
    decoders: Decoders | None = None,
    share: slice = slice(None),
) -> Iterator[Batch]:
    """All images in order, one view each, not augmented; the last batch may be smaller.

    Keys are those of seed 0 and epoch 0.

    Args:
        decoders: processes that decode a split that is not resident; this one by default.
        share: which of the batches.

    Raises:
        ValueError: an image cannot be decoded; the message names its file.
    """
    device = torch.device(device)
    starts = range(0, len(split), batch_size)[share]
    if isinstance(split, Resident):
        pictures: Iterator[Tensor] = (
            split.images(slice(start, start + batch_size)).to(device) for start in starts
        )
    else:
        plan = (list(range(start, min(start + batch_size, len(split)))) for start in starts)
        pictures = (decoders or Decoders([split], device, 0))(split, plan)
    for start, images in zip(starts, pictures, strict=True):
        part = slice(start, start + batch_size)
        index, labels = _to(split.index[part], device), _to(split.labels[part], device)
        key = draws.image_keys(0, torch.zeros_like(index), index)
        yield Batch(plain(images, image_size), labels, index, key)


class Decoders:
    """Processes that decode images of some splits, in batches; they stay for the next.

    Args:
        workers: how many processes; with 0 this one decodes.
    """

    def __init__(self, splits: Sequence[Split], device: torch.device, workers: int) -> None:
        self.splits, self.device = splits, device
        self._plan = _Plan()
        # One for all plans: what was allocated for a stream is not given to another.
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._loader = DataLoader(
            _Reader(splits),
            batch_size=None,
            sampler=self._plan,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_heed_the_run,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the default one would draw from the global random state
        )

    def start(self) -> None:
        """Start the processes now. They are copies of this one, which grows as it trains."""
        if self._loader.num_workers:
            list(self(self.splits[0], []))

    def __call__(self, split: Split, plan: Iterable[list[int]]) -> Iterator[Tensor]:
        """(B, C, H, W) uint8 images on the device for each list of positions in a split.

        One plan at a time: the next one drops what is left of it.

        Raises:
            ValueError: an image cannot be decoded; the message names its file.
        """
        pictures = self._decoded(split, plan)
        if self._side is None:
            yield from (images.to(self.device) for images in pictures)
        else:
            yield from _sent(pictures, self.device, self._side)

    def _decoded(self, split: Split, plan: Iterable[list[int]]) -> Iterator[Tensor]:
        number = next(n for n, known in enumerate(self.splits) if known is split)
        lists = self._plan.lists = ((number, positions) for positions in plan)
        for images in self._loader:
            if isinstance(images, str):
                raise ValueError(images)
            yield images
            assert self._plan.lists is lists, "another plan has begun"


def _heed_the_run(_worker: int) -> None:
    """Signals that a terminal, torchrun or a job's end sends to all processes are the run's to
    answer; those to its process group do not come here.

    It still decodes after Ctrl-C, for what it was about to evaluate. A worker that is told to end
    does so as if done: torch would raise wherever the run is, cleaning up included.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


class _Plan:
    """What to decode next: a loader whose workers stay keeps the object that it asks."""

    lists: Iterable[tuple[int, list[int]]] = ()

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return iter(self.lists)


class _Reader(TorchDataset[Tensor | str]):
    """Decodes a batch at a time; an error becomes its message.

    Raised in a worker, it would reach the user as the worker's whole traceback.
    """

    def __init__(self, splits: Sequence[Split]) -> None:
        self.splits = splits

    def __getitem__(self, wanted: tuple[int, list[int]]) -> Tensor | str:
        number, positions = wanted
        try:
            return self.splits[number].read_many(positions)
        except ValueError as error:
            return str(error)


def _to(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, without the host waiting for a GPU."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def _sent(
    batches: Iterable[Tensor], device: torch.device, side: torch.cuda.Stream
) -> Iterator[Tensor]:
    """Batches on a GPU: the next one is sent, by its own stream, while one is computed with."""
    ahead: list[tuple[Tensor, torch.cuda.Event]] = []
    for images in batches:
        with torch.cuda.stream(side):
            sent = images.to(device, non_blocking=True)
            ahead.append((sent, side.record_event()))
        if len(ahead) > 1:
            yield _received(*ahead.pop(0))
    yield from (_received(*last) for last in ahead)


def _received(images: Tensor, event: torch.cuda.Event) -> Tensor:
    """Images that the current stream may use, once they have come."""
    stream = torch.cuda.current_stream(images.device)
    stream.wait_event(event)
    images.record_stream(stream)  # or their memory would be given to the next batch too early
    return images
