"""The PatchGAN discriminator (paper section A4)."""

from torch import Tensor, nn
from torch.nn import functional as F


class DownBlock(nn.Module):
    """norm, LReLU, conv, twice, the second with `stride`; the 1x1 skip is resized to fit."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(self.norm1(x), 0.2))
        h = self.conv2(F.leaky_relu(self.norm2(h), 0.2))
        skip = F.interpolate(x, size=h.shape[2:], mode="bilinear") if h.shape != x.shape else x
        return h + self.skip(skip)


class Discriminator(nn.Module):
    """Images (B, 3, h, w) -> patch scores (B, 1, h', w'): all blocks but the last halve the resolution."""

    def __init__(self, channels: list[int], groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, stride=2, padding=1)
        last = len(channels) - 2
        self.blocks = nn.ModuleList(
            DownBlock(a, b, stride=1 if i == last else 2, groups=groups)
            for i, (a, b) in enumerate(zip(channels, channels[1:]))
        )
        self.conv_out = nn.Conv2d(channels[-1], 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv_in(x), 0.2)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(x)
