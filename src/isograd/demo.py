"""The sick network of `isograd demo`: twenty sigmoid layers, on data that it makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CENTRES = 2.5 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def points(seed: int, rows: int = 128) -> tuple[Tensor, Tensor]:
    """Points around eight random centres, and which: a network of two layers learns them in a second."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(8, (rows,), generator=generator)
    return CENTRES[labels] + torch.randn(rows, 16, generator=generator), labels


def network(seed: int = 0) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A 20-layer sigmoid network with torch's default initialisation, and its loss on one batch."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(16, 64), nn.Sigmoid()]
    for _ in range(18):
        layers += [nn.Linear(64, 64), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(64, 8))

    x, y = points(0)
    return model, lambda m: nn.functional.cross_entropy(m(x), y)


def train(model: nn.Module, seed: int, lr_scale: float = 1.0) -> float:
    """60 steps of Adam, each on new points; accuracy on 1,000 points that it has not seen."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3 * lr_scale)
    for step in range(60):
        x, y = points(1000 * (seed + 1) + step)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = points(1, 1000)
    with torch.no_grad():
        return (model(x).argmax(-1) == y).float().mean().item()
