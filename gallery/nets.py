"""Architectures written by hand, with the knobs that the zoo turns: the healthy and the sick share them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Initialise = Callable[[Tensor], Tensor]


def scaled_normal(gain: float) -> Initialise:
    """N(0, gain^2 / fan_in); gain sqrt(2) is He's for ReLU."""
    return lambda w: nn.init.normal_(w, std=gain / math.sqrt(w[0].numel()))


def orthogonal(gain: float) -> Initialise:
    return lambda w: nn.init.orthogonal_(w, gain)


HE = scaled_normal(math.sqrt(2))


def initialised(model: nn.Module, weights: Initialise) -> nn.Module:
    """Draw every linear and convolution weight anew and set their biases to zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weights(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def mlp(
    activation: Callable[[], nn.Module], depth: int, width: int, weights: Initialise | None
) -> nn.Sequential:
    """64 inputs, `depth` hidden layers, 10 logits. Without `weights`, what nn.Linear does."""
    layers: list[nn.Module] = []
    for fan_in in [64] + [width] * (depth - 1):
        layers += [nn.Linear(fan_in, width), activation()]
    hidden = nn.Sequential(*layers)
    if weights is not None:
        initialised(hidden, weights)
    return hidden.append(nn.Linear(width, 10))


def without_head(model: nn.Sequential) -> nn.Sequential:
    """All but the last layer."""
    return cast(nn.Sequential, model[:-1])


@dataclass(frozen=True)
class Shape:
    """What a transformer built here looks like."""

    layers: int
    width: int = 64
    heads: int = 4
    norm: str = "pre"
    """'pre', 'post', 'deep' (DeepNorm) or 'none'."""
    residual: bool = True
    branch: float = 1.0
    """Factor on each branch before it joins the stream."""
    eps: float = 1e-5
    gain: float = 1.0
    """Factor on the Xavier initialisation of all linear layers."""
    vocabulary: int = 64
    norm_bias: bool = True


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query_key_value = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.query_key_value(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class FeedForward(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(nn.Module):
    """One transformer block in any of the common arrangements of norm and skip."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(shape.width)
        normed = shape.norm != "none"
        self.norm_1 = nn.LayerNorm(shape.width, eps=shape.eps) if normed else nn.Identity()
        self.norm_2 = nn.LayerNorm(shape.width, eps=shape.eps) if normed else nn.Identity()
        self.skip = (2 * shape.layers) ** 0.25 if shape.norm == "deep" else 1.0

    def forward(self, x: Tensor) -> Tensor:
        for norm, branch in ((self.norm_1, self.attention), (self.norm_2, self.feed_forward)):
            x = self._join(x, norm, branch)
        return x

    def _join(self, x: Tensor, norm: nn.Module, branch: nn.Module) -> Tensor:
        if not self.shape.residual:
            return branch(norm(x)) if self.shape.norm == "pre" else norm(branch(x))
        if self.shape.norm in ("pre", "none"):
            return x + self.shape.branch * branch(norm(x))
        return norm(self.skip * x + self.shape.branch * branch(x))


class Transformer(nn.Module):
    """A decoder language model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Parameter(0.1 * torch.randn(64, shape.width))
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width) if shape.norm == "pre" else nn.Identity()
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        initialised(self.blocks, lambda w: nn.init.xavier_normal_(w, shape.gain))
        if shape.norm == "deep":
            self._deep(shape)

    def _deep(self, shape: Shape) -> None:
        """DeepNorm scales value, output and feed-forward weights by (8N)^-1/4 (arXiv 2203.00555, figure 2)."""
        beta = (8 * shape.layers) ** -0.25
        with torch.no_grad():
            for block in self.blocks:
                assert isinstance(block, Block)
                block.attention.query_key_value.weight[2 * shape.width :] *= beta
                for linear in (block.attention.out, block.feed_forward[0], block.feed_forward[2]):
                    linear.weight *= beta

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Residual(nn.Module):
    """x + scale * branch(x); `scale` is a parameter, one number or one per feature."""

    def __init__(self, branch: nn.Module, scale: Tensor | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.scale = nn.Parameter(scale) if scale is not None else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return x + y if self.scale is None else x + self.scale * y


def residual_mlp(
    blocks: int, width: int, scale: Tensor, activation: Callable[[], nn.Module]
) -> nn.Sequential:
    """Residual blocks of two linear layers with a learned scale on the branch: ReZero (0), LayerScale (small)."""
    body = [
        Residual(nn.Sequential(nn.Linear(width, width), activation(), nn.Linear(width, width)), scale.clone())
        for _ in range(blocks)
    ]
    return nn.Sequential(nn.Linear(64, width), *body, nn.Linear(width, 10))


class Transposed(nn.Module):
    """Apply a module to the two last dimensions swapped."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mT).mT


class Mean(nn.Module):
    """Mean over one dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dim)


def mixer(blocks: int, patches: int, width: int) -> nn.Sequential:
    """MLP-Mixer (arXiv 2105.01601) over inputs of shape (batch, patches, 48)."""

    def mix(size: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    layers: list[nn.Module] = [nn.Linear(48, width)]
    for _ in range(blocks):
        layers.append(Residual(nn.Sequential(nn.LayerNorm(width), Transposed(mix(patches)))))
        layers.append(Residual(nn.Sequential(nn.LayerNorm(width), mix(width))))
    return nn.Sequential(*layers, nn.LayerNorm(width), Mean(1), nn.Linear(width, 10))


def convolution(
    fan_in: int, fan_out: int, normalised: bool = True, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """3x3 convolution, batch normalisation if asked for, activation."""
    layers: list[nn.Module] = [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=not normalised)]
    if normalised:
        layers.append(nn.BatchNorm2d(fan_out))
    return nn.Sequential(*layers, activation())


def vgg(stages: tuple[int, ...], channels: int, inputs: int = 3, normalised: bool = True) -> nn.Sequential:
    """VGG: stages of 3x3 convolutions between max-pools, doubling the channels."""
    layers: list[nn.Module] = []
    fan_in = inputs
    for stage, repeats in enumerate(stages):
        fan_out = channels * 2**stage
        for _ in range(repeats):
            layers.append(convolution(fan_in, fan_out, normalised))
            fan_in = fan_out
        layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(fan_in, 10)]
    return nn.Sequential(*layers)


def plain_cnn(depth: int, channels: int, normalised: bool, inputs: int = 1) -> nn.Sequential:
    """`depth` 3x3 convolutions at full resolution, no skips."""
    layers = [convolution(inputs, channels, normalised)]
    layers += [convolution(channels, channels, normalised) for _ in range(depth - 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class GatedConvolution(nn.Module):
    """A block of WaveNet (arXiv 1609.03499): x + out(tanh(filter) * sigmoid(gate)), both of dilated causal convolutions."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.filter = nn.Conv1d(channels, channels, 2, dilation=dilation)
        self.gate = nn.Conv1d(channels, channels, 2, dilation=dilation)
        self.out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        past = functional.pad(x, (self.dilation, 0))
        return x + self.out(torch.tanh(self.filter(past)) * torch.sigmoid(self.gate(past)))


class WaveNet(nn.Module):
    """Tokens to logits of the next, by gated convolutions dilated 1, 2, 4, 1, 2, 4 …"""

    def __init__(self, blocks: int, channels: int = 32, vocabulary: int = 16) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, channels)
        self.blocks = nn.Sequential(*(GatedConvolution(channels, 2 ** (i % 3)) for i in range(blocks)))
        self.head = nn.Conv1d(channels, vocabulary, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(functional.relu(self.blocks(self.token(tokens).mT))).mT


class DenseLayer(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-3x3, concatenated to its input (arXiv 1608.06993)."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.branch(x)], 1)


def densenet(blocks: tuple[int, ...], growth: int) -> nn.Sequential:
    """DenseNet for 3-channel images; (6, 12, 24, 16) with growth 32 is DenseNet-121."""
    channels = 2 * growth
    layers: list[nn.Module] = [
        nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    ]
    layers.append(nn.ReLU())
    for index, repeats in enumerate(blocks):
        for _ in range(repeats):
            layers.append(DenseLayer(channels, growth))
            channels += growth
        if index < len(blocks) - 1:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False)]
            layers.append(nn.AvgPool2d(2))
            channels //= 2
    layers += [
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net with skips by concatenation (arXiv 1505.04597), three levels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [channels, 2 * channels, 4 * channels]
        self.down = nn.ModuleList([self._pair(i, o) for i, o in zip([3, *widths], widths, strict=False)])
        self.middle = self._pair(widths[-1], widths[-1])
        self.up = nn.ModuleList(
            [self._pair(i + o, o) for i, o in zip([widths[-1], *widths[:0:-1]], widths[::-1], strict=True)]
        )
        self.head = nn.Conv2d(channels, 4, 1)

    def _pair(self, fan_in: int, fan_out: int) -> nn.Sequential:
        return nn.Sequential(convolution(fan_in, fan_out), convolution(fan_out, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.middle(x)
        for up in self.up:
            x = up(torch.cat([functional.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        return self.head(x)
