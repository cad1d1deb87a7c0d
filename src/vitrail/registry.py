"""Name -> (class, config, key layouts). A duplicate raises; an unknown name lists the closest."""

import difflib
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

Tensors = dict[str, Any]  # key -> tensor


@dataclass(frozen=True)
class Layout:
    """One foreign key layout of a family's released files.

    convert: (foreign state, config) -> state of our classifier, keys "backbone.*" and "head.*"; pure, by
        torch operations (which is how the report knows what each of our tensors was made from). A key
        that it does not know is handed on under "backbone.", so that it is named when it does not fit.
    marks: keys that together only this layout has; a trailing "*" matches any ending.
    may_leave: patterns (fnmatch) of foreign keys that may stay unused: index buffers, unused heads.
    may_be_new: patterns of our keys that may keep their initial values.
    source: where such files come from, for `vitrail models` and docs/models.md.
    """

    convert: Callable[[Tensors, Any], Tensors]
    marks: tuple[str, ...]
    may_leave: tuple[str, ...] = ()
    may_be_new: tuple[str, ...] = ()
    source: str = ""


def rename_keys(
    state: Tensors, rules: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
) -> Tensors:
    """Every key rewritten by regular expressions (pattern, replacement), one after another: the common
    case of a key map. Keys that no rule knows keep their names and are reported by the loader."""
    out = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        out[key] = value
    return out


@dataclass(frozen=True, kw_only=True)
class BackboneEntry:
    """All that the rest of the house knows about one registered backbone name."""

    name: str
    family: str  # the class's name in lower case: what the tiny config is filed under
    cls: type[Any]  # called with a config
    config: Any
    tail: Callable[..., Any] | None  # (config, feature_specs, num_classes); None: the pooled head
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    resample: Callable[[Tensors, Any], Tensors] | None = None  # see register_backbone
    preprocessing: Preprocessing = Preprocessing()
    dense: Mapping[str, Any] = field(default_factory=dict)  # config fields under a dense head


_ENTRIES: dict[str, BackboneEntry] = {}
_TINY: dict[str, BackboneEntry] = {}
_STUDIES: list[tuple[type[Any], type[Any]]] = []  # (config of a family, the study's)


def register_backbone(
    cls: type[Any],
    variants: Mapping[str, Any],
    *,
    tiny: Any,
    layouts: Mapping[str, Layout] | None = None,
    tail: Callable[..., Any] | None = None,
    resample: Callable[[Tensors, Any], Tensors] | None = None,
    preprocessing: Preprocessing | Mapping[str, Preprocessing] = Preprocessing(),
    dense: Mapping[str, Any] | None = None,
) -> None:
    """File a family: its class, its variants (name -> config) and what goes with them.

    tiny: a config of depth 1-2 and width 32-64 with every feature on, for the contract suite.
    tail: the paper's own classifier tail, called as tail(config, feature_specs, num_classes).
    resample: (state in our keys, config) -> the same with its position tables brought to the grid of
        `config.image_size`; pure. Applied after every key map, our own files included.
    preprocessing: one for all variants, or name -> one.
    dense: config fields that differ where a dense head reads the maps, such as norms on them.
    """
    family = cls.__name__.lower()
    if family in _TINY:
        raise ValueError(f"a backbone family {family!r} is registered already")

    def entry(name: str, config: Any) -> BackboneEntry:
        pre = preprocessing if isinstance(preprocessing, Preprocessing) else preprocessing.get(name)
        return BackboneEntry(
            name=name,
            family=family,
            cls=cls,
            config=config,
            tail=tail,
            layouts=layouts or {},
            resample=resample,
            preprocessing=pre or Preprocessing(),
            dense=dense or {},
        )

    for name, config in variants.items():
        if name in _ENTRIES:
            raise ValueError(
                f"backbone {name!r} is registered already, by {_ENTRIES[name].family!r}"
            )
        _ENTRIES[name] = entry(name, config)
    _TINY[family] = entry(f"tiny_{family}", tiny)


def register_study(cls: type[Any], config: type[Any], *, tiny: Any) -> None:
    """Let a registered family be built with fields that another paper adds, in order to study it.

    cls: the family's class; those whose configs inherit from its take the fields too. config: a dataclass
    that inherits from the family's, with a default for each field of its own. tiny: as in register_backbone.
    """
    plain = _TINY[cls.__name__.lower()]
    _STUDIES.append((type(plain.config), config))
    family = config.__name__.lower().removesuffix("config")
    _TINY[family] = replace(plain, name=f"tiny_{family}", family=family, config=tiny)


def config_class(kind: type[Any], given: Iterable[str]) -> type[Any]:
    """The class of a config that has the fields given: `kind`, or one that studies add to it."""
    for base, study in _STUDIES:
        added = _names(study) - _names(kind)
        if issubclass(kind, base) and not added.isdisjoint(given):
            kind = _extended(kind, study)
    return kind


@functools.cache  # configs of equal fields are equal only where their class is the same
def _extended(kind: type[Any], study: type[Any]) -> type[Any]:
    if issubclass(study, kind):
        return study
    both = type(f"{study.__name__}{kind.__name__}", (study, kind), {})
    return dataclass(frozen=True, kw_only=True)(both)


def _names(kind: type[Any]) -> set[str]:
    return {f.name for f in fields(kind)}


def list_backbones(pattern: str = "*") -> list[str]:
    """Registered names that match a shell pattern, sorted."""
    return sorted(n for n in _ENTRIES if fnmatch.fnmatchcase(n, pattern))


def backbone_entry(name: str) -> BackboneEntry:
    """The entry of a registered name. Raises InputError with the closest names otherwise."""
    if name not in _ENTRIES:
        raise unknown("model", name, _ENTRIES)
    return _ENTRIES[name]


def tiny_entries() -> dict[str, BackboneEntry]:
    """Family -> its smallest test entry, for the contract suite."""
    return dict(_TINY)


def with_fields(name: str, config: Any, given: Mapping[str, Any]) -> Any:
    """`config` with some fields replaced. Raises InputError for a field that it does not have."""
    kind = config_class(type(config), given)
    known = _names(kind)
    for key in given:
        if key == "image_size" and key not in known:
            raise InputError(
                f"{name} has no image_size: it takes images of any size as it is. What it is shown is a "
                "matter of the preprocessing"
            )
        if key not in known:
            studied = [_names(study) for base, study in _STUDIES if isinstance(config, base)]
            raise unknown(f"config field of {name}", key, known.union(*studied))
    return kind(**({f.name: getattr(config, f.name) for f in fields(config)} | dict(given)))


def unknown(what: str, given: str, known: Iterable[str]) -> InputError:
    """The error for a name that does not exist, with the closest that do."""
    known = list(known)
    # Case is no reason to miss: compare in lower case, show the real spelling.
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(given.lower(), by_lower, n=3, cutoff=0.5)
    if close:
        hint = "did you mean " + " or ".join(repr(by_lower[c]) for c in close) + "?"
    elif not known:
        hint = "there is none"
    else:
        shown = ", ".join(sorted(known)[:12])
        hint = f"known: {shown}" + (", ..." if len(known) > 12 else "")
    return InputError(f"unknown {what} {given!r}; {hint}")
