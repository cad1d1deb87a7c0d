"""Shards as class folders: python scripts/unpack_shards.py OUT SPLIT=SHARD ...

Members KEY.jpg and KEY.cls are paired; classes.txt beside the first shard names the classes.
"""

import sys
import tarfile
from pathlib import Path


def main(out: Path, parts: list[str]) -> None:
    for part in parts:
        split, _, name = part.partition("=")
        shard = Path(name)
        classes = (shard.parent / "classes.txt").read_text(encoding="utf-8").split()
        pictures: dict[str, bytes] = {}
        labels: dict[str, int] = {}
        with tarfile.open(shard, "r|*") as tar:
            for member in tar:
                key, _, kind = member.name.rpartition(".")
                payload = tar.extractfile(member).read()
                if kind == "cls":
                    labels[key] = int(payload)
                else:
                    pictures[key] = payload
        for key, payload in pictures.items():
            folder = out / split / classes[labels[key]]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{Path(key).name}.jpg").write_bytes(payload)
        print(f"{shard.name}: {len(pictures)} pictures -> {out / split}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
