"""A measurement leaves the model, its data and every random generator bitwise as they were."""

from __future__ import annotations

import gc
import pickle
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as registry
from torch.nn.utils import parametrizations

from isograd import check, measure
from tests.models import Built, Loss, classified, mlp, relu_he, sigmoid_xavier

HOOKS = (
    "_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks _forward_hooks_with_kwargs "
    "_forward_hooks_always_called _forward_pre_hooks_with_kwargs _state_dict_hooks"
).split()
GLOBAL_HOOKS = [name for name in vars(registry) if name.startswith("_global_") and name.endswith("hooks")]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def bits(tensor: Tensor | None) -> Any:
    """Everything that can be told of a tensor, NaN and the sign of zero included."""
    if tensor is None:
        return None
    raw = tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8)
    return id(tensor), tensor.requires_grad, tensor.dtype, tuple(tensor.shape), raw.tolist()


def state(model: nn.Module) -> dict[str, Any]:
    """What a measurement might have changed."""
    return {
        "parameters": {name: bits(p) for name, p in model.named_parameters()},
        "gradients": {name: bits(p.grad) for name, p in model.named_parameters()},
        "buffers": {name: bits(b) for name, b in model.named_buffers()},
        "modes": [m.training for m in model.modules()],
        "hooks": [[list(getattr(m, name)) for name in HOOKS] for m in model.modules()],
        "attributes": [list(vars(m)) for m in model.modules()],
        "global hooks": {name: dict(getattr(registry, name)) for name in GLOBAL_HOOKS},
        "function modes": len(torch.overrides._get_current_function_mode_stack()),
        "grad mode": torch.is_grad_enabled(),
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }


def changes(model: nn.Module, before: dict[str, Any]) -> set[str]:
    """Which parts of the state are no longer what they were."""
    return {name for name, value in state(model).items() if value != before[name]}


class Eventful(nn.Module):
    """Changes everything that a forward can change."""

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.spectral_norm(nn.Linear(16, 16))  # updates buffers in place
        self.norm = nn.BatchNorm1d(16)  # and this, with a counter
        self.frozen = nn.BatchNorm1d(16).eval()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 10)
        self.register_buffer("step", torch.zeros(1))
        self.register_buffer("absent", None)
        self.register_buffer("sick", torch.tensor([float("nan"), -0.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.step = self.step + 1  # replaced, not written to
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        x = self.drop(self.frozen(self.norm(self.first(x)))) * (1 + noise)
        self.drop.eval()
        return self.head(x)


def eventful() -> Built:
    model = Eventful()
    model.head.weight.grad = torch.randn(10, 16)
    x, y = torch.randn(8, 16), torch.randint(10, (8,))
    return model, lambda m: functional.cross_entropy(m(x), y)


@pytest.mark.parametrize("verb", [measure, check])
@pytest.mark.parametrize(
    "build", [eventful, relu_he, lambda: sigmoid_xavier(6)], ids=["eventful", "healthy", "sick"]
)
def test_nothing_is_changed(verb: Callable[[nn.Module, Loss], object], build: Callable[[], Built]) -> None:
    model, loss = build()
    before = state(model)
    verb(model, loss)
    assert changes(model, before) == set()


def test_a_plain_step_would_have_changed_it() -> None:
    model, loss = eventful()
    before = state(model)
    loss(model).backward()
    assert changes(model, before) == {"gradients", "buffers", "modes", "torch", "python", "numpy"} - {
        "attributes"
    }


class Lazy(nn.Module):
    """Makes its first buffer in its first forward, as caches and masks are made."""

    def forward(self, x: Tensor) -> Tensor:
        self.register_buffer("mask", torch.ones(x.shape[-1]), persistent=False)
        return x * self.mask


def test_a_buffer_made_in_the_forward_is_taken_away_again() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Lazy())
    before = state(model)
    measure(model, lambda m: m(torch.randn(8, 16)).sum())
    assert changes(model, before) == set()
    assert model.state_dict().keys() == {"0.weight", "0.bias"}


def _raises(m: nn.Module) -> Tensor:
    m(torch.randn(8, 16))
    raise KeyError("the user's own")


@pytest.mark.parametrize(
    ("loss", "error"),
    [
        (_raises, KeyError),
        (lambda m: m(torch.randn(8, 15)).sum(), RuntimeError),
        (lambda m: m(torch.randn(8, 16)), ValueError),
        (lambda m: m(torch.randn(8, 16)).sum().detach(), ValueError),
        (lambda m: m(torch.randn(8, 16)).sum().item(), TypeError),
    ],
    ids=["raises", "wrong shape", "no scalar", "no gradient", "no tensor"],
)
def test_a_forward_that_raises_leaves_everything_restored(loss: Loss, error: type[Exception]) -> None:
    model, _ = eventful()
    before = state(model)
    with pytest.raises(error):
        measure(model, loss)
    assert changes(model, before) == set()


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        raise RuntimeError("no derivative")


def test_a_backward_that_raises_leaves_everything_restored() -> None:
    model, loss = eventful()
    before = state(model)
    flow = measure(model, lambda m: Failing.apply(loss(m)))
    assert flow.failure is not None
    assert changes(model, before) == set()


@pytest.mark.parametrize(
    "build",
    [
        eventful,
        lambda: classified(
            nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.3), nn.ReLU(True), nn.Linear(32, 10))
        ),
        lambda: classified(
            nn.Sequential(
                nn.Unflatten(1, (4, 16)),
                nn.TransformerEncoderLayer(16, 4, 32, dropout=0.2, batch_first=True),
                nn.Flatten(),
                nn.Linear(64, 10),
            )
        ),
        lambda: classified(mlp(nn.SiLU, 3).bfloat16()),
    ],
    ids=["eventful", "dropout", "transformer", "bfloat16"],
)
def test_the_loss_is_bitwise_that_of_a_run_without_measurement(build: Callable[[], Built]) -> None:
    model, loss = build()
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    seen = measure(model, loss).loss
    assert seen == loss(model).item()  # the generators stand where they stood


def test_the_users_tensors_are_left_alone() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(16, 4))
    plain, leaf = torch.randn(8, 16), torch.randn(8, 16, requires_grad=True)
    before = [(bits(t), t._version, t.grad) for t in (plain, leaf)]
    measure(model, lambda m: m(plain).sum() + m(leaf * 1).sum() + m(leaf[:, :] + 0).sum())
    measure(nn.Linear(16, 4), lambda m: m(leaf).sum() + m(plain).sum())
    assert [(bits(t), t._version, t.grad) for t in (plain, leaf)] == before


def test_an_optimizer_that_steps_inside_the_backward_does_not_step() -> None:
    model, loss = relu_he()
    stepped: list[Tensor] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(stepped.append)
    measure(model, loss)
    assert stepped == []
    loss(model).backward()
    assert len(stepped) == len(list(model.parameters()))


def test_hooks_of_the_user_run_and_stay() -> None:
    model, loss = relu_he()
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))  # pyright: ignore
    measure(model, loss)
    assert seen == ["forward"]
    loss(model)
    assert seen == ["forward"] * 2


def test_a_measurement_inside_no_grad_sees_the_same_and_leaves_it_off() -> None:
    model, loss = sigmoid_xavier(6)
    with torch.no_grad():
        inside = measure(model, loss)
        assert not torch.is_grad_enabled()
    assert (
        inside.column("grad_norm_log10").tolist() == measure(model, loss).column("grad_norm_log10").tolist()
    )


def test_a_flow_holds_nothing_of_the_model_and_can_be_stored() -> None:
    model, loss = sigmoid_xavier(6)
    outputs: list[weakref.ref[Tensor]] = []
    model.register_forward_hook(lambda _, __, out: outputs.append(weakref.ref(out)))
    flow = measure(model, loss)
    alive = weakref.ref(model)
    stored = pickle.loads(pickle.dumps(flow))
    del model, loss
    gc.collect()
    assert outputs[0]() is None
    assert alive() is None
    assert stored.sites == flow.sites
    assert stored.decades == flow.decades


def test_two_measurements_are_the_same() -> None:
    model, loss = eventful()
    first, second = measure(model, loss), measure(model, loss)
    assert [p.grad_norm_log10 for p in first.parameters] == [p.grad_norm_log10 for p in second.parameters]
    assert first.column("grad_norm_log10").tolist() == second.column("grad_norm_log10").tolist()


class Reversed(torch.autograd.Function):
    """One reversible layer: it keeps no graph, and its backward runs the layer again and differentiates it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return x + layer(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            (x + ctx.layer(x)).backward(grads[0])
        return x.grad, None


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.head = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = Reversed.apply(self.enter(x), self.inner)  # pyright: ignore
        return self.head(made)


@pytest.mark.parametrize("trained", [False, True])
def test_a_backward_inside_of_the_backward_leaves_no_gradient_behind(trained: bool) -> None:
    """And what it reaches is not said to receive none."""
    model, loss = classified(Reversible())
    if trained:
        loss(model).backward()
    before = state(model)
    found = check(model, loss)
    assert changes(model, before) == set()
    assert {p.name: p.state for p in found.flow.parameters}["inner.weight"] == "inside"
    assert "UP501" not in [f.code for f in found.findings]
