"""RoIAlign on a CPU, as bags of rows, against torchvision's operator."""

import pytest
import torch
import torchvision

from vitrail.ops.roi_align import roi_align

F64 = torch.float64


def boxes_of(number=40):
    """Inside, across every border, far outside, without width or height, and much longer than wide."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(number, 2, generator=generator, dtype=F64) * torch.tensor([80, 60]) - 8
    boxes = torch.cat((corner, corner + torch.rand(number, 2, generator=generator) * 50), 1)
    odd = [[5.0, 5, 5, 30], [5, 5, 30, 5], [-90, -90, -50, -60], [300, 9, 340, 20], [1, 1, 67, 6]]
    odd += [[0, 0, 68, 52], [-4, 8, 12, 16]]  # to the last pixel; samples at -1 exactly
    return torch.cat((boxes, torch.tensor(odd, dtype=F64)))


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("samples", [0, 1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradient_equal_torchvisions(samples, aligned, size, layout):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 13, 17, generator=generator, dtype=F64)
    x = x.contiguous(memory_format=layout).requires_grad_()
    boxes = boxes_of()
    image = torch.randint(0, 3, (len(boxes),), generator=generator)
    how = {"scale": 0.25, "samples": samples, "aligned": aligned}
    got = roi_align(x, boxes, image, size, **how)
    rois = torch.cat((image[:, None].to(F64), boxes), 1)
    want = torchvision.ops.roi_align(x, rois, size, 0.25, samples, aligned)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    along = torch.randn(got.shape, generator=generator, dtype=F64)
    (mine,), (other,) = (torch.autograd.grad(y, x, along) for y in (got, want))
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_no_boxes_are_answered_by_no_rows_and_a_gradient_of_zero():
    x = torch.randn(2, 5, 4, 6, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    out = roi_align(x, torch.zeros(0, 4), none, 7, scale=0.5, samples=2, aligned=False)
    assert out.shape == (0, 5, 7, 7)
    out.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_a_box_that_is_no_number_reads_no_memory_of_others():
    x = torch.ones(1, 2, 4, 6)
    boxes = torch.tensor([[torch.nan] * 4, [0.0, 0, 4, 4]])
    out = roi_align(x, boxes, torch.zeros(2).long(), 2, scale=1.0, samples=0, aligned=False)
    assert (out[1] == 1).all()


def test_a_compiled_graph_takes_the_operator_itself(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torchvision.ops, "roi_align", lambda *given: given)
    x, boxes = torch.zeros(1, 2, 4, 6), torch.tensor([[0.0, 1, 2, 3]])
    given = roi_align(x, boxes, torch.tensor([0]), 7, scale=0.5, samples=2, aligned=True)
    assert given[0] is x
    assert given[1].tolist() == [[0, 0, 1, 2, 3]]
    assert given[2:] == (7, 0.5, 2, True)
