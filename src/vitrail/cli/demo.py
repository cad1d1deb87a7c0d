"""`vitrail demo`: the whole path on the embedded digits, on a CPU, in about three minutes."""

from dataclasses import dataclass, replace
from pathlib import Path

from vitrail.cli.flags import parse_flags


@dataclass(frozen=True, kw_only=True)
class DemoFlags:
    """Make the digits, train EfficientViT on them, evaluate, predict, and write a report page."""

    out: Path = Path("vitrail-demo")
    """Where everything is written. A demo that was interrupted there goes on."""
    epochs: int = 24
    """Passes over the digits."""


def run(argv: list[str]) -> int:
    flags = parse_flags(DemoFlags, argv, prog="vitrail demo")
    import numpy as np

    from vitrail.analysis.report import write_report
    from vitrail.data import open_data
    from vitrail.data.digits import make_digits
    from vitrail.models import load
    from vitrail.predictor import Predictor
    from vitrail.recipes import recipe_config
    from vitrail.train.evaluate import evaluate
    from vitrail.train.trainer import train

    pictures, out = flags.out / "digits", flags.out / "run"
    print(f"1/4  handwritten digits on canvases of mixed sizes -> {pictures}", flush=True)
    make_digits(pictures)

    print(f"2/4  train efficientvit_m0 from nothing, {flags.epochs} epochs -> {out}", flush=True)
    result = train(
        replace(
            recipe_config("digits"),
            data=str(pictures),
            out=str(out),
            epochs=flags.epochs,
        )
    )
    if result.signal:
        print(f"stopped; vitrail demo --out {flags.out} goes on from here", flush=True)
        return 128 + result.signal

    print("3/4  evaluate on digits that it has not seen", flush=True)
    model = load(out / "best")
    test = open_data(pictures, "test", classes=model.classes)
    scores = evaluate(model, test, predictions=True)
    seen = scores.said
    assert seen is not None
    about = {"scores": scores.to_dict(), "run": out, "split": "test"}
    report = write_report(flags.out / "report.html", model, test, seen, **about)

    print("4/4  predict three pictures", flush=True)
    # One wrong answer among the three, where there is one: a demo should show those too.
    right = seen["predicted"] == seen["labels"]
    order = np.concatenate([np.flatnonzero(~right)[:1], np.flatnonzero(right)[::37]])[:3]
    chosen = [pictures / test.keys[i] for i in order]
    shown = []
    for path, p in zip(chosen, Predictor(model)(chosen), strict=True):
        print(f"     {path}: {p.names[0]} ({p.scores[0]:.2f})")
        shown.append(p.draw())
    sheet = side_by_side(shown)
    sheet.save(flags.out / "predictions.png")

    print(f"""
report       {report}
pictures     {flags.out / "predictions.png"}
model        {out / "best"}

next, on your own pictures (a folder with one folder per class):
  vitrail train --data YOUR/FOLDER --model efficientvit_m0 --out runs/mine
  vitrail eval runs/mine --data YOUR/FOLDER
  vitrail predict runs/mine SOME/PICTURE.jpg

test accuracy {scores["top1"]:.2f}""")
    return 0


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
