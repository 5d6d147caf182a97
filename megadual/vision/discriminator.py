"""The PatchGAN discriminator (paper section A4)."""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


class DownBlock(nn.Module):
    """norm, LReLU and a strided 3x3 convolution, beside a 1x1 skip that is resized to fit."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(F.leaky_relu(self.norm(x), 0.2))
        skip = F.interpolate(x, size=h.shape[2:], mode="bilinear") if h.shape[2:] != x.shape[2:] else x
        return h + self.skip(skip)


class Discriminator(nn.Module):
    """Images (B, 3, h, w) -> patch scores (B, 1, h', w'): all blocks but the last halve the resolution."""

    def __init__(self, channels: list[int], groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, stride=2, padding=1)
        pairs = list(pairwise(channels))
        self.blocks = nn.ModuleList(
            DownBlock(a, b, stride=1 if i == len(pairs) - 1 else 2, groups=groups) for i, (a, b) in enumerate(pairs)
        )
        self.conv_out = nn.Conv2d(channels[-1], 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv_in(x), 0.2)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(x)
