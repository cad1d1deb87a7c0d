"""Functions with more than one implementation. The plain one is the definition that the others are tested
against; `triton/` holds kernels only."""
