"""Dataclasses to plain data and back: one reader, and errors that name the place."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml

from vitrail.configuration import from_dict, to_dict
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
        ([1], "must be a mapping"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(given, words):
    with pytest.raises(InputError, match=words):
        from_dict(Config, given)
