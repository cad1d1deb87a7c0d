"""Checkpoints: safe reading and atomic writing (files), hub repositories (hub), recognising a layout and
loading with a report (layouts), and where released weights live (catalogue)."""

from vitrail.weights.files import digest_of, read_metadata, read_state, write_state, write_text
from vitrail.weights.layouts import Report, load_weights

__all__ = [
    "Report",
    "digest_of",
    "load_weights",
    "read_metadata",
    "read_state",
    "write_state",
    "write_text",
]
