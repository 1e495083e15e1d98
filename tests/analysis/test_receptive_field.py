import pytest

from hybridvit.analysis.receptive_field import mixes_globally, receptive_field
from hybridvit.stems import STEMS


def root_only(kernel: int, stride: int, pool: bool) -> dict[str, object]:
    return {
        "width": 0.125,
        "blocks": (),
        "root_kernel": kernel,
        "root_stride": stride,
        "root_pool": pool,
    }


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        # r = 1 + sum of (kernel - 1) x product of the strides before.
        (root_only(7, 2, False), 7),
        (root_only(7, 2, True), 7 + 2 * 2),
        (root_only(3, 1, False), 3),
        ({**root_only(3, 1, False), "blocks": (1,), "strides": (2,)}, 3 + 2),
        ({**root_only(3, 1, False), "blocks": (2,), "strides": (2,)}, 3 + 2 + 2 * 2),
        ({**root_only(3, 1, False), "blocks": (1, 1), "strides": (2, 2)}, 3 + 2 + 2 * 2),
        ({**root_only(7, 2, True), "patch": 8}, 7 + 2 * 2 + 7 * 4),
    ],
)
def test_resnet_fields_follow_the_recurrence(args: dict[str, object], expected: int) -> None:
    assert receptive_field(STEMS["resnet"](dim=8, **args), 128) == expected


def test_linear_sees_its_patch() -> None:
    stem = STEMS["linear"](dim=8, patch=4)
    assert receptive_field(stem, 32) == 4
    assert not mixes_globally(stem, 32)


def test_group_norm_mixes_globally() -> None:
    assert mixes_globally(STEMS["resnet"](dim=8, **root_only(3, 1, False)), 32)


def test_a_field_beyond_the_image_is_the_image() -> None:
    stem = STEMS["resnet"](dim=8, width=0.125, blocks=(2, 2), strides=None)
    assert receptive_field(stem, 32) == 32
