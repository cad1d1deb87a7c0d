"""What the processes of test_contrastive.py run."""

import torch

from vitrail.ops.contrastive import sigmoid_pairs, softmax_pairs

F64 = torch.float64


def pairs(number=7, dim=5, dtype=F64):
    """(images, texts, scale, bias), as leaves."""
    generator = torch.Generator().manual_seed(0)
    towers = torch.randn(2, number, dim, generator=generator, dtype=F64)
    images, texts = torch.nn.functional.normalize(towers, dim=-1).to(dtype)
    numbers = [torch.tensor([value], dtype=dtype) for value in (9.0, -1.5)]
    return [x.clone().requires_grad_() for x in (images, texts, *numbers)]


def loss_of(form, given, **how):
    images, texts, scale, bias = given
    if form == "softmax":
        return softmax_pairs(images, texts, scale, **how)
    return sigmoid_pairs(images, texts, scale, bias, **how)


def found(form, given, factor=1.0, autocast=False, **how):
    """The loss and its gradient by images, texts, scale and (sigmoid alone) bias."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(form, given, **how)
    leaves = given[: 3 if form == "softmax" else 4]
    return [loss.detach(), *torch.autograd.grad(factor * loss, leaves)]


def of_rank(rank, first, store, out):
    """This process's share of the pairs: the first so many, or the others."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    images, texts, scale, bias = pairs()
    mine = slice(first) if rank == 0 else slice(first, None)
    leaves = [x.detach().clone().requires_grad_() for x in (images[mine], texts[mine], scale, bias)]
    answers, own = (
        {
            (form, how): found(form, leaves, factor=3.0, implementation=how, chunk=2, alone=alone)
            for form in ("softmax", "sigmoid")
            for how in ("plain", "chunked")
        }
        for alone in (False, True)
    )
    torch.save((answers, own), f"{out}-{rank}")
    torch.distributed.destroy_process_group()
