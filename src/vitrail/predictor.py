"""From pictures in any form to Predictions, in order, batched by size around a model, or packed."""

import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitrail.device import choose_device
from vitrail.memory import enough_memory
from vitrail.models import at_own_shape, check_takes_packs
from vitrail.modes import eval_mode
from vitrail.packing import PackedImages, pack, patch_grid
from vitrail_runtime.errors import ImageError, InputError
from vitrail_runtime.finish import FINISH
from vitrail_runtime.pictures import find_pictures
from vitrail_runtime.prediction import Prediction
from vitrail_runtime.preprocess import (
    Geometry,
    Preprocessing,
    decode,
    decode_size,
    prepare,
    read_size,
)

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
_SINGLE = (str, os.PathLike, bytes, Image.Image)


class Predictor:
    """Calls a model on pictures: `for p in Predictor(model)(["a.jpg", "folder", "*.png"]): ...`

    model: from `create_model` or `load`: it knows its classes and its preprocessing. It is moved to
        `device` ("auto": a GPU where there is one; None leaves it where it is), run in eval and
        inference mode, and left as it was.
    batch_size: pictures per forward. Only pictures of equal preprocessed size share one, so that each
        result is that of the picture alone.
    tokens_per_image: pictures at their own shape, made smaller to at most so many patches, and packed,
        whatever their sizes: fewer cost less and tell less. For plain ViTs; each result is that of the
        picture alone.
    max_tokens: of a pack; given alone it packs pictures of up to so many tokens, and those of more are made
        smaller. `smaller` then lists them by name.
    top_k: how many classes a Prediction of a classifier holds, the best first.
    skip_broken: leave out pictures that cannot be read; `skipped` then lists them as (name, problem).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device | None = "auto",
        batch_size: int = 16,
        top_k: int = 5,
        skip_broken: bool = False,
        max_tokens: int | None = None,
        tokens_per_image: int | None = None,
    ) -> None:
        if not hasattr(model, "preprocessing") or not hasattr(model, "classes"):
            raise InputError(
                f"{type(model).__name__} does not know its classes and preprocessing; "
                "take a model from vitrail.create_model or vitrail.load"
            )
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, but is {batch_size}")
        if top_k < 1:
            raise InputError(f"top_k must be at least 1, but is {top_k}")
        if device is not None:
            with enough_memory(f"the model on {device}", "take another device (--device)"):
                model = model.to(choose_device(device))
        self.model: Any = model
        self.classes: tuple[str, ...] = self.model.classes
        self.preprocessing: Preprocessing = self.model.preprocessing
        self.packs = None
        if max_tokens is not None or tokens_per_image is not None:
            budget = PACK if max_tokens is None else max_tokens
            self.packs = _Packs.of(self.model, budget, tokens_per_image)
            self.preprocessing = self.packs.preprocessing
        self.batch_size = batch_size
        self.top_k = top_k
        self.skip_broken = skip_broken
        self.skipped: list[tuple[str, str]] = []
        self.smaller: list[str] = []

    def __call__(
        self, pictures: Picture | Iterable[Picture], *, top_k: int | None = None
    ) -> Iterator[Prediction]:
        """Predictions in the order of the pictures, one by one as they are ready.

        pictures: one or many of: a path, a folder (searched at any depth), a glob pattern, bytes of a
            file, a Pillow image, a uint8 array (H, W, 3), a tensor (3, H, W) in uint8 or in floats in
            [0, 1] (which are rounded to 8 bits, as every other picture has them). An array or tensor
            of four axes is many pictures. A generator is read as results are asked for.
        Raises: InputError at once for a file that isn't there; after the last Prediction, listing all
            of them, when some pictures could not be read, unless `skip_broken`.
        """
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k must be at least 1, but is {top_k}")
        items = _expand(pictures)
        if not isinstance(pictures, Iterator):
            items = iter(list(items))  # what is missing is said before any work is done
        self.skipped, self.smaller = [], []
        return self._predict(items, top_k or self.top_k)

    def _predict(self, items: Iterator[Picture], top_k: int) -> Iterator[Prediction]:
        run = self._run if self.packs is None else self._run_packed
        done: dict[int, Prediction] = {}
        waiting: dict[tuple[int, int], list[tuple[int, Prepared]]] = defaultdict(list)
        count = given = 0  # of pictures prepared and of Predictions yielded
        for prepared in read_ahead(items, self.preprocessing, self.batch_size):
            if isinstance(prepared, tuple):
                self.skipped.append(prepared)
                continue
            if self.preprocessing.mode == "native" and min(prepared.geometry.scale) < 1:
                self.smaller.append(prepared.name)
            size = (0, 0) if self.packs is not None else prepared.pixels.shape[1:]
            group = waiting[size]
            group.append((count, prepared))
            count += 1
            if self._ready(group):
                done.update(run(group, top_k))
            elif count - given >= _WINDOW * self.batch_size:
                # Many sizes: the oldest picture has waited long enough for mates.
                oldest = next(g for g in waiting.values() if g and g[0][0] == given)
                done.update(run(oldest, top_k))
            while given in done:
                yield done.pop(given)
                given += 1
        for group in waiting.values():
            done.update(run(group, top_k))
        for index in range(given, count):
            yield done.pop(index)
        if self.skipped and not self.skip_broken:
            raise broken_pictures(self.skipped, count)

    def _ready(self, group: list[tuple[int, "Prepared"]]) -> bool:
        """Whether a group need not wait for more."""
        if self.packs is None:
            return len(group) == self.batch_size
        held = sum(self.packs.tokens(prepared) for _, prepared in group)
        return held >= _WINDOW * self.packs.max_tokens

    def _run_packed(
        self, group: list[tuple[int, "Prepared"]], top_k: int
    ) -> Iterator[tuple[int, Prediction]]:
        # A forward for each pack of pictures of any sizes; empties the group.
        assert self.packs is not None
        if not group:
            return
        weight = next(self.model.parameters())
        images = [torch.from_numpy(prepared.pixels) for _, prepared in group]
        what = f"packs of {self.packs.max_tokens} tokens on {weight.device}"
        for packed in self.packs.made(images):
            with (
                eval_mode(self.model),
                torch.inference_mode(),
                enough_memory(what, "give smaller max_tokens (--max-tokens)"),
            ):
                patches = packed.patches.to(weight.device, weight.dtype)
                packing = {"sizes": packed.sizes, "patch_size": packed.patch_size}
                found = self.model.forward_tensors(patches, packing=packing)
            yield from self._finished(found, [group[i] for i in packed.image_ids], top_k)
        group.clear()

    def _run(
        self, group: list[tuple[int, "Prepared"]], top_k: int
    ) -> Iterator[tuple[int, Prediction]]:
        # One forward for pictures of one size; empties the group.
        if not group:
            return
        weight = next(self.model.parameters())
        height, width = group[0][1].pixels.shape[1:]
        what = f"a batch of {len(group)} of {height} x {width} pixels on {weight.device}"
        with (
            eval_mode(self.model),
            torch.inference_mode(),
            enough_memory(what, "give a smaller batch_size (--batch-size)"),
        ):
            images = torch.from_numpy(np.stack([prepared.pixels for _, prepared in group]))
            found = self.model.forward_tensors(images.to(weight.device, weight.dtype))
        yield from self._finished(found, group, top_k)
        group.clear()

    def _finished(
        self, found: dict[str, Any], group: list[tuple[int, "Prepared"]], top_k: int
    ) -> Iterator[tuple[int, Prediction]]:
        outputs = {name: _array(value) for name, value in found.items()}
        geometries = [prepared.geometry for _, prepared in group]
        predictions = FINISH[self.model.task](outputs, geometries, self.classes, top_k)
        for (index, prepared), prediction in zip(group, predictions, strict=True):
            prediction.source = prepared.source
            yield index, prediction


def _array(value: Any) -> Any:
    # One array; of outputs whose sizes are the pictures' own, one for each.
    if isinstance(value, Tensor):
        return value.float().cpu().numpy()
    return [_array(one) for one in value]


# A picture waits for others of its size while at most so many batches are held back.
_WINDOW = 4


PACK = 4096  # tokens of a pack, where nothing else is said


@dataclass(frozen=True)
class _Packs:
    """How pictures of any sizes share a forward."""

    max_tokens: int
    patch_size: int
    num_prefix_tokens: int
    preprocessing: Preprocessing

    @classmethod
    def of(cls, model: Any, max_tokens: int, tokens_per_image: int | None) -> "_Packs":
        check_takes_packs(model)
        prefix = model.backbone.num_prefix_tokens
        held = max_tokens - prefix
        if held < 1:
            raise InputError(
                f"max_tokens is {max_tokens}, but the model adds {prefix} tokens to each picture; a picture "
                "needs at least one more (--max-tokens)"
            )
        most = held if tokens_per_image is None else min(held, tokens_per_image)
        return cls(max_tokens, model.backbone.patch_sizes[0], prefix, at_own_shape(model, most))

    def tokens(self, prepared: "Prepared") -> int:
        h, w = patch_grid(prepared.pixels.shape[1:], self.patch_size)
        return h * w + self.num_prefix_tokens

    def made(self, images: list[Tensor]) -> list[PackedImages]:
        return pack(images, self.patch_size, self.max_tokens, self.num_prefix_tokens)


@dataclass(frozen=True)
class Prepared:
    pixels: np.ndarray
    geometry: Geometry
    source: str | None
    name: str  # for messages


def broken_pictures(broken: list[tuple[str, str]], readable: int) -> InputError:
    """The error that lists pictures which could not be read, (name, problem) each."""
    shown = "\n".join(f"  {name} {problem}" for name, problem in broken[:20])
    more = f"\n  ... and {len(broken) - 20} more" if len(broken) > 20 else ""
    return InputError(
        f"{len(broken)} of {len(broken) + readable} pictures could not be read:\n{shown}{more}\n"
        "leave them out with --skip-broken (skip_broken=True)"
    )


def _expand(pictures: Any) -> Iterator[Picture]:
    # One picture or many of any kind -> single ones; folders and patterns -> files.
    if isinstance(pictures, (str, os.PathLike)):
        yield from find_pictures(pictures)
    elif isinstance(pictures, _SINGLE):
        yield pictures
    elif isinstance(pictures, (np.ndarray, Tensor)):
        if pictures.ndim == 4:
            yield from pictures
        else:
            yield pictures
    elif isinstance(pictures, Iterable):
        for picture in pictures:
            yield from _expand(picture)
    else:
        raise InputError(
            "a picture is a path, bytes, a Pillow image, a uint8 array (H, W, 3) or a tensor (3, H, W), "
            f"but got {type(pictures).__name__}"
        )


def read_ahead(
    items: Iterator[Picture], p: Preprocessing, batch_size: int
) -> Iterator[Prepared | tuple[str, str]]:
    # Threads decode while the model runs: Pillow's decoders and filters let go of the interpreter.
    pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
    futures: deque[Future[Prepared | tuple[str, str]]] = deque()
    try:
        for index, item in enumerate(items):
            futures.append(pool.submit(_prepare, index, item, p))
            if len(futures) > batch_size:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _prepare(index: int, item: Picture, p: Preprocessing) -> Prepared | tuple[str, str]:
    # Ready for the model, or (name, why it is not).
    name = source = None
    if isinstance(item, (str, os.PathLike)):
        name = source = str(Path(item))
    elif isinstance(item, Image.Image):  # opened from a file it knows its name
        name = source = getattr(item, "filename", None) or None
    name = name or f"picture {index} ({type(item).__name__})"
    try:
        if isinstance(item, Tensor):
            item = _pixels(item, name)
        original = read_size(item, name=name)
        image = decode(item, at_least=decode_size(p), name=name)
    except ImageError as error:
        return name, error.problem
    pixels, geometry = prepare(image, p, original=original)
    return Prepared(pixels, geometry, source, name)


def _pixels(image: Tensor, name: str) -> np.ndarray:
    # (C, H, W) uint8, or floats in [0, 1] -> uint8 (H, W, C)
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        raise ImageError(
            name,
            f"must be of shape (3, H, W), but is {tuple(image.shape)}; arrays of shape (H, W, 3) are given "
            "as numpy",
        )
    image = image.detach().cpu()
    if image.is_floating_point():
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):
            raise ImageError(
                name,
                f"must lie in [0, 1] as a float tensor, but holds {low:.3g} to {high:.3g}; give it before "
                "normalisation",
            )
        image = (image.float() * 255).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise ImageError(name, f"must be a tensor of uint8 or floats, but is {image.dtype}")
    return image.permute(1, 2, 0).numpy()
