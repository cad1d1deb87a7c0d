"""Dataclasses to plain data and back: one reader, and errors that name the place."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml

from vitrail.configuration import check_choices, from_dict, to_dict
from vitrail_runtime.errors import InputError


@dataclass(frozen=True)
class Inner:
    scale: tuple[float, float] = (0.1, 1.0)


@dataclass(frozen=True)
class Config:
    name: str
    steps: int = 3
    rate: float = 1e-3
    mode: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    size: int | tuple[int, int] = 224
    limit: float | None = None
    inner: Inner = Inner()
    extra: dict[str, Any] = field(default_factory=dict)


def test_what_goes_through_yaml_comes_back_equal():
    config = Config("x", 5, 0.5, "b", (1, 2), (3, 4), None, Inner((0.2, 0.3)), {"depth": 2})
    again = from_dict(Config, yaml.safe_load(yaml.safe_dump(to_dict(config))))
    assert again == config
    assert isinstance(again.sizes, tuple)


def test_a_number_that_yaml_reads_as_text_is_a_number():
    assert from_dict(Config, yaml.safe_load("{name: x, rate: 1e-4}")).rate == 1e-4
    assert from_dict(Config, {"name": "x", "rate": 2}).rate == 2.0


@dataclass(frozen=True)
class Wider:
    names: list[str] = field(default_factory=list)
    inner: Inner | None = None
    pairs: tuple[tuple[int, int], ...] = ()
    flag: bool = False
    facts: dict[str, int] = field(default_factory=dict)
    made: int = field(default=7, init=False)


def test_nested_and_optional_values_are_read_and_written_as_plain_data():
    wider = Wider(["a", "b"], Inner((0.5, 1.0)), ((1, 2), (3, 4)), True)
    plain = to_dict(wider)
    assert plain == {
        "names": ["a", "b"],
        "inner": {"scale": [0.5, 1.0]},
        "pairs": [[1, 2], [3, 4]],
        "flag": True,
        "facts": {},
        "made": 7,
    }
    del plain["made"]
    assert from_dict(Wider, plain) == wider
    assert from_dict(Wider, {"inner": None}).inner is None
    assert from_dict(Wider, {"pairs": [[1, 2]]}).pairs == ((1, 2),)
    given = {"a": {"b": (1, 2)}}
    assert to_dict(Config("x", extra=given))["extra"] == {"a": {"b": [1, 2]}}


@dataclass(frozen=True)
class Chosen:
    mode: Literal["a", "b"] = "a"
    count: int = 1


def test_a_word_that_is_none_of_the_choices_is_named_also_without_a_file():
    check_choices(Chosen("b", count=2), where="it")
    with pytest.raises(InputError, match=r"it\.mode is 'z', but must be one of \['a', 'b'\]"):
        check_choices(Chosen("z"), where="it")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"made": 3}, "unknown key in Wider 'made'"),
        ({"names": "a"}, "Wider.names is 'a', but must be a list"),
        ({"names": ["a", 3]}, r"Wider.names\[1\] is 3, but must be str"),
        ({"inner": 3}, "Wider.inner must be a mapping"),
        ({"pairs": [[1, 2], [3, "x"]]}, r"Wider.pairs\[1\]\[1\] is 'x', but must be int"),
        ({"pairs": [[1, 2, 3]]}, r"Wider.pairs\[0\] has 3 entries, but must have 2"),
        ({"flag": 1}, "Wider.flag is 1, but must be bool"),
        ({"names": None}, "Wider.names is None, but must be a list"),
        ({"facts": 3}, "Wider.facts is 3, but must be a mapping of keys to values"),
    ],
)
def test_what_is_wrong_deep_inside_is_named_with_its_place(given, words):
    with pytest.raises(InputError, match=words):
        from_dict(Wider, given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "x", "step": 1}, "unknown key in Config 'step'; did you mean 'steps'"),
        ({}, "Config lacks 'name'"),
        ({"name": "x", "steps": "many"}, "Config.steps is 'many', but must be int"),
        ({"name": "x", "steps": True}, "Config.steps is True"),
        ({"name": "x", "mode": "c"}, r"Config.mode is 'c', but must be one of \['a', 'b'\]"),
        ({"name": "x", "sizes": 3}, "Config.sizes is 3, but must be a list"),
        ({"name": "x", "inner": {"scale": [1]}}, "Config.inner.scale has 1 entries"),
        ({"name": "x", "inner": {"scales": [1, 2]}}, "unknown key in Config.inner 'scales'"),
        ({"name": "x", "rate": "fast"}, "Config.rate is 'fast', but must be a number"),
        ({"name": "x", "rate": True}, "Config.rate is True, but must be float"),
        ({"name": "x", "steps": 2.0}, "Config.steps is 2.0, but must be int"),
        ({"name": "x", "size": [1, "b"]}, r"Config.size is \[1, 'b'\], but must be int"),
        ({"name": None}, "Config.name is None, but must be str"),
        ([1], "must be a mapping"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(given, words):
    with pytest.raises(InputError, match=words):
        from_dict(Config, given)
