"""Readings against theory, against products in float64 and against a plain backward."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import reduce
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isograd import check, measure
from isograd.flow import Flow
from tests.models import (
    Apply,
    Built,
    Loss,
    Recorded,
    Repeated,
    Residual,
    Tied,
    branch,
    log10,
    mlp,
    orthogonal_chain,
    plain_gradients,
    projected,
    relu_he,
    sigmoid_xavier,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def at_model(flow: Flow) -> list[float]:
    """log10 gradient norm at the input and at every site of the model, the loss left out."""
    logs = flow.column("grad_norm_log10").tolist()
    return [log for site, log in zip(flow.sites, logs, strict=True) if site.kind != "loss"]


# -- oracles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "layers"), [(0.9, 50), (1.1, 50), (1.0, 50), (1e5, 60), (1e-5, 60)])
def test_gain_times_orthogonal_costs_log10_of_the_gain_in_every_layer(gain: float, layers: int) -> None:
    # small enough an input that the forward itself stays finite: only the backward is rescaled
    x = torch.randn(8, 16, dtype=torch.float64) * gain ** (-layers / 2)
    flow = measure(orthogonal_chain(gain, layers), projected(x))

    decades = flow.column("decades")[1 : layers + 1]
    assert flow.layers == layers
    assert decades.tolist() == pytest.approx([math.log10(gain)] * layers, abs=1e-9)
    assert flow.decades == pytest.approx(layers * math.log10(gain), abs=1e-6)
    assert flow.sigma == pytest.approx(gain, rel=1e-6)


@pytest.mark.parametrize("gain", [1e5, 1e-5])
def test_three_hundred_decades_neither_over_nor_underflow_in_float32(gain: float) -> None:
    chain, x = orthogonal_chain(gain, 60, dtype=torch.float32), torch.randn(8, 16) * 1e-20
    plain = torch.autograd.grad(chain(x.requires_grad_()).sum(), x)[0]
    assert not 0 < float(plain.norm()) < math.inf  # what the renormalisation is for

    flow = measure(chain, projected(x.detach()))

    assert flow.decades == pytest.approx(60 * math.log10(gain), abs=1e-3)
    assert flow.column("decades")[1:61].tolist() == pytest.approx([math.log10(gain)] * 60, abs=1e-5)


def test_four_hundred_sigmoid_layers_agree_with_the_product_in_float64() -> None:
    layers, width, batch = 400, 32, 8
    net = nn.Sequential(*(s for _ in range(layers) for s in (nn.Linear(width, width), nn.Sigmoid())))
    x, direction = torch.randn(batch, width), torch.randn(batch, width)
    plain = torch.autograd.grad((net(x) * direction).sum(), list(net.parameters()))
    assert float(plain[0].norm()) == 0.0

    flow = measure(net, lambda m: (m(x) * direction).sum())

    h, outputs = x.double(), list[Tensor]()
    for linear in net[::2]:
        h = torch.sigmoid(functional.linear(h, linear.weight.double(), linear.bias.double()))
        outputs.append(h)
    g, scale = direction.double(), 0.0
    expected = [log10(g)]
    for linear, out in zip(reversed(list(net[::2])), reversed(outputs), strict=True):
        for step in (lambda g, out=out: g * out * (1 - out), lambda g, w=linear.weight: g @ w.double()):
            g = step(g)
            scale, g = scale + log10(g), g / g.norm()
            expected.append(scale)
    assert at_model(flow) == pytest.approx(expected[::-1], abs=1e-3)
    assert flow.decades == pytest.approx(expected[-1] - expected[0], abs=1e-3)
    assert flow.decades < -240


def test_many_operations_that_are_one_site_neither_over_nor_underflow() -> None:
    small = Apply(lambda x: reduce(lambda y, _: torch.sin(y) * 1e-2, range(200), x))
    flow = measure(nn.Sequential(nn.Linear(16, 16), small, nn.Linear(16, 4)), projected(torch.randn(8, 16)))
    (site,) = [s for s in flow.sites if s.module == "1"]
    assert float(flow.column("decades")[site.depth]) == pytest.approx(-400.0, abs=1.0)


# -- a plain backward in float64 -------------------------------------------------------------------


def _plain() -> Recorded:
    return Recorded(
        nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 4)
    )


def _residual() -> Recorded:
    return Recorded(
        nn.Linear(16, 16), *(Residual(branch()) for _ in range(4)), nn.LayerNorm(16), nn.Linear(16, 4)
    )


def _images() -> Recorded:
    return Recorded(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.ELU(),
        nn.Sequential(nn.AvgPool2d(2), nn.Flatten()),
        nn.Linear(24, 4),
    )


@pytest.mark.parametrize("build", [_plain, _residual, _images])
@pytest.mark.parametrize("unit", [1.0, 1e-12, 65536.0])
def test_the_reading_of_every_site_is_the_gradient_of_a_plain_backward(
    build: Callable[[], Recorded], unit: float
) -> None:
    model = build().double()
    x = torch.randn(8, 16, dtype=torch.float64)
    loss = projected(x, unit)

    flow = measure(model, loss)

    leaf = x.clone().requires_grad_()
    value = projected(leaf, unit)(model)
    stages = [
        s for s in model.seen if not isinstance(model.stages[0], nn.Unflatten) or s is not model.seen[0]
    ]
    expected = [log10(g) for g in torch.autograd.grad(value, [leaf, *stages])]
    assert at_model(flow) == pytest.approx(expected, abs=1e-9)
    assert flow.loss == pytest.approx(value.item(), rel=1e-12)


def test_the_decades_of_the_sites_add_up_exactly_to_those_of_the_flow() -> None:
    model = _residual()
    flow = measure(model, projected(torch.randn(8, 16)))
    inside = at_model(flow)
    assert math.fsum(flow.column("decades").nan_to_num(0.0).tolist()) == pytest.approx(
        flow.decades, abs=1e-12
    )
    assert flow.decades == pytest.approx(inside[0] - inside[-1], abs=1e-12)


def test_a_gain_is_ten_to_the_power_of_its_decades() -> None:
    flow = measure(_residual(), projected(torch.randn(8, 16)))
    decades = flow.column("decades")
    assert decades.isnan().tolist() == [site.kind in ("input", "loss") for site in flow.sites]
    assert flow.column("gain").log10().tolist() == pytest.approx(decades.tolist(), nan_ok=True)


def test_forward_columns_are_root_mean_squares_of_the_outputs() -> None:
    model, x = _residual().double(), torch.randn(8, 16, dtype=torch.float64)
    flow = measure(model, projected(x))
    model(x)
    expected = [t.square().mean().sqrt().item() for t in (x, *model.seen)]
    assert flow.column("activation_rms")[: len(expected)].tolist() == pytest.approx(expected, rel=1e-5)
    gains = [b / a for a, b in pairwise(expected)]
    assert flow.column("forward_gain")[1 : len(expected)].tolist() == pytest.approx(gains, rel=1e-5)
    assert flow.column("forward_gain")[0].isnan()


# -- parameters ------------------------------------------------------------------------------------


def _tied(gain: float = 1.0) -> Built:
    tokens = torch.randint(11, (4, 7))
    loss: Loss = lambda m: functional.cross_entropy(m(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())  # noqa: E731
    return Tied(gain=gain), loss


def _shared(gain: float, times: int, scale: float = 1.0) -> Built:
    return Repeated(orthogonal_chain(gain, 1), times), projected(
        scale * torch.randn(8, 16, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "build",
    [
        _tied,
        lambda: _tied(gain=50.0),
        lambda: _shared(1.3, 8),
        lambda: _shared(0.5, 100),
        lambda: _shared(2.0, 100),
        lambda: (Repeated(mlp(nn.Sigmoid, 1, width=16, inputs=16, classes=16), 30), projected(torch.randn(8, 16).double())),
        lambda: (_residual(), projected(torch.randn(8, 16).double())),
        lambda: (_images(), projected(torch.randn(8, 16).double())),
    ],
    ids=["tied", "tied, exploding", "8 times", "100 times, vanishing", "100 times, exploding", "sigmoid", "residual", "images"],
)  # fmt: skip
def test_gradients_of_parameters_are_those_of_a_plain_backward(build: Callable[[], Built]) -> None:
    model, loss = build()
    model.double()
    flow = measure(model, loss)

    assert {p.name: p.grad_norm_log10 for p in flow.parameters} == pytest.approx(
        plain_gradients(model, loss), abs=1e-9
    )
    assert {p.state for p in flow.parameters} == {"measured"}
    for p, parameter in zip(flow.parameters, model.parameters(), strict=True):
        assert p.weight_norm == pytest.approx(parameter.norm().item(), rel=1e-6)
        ratio = p.grad_norm_log10 - log10(parameter) if parameter.any() else math.nan
        assert p.ratio_log10 == pytest.approx(ratio, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(("gain", "scale"), [(10.0, 1e-30), (0.1, 1e30)])
def test_a_weight_shared_across_sixty_decades_is_read_right(gain: float, scale: float) -> None:
    model, loss = _shared(gain, 60, scale)
    flow = measure(model.double(), loss)
    (weight,) = flow.parameters
    assert weight.grad_norm_log10 == pytest.approx(plain_gradients(model, loss)["layer.0.weight"], abs=1e-6)


@pytest.mark.parametrize("gain", [10.0, 0.1])
def test_a_bias_shared_across_sixty_decades_is_read_right(gain: float) -> None:
    """Its contributions are the gradients themselves: 60 decades lie between the first and the last."""
    layer = nn.Linear(16, 16).double()
    nn.init.orthogonal_(layer.weight, gain)
    model, loss = Repeated(layer, 60), projected(torch.randn(8, 16, dtype=torch.float64))
    flow = measure(model, loss)
    found = {p.name: p.grad_norm_log10 for p in flow.parameters}
    assert found == pytest.approx(plain_gradients(model, loss), abs=1e-6)


def test_none_is_told_from_exact_zero_and_frozen_from_unused() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.frozen, self.unused = (nn.Linear(16, 16) for _ in range(3))
            self.before, self.zero = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.frozen.requires_grad_(False)
            nn.init.zeros_(self.zero.weight)

        def forward(self, x: Tensor) -> Tensor:
            x = self.frozen(self.used(x))
            return x + self.zero(torch.tanh(self.before(x)))

    flow = measure(Parts(), projected(torch.randn(8, 16)))
    states = {p.name: p.state for p in flow.parameters}
    logs = {p.name: p.grad_norm_log10 for p in flow.parameters}
    assert states == {
        "used.weight": "measured",
        "used.bias": "measured",
        "frozen.weight": "frozen",
        "frozen.bias": "frozen",
        "unused.weight": "unused",
        "unused.bias": "unused",
        "before.weight": "measured",
        "zero.weight": "measured",
    }
    assert logs["before.weight"] == -math.inf  # behind a branch that starts at zero
    assert math.isfinite(logs["zero.weight"])
    assert math.isnan(logs["unused.weight"])
    assert math.isnan(logs["frozen.weight"])
    zeros = {p.name: p.zeros for p in flow.parameters}
    assert (zeros["before.weight"], zeros["zero.weight"]) == (1.0, 0.0)


# -- cost ------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts the forwards and backwards that go through it, of copies of it too."""

    def __init__(self, inner: nn.Module, counts: dict[str, int]) -> None:
        super().__init__()
        self.inner, self.counts = inner, counts

    def __deepcopy__(self, memo: dict[int, object]) -> Counting:
        return Counting(copy.deepcopy(self.inner, memo), self.counts)

    def forward(self, x: Tensor) -> Tensor:
        self.counts["forward"] += 1
        out = self.inner(x)

        def count(grad: Tensor) -> None:
            self.counts["backward"] += 1

        out.register_hook(count)
        return out


def _counted(built: Built) -> tuple[nn.Module, Loss, dict[str, int]]:
    counts = {"forward": 0, "backward": 0}
    return Counting(built[0], counts), built[1], counts


def test_a_measurement_is_one_forward_and_one_backward() -> None:
    model, loss, counts = _counted(sigmoid_xavier(6))
    measure(model, loss)
    assert counts == {"forward": 1, "backward": 1}


def test_a_check_of_a_healthy_model_is_one_forward_and_one_backward() -> None:
    model, loss, counts = _counted(relu_he())
    assert check(model, loss).verdict == "healthy"
    assert counts == {"forward": 1, "backward": 1}


def test_a_check_of_a_sick_model_tries_interventions_one_forward_and_backward_each() -> None:
    model, loss, counts = _counted(sigmoid_xavier(6))
    (finding,) = check(model, loss).errors
    assert counts["forward"] == counts["backward"] > len(finding.effects) > 0


def test_a_residual_segment_that_no_gradient_enters_has_no_split() -> None:
    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(11, (2, 6))
    nn.init.normal_(model.token.weight, std=50.0)  # the head is tied to it: softmax is 1 at the token itself
    flow = measure(model, lambda m: functional.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten()))
    assert flow.splits
    assert all(math.isnan(split.skip) and math.isnan(split.branch) for split in flow.splits.values())


class Split(nn.Module):
    """One node with two outputs, whose gradients come by ways of very different length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.near, self.head = nn.Linear(16, 24), nn.Linear(8, 16), nn.Linear(16, 1)
        self.far = nn.ModuleList(nn.Linear(16, 16) for _ in range(30))

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.first(x).split([16, 8], 1)
        for layer in self.far:
            u = torch.sigmoid(layer(u))
        return self.head(u + 1e-12 * self.near(v))


def test_gradients_of_different_scale_reach_two_outputs_of_one_node() -> None:
    torch.manual_seed(0)
    model, x = Split(), torch.randn(8, 16)
    flow = measure(model, lambda m: m(x).square().mean())
    exact = model.double()
    found = torch.autograd.grad(exact(x.double()).square().mean(), list(exact.parameters()))
    norms = {p.name: p.grad_norm_log10 for p in flow.parameters}
    for (name, _), gradient in zip(exact.named_parameters(), found, strict=True):
        assert norms[name] == pytest.approx(math.log10(float(gradient.norm())), abs=1e-5)


class Dropped(nn.Module):
    """Drops whole samples, as stochastic depth does, behind its hidden layers."""

    def __init__(self, kept: float) -> None:
        super().__init__()
        self.body, self.head, self.kept = (
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
            nn.Linear(8, 2),
            kept,
        )

    def forward(self, x: Tensor) -> Tensor:
        mask = (torch.rand(len(x), 1) < self.kept).float()
        return self.head(self.body(x) * mask / max(self.kept, 0.1))


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_one_draw_that_drops_all_samples_is_not_taken_for_the_network(kept: float) -> None:
    torch.manual_seed(0)
    model, x, y = Dropped(kept), torch.randn(2, 8), torch.tensor([0, 1])
    lost = list[float]()
    for seed in range(8):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        lost.append(measure(model, lambda m: functional.cross_entropy(m(x), y)).lost)
        assert torch.equal(before, torch.get_rng_state())
    assert all((one == -math.inf) == (kept == 0) for one in lost)


def test_a_dropout_before_the_head_rescales_once_and_is_none_of_depth() -> None:
    torch.manual_seed(0)
    body = [nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
    model = nn.Sequential(*body, nn.Dropout(0.99), nn.Linear(64, 3))
    x, y = torch.randn(256, 16), torch.randint(3, (256,))
    flow = measure(model, lambda m: functional.cross_entropy(m(x), y))
    dropout = next(i for i, site in enumerate(flow.sites) if site.kind == "dropout")
    assert flow.column("decades")[dropout] == pytest.approx(1.0, abs=0.2)  # 1 / sqrt(1 - p)
    assert flow.hidden.stop == dropout


@pytest.mark.parametrize("own", ["list", "optimizer", "modules"])
def test_layers_in_a_plain_list_are_said_to_be_nobodys(own: str) -> None:
    model, body = nn.Sequential(nn.Linear(8, 4)), [nn.Linear(8, 8), nn.Linear(8, 8)]
    parameters = [*model.parameters(), *(p for layer in body for p in layer.parameters())]
    if own == "modules":
        model.extend(body)
    optimizer = torch.optim.SGD(parameters, lr=0.1) if own == "optimizer" else None

    def loss(model: nn.Module) -> torch.Tensor:
        x = torch.randn(4, 8)
        for layer in body:
            x = torch.tanh(layer(x))
        return model[0](x).square().mean()  # pyright: ignore

    said = check(model, loss, optimizer=optimizer).unexamined.get("parameters", "")
    assert ("depends on 4 that are no parameters of the model, the largest 8 x 8" in said) is (own == "list")
