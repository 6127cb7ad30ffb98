"""Handmade networks of the healthy zoo: each holds something that looks like a fault and is none."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gallery.case import Built
from gallery.nets import HE, Residual, Transformer, UNet, initialised, mlp, without_head
from gallery.training import digits

Make = Callable[[], nn.Module]
Data = Callable[[], tuple[Tensor, Tensor]]


def on(model: Make, data: Data, *, scale: float = 1.0, seed: int = 0) -> Built:
    """A classifier in training mode with the cross-entropy of one batch, times `scale`."""
    torch.manual_seed(seed)
    made = model().train()
    x, y = data()

    def loss(m: nn.Module) -> Tensor:
        logits = cast(Tensor, m(x))
        return functional.cross_entropy(logits.flatten(0, -2).float(), y.flatten()) * scale

    return made, loss


def digit_batch() -> tuple[Tensor, Tensor]:
    """64 standardised digits."""
    return digits().batch(torch.Generator().manual_seed(0))


def pictures(size: int = 32, batch: int = 4) -> Data:
    return lambda: (torch.randn(batch, 3, size, size), torch.randint(10, (batch,)))


def token_batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(64, (4, 32))
    return ids, ids.roll(-1, 1)


class Recurrent(nn.Module):
    """Embedding, a stacked recurrent kernel, logits at every step."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        self.kernel = kernel
        self.head = nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.kernel(self.embedding(tokens))[0])


class PostNorm(nn.Module):
    """torch's own encoder, 24 layers in its default post-norm arrangement."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 24, enable_nested_tensor=False)
        self.head = nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)))


class Checkpointed(nn.Module):
    """A transformer whose blocks are run again in the backward."""

    def __init__(self, inner: Transformer) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.inner.token(tokens) + self.inner.position[: tokens.shape[1]]
        for block in self.inner.blocks:
            x = cast(Tensor, checkpoint(block, x, use_reentrant=False))
        return self.inner.head(self.inner.norm(x))


class Siamese(nn.Module):
    """One encoder, used twice; answers whether two digits are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(nn.ReLU, 4, 64, HE)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.encoder(x), self.encoder(x.roll(1, 0))
        return 10 * functional.normalize(left, dim=-1) @ functional.normalize(right, dim=-1).T


class LowRank(nn.Module):
    """A frozen linear layer with a LoRA adapter whose second factor starts at zero (arXiv 2106.09685)."""

    def __init__(self, frozen: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


class TwoHeads(nn.Module):
    """Deep supervision: a second head in the middle, its loss added."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = without_head(mlp(nn.ReLU, 4, 64, HE))
        self.middle = nn.Linear(64, 10)
        self.upper = initialised(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()), HE
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lower(x)
        return torch.stack([self.middle(hidden), self.head(self.upper(hidden))], 1)


def autoencoder() -> Built:
    """64-32-8-32-64 on standardised digits, mean squared error."""
    torch.manual_seed(0)
    sizes = [64, 32, 8, 32, 64]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ELU()]
    x, _ = digit_batch()
    return nn.Sequential(*layers[:-1]), lambda m: functional.mse_loss(m(x), x)


def zero_head() -> nn.Module:
    """A head that starts at zero: no gradient passes it in the first step, and it trains (muP does this)."""
    model = mlp(nn.ReLU, 4, 128, HE)
    head = cast(nn.Linear, model[-1])
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return model


def zero_branches() -> nn.Module:
    """Residual blocks whose last layer starts at zero (Fixup, arXiv 1901.09321)."""
    blocks: list[nn.Module] = []
    for _ in range(16):
        last = nn.Linear(64, 64)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        blocks.append(Residual(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), last)))
    return nn.Sequential(nn.Linear(64, 64), *blocks, nn.Linear(64, 10))


def zero_gamma() -> nn.Module:
    """A ResNet whose blocks' last batch normalisation starts at gamma 0 (arXiv 1706.02677)."""

    def block() -> nn.Module:
        last = nn.BatchNorm2d(16)
        nn.init.zeros_(last.weight)
        convolutions = [nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2)]
        return Residual(nn.Sequential(convolutions[0], nn.BatchNorm2d(16), nn.ReLU(), convolutions[1], last))

    stem = nn.Conv2d(3, 16, 3, padding=1)
    return nn.Sequential(
        stem, *(block() for _ in range(9)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


def rescaled() -> nn.Module:
    """Weights times c and 1/c in turn: the same function through ReLU, and the same gradient end to end."""
    model = mlp(nn.ReLU, 8, 128, HE)
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for index, layer in enumerate(linears[:8]):
            layer.weight *= 30.0 if index % 2 == 0 else 1 / 30.0
    return model


def adapted() -> nn.Module:
    """Frozen random features with low-rank adapters and a trainable head."""
    model = mlp(nn.ReLU, 4, 64, HE)
    return nn.Sequential(
        *(LowRank(m) if isinstance(m, nn.Linear) else m for m in without_head(model)), model[-1]
    )


def frozen_backbone() -> nn.Module:
    """A frozen body under a trainable head: transfer learning."""
    model = mlp(nn.ReLU, 4, 64, HE)
    without_head(model).requires_grad_(False)
    return model


class LastOf(nn.Module):
    """Reads an image row by row with an LSTM and classifies from the last step."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.kernel(x.view(-1, 8, 8))[0][:, -1])


def regression() -> Built:
    """Two layers of tanh on a smooth function, mean squared error."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    return model, lambda m: functional.mse_loss(m(x), x.sin().sum(1, keepdim=True))


def deeply_supervised() -> Built:
    torch.manual_seed(0)
    model = TwoHeads()
    x, y = digit_batch()
    return model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), y.repeat_interleave(2))


class ClampedRoot(nn.Module):
    """A root of clamped values: infinite slopes inside the backward that the clamp's mask takes out again."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        return self.after(torch.where(hidden > 0, hidden.clamp(min=0).sqrt(), torch.zeros_like(hidden)))


class Equilibrium(nn.Module):
    """z = tanh(W z + x), sixty times from zero, towards its fixed point; x comes in at every step (arXiv 1909.01377)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        entered = self.enter(x)
        z = torch.zeros_like(entered)
        for _ in range(60):
            z = torch.tanh(self.again(z) + entered)
        return self.head(z)


def actor_critic() -> Built:
    """A policy and a value on one body, whose returns, and so whose loss, are in thousands."""
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = without_head(mlp(nn.Tanh, 2, 64, None))
            self.policy, self.value = nn.Linear(64, 10), nn.Linear(64, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.body(x)
            return {"policy": self.policy(hidden), "value": self.value(hidden)[:, 0]}

    x, y = digit_batch()

    def loss(m: nn.Module) -> Tensor:
        told = m(x)
        return functional.cross_entropy(told["policy"], y) + 1e6 * told["value"].sub(y / 10).square().mean()

    return Both(), loss


def variational() -> Built:
    """An autoencoder that returns its answer, mean and log variance; its loss weighs two terms."""
    torch.manual_seed(0)

    class Variational(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.mean, self.spread = nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(64, 8)
            self.leave = nn.Sequential(nn.Linear(8, 64), nn.ELU(), nn.Linear(64, 64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden = functional.elu(self.enter(x))
            mean, spread = self.mean(hidden), self.spread(hidden)
            return self.leave(mean + (0.5 * spread).exp() * torch.randn_like(mean)), mean, spread

    x, _ = digit_batch()

    def loss(m: nn.Module) -> Tensor:
        answer, mean, spread = m(x)
        divergence = (mean.square() + spread.exp() - spread - 1).sum(1).mean()
        return functional.mse_loss(answer, x) + 1e-3 * divergence

    return Variational(), loss


def differential_equation() -> Built:
    """u'' = -sin(3 x) with u(0) = 0 and u(1) = 1: the loss differentiates the model twice (arXiv 1711.10561)."""
    torch.manual_seed(0)
    widths = [1, 32, 32, 32, 32]
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
    ends = torch.tensor([[0.0], [1.0]])

    def loss(m: nn.Module) -> Tensor:
        x = torch.linspace(0, 1, 64)[:, None].requires_grad_()
        (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return (bend + (3 * x).sin()).square().mean() + functional.mse_loss(m(ends), ends)

    return nn.Sequential(*layers, nn.Linear(32, 1)), loss


def half(make: Make) -> Make:
    return lambda: make().bfloat16()


def in_bfloat16(data: Data) -> Data:
    return lambda: (data()[0].bfloat16(), data()[1])


def segmentation() -> Built:
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 32, 32), torch.randint(4, (2, 32, 32))
    return UNet(16), lambda m: functional.cross_entropy(m(x), y)
