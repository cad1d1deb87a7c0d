"""Kernels for CUDA; each is tested against the plain form of the function that it serves."""
