"""`vitrail predict`: what is on images, as a table, JSON lines, annotated images or class maps."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar

from tyro.conf import FlagCreatePairsOff, Positional, arg

from vitrail.cli.flags import InferenceFlags, parse_flags
from vitrail_runtime.errors import InputError

if TYPE_CHECKING:
    from vitrail_runtime.coco import CocoIds
    from vitrail_runtime.prediction import Prediction

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PredictFlags(InferenceFlags):
    """Say what is on pictures: vitrail predict RUN photo.jpg folder "holidays/*.jpg".

    Prints a table, or JSON lines with --json; --out writes annotated pictures and predictions.jsonl.
    A segmenter's scores are shares of the image, and --out also gets its masks. A detector's boxes are drawn,
    and --out also gets them as COCO results; segments of things and stuff likewise.
    """

    model: Annotated[Positional[Path], arg(metavar="RUN")]
    """The folder of a model, or of a training run (its best model is taken)."""
    inputs: Annotated[Positional[tuple[str, ...]], arg(metavar="INPUT...")]
    """Pictures, folders (searched at any depth) and glob patterns."""
    json: bool = False
    """One JSON object per picture on stdout, and nothing else there."""
    out: Path | None = None
    """A folder for annotated pictures and predictions.jsonl; of a segmenter also for masks/*.png, the
    index of the class of every pixel, with a palette, 255 for none; of a detector for coco_results.json, and
    coco_images.json, which tells what its ids mean; of segments for coco_panoptic.json and the images of ids
    in coco_panoptic."""
    classes: tuple[str, ...] | None = None
    """Of a model of images and captions: names to look for; none: those that its training data had."""
    top_k: int = 5
    """How many classes to tell per picture."""
    skip_broken: bool = False
    """Leave out pictures that cannot be read, instead of ending with an error that lists them."""
    device: str = "auto"
    """Where the model runs, such as cpu or cuda; auto: a GPU where there is one."""
    batch_size: int = 16
    """Pictures per forward."""
    max_tokens: int | None = None
    """Of a plain ViT: pictures at their own shape, packed into so many tokens a forward; with
    --tokens-per-image 4096 where not given."""
    threshold: float = 0.5
    """Of a detector: boxes, or segments, with a lower score are neither told nor drawn; what is written in
    COCO's form has them all."""
    coco: Path | None = None
    """With --out, of a detector: a COCO annotation file whose ids of images, by the ends of their paths, and
    of categories, by name, coco_results.json or coco_panoptic.json shall have."""


def run(argv: list[str]) -> int:
    flags = parse_flags(FlagCreatePairsOff[PredictFlags], argv, prog="vitrail predict")

    from vitrail_runtime.coco import CocoIds
    from vitrail_runtime.pictures import find_pictures

    # Whatever is wrong with the flags and inputs is said before a model is loaded.
    if not flags.inputs:
        raise InputError("say which pictures: vitrail predict RUN photo.jpg folder '*.png'")
    pictures = list(dict.fromkeys(path for given in flags.inputs for path in find_pictures(given)))
    targets = {} if flags.out is None else annotated_paths(pictures, flags.out)
    if not 0 <= flags.threshold <= 1:
        raise InputError(f"--threshold is a score from 0 to 1, but is {flags.threshold}")
    if flags.coco is not None and flags.out is None:
        raise InputError("--coco is about results in COCO's form, which --out asks for")
    annotations = None if flags.coco is None else read_annotations(flags.coco)
    flags.asked()  # refuses what cannot be

    from vitrail.models import load, model_folder
    from vitrail.predictor import Predictor
    from vitrail.tasks.task import task_of

    model = flags.applied(load(model_folder(flags.model)))
    predict = Predictor(
        task_of(model.task).answering(model, flags.classes),
        device=flags.device,
        batch_size=flags.batch_size,
        top_k=flags.top_k,
        skip_broken=flags.skip_broken,
        max_tokens=flags.max_tokens,
        tokens_per_image=flags.tokens_per_image,
    )
    # Bar and lines would overwrite each other on one terminal.
    quiet = flags.json and sys.stdout.isatty()
    names = [str(path) for path in pictures]
    ids = CocoIds(names, predict.classes, annotations, model.info.category_ids)
    tell(flags, watched(predict(pictures), len(pictures), bar=not quiet), targets, ids)
    if predict.smaller:
        most, patch = predict.preprocessing.patches or (0, 0)
        say(
            f"{len(predict.smaller)} of {len(pictures)} pictures have more than {most} patches of {patch} "
            f"pixels, such as {predict.smaller[0]}: shown smaller, their ratio kept"
        )
    if predict.skipped:
        say(f"left out {len(predict.skipped)} of {len(pictures)} pictures:")
        for name, problem in predict.skipped:
            say(f"  {name} {problem}")
        if len(predict.skipped) == len(pictures):
            raise InputError("none of the pictures could be read")
    if flags.out is not None:
        say(f"annotated pictures and predictions.jsonl are in {flags.out}")
    return 0


def read_annotations(path: Path) -> Any:
    """A COCO annotation file. Raises InputError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"--coco {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"--coco {path} is no JSON: {error}") from error


def tell(
    flags: PredictFlags,
    predictions: Iterator["Prediction"],
    targets: dict[str, Path],
    ids: "CocoIds",
) -> None:
    """Print each prediction as it comes, or all in a table; write them where --out asks for it."""
    seen = []
    kept = None if flags.out is None else Kept(flags.out, targets, ids)
    try:
        for prediction in predictions:
            whole = prediction
            if prediction.several:
                prediction = prediction.above(flags.threshold)
            if kept is not None:
                kept.add(prediction, whole)
            if flags.json:
                print(json.dumps(prediction.to_dict()))
            else:
                seen.append(prediction)
    finally:  # also what was found before an error or an interruption is shown
        if kept is not None:
            kept.close()
        if seen:
            print_table(seen, sys.stdout)


class Kept:
    """What --out asks for: annotated images, class maps and COCO results where there are any, and a log with
    a line for each image."""

    def __init__(self, out: Path, targets: dict[str, Path], ids: "CocoIds") -> None:
        self.out, self.targets, self.ids = out, targets, ids
        self.results: Any = None  # a writer of `vitrail_runtime.coco`
        with writing_to(out):
            out.mkdir(parents=True, exist_ok=True)
            self.log = (out / "predictions.jsonl").open("w", encoding="utf-8")

    def add(self, prediction: "Prediction", whole: "Prediction") -> None:
        """whole: with the answers that are not worth showing, too."""
        found = prediction.to_dict()
        target = self.targets[str(prediction.source)]
        with writing_to(self.out):
            save_annotated(prediction, target)
            if prediction.segmentation is not None:
                mask = mask_path(target, self.out)
                save_mask(prediction, mask)
                found["mask"] = mask.relative_to(self.out).as_posix()
            from vitrail_runtime.coco import coco_form

            form = coco_form(whole)
            if form is not None:
                self.results = self.results or form(self.out, self.ids)
                self.results.add(whole)
            print(json.dumps(found), file=self.log, flush=True)

    def close(self) -> None:
        self.log.close()
        if self.results is not None:
            with writing_to(self.out):
                self.results.close()


def annotated_paths(pictures: list[Path], out: Path) -> dict[str, Path]:
    """Picture -> where its annotated copy goes: a .jpg in `out`, in the folders they have in common below.

    Raises: InputError where `out` is a file, or a copy would overwrite one of the pictures.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file, but a folder is expected")
    absolute = {path: Path(os.path.abspath(path)) for path in pictures}
    common = Path(os.path.commonpath([path.parent for path in absolute.values()]))
    targets: dict[str, Path] = {}
    taken = {out / "predictions.jsonl"}
    for path in pictures:
        relative = absolute[path].relative_to(common)
        target = out / relative.with_suffix(".jpg")
        if target in taken:  # a.png beside a.jpg
            target = out / relative.with_name(relative.name + ".jpg")
        taken.add(target)
        targets[str(path)] = target
    originals = {os.path.realpath(path) for path in pictures}
    for path, target in targets.items():
        for written, what in ((target, "its annotated copy"), (mask_path(target, out), "a mask")):
            if os.path.realpath(written) in originals:
                raise InputError(
                    f"--out {out} would overwrite the picture {written} with {what} (of {path}); "
                    "name another folder"
                )
    return targets


def mask_path(target: Path, out: Path) -> Path:
    """Where the mask goes whose annotated copy is `target`: the same name below `masks`, as a PNG."""
    return out / "masks" / target.relative_to(out).with_suffix(".png")


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """A disk that is full or read-only is for the caller to put right."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error


def save_annotated(prediction: "Prediction", target: Path) -> None:
    """The picture with its labels, as a JPEG."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prediction.draw().save(target, quality=92, subsampling=0)


def save_mask(prediction: "Prediction", target: Path) -> None:
    """The class of every pixel, as a PNG with a palette."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prediction.class_map().save(target, optimize=True)


def watched(predictions: Iterator[T], total: int, *, bar: bool = True) -> Iterator[T]:
    """The same predictions, while stderr shows how far and how fast; lines without a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
    )
    shown = Progress(
        *columns,
        console=console,
        transient=True,
        disable=not (bar and console.is_terminal),
        # By default rich sends what is printed on stdout to its own console, which is stderr.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    started = last = time.monotonic()
    count = 0
    try:
        with shown:
            task = shown.add_task("", total=total, rate=0.0)
            for prediction in predictions:
                yield prediction
                count += 1
                now = time.monotonic()
                rate = count / max(now - started, 1e-9)
                shown.update(task, completed=count, rate=rate)
                if not console.is_terminal and now - last >= 5:
                    last = now
                    left = (total - count) / rate
                    say(f"{count}/{total} pictures, {rate:.0f} images/s, {left:.0f} s left")
    finally:
        seconds = time.monotonic() - started
        pictures = "1 picture" if count == 1 else f"{count} pictures"
        say(f"{pictures} in {seconds:.1f} s, {count / max(seconds, 1e-9):.0f} images/s")


def print_table(predictions: list["Prediction"], file: TextIO) -> None:
    """A table of pictures, their best label with its score, and what else it could be."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vitrail_runtime.coco import counted

    # Without a terminal lines are as long as they need to be, for grep and the like.
    console = Console(file=file, width=None if file.isatty() else 1000, highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("picture", overflow="fold")
    table.add_column("label", style="bold")
    table.add_column("score", justify="right")
    table.add_column("or", style="dim", overflow="ellipsis", no_wrap=True)
    for p in predictions:
        if p.several and p.names:
            cells = (printable(p.source or ""), counted(p.names), f"{p.scores[0]:.1%}", "")
            table.add_row(*map(Text, cells))
            continue
        others = zip(p.names[1:], p.scores[1:], strict=True)
        rest = ", ".join(f"{name} {score:.1%}" for name, score in others)
        best = (p.names[0], f"{p.scores[0]:.1%}") if p.names else ("nothing found", "")
        cells = (printable(p.source or ""), *best, rest)
        table.add_row(*map(Text, cells))
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        print(line.rstrip(), file=file)


def printable(text: str) -> str:
    """A file's name as text that any terminal takes: bytes that are not UTF-8 become question marks."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
