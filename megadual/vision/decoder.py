"""The convolutional decoder: PostQuantResnetBlock and a VQGAN decoder (paper section A1).

Feature maps are (B, channels, rows, columns).
"""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, twice, beside a skip; `first_kernel=1` makes it the PostQuantResnetBlock."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, first_kernel: int = 3):
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, first_kernel, padding=first_kernel // 2)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """One-head self-attention over the positions of a feature map."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where `attend`; all but the finest level upsample."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, attend: bool, upsample: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels, groups) for _ in range(blocks if attend else 0))
        self.upsample = Upsample(out_channels) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample(x)


class Decoder(nn.Module):
    """(B, in_channels, latent, latent) -> (B, 3, image, image), image = latent * 2^(levels - 1); not clamped.

    `multipliers` lists the levels' widths finest first; the coarsest one runs first.
    """

    def __init__(
        self,
        latent: int,
        in_channels: int,
        channels: int,
        multipliers: list[int],
        res_blocks: int,
        attention: list[int],
        groups: int,
    ):
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        coarsest = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList(
            Level(
                in_channels=widths[min(level + 1, coarsest)],
                out_channels=width,
                blocks=res_blocks + 1,
                groups=groups,
                attend=latent * 2 ** (coarsest - level) in attention,
                upsample=level > 0,
            )
            for level, width in enumerate(widths)
        )
        self.norm_out = group_norm(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        # torch's default shrinks the signal at every convolution, which slows the start of training.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.conv_out.weight, std=0.01)  # start from a flat grey image

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
