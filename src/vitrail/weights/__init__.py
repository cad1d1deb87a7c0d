"""Checkpoints: safe reading and atomic writing (files), hub repositories (hub), recognising a layout and
loading with a report (layouts; parts, for heads), and where released weights live (catalogue)."""

from vitrail.weights.files import (
    digest_of,
    read_checkpoint,
    read_metadata,
    read_state,
    write_state,
    write_text,
)
from vitrail.weights.layouts import Report, load_weights
from vitrail.weights.parts import check_part, joined, load_part

__all__ = [
    "Report",
    "check_part",
    "digest_of",
    "joined",
    "load_part",
    "load_weights",
    "read_checkpoint",
    "read_metadata",
    "read_state",
    "write_state",
    "write_text",
]
