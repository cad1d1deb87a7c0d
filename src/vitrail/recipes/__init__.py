"""Settings that are known to work: functions without arguments that return a TrainConfig.

A docstring tells the command, the cost and the expected score with its source. Every such function of a file
here is a recipe of its name.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator

from vitrail.registry import unknown
from vitrail.train.config import TrainConfig


def _recipes() -> Iterator[tuple[str, Callable[[], TrainConfig]]]:
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__
            if own and not inspect.signature(function).parameters:
                yield name, function


RECIPES: dict[str, Callable[[], TrainConfig]] = dict(_recipes())


def recipe_config(name: str) -> TrainConfig:
    """The settings of a recipe. Raises InputError with the closest names for an unknown one."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()
