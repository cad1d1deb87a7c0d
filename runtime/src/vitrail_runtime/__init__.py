"""What runs a vitrail model without PyTorch: preprocessing, predictions, finishing."""

from vitrail_runtime.errors import InputError
from vitrail_runtime.finish import finish_classification
from vitrail_runtime.prediction import Prediction
from vitrail_runtime.preprocess import Geometry, Preprocessing, decode, prepare, read_size

__all__ = [
    "Geometry",
    "InputError",
    "Prediction",
    "Preprocessing",
    "decode",
    "finish_classification",
    "prepare",
    "read_size",
]
