"""Small models that several test files share, and the plain backward that readings are held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

torch.set_num_threads(1)  # tensors this small only wait for each other; xdist gives every core a process

Loss = Callable[[nn.Module], Tensor]
Built = tuple[nn.Module, Loss]


def line_of(file: str, marker: str) -> str:
    """`test_x.py:17`, the line of `file` that carries the comment `# here: marker`."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# here: {marker}")]
    return f"{Path(file).name}:{number}"


def log10(value: Tensor) -> float:
    """log10 of the L2 norm."""
    return float(torch.linalg.vector_norm(value.detach().double()).log10())


def projected(x: Tensor, scale: float = 1.0) -> Loss:
    """A loss with a known gradient at the output: a fixed random direction."""

    def loss(model: nn.Module) -> Tensor:
        out = model(x)
        generator = torch.Generator().manual_seed(1)
        return (out * torch.randn(out.shape, dtype=out.dtype, generator=generator)).sum() * scale

    return loss


# -- chains ----------------------------------------------------------------------------------------


def orthogonal_chain(
    gain: float, layers: int, width: int = 16, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    """`layers` linear maps, each `gain` times an orthogonal matrix: every singular value is `gain`."""
    chain = nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(layers)))
    for layer in chain:
        assert isinstance(layer, nn.Linear)
        nn.init.orthogonal_(layer.weight, gain)
    return chain


def mlp(
    activation: Callable[[], nn.Module],
    layers: int,
    deviation: float | None = None,
    *,
    width: int = 64,
    inputs: int = 64,
    classes: int = 10,
) -> nn.Sequential:
    """`layers` hidden layers and a linear head; weights N(0, deviation^2 / fan_in), biases 0.

    Without `deviation`: what nn.Linear draws.
    """
    body: list[nn.Module] = []
    for fan_in in [inputs] + [width] * (layers - 1):
        body += [nn.Linear(fan_in, width), activation()]
    net = nn.Sequential(*body, nn.Linear(width, classes))
    for layer in net if deviation is not None else ():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, (deviation or 0.0) / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
    return net


def classified(model: nn.Module, *, batch: int = 32, inputs: int = 64, classes: int = 10) -> Built:
    """The model with the cross-entropy of one standardised batch, in the model's number format."""
    x, y = torch.randn(batch, inputs), torch.randint(classes, (batch,))

    def loss(m: nn.Module) -> Tensor:
        return functional.cross_entropy(m(x.to(next(m.parameters()).dtype)).float(), y)

    return model, loss


HE = math.sqrt(2)
"""He's deviation for ReLU."""


# -- blocks ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def branch(width: int = 16) -> nn.Sequential:
    """Norm, linear, GELU, linear: what a transformer adds to its stream."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width, bias=False)
    )


class Recorded(nn.Module):
    """Stages in a row; keeps what each gave, so that a plain backward can be asked for its gradient there."""

    def __init__(self, *stages: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen = []
        for stage in self.stages:
            x = stage(x)
            self.seen.append(x)
        return x


class Tied(nn.Module):
    """A language model in GPT-2's shape: the head is the embedding, one bias is added in every block."""

    def __init__(self, blocks: int = 3, width: int = 16, vocabulary: int = 11, gain: float = 1.0) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(branch(width) for _ in range(blocks))
        self.shared = nn.Parameter(0.1 * torch.randn(width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight
        self.gain = gain

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        for block in self.blocks:
            x = self.gain * (x + block(x) + self.shared)
        return self.head(x)


class Repeated(nn.Module):
    """One layer applied `times` over, as in ALBERT or a recurrence."""

    def __init__(self, layer: nn.Module, times: int) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.layer(x)
        return x


class Apply(nn.Module):
    """Any function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# -- the seven nets that no fixed threshold gets right ---------------------------------------------


def relu_he() -> Built:
    return classified(mlp(nn.ReLU, 8, HE))


def sigmoid_xavier(layers: int) -> Built:
    return classified(mlp(nn.Sigmoid, layers, 1.0))


def relu_large() -> Built:
    return classified(mlp(nn.ReLU, 12, 2.5 * HE))


def times(built: Built, factor: float) -> Built:
    """The same with the loss in another unit."""
    model, loss = built
    return model, lambda m: loss(m) * factor


SEVEN: dict[str, tuple[Callable[[], Built], str]] = {
    "8 ReLU layers, He": (relu_he, "healthy"),
    "8 ReLU layers, loss x 1e-8": (lambda: times(relu_he(), 1e-8), "healthy"),
    "8 ReLU layers, loss x 65536": (lambda: times(relu_he(), 65536), "healthy"),
    "6 sigmoid layers, Xavier": (lambda: sigmoid_xavier(6), "vanishing"),
    "10 sigmoid layers, Xavier": (lambda: sigmoid_xavier(10), "vanishing"),
    "10 sigmoid layers, loss x 65536": (lambda: times(sigmoid_xavier(10), 65536), "vanishing"),
    "12 ReLU layers, 2.5 x He": (relu_large, "exploding"),
}
"""Name -> how to build it, and its verdict."""


# -- references ------------------------------------------------------------------------------------


def plain_gradients(model: nn.Module, loss: Loss) -> dict[str, float]:
    """log10 gradient norm of each parameter by a plain backward; nothing is left in `.grad`."""
    named = list(model.named_parameters())
    found = torch.autograd.grad(loss(model), [p for _, p in named], allow_unused=True)
    return {name: log10(g) for (name, _), g in zip(named, found, strict=True) if g is not None}


def modules_of(model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, kinds))


def nested(stages: Sequence[nn.Module], at: int) -> nn.Sequential:
    """The same chain split in two containers."""
    return nn.Sequential(nn.Sequential(*stages[:at]), nn.Sequential(*stages[at:]))
