"""Time until `import vitrail` and `vitrail --help` are done, each in a fresh process; the bare interpreter
and `import torch` stand beside them. With --images, also what a training costs until its first update on so
many small images in class folders: seconds of a core and memory, with and without a cached index, beside one
on 40 images.

python benchmarks/startup.py [--quick] [--json FILE] [--images 100000]
"""

import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from vitrail.bench.harness import arguments, compare, report

GOALS = {"import vitrail": 300, "vitrail --help": 1000}  # milliseconds on an idle machine


def fresh(*args: str) -> None:
    """A new interpreter, awaited; its output is left."""
    subprocess.run([sys.executable, *args], check=True, stdout=subprocess.DEVNULL)


FIRST_UPDATE = """
import os, resource, sys
import vitrail.train.loop as loop
from vitrail.cli import main

def first(*given):
    update(*given)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(used.ru_utime + used.ru_stime, used.ru_maxrss // 1024, flush=True)  # of Linux: in KiB
    os._exit(0)

update, loop.update = loop.update, first
main(["train", "--data", sys.argv[1], "--out", sys.argv[2], "--image-size", "32", "--batch-size", "32",
      "--device", "cpu", "--threads", "1"])
"""


def make_images(root: Path, count: int) -> Path:
    """Ten class folders of different PNGs of 16 x 16 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0))
    for i in range(count):
        folder = root / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        row = b"\0" + i.to_bytes(3, "big") + bytes([25 * (i % 10)] * 13)
        pixels = chunk(b"IDAT", zlib.compress(16 * row, 1))
        image = b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b"")
        (folder / f"{i}.png").write_bytes(image)
    return root


def first_updates(count: int, rounds: int) -> None:
    """Print what a start costs until the first update is made."""
    with tempfile.TemporaryDirectory() as place:
        environment = os.environ | {"VITRAIL_CACHE": f"{place}/cache", "OMP_NUM_THREADS": "1"}
        for images in (40, count):
            root = make_images(Path(place, str(images)), images)
            for r in range(1 + rounds):
                command = [sys.executable, "-c", FIRST_UPDATE, str(root), f"{root}-{r}"]
                done = subprocess.run(
                    command, check=True, env=environment, capture_output=True, text=True
                )
                seconds, memory = map(float, done.stdout.split())
                index = "cached" if r else "made"
                print(
                    f"{images:,} images, index {index}: {seconds:.2f} s of a core, {memory:.0f} MiB"
                )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, help="of the training whose start is measured")
    flags = parser.parse_args()
    rounds = 3 if flags.quick else 10
    how = {"seconds": 0.0, "min_rounds": rounds, "warmup": 1, "clock": "wall"}
    importing = "import sys, vitrail; assert 'torch' not in sys.modules"
    commands = {
        "import vitrail": ("-c", importing),
        "vitrail --help": ("-m", "vitrail", "--help"),
        "python -c pass": ("-c", "pass"),
        "import torch": ("-c", "import torch"),
    }
    rows = [compare(name, lambda a=args: fresh(*a), **how) for name, args in commands.items()]
    report(
        rows, json_file=flags.json, what="start-up of a fresh process", clock="wall", goals=GOALS
    )
    if flags.images is not None:
        first_updates(flags.images, rounds)


if __name__ == "__main__":
    main()
