"""A verdict does not depend on units, formats, batch size or the way a function is written down."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from isograd import diagnose, measure
from tests.models import HE, SEVEN, Loss, Residual, branch, mlp, nested

Told = tuple[str, frozenset[str]]
"""Verdict and the codes of all errors."""


def told(model: nn.Module, loss: Loss) -> Told:
    diagnosis = diagnose(measure(model, loss))
    return diagnosis.verdict, frozenset(f.code for f in diagnosis.errors)


def blocks(width: int) -> nn.Sequential:
    body = (Residual(branch(width)) for _ in range(8))
    return nn.Sequential(nn.Linear(64, width), *body, nn.LayerNorm(width), nn.Linear(width, 10))


NETS: dict[str, tuple[Callable[[int], nn.Sequential], str]] = {
    "ReLU, He": (lambda width: mlp(nn.ReLU, 8, HE, width=width), "healthy"),
    "ReLU, default": (lambda width: mlp(nn.ReLU, 3, width=width), "healthy"),
    "tanh": (lambda width: mlp(nn.Tanh, 10, 1.0, width=width), "healthy"),
    "pre-norm blocks": (blocks, "healthy"),
    "6 sigmoid layers": (lambda width: mlp(nn.Sigmoid, 6, 1.0, width=width), "vanishing"),
    "10 sigmoid layers": (lambda width: mlp(nn.Sigmoid, 10, 1.0, width=width), "vanishing"),
    "ReLU, half of He": (lambda width: mlp(nn.ReLU, 16, 0.5 * HE, width=width), "vanishing"),
    "ReLU, 2.5 of He": (lambda width: mlp(nn.ReLU, 12, 2.5 * HE, width=width), "exploding"),
    "tanh, gain 3": (lambda width: mlp(nn.Tanh, 40, 3.0, width=width), "exploding"),
}
"""Name -> how to build it in a width, and its verdict at every seed."""
RELU = [name for name in NETS if name.startswith("ReLU")]

nets, seeds = st.sampled_from(list(NETS)), st.integers(0, 3)
profile = settings(max_examples=25, deadline=None, derandomize=True)  # a verdict is the same in every run


def net_of(name: str, seed: int, width: int = 64) -> nn.Sequential:
    torch.manual_seed(seed)
    return NETS[name][0](width)


def loss_of(seed: int, batch: int = 32, factor: float = 1.0) -> Loss:
    generator = torch.Generator().manual_seed(1000 + seed)
    x, y = (
        torch.randn(64, 64, generator=generator)[:batch],
        torch.randint(10, (64,), generator=generator)[:batch],
    )

    def loss(m: nn.Module) -> Tensor:
        return functional.cross_entropy(m(x.to(next(m.parameters()).dtype)).float(), y) * factor

    return loss


@cache
def plain(name: str, seed: int) -> Told:
    return told(net_of(name, seed), loss_of(seed))


@pytest.mark.parametrize("name", NETS)
def test_the_verdict_is_that_of_the_net_and_not_of_the_draw(name: str) -> None:
    assert {plain(name, seed)[0] for seed in range(4)} == {NETS[name][1]}


@pytest.mark.parametrize("name", SEVEN)
def test_the_seven_nets_that_no_fixed_threshold_gets_right(name: str) -> None:
    build, verdict = SEVEN[name]
    torch.manual_seed(0)
    assert told(*build())[0] == verdict


@profile
@given(nets, seeds, st.floats(-8, 4.8165))
def test_the_unit_of_the_loss(name: str, seed: int, exponent: float) -> None:
    assert told(net_of(name, seed), loss_of(seed, factor=10**exponent)) == plain(name, seed)


@profile
@given(nets, seeds, st.sampled_from([2, 64]))
def test_the_size_of_the_batch(name: str, seed: int, batch: int) -> None:
    assert told(net_of(name, seed), loss_of(seed, batch)) == plain(name, seed)


@profile
@given(nets, seeds, st.sampled_from([torch.bfloat16, torch.float64]))
def test_the_number_format(name: str, seed: int, dtype: torch.dtype) -> None:
    assert told(net_of(name, seed).to(dtype), loss_of(seed)) == plain(name, seed)


@torch.no_grad()
def rescaled(model: nn.Sequential, at: int, factor: float) -> None:
    """W_l * c, b_l * c and W_{l+1} / c: the same function through ReLU."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    layers[at].weight *= factor
    layers[at].bias *= factor
    layers[at + 1].weight /= factor


@profile
@given(st.sampled_from(RELU), seeds, st.floats(-2, 2), st.data())
def test_factors_that_layers_exchange_through_relu(
    name: str, seed: int, exponent: float, data: st.DataObject
) -> None:
    model, loss = net_of(name, seed), loss_of(seed)
    before = loss(model).item()
    layers = sum(isinstance(m, nn.Linear) for m in model)
    rescaled(model, data.draw(st.integers(0, layers - 2)), 10**exponent)
    assert loss(model).item() == pytest.approx(before, rel=1e-3)
    assert told(model, loss) == plain(name, seed)


class Functional(nn.Module):
    """The same chain without a single module in it: weights, and calls."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.weights = nn.ParameterList(m.weight for m in model if isinstance(m, nn.Linear))
        self.biases = nn.ParameterList(m.bias for m in model if isinstance(m, nn.Linear))
        kind = type(model[1])
        self.activation = {nn.ReLU: torch.relu, nn.Tanh: torch.tanh, nn.Sigmoid: torch.sigmoid}[kind]

    def forward(self, x: Tensor) -> Tensor:
        for w, b in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = self.activation(x @ w.T + b)
        return x @ self.weights[-1].T + self.biases[-1]


@profile
@given(nets.filter(lambda name: name != "pre-norm blocks"), seeds)
def test_code_without_modules(name: str, seed: int) -> None:
    assert told(Functional(net_of(name, seed)), loss_of(seed)) == plain(name, seed)


@profile
@given(nets, seeds, st.data())
def test_how_the_chain_is_cut_into_containers(name: str, seed: int, data: st.DataObject) -> None:
    model = net_of(name, seed)
    cut = nested(list(model), data.draw(st.integers(0, len(model))))
    assert told(cut, loss_of(seed)) == plain(name, seed)


@settings(profile, max_examples=10)
@given(nets, seeds)
def test_a_compiled_wrapper(name: str, seed: int) -> None:
    assert told(torch.compile(net_of(name, seed)), loss_of(seed)) == plain(name, seed)  # pyright: ignore


@profile
@given(nets, seeds, st.sampled_from([24, 128]))
def test_the_width(name: str, seed: int, width: int) -> None:
    """Finite width spreads the gradient; the verdict takes that into account."""
    assert told(net_of(name, seed, width), loss_of(seed))[0] == NETS[name][1]
