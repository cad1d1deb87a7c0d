"""What runs a vitrail model without PyTorch: preprocessing, predictions, finishing."""

from vitrail_runtime.decoding import decode, read_size
from vitrail_runtime.errors import ImageError, InputError, NewerVersion
from vitrail_runtime.finish import (
    FINISH,
    finish_classification,
    finish_detection,
    finish_panoptic,
    finish_segmentation,
)
from vitrail_runtime.pictures import find_pictures
from vitrail_runtime.prediction import Prediction
from vitrail_runtime.preprocess import (
    Geometry,
    Preprocessing,
    decode_size,
    prepare,
    preprocessed_size,
)

__all__ = [
    "FINISH",
    "Geometry",
    "ImageError",
    "InputError",
    "NewerVersion",
    "Prediction",
    "Preprocessing",
    "decode",
    "decode_size",
    "find_pictures",
    "finish_classification",
    "finish_detection",
    "finish_panoptic",
    "finish_segmentation",
    "prepare",
    "preprocessed_size",
    "read_size",
]
