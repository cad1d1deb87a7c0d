"""`vitrail models`: what there is, how large, how good, and where its weights come from."""

import importlib.resources
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vitrail.cli.flags import parse_flags
from vitrail.tasks.task import DEFAULT


@dataclass(frozen=True, kw_only=True)
class ModelsFlags:
    """List models: parameters, MACs, strides, tasks, papers' scores, where weights come from."""

    task: str | None = None
    """Only models for this task (classify, segment, detect)."""
    json: bool = False
    """One JSON object per line, on stdout."""


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
    counts = stored_counts()
    rows = [row(name, counts.get(name) or count(name)) for name in names]
    if flags.json:
        for r in rows:
            print(json.dumps(r))
    else:
        print_table(rows)
    return 0


def count(name: str, classes: int | None = None) -> list[int | None]:
    """[parameters, multiply-adds] of a model built for the paper's size, on `meta`; None where what is
    computed depends on what is seen."""
    import torch

    from vitrail.bench.macs import count_macs, count_params
    from vitrail.models import create_model, parse_name

    size = paper_size(name)
    head, entry = parse_name(name)
    whole = head is None or head.whole
    fields: dict[str, Any] = {} if whole else {"num_classes": classes or DENSE_CLASSES}
    # Position tables grow with the size that a model is built for.
    if hasattr(entry.config, "image_size"):
        fields["image_size"] = size
    with torch.device("meta"):
        model = create_model(name, **fields)
    method = "forward" if head is None else head.counted
    try:
        macs = count_macs(model, size, size, method=method)
    except NotImplementedError:
        macs = None
    return [count_params(model), macs]


def paper_size(name: str) -> int:
    from vitrail.models import parse_name
    from vitrail.weights.published import PUBLISHED

    head, entry = parse_name(name)
    if head is not None and not head.whole:
        return head.size[0]
    known = PUBLISHED.get(entry.name)
    return known.image_size if known else entry.preprocessing.size[0]


def differences(name: str, counts: Sequence[int | None]) -> list[tuple[str, str]]:
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
    assert counts[0] is not None
    assert counts[1] is not None
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


def row(name: str, counts: Sequence[int | None]) -> dict[str, Any]:
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
        "task": DEFAULT if head is None else head.task,
        "params_m": None if counts[0] is None else round(counts[0] / 1e6, 2),
        "macs_g": None if counts[1] is None else round(counts[1] / 1e9, 3),
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
        macs = "" if r["macs_g"] is None else f"{r['macs_g']:.3g}"
        numbers = (f"{r['params_m']:.2f}", macs, str(r["image_size"]))
        table.add_row(r["name"], *numbers, strides_of(r), top1)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    tasks = ", ".join(dict.fromkeys(r["task"] for r in rows))
    dense = any(r["task"] != DEFAULT for r in rows)
    counts = f"counts with a dense head are for {DENSE_CLASSES} classes; " if dense else ""
    print(f"{len(rows)} models; task {tasks}; {counts}vitrail train --model NAME trains one")
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


def strides_of(r: dict[str, Any]) -> str:
    return ", ".join(f"{s:g}" for s in r["strides"])
