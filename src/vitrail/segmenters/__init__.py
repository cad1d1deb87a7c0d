"""Semantic segmentation: backbone + dense head. One file per paper; `segmenter.py` holds what they share."""
