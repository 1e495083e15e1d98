"""Decoders against each other and against Pillow's."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from hybridvit.data import decode as decoding
from hybridvit.data.decode import Decoder, choose, decode, record
from hybridvit.data.folders import image_folder
from hybridvit.data.splits import DecodedSplit, cover


def is_missing(decoder: str) -> bool:
    if decoder == "torchvision":
        named = hasattr(getattr(torchvision, "io", None), "decode_jpeg")
        return not (named and hasattr(torch.ops.image, "decode_jpeg"))
    return importlib.util.find_spec(decoder) is None


# A release of torchvision that has decoders announces their removal.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The image decoding and encoding capabilities:DeprecationWarning"
)
DECODERS = [
    "pil",
    *(
        pytest.param(
            decoder,
            marks=pytest.mark.skipif(is_missing(decoder), reason=f"no decoder of {decoder} here"),
        )
        for decoder in ("simplejpeg", "torchvision")
    ),
]


def photo(path: Path, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """A smooth picture as a JPEG file (width, height)."""
    generator = torch.Generator().manual_seed(size[0])
    small = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", quality=90)
    return image


def pixels(path: Path, decoder: Decoder, size: tuple[int, int], channels: int) -> Tensor:
    def read(i: int) -> Image.Image | Tensor:
        return decode(str(path), decoder, size, channels)

    return DecodedSplit(read, torch.zeros(1), size, channels).read(0)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(40, 40), (300, 200), (98, 412)])
def test_every_decoder_gives_the_picture(
    tmp_path: Path, decoder: Decoder, mode: str, size: tuple[int, int]
) -> None:
    path = tmp_path / "a.jpg"
    photo(path, size, mode)
    for channels in (1, 3) if mode == "L" else (3,):
        result = pixels(path, decoder, (40, 40), channels)
        whole = Image.open(path).convert("L" if channels == 1 else "RGB")
        full = torch.from_numpy(np.array(whole)).view(1, size[1], size[0], channels)
        expected = cover(full.permute(0, 3, 1, 2).float(), (40, 40))[0]
        assert (result - expected).abs().mean() < 1.5  # of 255


@pytest.mark.parametrize("decoder", DECODERS)
def test_large_photographs_are_decoded_at_a_smaller_scale(tmp_path: Path, decoder: Decoder) -> None:
    path = tmp_path / "a.jpg"
    photo(path, (800, 500))
    decoded = decode(str(path), decoder, (100, 100), 3)
    found = decoded.size if isinstance(decoded, Image.Image) else decoded.shape[:0:-1]
    assert tuple(found) == (200, 125)
    decoded = decode(str(path), decoder, (400, 64), 3)  # half of it would not cover this
    found = decoded.size if isinstance(decoded, Image.Image) else decoded.shape[:0:-1]
    assert tuple(found) == (800, 500)


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_is_no_plain_jpeg_is_left_to_pillow(tmp_path: Path, decoder: Decoder) -> None:
    flat = {
        "a.png": ("RGBA", (9, 8, 7, 200)),
        "b.jpg": ("CMYK", (255, 255, 0, 0)),
        "c.gif": ("P", 3),
    }
    for name, (mode, colour) in flat.items():
        Image.new(mode, (20, 30), colour).save(tmp_path / name)
        assert torch.equal(
            pixels(tmp_path / name, decoder, (8, 8), 3), pixels(tmp_path / name, "pil", (8, 8), 3)
        )


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_cut_file_is_one_line(tmp_path: Path, decoder: Decoder) -> None:
    path = tmp_path / "a.jpg"
    photo(path, (300, 200))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"^image '.*a\.jpg' cannot be decoded \(.*\); remove it"):
        decode(str(path), decoder, (40, 40), 3)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_set_says_which_decoder_reads_it(tmp_path: Path, decoder: Decoder) -> None:
    for name in ("a", "b"):
        for i in range(6):
            photo(tmp_path / name / f"{i}.jpg", (90 + i, 80))
    data = image_folder(str(tmp_path), image_size=16, decoder=decoder)
    assert data.decoder == record(decoder)
    assert data.decoder.split()[0] == decoder
    assert data.decoder.split()[1][0].isdigit()
    # Workers that are started anew get the split by pickle.
    again = pickle.loads(pickle.dumps(data.train))
    assert torch.equal(again.read_many([0, 3]), data.train.read_many([0, 3]))


def test_the_fastest_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()
    monkeypatch.setattr(decoding, "_is_installed", installed.__contains__)
    for decoder in ("pil", "torchvision", "simplejpeg"):
        if decoder != "pil":
            expected = rf"decoder='{decoder}' is not installed; set .*=fastest .* pip install"
            with pytest.raises(ValueError, match=expected):
                choose(decoder)
        installed.add(decoder)
        assert choose("fastest") == choose(decoder) == decoder
    with pytest.raises(ValueError, match="decoder='cv2' should be one of simplejpeg, torchvision"):
        choose("cv2")


@pytest.mark.skipif(is_missing("torchvision"), reason="no decoder of torchvision here")
def test_a_torchvision_that_lost_its_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoding._is_installed("torchvision")
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    assert not decoding._is_installed("torchvision")


@pytest.mark.parametrize("decoder", DECODERS[1:])
def test_decoders_give_equal_pixels(tmp_path: Path, decoder: Decoder) -> None:
    for mode, channels in (("RGB", 3), ("L", 1)):
        photo(tmp_path / "a.jpg", (121, 83), mode)
        pillows = pixels(tmp_path / "a.jpg", "pil", (83, 121), channels)
        assert torch.equal(pixels(tmp_path / "a.jpg", decoder, (83, 121), channels), pillows)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_whole_picture_with_stray_bytes_is_read(tmp_path: Path, decoder: Decoder) -> None:
    """libjpeg warns of them, which simplejpeg takes for an error."""
    path = tmp_path / "a.jpg"
    photo(path, (48, 40))
    clean = pixels(path, decoder, (40, 48), 3)
    content = path.read_bytes()
    assert content.endswith(b"\xff\xd9")
    path.write_bytes(content[:-2] + b"\0\0" + content[-2:])
    found = pixels(path, decoder, (40, 48), 3)
    assert (found.double() - clean.double()).abs().mean() < 1
