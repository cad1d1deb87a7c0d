"""Loading one part of a model, such as its head: the names must be ours, the account is the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrail.weights.files import Checkpoint
from vitrail.weights.layouts import COUNTERS, Report, compare_classes, matches, other_classes
from vitrail_runtime.errors import InputError, listed


@dataclass(frozen=True)
class Ready:
    """A checked part of a checkpoint, which `fill` puts into the model."""

    own: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    report: Report

    def fill(self) -> Report:
        with torch.no_grad():
            for key, value in self.values.items():
                self.own[key].copy_(value)
        return self.report


def check_part(model: nn.Module, parts: Sequence[str], checkpoint: Checkpoint) -> Ready:
    """What of parts of a model, top-level modules by name, a checkpoint in our names would fill.

    A file of one part may name its keys without it. Class layers of another number of classes are passed
    over, and said. Raises InputError where a key is missing or a shape differs.
    """
    prefixes = tuple(f"{part}." for part in parts)
    own = {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)}
    given = checkpoint.state
    if len(parts) == 1 and not any(k.startswith(prefixes) for k in given):
        given = {prefixes[0] + key: value for key, value in given.items()}
    # A part that the file lacks altogether, such as an auxiliary head, may stay as it is.
    there = tuple(p for p in prefixes if any(k.startswith(p) for k in given))
    missing = [k for k in own if k.startswith(there) and k not in given]
    missing = [k for k in missing if not matches(k, (COUNTERS,))]
    both = [k for k in own if k in given]
    differ = [k for k in both if own[k].shape != given[k].shape]
    dropped, classes = other_classes(own, given, differ, getattr(model, "class_rows", None))
    problems = [f"{k}: missing in the file" for k in missing]
    problems += [
        f"{k}: {tuple(own[k].shape)} in the model, {tuple(given[k].shape)} in the file"
        for k in differ
        if k not in dropped
    ]
    if problems or not there:
        raise InputError(
            f"{checkpoint.source} does not fit the {' and '.join(parts)} of the model, "
            f"{len(problems) or 'all'} of {len(own)} keys differ:\n  "
            + "\n  ".join(problems[:10] or [f"the file has {listed(given, limit=5)}"])
        )
    used = [k for k in both if k not in dropped]
    left = [k for k in given if k not in own]
    report = Report(
        source=checkpoint.source,
        layout="vitrail",
        used=tuple(used),
        left=tuple(left),
        new=tuple(k for k in own if k not in given),
        dropped_head=tuple(dropped),
        classes=classes,
        notes=(*checkpoint.notes, *compare_classes(model, checkpoint, not dropped)),
    )
    return Ready(own, {k: given[k] for k in used}, report)


def joined(reports: Sequence[Report]) -> Report:
    """One account of several parts."""

    def all_of(field: str) -> tuple[str, ...]:
        return tuple(x for report in reports for x in getattr(report, field))

    return Report(
        source=", ".join(dict.fromkeys(report.source for report in reports)),
        layout=", ".join(dict.fromkeys(report.layout for report in reports)),
        used=all_of("used"),
        left=all_of("left"),
        new=all_of("new"),
        dropped_head=all_of("dropped_head"),
        classes=next((r.classes for r in reports if r.classes), None),
        resampled=all_of("resampled"),
        notes=tuple(dict.fromkeys(all_of("notes"))),
    )
