"""The exception for what a person can put right: a wrong file, name, option or combination."""

from collections.abc import Iterable


class InputError(ValueError):
    """Says what was given, what was expected and what to do next.

    The command line prints the message alone and exits with code 2; from Python it is a ValueError.
    Anything else that escapes is a defect of ours and keeps its traceback.
    """


class ImageError(InputError):
    """An image that cannot be used: `name`, as messages call it, and its `problem`, such as "is empty"."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)  # both, so that it comes out of another process whole
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"{self.name} {self.problem}"


class NewerVersion(InputError):
    """A file that a later version wrote, which this one cannot read."""


class NotFinite(InputError):
    """A model's scores are NaN or infinite: its weights are damaged, or its training diverged."""


def listed(items: Iterable[str], separator: str = ", ", limit: int = 10) -> str:
    """The items of a message: the first few of many, and how many there are in all."""
    items = list(items)
    more = f"{separator}... ({len(items)} in all)" if len(items) > limit else ""
    return separator.join(map(str, items[:limit])) + more
