"""Settings for every test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "vitrail", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("vitrail")
