"""A compact convolutional U-Net for images of huge dynamic range.

Pixel-unshuffle stem (factor 2: a quarter of the cost at the same receptive field), residual blocks with noise-level
modulation, no attention, so that it is translation-equivariant up to the stride and runs on any size divisible by
`2 · 2^(levels − 1)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffinv.core.checks import ShapeError


class NoiseEmbedding(nn.Module):
    """Fourier features of the noise coordinate (B,) followed by a two-layer perceptron: (B, width)."""

    def __init__(self, width: int, frequencies: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 ** torch.linspace(-3, 3, frequencies), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, noise: Tensor) -> Tensor:
        phase = 2 * math.pi * noise[:, None] * self.frequencies.to(noise.dtype)
        return self.layers(torch.cat([phase.sin(), phase.cos()], 1))


class ResidualBlock(nn.Module):
    """h + conv(SiLU(norm(conv(SiLU(norm(h)))·(1 + a) + b))), with a, b from the noise embedding."""

    def __init__(self, channels_in: int, channels: int, embedding: int, groups: int = 8) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, 1)
        inner = self.conv1(functional.silu(self.norm1(h)))
        inner = self.conv2(functional.silu(self.norm2(inner) * (1 + scale) + shift))
        return self.skip(h) + inner


class UNet(nn.Module):
    """(B, channels_in, H, W), noise (B,) → (B, channels_out, H, W).

    Arguments:
        channels_in, channels_out: of the image. widths: channels a level, coarser by 2 each. blocks: residual blocks a
        level. factor: of the pixel-unshuffle stem.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, widths: Sequence[int], blocks: Sequence[int], factor: int = 2
    ) -> None:
        super().__init__()
        self.factor = factor
        self.divisor = factor * 2 ** (len(widths) - 1)
        width = 4 * widths[0]
        self.embedding = NoiseEmbedding(width)
        self.stem = nn.Conv2d(channels_in * factor**2, widths[0], 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for level, (channels, count) in enumerate(zip(widths, blocks, strict=True)):
            self.down.append(nn.ModuleList(ResidualBlock(channels, channels, width) for _ in range(count)))
            if level + 1 < len(widths):
                self.shrink.append(nn.Conv2d(channels, widths[level + 1], 2, stride=2))
        self.grow, self.up = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths) - 1)):
            self.grow.append(nn.Conv2d(widths[level + 1], 4 * widths[level], 1))
            self.up.append(nn.ModuleList(ResidualBlock(widths[level], widths[level], width) for _ in range(blocks[level])))
        self.head_norm = nn.GroupNorm(8, widths[0])
        self.head = nn.Conv2d(widths[0], channels_out * factor**2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        if x.shape[-1] % self.divisor or x.shape[-2] % self.divisor:
            raise ShapeError(f"UNet: the image {tuple(x.shape[-2:])} must be divisible by {self.divisor}; pad it.")
        embedding = self.embedding(noise)
        h = self.stem(functional.pixel_unshuffle(x, self.factor))
        skips = []
        for level, stage in enumerate(self.down):
            for block in stage:
                h = block(h, embedding)
            if level < len(self.shrink):
                skips.append(h)
                h = self.shrink[level](h)
        for grow, stage in zip(self.grow, self.up, strict=True):
            h = functional.pixel_shuffle(grow(h), 2) + skips.pop()
            for block in stage:
                h = block(h, embedding)
        return functional.pixel_shuffle(self.head(functional.silu(self.head_norm(h))), self.factor)
