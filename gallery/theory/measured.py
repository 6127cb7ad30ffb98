"""Networks of many kinds, drawn and measured, beside what theory expects of them, and chains carried to other depths."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import isograd
from gallery.nets import HE, Shape, Transformer, mlp, plain_cnn, residual_mlp, scaled_normal
from isograd.theory.network import Part

DIGITS = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(10, (64,), generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(4))

Loss = Callable[[nn.Module], Tensor]


def classifying(model: nn.Module) -> Tensor:
    return functional.cross_entropy(model(DIGITS), LABELS)


def seeing(model: nn.Module) -> Tensor:
    return functional.cross_entropy(model(IMAGES), LABELS[:16])


def speaking(model: nn.Module) -> Tensor:
    return functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.roll(-1, 1).flatten())


def repeated(layers: int, *parts: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(part() for _ in range(layers) for part in parts), nn.Linear(64, 10))


def linear() -> nn.Module:
    return nn.Linear(64, 64)


class Functional(nn.Module):
    """No modules at all: weights of its own, torch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(64, 64) / 8 for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = functional.leaky_relu(x @ weight, negative_slope=0.3)
        return x[:, :10]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "sigmoid, default weights": (lambda: mlp(nn.Sigmoid, 12, 64, None), classifying),
    "tanh, default weights": (lambda: mlp(nn.Tanh, 12, 64, None), classifying),
    "tanh, gain 2": (lambda: mlp(nn.Tanh, 12, 64, scaled_normal(2.0)), classifying),
    "relu, He": (lambda: mlp(nn.ReLU, 12, 64, HE), classifying),
    "elu of alpha 0.5": (lambda: mlp(lambda: nn.ELU(0.5), 12, 64, None), classifying),
    "gelu, default weights": (lambda: mlp(nn.GELU, 12, 64, None), classifying),
    "functions of torch": (Functional, classifying),
    "batch normalisation": (lambda: repeated(8, linear, lambda: nn.BatchNorm1d(64), nn.ReLU), classifying),
    "layer normalisation": (lambda: repeated(8, linear, lambda: nn.LayerNorm(64), nn.Sigmoid), classifying),
    "dropout": (lambda: repeated(8, linear, nn.ReLU, lambda: nn.Dropout(0.2)), classifying),
    "convolutions": (lambda: plain_cnn(6, 64, True), seeing),
    "residual blocks": (lambda: residual_mlp(8, 64, torch.tensor(0.5), nn.ReLU), classifying),
    "pre-norm": (lambda: Transformer(Shape(6)), speaking),
    "post-norm": (lambda: Transformer(Shape(6, norm="post")), speaking),
    "DeepNorm": (lambda: Transformer(Shape(6, norm="deep")), speaking),
}


def drawn(name: str, draws: int) -> list[Part]:
    """Expected and measured decades, over all layers, of so many draws of one network."""
    build, loss = NETWORKS[name]
    parts = list[Part]()
    for seed in range(draws):
        torch.manual_seed(seed)
        flow = isograd.measure(build(), loss)
        part = flow.expected.over(slice(1, len(flow.sites)))
        assert part is not None
        parts.append(part)
    return parts


def beside(draws: int = 12) -> None:
    print(f"\n## Expected beside measured, decades, {draws} draws\n")
    print("| network | expected | measured | scatter expected | scatter measured |\n|---|---|---|---|---|")
    for name in NETWORKS:
        parts = drawn(name, draws)
        expected, measured = ([getattr(p, field) for p in parts] for field in ("decades", "measured"))
        scatter = statistics.stdev(m - e for m, e in zip(measured, expected, strict=True))
        print(
            f"| {name} | {statistics.mean(expected):.2f} | {statistics.mean(measured):.2f} "
            f"| {statistics.mean(p.spread for p in parts):.2f} | {scatter:.2f} |"
        )


def deeper() -> None:
    import transformers

    chains: dict[str, Callable[[int], nn.Module]] = {
        "sigmoid": lambda depth: mlp(nn.Sigmoid, depth, 64, None),
        "tanh, gain 2": lambda depth: mlp(nn.Tanh, depth, 64, scaled_normal(2.0)),
        "tanh, gain 1: q still falls": lambda depth: mlp(nn.Tanh, depth, 64, scaled_normal(1.0)),
    }
    print("\n## sigma^L, fitted to ten layers")
    for name, build in chains.items():
        torch.manual_seed(0)
        found = isograd.extrapolate(build(10), classifying, [20, 50, 100], build=build, depth=10)
        print(f"\n{name}: {found}")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=6, n_embd=64, n_head=4, vocab_size=64)
    gpt2 = transformers.GPT2LMHeadModel(config).train()
    print(
        f"\nGPT-2 of six blocks: {isograd.extrapolate(gpt2, lambda m: m(input_ids=TOKENS, labels=TOKENS).loss, [12, 24])}"
    )
