"""From a file in any form to upright 8-bit RGB, or one message that names the file."""

import numpy as np
import pytest
from PIL import Image

from vitrail_runtime.preprocess import decode, read_size


def gradient(height, width):
    """A smooth picture with a dark red top left corner: survives JPEG, and shows how it is turned."""
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * y / max(1, height - 1)
    green = 255 * x / max(1, width - 1)
    return np.stack([red, green, np.full_like(red, 60)], axis=2).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation, suffix):
    upright = gradient(40, 64)
    stored = {  # what a camera stores, so that the tag undoes it
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    options = {"jpg": {"quality": 98, "subsampling": 0}, "webp": {"lossless": True}}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options.get(suffix, {}))
    seen = decode(path)
    assert read_size(path) == seen.shape[:2] == (40, 64)
    assert np.abs(seen.astype(int) - upright).max() <= (6 if suffix == "jpg" else 0)
    again = decode(path, at_least=(20, 32))
    assert again.shape == ((20, 32, 3) if suffix == "jpg" else (40, 64, 3))
    assert again[0, 0].sum() < 130 < again[-1, -1].sum()
