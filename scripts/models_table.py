"""Count every model anew, and write docs/models.md and the counts that `vitrail models` shows.

python scripts/models_table.py [--check]

--check writes nothing and fails where one of the two files is not what would be written.
"""

import argparse
import inspect
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vitrail.cli.models import count, row, strides_of
from vitrail.detectors.efficientdet_scales import SCALES
from vitrail.models import list_models
from vitrail.registry import backbone_entry
from vitrail.weights.systems import systems

ROOT = Path(__file__).parents[1]
MATRIX = ROOT / "docs" / "matrix.json"  # what benchmarks/matrix.py wrote


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(argv).check
    counts = {name: count(name) for name in list_models()}
    lines = [f'"{name}": {json.dumps(c)}' for name, c in sorted(counts.items())]
    files = {
        ROOT / "docs" / "models.md": "\n".join(
            [
                markdown([row(name, c) for name, c in counts.items()]),
                *systems(),
                "",
                *efficientdets(),
                "",
                *matrix(json.loads(MATRIX.read_text(encoding="utf-8"))),
                "",
            ]
        ),
        ROOT / "src" / "vitrail" / "cli" / "counts.json": "{\n" + ",\n".join(lines) + "\n}\n",
    }
    for path, text in files.items():
        if not check:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}: {len(counts)} models")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"{path} is stale; run: python scripts/models_table.py")
            return 1
    return 0


def markdown(rows: list[dict[str, Any]]) -> str:
    """docs/models.md: the table, the exceptions, and where code and paper differ."""
    lines = [
        "# Models",
        "",
        "Made by `python scripts/models_table.py`; CI fails when it is stale.",
        "Parameters and multiply-adds are counted from the model itself, with a head of 1000 classes, built",
        "for the size named; the authors' figures stand beside them. An empty cell: they give none, and the",
        "second list below says why. `hf:` names go to `--weights` and `weights=` as they are, other",
        "addresses are to be downloaded first.",
        "",
        "| model | params M | paper | MACs G | paper | at px | strides | paper top-1 % | weights |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [
            f"`{r['name']}`",
            f"{r['params_m']:.2f}",
            _cell(r["paper_params_m"]),
            f"{r['macs_g']:.3g}",
            _cell(r["paper_macs_g"]),
            str(r["image_size"]),
            strides_of(r),
            _cell(r["paper_top1"]),
            "; ".join([*r["weights"], *r["downloads"]]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    differ = [f"- `{r['name']}`: {line}" for r in rows for line in r["differences"]]
    if differ:
        lines += [
            "",
            "## Where a count differs from the authors'",
            "",
            "By more than 0.5 % of the parameters or 1 % of the multiply-adds.",
            "",
            *differ,
        ]
    lines += ["", "## Where the authors' figures stand", ""]
    for (_, source, remark), group in _grouped(rows).items():
        named = ", ".join(f"`{name}`" for name in group)
        said = [text for text in ("" if source == "none" else source, remark) if text]
        lines.append(f"- {named}: {'. '.join(text[0].upper() + text[1:] for text in said)}.")
    lines += ["", "## Where official code, paper and vitrail differ", ""]
    for title, text in departures({r["name"] for r in rows}):
        lines += [f"### {title}", "", text, ""]
    return "\n".join(lines).rstrip() + "\n"


# google/automl, efficientdet/README.md: parameters in M, multiply-adds in G, AP on COCO test-dev.
AUTHORS = {
    "efficientdet_d0": ("3.9", "2.54", "34.6"),
    "efficientdet_d1": ("6.6", "6.10", "40.5"),
    "efficientdet_d2": ("8.1", "11.0", "43.0"),
    "efficientdet_d3": ("12.0", "24.9", "47.5"),
    "efficientdet_d4": ("20.7", "55.2", "49.7"),
    "efficientdet_d5": ("33.7", "130", "51.5"),
    "efficientdet_d6": ("51.9", "226", "52.6"),
    "efficientdet_d7": ("51.9", "325", "53.7"),
    "efficientdet_d7x": ("77.0", "410", "55.1"),
}


def efficientdets() -> list[str]:
    """EfficientDet's scales beside the paper's table, as lines of Markdown."""
    lines = [
        "## EfficientDet",
        "",
        "Counted for COCO's 90 classes, beside what the authors say (google/automl); effdet has the same",
        "parameters to the last one. None was trained here: the AP is the authors', on COCO test-dev.",
        "",
        "| model | backbone | at px | params M | theirs | MACs G | theirs | their AP |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, scale in SCALES.items():
        params, macs = count(name, 90)
        assert params is not None
        assert macs is not None
        theirs, their_macs, ap = AUTHORS[name]
        lines.append(
            f"| `{name}` | `{scale.backbone}` | {scale.size} | {params / 1e6:.2f} | {theirs} "
            f"| {macs / 1e9:.3g} | {their_macs} | {ap} |"
        )
    return lines


def matrix(cells: dict[str, dict[str, Any]]) -> list[str]:
    """Every head on every family, as `benchmarks/matrix.py` found it, as lines of Markdown."""
    families = list(dict.fromkeys(family for of in cells.values() for family in of))
    refused: list[str] = []
    lines = [
        "## Every head on every family",
        "",
        "By `python benchmarks/matrix.py`, at tiny size: each model was built by its name, trained for",
        "five updates on one batch, evaluated, saved, loaded, and answered the same to the last bit. The",
        "number is the loss after the five updates, in per cent of that before.",
        "",
        "| family | " + " | ".join(f"`{head}`" for head in cells) + " |",
        "|---|" + "---|" * len(cells),
    ]
    for family in families:
        shown = []
        for of_head in cells.values():
            found = of_head.get(family, {"refused": "not tried"})
            if "refused" in found:
                if found["refused"] not in refused:
                    refused.append(found["refused"])
                shown.append(f"({refused.index(found['refused']) + 1})")
            elif "error" in found:
                shown.append("fails")
            else:
                before, after = found["loss"]
                shown.append(f"{100 * after / before:.0f}")
        lines.append(f"| {family} | " + " | ".join(shown) + " |")
    return lines + [f"\n({i}) refused: {why}" for i, why in enumerate(refused, 1)]


def _grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[str]]:
    """(family, source, remark) -> the models of which both are said, in the order of the table."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for r in rows:
        if r["source"]:
            groups.setdefault((r["family"], r["source"], r["remark"]), []).append(r["name"])
    return groups


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def departures(names: Collection[str]) -> list[tuple[str, str]]:
    """(paper, what its file says of official code and paper) for the files behind `names`.

    A backbone file's docstring opens with the paper and ends with the paragraphs that begin
    "Unlike", "Where" or "Paper and code": those are what a reader of the table must know.
    """
    found = {}
    for name in names:
        module = inspect.getmodule(backbone_entry(name).cls)
        doc = inspect.cleandoc(module.__doc__ or "") if module else ""
        paragraphs = doc.split("\n\n")
        marks = ("Unlike", "Where", "Paper and code")
        said = [p for p in paragraphs[1:] if p.startswith(marks)]
        if module and said:
            title = " ".join(paragraphs[0].split()).removesuffix(".")
            found[module.__name__] = (title, "\n\n".join(said))
    return [found[key] for key in sorted(found)]


if __name__ == "__main__":
    raise SystemExit(main())
