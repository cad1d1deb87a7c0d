"""`vitrail demo`: the whole path on the embedded digits, on a CPU, in about three minutes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrail.cli.flags import parse_flags
from vitrail.tasks.task import DEFAULT

if TYPE_CHECKING:
    from vitrail.tasks.demo import Demo
    from vitrail.tasks.task import Scores


@dataclass(frozen=True, kw_only=True)
class DemoFlags:
    """Make digits, train a small model on them, evaluate, predict, and write a report page."""

    task: str = DEFAULT
    """What is learnt: classify, segment or detect."""
    out: Path | None = None
    """Where everything is written; none: a folder here, named after the demo. One that was interrupted there
    goes on."""
    epochs: int | None = None
    """Passes over the digits; none: the recipe's."""


def run(argv: list[str]) -> int:
    flags = parse_flags(DemoFlags, argv, prog="vitrail demo")
    from vitrail.data.digits import SETS, make_digits
    from vitrail.recipes import recipe_config
    from vitrail.tasks.demo import demo_of
    from vitrail.train.trainer import train

    demo = demo_of(flags.task)
    out = flags.out or Path(demo.folder)
    images = out / "digits"
    print(f"1/4  {SETS[demo.digits].what} -> {images}", flush=True)
    make_digits(images, task=demo.digits)

    config = recipe_config(demo.recipe)
    config = replace(config, data=str(images), out=str(out / "run"))
    config = replace(config, epochs=flags.epochs or config.epochs)
    how = f"train {config.model} from nothing, {config.epochs} epochs"
    print(f"2/4  {how} -> {config.out}", flush=True)
    result = train(config)
    if result.signal:
        print(f"stopped; {demo.command} --out {out} goes on from here", flush=True)
        return 128 + result.signal

    print("3/4  evaluate on digits that it has not seen", flush=True)
    scores = show(demo, out)
    print(f"""
report       {out / "report.html"}
images       {out / "predictions.png"}
model        {out / "run" / "best"}

next, on your own images ({demo.own}):
  vitrail train --data YOUR/FOLDER --model {config.model} --out runs/mine
  vitrail eval runs/mine --data YOUR/FOLDER
  vitrail predict runs/mine SOME/IMAGE.jpg

test {demo.score} {scores.best:.2f}""")
    return 0


def show(demo: "Demo", out: Path) -> "Scores":
    """Measure the model on the test images, write the report and three answers; the scores."""
    from vitrail.analysis.report import write_report
    from vitrail.data import open_data
    from vitrail.models import load
    from vitrail.predictor import Predictor
    from vitrail.tasks.task import task_of
    from vitrail.train.evaluate import evaluate

    model = load(out / "run" / "best")
    test = open_data(out / "digits", "test", classes=model.classes)
    scores = evaluate(model, test, predictions=True)
    assert scores.said is not None
    about: dict[str, Any] = {"scores": scores.to_dict(), "run": out / "run", "split": "test"}
    write_report(out / "report.html", model, test, scores.said, **about)

    print("4/4  predict three images", flush=True)
    chosen = [out / "digits" / test.keys[i] for i in demo.choose(scores.said)[:3]]
    shown = []
    asked = task_of(model.task).answering(model, None)
    for path, prediction in zip(chosen, Predictor(asked)(chosen), strict=True):
        prediction = demo.shown(prediction)
        print(f"     {path}: {demo.answer(prediction)}")
        shown.append(prediction.draw())
    side_by_side(shown).save(out / "predictions.png")
    return scores


def side_by_side(pictures: list, height: int = 320, gap: int = 16):
    """One picture from several, brought to one height."""
    from PIL import Image

    scaled = [
        p.resize((max(1, p.width * height // p.height), height), Image.Resampling.LANCZOS)
        for p in pictures
    ]
    sheet = Image.new("RGB", (sum(p.width + gap for p in scaled) + gap, height + 2 * gap), "white")
    left = gap
    for p in scaled:
        sheet.paste(p, (left, gap))
        left += p.width + gap
    return sheet
