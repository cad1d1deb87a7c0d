"""The exception for what a person can put right: a wrong file, name, option or combination."""


class InputError(ValueError):
    """Says what was given, what was expected and what to do next.

    The command line prints the message alone and exits with code 2; from Python it is a ValueError.
    Anything else that escapes is a defect of ours and keeps its traceback.
    """


class NotFinite(InputError):
    """A model's scores are NaN or infinite: its weights are damaged, or its training diverged."""
