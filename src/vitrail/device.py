"""Where a model runs."""

from typing import TYPE_CHECKING

from vitrail_runtime.errors import InputError

if TYPE_CHECKING:
    import torch


def choose_device(name: "str | torch.device" = "auto") -> "torch.device":
    """The device of that name; "auto" is a GPU where torch sees one, else the CPU.

    Raises InputError where there is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        if found != torch.device("cuda"):  # of several processes each takes its own GPU
            torch.empty(1, device=found)
        elif not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        reason = str(error).splitlines()[0]
        raise InputError(
            f"cannot use device {str(name)!r} ({reason}); here are: {', '.join(have)}; auto chooses"
        ) from None
    return found
