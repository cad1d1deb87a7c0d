"""Any set of labelled pictures as class folders, file for file:

python scripts/class_folders.py OUT SPLIT=SOURCE[@PART] ... [--val-fraction F]

SOURCE is what `vitrail train --data` takes; PART is one of its splits, all of them by default; `@val` of a
source without val is what a training with this --val-fraction holds out. Pictures go to OUT/SPLIT/CLASS, or
with an empty SPLIT to OUT/CLASS.
"""

import argparse
import sys
from pathlib import Path

from vitrail.data import open_data
from vitrail_runtime.errors import InputError


def write(out: Path, part: str, val_fraction: float) -> str:
    """Writes what `part` names and tells how much it was."""
    split, given, source = part.partition("=")
    if not given:
        raise InputError(f"{part!r} must be SPLIT=SOURCE, such as train=pictures/train.tar")
    source, _, which = source.partition("@")
    data = open_data(source, which or "all", val_fraction=val_fraction)
    for i, (key, label) in enumerate(zip(data.keys, data.truth.labels.tolist(), strict=True)):
        # The key may hold folders of its own, and in a shard it has no suffix.
        name = Path(key).name
        payload = data.images.read_bytes(i)
        folder = out / split / data.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (name if Path(name).suffix else f"{name}{suffix(payload)}")
        if path.exists():
            raise InputError(f"{path} is already there; {data.where(i)} was not written over it")
        path.write_bytes(payload)
    return f"{len(data)} pictures of {part} -> {out / split}"


def suffix(payload: bytes) -> str:
    """How a file of these bytes should end."""
    kinds = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp"}
    return kinds.get(payload[:2], "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="+", metavar="SPLIT=SOURCE[@PART]")
    parser.add_argument("--val-fraction", type=float, default=0.2)
    flags = parser.parse_args()
    try:
        for part in flags.parts:
            print(write(flags.out, part, flags.val_fraction))
    except InputError as error:
        print(f"class_folders: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
