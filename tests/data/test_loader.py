"""The order of images, and batches as functions of a position."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from hybridvit import draws
from hybridvit.contracts import Batch
from hybridvit.data.augment import Augment, augment
from hybridvit.data.loader import Decoders, TrainLoader, _sent, eval_batches, order
from hybridvit.data.resident import Resident
from hybridvit.data.splits import ArraySplit, DecodedSplit, Split, split_validation, subset

SIZE = (8, 8)


def arrays(count: int = 23) -> ArraySplit:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, *SIZE), generator=generator, dtype=torch.uint8)
    return ArraySplit(images, torch.arange(count) % 5)


def loader(
    split: Split,
    *,
    batch_size: int = 8,
    seed: int = 0,
    resident: bool = True,
    workers: int = 0,
    views: int = 1,
    rank: int = 0,
    world: int = 1,
    parts: int = 1,
    how: Augment | None = None,
) -> TrainLoader:
    return TrainLoader(
        split,
        how or Augment(crop="pad", pad=2, flip=True),
        SIZE,
        batch_size=batch_size,
        seed=seed,
        device="cpu",
        resident=resident,
        workers=workers,
        views=views,
        rank=rank,
        world=world,
        parts=parts,
    )


def decoders(splits: list[Split], workers: int) -> Decoders:
    return Decoders(splits, torch.device("cpu"), workers)


def same(a: Batch, b: Batch) -> bool:
    columns = zip(columns_of(a), columns_of(b), strict=True)
    return all(torch.equal(one, two) for one, two in columns)


def columns_of(batch: Batch) -> tuple[Tensor, ...]:
    return (batch.images, batch.labels, batch.index, batch.key, *batch.others)


def test_order_is_a_permutation_of_its_own() -> None:
    first = order(0, 0, 1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert torch.equal(first, order(0, 0, 1000))
    for other in (order(0, 1, 1000), order(1, 0, 1000), torch.arange(1000)):
        assert sorted(other.tolist()) == list(range(1000))
        assert (first == other).sum() < 10  # one fixed point is expected


def test_order_puts_each_image_anywhere() -> None:
    places = torch.stack([order(0, epoch, 4) for epoch in range(2400)])
    _, counts = places.unique(dim=0, return_counts=True)
    assert len(counts) == 24  # all permutations
    assert float(((counts - 100.0) ** 2 / 100).sum()) < 49.7  # 99.9 %, 23 degrees of freedom


def test_every_epoch_is_complete() -> None:
    seen = torch.cat([b.index for b in loader(arrays()).batches(0, 23)])  # 8 epochs
    for epoch in seen.view(8, 23):
        assert sorted(epoch.tolist()) == list(range(23))
    assert torch.equal(seen.view(8, 23)[3], order(0, 3, 23))


def test_a_batch_is_what_it_says() -> None:
    split, how = arrays(), Augment(crop="pad", pad=2, flip=True)
    batch = next(iter(loader(split).batches(16, 1)))  # straddles epochs 0 and 1
    epochs = torch.tensor([0] * 7 + [1])
    index = torch.cat([order(0, 0, 23)[16:], order(0, 1, 23)[:1]])
    key = draws.image_keys(0, epochs, index)
    assert torch.equal(batch.index, index)
    assert torch.equal(batch.labels, index % 5)
    assert torch.equal(batch.key, key)
    assert torch.equal(batch.images, augment(split.images[index], key, how, SIZE))


@pytest.mark.parametrize("position", [0, 8, 64, 3, 1000])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("views", [1, 2])
def test_resuming_equals_going_on(position: int, resident: bool, views: int) -> None:
    source = loader(arrays(), resident=resident, views=views)
    going_on = list(source.batches(position, 6))[2:]
    resumed = list(loader(arrays(), resident=resident, views=views).batches(position + 16, 4))
    assert len(going_on) == len(resumed) == 4
    assert all(same(a, b) for a, b in zip(going_on, resumed, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("crop", "views"), [("pad", 1), ("resized", 1), ("resized", 2)])
def test_streaming_equals_resident(workers: int, crop: str, views: int) -> None:
    how = Augment(crop=crop, pad=2, flip=True)
    if views > 1:
        how = replace(how, policy="rand", jitter=0.5, erase=0.5)
    picture = Image.radial_gradient("L")

    def decode(place: int) -> Image.Image:
        return picture.rotate(place * 10).resize((30 + place, 20)).convert("RGB")

    for split in (arrays(), DecodedSplit(decode, torch.arange(23), SIZE, 3)):
        kept = loader(split, how=how, views=views).batches(8, 5)
        streamed = loader(split, resident=False, workers=workers, how=how, views=views)
        streamed = streamed.batches(8, 5)
        assert all(same(a, b) for a, b in itertools.zip_longest(kept, streamed))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(("world", "parts"), [(2, 1), (4, 1), (2, 2), (1, 2)])
def test_ranks_share_each_micro_batch(resident: bool, world: int, parts: int) -> None:
    def batches(rank: int, world: int, parts: int) -> list[Batch]:
        made = loader(arrays(), resident=resident, views=2, rank=rank, world=world, parts=parts)
        return list(made.batches(5, 4))

    whole, ranks = batches(0, 1, 1), [batches(r, world, parts) for r in range(world)]
    for step in range(4):
        micro = list(whole[step].split(8 // parts))
        shares = [list(ranks[r][step].split(8 // (parts * world))) for r in range(world)]
        for part in range(parts):
            columns = zip(*(columns_of(shares[r][part]) for r in range(world)), strict=True)
            for share, column in zip(columns, columns_of(micro[part]), strict=True):
                assert torch.equal(torch.cat(share), column)


def test_further_views_leave_the_first_alone_and_have_keys_of_their_own() -> None:
    split, how = arrays(), Augment(crop="pad", pad=2, flip=True, jitter=0.5)
    single = list(loader(split, how=how).batches(3, 5))
    double = list(loader(split, how=how, views=2).batches(3, 5))
    triple = list(loader(split, how=how, views=3).batches(3, 5))
    for one, two, three in zip(single, double, triple, strict=True):
        assert one.others == ()
        assert torch.equal(two.images, one.images)
        assert torch.equal(two.key, one.key)
        assert torch.equal(three.others[0], two.others[0])
        for view, images in enumerate((three.images, *three.others)):
            key = draws.fold(one.key, view) if view else one.key
            assert torch.equal(images, augment(split.images[one.index], key, how, SIZE))
        for a, b in itertools.combinations((three.images, *three.others), 2):
            assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_flips_of_two_views_are_unrelated() -> None:
    count = 4000
    ramp = torch.arange(8, dtype=torch.uint8).expand(count, 1, 8, 8)
    split = ArraySplit(ramp, torch.zeros(count, dtype=torch.int64))
    batch = next(
        iter(loader(split, how=Augment(flip=True), views=2, batch_size=count).batches(0, 1))
    )
    flips = [images[:, 0, 0, 0] > 0 for images in (batch.images, *batch.others)]
    counts = torch.stack([(flips[0] == a) & (flips[1] == b) for a in (0, 1) for b in (0, 1)])
    chi2 = float(((counts.sum(1) - count / 4) ** 2 / (count / 4)).sum())
    assert chi2 < 16.3  # 99.9 %, 3 degrees of freedom


def test_a_batch_may_exceed_the_epoch() -> None:
    batch = next(iter(loader(arrays(3), batch_size=8).batches(0, 1)))
    assert batch.index.bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert len(batch.key.unique()) == 8  # the same image is varied anew in each epoch
    single = next(iter(loader(arrays(1), batch_size=4).batches(0, 1)))
    assert single.index.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("resident", [True, False])
def test_keys_do_not_depend_on_the_validation_fraction(resident: bool) -> None:
    split, how = arrays(), Augment(crop="pad", pad=2, flip=True)
    keys = {}
    for fraction in (0.1, 0.3):
        train, _ = split_validation(split.labels, fraction)
        part = subset(split, train)
        for batch in loader(part, batch_size=1, resident=resident).batches(0, len(part)):
            index = int(batch.index)
            assert int(batch.labels) == index % 5
            assert index in train.tolist()
            assert keys.setdefault(index, int(batch.key)) == int(batch.key)
            assert torch.equal(batch.images, augment(split.images[[index]], batch.key, how, SIZE))
    assert len(keys) > 15


def test_seeds_give_other_orders_and_keys() -> None:
    a, b = (next(iter(loader(arrays(), seed=s).batches(0, 1))) for s in (0, 1))
    assert not torch.equal(a.index, b.index)
    assert not set(a.key.tolist()) & set(b.key.tolist())


def test_erased_boxes_have_the_given_colour() -> None:
    split, how = arrays(), Augment(erase=1.0, erase_scale=(0.3, 0.5))
    source = TrainLoader(
        split, how, SIZE, batch_size=8, seed=0, device="cpu", resident=True, fill=(0.123, 0.5, 0.9)
    )
    batch = next(iter(source.batches(0, 1)))
    lost = (batch.images == torch.tensor([0.123, 0.5, 0.9])[:, None, None]).all(1)
    assert (lost.float().mean((1, 2)) > 0.2).all()
    assert torch.equal(
        batch.images == split.images[batch.index] / 255, ~lost[:, None].expand(-1, 3, -1, -1)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streaming_to_a_gpu_equals_resident_on_a_cpu() -> None:
    how = Augment(crop="resized", flip=True, policy="rand", erase=0.5)
    options = {"batch_size": 8, "seed": 0}
    streamed = TrainLoader(arrays(), how, SIZE, device="cuda", resident=False, **options)
    kept = TrainLoader(arrays(), how, SIZE, device="cpu", resident=True, **options)
    for one, two in zip(streamed.batches(0, 9), kept.batches(0, 9), strict=True):
        assert (one.images.cpu() - two.images).abs().mean() < 1 / 255
        assert torch.equal(one.index.cpu(), two.index)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_left_alone(workers: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(arrays(), resident=False, workers=workers).batches(0, 3))
    split = arrays()
    list(eval_batches(split, SIZE, 8, "cpu", decoders([split], workers)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_one_line(workers: int) -> None:
    def decode(place: int) -> Image.Image:
        raise ValueError(f"image '{place}.jpg' cannot be decoded")

    split = DecodedSplit(decode, torch.zeros(9), SIZE, 3)
    with pytest.raises(ValueError, match=r"^image '\d\.jpg' cannot be decoded$"):
        list(loader(split, resident=False, workers=workers).batches(0, 1))


def test_arguments_that_are_not_possible() -> None:
    with pytest.raises(ValueError, match="training split has no images"):
        loader(subset(arrays(), torch.arange(0)))
    with pytest.raises(ValueError, match="batch_size=0 should be at least 1"):
        loader(arrays(), batch_size=0)
    with pytest.raises(ValueError, match="workers=-1 should be 0 or more"):
        loader(arrays(), workers=-1)
    with pytest.raises(ValueError, match=r"compares 2 views .* set at least data.augment.crop"):
        loader(arrays(), views=2, how=Augment())
    with pytest.raises(ValueError, match="pad=8 should be smaller"):
        loader(arrays(), how=Augment(crop="pad", pad=8))
    assert len(next(iter(loader(arrays(), batch_size=7).batches(0, 1))).labels) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_everything_in_order(workers: int) -> None:
    split = subset(arrays(), torch.arange(22, 1, -1))
    batches = list(eval_batches(split, SIZE, 8, "cpu", decoders([split], workers)))
    assert [len(b.labels) for b in batches] == [8, 8, 5]
    assert all(b.others == () for b in batches)
    index = torch.cat([b.index for b in batches])
    assert index.tolist() == list(range(22, 1, -1))
    assert torch.equal(torch.cat([b.labels for b in batches]), index % 5)
    assert torch.equal(torch.cat([b.images for b in batches]), arrays().images[index] / 255)
    key = draws.image_keys(0, torch.zeros_like(index), index)
    assert torch.equal(torch.cat([b.key for b in batches]), key)
    kept = eval_batches(Resident(split, "cpu", progress=False), SIZE, 8, "cpu")
    assert all(same(a, b) for a, b in itertools.zip_longest(kept, batches))


def test_decode_workers_stay_for_the_next_evaluation_and_the_next_split() -> None:
    def decode(place: int) -> Tensor:  # the process that does it
        return torch.tensor(list(os.getpid().to_bytes(3))).byte()[:, None, None].expand(3, *SIZE)

    splits: list[Split] = [DecodedSplit(decode, torch.zeros(9), SIZE, 3) for _ in range(2)]
    kept, seen = decoders(splits, 2), []
    for split in (*splits, splits[0]):
        images = torch.cat([b.images for b in eval_batches(split, SIZE, 1, "cpu", kept)])
        pids = (images[:, :, 0, 0] * 255).long() @ torch.tensor([2**16, 2**8, 1])
        seen.append(set(pids.tolist()))
    assert os.getpid() not in seen[0]
    assert len(seen[0] | seen[1] | seen[2]) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_left_of_an_evaluation_does_not_reach_the_next(workers: int) -> None:
    splits: list[Split] = [arrays(40), subset(arrays(), torch.arange(22, 1, -1))]
    kept = decoders(splits, workers)
    begun = eval_batches(splits[0], SIZE, 4, "cpu", kept)
    assert next(begun).index.tolist() == [0, 1, 2, 3]
    batches = list(eval_batches(splits[1], SIZE, 4, "cpu", kept))
    index = torch.arange(22, 1, -1)
    assert torch.equal(torch.cat([b.images for b in batches]), arrays().images[index] / 255)
    with pytest.raises(AssertionError, match="another plan has begun"):
        list(begun)


def test_evaluation_of_nothing_is_nothing() -> None:
    assert list(eval_batches(subset(arrays(), torch.arange(0)), SIZE, 8, "cpu")) == []


def test_no_more_batches_are_made_at_once_than_there_is_to_gain() -> None:
    assert loader(arrays(), batch_size=1).together == 64
    assert loader(arrays(), batch_size=1, resident=False).together == 1


def test_the_next_batch_is_sent_to_a_gpu_before_the_last_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a stream of its own, of which the steps' stream waits for what it uses."""
    log: list[str] = []

    class Images:
        device = "cuda"

        def __init__(self, number: int) -> None:
            self.number = number

        def to(self, device: object, non_blocking: bool) -> Images:
            assert non_blocking
            assert streams[-1] == "side"
            log.append(f"send {self.number}")
            return self

        def record_stream(self, stream: object) -> None:
            assert stream is steps
            log.append(f"keep {self.number}")

    class Side:
        def record_event(self) -> str:
            return log[-1].replace("send", "sent")

    class Steps:
        def wait_event(self, event: str) -> None:
            log.append(f"wait until {event}")

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        assert stream is side
        streams.append("side")
        yield
        streams.pop()

    streams, side, steps = ["steps"], Side(), Steps()
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: steps)
    for images in _sent(map(Images, range(3)), "cuda", side):
        log.append(f"use {images.number}")
    assert log == [
        "send 0", "send 1", "wait until sent 0", "keep 0", "use 0",
        "send 2", "wait until sent 1", "keep 1", "use 1",
        "wait until sent 2", "keep 2", "use 2",
    ]  # fmt: skip


def test_batches_for_a_gpu_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(
        "hybridvit.data.loader.DataLoader", lambda *_, **options: given.update(options)
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    for kind in ("cpu", "cuda"):
        Decoders([], torch.device(kind), 2)
        assert given["pin_memory"] == (kind == "cuda")
        assert given["persistent_workers"]
