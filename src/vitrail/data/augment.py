"""Random changes of training images, each drawn from a key alone: the same on any worker of any process.

What is random is drawn first, from sizes and key, free of pixels: `draw` for an image, `draw_mixing` for a
batch. `render` and `mix` apply it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from vitrail.data.augmentation import Augmentation
from vitrail.data.view import TRIES, Box, View, draw_view
from vitrail_runtime.errors import InputError

__all__ = [
    "Augmentation",
    "augment",
    "draw",
    "draw_mixing",
    "generator",
    "mix",
    "render",
]

Key = tuple[int, int, int]  # (seed, epoch, position); for `mix`, (seed, epoch, step)
_SAMPLE, _MIX, DROPPING = 0, 1, 2  # streams of random numbers


@dataclass(frozen=True)
class Strength:
    """How far one operation of RandAugment goes."""

    level: float  # in [0, 1]
    signed: float  # the same with a random sign
    resampling: Image.Resampling
    fill: tuple[int, int, int]

    @property
    def factor(self) -> float:  # of ImageEnhance, 1 for no change
        return max(0.1, 1 + 0.9 * self.signed)


@dataclass(frozen=True)
class Erasing:
    box: Box  # of the result
    noise: np.ndarray  # (3, height, width) of the box, standard normal


@dataclass(frozen=True)
class Drawn:
    """Everything that is random about one training image."""

    view: View
    three: tuple[str, float] | None  # which of three-augment's changes, and the blur's sigma
    randaugment: tuple[tuple[str, Strength], ...]  # in their order
    jitter: tuple[tuple[str, float], ...]  # property and factor, in their order
    erasing: Erasing | None


@dataclass(frozen=True)
class Mixing:
    """How the images of a batch are mixed with their partners."""

    share: float  # of each image's own, the rest is its partner's
    box: Box | None  # CutMix: where the partner is; None for MixUp


def generator(key: Key, stream: int = _SAMPLE) -> np.random.Generator:
    """Random numbers of one sample, or of the mixing of one step."""
    seed, epoch, position = key
    if seed < 0:
        raise InputError(f"seed must not be negative, but is {seed}")
    # Philox takes the key as it is: no seeding to pay for per picture, and no two keys share a stream.
    return np.random.Generator(
        np.random.Philox(key=[seed, (epoch << 40) + position], counter=[0, 0, 0, stream])
    )


def augment(
    image: np.ndarray,
    size: tuple[int, int],
    augmentation: Augmentation,
    key: Key,
    *,
    original: tuple[int, int] | None = None,
) -> Tensor:
    """One training image: uint8 (H, W, 3) RGB -> uint8 (3, height, width), as `augmentation` and `key` say.

    The same key gives the same result. Pixels stay 8-bit: normalise on the device.

    original: (height, width) of the image where `image` is a reduced form of it, as `View.needed` allows;
        parts are drawn on the original, so they do not depend on the reduction.
    """
    height, width = original or image.shape[:2]
    return render(image, draw(height, width, size, augmentation, key), augmentation)


def render(image: np.ndarray, drawn: Drawn, augmentation: Augmentation) -> Tensor:
    """The image as it was drawn: uint8 (3, height, width)."""
    pixels = drawn.view.image(image)
    if drawn.three or drawn.randaugment or drawn.jitter:
        pixels = _photographic(pixels, drawn)
    if drawn.erasing is not None:
        pixels = _erase(pixels.contiguous(), drawn.erasing, augmentation)
    return pixels.contiguous()


def draw(
    height: int, width: int, size: tuple[int, int], augmentation: Augmentation, key: Key
) -> Drawn:
    """What is done to an image of `height` x `width` pixels under this key."""
    rng = generator(key)
    view = draw_view(height, width, size, augmentation, rng)
    three = _draw_three(rng) if augmentation.three_augment else None
    randaugment = _draw_randaugment(augmentation, rng)
    jitter = _draw_jitter(augmentation.color_jitter, rng) if augmentation.color_jitter else ()
    erasing = _draw_erasing(*view.size, rng) if rng.random() < augmentation.random_erasing else None
    return Drawn(view, three, randaugment, jitter, erasing)


def mix(
    images: Tensor,
    labels: Tensor,
    key: Key,
    *,
    num_classes: int,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mix_prob: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """MixUp or CutMix of a batch on its device.

    Args:
        images: (B, 3, H, W) floats, normalised. labels: (B,) integers.
        key: (seed, epoch, step), the same on every process.
        mixup, cutmix: alphas of their Beta distributions, 0 for off. mix_prob: how often a batch is mixed.
    Returns: images of the same shape and soft targets (B, num_classes), float32.

    One coefficient serves the whole batch. Samples 0 and 1, 2 and 3, ... are each other's partners, not the
    first and the last as is common: so pairs do not change when the batch is shared among processes, as
    long as each takes an even number. The last of an odd batch stays as it is.
    """
    targets = F.one_hot(labels, num_classes).to(torch.float32)
    height, width = images.shape[-2:]
    drawn = draw_mixing(height, width, key, mixup, cutmix, mix_prob)
    pairs = len(labels) // 2
    if drawn is None or not pairs:
        return images, targets
    partner = torch.arange(len(labels), device=labels.device)
    partner[: 2 * pairs] = partner[: 2 * pairs].view(pairs, 2).flip(1).reshape(-1)
    if drawn.box is not None:
        rows, columns = _slices(drawn.box)
        mixed = images.clone()
        mixed[:, :, rows, columns] = images[partner, :, rows, columns]
    else:
        mixed = torch.lerp(images[partner], images, drawn.share)
    return mixed, torch.lerp(targets[partner], targets, drawn.share)


def draw_mixing(
    height: int, width: int, key: Key, mixup: float, cutmix: float, mix_prob: float
) -> Mixing | None:
    """How `mix` mixes images of `height` x `width` pixels under this key; None for not at all."""
    rng = generator(key, _MIX)
    chance, which, where_y, where_x = rng.random(4)
    if max(mixup, cutmix) <= 0 or chance >= mix_prob:
        return None
    cut = cutmix > 0 and (mixup == 0 or which < 0.5)
    alpha = cutmix if cut else mixup
    share = float(rng.beta(alpha, alpha))
    if not cut:
        return Mixing(share, None)
    box_h, box_w = height * math.sqrt(1 - share), width * math.sqrt(1 - share)
    top, bottom = _span(where_y * height, box_h, height)
    left, right = _span(where_x * width, box_w, width)
    kept = 1 - (bottom - top) * (right - left) / (
        height * width
    )  # the image's edge may clip the box
    return Mixing(kept, (top, left, bottom - top, right - left))


def _span(centre: float, length: float, limit: int) -> tuple[int, int]:
    return max(0, round(centre - length / 2)), min(limit, round(centre + length / 2))


def _draw_erasing(height: int, width: int, rng: np.random.Generator) -> Erasing | None:
    # A rectangle of 2 to 33 % of the area, drawn again where it does not fit: clipped, it would be a band.
    for _ in range(TRIES):
        area = height * width * rng.uniform(0.02, 1 / 3)
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        box_h, box_w = (
            max(1, round(math.sqrt(area / ratio))),
            max(1, round(math.sqrt(area * ratio))),
        )
        if box_h < height and box_w < width:
            top, left = rng.integers(0, height - box_h + 1), rng.integers(0, width - box_w + 1)
            noise = rng.standard_normal((3, box_h, box_w), dtype=np.float32)
            return Erasing((int(top), int(left), box_h, box_w), noise)
    return None


def _erase(pixels: Tensor, erasing: Erasing, augmentation: Augmentation) -> Tensor:
    # What is standard normal once normalised.
    mean = np.array(augmentation.mean, np.float32)[:, None, None]
    std = np.array(augmentation.std, np.float32)[:, None, None]
    fill = np.clip(np.rint(255 * (mean + std * erasing.noise)), 0, 255).astype(np.uint8)
    rows, columns = _slices(erasing.box)
    pixels[:, rows, columns] = torch.from_numpy(fill)
    return pixels


def _slices(box: Box) -> tuple[slice, slice]:
    top, left, height, width = box
    return slice(top, top + height), slice(left, left + width)


def _photographic(pixels: Tensor, drawn: Drawn) -> Tensor:
    # Pillow's operations stay in 8 bits; torchvision's on tensors go through floats, several times as slow.
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if drawn.three is not None:
        which, sigma = drawn.three
        image = THREE_AUGMENT[which](image, sigma)
    for which, strength in drawn.randaugment:
        image = RANDAUGMENT[which](image, strength)
    for which, factor in drawn.jitter:
        image = COLOR_JITTER[which](image).enhance(factor)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


THREE_AUGMENT: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "grey": lambda image, sigma: image.convert("L").convert("RGB"),
    "solarize": lambda image, sigma: ImageOps.solarize(image, 128),
    "blur": lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
}


def _draw_three(rng: np.random.Generator) -> tuple[str, float]:
    which = list(THREE_AUGMENT)[int(rng.integers(3))]
    return which, float(rng.uniform(0.1, 2.0))


COLOR_JITTER = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def _draw_jitter(strength: float, rng: np.random.Generator) -> tuple[tuple[str, float], ...]:
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, 3)
    names = list(COLOR_JITTER)
    return tuple((names[i], float(factors[i])) for i in rng.permutation(3).tolist())


def _draw_randaugment(
    augmentation: Augmentation, rng: np.random.Generator
) -> tuple[tuple[str, Strength], ...]:
    if not augmentation.randaugment_ops:
        return ()
    red, green, blue = (round(255 * m) for m in augmentation.mean)
    names = list(RANDAUGMENT)
    drawn = []
    for which in rng.integers(len(names), size=augmentation.randaugment_ops).tolist():
        applied, sign, bicubic = rng.random(3)
        level = augmentation.randaugment_magnitude
        level += augmentation.randaugment_std * rng.standard_normal()
        level = min(max(level, 0.0), 10.0) / 10
        if applied < 0.5:
            resampling = Image.Resampling.BICUBIC if bicubic < 0.5 else Image.Resampling.BILINEAR
            signed = level if sign < 0.5 else -level
            drawn.append((names[which], Strength(level, signed, resampling, (red, green, blue))))
    return tuple(drawn)


def _warp(image: Image.Image, s: Strength, *rows: float) -> Image.Image:
    # Output (x, y) shows input (a x + b y + c, d x + e y + f).
    affine = Image.Transform.AFFINE
    return image.transform(image.size, affine, rows, s.resampling, fillcolor=s.fill)


def _solarize_add(image: Image.Image, add: int) -> Image.Image:
    return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)


# All operations grow with the level, as "increasing" in the DeiT recipe: in the paper's own space solarise
# and posterise weaken. They are Pillow's, as behind torchvision's transforms of Pillow images. At the full
# level posterise keeps one bit, where timm's asks for none, which Pillow refuses.
RANDAUGMENT: dict[str, Callable[[Image.Image, Strength], Image.Image]] = {
    "autocontrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
    "invert": lambda image, s: ImageOps.invert(image),
    "rotate": lambda image, s: image.rotate(30 * s.signed, s.resampling, fillcolor=s.fill),
    "posterize": lambda image, s: ImageOps.posterize(image, max(1, 4 - int(4 * s.level))),
    "solarize": lambda image, s: ImageOps.solarize(image, 256 - int(256 * s.level)),
    "solarize_add": lambda image, s: _solarize_add(image, int(110 * s.level)),
    "color": lambda image, s: ImageEnhance.Color(image).enhance(s.factor),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(s.factor),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(s.factor),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(s.factor),
    "shear_x": lambda image, s: _warp(image, s, 1, 0.3 * s.signed, 0, 0, 1, 0),
    "shear_y": lambda image, s: _warp(image, s, 1, 0, 0, 0.3 * s.signed, 1, 0),
    "translate_x": lambda image, s: _warp(image, s, 1, 0, 0.45 * s.signed * image.width, 0, 1, 0),
    "translate_y": lambda image, s: _warp(image, s, 1, 0, 0, 0, 1, 0.45 * s.signed * image.height),
}
