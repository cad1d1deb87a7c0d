"""The peer of docs/results.md: torchvision's Faster R-CNN MobileNetV3-Large-320-FPN, from scratch, on boxes.

    python benchmarks/detection.py --data $DATA/bccd --epochs 10 --threads 2 --json peer.json

At 240 x 320, AdamW 1e-3 with a cosine, left-right flips, batches of 8: every image is decoded and resized
once and kept in memory, so that all of the time goes into the network. Scored on the test split at the size
of the original images, by vitrail's metric; it serves for nothing else. `--minutes` ends a run by the clock,
with the rate following it; `--quick` trains for seconds.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from vitrail.data import Examples, open_data
from vitrail.metrics.detection import Annotated, DetectionMetrics, Found

SIZE, BATCH, RATE = (240, 320), 8, 1e-3


def image_of(data: Examples, i: int) -> Tensor:
    """(3, 240, 320), 0 to 1: torchvision's model normalises by itself."""
    small = Image.fromarray(data.images.read(i)).resize(SIZE[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255


def scale_of(data: Examples, i: int) -> Tensor:
    """From the original's pixels to the small image's, for boxes (4,)."""
    height, width = data.images.sizes[i].tolist()
    return torch.tensor([SIZE[1] / width, SIZE[0] / height] * 2)


def target_of(data: Examples, i: int) -> dict[str, Tensor]:
    objects = data.truth.target(i, None)
    alone = ~objects.crowd
    boxes = torch.from_numpy(objects.boxes[alone]).float() * scale_of(data, i)
    return {"boxes": boxes, "labels": torch.from_numpy(objects.labels[alone]) + 1}  # 0: background


def flipped(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = SIZE[1] - boxes[:, [2, 0]]
    return image.flip(2), {**target, "boxes": boxes}


def train(data: Examples, seconds: float, epochs: int) -> tuple[torch.nn.Module, int]:
    """The network after so much time or so many epochs, and how many images it has seen."""
    images = [image_of(data, i) for i in range(len(data))]
    targets = [target_of(data, i) for i in range(len(data))]
    torch.manual_seed(0)
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=len(data.classes) + 1,
        min_size=SIZE[0],
        max_size=SIZE[1],
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    steps, step, begun = epochs * (len(images) // BATCH), 0, time.monotonic()
    while (done := max(step / steps, (time.monotonic() - begun) / seconds)) < 1:
        if step % (len(images) // BATCH) == 0:
            order = torch.randperm(len(images)).tolist()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * done)) / 2
        start = step % (len(images) // BATCH) * BATCH
        chosen = [(images[i], targets[i]) for i in order[start : start + BATCH]]
        chosen = [flipped(*pair) if torch.rand(()) < 0.5 else pair for pair in chosen]
        loss = sum(model(*map(list, zip(*chosen, strict=True))).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    return model.eval(), step * BATCH


@torch.no_grad()
def score(model: torch.nn.Module, data: Examples) -> dict[str, float]:
    metrics, taken = DetectionMetrics(len(data.classes)), 0.0
    for i in range(len(data)):
        image, objects = image_of(data, i), data.truth.target(i, None)
        start = time.perf_counter()
        (found,) = model([image])
        taken += time.perf_counter() - start
        boxes = (found["boxes"] / scale_of(data, i)).numpy()
        said = Found(boxes, found["scores"].numpy(), found["labels"].numpy() - 1)
        metrics.update(
            i, said, Annotated(objects.boxes, objects.labels, objects.crowd, objects.areas)
        )
    scores = metrics.compute()["box"]
    return {name: scores[name] for name in ("AP", "AP50", "AP75")} | {
        "ms_per_image": 1000 * taken / len(data)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    known = open_data(given.data, "train")
    begun = time.monotonic()
    model, seen = train(known, 10.0 if given.quick else 60 * given.minutes, given.epochs)
    minutes = (time.monotonic() - begun) / 60
    row = {
        "name": "fasterrcnn_mobilenet_v3_large_320_fpn",
        "threads": given.threads,
        "images": seen,
    }
    row |= {
        "minutes": minutes,
        **score(model, open_data(given.data, "test", classes=known.classes)),
    }
    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{row['name']}: {seen} images in {minutes:.1f} minutes, {given.threads} threads")
    print(
        "test AP {AP:.4f}  AP50 {AP50:.4f}  AP75 {AP75:.4f}  {ms_per_image:.1f} ms an image".format(
            **row
        )
    )
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "rows": [row]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
