"""Skip and branch of a residual addition, however it is written, against vectors worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isograd import measure
from isograd.flow import Flow
from isograd.statistics import Split
from tests.models import Residual, branch, projected


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


Join = Callable[[Tensor, nn.Module], Tensor]
Part = Callable[[Tensor, nn.Module], Tensor]
GAMMA = torch.full((16,), 0.3, dtype=torch.float64)


def _in_place(x: Tensor, f: nn.Module) -> Tensor:
    y = f(x)
    y += x
    return y


def _into_the_stream(x: Tensor, f: nn.Module) -> Tensor:
    return x.add_(f(x.clone()))


class Add(nn.Module):
    """An addition that is a module, as quantisation-ready code has it."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


def _identity(x: Tensor, f: nn.Module) -> Tensor:
    return x


def _branch(x: Tensor, f: nn.Module) -> Tensor:
    return f(x)


JOINS: dict[str, tuple[Join, Part, Part]] = {
    "x + f(x)": (lambda x, f: x + f(x), _identity, _branch),
    "f(x) + x": (lambda x, f: f(x) + x, _identity, _branch),
    "y += x": (_in_place, _identity, _branch),
    "x.add_(f(x))": (_into_the_stream, _identity, _branch),
    "torch.add": (lambda x, f: torch.add(x, f(x), alpha=0.5), _identity, lambda x, f: 0.5 * f(x)),
    "x - f(x)": (lambda x, f: x - f(x), _identity, lambda x, f: -f(x)),
    "a module adds": (lambda x, f: Add()(x, f(x)), _identity, _branch),
    "a x + f(x)": (lambda x, f: x * 0.7 + f(x), lambda x, f: 0.7 * x, _branch),
    "LayerScale": (lambda x, f: x + GAMMA * f(x), _identity, lambda x, f: GAMMA * f(x)),
    "two branches": (lambda x, f: x + f(x) + torch.tanh(f(x)), _identity, lambda x, f: f(x) + torch.tanh(f(x))),
    "views on the way": (lambda x, f: (x.view(2, 4, 16) + f(x.view(2, 4, 16))).view(8, 16), _identity, _branch),
    "dropout on the skip": (
        lambda x, f: functional.dropout(x, 0.0) + f(x),
        _identity,
        _branch,
    ),
}  # fmt: skip
"""How a block is written: the whole, what is its skip, what is its branch."""


class Block(nn.Module):
    def __init__(self, join: Join) -> None:
        super().__init__()
        self.f, self.join = branch(), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.f)


def split_of(flow: Flow) -> tuple[int, Split]:
    (item,) = flow.splits.items()
    return item


@pytest.mark.parametrize("form", JOINS)
def test_skip_and_branch_are_told_apart_in_every_way_to_write_an_addition(form: str) -> None:
    join, skip, other = JOINS[form]
    first, block = nn.Linear(16, 16).double(), Block(join).double()
    x, direction = torch.randn(8, 16, dtype=torch.float64), torch.randn(8, 16, dtype=torch.float64)
    flow = measure(nn.Sequential(first, block), lambda m: (m(x) * direction).sum())

    stream = first(x).detach().requires_grad_()
    ways = [torch.autograd.grad((way(stream, block.f) * direction).sum(), stream)[0] for way in (skip, other)]
    depth, split = split_of(flow)
    assert flow.sites[depth].kind == "residual add"
    assert flow.sites[depth].module.startswith("1")
    assert split.skip == pytest.approx(float(ways[0].norm() / direction.norm()), rel=1e-9)
    assert split.branch == pytest.approx(float(ways[1].norm() / direction.norm()), rel=1e-9)
    total = float((ways[0] + ways[1]).norm() / direction.norm())
    assert float(flow.column("gain")[depth]) == pytest.approx(total, rel=1e-9)


class Multiplied(nn.Module):
    """x + factor * f(x), or the skip times it."""

    def __init__(self, factor: float, *, skip: bool) -> None:
        super().__init__()
        self.branch, self.factor, self.skip = branch(), factor, skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return self.factor * x + y if self.skip else x + self.factor * y


BLOCKS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "x + f(x)": (lambda: Residual(branch()), 1.0),
    "x + 3 f(x)": (lambda: Multiplied(3.0, skip=False), 3.0),
    "0.5 x + f(x)": (lambda: Multiplied(0.5, skip=True), 1.0),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_forward_ratio_is_that_of_branch_and_stream(name: str) -> None:
    make, factor = BLOCKS[name]
    first, block = nn.Linear(16, 16).double(), make().double()
    x = torch.randn(8, 16, dtype=torch.float64)
    _, split = split_of(measure(nn.Sequential(first, block), projected(x)))
    stream = first(x)
    inner = block.get_submodule("branch")(stream)
    assert split.forward_ratio == pytest.approx(factor * (inner.norm() / stream.norm()).item(), rel=1e-5)


def test_the_ledger_of_a_branch_adds_up_to_its_share() -> None:
    model = nn.Sequential(nn.Linear(16, 16), *(Residual(branch()) for _ in range(3))).double()
    flow = measure(model, projected(torch.randn(8, 16, dtype=torch.float64)))
    assert len(flow.splits) == 3
    for depth, split in flow.splits.items():
        steps = flow.ledgers[depth]
        assert [step.site.operation for step in steps] == ["linear", "gelu", "linear", "layer_norm"]
        assert all(step.branch for step in steps)
        assert math.fsum(step.decades for step in steps) == pytest.approx(math.log10(split.branch), abs=1e-9)


class Projected(nn.Module):
    """A ResNet block that changes its width: the shortcut has weights too, but fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Linear(16, 8, bias=False)
        self.branch = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


def test_a_projection_shortcut_is_the_skip() -> None:
    model, x = Projected().double(), torch.randn(8, 16, dtype=torch.float64)
    direction = torch.randn(8, 8, dtype=torch.float64)
    _, split = split_of(measure(model, lambda m: (m(x) * direction).sum()))
    skip = direction @ model.shortcut.weight
    assert split.skip == pytest.approx((skip.norm() / direction.norm()).item(), rel=1e-9)


@pytest.mark.parametrize("pre", [True, False])
def test_pre_and_post_norm_blocks_give_one_residual_add_each(pre: bool) -> None:
    def f() -> nn.Sequential:
        return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def block() -> nn.Module:
        norm = nn.LayerNorm(16)
        return Residual(nn.Sequential(norm, f())) if pre else nn.Sequential(Residual(f()), norm)

    flow = measure(
        nn.Sequential(nn.Linear(16, 16), *(block() for _ in range(3))), projected(torch.randn(8, 16))
    )
    kinds = [site.kind for site in flow.sites if site.kind not in ("input", "linear", "loss")]
    assert kinds == (["residual add"] * 3 if pre else ["residual add", "normalisation"] * 3)


def test_a_sum_without_a_skip_is_no_residual_add() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.a(x)) + torch.tanh(self.b(x))

    flow = measure(Towers(), projected(torch.randn(8, 16)))
    assert flow.splits == {}
    assert "residual add" not in {site.kind for site in flow.sites}
