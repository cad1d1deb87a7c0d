"""From a file, bytes, a Pillow image or an array to upright 8-bit RGB, by rules that are the same everywhere.
Sizes are (height, width) in pixels throughout.
"""

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitrail_runtime.errors import ImageError, InputError

# What a folder is searched for, and what is tried on a file. No format whose reader starts another
# program (EPS starts Ghostscript) and no vector format stands here.
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".tga",
))  # fmt: skip
_FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO",
)  # fmt: skip

MAX_PIXELS = 178_956_970  # Pillow's own limit for an error: 512 MiB as RGB
MAX_PIXELS_VARIABLE = "VITRAIL_MAX_PIXELS"

# The value of EXIF's orientation -> what makes the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A picture is read or it is an InputError; Pillow's warnings about odd files (large, corrupt EXIF,
# palette transparency) tell a person nothing more. Per process: warnings' own context manager is
# not safe where several threads decode.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


Source = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


def decode(
    source: Source,
    *,
    at_least: tuple[int, int] | None = None,
    max_pixels: int | None = None,
    name: str | None = None,
) -> np.ndarray:
    """Upright RGB, uint8 (H, W, 3), of a picture in any form.

    - A JPEG is decoded at 1/2, 1/4 or 1/8 where that stays at or above `at_least` (height, width) in
      both directions, which is several times faster; other formats come at their full size.
    - EXIF orientation is applied, all eight. Of an animation or a file with pages, the first.
    - Transparency is laid over white, which is what a person sees. (Pillow's convert("RGB"), and so
      timm and torchvision, uncover whatever colour stands under transparent pixels; opaque pictures
      come out equal.) CMYK is converted by Pillow; ICC profiles are ignored, as in training pipelines.
    - 16-bit grey is scaled by 1/257, never clipped; 32-bit integers count as 16-bit ones. 32-bit
      floats must lie in [0, 1] and are scaled by 255.
    - An array must be uint8: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4). It is not turned or scaled.

    max_pixels: the largest picture that is decoded; None takes the environment variable
        VITRAIL_MAX_PIXELS, else 178,956,970.
    name: what messages call the source; a file's path by itself, and bytes have none.
    Raises: ImageError naming the file for anything that is not a whole, readable picture.
    """
    name = name or name_of(source)
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    with _opened(source, name, max_pixels) as image, _reading(name):
        orientation = _orientation(image)
        if at_least is not None and image is not source:
            height, width = at_least
            if orientation >= 5:  # stored on its side
                height, width = width, height
            image.draft(None, (width, height))
        image.load()
        rgb = _to_rgb(image, name)
        if orientation in _UPRIGHT:
            rgb = rgb.transpose(_UPRIGHT[orientation])
        return np.array(rgb)  # a copy of its own, writable


def read_size(
    source: Source, *, max_pixels: int | None = None, name: str | None = None
) -> tuple[int, int]:
    """(height, width) of the upright picture, from the header alone: no pixel is decoded.

    Raises: ImageError naming the file, as `decode`; a file broken behind its header passes here.
    """
    name = name or name_of(source)
    if isinstance(source, np.ndarray):
        _check_array(source, name)
        return source.shape[0], source.shape[1]
    with _opened(source, name, max_pixels) as image, _reading(name):
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def name_of(source: Any) -> str:
    """How messages call a source: a file's path, or what it is."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    return getattr(source, "filename", "") or f"<{type(source).__name__}>"


def pixel_limit(given: int | None = None) -> int:
    """The largest number of pixels that is decoded: given, VITRAIL_MAX_PIXELS, or the default."""
    if given is not None:
        return given
    text = os.environ.get(MAX_PIXELS_VARIABLE)
    if not text:
        return MAX_PIXELS
    try:
        return int(float(text))
    except ValueError:
        raise InputError(
            f"{MAX_PIXELS_VARIABLE} must be a number of pixels, such as 500e6, but is {text!r}"
        ) from None


def _check_array(array: np.ndarray, name: str) -> None:
    shape = array.shape
    fits = array.ndim == 2 or (array.ndim == 3 and shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not fits or 0 in shape:
        raise ImageError(
            name,
            "must be a uint8 array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), but is "
            f"{array.dtype} {shape}",
        )


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    _check_array(array, name)
    if array.ndim == 3 and array.shape[2] == 4:
        return np.array(_over_white(Image.fromarray(np.ascontiguousarray(array), "RGBA")))
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] == 1:
        array = array.repeat(3, axis=2)
    return np.ascontiguousarray(array)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    # A damaged file makes Pillow's readers raise nearly anything: OSError, SyntaxError, struct.error, ...
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from None
    except PermissionError:
        raise ImageError(name, "cannot be read: permission denied") from None
    except Image.UnidentifiedImageError:
        raise ImageError(
            name,
            "is not a picture in a format that is read here "
            "(JPEG, PNG, WebP, GIF, BMP, TIFF, PNM, AVIF, JPEG 2000, TGA)",
        ) from None
    except Exception as error:
        raise ImageError(name, f"is broken or truncated: {error}") from error


@contextmanager
def _opened(source: Any, name: str, max_pixels: int | None) -> Iterator[Image.Image]:
    limit = pixel_limit(max_pixels)
    if isinstance(source, Image.Image):
        _check_pixels(source, name, limit)
        yield source
        return
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.exists():
            hint = " (a link to nothing)" if path.is_symlink() else ""
            raise ImageError(name, f"cannot be read: no such file{hint}")
        if path.is_dir():
            raise ImageError(name, "is a folder, but an image is expected")
        if not path.is_file():
            raise ImageError(name, "is not a regular file")
        if path.stat().st_size == 0:
            raise ImageError(name, "is empty (0 bytes)")
        target: Any = path
    elif isinstance(source, bytes):
        if not source:
            raise ImageError(name, "is empty (0 bytes)")
        target = io.BytesIO(source)
    else:
        raise InputError(
            "a picture is a path, bytes, a Pillow image or a uint8 array (H, W, 3), "
            f"but got {type(source).__name__}"
        )
    with _reading(name):
        image = _open(target, limit)
    with image:
        _check_pixels(image, name, limit)
        yield image


def _open(target: Any, limit: int) -> Image.Image:
    if limit <= MAX_PIXELS:
        return Image.open(target, formats=_formats())
    # Pillow checks while opening, against a variable of the process.
    with _raised_limit_lock:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None if before is None else max(before, limit)
        try:
            return Image.open(target, formats=_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = before


_raised_limit_lock = threading.Lock()


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    Image.init()
    return [f for f in _FORMATS if f in Image.OPEN]


def _check_pixels(image: Image.Image, name: str, limit: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(name, f"has no pixels: {height} x {width}")
    if width * height > limit:
        megapixels = f"{height} x {width} is {width * height / 1e6:.1f} megapixels"
        raise _too_large(name, megapixels, limit)


def _too_large(name: str, what: str, limit: int | None = None) -> ImageError:
    shown = f", above the limit of {limit / 1e6:.1f}" if limit else ""
    return ImageError(
        name,
        f"is too large to decode: {what}{shown}; if you trust it, set {MAX_PIXELS_VARIABLE} (pixels) higher",
    )


def _orientation(image: Image.Image) -> int:
    # 1 to 8; 1 where nothing readable says otherwise.
    if image.format == "TIFF":  # Pillow turns TIFF itself, and its size is upright from the start
        return 1
    try:
        if image.format == "PNG" and "exif" not in image.info:
            return _png_orientation(image)
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block must not cost the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _png_orientation(image: Any) -> int:
    # EXIF may stand behind the pixels, where Pillow finds it only by decoding all of them. Chunk
    # headers are enough: length, name, data, checksum.
    file = getattr(image, "fp", None)
    if file is None:  # loaded already: whatever there was is in info
        return 1
    before = file.tell()
    try:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            length, kind = int.from_bytes(header[:4], "big"), header[4:]
            if kind == b"eXIf":
                exif = Image.Exif()
                exif.load(file.read(length))
                return exif.get(0x0112, 1)
            file.seek(length + 4, os.SEEK_CUR)
    finally:
        file.seek(before)
    return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ImageError(
                name,
                f"holds integers from {low} to {high}, but at most 16 bits (0 to 65535) are read; "
                "scale it and save it as 16-bit or 8-bit",
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also not-a-number
            raise ImageError(
                name,
                f"holds floats from {low:g} to {high:g}, but [0, 1] is expected; scale it and save it again",
            )
        return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        straight = image.convert("LA") if mode == "La" else image  # Pillow knows no shorter way
        return _over_white(straight.convert("RGBA"))
    try:
        return image.convert("RGB")
    except ValueError:
        raise ImageError(
            name, f"has colours in {mode}, which cannot be converted; save it as RGB"
        ) from None


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
