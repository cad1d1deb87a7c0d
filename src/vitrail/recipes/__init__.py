"""Settings with a source: functions without arguments that return a TrainConfig.

digits, cifar10_* and finetune_small are ours and were run here (docs/results.md). The others are what papers
and official scripts say for ImageNet; none of these was trained here, and the scores that they tell are the
authors'. A docstring tells the command, the cost, the expected score with its source, and what differs from
the source. Every such function of a file here is a recipe of its name.
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
