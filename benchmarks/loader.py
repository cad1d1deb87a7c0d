"""Loading training pictures: ours against torchvision, shards against folders, first and second start.

    python benchmarks/loader.py --data $DATA [--quick] [--json FILE]

Peer: torchvision's ImageFolder, Pillow and its default training transforms (RandomResizedCrop(224), flip,
ToTensor, Normalize) in a DataLoader, with the same number of workers, bilinear resizing, batch size and
pictures. Ours delivers 8-bit batches, as training takes them; the rows "normalised" add the conversion that
the peer does in its workers to our side, in the consuming process. Rounds of both sides alternate; figures
are medians, the spread is half the distance between the quartiles. One thread per process. Where a crop needs
no more, ours decodes a JPEG at a half, a quarter or an eighth of its size; the peer decodes it whole.
"""

import argparse
import csv
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

from vitrail.data import open_data
from vitrail.data.augment import Augmentation
from vitrail.data.loader import TrainLoader
from vitrail.data.plan import BatchPlan
from vitrail_runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD

SIZE, BATCH = 224, 32
AUGMENTATION = Augmentation(interpolation="bilinear")  # RandomResizedCrop's defaults, and flip
FIRST_BATCH = """
import sys, time
begin = time.perf_counter()
import vitrail.data.decoding
from vitrail.data import open_data
from vitrail.data.augment import Augmentation
from vitrail.data.loader import train_batches
from vitrail.data.plan import BatchPlan
imported = time.perf_counter()
data = open_data(sys.argv[1], "all")
plan = BatchPlan(length=len(data), batch_size=128, size=(64, 64))
next(train_batches(data, plan, Augmentation(), epoch=0))
print(len(data), time.perf_counter() - begin, imported - begin)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("DATA"), help="folder of the data packs"
    )
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: fewer rounds, 5,000 pictures"
    )
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args()
    if args.data is None:
        sys.exit("say where the data packs are: --data DIR, or the environment variable DATA")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VITRAIL_CACHE"] = str(Path(folder) / "cache")
        rows = [
            *loading(args.data, Path(folder), args.quick),
            *starting(args.data, Path(folder), args.quick),
        ]
    table = {"machine": machine(), "rows": rows, "geomean": geomean(rows)}
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n")
    show(table)


def loading(data: Path, scratch: Path, quick: bool) -> Iterator[dict]:
    """Pictures per second, ours against the peer's."""
    root = class_folders(data / "native", scratch / "native")
    ours = open_data(root, "all")
    repeats, rounds = (1, 3) if quick else (3, 7)
    for workers in (0, 2):
        mine = our_epochs(ours, repeats, workers)
        peer = peer_epochs(root, repeats, workers)
        yield compare(f"native to {SIZE}, {workers} workers", mine, peer, rounds)
        normalised = our_epochs(ours, repeats, workers, normalise=True)
        yield compare(f"the same, normalised, {workers} workers", normalised, peer, rounds)
    plain = open_data(shard(root, scratch / "shards", ".tar"), "all")
    packed = open_data(shard(root, scratch / "packed", ".tar.gz"), "all")
    folders = our_epochs(ours, repeats, 0)
    yield compare("tar shards against folders", our_epochs(plain, repeats, 0), folders, rounds)
    yield compare("gzip shards against folders", our_epochs(packed, repeats, 0), folders, rounds)


def our_epochs(data, repeats: int, workers: int, normalise: bool = False) -> Callable[[], float]:
    plan = BatchPlan(length=len(data), batch_size=BATCH, size=(SIZE, SIZE), drop_last=False)
    loader = TrainLoader(data, plan, AUGMENTATION, workers=workers)
    mean = 255 * torch.tensor(IMAGENET_MEAN)[:, None, None]
    std = 255 * torch.tensor(IMAGENET_STD)[:, None, None]

    def once() -> float:
        begin, seen = time.perf_counter(), 0
        for epoch in range(repeats):
            for batch in loader.epoch(epoch):
                if normalise:
                    batch.images.float().sub_(mean).div_(std)
                seen += batch.num_images
        return seen / (time.perf_counter() - begin)

    return once


def peer_epochs(root: Path, repeats: int, workers: int) -> Callable[[], float]:
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    dataset: Dataset = datasets.ImageFolder(str(root), transform)
    loader = DataLoader(
        dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )

    def once() -> float:
        begin, seen = time.perf_counter(), 0
        for _ in range(repeats):
            for _, labels in loader:
                seen += len(labels)
        return seen / (time.perf_counter() - begin)

    return once


def compare(name: str, ours: Callable[[], float], peer: Callable[[], float], rounds: int) -> dict:
    """Alternate rounds after one to warm up; pictures per second."""
    ours(), peer()
    pairs = [(ours(), peer()) for _ in range(rounds)]
    mine, theirs = (list(side) for side in zip(*pairs, strict=True))
    return {
        "name": name,
        "unit": "pictures/s",
        "ours": statistics.median(mine),
        "peer": statistics.median(theirs),
        # Of neighbours in time, so that other load on the machine cancels.
        "ratio": statistics.median(a / b for a, b in pairs),
        "spread": spread([a / b for a, b in pairs]),
    }


def starting(data: Path, scratch: Path, quick: bool) -> Iterator[dict]:
    """Seconds from a new process to its first batch, with nothing cached and then with the index cached."""
    source = data / "cifar10"
    if quick:
        source = source / "train-000000.tar"
    count = 1 if quick else 3
    for name, path in (("shards", source), ("folders", unpack(source, scratch / "cifar10"))):
        os.environ["VITRAIL_CACHE"] = str(scratch / f"cache-{name}")
        pictures, *first = first_batch(path)
        again = [first_batch(path)[1:] for _ in range(count)]
        second = [statistics.median(column) for column in zip(*again, strict=True)]
        for what, (seconds, imports) in (("first", first), ("second", second)):
            yield {
                "name": f"{what} start, {pictures:,} pictures in {name}",
                "unit": f"s to the first batch, {imports:.1f} of them importing torch",
                "ours": seconds,
                "imports": imports,
                "peer": None,
                "ratio": None,
            }


def first_batch(path: Path) -> tuple[int, float, float]:
    command = [sys.executable, "-c", FIRST_BATCH, str(path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(out[0]), float(out[1]), float(out[2])


def class_folders(pack: Path, root: Path) -> Path:
    """The pack's pictures as links in class folders, which is what ImageFolder reads."""
    with open(pack / "labels.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            target = root / row["synset"]
            target.mkdir(parents=True)
            (target / Path(row["file"]).name).symlink_to((pack / row["file"]).resolve())
    return root


def shard(root: Path, target: Path, ending: str) -> Path:
    """Four shards of the pictures below class folders."""
    target.mkdir()
    files = sorted(root.rglob("*.jpg"))
    for number in range(4):
        path = target / f"train-{number:06d}{ending}"
        with tarfile.open(path, "w:gz" if ending.endswith("gz") else "w") as tar:
            for file in files[number::4]:
                add(tar, f"{file.stem}.jpg", file.read_bytes())
                add(tar, f"{file.stem}.cls", file.parent.name.encode())
    return target


def add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(payload)
    tar.addfile(info, io.BytesIO(payload))


def unpack(source: Path, root: Path) -> Path:
    """The pictures of shards as class folders."""
    data = open_data(source, "all")
    for i, label in enumerate(data.truth.labels.tolist()):
        folder = root / data.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:06d}.jpg").write_bytes(data.images.read_bytes(i))
    return root


def spread(values: list[float]) -> float:
    low, high = np.quantile(values, [0.25, 0.75])
    return float(high - low) / 2


def geomean(rows: list[dict]) -> float:
    """Over the rows against torchvision."""
    ratios = [r["ratio"] for r in rows if r["ratio"] and "workers" in r["name"]]
    return statistics.geometric_mean(ratios)


def machine() -> dict:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")


def show(table: dict) -> None:
    m = table["machine"]
    print(f"{m['processor']}, {m['cores']} cores, load {m['load']:.1f}, torch {m['torch']}\n")
    print(f"{'':44} {'ours':>9} {'peer':>9}   ratio")
    for row in table["rows"]:
        peer = f"{row['peer']:9.1f}" if row["peer"] else " " * 9
        ratio = f"{row['ratio']:7.2f} +- {row['spread']:.2f}" if row["ratio"] else ""
        print(f"{row['name']:44} {row['ours']:9.1f} {peer} {ratio} {row['unit']}")
    print(f"\ngeometric mean against torchvision: {table['geomean']:.2f}")


if __name__ == "__main__":
    main()
