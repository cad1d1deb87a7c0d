"""Training decodes faster than evaluation, to the same pixels."""

import importlib
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import picture
from vitrail.data import decoding, open_data
from vitrail.data.decoding import read_pixels
from vitrail_runtime.errors import InputError


def saved(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    image = picture(3, (37, 53))
    exif = image.getexif()
    exif[0x0112] = orientation
    return saved(image, exif=exif)


KINDS = {
    "baseline.jpg": lambda: saved(picture(1, (67, 101))),
    "progressive.jpg": lambda: saved(picture(1, (67, 101)), progressive=True),
    "fine.jpg": lambda: saved(picture(1, (67, 101)), subsampling=0, quality=97),
    "odd.jpg": lambda: saved(picture(1, (1, 3))),
    "grey.jpg": lambda: saved(picture(1, (67, 101)).convert("L")),
    "cmyk.jpg": lambda: saved(picture(1, (67, 101)).convert("CMYK")),
    "large.jpg": lambda: saved(picture(1, (300, 400))),
    "alpha.png": lambda: saved(picture(1, (67, 101)).convert("RGBA"), "PNG"),
    "png.jpg": lambda: saved(picture(1, (67, 101)), "PNG"),
    **{f"turned{o}.jpg": lambda o=o: turned(o) for o in range(1, 9)},
}


@pytest.fixture
def data(tmp_path):
    for name, make in KINDS.items():
        folder = tmp_path / "set" / name.partition(".")[0]
        folder.mkdir(parents=True)
        (folder / name).write_bytes(make())
    return open_data(tmp_path / "set", "all")


def test_training_and_evaluation_decode_to_the_same_pixels(data):
    for i in range(len(data)):
        for least in ((64, 64), (1000, 1000), (30, 40), (1, 1)):
            expected = data.images.read(i, least)
            got = read_pixels(data.images, i, least)
            assert got.dtype == np.uint8
            np.testing.assert_array_equal(got, expected, err_msg=f"{data.where(i)} {least}")


def test_a_large_jpeg_comes_reduced_but_never_too_small(data):
    i = next(i for i, key in enumerate(data.keys) if "large" in key)
    assert read_pixels(data.images, i, (60, 70)).shape == (75, 100, 3)
    assert read_pixels(data.images, i, (151, 70)).shape == (300, 400, 3)


def test_the_fast_decoder_takes_jpegs_that_are_decoded_whole_and_no_others(data, monkeypatch):
    real, asked = decoding.decode_jpeg, []
    monkeypatch.setattr(
        decoding, "decode_jpeg", lambda *a, **g: asked.append(a[0]) or real(*a, **g)
    )

    def fast(name: str, least: tuple[int, int]) -> bool:
        asked.clear()
        read_pixels(
            data.images, next(i for i, key in enumerate(data.keys) if f"/{name}" in key), least
        )
        return bool(asked)

    for name in ("baseline.jpg", "progressive.jpg", "grey.jpg", "turned6.jpg"):
        assert fast(name, (60, 60))
    assert not fast("alpha.png", (60, 60))
    assert not fast("png.jpg", (60, 60)), "whatever it is called"
    # 300 x 400: halved where both sides stay long enough.
    assert not fast("large.jpg", (150, 200))
    assert fast("large.jpg", (151, 200))
    assert fast("large.jpg", (150, 201))
    assert fast("large.jpg", (100, 399))


def test_what_the_fast_decoder_has_read_is_not_decoded_again(data, monkeypatch):
    monkeypatch.setattr(type(data.images), "decode", None)
    for name in ("baseline.jpg", "grey.jpg", "turned6.jpg"):
        i = next(i for i, key in enumerate(data.keys) if f"/{name}" in key)
        assert read_pixels(data.images, i, (60, 60)).shape == (*data.images.sizes[i], 3)


def test_a_jpeg_that_breaks_inside_is_named(tmp_path, class_folders):
    root = class_folders({"": {"cat": 2, "dog": 2}})
    path = root / "cat" / "000.jpg"
    payload = bytearray(path.read_bytes())
    table = (
        payload.index(b"\xff\xc4") + 5
    )  # code lengths of a Huffman table, which only decoding reads
    payload[table : table + 16] = b"\xff" * 16
    path.write_bytes(payload)
    data = open_data(root, "all")
    with pytest.raises(InputError, match=r"cat/000\.jpg"):
        read_pixels(data.images, 0, (64, 64))


def test_without_torchcodec_a_warning_says_so_and_the_pixels_stay(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.warns(UserWarning, match=r"torchcodec cannot be loaded .*Pillow.*>= 0\.16"):
        importlib.reload(decoding)
    try:
        assert decoding.decode_jpeg is None
        for i in range(len(data)):
            np.testing.assert_array_equal(
                decoding.read_pixels(data.images, i, (64, 64)), data.images.read(i, (64, 64))
            )
    finally:
        monkeypatch.undo()
        importlib.reload(decoding)
    assert decoding.decode_jpeg is not None


def test_reading_pictures_imports_neither_torchvision_nor_dynamo():
    """Each takes longer to import than everything else that a second start does."""
    code = """if True:
        import sys, vitrail.data.decoding, vitrail.data.loader
        print([name for name in ("torchvision", "torch._dynamo") if name in sys.modules])
    """
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"
