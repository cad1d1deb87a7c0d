"""`vitrail models`: what there is, how large, how good, and where its weights come from."""

import importlib.resources
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.cli.flags import parse_flags
from vitrail_runtime.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ModelsFlags:
    """List models: parameters, MACs, strides, tasks, papers' scores, where weights come from."""

    task: str | None = None
    """Only models for this task (classify)."""
    json: bool = False
    """One JSON object per line, on stdout."""
    markdown: Path | None = None
    """Count everything anew and write the table as Markdown to this file (docs/models.md is made so)."""
    check: bool = False
    """With --markdown: write nothing, fail when the file is not what would be written."""


DENSE_CLASSES = 150  # those of ADE20K, for the counts of models with a dense head


def run(argv: list[str]) -> int:
    patterns = [a for a in argv[:1] if not a.startswith("-")]
    flags = parse_flags(ModelsFlags, argv[len(patterns) :], prog="vitrail models [PATTERN]")
    from vitrail.models import list_models
    from vitrail.registry import unknown

    pattern = patterns[0] if patterns else "*"
    names = list_models(pattern, task=flags.task)
    if not names:
        raise unknown("model", pattern, list_models())
    if flags.check and flags.markdown is None:
        raise InputError("--check compares a file with the table; name it with --markdown FILE")
    if flags.markdown is not None:
        return write_markdown(names, flags.markdown, check=flags.check)
    counts = stored_counts()
    rows = [row(name, counts.get(name) or count(name)) for name in names]
    if flags.json:
        for r in rows:
            print(json.dumps(r))
    else:
        print_table(rows)
    return 0


def count(name: str) -> list[int]:
    """[parameters, multiply-adds] of a model built for the paper's size, on `meta`: no weights, no
    picture."""
    import torch

    from vitrail.bench.macs import count_macs, count_params
    from vitrail.models import create_model, parse_name

    size = paper_size(name)
    head, entry = parse_name(name)
    fields: dict[str, Any] = {} if head is None else {"num_classes": DENSE_CLASSES}
    # Position tables grow with the size that a model is built for.
    if hasattr(entry.config, "image_size"):
        fields["image_size"] = size
    with torch.device("meta"):
        model = create_model(name, **fields)
    return [count_params(model), count_macs(model, size, size)]


def paper_size(name: str) -> int:
    from vitrail.models import parse_name
    from vitrail.weights.published import PUBLISHED

    head, entry = parse_name(name)
    if head is not None:
        return head.size[0]
    known = PUBLISHED.get(entry.name)
    return known.image_size if known else entry.preprocessing.size[0]


def differences(name: str, counts: list[int]) -> list[tuple[str, str]]:
    """(what, why) for each of our counts that lies beyond 0.5 % (parameters) or 1 % (multiply-adds) of the
    published one; an empty "why" is one that nobody has explained.

    A printed figure stands for all that it could be rounded from: 50 for 49.5 to 50.5, 2.3 for 2.25 to 2.35.
    """
    from vitrail.models import parse_name
    from vitrail.weights.published import PUBLISHED

    head, entry = parse_name(name)
    published = PUBLISHED.get(entry.name)
    if published is None or head is not None:
        return []
    params, macs = counts[0] / 1e6, counts[1] / 1e9
    found = []
    for what, unit, ours, theirs, slack, note in (
        ("parameters", "M", params, published.params, 0.005, published.params_note),
        ("multiply-adds", "G", macs, published.macs, 0.01, published.macs_note),
    ):
        if theirs is None or abs(ours - theirs) <= slack * theirs:
            continue
        digits = len(f"{theirs:g}".partition(".")[2])
        digits = max(digits, 1) if theirs < 10 else digits  # 4.0 is a float like 4
        rounded = abs(ours - theirs) <= 0.5000001 * 10**-digits
        gap = 100 * (ours - theirs) / theirs
        figures = f"{what} {ours:.4g} {unit} against {theirs:g} {unit} ({gap:+.1f} %)"
        found.append((figures, note or ("rounded there" if rounded else "")))
    return found


def stored_counts() -> dict[str, list[int]]:
    """What `count` gave for every model when the table was last made: counting takes half a minute."""
    path = importlib.resources.files("vitrail.cli") / "counts.json"
    return json.loads(path.read_text(encoding="utf-8"))


def row(name: str, counts: list[int]) -> dict[str, Any]:
    """What is known of one model."""
    import torch

    from vitrail.models import create_backbone, parse_name
    from vitrail.weights.catalogue import downloads, weight_sources
    from vitrail.weights.published import PUBLISHED

    head, entry = parse_name(name)
    with torch.device("meta"):
        specs = create_backbone(entry.name).feature_specs
    published = PUBLISHED.get(name)  # the figures are of classifiers
    return {
        "name": name,
        "family": entry.family,
        "task": "classify" if head is None else head.task,
        "params_m": round(counts[0] / 1e6, 2),
        "macs_g": round(counts[1] / 1e9, 3),
        "image_size": paper_size(name),
        "strides": [spec.stride for spec in specs.values()],
        "paper_params_m": published.params if published else None,
        "paper_macs_g": published.macs if published else None,
        "paper_top1": published.top1 if published else None,
        "source": published.source if published else "",
        "remark": published.remark if published else "",
        "differences": [
            f"{what}: {why or 'not explained'}" for what, why in differences(name, counts)
        ],
        "weights": weight_sources(name),
        "downloads": downloads(name),
    }


FEW = 12  # models whose weights are listed below the table


def print_table(rows: list[dict[str, Any]]) -> None:
    """The table, and for few models what their weights are called: addresses are too long for columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    for column in ("params M", "MACs G", "at px", "strides", "paper top-1"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        top1 = "" if r["paper_top1"] is None else f"{r['paper_top1']:.1f}"
        numbers = (f"{r['params_m']:.2f}", f"{r['macs_g']:.3g}", str(r["image_size"]))
        table.add_row(r["name"], *numbers, _strides(r), top1)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    if any(r["task"] != "classify" for r in rows):
        print(
            f"{len(rows)} models; counts are for {DENSE_CLASSES} classes; not trained by vitrail yet"
        )
    else:
        print(f"{len(rows)} models; every one classifies; vitrail train --model NAME trains it")
    if len(rows) > FEW:
        print("released weights: vitrail models NAME")
        return
    for r in rows:
        for source in r["weights"]:
            print(f"{r['name']}: --weights {source}")
        for address in r["downloads"]:
            print(f"{r['name']}: to download, then --weights FILE: {address}")
        if not r["weights"] and not r["downloads"]:
            print(f"{r['name']}: no released weights that we know of")


def write_markdown(names: list[str], path: Path, *, check: bool) -> int:
    if check and not path.is_file():
        raise InputError(f"there is no file {path}; make it: vitrail models --markdown {path}")
    counts = {name: count(name) for name in names}
    text = markdown([row(name, counts[name]) for name in names])
    stored = stored_counts()
    if not check:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        home = Path(str(importlib.resources.files("vitrail.cli") / "counts.json"))
        lines = [f'"{name}": {json.dumps(c)}' for name, c in sorted((stored | counts).items())]
        home.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(f"wrote {path}: {len(names)} models")
        return 0
    if path.read_text(encoding="utf-8") != text or any(
        stored.get(name) != counts[name] for name in names
    ):
        raise InputError(f"{path} is stale; run: vitrail models --markdown {path}")
    print(f"{path} is up to date: {len(names)} models")
    return 0


def markdown(rows: list[dict[str, Any]]) -> str:
    """docs/models.md: the table, the exceptions, and where code and paper differ."""
    from vitrail.models import departures

    lines = [
        "# Models",
        "",
        "Made by `vitrail models --markdown docs/models.md`; CI fails when it is stale.",
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
            _strides(r),
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


def _grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[str]]:
    """(family, source, remark) -> the models of which both are said, in the order of the table."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for r in rows:
        if r["source"]:
            groups.setdefault((r["family"], r["source"], r["remark"]), []).append(r["name"])
    return groups


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _strides(r: dict[str, Any]) -> str:
    return ", ".join(f"{s:g}" for s in r["strides"])
