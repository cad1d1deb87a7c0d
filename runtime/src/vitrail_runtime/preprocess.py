"""From a picture to a model's input: the ONE preprocessing of evaluation, Predictor and runtime.

Two steps. `decode` turns whatever a person has (a file, bytes, a Pillow image, an array) into upright
8-bit RGB, by rules that are the same everywhere; `prepare` turns that into a model's input and says
how to find the way back. Sizes are (height, width) in pixels throughout.
"""

import io
import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vitrail_runtime.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

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
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# A picture is read or it is an InputError; Pillow's warnings about odd files (large, corrupt EXIF,
# palette transparency) tell a person nothing more. Per process: warnings' own context manager is
# not safe where several threads decode.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes a model's input; travels with every checkpoint and artifact.

    `size` is (height, width) in pixels; `mode` says how a picture of another shape gets there:
    "crop" resizes the short side to size / crop_pct and cuts the centre, "squash" ignores the
    aspect ratio, "fit" keeps it within `size` and leaves the result smaller, "native" resizes nothing.
    `crop_pct` is for "crop" alone. "crop" is timm's and torchvision's evaluation transform.
    """

    size: tuple[int, int] = (224, 224)
    mode: Literal["crop", "squash", "fit", "native"] = "crop"
    crop_pct: float = 0.875
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise InputError(
                f"preprocessing size must be (height, width), both >= 1, but is {self.size}"
            )
        if self.mode not in ("crop", "squash", "fit", "native"):
            raise InputError(
                f"preprocessing mode must be 'crop', 'squash', 'fit' or 'native', but is {self.mode!r}"
            )
        if self.interpolation not in _RESAMPLING:
            raise InputError(
                f"interpolation must be one of {', '.join(_RESAMPLING)}, but is {self.interpolation!r}"
            )
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct must lie in (0, 1], but is {self.crop_pct}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(
                f"mean and std need three numbers, std above 0, but are {self.mean} and {self.std}"
            )


@dataclass(frozen=True)
class Geometry:
    """Where a prepared picture lies on the original: x_input = x_original * scale - offset.

    original: (height, width) of the upright picture. scale: (sy, sx). offset: (top, left), in input pixels.
    """

    original: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    def boxes_to_original(self, boxes_xyxy: np.ndarray) -> np.ndarray:
        """(N, 4) xyxy in pixels of the input -> (N, 4) float32 in pixels of the original, clipped to it."""
        (sy, sx), (top, left), (h, w) = self.scale, self.offset, self.original
        boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
        boxes = (boxes + np.array((left, top, left, top))) / (sx, sy, sx, sy)
        return boxes.clip(0, (w, h, w, h)).astype(np.float32)

    def boxes_to_input(self, boxes_xyxy: np.ndarray) -> np.ndarray:
        """The inverse of `boxes_to_original`, without clipping: (N, 4) float32."""
        (sy, sx), (top, left) = self.scale, self.offset
        boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
        return (boxes * (sx, sy, sx, sy) - (left, top, left, top)).astype(np.float32)


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
    Raises: InputError naming the file for anything that is not a whole, readable picture.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    name = name or name_of(source)
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

    Raises: InputError naming the file, as `decode`; a file broken behind its header passes here.
    """
    if isinstance(source, np.ndarray):
        _check_array(source)
        return source.shape[0], source.shape[1]
    name = name or name_of(source)
    with _opened(source, name, max_pixels) as image, _reading(name):
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def preprocessed_size(height: int, width: int, p: Preprocessing) -> tuple[int, int]:
    """(height, width) that `prepare` makes of a picture of this size, without touching pixels."""
    if p.mode in ("crop", "squash"):
        return p.size
    return _resized_size(height, width, p)


def decode_size(p: Preprocessing) -> tuple[int, int] | None:
    """`at_least` for `decode` before `prepare(..., p)`: 1.5 times what the resize makes; None: all of it.

    A JPEG decoded at a fraction is sharper and noisier than the same picture resized with antialiasing.
    On 1500 x 1000 mosaics of photographs brought to 256 pixels the result differs from that of a full
    decode by 9.5 of 255 (root mean square) at a factor just above 1, by at most 3 from 1.5 on, at 2.4
    times the speed; a factor of 2 leaves 3, at 1.6 times the speed.
    """
    if p.mode == "native":
        return None
    height, width = _scaled(p) if p.mode == "crop" else p.size
    return math.ceil(1.5 * height), math.ceil(1.5 * width)


def prepare(
    image: np.ndarray, p: Preprocessing, *, original: tuple[int, int] | None = None
) -> tuple[np.ndarray, Geometry]:
    """A model's input: uint8 (H, W, 3) RGB -> float32 (3, h, w), normalised and contiguous, and the way back.

    original: (height, width) of the upright picture, where `decode` gave a reduced one; sizes and the
        geometry are reckoned from it, so that they don't depend on how the file was decoded.
    """
    pixels, geometry = resize(image, p, original=original)
    return normalise(pixels, p), geometry


def resize(
    image: np.ndarray, p: Preprocessing, *, original: tuple[int, int] | None = None
) -> tuple[np.ndarray, Geometry]:
    """`prepare` without its last step: uint8 (H, W, 3) -> uint8 (h, w, 3), resized and cut."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(
            f"prepare takes uint8 pictures (H, W, 3), but got {image.dtype} {image.shape}; decode() makes one"
        )
    height, width = original or image.shape[:2]
    out_h, out_w = _resized_size(height, width, p)
    if p.mode == "crop":
        crop_h, crop_w = p.size
        # torchvision's CenterCrop: Python's round, half to even.
        top, left = round((out_h - crop_h) / 2), round((out_w - crop_w) / 2)
    else:
        (crop_h, crop_w), top, left = (out_h, out_w), 0, 0
    geometry = Geometry((height, width), (out_h / height, out_w / width), (top, left))

    if image.shape[:2] == (out_h, out_w):
        return np.ascontiguousarray(image[top : top + crop_h, left : left + crop_w]), geometry
    filter_, pil = _RESAMPLING[p.interpolation], Image.fromarray(np.ascontiguousarray(image))
    if out_h * out_w <= _WHOLE_RESIZE * crop_h * crop_w:
        resized = np.asarray(pil.resize((out_w, out_h), filter_))
        return np.ascontiguousarray(resized[top : top + crop_h, left : left + crop_w]), geometry
    # A picture of 1 x 5000 would grow to 256 x 1,280,000 before the cut. Resizing the region alone
    # gives the same pixels but for the rounding of its corners to float32 inside Pillow.
    sy, sx = image.shape[0] / out_h, image.shape[1] / out_w
    box = (left * sx, top * sy, (left + crop_w) * sx, (top + crop_h) * sy)
    return np.array(pil.resize((crop_w, crop_h), filter_, box=box)), geometry


def normalise(pixels: np.ndarray, p: Preprocessing) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (3, H, W): (x / 255 - mean) / std, to the bit what torchvision gives."""
    out = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    for channel, table in enumerate(_normalised_values(p.mean, p.std)):
        np.take(table, pixels[:, :, channel], out=out[channel], mode="clip")
    return out


# The whole picture is resized and then cut, to the bit as torchvision does, up to this many times
# the pixels of the cut: aspect ratios to about 6.
_WHOLE_RESIZE = 8


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


@lru_cache(maxsize=64)
def _normalised_values(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    # (3, 256): what each 8-bit value becomes, in float32 and in torchvision's order of operations.
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    return (values - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


def _scaled(p: Preprocessing) -> tuple[int, int]:
    return math.floor(p.size[0] / p.crop_pct), math.floor(p.size[1] / p.crop_pct)


def _resized_size(height: int, width: int, p: Preprocessing) -> tuple[int, int]:
    # The whole picture's size after the resize, before the cut.
    if p.mode == "native":
        return height, width
    if p.mode == "squash":
        return p.size
    if p.mode == "fit":
        max_h, max_w = p.size
        if height * max_w >= width * max_h:
            return max_h, max(1, round(width * max_h / height))
        return max(1, round(height * max_w / width)), max_w
    target_h, target_w = _scaled(p)
    if target_h == target_w:  # torchvision's Resize of the short side truncates the long one
        if width <= height:
            return int(target_w * height / width), target_w
        return target_h, int(target_h * width / height)
    ratio = min(height / target_h, width / target_w)  # timm's ResizeKeepRatio rounds
    return round(height / ratio), round(width / ratio)


def _check_array(array: np.ndarray) -> None:
    shape = array.shape
    fits = array.ndim == 2 or (array.ndim == 3 and shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not fits or 0 in shape:
        raise InputError(
            "an array must be a uint8 picture of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"but is {array.dtype} {shape}"
        )


def _from_array(array: np.ndarray) -> np.ndarray:
    _check_array(array)
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
        raise InputError(_too_large(name, str(error))) from None
    except Exception as error:
        raise InputError(f"{name} is broken or truncated: {error}") from error


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
            raise InputError(f"{name}: no such file")
        if path.is_dir():
            raise InputError(f"{name} is a folder, but a picture is expected")
        if not path.is_file():
            raise InputError(f"{name} is not a regular file")
        if path.stat().st_size == 0:
            raise InputError(f"{name} is empty (0 bytes)")
        target: Any = path
    elif isinstance(source, bytes):
        if not source:
            raise InputError(f"{name} is empty (0 bytes)")
        target = io.BytesIO(source)
    else:
        raise InputError(
            "a picture is a path, bytes, a Pillow image or a uint8 array (H, W, 3), "
            f"but got {type(source).__name__}"
        )
    try:
        image = _open(target, limit)
    except PermissionError:
        raise InputError(f"{name} cannot be read: permission denied") from None
    except Image.DecompressionBombError as error:
        raise InputError(_too_large(name, str(error))) from None
    except Image.UnidentifiedImageError:
        raise InputError(
            f"{name} is not a picture in a format that is read here "
            "(JPEG, PNG, WebP, GIF, BMP, TIFF, PNM, AVIF, JPEG 2000, TGA)"
        ) from None
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(f"{name} is broken or truncated: {error}") from error
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
        raise InputError(f"{name} has no pixels: {height} x {width}")
    if width * height > limit:
        raise InputError(
            _too_large(name, f"{height} x {width} is {width * height / 1e6:.1f} megapixels", limit)
        )


def _too_large(name: str, what: str, limit: int | None = None) -> str:
    shown = f", above the limit of {limit / 1e6:.1f}" if limit else ""
    return (
        f"{name} is too large to decode: {what}{shown}; if you trust it, set "
        f"{MAX_PIXELS_VARIABLE} (pixels) higher"
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
            raise InputError(
                f"{name} holds integers from {low} to {high}, but at most 16 bits (0 to 65535) are "
                "read; scale it and save it as 16-bit or 8-bit"
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also not-a-number
            raise InputError(
                f"{name} holds floats from {low:g} to {high:g}, but [0, 1] is expected; "
                "scale it and save it again"
            )
        return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        return _over_white(image.convert("RGBA"))
    try:
        return image.convert("RGB")
    except ValueError:
        raise InputError(
            f"{name} has colours in {mode}, which cannot be converted; save it as RGB"
        ) from None


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")
