"""Settings that are known to work: functions without arguments that return a TrainConfig.

A docstring tells the command, the cost and the expected score with its source.
"""

from collections.abc import Callable

from vitrail.recipes.digits import digits
from vitrail.registry import unknown
from vitrail.train.config import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {"digits": digits}


def recipe_config(name: str) -> TrainConfig:
    """The settings of a recipe. Raises InputError with the closest names for an unknown one."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()
