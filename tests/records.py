"""The dataclasses of a package that can be altered in place."""

import dataclasses
import importlib
import inspect
import pkgutil
from types import ModuleType


def unfrozen(package: ModuleType) -> set[str]:
    found = set()
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for name, item in vars(importlib.import_module(info.name)).items():
            own = inspect.isclass(item) and item.__module__ == info.name
            if own and dataclasses.is_dataclass(item) and not item.__dataclass_params__.frozen:
                found.add(name)
    return found
