"""What a classifier's report says: mistakes by class, calibration, and what to do next."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import binomtest

from vitrail.tasks.section import (
    ACCENT,
    Bullets,
    Found,
    Images,
    Plot,
    Rows,
    Section,
    Text,
    Tiles,
    as_text,
    confusion_section,
    confusions,
    data_rows,
    isolated,
    parameters_tile,
    span,
)
from vitrail_runtime.errors import InputError, listed


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


def sections(found: Found) -> list[Section]:
    """found.said: probabilities (N, K), labels and predicted (N,)."""
    scored = checked(found)
    labels, names = scored.labels, scored.classes
    said = [
        Section("", (tiles(found.model, scored),), opening=True),
        Section(
            "What to look at first", (Bullets([*advice(scored), *found.advice]),), opening=True
        ),
        confusion_section("Confusion matrix", scored.confusion(), names, "images"),
        Section("Per class", (class_table(scored),)),
        calibration_section(scored),
    ]
    if (~scored.right).any():
        first = Text("Wrong and most sure of it. Look for wrong labels first.")
        worst = Images(worst_mistakes(scored, found.data))
        said.append(Section("Worst mistakes", (first, worst)))
    name, looked = looks(found, scored)
    method = Text(f"Method: {name}. Bright regions move the answer most.")
    said.append(Section("Where the model looks", (method, Images(looked))))
    counts = np.bincount(labels, minlength=len(names))
    classes = ("classes", f"{len(names)}, {span(counts)} pictures each")
    said.append(Section(f"Pictures of {found.split}", (data_rows(found.data, [classes]),)))
    return said


def checked(found: Found) -> Scored:
    """What was said, once it has the form of a classifier's answers; else raises InputError."""
    names = tuple(map(as_text, found.model.classes))
    anew = "measure the model anew: vitrail eval RUN --data DATA --report FILE.html"
    for key in ("probabilities", "labels", "predicted"):
        if key not in found.said:
            raise InputError(f"predictions.npz is damaged (it has no {key}); {anew}")
    probabilities = np.asarray(found.said["probabilities"], np.float64)
    labels, predicted = (np.asarray(found.said[key]) for key in ("labels", "predicted"))
    count = len(labels)
    if probabilities.shape != (count, len(names)) or predicted.shape != (count,):
        raise InputError(f"predictions.npz is about other images or classes; {anew}")
    return Scored(probabilities, labels, predicted, names)


def tiles(model: Any, scored: Scored) -> Tiles:
    """The headline numbers."""
    low, high = interval(int(scored.right.sum()), len(scored.right))
    return Tiles(
        [
            (f"{scored.right.mean():.3f}", f"accuracy (95 %: {low:.3f} to {high:.3f})"),
            (f"{(~scored.right).sum():,}", "mistakes"),
            (f"{expected_calibration_error(scored):.3f}", "calibration error (ECE)"),
            parameters_tile(model),
        ]
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


def advice(scored: Scored) -> list[str]:
    """Findings that a person can act on, most useful first."""
    said = []
    confusion = scored.confusion()
    counts = confusion.sum(1)
    names = [isolated(repr(name)) for name in scored.classes]
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
        said.append(f"Not measured: no picture of {listed(missing, limit=5)} in this split.")
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
    return said


def class_table(scored: Scored) -> Rows:
    """Precision and recall with 95 % intervals, weakest recall first, classes without images last."""
    confusion = scored.confusion()
    rows = []
    for i, name in enumerate(scored.classes):
        hit = int(confusion[i, i])
        support, claimed = int(confusion[i].sum()), int(confusion[:, i].sum())
        rows.append((name, support, *_share(hit, claimed), *_share(hit, support)))
    rows.sort(key=lambda r: (r[1] == 0, r[4]))
    return Rows(("class", "pictures", "precision", "95 %", "recall", "95 %"), rows)


def _share(part: int, whole: int) -> tuple[float, str]:
    if whole == 0:
        return 0.0, "none"
    low, high = interval(part, whole)
    return part / whole, f"{low:.2f} to {high:.2f}"


def calibration_section(scored: Scored) -> Section:
    rows = calibration_bins(scored)

    def draw(ax: Any) -> None:
        ax.plot([0, 1], [0, 1], color="#aab3c2", linestyle="--", linewidth=1)
        sizes = [20 + 300 * n / len(scored.labels) for *_, n in rows]
        conf, acc, _ = zip(*rows, strict=True)
        ax.plot(conf, acc, color=ACCENT, linewidth=1)
        ax.scatter(conf, acc, s=sizes, color=ACCENT, alpha=0.75)
        ax.set_xlim(0, 1.03)
        ax.set_ylim(0, 1.03)
        ax.set_xlabel("confidence")
        ax.set_ylabel("accuracy")

    text = (
        f"A point below the dashed line: the model is surer than it is right. Areas show how many "
        f"pictures fall into a bin. Expected calibration error {expected_calibration_error(scored):.3f} "
        "(ten bins)."
    )
    return Section("Calibration", (Plot(draw, 4.2, 4.0), Text(text)))


def worst_mistakes(scored: Scored, data: Any, count: int = 12) -> list[tuple[Image.Image, str]]:
    wrong = np.flatnonzero(~scored.right)
    order = wrong[np.argsort(-scored.confidence[wrong], kind="stable")][:count]
    shown = []
    for i in map(int, order):
        guess, truth = (
            isolated(scored.classes[k]) for k in (scored.predicted[i], scored.labels[i])
        )
        key = isolated(as_text(data.keys[i]))
        caption = f"said {guess} ({scored.confidence[i]:.2f}), is {truth}\n{key}"
        shown.append((Image.fromarray(data.images.read(i)), caption))
    return shown


def looks(
    found: Found, scored: Scored, count: int = 8
) -> tuple[str, list[tuple[Image.Image, str]]]:
    """A few pictures under the map of what mattered: half mistakes (where there are), half hits."""
    rng = np.random.default_rng(0)
    wrong, right = np.flatnonzero(~scored.right), np.flatnonzero(scored.right)
    half = min(len(wrong), count // 2)
    chosen = [*rng.permutation(right)[: count - half], *rng.permutation(wrong)[:half]]
    name, shown = "", []
    for i in map(int, chosen):
        label = int(scored.predicted[i])
        name, image = found.explain(found.data.images.read(i), label)
        truth = isolated(scored.classes[scored.labels[i]])
        verdict = "right" if scored.right[i] else f"is {truth}"
        caption = f"{isolated(scored.classes[label])} ({scored.confidence[i]:.2f}), {verdict}"
        shown.append((image, caption))
    return name, shown
