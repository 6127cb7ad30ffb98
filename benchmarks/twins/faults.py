"""Faults: each takes a finished healthy model and changes one property of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.twins.case import Plant

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def weighted(model: nn.Module) -> list[nn.Module]:
    """Linear layers and convolutions (also those of transformers) but the last, the head."""
    found = [
        m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) or type(m).__name__ == "Conv1D"
    ]
    return found[:-1]


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, NORMS) or type(m).__name__.endswith("RMSNorm")]


def rescale(factor: float) -> Plant:
    """Every hidden weight times a factor."""

    def plant(model: nn.Module) -> None:
        for layer in weighted(model):
            layer.weight.mul_(factor)

    return plant


def redraw(std: float) -> Plant:
    """Hidden weights from N(0, std^2), whatever their fan-in: a habit from the days of shallow nets."""

    def plant(model: nn.Module) -> None:
        for layer in weighted(model):
            nn.init.normal_(layer.weight, std=std)

    return plant


def torch_default(model: nn.Module) -> None:
    """Hidden weights and biases as torch draws them, uniform with gain 1/sqrt(3)."""
    for layer in weighted(model):
        layer.reset_parameters()


def exchange(old: type[nn.Module], new: Callable[[], nn.Module]) -> Plant:
    """Every module of one class exchanged, the weights left as they are."""

    def plant(model: nn.Module) -> None:
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, old):
                    setattr(parent, name, new())

    return plant


def biases(value: float) -> Plant:
    """Hidden biases at a constant: a negative one shuts ReLUs for good."""

    def plant(model: nn.Module) -> None:
        for layer in weighted(model):
            nn.init.constant_(layer.bias, value)

    return plant


def one_layer(factor: float) -> Plant:
    """The weights of the layer in the middle times a factor."""

    def plant(model: nn.Module) -> None:
        layers = weighted(model)
        layers[len(layers) // 2].weight.mul_(factor)

    return plant


def gains(draw: Callable[[torch.Tensor], object]) -> Plant:
    """The gains of all normalisations drawn anew."""

    def plant(model: nn.Module) -> None:
        for norm in norms(model):
            draw(norm.weight)

    return plant


SMALL_GAINS = gains(lambda g: nn.init.normal_(g, std=0.02))
"""What an initialiser does that treats every parameter alike (the EfficientNet of transformers 5.23)."""


def epsilon(value: float) -> Plant:
    """The epsilon of all normalisations."""

    def plant(model: nn.Module) -> None:
        for norm in norms(model):
            for name in ("eps", "variance_epsilon"):
                if hasattr(norm, name):
                    setattr(norm, name, value)

    return plant


def attribute(name: str, value: float) -> Plant:
    """One attribute of every module that has it: the factor on the skip, or on the branch."""

    def plant(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, value)

    return plant


# -- recurrences ----------------------------------------------------------------------------------------


def _recurrent(model: nn.Module) -> Iterator[nn.RNNBase]:
    return (m for m in model.modules() if isinstance(m, nn.RNNBase))


def recurrent_weights(factor: float) -> Plant:
    """W_hh times a factor."""

    def plant(model: nn.Module) -> None:
        for cell in _recurrent(model):
            cell.weight_hh_l0.mul_(factor)

    return plant


def recurrent_noise(std: float) -> Plant:
    """W_hh from N(0, std^2)."""

    def plant(model: nn.Module) -> None:
        for cell in _recurrent(model):
            nn.init.normal_(cell.weight_hh_l0, std=std)

    return plant


def recurrent_default(model: nn.Module) -> None:
    """Weights and biases of the recurrence as torch draws them, uniform in 1/sqrt(hidden)."""
    for cell in _recurrent(model):
        cell.reset_parameters()


def gate_bias(value: float) -> Plant:
    """The bias that decides how much is kept: an LSTM's forget gate, a GRU's update gate."""

    def plant(model: nn.Module) -> None:
        for cell in _recurrent(model):
            gate = slice(cell.hidden_size, 2 * cell.hidden_size)
            cell.bias_ih_l0[gate] = value
            cell.bias_hh_l0[gate] = 0.0

    return plant


# -- decoys: what looks like a fault and is none --------------------------------------------------------


def balanced(factor: float) -> Plant:
    """Every other layer times a factor, the next one divided by it: through ReLU the same function."""

    def plant(model: nn.Module) -> None:
        layers = weighted(model)
        for first, second in zip(layers[::2], layers[1::2], strict=False):
            first.weight.mul_(factor)
            second.weight.div_(factor)

    return plant


def small_head(model: nn.Module) -> None:
    """A head that starts near zero: the first loss is that of guessing, and the gradient behind it is small."""
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    head.weight.mul_(0.03)


def frozen_first(model: nn.Module) -> None:
    """The first layer is not trained: random features do for a while."""
    for p in weighted(model)[0].parameters():
        p.requires_grad_(False)


def half_asleep(model: nn.Module) -> None:
    """A third of the biases of the first layer shut their units: plain sparsity."""
    bias = weighted(model)[0].bias
    bias[: len(bias) // 3] = -10.0


def unchanged(model: nn.Module) -> None:
    """No fault at all."""


def loud(model: nn.Module) -> None:
    """The head's weights times 5: a large first loss."""
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    head.weight.mul_(5)


def lecun(gain: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """N(0, gain^2 / fan_in)."""
    return lambda w: nn.init.normal_(w, std=gain / math.sqrt(w[0].numel()))
