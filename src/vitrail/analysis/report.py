"""The report of a trained model: one HTML file that says how good it is and what to do next.

It knows what every run has: curves, a configuration, a machine. What there is to say of the answers, the task
says (`vitrail.tasks`), in blocks.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitrail.analysis import page
from vitrail.analysis.saliency import where_it_looks
from vitrail.data.examples import Examples
from vitrail.rows import read_rows
from vitrail.tasks.section import Found
from vitrail.tasks.task import task_of
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import prepare

OVERFITTED = 1.1  # a last validation loss of so many times the lowest deserves a word


def write_report(
    path: str | Path,
    model: Any,
    data: Examples,
    predictions: Mapping[str, np.ndarray],
    *,
    scores: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    split: str = "val",
) -> Path:
    """Write the report of `model` on `data` to the HTML file `path`.

    predictions: what was said of every image, in the data's order, as
        `vitrail.train.evaluate.evaluate(model, data, predictions=True).said` gives it.
    scores: of all images together, as plain data by name, for tasks that cannot tell them from the images'.
    run: a run folder, for curves and configuration.
    """
    task = task_of(model.task)
    data = task.taken(data)
    history = read_rows(Path(run) / "metrics.jsonl") if run is not None else []
    found = Found(
        model,
        data,
        predictions,
        split,
        explain=lambda pixels, label: explain(model, pixels, label),
        scores=scores,
        history=history,
        advice=training_advice(history, task.headline),
    )
    sections = task.sections(found)
    out = page.Page(
        f"{model.info.name} on {split}", f"{len(data):,} pictures, {len(model.classes)} classes"
    )
    for section in sections:
        if section.opening:
            out.add(section)
    if history:
        out.section("Training", curves(history, task.headline))
    for section in sections:
        if not section.opening:
            out.add(section)
    out.section("Configuration and machine", *configuration(run), page.preformatted(machine()))
    return out.write(Path(path))


def explain(model: Any, pixels: np.ndarray, label: int) -> tuple[str, Image.Image]:
    """How it was found, and the image as the model gets it under a map of what moved the answer `label`."""
    pre = model.preprocessing
    values, _ = prepare(pixels, pre)
    device = next(model.parameters()).device
    model.eval()
    name, seen = where_it_looks(model, torch.from_numpy(values).to(device), label)
    mean, std = (np.array(v)[:, None, None] for v in (pre.mean, pre.std))
    image = ((values * std + mean) * 255).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    return name, page.heat(image, seen.cpu().float().numpy())


def training_advice(history: Sequence[Mapping[str, Any]], headline: str) -> list[str]:
    """What the curves say; headline: the score that a row of an evaluation has."""
    said = []
    evals = [(r["epoch"], r[headline]) for r in history if headline in r]
    if len(evals) >= 3:
        best = max(evals, key=lambda e: e[1])
        if best == evals[-1]:
            said.append("The score still rose at the last evaluation: train longer.")
    losses = [(r["loss"], r["step"]) for r in history if headline in r and "loss" in r]
    if len(losses) >= 3 and losses[-1][0] > OVERFITTED * min(losses)[0]:
        lowest, step = min(losses)
        said.append(
            f"The validation loss was lowest at step {step:,} ({lowest:.2f}) and ended at "
            f"{losses[-1][0]:.2f}: the model learns its training pictures by heart. More augmentation, "
            "more pictures or fewer epochs."
        )
    return said


def read_predictions(path: Path, data: Examples) -> dict[str, np.ndarray]:
    """predictions.npz of a model folder, as `write_report` takes it.

    Raises InputError where it is gone or damaged, or says something of other images.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:  # a zip file: every part has a checksum
            found = dict(stored)
    except Exception as error:  # numpy and zipfile raise whatever a broken file leads them to
        problem = "is gone" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
    else:
        rows = {len(values) if values.ndim else 0 for values in found.values()}
        keys = found.get("keys", np.array(0)).tolist()
        if rows == {len(data)} and keys == list(data.keys):
            return found
        problem = "is about other images" if "keys" in found else "is damaged (it has no keys)"
    name = data.images.source.name
    raise InputError(
        f"{path} {problem}; measure the model anew: vitrail eval {path.parent} --data {name} "
        "--report FILE.html"
    )


def read_scores(path: Path) -> dict[str, Any]:
    """metrics.json of a model folder; nothing where it is gone or damaged: not all reports need it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def curves(history: Sequence[dict[str, Any]], headline: str) -> str:
    """Losses, score and learning rate by step; the page is about the model of the ringed evaluation."""
    train = [r for r in history if "loss" in r and "lr" in r]
    evals = [r for r in history if headline in r]
    measured = [r for r in evals if "loss" in r]  # not every task has a loss without training
    dots = {"color": page.GOOD, "marker": "o", "markersize": 4}

    def drawn(title: str, *lines: tuple[list[dict[str, Any]], str, dict[str, Any]]) -> Any:
        fig, ax = page.figure(height=2.6 if title == "learning rate" else 3.4)
        for rows, key, how in lines:
            if rows:
                ax.plot([r["step"] for r in rows], [r[key] for r in rows], linewidth=1.4, **how)
        ax.set_xlabel("step")
        ax.set_title(title, fontsize=11, loc="left")
        return fig, ax

    figures = []
    if train or measured:  # a few updates may leave no row
        losses, ax = drawn(
            "loss",
            (train, "loss", {"color": page.ACCENT, "label": "training, with augmentation"}),
            (measured, "loss", {**dots, "label": "validation"}),
        )
        ax.legend(frameon=False, fontsize=8)
        figures.append(losses)
    if evals:
        fig, ax = drawn(f"{headline} on the validation split", (evals, headline, dots))
        best = max(evals, key=lambda r: r[headline])  # the first of equals, as in training
        ax.plot(best["step"], best[headline], "o", ms=10, mfc="none", mec=page.INK)
        figures.append(fig)
    if train:
        figures.append(drawn("learning rate", (train, "lr", {"color": page.INK}))[0])
    return page.plots(*map(page.svg, figures))


def configuration(run: str | Path | None) -> list[str]:
    path = Path(run) / "config.yaml" if run is not None else None
    if path is None or not path.is_file():
        return []
    return [page.preformatted(path.read_text(encoding="utf-8")), "<br>"]


def machine() -> str:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return (
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.system()} "
        f"{platform.machine()}, {torch.get_num_threads()} threads, GPU {gpu}"
    )
