"""Settings that are known to work: functions without arguments that return a TrainConfig.

A docstring tells the command, the cost and the expected score with its source.
"""

from collections.abc import Callable

from vitrail.recipes.cifar10 import cifar10_efficientvit_m0, cifar10_vit_tiny
from vitrail.recipes.cmt import cmt_b, cmt_s, cmt_ti, cmt_xs
from vitrail.recipes.deepvit import deepvit_16b, deepvit_24b, deepvit_32b, deepvit_l, deepvit_s
from vitrail.recipes.deit import deit_small, deit_tiny
from vitrail.recipes.digits import digits
from vitrail.recipes.efficientnet import efficientnet_b0
from vitrail.recipes.efficientvit import (
    efficientvit_m0,
    efficientvit_m1,
    efficientvit_m2,
    efficientvit_m3,
    efficientvit_m4,
    efficientvit_m5,
)
from vitrail.recipes.finetune import finetune_small
from vitrail.recipes.mobilenetv3 import mobilenetv3_large
from vitrail.recipes.mobilevit import mobilevit_s, mobilevit_xs, mobilevit_xxs
from vitrail.recipes.mobilevitv2 import (
    mobilevitv2_050,
    mobilevitv2_075,
    mobilevitv2_100,
    mobilevitv2_125,
    mobilevitv2_150,
    mobilevitv2_175,
    mobilevitv2_200,
)
from vitrail.recipes.swin import swin_base, swin_small, swin_tiny
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
        deepvit_s,
        deepvit_l,
        deepvit_16b,
        deepvit_24b,
        deepvit_32b,
        cmt_ti,
        cmt_xs,
        cmt_s,
        cmt_b,
        swin_tiny,
        swin_small,
        swin_base,
        mobilevit_xxs,
        mobilevit_xs,
        mobilevit_s,
        mobilevitv2_050,
        mobilevitv2_075,
        mobilevitv2_100,
        mobilevitv2_125,
        mobilevitv2_150,
        mobilevitv2_175,
        mobilevitv2_200,
        mobilenetv3_large,
        efficientnet_b0,
    )
}


def recipe_config(name: str) -> TrainConfig:
    """The settings of a recipe. Raises InputError with the closest names for an unknown one."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()
