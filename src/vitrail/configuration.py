"""Frozen dataclasses to plain data and back. One reader for YAML files, config.json and recipes."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from vitrail.registry import unknown
from vitrail_runtime.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance  # exists for type checkers alone

T = TypeVar("T", bound="DataclassInstance")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as JSON-ready data: tuples become lists, nested dataclasses dicts."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(cls: type[T], data: Mapping[str, Any], *, where: str = "") -> T:
    """A `cls` from plain data. Lists become tuples where the field says so.

    Raises InputError for an unknown key (with the closest one), a missing one, or a value of the
    wrong type, naming `where` it stood.
    """
    where = where or cls.__name__
    if not isinstance(data, Mapping):
        raise InputError(
            f"{where} must be a mapping of keys to values, but is {type(data).__name__}"
        )
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in data:
        if key not in known:
            raise unknown(f"key in {where}", str(key), known)
    missing = [
        name
        for name, f in known.items()
        if name not in data
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{where} lacks {', '.join(map(repr, missing))}")
    return cls(**{k: _value(hints[k], v, f"{where}.{k}") for k, v in data.items()})


def check_choices(config: Any, *, where: str) -> None:
    """Raise InputError where a field of the dataclass holds none of the words that its type lists."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is typing.Literal:
            _value(hint, getattr(config, name), f"{where}.{name}")


class Range(NamedTuple):
    """The numbers that make sense: from `low` to `high`, both included unless `above` or `below` is set."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    hint: str = ""  # what to give instead

    def holds(self, value: float) -> bool:
        if math.isinf(value):
            return False
        if value == self.low:
            return not self.above
        return self.low < value < self.high or (value == self.high and not self.below)

    def __str__(self) -> str:
        low = f"above {self.low}" if self.above else f"at least {self.low}"
        if self.high == math.inf:
            return low
        return f"{low} and " + (f"below {self.high}" if self.below else f"at most {self.high}")


def check_ranges(config: Any, ranges: Mapping[str, Range]) -> None:
    """Raise InputError where a number of the dataclass lies outside its range. None is outside of none."""
    for name, allowed in ranges.items():
        value = getattr(config, name)
        if value is not None and not allowed.holds(value):  # so is NaN refused
            hint = allowed.hint or ("give a finite number" if math.isinf(value) else "")
            hint = f" ({hint})" if hint else ""
            raise InputError(f"{name} must be {allowed}, but is {value}{hint}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for arg in args:
            if arg is not type(None):
                try:
                    return _value(arg, value, where)
                except InputError as error:
                    errors.append(str(error))
        raise InputError(errors[0])
    if origin is typing.Literal:
        if value not in args:
            raise InputError(f"{where} is {value!r}, but must be one of {list(args)}")
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where=where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} is {value!r}, but must be a list")
        if args[-1] is Ellipsis:
            return tuple(_value(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(args) != len(value):
            raise InputError(f"{where} has {len(value)} entries, but must have {len(args)}")
        return tuple(
            _value(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} is {value!r}, but must be a list")
        return [_value(args[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {value!r}, but must be a mapping of keys to values")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            raise InputError(f"{where} is {value!r}, but must be a number") from None
    if isinstance(hint, type) and (
        not isinstance(value, hint) or (hint is int and isinstance(value, bool))
    ):
        raise InputError(f"{where} is {value!r}, but must be {hint.__name__}")
    return value
