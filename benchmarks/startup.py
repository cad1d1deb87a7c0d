"""Time until `import vitrail` and `vitrail --help` are done, each in a fresh process; the bare interpreter
and `import torch` stand beside them.

python benchmarks/startup.py [--quick] [--json FILE]
"""

import subprocess
import sys

from vitrail.bench.harness import arguments, compare, report

GOALS = {"import vitrail": 300, "vitrail --help": 1000}  # milliseconds on an idle machine


def fresh(*args: str) -> None:
    """A new interpreter, awaited; its output is left."""
    subprocess.run([sys.executable, *args], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    flags = arguments(__doc__).parse_args()
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


if __name__ == "__main__":
    main()
