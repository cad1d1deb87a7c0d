"""Memory that does not suffice: what is taken for it, and how it is told."""

import pytest
import torch

from vitrail.memory import does_not_fit, enough_memory, ran_out
from vitrail_runtime.errors import InputError

CPU = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError(CPU), True),
        (RuntimeError("unable to mmap 96 bytes: Cannot allocate memory (12)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"), True),
        (RuntimeError("numel: integer multiplication overflow"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (OSError(12, "Cannot allocate memory"), False),
    ],
)
def test_failed_allocations_are_told_from_other_errors(error, expected):
    assert ran_out(error) is expected


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(CPU), "DefaultCPUAllocator: can't allocate memory: you tried"),
        (RuntimeError("worker 1 died\n CUDA out of memory. \nmore"), "CUDA out of memory."),
        (RuntimeError("out of memory" + "!" * 300), "out of memory" + "!" * 187),
        (MemoryError(), "MemoryError"),
        (MemoryError("no room for (9, 9)\nseen in frame 3"), "no room for (9, 9)"),
    ],
)
def test_the_message_has_what_was_asked_for_the_reason_and_what_needs_less(error, reason):
    told = does_not_fit("a batch", error, "take half")
    assert isinstance(told, InputError)
    assert str(told) == f"not enough memory for a batch ({reason}); take half"


def test_only_a_failed_allocation_becomes_an_input_error():
    with (
        pytest.raises(InputError, match=r"^not enough memory for it \(.*\); less$") as told,
        enough_memory("it", "less"),
    ):
        torch.empty(2**58)
    assert isinstance(told.value.__cause__, RuntimeError)
    for error in (RuntimeError("of another kind"), KeyError("k")):
        with pytest.raises(type(error)) as passed, enough_memory("it", "less"):
            raise error
        assert passed.value is error
