"""Ways to ask a trained segmenter: in windows, at several scales, mirrored. Each costs more forwards."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail_runtime.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How an image is put to a segmenter; by default as a whole, once.

    window: side of square windows that slide over the image, in pixels of the model's input; stride: from
        one to the next (None: two thirds of the window). Logits are averaged where windows overlap.
    scales: sizes at which the image is seen, relative to the input. flip: also mirrored. The probabilities
        of all these are averaged.
    """

    window: int | None = None
    stride: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.window is None and self.stride is not None:
            raise InputError(
                f"a stride ({self.stride}) needs a window; give its side in pixels, such as 512"
            )
        if self.window is not None and not 1 <= self.step <= self.window:
            raise InputError(
                f"windows of {self.window} pixels with a stride of {self.stride} do not cover an image; "
                "expected a window of at least 1 and a stride from 1 to the window"
            )
        if not self.scales or min(self.scales) <= 0:
            raise InputError(
                f"scales must be numbers above 0, such as 0.75 1 1.25, not {self.scales}"
            )

    @property
    def step(self) -> int:
        """From one window to the next."""
        assert self.window is not None
        return max(1, self.window * 2 // 3) if self.stride is None else self.stride


class InferredSegmenter(nn.Module):
    """A segmenter asked in another way; takes its place wherever one is measured or asked."""

    task = "segment"

    def __init__(self, model: Any, inference: Inference) -> None:
        super().__init__()
        if model.task != self.task:
            raise InputError(
                "windows, scales and flips are for segmenters, but "
                f"{model.info.name} does the task {model.task!r}; leave them out"
            )
        self.model = model
        self.inference = inference
        self.info, self.classes = model.info, model.classes
        self.preprocessing = model.preprocessing

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K, H, W): logits; of several scales or mirrored, the logarithm of the mean
        probability."""
        how = self.inference
        if how.scales == (1.0,) and not how.flip:
            return self._at_once(images)
        total, views = None, 0
        for scale in how.scales:
            seen = images
            if scale != 1:
                height, width = (max(1, int(side * scale + 0.5)) for side in images.shape[-2:])
                seen = _resize(images, (height, width))
            for mirrored in (False, True)[: 1 + how.flip]:
                logits = self._at_once(seen.flip(3) if mirrored else seen)
                logits = logits.flip(3) if mirrored else logits
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                found = _resize(logits, images.shape[-2:]).softmax(1)
                total = found if total is None else total + found
                views += 1
        assert total is not None
        return (total / views).clamp(min=torch.finfo(total.dtype).tiny).log()

    def forward_tensors(self, images: Tensor) -> dict[str, Tensor]:
        """{"logits": (B, K, H, W)}."""
        return {"logits": self(images)}

    def _at_once(self, images: Tensor) -> Tensor:
        """Logits of an image at one scale: whole, or the mean over windows."""
        if self.inference.window is None:
            return self.model(images)
        height, width = images.shape[-2:]
        side, step = self.inference.window, self.inference.step
        total, times = None, images.new_zeros(1, 1, height, width)
        for top in starts(height, side, step):
            for left in starts(width, side, step):
                part = (..., slice(top, top + side), slice(left, left + side))
                logits = self.model(images[part])
                if total is None:
                    total = logits.new_zeros(*logits.shape[:2], height, width)
                total[part] += logits
                times[part] += 1
        assert total is not None
        return total / times


def inferred(model: Any, inference: Inference) -> Any:
    """The model, asked in this way. Raises InputError where a way but the plain one meets no segmenter."""
    return model if inference == Inference() else InferredSegmenter(model, inference)


def starts(length: int, window: int, step: int) -> list[int]:
    """Where windows begin on an axis: every `step` pixels, the last at its end; one where all fits in."""
    last = max(0, length - window)
    return [*range(0, last, step), last]


def _resize(x: Tensor, size: Any) -> Tensor:
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
