"""vitrail data make|check|show: make the embedded data set, look at one's own."""

from pathlib import Path
from typing import Literal

from vitrail_runtime.errors import InputError

HELP = """usage: vitrail data make digits DIR    write the embedded handwritten digits as class folders

vitrail data make --help tells the options."""


def run(argv: list[str]) -> int | None:
    actions = {"make": make}
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if argv[0] not in actions:
        raise InputError(f"unknown action {argv[0]!r}; vitrail data takes {', '.join(actions)}")
    return actions[argv[0]](argv[1:])


def make(argv: list[str]) -> None:
    import tyro

    from vitrail.data.digits import make_digits

    Set = tyro.conf.Positional[Literal["digits"]]
    Folder = tyro.conf.Positional[Path]

    def flags(what: Set, folder: Folder, seed: int = 0) -> tuple[Path, int]:
        """Write the embedded handwritten digits as class folders with train, val and test.

        Args:
            what: the set to make.
            folder: where; a new folder.
            seed: of the splits, and of colours, sizes and places.
        """
        return folder, seed

    folder, seed = tyro.cli(flags, args=argv, prog="vitrail data make")
    make_digits(folder, seed=seed)
    print(f"{folder}: 1,797 handwritten digits in train, val and test (UCI, CC BY 4.0)")
    print(f"next: vitrail train --data {folder} --model efficientvit_m0 --out runs/digits")
