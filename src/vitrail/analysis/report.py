"""The report of a trained classifier: one HTML file that says how good it is and what to do next."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import binomtest

from vitrail.analysis import page
from vitrail.analysis.saliency import where_it_looks
from vitrail.data.images import ImageData
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import prepare

OVERFITTED = 1.1  # a last validation loss of so many times the lowest deserves a word
MANY_CLASSES = 30  # above this a confusion matrix is unreadable and only its worst cells are shown


@dataclass(frozen=True)
class Scored:
    """A classifier's answers on a data set: probabilities (N, K), and labels and predicted classes (N,).
    Stored probabilities are float16, whose largest need not be the largest that was meant."""

    probabilities: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    classes: tuple[str, ...]

    @property
    def confidence(self) -> np.ndarray:
        return self.probabilities.max(1)

    @property
    def right(self) -> np.ndarray:
        return self.predicted == self.labels

    def confusion(self) -> np.ndarray:
        """(K, K) counts: row = true class, column = predicted class."""
        k = len(self.classes)
        return np.bincount(self.labels * k + self.predicted, minlength=k * k).reshape(k, k)


def write_report(
    path: str | Path,
    model: Any,
    data: ImageData,
    predictions: Mapping[str, np.ndarray],
    *,
    run: str | Path | None = None,
    split: str = "val",
) -> Path:
    """Write the report of `model` on `data` to the HTML file `path`.

    predictions: probabilities (N, K), labels and predicted (N,) in the data's order, as
        `vitrail.train.evaluate.evaluate(model, data, predictions=True)["predictions"]` gives them.
    run: a run folder, for curves and configuration.
    """
    probabilities = np.asarray(predictions["probabilities"], np.float64)
    labels, predicted = (np.asarray(predictions[key]) for key in ("labels", "predicted"))
    names = tuple(map(as_text, model.classes))
    scored = Scored(probabilities, labels, predicted, names)
    history = read_history(Path(run)) if run is not None else []
    accuracy, n = float(scored.right.mean()), len(scored.labels)
    low, high = interval(int(scored.right.sum()), n)
    ece = expected_calibration_error(scored)

    out = page.Page(
        f"{model.info.name} on {split}", f"{n:,} pictures, {len(scored.classes)} classes"
    )
    out.tiles(
        [
            (f"{accuracy:.3f}", f"accuracy (95 %: {low:.3f} to {high:.3f})"),
            (f"{int((~scored.right).sum()):,}", "mistakes"),
            (f"{ece:.3f}", "calibration error (ECE)"),
            (f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M", "parameters"),
        ]
    )
    out.section("What to look at first", page.bullets(advice(scored, history)))
    if history:
        out.section("Training", curves(history))
    out.section(*confusion_section(scored))
    out.section("Per class", class_table(scored))
    out.section("Calibration", *calibration_section(scored, ece))
    if (~scored.right).any():
        out.section(
            "Worst mistakes",
            page.paragraph("Wrong and most sure of it. Look for wrong labels first."),
            page.gallery(worst_mistakes(scored, data)),
        )
    name, looked = looks(model, data, scored)
    out.section(
        "Where the model looks",
        page.paragraph(f"Method: {name}. Bright regions move the answer most."),
        page.gallery(looked),
    )
    out.section(f"Pictures of {split}", data_table(data))
    out.section("Configuration and machine", *configuration(run), page.preformatted(machine()))
    return out.write(Path(path))


def as_text(name: str) -> str:
    """Bytes of a file's name that are no text cannot be drawn: they stand as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def read_predictions(path: Path, data: ImageData, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """predictions.npz of a model folder, as `write_report` takes it.

    Raises InputError where it is gone or damaged, or says something of other pictures.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:  # a zip file: every part has a checksum
            found = {key: stored[key] for key in ("probabilities", "labels", "predicted", "keys")}
    except Exception as error:  # numpy and zipfile raise whatever a broken file leads them to
        problem = "is gone" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
    else:
        count = len(data)
        shapes = {"probabilities": (count, len(classes)), "labels": (count,), "predicted": (count,)}
        fits = all(found[key].shape == shape for key, shape in shapes.items())
        if fits and found["keys"].tolist() == list(data.keys):
            return found
        problem = "is about other pictures"
    raise InputError(
        f"{path} {problem}; measure the model anew: vitrail eval {path.parent} --data {data.source.name} "
        "--report FILE.html"
    )


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share; (0, 1) where nothing was counted."""
    if trials == 0:
        return 0.0, 1.0
    ci = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(ci.low), float(ci.high)


def calibration_bins(scored: Scored, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, count) of each non-empty bin of equal width in confidence."""
    index = np.minimum((scored.confidence * bins).astype(int), bins - 1)
    rows = []
    for b in range(bins):
        inside = index == b
        if inside.any():
            conf, acc = scored.confidence[inside].mean(), scored.right[inside].mean()
            rows.append((float(conf), float(acc), int(inside.sum())))
    return rows


def expected_calibration_error(scored: Scored) -> float:
    """Mean |confidence - accuracy| over ten bins, weighted by count (Guo et al., ICML 2017)."""
    rows = calibration_bins(scored)
    return sum(n * abs(conf - acc) for conf, acc, n in rows) / sum(n for *_, n in rows)


def advice(scored: Scored, history: Sequence[dict[str, Any]]) -> list[str]:
    """Findings that a person can act on, most useful first."""
    said = []
    confusion = scored.confusion()
    counts = confusion.sum(1)
    names = [page.isolated(repr(name)) for name in scored.classes]
    pairs = confusions(confusion, 1)
    if pairs:
        true, predicted, count = pairs[0]
        said.append(
            f"Most confused: {names[true]} taken for {names[predicted]}, "
            f"{count} of {counts[true]} pictures."
        )
        measured = np.flatnonzero(counts)
        recall = confusion.diagonal()[measured] / counts[measured]
        weakest = int(measured[recall.argmin()])
        low, high = interval(int(confusion[weakest, weakest]), int(counts[weakest]))
        said.append(
            f"Weakest class: {names[weakest]} with recall {recall.min():.2f} "
            f"(95 %: {low:.2f} to {high:.2f}, {counts[weakest]} pictures)."
        )
    else:
        said.append("Every picture was classified correctly.")
    missing = [name for name, n in zip(names, counts, strict=True) if n == 0]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        said.append(f"Not measured: no picture of {', '.join(missing[:5])}{more} in this split.")
    sure = (~scored.right) & (scored.confidence > 0.9)
    if sure.any():
        said.append(
            f"Mistakes made with over 90 % confidence: {int(sure.sum())}; check their labels below before "
            "training longer."
        )
    low, high = interval(int(scored.right.sum()), len(scored.right))
    confidence = float(scored.confidence.mean())
    if not low <= confidence <= high:  # more than the number of pictures explains
        way = (
            "surer of itself than it is right"
            if confidence > high
            else "less sure than it could be"
        )
        said.append(
            f"The model is {way} (mean confidence {confidence:.2f}, accuracy {scored.right.mean():.2f})."
        )
    evals = [(r["epoch"], r["top1"]) for r in history if "top1" in r]
    if len(evals) >= 3:
        best = max(evals, key=lambda e: e[1])
        if best == evals[-1]:
            said.append("The score still rose at the last evaluation: train longer.")
    losses = [(r["loss"], r["step"]) for r in history if "top1" in r]
    if len(losses) >= 3 and losses[-1][0] > OVERFITTED * min(losses)[0]:
        lowest, step = min(losses)
        said.append(
            f"The validation loss was lowest at step {step:,} ({lowest:.2f}) and ended at "
            f"{losses[-1][0]:.2f}: the model learns its training pictures by heart. More augmentation, "
            "more pictures or fewer epochs."
        )
    return said


def confusions(confusion: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """(true, predicted, count) of the most frequent mistakes; of equals the first in the matrix is first."""
    off = confusion.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    cells = [divmod(int(i), len(off)) for i in order]
    return [(t, p, int(off[t, p])) for t, p in cells if off[t, p] > 0]


def curves(history: Sequence[dict[str, Any]]) -> str:
    """Losses, score and learning rate by step; the page is about the model of the ringed evaluation."""
    drawn = []
    train = [r for r in history if "loss" in r and "lr" in r]
    evals = [r for r in history if "top1" in r]
    fig, ax = page.figure()
    for rows, name, how in (
        (train, "training, with augmentation and smoothing", {"color": page.ACCENT}),
        (evals, "validation", {"color": page.GOOD, "marker": "o", "markersize": 4}),
    ):
        if rows:
            x, y = [r["step"] for r in rows], [r["loss"] for r in rows]
            ax.plot(x, y, linewidth=1.4, label=name, **how)
    ax.set_xlabel("step")
    ax.set_title("loss", fontsize=11, loc="left")
    ax.legend(frameon=False, fontsize=8)
    drawn.append(page.svg(fig))
    if evals:
        fig, ax = page.figure()
        ax.plot(
            *([r[k] for r in evals] for k in ("step", "top1")),
            color=page.GOOD,
            marker="o",
            markersize=4,
        )
        best = max(evals, key=lambda r: r["top1"])  # the first of equals, as in training
        ax.plot(best["step"], best["top1"], "o", ms=10, mfc="none", mec=page.INK)
        ax.set_xlabel("step")
        ax.set_title("accuracy on the validation split", fontsize=11, loc="left")
        drawn.append(page.svg(fig))
    if train:
        fig, ax = page.figure(height=2.6)
        ax.plot(*([r[k] for r in train] for k in ("step", "lr")), color=page.INK, linewidth=1.2)
        ax.set_xlabel("step")
        ax.set_title("learning rate", fontsize=11, loc="left")
        drawn.append(page.svg(fig))
    return page.plots(*drawn)


def confusion_section(scored: Scored) -> tuple[str, str]:
    confusion = scored.confusion()
    if len(scored.classes) > MANY_CLASSES:
        names = scored.classes
        rows = [(names[t], names[p], count) for t, p, count in confusions(confusion, 15)]
        return "Most frequent confusions", page.table(("true", "predicted", "pictures"), rows)
    k = len(scored.classes)
    longest = min(max(map(len, scored.classes)), 24)
    side = min(1.2 + 0.06 * longest + 0.42 * k, 9.0)
    fig, ax = page.figure(side + 0.6, side)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ax.grid(False)
    # A name is no formula, whatever dollar signs it has.
    names = [page.shortened(name) for name in scored.classes]
    ax.set_xticks(range(k), names, rotation=45, ha="right", parse_math=False)
    ax.set_yticks(range(k), names, parse_math=False)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    for t in range(k):
        for p in range(k):
            if confusion[t, p]:
                colour = "white" if share[t, p] > 0.5 else page.INK
                ax.text(p, t, confusion[t, p], ha="center", va="center", fontsize=8, color=colour)
    return "Confusion matrix", page.plots(page.svg(fig))


def class_table(scored: Scored) -> str:
    """Precision and recall with 95 % intervals, weakest recall first, classes without images last."""
    confusion = scored.confusion()
    rows = []
    for i, name in enumerate(scored.classes):
        hit = int(confusion[i, i])
        support, claimed = int(confusion[i].sum()), int(confusion[:, i].sum())
        rows.append((name, support, *_share(hit, claimed), *_share(hit, support)))
    rows.sort(key=lambda r: (r[1] == 0, r[4]))
    header = ("class", "pictures", "precision", "95 %", "recall", "95 %")
    return page.table(header, rows)


def _share(part: int, whole: int) -> tuple[float, str]:
    if whole == 0:
        return 0.0, "none"
    low, high = interval(part, whole)
    return part / whole, f"{low:.2f} to {high:.2f}"


def calibration_section(scored: Scored, ece: float) -> tuple[str, str]:
    rows = calibration_bins(scored)
    fig, ax = page.figure(4.2, 4.0)
    ax.plot([0, 1], [0, 1], color="#aab3c2", linestyle="--", linewidth=1)
    sizes = [20 + 300 * n / len(scored.labels) for *_, n in rows]
    conf, acc, _ = zip(*rows, strict=True)
    ax.plot(conf, acc, color=page.ACCENT, linewidth=1)
    ax.scatter(conf, acc, s=sizes, color=page.ACCENT, alpha=0.75)
    ax.set_xlim(0, 1.03)
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("confidence")
    ax.set_ylabel("accuracy")
    text = (
        f"A point below the dashed line: the model is surer than it is right. Areas show how many "
        f"pictures fall into a bin. Expected calibration error {ece:.3f} (ten bins)."
    )
    return page.plots(page.svg(fig)), page.paragraph(text)


def worst_mistakes(
    scored: Scored, data: ImageData, count: int = 12
) -> list[tuple[Image.Image, str]]:
    wrong = np.flatnonzero(~scored.right)
    order = wrong[np.argsort(-scored.confidence[wrong], kind="stable")][:count]
    shown = []
    for i in map(int, order):
        guess, truth = (
            page.isolated(scored.classes[k]) for k in (scored.predicted[i], scored.labels[i])
        )
        key = page.isolated(as_text(data.keys[i]))
        caption = f"said {guess} ({scored.confidence[i]:.2f}), is {truth}\n{key}"
        shown.append((Image.fromarray(data.read(i)), caption))
    return shown


def looks(
    model: Any, data: ImageData, scored: Scored, count: int = 8
) -> tuple[str, list[tuple[Image.Image, str]]]:
    """A few pictures under the map of what mattered: half mistakes (where there are), half hits."""
    rng = np.random.default_rng(0)
    wrong, right = np.flatnonzero(~scored.right), np.flatnonzero(scored.right)
    half = min(len(wrong), count // 2)
    chosen = [*rng.permutation(right)[: count - half], *rng.permutation(wrong)[:half]]
    device = next(model.parameters()).device
    name, shown = "", []
    model.eval()
    for i in map(int, chosen):
        values, _ = prepare(data.read(i), model.preprocessing)
        label = int(scored.predicted[i])
        name, seen = where_it_looks(model, torch.from_numpy(values).to(device), label)
        mean, std = (
            np.array(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std)
        )
        picture = ((values * std + mean) * 255).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        truth = page.isolated(scored.classes[scored.labels[i]])
        verdict = "right" if scored.right[i] else f"is {truth}"
        caption = f"{page.isolated(scored.classes[label])} ({scored.confidence[i]:.2f}), {verdict}"
        shown.append((page.heat(picture, seen.cpu().float().numpy()), caption))
    return name, shown


def data_table(data: ImageData) -> str:
    counts = np.bincount(data.labels, minlength=len(data.classes))
    heights, widths = data.sizes[:, 0], data.sizes[:, 1]
    rows = [
        ("pictures", f"{len(data):,}"),
        ("classes", f"{len(data.classes)}, {_range(counts)} pictures each"),
        ("width", f"{_range(widths)} px, median {np.median(widths):.0f}"),
        ("height", f"{_range(heights)} px, median {np.median(heights):.0f}"),
        ("left out as broken", f"{len(data.broken)}"),
        ("content hash", data.content_hash[:16]),
    ]
    return page.table(("", ""), rows)


def _range(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


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


def read_history(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line cut short by a kill is left out."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
