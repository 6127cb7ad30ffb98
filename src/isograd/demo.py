"""The sick network of `isograd demo`: twenty sigmoid layers, on data that it makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def network() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A 20-layer sigmoid network with torch's default initialisation, and its loss on one batch.

    Eight classes of points around eight random centres: a network of two layers learns them in a second.
    """
    torch.manual_seed(0)
    labels = torch.randint(8, (128,))
    points = 3 * torch.randn(8, 16)[labels] + torch.randn(128, 16)

    layers: list[nn.Module] = [nn.Linear(16, 64), nn.Sigmoid()]
    for _ in range(18):
        layers += [nn.Linear(64, 64), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(64, 8))
    return model, lambda m: nn.functional.cross_entropy(m(points), labels)
