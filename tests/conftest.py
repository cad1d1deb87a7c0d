"""Settings for every test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "vitrail", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("vitrail")

# What some files compare with, and `make test-lowest` goes without: it asks for newer versions of
# huggingface_hub and safetensors than the lowest that vitrail takes.
ORACLE = "transformers"


class Module(pytest.Module):
    """A test file; one that begins with the import of the oracle is passed over where that is not installed,
    as by `pytest.importorskip`, which would have to stand above the other imports."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            why = error.__cause__
            if isinstance(why, ModuleNotFoundError) and (why.name or "").split(".")[0] == ORACLE:
                pytest.skip(f"{ORACLE} is not installed", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path, parent):
    return Module.from_parent(parent, path=module_path)
