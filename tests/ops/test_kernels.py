"""The Triton kernels against the plain form: by Triton's interpreter on the CPU, compiled on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from tests.ops.kernel_cases import CASES, draw, outcome
from vitrail.ops.ms_deform_attn import ms_deform_attn
from vitrail_runtime.errors import InputError

pytest.importorskip("triton")


def assert_equal_up_to_rounding(got, inputs, shapes):
    """One rounding of the output, or of its gradient, beside what float32 leaves of a point's place."""
    exact = outcome([t.double().cpu() for t in inputs], shapes, "plain")
    eps = max(torch.finfo(inputs[0].dtype).eps, 16 * torch.finfo(torch.float32).eps)
    for ours, truth, like in zip(got, exact, [inputs[0], *inputs], strict=True):
        assert ours.dtype == like.dtype
        assert (ours.double().cpu() - truth).abs().max() <= eps * truth.abs().max()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    file = tmp_path_factory.mktemp("kernels") / "outcomes.pt"
    command = [sys.executable, "-m", "tests.ops.kernel_cases", str(file)]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(file)


@pytest.mark.parametrize("name", CASES)
def test_triton_matches_plain_in_output_and_every_gradient(interpreted, name):
    assert_equal_up_to_rounding(interpreted[name], draw(name), CASES[name][0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_match_plain_in_output_and_every_gradient(name):
    inputs = [t.cuda() for t in draw(name)]
    got = outcome(inputs, CASES[name][0], "auto")
    assert_equal_up_to_rounding(got, inputs, CASES[name][0])


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float64, r"takes no torch.float64; pass implementation='plain'"),
        (torch.float32, "runs on CUDA, and value is on cpu; pass implementation='auto'"),
    ],
)
def test_kernels_refuse_what_they_cannot_do(dtype, message):
    inputs = [t.to(dtype) for t in draw("two_blocks")]
    with pytest.raises(InputError, match=message):
        ms_deform_attn(inputs[0], [(4, 3)], *inputs[1:], implementation="triton")
