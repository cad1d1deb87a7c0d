"""Recognising whose keys a checkpoint has, and loading it with an account of every key."""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrail.registry import BackboneEntry, Layout, backbone_entry, list_backbones, unknown
from vitrail.weights.described import class_list
from vitrail.weights.files import Checkpoint, read_checkpoint
from vitrail.weights.traced import Traced, trace, traced
from vitrail_runtime.errors import InputError, listed

# BatchNorm counts its batches, but with a momentum nothing reads the count.
COUNTERS = "*.num_batches_tracked"
# Whole numbers and 8-bit floats are quantised weights: they mean nothing without their scales.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OURS = Layout(convert=lambda state, config: dict(state), marks=())


@dataclass(frozen=True)
class Report:
    """What became of every key when weights were loaded.

    used: our keys that were filled. left: the file's keys that were not needed. new: our keys that kept
    their initial values. dropped_head: keys of the class layer that was not taken since the file's
    number of classes (classes[0]) is not the model's (classes[1]). resampled: our tables that were
    brought to the model's image size, with both shapes. Without a layout nothing was loaded.
    """

    source: str
    layout: str
    used: tuple[str, ...]
    left: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    dropped_head: tuple[str, ...] = ()
    classes: tuple[int, int] | None = None
    resampled: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        used = f": layout {self.layout!r}, {len(self.used)} keys used" if self.layout else ""
        lines = [self.source + used]
        lines += [f"  {note}" for note in self.notes]
        if self.dropped_head and self.classes:
            lines.append(
                f"  head dropped: the file has {self.classes[0]} classes, the model "
                f"{self.classes[1]} ({listed(self.dropped_head)})"
            )
        lines += [f"  resampled {table}" for table in self.resampled]
        for what, keys in (("left in the file", self.left), ("new in the model", self.new)):
            if keys:
                lines.append(f"  {what} ({len(keys)}): {listed(keys)}")
        return "\n".join(lines)


@dataclass
class Fit:
    """A checkpoint laid beside a model by one layout: what would be loaded, and what speaks against it."""

    layout: str
    state: dict[str, Tensor]  # our keys, values ready to copy
    matched: int = 0  # keys of the model that the file has by name
    left: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped_head: list[str] = field(default_factory=list)
    classes: tuple[int, int] | None = None
    resampled: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # ours that the file lacks, and may not
    extra: list[str] = field(default_factory=list)  # the file's that must not be left
    shapes: list[str] = field(default_factory=list)  # "key: (...) in the model, (...) in the file"
    notes: list[str] = field(default_factory=list)
    failure: str = ""  # why the key map could not be applied at all

    @property
    def problems(self) -> int:
        return len(self.missing) + len(self.extra) + len(self.shapes) + bool(self.failure)


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Any] | Checkpoint,
    entry: BackboneEntry,
    *,
    config: Any,
    layout: str | None = None,
) -> Report:
    """Fill `model` (a bare backbone, or a classifier) from a checkpoint, and say what became of each key.

    The layout is recognised from the keys unless it is named. The report is also kept as
    `model.weights_report`. Raises InputError, with the model untouched, when a key of the model is
    missing, one of the file is left over, or a shape differs, beyond what the layout allows; the
    message says which registered model the file looks like.
    """
    checkpoint = read_checkpoint(source)
    own = model.state_dict()
    # The parts of a classifier are "backbone" and "head"; a backbone has other names at the top.
    whole = all(key.startswith(("backbone.", "head.")) for key in own)
    said = compare_classes(model, checkpoint, whole)
    wanted = own if whole else {f"backbone.{key}": value for key, value in own.items()}
    best = best_fit(checkpoint.state, wanted, entry, config, layout)
    if best is None:
        raise InputError(_unrecognised(checkpoint, wanted, entry))
    if best.problems:
        raise InputError(_does_not_fit(checkpoint, wanted, entry, best))
    if any(value.is_meta for value in own.values()):
        raise InputError(
            f"{entry.name} stands on the meta device and cannot take weights; build it on the CPU"
        )
    ready = best.state if whole else {k.removeprefix("backbone."): v for k, v in best.state.items()}
    with torch.no_grad():
        for key, value in ready.items():
            own[key].copy_(value)  # casts to the model's dtype and device
    report = Report(
        source=checkpoint.source,
        layout=best.layout,
        used=tuple(best.state),
        left=tuple(best.left),
        new=tuple(best.new),
        dropped_head=tuple(best.dropped_head),
        classes=best.classes,
        resampled=tuple(best.resampled),
        notes=(*checkpoint.notes, *best.notes, *said),
    )
    model.weights_report = report  # pyright: ignore[reportArgumentType] (no tensor, by design)
    return report


def best_fit(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    entry: BackboneEntry,
    config: Any,
    layout: str | None = None,
) -> Fit | None:
    """The layout that fits with the fewest problems; None when no layout is recognised.

    wanted: the model's state in classifier keys. layout: only this one.
    """

    def all_fits(keys: Mapping[str, Tensor]) -> list[Fit]:
        names = candidates(keys, wanted, entry, layout)
        return [lay_beside(keys, wanted, entry, name, config) for name in names]

    fits = all_fits(state)
    part = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    rest = [k for k in state if not k.startswith("backbone.")]
    # Detectors and self-supervised teachers keep a backbone among other parts, in its own layout.
    if part and all(f.problems for f in fits) and not any(k.startswith("head.") for k in rest):
        for fit in all_fits(part):
            fit.left += rest
            fit.notes.append(f"took the part 'backbone.' of the file, {len(part)} keys")
            fits.append(fit)
    return min(fits, key=lambda fit: fit.problems, default=None)


def candidates(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    entry: BackboneEntry,
    layout: str | None = None,
) -> list[str]:
    """Names of the layouts that a state may be in, our own first: "vitrail", or keys of entry.layouts."""
    known = ["vitrail", *entry.layouts]
    if layout is not None:
        if layout not in known:
            raise unknown(f"layout of {entry.name}", layout, known)
        return [layout]
    marked = [n for n, known in entry.layouts.items() if known.marks and _marked(state, known)]
    if all(k.startswith(("backbone.", "head.")) for k in state) and any(k in wanted for k in state):
        return ["vitrail", *marked]
    # A backbone saved alone has our names without "backbone."; other people's files may look so too,
    # and their map knows better what the values mean.
    if not marked and any(f"backbone.{key}" in wanted for key in state):
        return ["vitrail"]
    return marked


def _marked(state: Mapping[str, Tensor], layout: Layout) -> bool:
    return all(_has(state, mark) for mark in layout.marks)


def _has(state: Mapping[str, Tensor], mark: str) -> bool:
    if mark.endswith("*"):
        return any(key.startswith(mark[:-1]) for key in state)
    return mark in state


def lay_beside(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    entry: BackboneEntry,
    name: str,
    config: Any,
) -> Fit:
    """Apply a layout's key map and compare with the model's keys and shapes (`wanted`, our keys)."""
    layout = OURS if name == "vitrail" else entry.layouts[name]
    whole = any(key.startswith("head.") for key in wanted)
    fit = Fit(name, {})
    theirs: dict[str, Tensor] = {key: trace(key, value) for key, value in state.items()}
    if name == "vitrail" and not any(key.startswith("backbone.") for key in state):
        theirs = {f"backbone.{key}": value for key, value in theirs.items()}
    try:
        converted = layout.convert(theirs, config)
        before = {key: tuple(value.shape) for key, value in converted.items()}
        if entry.resample is not None:
            converted = entry.resample(converted, config)
    except Exception as error:  # a key map fed with another model's weights fails in its own ways
        fit.failure = f"{type(error).__name__}: {error}"
        fit.extra = sorted(state)
        return fit
    reached = _take(fit, converted, before, wanted)
    if whole:
        _drop_head(fit, converted, wanted)
    _find_new(fit, converted, wanted, layout)
    heads = _sources(v for k, v in converted.items() if k.startswith("head."))
    for key in state:
        if key not in reached:
            fine = matches(key, (*layout.may_leave, COUNTERS)) or (not whole and key in heads)
            (fit.left if fine else fit.extra).append(key)
    return fit


def _take(
    fit: Fit,
    converted: Mapping[str, Tensor],
    before: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, Tensor],
) -> frozenset[str]:
    """Take what has the model's key and shape, and note what does not. -> keys of the file that arrived.

    before: shapes as the key map left them, by which what was resampled since is known.
    """
    arrived = {key: value for key, value in converted.items() if key in wanted}
    for key, value in arrived.items():
        fit.matched += 1
        mine, theirs = tuple(wanted[key].shape), tuple(value.shape)
        if value.dtype not in FLOATS and wanted[key].is_floating_point():
            kinds = f"{wanted[key].dtype} in the model, {value.dtype} in the file"
            fit.shapes.append(f"{key}: {kinds}".replace("torch.", ""))
        elif theirs != mine:
            fit.shapes.append(f"{key}: {mine} in the model, {theirs} in the file")
        else:
            fit.state[key] = value.as_subclass(Tensor)
            if before.get(key, theirs) != theirs:
                fit.resampled.append(f"{key} from {before[key]} to {theirs}")
            elif isinstance(value, Traced) and value.resampled:
                fit.resampled.append(f"{key} {theirs}, to another grid of as many places")
    return _sources(arrived.values())


def _find_new(
    fit: Fit, converted: Mapping[str, Tensor], wanted: Mapping[str, Tensor], layout: Layout
) -> None:
    """Sort the model's keys that the file does not have into those that may be new and the missing."""
    head_in_file = any(key.startswith("head.") for key in converted)
    for key in wanted:
        if key in converted or key in fit.dropped_head:
            continue
        allowed = matches(key, (*layout.may_be_new, COUNTERS))
        # A file without any head (self-supervised weights) leaves the model's as it was initialised.
        if allowed or (key.startswith("head.") and not head_in_file):
            fit.new.append(key)
        else:
            fit.missing.append(key)


def _sources(values: Iterable[Tensor]) -> frozenset[str]:
    """The keys of the file that tensors were made from."""
    return frozenset().union(*(t.origin for t in traced(list(values))))


def _drop_head(fit: Fit, converted: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Pass over the class layer when the number of classes differs, and only then; what else the head has (a
    hidden layer, a norm) is kept."""
    heads = [key for key in wanted if key.startswith("head.") and key in converted]
    differ = [key for key in heads if converted[key].shape != wanted[key].shape]
    fit.dropped_head, fit.classes = other_classes(wanted, converted, differ)
    fit.shapes = [line for line in fit.shapes if line.split(":")[0] not in fit.dropped_head]


def other_classes(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    differ: list[str],
    rows: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[list[str], tuple[int, int] | None]:
    """`differ` and (classes given, own classes), where all these keys differ in their first axis alone and by
    the same two numbers; else nothing.

    rows: layer's name -> (rows of a class, rows beside them), where that is not (1, 0); (0, 0): its rows are
        no classes, and it is none of these keys.
    """
    counts, layers = set(), rows or {}
    of = {k: layers.get(k.split(".")[-2], (1, 0)) if "." in k else (1, 0) for k in differ}
    differ = [key for key in differ if of[key] != (0, 0)]
    for key in differ:
        each, beside = of[key]
        counts.add(tuple((n - beside) / each for n in (*given[key].shape[:1], *own[key].shape[:1])))
    if len(counts) != 1 or any(given[k].shape[1:] != own[k].shape[1:] for k in differ):
        return [], None
    (pair,) = counts
    if len(pair) != 2 or not all(n.is_integer() for n in pair):
        return [], None
    return differ, (int(pair[0]), int(pair[1]))


def matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def compare_classes(model: nn.Module, checkpoint: Checkpoint, whole: bool) -> list[str]:
    """Compare the class names that the file's config.json gives with the model's, where they are as many.

    Other names are an error: the head would answer with the wrong words. A model whose classes are only
    numbered takes the head; the note that is returned says what the file calls them.
    """
    theirs, mine = class_list(checkpoint.config), getattr(model, "classes", None)
    if not whole or theirs is None or not mine or len(theirs) != len(mine):
        return []
    if tuple(mine) == tuple(map(str, range(len(mine)))):
        same = tuple(mine) == theirs
        return (
            [] if same else [f"the file calls its {len(theirs)} classes {listed(theirs, limit=3)}"]
        )
    if [_plain(name) for name in mine] != [_plain(name) for name in theirs]:
        raise InputError(
            f"{checkpoint.source} was trained for the {len(theirs)} classes {listed(theirs)}, but the "
            f"model has the {len(mine)} classes {listed(mine)}; pass the same classes in the same order, or "
            "take the backbone alone with weights={'backbone': ...}"
        )
    return []


def _plain(name: str) -> str:
    """ImageNet's "tench, Tinca tinca" and "tench" are one class."""
    return name.split(",")[0].strip().casefold()


def _unrecognised(
    checkpoint: Checkpoint, wanted: Mapping[str, Tensor], entry: BackboneEntry
) -> str:
    known = ", ".join(["vitrail", *entry.layouts])
    return (
        f"{checkpoint.source} holds {len(checkpoint.state)} tensors in no layout that {entry.name} knows "
        f"({known}); its keys are {listed(sorted(checkpoint.state))}, the model's are "
        f"{listed(sorted(wanted))}{_looks_like(checkpoint.state, entry)}"
    )


def _does_not_fit(
    checkpoint: Checkpoint, wanted: Mapping[str, Tensor], entry: BackboneEntry, fit: Fit
) -> str:
    why = (
        f"its keys cannot be translated ({fit.failure})"
        if fit.failure
        else f"of the model's {len(wanted)} keys {fit.matched} are in the file, {len(fit.state)} of them in "
        "the right shape"
    )
    lines = [
        f"{checkpoint.source} does not fit {entry.name} (read as layout {fit.layout!r}): {why}"
    ]
    for what, items in (
        ("shapes differ", fit.shapes),
        ("in the model, not in the file", fit.missing),
        ("in the file, not in the model", fit.extra),
    ):
        if items:
            separator = "; " if items is fit.shapes else ", "
            lines.append(f"  {what} ({len(items)}): {listed(items, separator)}")
    return "\n".join(lines) + _looks_like(checkpoint.state, entry)


def _looks_like(state: Mapping[str, Tensor], entry: BackboneEntry) -> str:
    names = [name for name, _ in look_alikes(state, entry.family) if name != entry.name]
    return f"\nthese weights look like {' or '.join(names[:3])}" if names else ""


def look_alikes(state: Mapping[str, Tensor], family: str | None = None) -> list[tuple[str, str]]:
    """(model, layout) of the registered variants whose backbone a state covers exactly.

    family: tried first; others are only tried when none of it fits. Where tables would have to be
    resampled, only those that need the least of it. Shapes only, on `meta`.
    """
    shapes = {key: value.to("meta") for key, value in state.items()}
    families: dict[str, list[str]] = {}
    for name in list_backbones():
        families.setdefault(backbone_entry(name).family, []).append(name)
    first = [families.pop(family)] if family in families else []
    for group in (first, list(families.values())):
        fits: list[tuple[str, Fit]] = []
        for names in group:
            found = _laid_beside(shapes, names[0])
            # A family whose first variant knows no layout of these keys has no variant that does.
            if found is not None:
                fits += [(names[0], found)]
                fits += [(n, f) for n in names[1:] if (f := _laid_beside(shapes, n)) is not None]
        # One that starts from these weights and brings parts of its own is not what they are of.
        fits = [
            (name, fit)
            for name, fit in fits
            if not fit.problems and all(matches(key, (COUNTERS,)) for key in fit.new)
        ]
        if fits:
            least = min(len(fit.resampled) for _, fit in fits)
            return [(name, fit.layout) for name, fit in fits if len(fit.resampled) == least]
    return []


class Uninitialised(TorchFunctionMode):
    """Within it torch.nn.init does nothing: on `meta` that is most of the time that building takes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _laid_beside(shapes: Mapping[str, Tensor], name: str) -> Fit | None:
    """The best fit of these shapes to the backbone of a registered name."""
    entry = backbone_entry(name)
    with torch.device("meta"), Uninitialised():
        own = entry.cls(entry.config).state_dict()
    wanted = {f"backbone.{key}": value for key, value in own.items()}
    return best_fit(shapes, wanted, entry, entry.config)
