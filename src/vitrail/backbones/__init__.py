"""One file per paper, and the key maps that the ViTs share. Importing the package registers all backbones."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
