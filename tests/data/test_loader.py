"""The order of images, and batches as functions of a position."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image

from hybridvit import draws
from hybridvit.contracts import Batch
from hybridvit.data.augment import Augment, augment
from hybridvit.data.loader import TrainLoader, eval_batches, order
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
    rank: int = 0,
    world: int = 1,
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
        rank=rank,
        world=world,
    )


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in vars(a))


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
    assert torch.equal(
        batch.images, augment(split.images[index], key, "pad", 2, how.scale, True, SIZE)
    )


@pytest.mark.parametrize("position", [0, 8, 64, 3, 1000])
@pytest.mark.parametrize("resident", [True, False])
def test_resuming_equals_going_on(position: int, resident: bool) -> None:
    source = loader(arrays(), resident=resident)
    going_on = list(source.batches(position, 6))[2:]
    resumed = list(loader(arrays(), resident=resident).batches(position + 16, 4))
    assert len(going_on) == len(resumed) == 4
    assert all(same(a, b) for a, b in zip(going_on, resumed, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_streaming_equals_resident(workers: int, crop: str) -> None:
    how = Augment(crop=crop, pad=2, flip=True)
    picture = Image.radial_gradient("L")

    def decode(place: int) -> Image.Image:
        return picture.rotate(place * 10).resize((30 + place, 20)).convert("RGB")

    for split in (arrays(), DecodedSplit(decode, torch.arange(23), SIZE, 3)):
        kept = loader(split, how=how).batches(8, 5)
        streamed = loader(split, resident=False, workers=workers, how=how).batches(8, 5)
        assert all(same(a, b) for a, b in itertools.zip_longest(kept, streamed))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_global_batch(resident: bool, world: int) -> None:
    whole = list(loader(arrays(), resident=resident).batches(5, 4))
    ranks = [
        list(loader(arrays(), resident=resident, rank=r, world=world).batches(5, 4))
        for r in range(world)
    ]
    for step in range(4):
        for name in ("images", "labels", "index", "key"):
            joined = torch.cat([getattr(ranks[r][step], name) for r in range(world)])
            assert torch.equal(joined, getattr(whole[step], name))


def test_a_batch_may_exceed_the_epoch() -> None:
    batch = next(iter(loader(arrays(3), batch_size=8).batches(0, 1)))
    assert batch.index.bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert len(batch.key.unique()) == 8  # the same image is varied anew in each epoch
    single = next(iter(loader(arrays(1), batch_size=4).batches(0, 1)))
    assert single.index.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("resident", [True, False])
def test_keys_do_not_depend_on_the_validation_fraction(resident: bool) -> None:
    split = arrays()
    keys = {}
    for fraction in (0.1, 0.3):
        train, _ = split_validation(split.labels, fraction)
        part = subset(split, train)
        for batch in loader(part, batch_size=1, resident=resident).batches(0, len(part)):
            index = int(batch.index)
            assert int(batch.labels) == index % 5
            assert index in train.tolist()
            assert keys.setdefault(index, int(batch.key)) == int(batch.key)
            assert torch.equal(
                batch.images,
                augment(split.images[[index]], batch.key, "pad", 2, (0.1, 1), True, SIZE),
            )
    assert len(keys) > 15


def test_seeds_give_other_orders_and_keys() -> None:
    a, b = (next(iter(loader(arrays(), seed=s).batches(0, 1))) for s in (0, 1))
    assert not torch.equal(a.index, b.index)
    assert not set(a.key.tolist()) & set(b.key.tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_left_alone(workers: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(arrays(), resident=False, workers=workers).batches(0, 3))
    list(eval_batches(arrays(), SIZE, 8, "cpu", workers))
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
    with pytest.raises(ValueError, match=r"batch_size=6 cannot be .* multiple of 4"):
        loader(arrays(), batch_size=6, world=2)
    with pytest.raises(ValueError, match="pad=8 should be smaller"):
        loader(arrays(), how=Augment(crop="pad", pad=8))
    assert len(next(iter(loader(arrays(), batch_size=7).batches(0, 1))).labels) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_everything_in_order(workers: int) -> None:
    split = subset(arrays(), torch.arange(22, 1, -1))
    batches = list(eval_batches(split, SIZE, 8, "cpu", workers))
    assert [len(b.labels) for b in batches] == [8, 8, 5]
    index = torch.cat([b.index for b in batches])
    assert index.tolist() == list(range(22, 1, -1))
    assert torch.equal(torch.cat([b.labels for b in batches]), index % 5)
    assert torch.equal(torch.cat([b.images for b in batches]), arrays().images[index] / 255)
    key = draws.image_keys(0, torch.zeros_like(index), index)
    assert torch.equal(torch.cat([b.key for b in batches]), key)
    kept = eval_batches(Resident(split, "cpu", progress=False), SIZE, 8, "cpu")
    assert all(same(a, b) for a, b in itertools.zip_longest(kept, batches))


def test_evaluation_of_nothing_is_nothing() -> None:
    assert list(eval_batches(subset(arrays(), torch.arange(0)), SIZE, 8, "cpu")) == []
