"""`find_nonfinite`: the operation, its line and its phase, for NaN and Inf made at places that are known."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import isograd

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
HERE = Path(__file__).name


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def log_of_a_negative(model: nn.Module) -> Tensor:
    return torch.log(model(X) - 100).mean()


def division_by_zero(model: nn.Module) -> Tensor:
    y = model(X)
    return (y / (y - y)).mean()


def overflow_of_half(model: nn.Module) -> Tensor:
    return torch.mul((model(X) + 300).half(), 300).float().mean()


def root_at_zero(model: nn.Module) -> Tensor:
    return torch.sqrt(model(X) * 0).mean()


def hidden_by_where(model: nn.Module) -> Tensor:
    y = model(X).square()
    return torch.where(y > 1e9, torch.sqrt(y * 0), y).mean()


CASES: dict[Callable[[nn.Module], Tensor], tuple[str, str]] = {
    log_of_a_negative: ("log", "forward"),
    division_by_zero: ("div", "forward"),
    overflow_of_half: ("mul", "forward"),
    root_at_zero: ("sqrt", "backward"),
    hidden_by_where: ("sqrt", "backward"),
}


@pytest.mark.parametrize("loss", CASES)
def test_the_operation_its_line_and_its_phase(loss: Callable[[nn.Module], Tensor]) -> None:
    operation, phase = CASES[loss]
    found = isograd.find_nonfinite(net(), loss)
    assert found is not None
    assert (found.evidence["operation"], found.evidence["phase"]) == (operation, phase)
    lines, first = inspect.getsourcelines(loss)
    line = first + next(i for i, text in enumerate(lines) if f"torch.{operation}" in text or " / " in text)
    assert str(found.evidence["source"]).endswith(f"{HERE}:{line}")


def test_none_where_all_is_finite_even_with_a_mask_that_is_not() -> None:
    mask = torch.tensor([0.0, -torch.inf])
    assert isograd.find_nonfinite(net(), lambda m: (m(X) + mask).softmax(-1).square().mean()) is None
    y = torch.zeros(8, dtype=torch.long)
    assert isograd.find_nonfinite(net(), lambda m: functional.cross_entropy(m(X), y)) is None


def test_weights_that_an_earlier_step_has_broken_are_named() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    found = isograd.find_nonfinite(model, lambda m: m(X).mean())
    assert found is not None
    assert found.evidence["phase"] == "forward"
    assert "2.weight" in found.cause


def test_a_backward_that_raises_is_no_none() -> None:
    def loss(model: nn.Module) -> Tensor:
        y = model(X).exp()
        total = y.sum()
        y.mul_(2)  # what exp saved for its backward is gone
        return total

    found = isograd.find_nonfinite(net(), loss)
    assert found is not None
    assert (found.code, found.evidence["phase"]) == ("NF404", "backward")


def test_it_changes_nothing() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    isograd.find_nonfinite(model, root_at_zero)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
