"""Memory that does not suffice, told as what was asked for and what asks for less."""

from collections.abc import Iterator
from contextlib import contextmanager

from vitrail_runtime.errors import InputError

# Only CUDA's allocator has a class of its own, and even there libraries below it fail in their own words.
SIGNS = (
    "out of memory",  # CUDA
    "alloc_failed",  # cuBLAS, cuDNN
    "can't allocate memory",  # the CPU's allocator on Linux
    "cannot allocate memory",  # what workers share with the run
    "not enough memory",  # on macOS
    "calculation overflowed",  # more bytes than 64 bits count
    "multiplication overflow",
)


def ran_out(error: BaseException) -> bool:
    """Whether an allocation failed: of a GPU, of torch on the CPU, or of Python, NumPy and Pillow."""
    if isinstance(error, MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in said for sign in SIGNS)


def does_not_fit(what: str, error: BaseException, less: str) -> InputError:
    """The InputError for memory that `what` needs and that is not there; `less` says what needs less."""
    lines = str(error).splitlines() or [type(error).__name__]
    line = next((line for line in lines if ran_out(RuntimeError(line))), lines[0])
    reason = line.partition(" err == 0. ")[2] or line  # behind the line of torch's source
    return InputError(f"not enough memory for {what} ({reason.strip()[:200]}); {less}")


@contextmanager
def enough_memory(what: str, less: str) -> Iterator[None]:
    """Turn a failed allocation inside into an InputError. Every other error passes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise does_not_fit(what, error, less) from error
