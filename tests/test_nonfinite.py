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
    assert found.evidence["cause"] == "weights"
    assert "2.weight" in found.cause


# -- what made it, and what only passed it on -------------------------------------------------------------

NOT_A_NUMBER = X.index_fill(0, torch.tensor([3]), torch.nan)
INFINITE = X.index_fill(0, torch.tensor([3]), torch.inf)


class Shifted(nn.Module):
    """Takes its inputs by name, apart or together; one layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.rest = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, image: Tensor, others: dict[str, Tensor] | None = None, side: Tensor = X) -> Tensor:
        given = others["x"] if others is not None else side
        return self.image(image - self.mean) + self.rest(given)


def broken_buffer() -> nn.Module:
    model = Shifted()
    model.mean.fill_(torch.nan)
    return model


class Ratio(torch.autograd.Function):
    """Wrong in both directions at 0."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 1 / (x * 0)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def masked(model: nn.Module, of: Callable[[Tensor], Tensor]) -> Tensor:
    rows = torch.zeros(8, 2, dtype=torch.bool).index_fill(0, torch.tensor([5]), True)
    return of(model(X).masked_fill(rows, -torch.inf)).mean()


def overwritten(model: nn.Module) -> Tensor:
    y = model(X)
    y[0, 0] = torch.nan
    return y.square().mean()


NOBODY = torch.full((8,), -100)
ONE_HOT = functional.one_hot(torch.zeros(8, dtype=torch.long), 2).float()
CAUSES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], str, str]] = {
    "an input that is NaN": (
        net,
        lambda m: m(NOT_A_NUMBER).mean(),
        "data",
        "the model's argument input holds a NaN",
    ),
    "an input that is Inf": (
        net,
        lambda m: m(INFINITE).mean(),
        "data",
        "the model's argument input holds an Inf",
    ),
    "the second of two": (
        Shifted,
        lambda m: m(X, side=INFINITE).mean(),
        "data",
        "argument side holds an Inf",
    ),
    "inside a batch": (
        Shifted,
        lambda m: m(X, {"x": NOT_A_NUMBER}).mean(),
        "data",
        "argument others['x'] holds",
    ),
    "a target": (
        net,
        lambda m: functional.mse_loss(m(X), NOT_A_NUMBER[:, :2]),
        "data",
        "argument 2 of mse_loss held it",
    ),
    "a buffer": (broken_buffer, lambda m: m(X).mean(), "weights", "before the forward began: buffer mean"),
    "a masked row": (
        net,
        lambda m: masked(m, lambda y: y.softmax(-1)),
        "mask",
        "softmax made a NaN of the Inf that masked_fill",
    ),
    "a target of probability 0": (
        net,
        lambda m: (ONE_HOT * (ONE_HOT.log() - m(X).log_softmax(-1))).mean(),
        "mask",
        "mul made a NaN of the Inf that argument 1 of sub",
    ),
    "targets that are all ignored": (
        net,
        lambda m: functional.cross_entropy(m(X), NOBODY),
        "empty",
        "every target is -100, which is ignored",
    ),
    "a mean of nothing": (
        net,
        lambda m: m(X)[NOBODY > 0].mean(),
        "empty",
        "mean of nothing: its input is empty",
    ),
    "a cross entropy of nothing": (
        net,
        lambda m: functional.cross_entropy(m(X[:0]), NOBODY[:0]),
        "empty",
        "cross_entropy of nothing: its input is empty",
    ),
    "an Inf, and its consumer": (
        net,
        lambda m: (lambda y: (y - y.max()).mean())((m(X) * 1e4).exp()),
        "numerics",
        "exp made an Inf out of finite values",
    ),
    "a growth that overflows": (
        net,
        lambda m: (m(X) * 1e25).square().mean(),
        "growth",
        "made an Inf of what had grown to 2e+24",
    ),
    "an in-place operation": (net, lambda m: m(X).sub_(100).log_().mean(), "numerics", "log made a NaN"),
    "written in place": (net, overwritten, "numerics", "or of what was written into its input in place"),
    "a custom Function": (
        lambda: nn.Sequential(net(), nn.Linear(2, 2)),
        lambda m: m[1](Ratio.apply(m[0](X))).mean(),
        "numerics",
        "Ratio made an Inf out of finite values",
    ),
    "a custom Function at the end": (
        net,
        lambda m: Ratio.apply(m(X).mean()),
        "numerics",
        "Ratio made an Inf out of finite values",
    ),
    "a NaN that the model takes out, and another": (
        lambda: Repairing(net()),
        lambda m: m(NOT_A_NUMBER).log().mean(),
        "numerics",
        "log made a NaN out of finite values",
    ),
}


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda m: (m(X) * 1e4).exp().mean(), "bound what goes into exp"),
        (lambda m: torch.log(torch.relu(m(X))).mean(), "keep what goes into log above zero"),
    ],
)
def test_it_is_said_what_to_write_at_the_line(loss: Callable[[nn.Module], Tensor], words: str) -> None:
    (found,) = isograd.check(net(), loss).errors
    assert found.code == "NF401"
    assert any(words in remedy for remedy in found.remedies)
    assert "loss-scale" not in found.remedies  # nothing is stored in half precision


class Repairing(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.nan_to_num(0.0))


@pytest.mark.parametrize("name", CAUSES)
def test_what_made_it_is_told_from_what_was_given_it(name: str) -> None:
    build, loss, cause, words = CAUSES[name]
    torch.manual_seed(0)
    model = build()
    found = isograd.find_nonfinite(model, loss)
    assert found is not None
    assert found.evidence["cause"] == cause
    assert words in f"{found.message}; {found.cause}"
    (told,) = (f for f in isograd.check(model, loss).findings if f.code == "NF401")
    assert (told.message, told.cause) == (found.message, found.cause)


def test_a_custom_function_is_named_with_its_file() -> None:
    found = isograd.find_nonfinite(net(), lambda m: Ratio.apply(m(X)).mean())
    assert found is not None
    assert HERE in str(found.evidence["source"])


def test_an_overflow_that_does_not_reach_the_loss_but_its_gradient() -> None:
    found = isograd.find_nonfinite(net(), lambda m: (1 / (1 + (m(X) * 1e4).exp())).mean())
    assert found is not None
    assert (found.evidence["operation"], found.evidence["phase"]) == ("exp", "backward")
    assert "exp made an Inf in the forward, which did not reach the loss" in found.cause


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
