"""What cannot be measured: losses without a gradient, values that are not finite, backwards that raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isograd import check, measure
from tests.models import Loss, line_of, projected


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- errors ----------------------------------------------------------------------------------------


def test_a_loss_that_is_no_tensor_is_told_what_to_return() -> None:
    with pytest.raises(TypeError, match=r"returned float, not a tensor.*return the scalar"):
        measure(nn.Linear(4, 4), lambda m: m(torch.randn(2, 4)).sum().item())  # pyright: ignore


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda loss: {"aux": 3, "loss": loss}, r"returned dict.*here \['loss'\]"),
        (lambda loss: (torch.zeros(()), loss), r"returned tuple.*here \[1\]"),
        (lambda _: None, r"returned nothing.*as its last line does"),
        (lambda loss: loss.item(), r"returned float.*without \.item\(\)"),
        (lambda _: object(), r"returned object.*for example `lambda"),
    ],
)
def test_what_came_in_place_of_the_loss_tells_where_it_is(wrong: Callable[[Tensor], Any], told: str) -> None:
    with pytest.raises(TypeError, match=told):
        measure(nn.Linear(4, 4), lambda m: wrong(m(torch.randn(2, 4)).sum()))


def test_a_loss_of_integers_or_complex_numbers_is_named() -> None:
    with pytest.raises(ValueError, match=r"torch\.int64.*no derivative"):
        measure(nn.Linear(4, 4), lambda m: m(torch.randn(2, 4)).argmax())
    with pytest.raises(ValueError, match=r"complex.*\.real or its \.abs"):
        measure(nn.Linear(4, 4), lambda m: (m(torch.randn(2, 4)) * 1j).sum())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_model_of_torchscript_is_told_what_to_measure() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(TypeError, match=r"torch\.jit.*the nn\.Module that it was made from"):
        measure(model, lambda m: m(torch.randn(2, 4)).sum())


def test_a_graph_gone_through_twice_is_no_matter_of_an_operation_in_place() -> None:
    def loss(model: nn.Module) -> Tensor:
        value = model(torch.randn(2, 4)).sum()
        value.backward()
        return value

    (found,) = check(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), loss).errors
    assert found.code == "NF404"
    assert found.remedies[0].startswith("leave .backward() out of loss(model)")


def test_a_loss_with_more_than_one_element_is_told_to_reduce() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 4\).*reduce it.*\.mean\(\)"):
        measure(nn.Linear(4, 4), lambda m: m(torch.randn(2, 4)))


def test_a_loss_with_one_element_need_not_be_a_scalar() -> None:
    assert measure(nn.Linear(4, 1), lambda m: m(torch.randn(1, 4))).layers == 1


def _detached(m: nn.Module) -> Tensor:
    return m(torch.randn(2, 4)).sum().detach()


def _without_grad(m: nn.Module) -> Tensor:
    with torch.no_grad():
        return m(torch.randn(2, 4)).sum()


def _inferred(m: nn.Module) -> Tensor:
    with torch.inference_mode():
        return m(torch.randn(2, 4)).sum()


@pytest.mark.parametrize("loss", [_detached, _without_grad, _inferred, lambda _: torch.zeros(())])
def test_a_loss_without_a_gradient_is_named(loss: Loss) -> None:
    with pytest.raises(
        ValueError,
        match=r"does not depend on the model's parameters: .*no_grad or inference_mode, or detached",
    ):
        measure(nn.Linear(4, 4), loss)


def test_a_loss_of_other_weights_is_named() -> None:
    other = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"does not depend on the model's parameters: .*other weights"):
        measure(nn.Linear(4, 4), lambda _: other(torch.randn(2, 4)).sum())


@pytest.mark.parametrize(
    "inputs", [torch.zeros(2, dtype=torch.long), torch.randn(2, 4)], ids=["tokens", "floats"]
)
def test_a_frozen_model_is_named(inputs: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 4) if inputs.is_floating_point() else nn.Embedding(3, 4))
    with pytest.raises(
        ValueError, match=r"does not depend .*: all of them are frozen; .*requires_grad_\(True\)"
    ):
        measure(model.requires_grad_(False), lambda m: m(inputs).sum())


def test_a_model_without_parameters_is_named() -> None:
    with pytest.raises(ValueError, match=r"does not depend on the model's parameters: the model has none"):
        measure(nn.Tanh(), lambda m: m(torch.randn(2, 4)).sum())


def test_what_is_no_module_is_named() -> None:
    with pytest.raises(TypeError, match=r"expected an nn.Module to measure, got function"):
        measure(lambda x: x, lambda m: m(torch.randn(2)).sum())  # pyright: ignore


def test_an_error_of_the_users_forward_passes_through() -> None:
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"):
        measure(nn.Linear(4, 4), lambda m: m(torch.randn(2, 5)).sum())


# -- values that are not finite, backwards that fail -----------------------------------------------


class Then(nn.Module):
    """A layer, then any function of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(16, 16), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def _log_of_zero(x: Tensor) -> Tensor:
    return torch.log(x * 0)  # here: log of zero


def _zero_by_zero(x: Tensor) -> Tensor:
    top = x - x
    return top / top  # here: zero by zero


def _overflow(x: Tensor) -> Tensor:
    return torch.exp(x.abs() * 1e4)  # here: overflow


def _root_at_zero(x: Tensor) -> Tensor:
    return torch.sqrt(x * 0)  # here: root at zero


def _hidden_by_where(x: Tensor) -> Tensor:
    return torch.where(x > 0, torch.sqrt(x), x)  # here: hidden by where


def _caught(x: Tensor) -> Tensor:
    """The derivative of the logarithm is infinite where x < 0, and ReLU's lets nothing of it through."""
    return torch.where(x > 0, torch.log(x.relu()), x)


@pytest.mark.parametrize(
    ("function", "phase", "operation", "marker"),
    [
        (_log_of_zero, "forward", "log", "log of zero"),
        (_zero_by_zero, "forward", "div", "zero by zero"),
        (_overflow, "forward", "exp", "overflow"),
        (_root_at_zero, "backward", "sqrt", "root at zero"),
        (_hidden_by_where, "backward", "sqrt", "hidden by where"),
    ],
)
def test_what_makes_a_nan_or_an_infinity_is_named_with_its_line(
    function: Callable[[Tensor], Tensor], phase: str, operation: str, marker: str
) -> None:
    found = measure(Then(function), projected(torch.randn(8, 16))).nonfinite
    assert found is not None
    assert (found.phase, found.site.operation) == (phase, operation)
    assert found.site.source.endswith(line_of(__file__, marker))


@pytest.mark.parametrize("function", [torch.tanh, _caught])
def test_where_every_gradient_is_finite_there_is_nothing_to_name(
    function: Callable[[Tensor], Tensor],
) -> None:
    flow = measure(Then(function), projected(torch.randn(8, 16)))
    assert flow.nonfinite is None
    assert [p.nonfinite for p in flow.parameters] == [0, 0]


class Raising(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        raise KeyError("no derivative today")


def _changed_in_place(x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    z = y * 2
    y.add_(1)
    return z + y


@pytest.mark.parametrize(
    ("function", "error", "text"),
    [
        (Raising.apply, "KeyError", "no derivative today"),
        (_changed_in_place, "RuntimeError", "modified by an inplace operation"),
    ],
)
def test_a_backward_that_raises_is_a_reading(
    function: Callable[[Tensor], Tensor], error: str, text: str
) -> None:
    model = Then(function)
    flow = measure(model, projected(torch.randn(8, 16)))
    assert flow.failure is not None
    assert (flow.failure.phase, flow.failure.error) == ("backward", error)
    assert text in flow.failure.traceback
    assert {p.state for p in flow.parameters} == {"unmeasured"}
    diagnosis = check(model, projected(torch.randn(8, 16)))
    assert [f.code for f in diagnosis.errors] == ["NF404"]
    assert diagnosis.verdict == "broken"
