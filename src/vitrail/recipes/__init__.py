"""Settings that are known to work: functions without arguments that return a TrainConfig.

A docstring tells the command, the cost and the expected score with its source.
"""

from collections.abc import Callable

from vitrail.recipes.cifar10 import cifar10_efficientvit_m0, cifar10_vit_tiny
from vitrail.recipes.deit import deit_small, deit_tiny
from vitrail.recipes.digits import digits
from vitrail.recipes.efficientvit import (
    efficientvit_m0,
    efficientvit_m1,
    efficientvit_m2,
    efficientvit_m3,
    efficientvit_m4,
    efficientvit_m5,
)
from vitrail.recipes.finetune import finetune_small
from vitrail.registry import unknown
from vitrail.train.config import TrainConfig

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        finetune_small,
        digits,
        cifar10_efficientvit_m0,
        cifar10_vit_tiny,
        deit_tiny,
        deit_small,
        efficientvit_m0,
        efficientvit_m1,
        efficientvit_m2,
        efficientvit_m3,
        efficientvit_m4,
        efficientvit_m5,
    )
}


def recipe_config(name: str) -> TrainConfig:
    """The settings of a recipe. Raises InputError with the closest names for an unknown one."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()
