"""Checkpoints: safe reading and atomic writing (files), hub repositories (hub), recognising a layout and
loading with a report (layouts; parts, for heads), where released weights live (catalogue) and fetching them
by the model's name (pretrained)."""

from vitrail.weights.files import (
    Checkpoint,
    digest_of,
    read_checkpoint,
    read_metadata,
    read_state,
    write_state,
    write_text,
)
from vitrail.weights.hub import Unavailable
from vitrail.weights.layouts import Report, load_weights
from vitrail.weights.parts import check_part, joined
from vitrail.weights.pretrained import OR_RANDOM, RELEASED_WEIGHTS, read_pretrained

__all__ = [
    "OR_RANDOM",
    "RELEASED_WEIGHTS",
    "Checkpoint",
    "Report",
    "Unavailable",
    "check_part",
    "digest_of",
    "joined",
    "load_weights",
    "read_checkpoint",
    "read_metadata",
    "read_pretrained",
    "read_state",
    "write_state",
    "write_text",
]
