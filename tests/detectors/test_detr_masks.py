"""DETR's mask head, against transformers' with carried-over weights, and its losses."""

import pytest
import torch
from torch import nn
from transformers.loss.loss_for_object_detection import dice_loss, sigmoid_focal_loss
from transformers.models.detr.modeling_detr import DetrMaskHeadSmallConv, DetrMHAttentionMap

from tests.parity import assert_close_to_peer
from vitrail.detectors.detr_masks import AttentionMaps, MaskHead, from_transformers, mask_losses
from vitrail_runtime.errors import InputError

DIM, HEADS, FPN = 32, 8, (12, 10, 6)


class Peer(nn.Module):
    def __init__(self):
        super().__init__()
        self.bbox_attention = DetrMHAttentionMap(DIM, HEADS)
        self.mask_head = DetrMaskHeadSmallConv(DIM + HEADS, list(FPN), DIM)


def both():
    torch.manual_seed(0)
    peer = Peer()
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = nn.Module()
    ours.bbox_attention, ours.mask_head = AttentionMaps(DIM, HEADS), MaskHead(DIM, HEADS, FPN)
    peer, ours = peer.double().eval(), ours.double()
    ours.load_state_dict(from_transformers(peer.state_dict()))
    return peer, ours


def inputs():
    generator = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).double()

    fpn = [rand(2, c, h, w) for c, h, w in zip(FPN, (7, 13, 26), (9, 17, 33), strict=True)]
    return rand(2, 5, DIM), rand(2, DIM, 4, 5), rand(2, DIM, 4, 5), fpn


@pytest.mark.parametrize("padded", [False, True])
def test_masks_equal_transformers_with_carried_over_weights(padded):
    (peer, ours), (queries, memory, x, fpn) = both(), inputs()
    pad_mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    if padded:
        pad_mask[1, :, 3:] = pad_mask[1, 3] = True
    added = torch.zeros(2, 1, 1, 4, 5).double().masked_fill(pad_mask[:, None, None], -1e300)
    with torch.no_grad():
        maps = peer.bbox_attention(queries, memory, attention_mask=added)
        want = peer.mask_head(x, maps, fpn).unflatten(0, (2, 5))[:, :, 0]
        image = torch.arange(2).repeat_interleave(5)
        mask = pad_mask if padded else None
        own = ours.bbox_attention(queries.flatten(0, 1), image, memory, mask)
        assert_close_to_peer(own, maps.flatten(0, 1))
        got = ours.mask_head(x, own, image, fpn)
        assert_close_to_peer(got, want.flatten(0, 1))
        # Some queries alone, in another order.
        image, query = torch.tensor([1, 0, 1]), torch.tensor([4, 2, 0])
        own = ours.bbox_attention(queries[image, query], image, memory, mask)
        assert_close_to_peer(ours.mask_head(x, own, image, fpn), want[image, query])


def test_no_query_gives_no_mask_and_no_loss():
    _, ours = both()
    queries, memory, x, fpn = inputs()
    none = torch.zeros(0, dtype=torch.long)
    maps = ours.bbox_attention(queries[0, :0], none, memory)
    got = ours.mask_head(x, maps, none, fpn)
    assert got.shape == (0, 26, 33)
    losses = mask_losses(got, torch.zeros(0, 50, 60))
    assert [loss.item() for loss in losses] == [0, 0]
    sum(losses).backward()


def test_losses_equal_transformers_at_the_size_of_the_masks():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 6, 7, generator=generator).double().requires_grad_()
    masks = torch.rand(3, 11, 15, generator=generator) > 0.7
    large = nn.functional.interpolate(logits[:, None], (11, 15), mode="bilinear").flatten(1)
    wanted = masks.flatten(1).double()
    want = [loss(large, wanted, 1) for loss in (sigmoid_focal_loss, dice_loss)]
    got = mask_losses(logits, masks)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (mine, other)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-15)


def test_16_bit_logits_are_reckoned_in_float32():
    logits = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    masks = torch.ones(2, 8, 8, dtype=torch.bool)
    for mine, other in zip(
        mask_losses(logits, masks), mask_losses(logits.float(), masks), strict=True
    ):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, other)


@pytest.mark.parametrize("sizes", [(40, 8, (4, 4, 4)), (32, 6, (4, 4, 4)), (32, 8, (4, 4))])
def test_a_head_that_cannot_be_is_refused(sizes):
    with pytest.raises(InputError, match="takes three finer maps, a dim that is a multiple of 16"):
        MaskHead(*sizes)


def test_weights_are_drawn_as_in_the_official_code():
    torch.manual_seed(0)
    head, maps = MaskHead(256, 8, (1024, 512, 256)), AttentionMaps(256, 8)
    bounds = {head.lay1: (3 / (264 * 9)) ** 0.5, head.adapter2: (3 / 512) ** 0.5}
    for layer, bound in bounds.items():
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert not layer.bias.any()
    assert maps.q_linear.weight.abs().max().item() == pytest.approx((6 / 512) ** 0.5, rel=0.01)
    assert not maps.k_linear.bias.any()
