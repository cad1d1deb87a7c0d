"""The peer of docs/results.md: torchvision's LR-ASPP MobileNetV3-L, from scratch, on images with masks.

    python benchmarks/segmentation.py --data $DATA/camvid --minutes 7 --threads 2 --json peer.json

At 240 x 180, AdamW 1e-3 with a cosine, left-right flips, batches of 16: every image is decoded and resized
once and kept in memory, so that all of the time goes into the network. Scored on the test split at the size
of the original images, by vitrail's metric; it serves for nothing else. `--quick` trains for seconds.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from vitrail.data import Examples, open_data
from vitrail.metrics import SegmentationMetrics

SIZE, BATCH, RATE, IGNORE = (180, 240), 16, 1e-3, 255
MEAN = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
STD = torch.tensor((0.229, 0.224, 0.225))[:, None, None]


def image_of(data: Examples, i: int) -> Tensor:
    small = Image.fromarray(data.images.read(i)).resize(SIZE[::-1], Image.Resampling.BILINEAR)
    return (torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255 - MEAN) / STD


def mask_of(data: Examples, i: int) -> Tensor:
    ids = Image.fromarray(data.truth.target(i, None).astype(np.uint8))
    return torch.from_numpy(np.array(ids.resize(SIZE[::-1], Image.Resampling.NEAREST))).long()


def train(data: Examples, seconds: float) -> tuple[torch.nn.Module, int]:
    """The network after so much time, and how many images it has seen."""
    images = torch.stack([image_of(data, i) for i in range(len(data))])
    masks = torch.stack([mask_of(data, i) for i in range(len(data))])
    torch.manual_seed(0)
    model = lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=len(data.classes)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    begun, seen = time.monotonic(), 0
    while (done := (time.monotonic() - begun) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * done)) / 2
        chosen = torch.randint(len(images), (BATCH,))
        x, y = images[chosen], masks[chosen]
        flip = torch.rand(BATCH) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
        y = torch.where(flip[:, None, None], y.flip(2), y)
        loss = F.cross_entropy(model(x)["out"], y, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += BATCH
    return model.eval(), seen


@torch.no_grad()
def score(model: torch.nn.Module, data: Examples) -> dict[str, float]:
    metrics = SegmentationMetrics(len(data.classes), "cpu", ignore=IGNORE)
    begun = 0.0
    for i in range(len(data)):
        truth, image = data.truth.target(i, None), image_of(data, i)[None]
        start = time.perf_counter()
        logits = model(image)["out"]
        begun += time.perf_counter() - start
        whole = F.interpolate(logits, truth.shape, mode="bilinear", align_corners=False)
        metrics.update(whole.argmax(1)[0], torch.from_numpy(truth))
    found = metrics.compute()
    return {
        "mIoU": found["mIoU"],
        "pixel_accuracy": found["pixel_accuracy"],
        "ms_per_image": 1000 * begun / len(data),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    known = open_data(given.data, "train")
    seconds = 5.0 if given.quick else 60 * given.minutes
    model, seen = train(known, seconds)
    row = {"name": "lraspp_mobilenet_v3_large", "threads": given.threads, "images": seen}
    row |= score(model, open_data(given.data, "test", classes=known.classes))
    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{row['name']}: {seen} images in {seconds / 60:.1f} minutes, {given.threads} threads")
    figures = (row["mIoU"], row["pixel_accuracy"], row["ms_per_image"])
    print("test mIoU {:.4f}  pixel accuracy {:.4f}  {:.1f} ms an image".format(*figures))
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "rows": [row]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
