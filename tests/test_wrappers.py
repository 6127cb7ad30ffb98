"""Whatever a model is wrapped in or made of, the reading is that of the plain model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from isograd import check, measure
from isograd.flow import Flow
from tests.models import (
    Residual,
    branch,
    classified,
    mlp,
    plain_gradients,
    projected,
    sigmoid_xavier,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def same(a: Flow, b: Flow, tolerance: float = 1e-5) -> None:
    """The two flows tell the same, site by site and parameter by parameter."""
    for name in ("grad_norm_log10", "activation_rms", "weighted"):
        assert a.column(name).tolist() == pytest.approx(b.column(name).tolist(), abs=tolerance, nan_ok=True)
    assert [(s.kind, s.operation, s.shape) for s in a.sites] == [
        (s.kind, s.operation, s.shape) for s in b.sites
    ]
    assert [p.grad_norm_log10 for p in a.parameters] == pytest.approx(
        [p.grad_norm_log10 for p in b.parameters], abs=tolerance
    )
    assert a.layers == b.layers


# -- compilation and parallelism -------------------------------------------------------------------


def test_a_compiled_model_is_unwrapped_and_that_is_said() -> None:
    model, loss = sigmoid_xavier(6)
    compiled = torch.compile(model)
    flow = measure(compiled, loss)  # pyright: ignore[reportArgumentType]
    same(flow, measure(model, loss))
    assert [p.name for p in flow.parameters] == [name for name, _ in model.named_parameters()]
    assert flow.notes == ("unwrapped from torch.compile: measured eagerly",)
    assert measure(model, loss).notes == ()


def test_parts_that_are_compiled_are_seen_through() -> None:
    model, loss = sigmoid_xavier(6)
    plain = measure(model, loss)
    whole, part = copy.deepcopy(model), copy.deepcopy(model)
    whole.compile()
    part[3].compile()
    for compiled in (whole, part):
        same(measure(compiled, loss), plain)


def test_a_compiled_function_is_seen_through() -> None:
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)
            self.middle = torch.compile(lambda x: torch.sigmoid(torch.sigmoid(x)), backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.middle(self.a(x)))

    model, x = Compiled(), torch.randn(8, 16)
    for _ in range(2):  # before and after it was compiled
        operations = [s.operation for s in measure(model, projected(x)).sites]
        assert operations[1:5] == ["linear", "sigmoid", "sigmoid", "linear"]
        model(x)


@contextmanager
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(
            "gloo", init_method=Path(folder, "store").as_uri(), rank=0, world_size=1
        )
        try:
            yield
        finally:
            distributed.destroy_process_group()


def test_data_parallel_wrappers_are_unwrapped_and_that_is_said() -> None:
    model, loss = classified(mlp(nn.Tanh, 3))
    plain = measure(model, loss)
    same(flow := measure(nn.DataParallel(model), loss), plain)
    assert flow.notes[0].startswith("unwrapped from DataParallel")
    with process_group():
        wrapped = nn.parallel.DistributedDataParallel(model)
        same(flow := measure(wrapped, loss), plain)
        assert flow.notes[0].startswith("unwrapped from DistributedDataParallel")
        loss(wrapped).backward()  # its reducer has not been confused


# -- checkpoints and custom functions --------------------------------------------------------------


class Checkpointed(nn.Module):
    """Residual blocks, run under a checkpoint or not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.reentrant = nn.Linear(16, 16), reentrant
        self.blocks = nn.ModuleList(nn.Sequential(Residual(branch()), nn.Dropout(0.2)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_block_is_seen_through(reentrant: bool) -> None:
    plain, model = Checkpointed(None), Checkpointed(reentrant)
    model.load_state_dict(plain.state_dict())
    x = torch.randn(8, 16)
    flow = measure(model, projected(x))
    same(flow, measure(plain, projected(x)))
    assert len(flow.splits) == 3
    assert flow.failure is None
    assert all(p.grad is None for p in model.parameters())


class Damping(torch.autograd.Function):
    """Identity whose backward loses three decades."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * 1e-3


class Damped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Damping.apply(torch.tanh(self.a(x))))


def test_a_custom_function_is_a_site_of_its_own() -> None:
    flow = measure(Damped(), projected(torch.randn(8, 16)))
    (site,) = [s for s in flow.sites if s.kind == "custom"]
    assert site.operation == "Damping"
    assert float(flow.column("decades")[site.depth]) == pytest.approx(-3.0, abs=1e-5)


def test_in_place_activations_are_read_like_others() -> None:
    plain, loss = classified(mlp(nn.ReLU, 4))
    inplace = copy.deepcopy(plain)
    for module in inplace:
        if isinstance(module, nn.ReLU):
            module.inplace = True
    a, b = measure(inplace, loss), measure(plain, loss)
    assert a.column("grad_norm_log10").tolist() == pytest.approx(
        b.column("grad_norm_log10").tolist(), abs=1e-5
    )
    assert [(x.function, x.dead, x.mean_derivative) for x in a.activations] == [
        (x.function, x.dead, x.mean_derivative) for x in b.activations
    ]


def test_vmap_inside_a_forward() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.vmap(torch.tanh)(self.a(x)))

    model, loss = Mapped().double(), projected(torch.randn(8, 16, dtype=torch.float64))
    flow = measure(model, loss)
    assert {p.name: p.grad_norm_log10 for p in flow.parameters} == pytest.approx(
        plain_gradients(model, loss), abs=1e-9
    )


def test_a_closure_may_differentiate_by_the_input() -> None:
    """Physics-informed networks, gradient penalties and forces do."""
    model = nn.Sequential(
        nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)
    ).double()
    t = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)

    def loss(m: nn.Module) -> Tensor:
        u = m(t)
        (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        return (slope.square().sum(1) - 1).square().mean() + u.square().mean()

    flow = measure(model, loss)
    assert {p.name: p.grad_norm_log10 for p in flow.parameters} == pytest.approx(
        plain_gradients(model, loss), abs=1e-9
    )
    assert t.grad is None


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "weight_norm by hooks"],
)
def test_a_weight_that_is_computed_is_still_a_layer(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(
        wrap(nn.Linear(16, 16)), nn.Tanh(), wrap(nn.Linear(16, 16)), nn.Tanh(), nn.Linear(16, 4)
    )
    model.double().eval()  # spectral norm iterates in training
    loss = projected(torch.randn(8, 16, dtype=torch.float64))
    flow = measure(model, loss)
    assert flow.layers == 3
    assert [s.kind for s in flow.sites[:6]] == [
        "input",
        "linear",
        "activation",
        "linear",
        "activation",
        "linear",
    ]
    assert {p.name: p.grad_norm_log10 for p in flow.parameters} == pytest.approx(
        plain_gradients(model, loss), abs=1e-9
    )


# -- the same diagnosis ----------------------------------------------------------------------------


def _data_parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)  # pyright: ignore


@pytest.mark.parametrize("wrap", [_data_parallel, _compiled])
def test_a_wrapped_model_has_the_same_diagnosis_with_its_causes(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    model, loss = sigmoid_xavier(8)
    plain, wrapped = check(model, loss), check(wrap(model), loss)
    assert wrapped.verdict == plain.verdict == "vanishing"
    assert [f.evidence.get("causes") for f in wrapped.errors] == [
        f.evidence.get("causes") for f in plain.errors
    ]


def test_a_model_without_values_is_told_to_get_some() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(4, 1), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="lies on the meta device, where weights have shapes and no values"):
        measure(model, lambda m: m(x).sum())


def test_a_sharded_model_is_told_to_come_before_it_is_sharded() -> None:
    with process_group():
        mesh = init_device_mesh("cpu", (1,))
        model = distribute_module(nn.Linear(4, 4), mesh)
        with pytest.raises(ValueError, match="before fully_shard"):
            measure(model, lambda m: m(torch.randn(2, 4)).sum())
