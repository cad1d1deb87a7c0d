"""Curves of runs beside each other: the training loss, and the score that chooses their best model.

    python benchmarks/curves.py RUN RUN ... --score AP --out curves.png

RUN: folders of training runs, named in the picture by their last part. Losses of different models are
different sums, so each is shown as a share of its own first row.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from vitrail.rows import read_rows


def drawn(axes: Any, run: Path, score: str) -> None:
    rows = read_rows(run / "metrics.jsonl")
    losses = [(row["images"], row["loss"]) for row in rows if row["kind"] == "train"]
    scores = [(row["images"], row[score]) for row in rows if row["kind"] == "eval"]
    axes[0].plot(
        [n for n, _ in losses], [loss / losses[0][1] for _, loss in losses], label=run.name
    )
    axes[1].plot([n for n, _ in scores], [s for _, s in scores], marker="o", label=run.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--score", default="AP")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for run in given.runs:
        drawn(axes, run, given.score)
    for ax, title in zip(
        axes, ("training loss / its first row", f"{given.score}, validation images"), strict=True
    ):
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("images seen")
        ax.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.savefig(given.out, dpi=100)


if __name__ == "__main__":
    main()
