"""What is learnt from images: one file a task, and what its report says (`section.py`)."""
