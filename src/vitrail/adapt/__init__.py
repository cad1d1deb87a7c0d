"""What of a model is trained: all of it, or a part on top of what stays as it is."""
