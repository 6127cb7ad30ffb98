"""What one does with a model and its loss: a plain step, our measurement, and what people use today.

Every method does one forward and one backward, attaches and removes whatever it needs, and leaves no
gradient behind, so that each starts from the same state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import isograd
from isograd.graph.traced import Loss

Method = Callable[[nn.Module, Loss], object]


def plain(model: nn.Module, loss: Loss) -> None:
    """One forward and one backward, nothing read."""
    loss(model).backward()
    model.zero_grad()


def check(model: nn.Module, loss: Loss) -> str:
    """The verdict; on a healthy model one measurement and the symptoms."""
    return isograd.check(model, loss).verdict


def parameter_norms(model: nn.Module, loss: Loss) -> dict[str, float]:
    """The norm of every parameter's gradient, read after the backward."""
    loss(model).backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return norms


def module_hooks(model: nn.Module, loss: Loss) -> dict[str, float]:
    """The norm of the gradient at every module's output, read in a full backward hook."""
    norms: dict[str, float] = {}

    def recorder(name: str) -> Callable[[nn.Module, object, tuple[Tensor | None, ...] | Tensor], None]:
        def hook(module: nn.Module, below: object, above: tuple[Tensor | None, ...] | Tensor) -> None:
            norms[name] = sum(g.norm().item() for g in above if g is not None)

        return hook

    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # a module that returns a dataclass gets no such hook, and torch says so
        for name, module in model.named_modules():
            stack.callback(module.register_full_backward_hook(recorder(name)).remove)
        loss(model).backward()
    model.zero_grad()
    return norms


def torchlens(model: nn.Module, loss: Loss) -> object:
    """TorchLens's training checks over one step: gradient magnitude and values that are not finite."""
    from torchlens.checks import ChecksSession  # pyright: ignore[reportMissingImports]

    session = ChecksSession(model, torch.optim.SGD(model.parameters(), 0.0))
    session.register_magnitude_check()
    session.register_nonfinite_gradient_check(action="collect")
    with session:
        loss(model).backward()
    report = session.report()
    model.zero_grad()
    return report


def torchmortem(model: nn.Module, loss: Loss) -> object:
    """torchmortem's autopsy of one step."""
    from torchmortem import Autopsy  # pyright: ignore[reportMissingImports]

    autopsy = Autopsy(model, optimizer=torch.optim.SGD(model.parameters(), 0.0))
    with autopsy:
        value = loss(model)
        value.backward()
        autopsy.step(loss=value.item())
    report = autopsy.get_report()
    model.zero_grad()
    return report


PEERS: dict[str, Method] = {"torchlens": torchlens, "torchmortem": torchmortem}
METHODS: dict[str, Method] = {
    "plain step": plain,
    "isograd.measure": isograd.measure,
    "isograd.check": check,
    "gradient norm of every parameter": parameter_norms,
    "full backward hook on every module": module_hooks,
    **{name: method for name, method in PEERS.items() if find_spec(name)},
}
