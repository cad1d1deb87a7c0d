"""Deformable convolution (Dai et al., ICCV 2017, https://arxiv.org/abs/1703.06211) and its modulated form
(Zhu et al., "Deformable ConvNets v2", CVPR 2019, https://arxiv.org/abs/1811.11168).

A convolution reads a fixed grid around each place. Here a second convolution says, for every place and every
tap of the kernel, how far from the grid to read, bilinearly (v1), and by what factor from 0 to 1 to weigh
what is read (v2).

It starts from zero offsets: v1 is then the plain convolution. The factor of v2 is a sigmoid, as in the paper
and in mmdetection, so it starts at one half and the output, less the bias, at half the plain convolution's.
"""

import torch
from torch import Tensor, nn


class DeformConv2d(nn.Conv2d):
    """(B, C, H, W) -> (B, out, H', W') as `nn.Conv2d`; zeros are read outside. Keys are those of mmdetection:
    `weight`, `bias` and those of `conv_offset`.

    The second paper trains `conv_offset` at a tenth of the learning rate.

    modulated: v2, else v1. offset_groups: each such group of input channels has its own offsets and factors.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        modulated: bool = True,
        offset_groups: int = 1,
    ) -> None:
        grid = (stride, padding, dilation)
        super().__init__(in_channels, out_channels, kernel_size, *grid, groups, bias)
        self.modulated = modulated
        # (group, tap, (y, x)), then (group, tap) for the factors
        numbers = (3 if modulated else 2) * offset_groups * kernel_size**2
        self.conv_offset = nn.Conv2d(in_channels, numbers, kernel_size, *grid)
        self.pairs = ((stride, stride), (padding, padding), (dilation, dilation))
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        from torchvision.ops import deform_conv2d  # takes seconds to import

        # Places and sums in float32 at least, as in `ops.ms_deform_attn`.
        dtype = torch.promote_types(input.dtype, torch.float32)
        moves = self.conv_offset(input).to(dtype)
        mask = None
        if self.modulated:
            offsets = moves.shape[1] // 3 * 2
            moves, mask = moves[:, :offsets], moves[:, offsets:].sigmoid()
        out = deform_conv2d(
            input.to(dtype),
            moves,
            self.weight.to(dtype),
            None if self.bias is None else self.bias.to(dtype),
            *self.pairs,
            mask=mask,
        )
        return out.to(input.dtype)
