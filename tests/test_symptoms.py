"""Every symptom: what triggers it, what does not, and the contract that a new file inherits by existing."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

from gallery.nets import GatedConvolution, Shape, Transformer, WaveNet, plain_cnn
from isograd import check, diagnose, measure, prescribe, repair, surgery
from isograd.check import along_time
from isograd.diagnosis import Diagnosis, Finding, Severity
from isograd.flow import Flow
from isograd.graph import signal
from isograd.statistics import (
    Activation,
    Failure,
    InputStatistics,
    LossCall,
    NonFinite,
    Parameter,
    Site,
    Split,
)
from isograd.symptoms import NAMES, Healthy, Unexamined
from isograd.symptoms.damped_skips import DAMPED
from isograd.symptoms.rank_collapse import WARNING, own
from tests.models import (
    HE,
    Apply,
    Built,
    Residual,
    Tied,
    branch,
    classified,
    mlp,
    relu_he,
    relu_large,
    sigmoid_xavier,
)

MODULES: dict[str, ModuleType] = {name: import_module(f"isograd.symptoms.{name}") for name in NAMES}


def diagnosed(built: Built, optimizer: Callable[[nn.Module], Optimizer] | None = None) -> Diagnosis:
    model, loss = built
    flow = measure(model, loss, optimizer=optimizer(model) if optimizer is not None else None)
    return diagnose(along_time(flow, model, loss))


# -- what triggers each, and its healthy twin ------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A net that has the symptom and one that differs only in the fault."""

    sick: Callable[[], Built]
    well: Callable[[], Built]
    severity: Severity = Severity.ERROR
    optimizer: Callable[[nn.Module], Optimizer] | None = None
    cured: Callable[[nn.Module], Optimizer] | None = None
    """Optimizer of the healthy twin, where it is the optimizer that is at fault."""


class Raising(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        raise RuntimeError("no derivative")


def behind(function: Callable[[Tensor], Tensor]) -> Callable[[], Built]:
    """A small healthy network with a function at its output."""
    return lambda: classified(mlp(nn.Tanh, 3, 1.0).append(Apply(function)))


def half(factor: float) -> Callable[[], Built]:
    def build() -> Built:
        model, loss = classified(mlp(nn.Tanh, 3, 1.0).half())
        return model, lambda m: loss(m) * factor

    return build


def biased(bias: float) -> Callable[[], Built]:
    """ReLU layers of which one has a bias far below zero, or not."""

    def build() -> Built:
        model = mlp(nn.ReLU, 3, HE)
        nn.init.constant_(model[2].bias, bias)  # pyright: ignore
        return classified(model)

    return build


def tanh_of(gain: float) -> Callable[[], Built]:
    return lambda: classified(mlp(nn.Tanh, 4, gain))


def scaled_input(factor: float, offset: float = 0.0) -> Callable[[], Built]:
    def build() -> Built:
        model, x, y = mlp(nn.ReLU, 3, HE), torch.randn(32, 64) * factor + offset, torch.randint(10, (32,))
        return model, lambda m: functional.cross_entropy(m(x), y)

    return build


class Spare(nn.Module):
    """A body and a second head that the loss depends on, or not."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.body, self.spare, self.used = mlp(nn.Tanh, 3, 1.0), nn.Linear(10, 10), used

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x + self.spare(x) if self.used else x


class LastStep(nn.Module):
    """What a recurrent layer makes of a sequence, read at its end."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel, self.head = kernel, nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.kernel(x.unflatten(1, (64, 1)).expand(-1, -1, 8))[0][:, -1])


def recurrent(kind: Callable[..., nn.Module], **parameters: float) -> Callable[[], Built]:
    """Reads 64 steps, with parameters of the recurrence filled or, where it is a matrix, made orthogonal."""

    def build() -> Built:
        kernel = kind(8, 32, batch_first=True)
        for name, value in parameters.items():
            parameter = kernel.get_parameter(name)
            if parameter.ndim == 2:
                nn.init.orthogonal_(parameter, value)
            else:
                nn.init.constant_(parameter[32:64], value)
        return classified(LastStep(kernel))

    return build


class Skip(nn.Module):
    """norm(skip * x + f(x))."""

    def __init__(self, f: nn.Module, skip: float, width: int) -> None:
        super().__init__()
        self.f, self.skip, self.norm = f, skip, nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.skip * x + self.f(x))


class Average(nn.Module):
    """Attention at its most even: each token becomes the mean of those up to it."""

    def __init__(self, width: int, loud: float) -> None:
        super().__init__()
        self.values, self.loud = nn.Linear(width, width), loud
        nn.init.orthogonal_(self.values.weight)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return self.loud * self.values(x).cumsum(1) / steps


def tokens(skip: float, batch: int = 4, loud: float = 1.0) -> Built:
    """Answers token by token, behind four averages with skips of a given strength."""
    x = torch.randint(11, (batch, 24))
    body = nn.Sequential(*(Skip(Average(16, loud), skip, 16) for _ in range(4)))
    model = nn.Sequential(nn.Embedding(11, 16), body, nn.Linear(16, 11))
    return model, lambda m: functional.cross_entropy(m(x).float().flatten(0, 1), x.flatten())


class Attend(nn.Module):
    """x + attention over the tokens, with queries and keys times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.query, self.key, self.values = (nn.Linear(16, 16) for _ in range(3))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        y = functional.layer_norm(x, (16,))
        query, key, value = (f(y)[:, None] for f in (self.query, self.key, self.values))
        return x + functional.scaled_dot_product_attention(self.factor * query, key, value)[:, 0]


def attending(factor: float, batch: int = 4) -> Built:
    x, y = torch.randn(batch, 24, 16), torch.randint(11, (batch, 24))
    model = nn.Sequential(nn.Linear(16, 16), Attend(factor), Attend(factor), nn.Linear(16, 11))

    def loss(m: nn.Module) -> Tensor:
        return functional.cross_entropy(
            m(x.to(next(m.parameters()).dtype)).float().flatten(0, 1), y.flatten()
        )

    return model, loss


def normalised(
    change: Callable[[nn.Module], object] = lambda norm: None,
    batch: int = 32,
    *,
    weights: Callable[[Tensor], object] = lambda weight: None,
    norm: Callable[[int], nn.Module] = nn.BatchNorm1d,
) -> Built:
    """Four normalised layers, each norm changed and all weights drawn."""
    model = nn.Sequential()
    for _ in range(4):
        model.extend([nn.Linear(64, 64), norm(64), nn.ReLU()])
        weights(model[-3].weight)  # pyright: ignore[reportArgumentType]
    for layer in model[1::3]:
        change(layer)
    model.append(nn.Linear(64, 10))
    x, y = torch.randn(batch, 64), torch.randint(10, (batch,))
    return model, lambda m: functional.cross_entropy(m(x.to(next(m.parameters()).dtype)).float(), y)


class Neighbours(nn.Module):
    """Attention of a graph: what a neighbour counts for is the sum of what two vectors say of both ends."""

    def __init__(self, loud: float) -> None:
        super().__init__()
        self.values = nn.Linear(16, 16)
        self.query, self.key = (nn.Parameter(loud * torch.randn(16) / 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        values = self.values(x)
        logits = functional.leaky_relu((values @ self.query)[:, None] + values @ self.key, 0.2)
        return functional.elu(logits.softmax(-1) @ values)


def neighbours(loud: float) -> Built:
    model = nn.Sequential(Neighbours(loud), Neighbours(loud), nn.Linear(16, 4))
    x, y = torch.randn(40, 16), torch.randint(4, (40,))
    return model, lambda m: functional.cross_entropy(m(x), y)


class Skipping(nn.Module):
    """skip * x + branch(x)."""

    def __init__(self, skip: float) -> None:
        super().__init__()
        self.skip, self.branch = skip, branch(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip * x + self.branch(x)


def skipping(skip: float, blocks: int = 20, batch: int = 32) -> Built:
    """Residual blocks, and a norm behind them."""
    body = [Skipping(skip) for _ in range(blocks)]
    model = nn.Sequential(nn.Linear(16, 16), *body, nn.LayerNorm(16), nn.Linear(16, 10))
    x, y = torch.randn(batch, 16), torch.randint(10, (batch,))
    return model, lambda m: functional.cross_entropy(m(x.to(next(m.parameters()).dtype)).float(), y)


class Added(nn.Module):
    """x plus a branch, times a number."""

    def __init__(self, times: float, learned: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.times = nn.Parameter(torch.tensor(times)) if learned else times

    def forward(self, x: Tensor) -> Tensor:
        return x + self.times * self.branch(x)


def added(times: float, learned: bool = False) -> Built:
    model = nn.Sequential(*(Added(times, learned) for _ in range(4)), nn.Linear(16, 10))
    x, y = torch.randn(32, 16), torch.randint(10, (32,))
    return model, lambda m: functional.cross_entropy(m(x), y)


def drawn_near_zero(norm: nn.BatchNorm1d) -> None:
    nn.init.normal_(norm.weight, std=0.02)


def large_epsilon(norm: nn.BatchNorm1d) -> None:
    norm.eps = 1e3


def above_zero(weight: Tensor) -> Tensor:
    return nn.init.uniform_(weight, 0.0, 0.05)


def headed(gain: float) -> Built:
    """A healthy body whose head is drawn larger."""
    model = mlp(nn.ReLU, 3, HE)
    with torch.no_grad():
        model[-1].weight.mul_(gain)  # pyright: ignore
    return classified(model)


def scaled_output(times: float) -> Built:
    model, x, y = mlp(nn.ReLU, 3, HE), torch.randn(32, 64), torch.randint(10, (32,))
    return model, lambda m: functional.cross_entropy(m(x) * times, y)


relu_recurrence = partial(nn.RNN, nonlinearity="relu")


def dropped(p: float, between: Callable[[], nn.Module] = nn.ReLU) -> Built:
    """Four layers, a dropout behind each."""
    layers = [m for _ in range(4) for m in (nn.Linear(64, 64), between(), nn.Dropout(p))]
    return classified(nn.Sequential(*layers, nn.Linear(64, 10)))


def scattered(scale: float) -> Built:
    """Residual blocks whose biases are drawn N(0, scale^2)."""
    blocks = (
        nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(4)
    )
    model = nn.Sequential(nn.Linear(64, 64), *map(Residual, blocks), nn.LayerNorm(64), nn.Linear(64, 10))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "0.bias" not in name:
            nn.init.normal_(parameter, std=scale)
    return classified(model)


PAIRS: dict[str, Pair] = {
    "failed_backward": Pair(behind(Raising.apply), behind(torch.clone)),
    "nonfinite_forward": Pair(behind(lambda x: torch.log(x - x)), behind(lambda x: torch.log(x - x + 1) + x)),
    "nonfinite_backward": Pair(
        behind(lambda x: x + torch.sqrt(x - x)), behind(lambda x: x + torch.sqrt(x - x + 1))
    ),
    "no_gradient_at_loss": Pair(behind(lambda x: x.softmax(-1)), behind(torch.clone)),
    "vanishing_gradient": Pair(lambda: sigmoid_xavier(10), relu_he),
    "epsilon_above_variance": Pair(lambda: normalised(large_epsilon), normalised),
    "rank_collapse": Pair(lambda: tokens(0.0), lambda: tokens(1.0)),
    "muted_normalisation": Pair(lambda: normalised(drawn_near_zero), normalised),
    "hidden_initialisation": Pair(lambda: normalised(weights=above_zero), normalised),
    "loud_dropout": Pair(lambda: dropped(0.9), lambda: dropped(0.2)),
    "mixed_samples": Pair(lambda: classified(Rows(nn.GRU, False)), lambda: classified(Rows(nn.GRU, True))),
    "loud_biases": Pair(lambda: scattered(10.0), lambda: scattered(1.0)),
    "damped_skips": Pair(lambda: skipping(0.3), lambda: skipping(1.0)),
    "muted_branches": Pair(lambda: added(1e-4), lambda: added(0.1)),
    "shrunk_output": Pair(lambda: scaled_output(0.003), lambda: scaled_output(1.0)),
    "exploding_gradient": Pair(relu_large, relu_he),
    "exploding_activation": Pair(relu_large, relu_he),
    "far_start": Pair(lambda: headed(100.0), lambda: headed(1.0)),
    "gradient_underflow": Pair(half(1e-7), half(1.0)),
    "dead_units": Pair(biased(-30.0), biased(0.0)),
    "saturated_units": Pair(tanh_of(30.0), tanh_of(1.0)),
    "saturated_attention": Pair(lambda: attending(300.0), lambda: attending(1.0)),
    "unnormalised_input": Pair(scaled_input(64.0, 128.0), scaled_input(1.0), Severity.WARNING),
    "parameter_without_gradient": Pair(
        lambda: classified(Spare(False)), lambda: classified(Spare(True)), Severity.WARNING
    ),
    "first_update_too_large": Pair(
        relu_he,
        relu_he,
        Severity.WARNING,
        lambda m: AdamW(m.parameters(), lr=0.3),
        lambda m: AdamW(m.parameters(), lr=1e-3),
    ),
    "first_update_too_small": Pair(
        lambda: sigmoid_xavier(10),
        relu_he,
        Severity.WARNING,
        lambda m: SGD(m.parameters(), lr=0.1),
        lambda m: SGD(m.parameters(), lr=0.1),
    ),
    "short_horizon": Pair(recurrent(nn.RNN, weight_hh_l0=0.3), recurrent(nn.LSTM, bias_ih_l0=4.0)),
    "exploding_recurrence": Pair(
        recurrent(relu_recurrence, weight_hh_l0=2.0), recurrent(relu_recurrence, weight_hh_l0=1.4)
    ),
    "closed_gates": Pair(recurrent(nn.LSTM), recurrent(nn.LSTM, bias_ih_l0=4.0), Severity.WARNING),
}


@pytest.mark.parametrize("norm_first", [False, True])
def test_tokens_that_become_alike_beside_whole_skips_are_a_warning(norm_first: bool) -> None:
    """Twelve blocks as torch draws them, post-norm, and by N(0, 0.02), pre-norm: both start so, and learn."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(
        nn.Embedding(20, 32), nn.TransformerEncoder(block, 12, enable_nested_tensor=False), nn.Linear(32, 20)
    )
    if norm_first:
        for weight in (p for p in model.parameters() if p.ndim > 1):
            nn.init.normal_(weight, std=0.02)
    x = torch.randint(20, (16, 16))
    diagnosis = check(model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), x.flatten()))
    assert diagnosis.verdict == "healthy"
    (found,) = (f for f in diagnosis.findings if f.code == "VG105")
    assert found.severity == Severity.WARNING
    assert found.evidence["ratio"] < 0.4
    assert found.evidence["skip"] == pytest.approx(1.0, abs=1e-5)


def test_a_damped_skip_gets_a_whole_one_around_it() -> None:
    torch.manual_seed(0)
    model, loss = tokens(0.3)
    found = repair(model, loss)
    assert [f.code for f in found.before.errors] == ["VG105"]
    assert found.cured
    assert found.prescription is not None
    assert [edit.place for edit in found.prescription.edits] == ["1.0", "1.1", "1.2", "1.3"]
    assert "let only 0.3 of the signal by" in found.prescription.title
    assert "test_symptoms.py" in found.prescription.advice[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_symptom_is_found_where_it_is_and_not_in_its_healthy_twin(name: str) -> None:
    pair, code = PAIRS[name], MODULES[name].CODE
    torch.manual_seed(0)
    sick = diagnosed(pair.sick(), pair.optimizer)
    torch.manual_seed(0)
    well = diagnosed(pair.well(), pair.cured)

    found = [f for f in sick.findings if f.code == code]
    assert max(f.severity for f in found) == pair.severity
    assert [f for f in well.findings if f.code == code] == []
    assert code in well.healthy, "looked at and found well, not passed over"
    assert well.verdict == "healthy"


EXACT = ("no_gradient_at_loss", "mixed_samples")
"""Symptoms that go by exact facts."""


@pytest.mark.parametrize("name", NAMES)
def test_a_finding_says_what_why_where_and_what_helps(name: str) -> None:
    pair, module = PAIRS[name], MODULES[name]
    torch.manual_seed(0)
    for finding in (f for f in diagnosed(pair.sick(), pair.optimizer).findings if f.code == module.CODE):
        assert finding.name == module.NAME
        assert finding.message
        assert finding.remedies
        assert finding.sites or name in ("nonfinite_forward", "failed_backward")
        told = [key for key in finding.evidence if "threshold" in key]
        assert told or not thresholds(module) or name in EXACT


def thresholds(module: ModuleType) -> set[str]:
    """Names of the numbers that a symptom's verdict rests on."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    named: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, getattr(module, node.targets[0].id)
            if name.isupper() and isinstance(value, int | float):
                named.add(name)
    return named


# -- the contract ----------------------------------------------------------------------------------


def healthy_nets() -> list[Built]:
    torch.manual_seed(0)
    tokens = torch.randint(11, (4, 7))
    blocks = nn.Sequential(nn.Linear(64, 16), *(Residual(branch()) for _ in range(12)), nn.Linear(16, 10))
    return [
        relu_he(),
        classified(mlp(nn.Tanh, 10, 1.0)),
        classified(blocks),
        (Tied(), lambda m: functional.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten())),
    ]


@pytest.fixture(scope="module")
def healthy_flows() -> list[Flow]:
    return [
        measure(model, loss, optimizer=AdamW(model.parameters(), lr=1e-3)) for model, loss in healthy_nets()
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_healthy_flow_gives_no_error(name: str, healthy_flows: list[Flow]) -> None:
    for flow in healthy_flows:
        outcomes = list(MODULES[name].examine(flow))
        assert outcomes, "silence would look like health"
        assert not [o for o in outcomes if isinstance(o, Finding) and o.severity is Severity.ERROR]


@pytest.mark.parametrize("name", NAMES)
def test_every_threshold_has_its_reason(name: str) -> None:
    body = ast.parse(Path(str(MODULES[name].__file__)).read_text(encoding="utf-8")).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constant = node.targets[0].id
            if constant in thresholds(MODULES[name]):
                reason = following.value if isinstance(following, ast.Expr) else None
                assert isinstance(reason, ast.Constant), f"{constant} has no reason"
                assert isinstance(reason.value, str)
                assert len(reason.value) > 20


SITE = Site("x", "linear", "linear", "x", "", (8, 16), "float32", 0)
NUMBERS = st.one_of(st.floats(-400, 400), st.sampled_from([math.nan, math.inf, -math.inf, 0.0]))
KINDS = st.sampled_from("input linear activation normalisation softmax recurrent elementwise loss".split())


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    """Any flow at all: no site, values that are not finite, a failure."""
    kinds = draw(st.lists(KINDS, max_size=6))
    sites = tuple(replace(SITE, name=f"{i} · {k}", kind=k, depth=i) for i, k in enumerate(kinds))

    def column() -> Tensor:
        return torch.tensor([draw(NUMBERS) for _ in sites], dtype=torch.float64)

    parameters = tuple(
        Parameter(
            name=f"p{i}",
            shape=draw(st.sampled_from([(4, 4), (4,)])),
            state=draw(st.sampled_from(["measured", "frozen", "unused", "unmeasured"])),
            grad_norm_log10=draw(NUMBERS),
            weight_norm=abs(draw(NUMBERS)),
            zeros=0.0,
            nonfinite=draw(st.integers(0, 1)),
            depth=float(draw(st.integers(0, len(sites) - 1))) if sites else math.nan,
            first_update=abs(draw(NUMBERS)),
        )
        for i in range(draw(st.integers(0, 6)))
    )
    call = LossCall(
        SITE, "cross_entropy", "softmax", 4, 8, *(draw(NUMBERS) for _ in range(6)), "classes", draw(NUMBERS)
    )
    return Flow(
        sites,
        {name: column() for name in draw(st.sets(st.sampled_from(["grad_norm_log10", "decades", "activation_rms"])))}
        | {"weighted": torch.tensor([float(k == "linear") for k in kinds], dtype=torch.float64)},
        splits={1: Split(1.0, draw(NUMBERS), draw(NUMBERS))} if len(sites) > 1 and draw(st.booleans()) else {},
        activations=tuple(
            Activation(SITE, function, True, 0.5, draw(st.floats(0, 1)), draw(st.floats(0, 1)), 4, draw(st.integers(0, 20)))
            for function in draw(st.lists(st.sampled_from(["relu", "tanh", "sigmoid"]), max_size=2))
        ),
        parameters=parameters,
        layers=sum(k == "linear" for k in kinds),
        loss=draw(NUMBERS),
        losses=(call,) if draw(st.booleans()) else (),
        inputs={"x": InputStatistics(*(draw(NUMBERS) for _ in range(5)))} if sites and draw(st.booleans()) else {},
        failure=Failure("backward", "RuntimeError", "text", "") if draw(st.booleans()) else None,
        nonfinite=NonFinite("backward", SITE, "a NaN", "numerics", "") if draw(st.booleans()) else None,
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(flows())
def test_no_flow_makes_a_symptom_raise_or_stay_silent(flow: Flow) -> None:
    for name in NAMES:
        outcomes = list(MODULES[name].examine(flow))
        assert outcomes
        assert all(isinstance(o, Finding | Healthy | Unexamined) for o in outcomes)
        assert all(f.code == MODULES[name].CODE and f.message for f in outcomes if isinstance(f, Finding))
    diagnosis = diagnose(flow)
    assert set(diagnosis.healthy) | set(diagnosis.unexamined) | {f.code for f in diagnosis.findings} >= {
        module.CODE for module in MODULES.values()
    }


# -- signals that die while the gradient keeps its size ----------------------------------------------


class WrittenOut(nn.Module):
    """An RMS norm as transformers writes it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class RootNorm(WrittenOut):
    pass


NORMS: dict[str, Callable[[float], nn.Module]] = {
    "layer": lambda eps: nn.LayerNorm(16, eps),
    "rms": lambda eps: nn.RMSNorm(16, eps),
    "group": lambda eps: nn.GroupNorm(1, 16, eps),
    "batch": lambda eps: nn.BatchNorm1d(16, eps),
    "batch, in evaluation": lambda eps: nn.BatchNorm1d(16, eps).eval(),
    "written out": lambda eps: RootNorm(16, eps),
}


VARIANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "layer": lambda x: x.var(1, correction=0),
    "rms": lambda x: x.square().mean(1),
    "group": lambda x: x.var(1, correction=0),
    "batch": lambda x: x.var(0, correction=0),
    "batch, in evaluation": lambda x: torch.ones(1),
    "written out": lambda x: x.square().mean(1),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("eps", [1e-6, 1.0, 300.0])
def test_what_a_normalisation_divides_by_is_exact(kind: str, eps: float) -> None:
    torch.manual_seed(0)
    first, norm = nn.Linear(16, 16, bias=False).double(), NORMS[kind](eps).double()
    nn.init.constant_(norm.get_parameter("weight"), 0.3)
    x = 3 * torch.randn(64, 16, dtype=torch.float64)
    model = nn.Sequential(first, norm, nn.Linear(16, 4).double())
    (seen,) = measure(model, lambda m: m(x).square().mean()).normalisations
    with torch.no_grad():
        given = first(x)
        out = norm(given).square().mean().sqrt().item()
    variance = VARIANCES[kind](given).mean().item()
    assert seen.epsilon == pytest.approx(eps)
    assert seen.variance == pytest.approx(variance, rel=1e-9)
    assert seen.kept == pytest.approx(math.sqrt(variance / (variance + eps)), rel=1e-9)
    assert seen.output_rms == pytest.approx(out, rel=1e-6)
    if kind != "batch, in evaluation":  # whose variance is that of other data
        assert seen.gain == pytest.approx(0.3, rel=0.1)


class Mixing(nn.Module):
    """s * x + (1 - s) * the mean of the tokens: what is a token's own shrinks by s, exactly."""

    def __init__(self, s: float) -> None:
        super().__init__()
        self.s, self.layer = s, nn.Linear(16, 16, bias=False, dtype=torch.float64)
        nn.init.orthogonal_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.s * x + (1 - self.s) * x.mean(1, keepdim=True))


@pytest.mark.parametrize("s", [0.9, 0.5, 0.1])
def test_what_is_a_tokens_own_shrinks_as_theory_says(s: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Mixing(s) for _ in range(5)), nn.Linear(16, 3, dtype=torch.float64))
    x = torch.randn(3, 8, 16, dtype=torch.float64)
    flow = measure(model, lambda m: m(x).square().mean())
    own = flow.column("distinct") * flow.column("activation_rms")
    layers = [i for i, site in enumerate(flow.sites) if site.kind == "linear"][:5]
    shrunk = (own[layers] / own[0]).tolist()
    assert shrunk == pytest.approx([s**k for k in range(1, 6)], rel=1e-6)


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("equal", [1, 2, 5, 8])
def test_attention_between_a_few_equal_keys(equal: int, written_out: bool) -> None:
    """p = 1/k on k of 8 keys: 1 - sum(p^2) = 1 - 1/k, where even attention has 1 - 1/8."""
    query = torch.zeros(2, 1, 4, 8)
    query[..., :equal] = 1e3
    key = torch.eye(8).expand(2, 1, 8, 8)
    if written_out:
        found = signal.spread(functional.softmax, (query @ key.mT,), {"dim": -1})
    else:
        found = signal.spread(functional.scaled_dot_product_attention, (query, key, key), {})
    assert found is not None
    assert float(found) == pytest.approx((1 - 1 / equal) / (1 - 1 / 8), abs=1e-6)


@pytest.mark.parametrize("mask", ["causal", "bool", "float"])
def test_attention_is_compared_with_even_attention_under_its_own_mask(mask: str) -> None:
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    given: dict[str, object] = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": seen},
        "float": {"attn_mask": torch.zeros(6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)},
    }[mask]
    x = torch.zeros(2, 4, 6, 8)
    found = signal.spread(functional.scaled_dot_product_attention, (x, x[:, :2], x[:, :2]), given)
    assert found is not None
    assert float(found) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("equal", [1, 2, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_the_attention_inside_of_torchs_own_module(equal: int, padded: bool) -> None:
    """p = 1/k on k of 8 keys, as above; two more keys are padding."""
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        nn.init.eye_(module.in_proj_weight[:16])
        nn.init.eye_(module.in_proj_weight[16:32])
    key = torch.zeros(2, 8 + 2 * padded, 16)
    key[:, :equal] = 10.0
    absent = torch.arange(key.shape[1]).expand(2, -1) >= 8
    query = torch.full((2, 4, 16), 10.0)
    flow = measure(
        nn.ModuleList([module]),
        lambda m: m[0](query, key, key, key_padding_mask=absent if padded else None)[0].square().sum(),  # pyright: ignore
    )
    (attention,) = flow.attentions
    assert attention.spread == pytest.approx((1 - 1 / equal) / (1 - 1 / 8), abs=1e-5)


@pytest.mark.parametrize("mixes", [True, False])
def test_a_softmax_is_attention_where_it_mixes_other_activations(mixes: bool) -> None:
    """Attention written for (sample * head, query, key), and a mixture of classes."""
    layer, x = nn.Linear(16, 8), torch.randn(4, 8, 16)

    def loss(m: nn.Module) -> Tensor:
        shares = (100 * m(x)).softmax(-1)
        return (torch.bmm(shares, m(x)) if mixes else shares).square().mean()

    assert len(measure(layer, loss).attentions) == mixes


def test_a_frozen_head_of_zeros_never_passes_a_gradient() -> None:
    """One that is trained does after its first step, and is none of our business."""
    model, loss = relu_he()
    head = list(model.children())[-1]
    nn.init.zeros_(head.weight)  # pyright: ignore[reportArgumentType]
    assert not diagnose(measure(model, loss)).errors
    head.requires_grad_(False)
    assert [f.code for f in diagnose(measure(model, loss)).errors] == ["VG102"]


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, whose second matrix starts at zero."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = nn.Linear(64, 4, bias=False), nn.Linear(4, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize(("loud", "cause"), [(1.0, None), (5.0, "residual-branch-growth")])
def test_branches_louder_than_their_stream_drown_what_is_a_tokens_own(loud: float, cause: str | None) -> None:
    model, loss = tokens(1.0, loud=loud)
    found = [f.evidence["cause"] for f in check(model, loss).errors if f.code == "VG105"]
    assert found == ([] if cause is None else [cause])
    assert cause is None or repair(model, loss).cured


def test_the_first_branches_are_louder_than_a_small_embedding_and_make_the_stream_of_those_that_follow() -> (
    None
):
    """OLMo 2 normalises what comes out of its branches; this one learns as fast as a Llama of its size to answer with the
    token before the last."""
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = hf.Olmo2ForCausalLM(hf.Olmo2Config(vocab_size=99, pad_token_id=0, **sizes))
    ids = torch.randint(1, 99, (4, 24))
    assert not check(model, lambda m: m(input_ids=ids, labels=ids).loss).errors


def test_the_adapter_behind_the_data_opens_with_the_first_step_unless_both_its_matrices_are_zero() -> None:
    """The data take no gradient here, as tokens do not: the first adapter is the input side."""
    torch.manual_seed(0)
    model = mlp(nn.Tanh, 3, 1.0)
    for i in (0, 2, 4):
        layer = model[i]
        assert isinstance(layer, nn.Linear)
        model[i] = Adapted(layer)
    x, y = torch.randn(32, 64), torch.randint(10, (32,))

    def loss(m: nn.Module) -> Tensor:
        h = x
        for part in m.children():  # the closure hands the data to the first part itself
            h = part(h)
        return functional.cross_entropy(h, y)

    found = diagnose(measure(model, loss))
    assert not found.errors
    assert "starts at zero" in found.unexamined["VG101"]
    for part in model.children():
        if isinstance(part, Adapted):
            nn.init.zeros_(part.down.weight)
    model[-1].requires_grad_(False)
    assert [f.code for f in diagnose(measure(model, loss)).errors] == ["VG101"]


def test_layers_of_zeros_one_behind_the_other_are_found_and_drawn() -> None:
    model, loss = classified(mlp(nn.Tanh, 4, 0.0))
    nn.init.zeros_(list(model.children())[-1].weight)  # pyright: ignore[reportArgumentType]
    found = check(model, loss)
    assert [(f.code, f.evidence["cause"]) for f in found.errors] == [("VG101", "initialisation")]
    assert repair(model, loss).cured


class Concatenating(nn.Module):
    """Convolutions down and up again, each level's result carried over: nothing between input and head dominates."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.act = activation()
        self.first, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.down = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.up = nn.ModuleList(nn.Conv2d(16, 8, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x, kept = self.act(self.first(x)), list[Tensor]()
        for layer in self.down:
            x = self.act(layer(x))
            kept.append(x)
            x = functional.max_pool2d(x, 2)
        for layer in self.up:
            x = self.act(layer(torch.cat([functional.interpolate(x, scale_factor=2.0), kept.pop()], 1)))
        return self.head(x)


def test_layers_without_a_backbone_count_one_by_one() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(4, (4, 32, 32))
    for std, verdict in ((0.3, "healthy"), (0.01, "vanishing")):
        model = Concatenating(nn.ReLU)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=std * math.sqrt(18 / parameter[0].numel()))
        assert diagnose(measure(model, lambda m: functional.cross_entropy(m(x), y))).verdict == verdict


def test_a_signal_that_explodes_in_one_place() -> None:
    """The exponential of a variance that starts at 60, as in a variational autoencoder."""

    class Sampling(nn.Module):
        def __init__(self, log_variance: float) -> None:
            super().__init__()
            self.enter, self.mean, self.spread = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 4)
            self.leave = nn.Linear(4, 16)
            nn.init.constant_(self.spread.bias, log_variance)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden = self.enter(x).relu()
            mean, spread = self.mean(hidden), self.spread(hidden)
            return self.leave(mean + (0.5 * spread).exp() * torch.randn_like(mean)), mean, spread

    def loss(m: nn.Module) -> Tensor:
        answer, mean, spread = m(x)
        return functional.mse_loss(answer, x) + (mean.square() + spread.exp() - spread).mean()

    x = torch.randn(32, 16)
    assert not diagnose(measure(Sampling(0.0), loss)).errors
    for log_variance in (16.0, 60.0):  # 3.5 and 13 decades at one function
        assert "EG202" in {f.code for f in diagnose(measure(Sampling(log_variance), loss)).errors}


class Rounded(nn.Module):
    """Weights on a grid of eighths, with or without a way for their gradient past the rounding."""

    def __init__(self, straight: bool) -> None:
        super().__init__()
        self.straight, self.layer, self.head = straight, nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        weight = (8 * self.layer.weight).round() / 8
        if self.straight:
            weight = self.layer.weight + (weight - self.layer.weight).detach()
        return self.head(functional.linear(x, weight, self.layer.bias).relu())


def test_what_is_rounded_gets_no_gradient() -> None:
    torch.manual_seed(0)
    (finding,) = diagnose(measure(*classified(Rounded(False)))).errors
    assert (finding.code, finding.sites) == ("UP501", ("layer.weight",))
    assert "round" in finding.cause
    assert not diagnose(measure(*classified(Rounded(True)))).errors


def test_why_a_part_gets_no_gradient_is_told() -> None:
    """Under no_grad its modules did run."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                hidden = self.body(x)
            return self.head(hidden)

    (finding,) = [f for f in diagnose(measure(*classified(Fixed()))).findings if f.code == "UP501"]
    assert finding.severity == Severity.WARNING
    assert "under no_grad" in finding.cause


def test_a_kernel_that_explodes_in_both_directions() -> None:
    """Read forwards and backwards to ends of their own, every step is as near as any: the curve is flat."""

    class Both(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.kernel, self.head = nn.GRU(8, 24, batch_first=True, bidirectional=True), nn.Linear(48, 4)
            with torch.no_grad():
                for name, parameter in self.kernel.named_parameters():
                    if "weight_hh" in name:
                        parameter.mul_(factor)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            _, last = self.kernel(packed)
            return self.head(torch.cat([last[0], last[1]], -1))

    torch.manual_seed(0)
    x, lengths, y = torch.randn(32, 20, 8), torch.randint(5, 21, (32,)), torch.arange(32) % 4
    for factor, verdict in ((1.0, "healthy"), (20.0, "exploding")):
        model = Both(factor)
        assert check(model, lambda m: functional.cross_entropy(m(x, lengths), y)).verdict == verdict


def test_an_output_that_saturates_in_the_loss() -> None:
    """The generator's first loss, log(1 - D(G(z))): it is flat where the discriminator is sure."""

    def sure(m: nn.Module) -> Tensor:
        return (1 - torch.sigmoid(m(x)) + 1e-12).log().mean()

    def other(m: nn.Module) -> Tensor:
        return -(torch.sigmoid(m(x)) + 1e-12).log().mean()

    torch.manual_seed(0)
    model, x = mlp(nn.ReLU, 2, HE, classes=1), torch.randn(32, 64)
    nn.init.constant_(list(model)[-1].bias, -20.0)  # pyright: ignore[reportArgumentType]
    assert [f.code for f in diagnose(measure(model, sure)).errors] == ["VG102"]
    assert not diagnose(measure(model, other)).errors


QUIET = {
    "epsilon_above_variance": lambda batch: normalised(large_epsilon, batch),
    "rank_collapse": lambda batch: tokens(0.0, batch),
    "muted_normalisation": lambda batch: normalised(drawn_near_zero, batch),
    "damped_skips": lambda batch: skipping(0.3, batch=batch),
    "saturated_attention": lambda batch: attending(300.0, batch),
}
"""Faults that cost no decades; in a batch of a given size."""


def error_codes(built: Built, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> set[str]:
    model, loss = built
    return {f.code for f in diagnose(measure(model.to(dtype), lambda m: loss(m) * factor)).errors}


@pytest.mark.parametrize("name", QUIET)
@pytest.mark.parametrize("batch", [2, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_they_are_found_in_any_unit_format_and_batch(name: str, batch: int, dtype: torch.dtype) -> None:
    for factor in (1e-8, 1.0, 65536.0):
        torch.manual_seed(0)
        found = error_codes(QUIET[name](batch), dtype, factor)
        assert MODULES[name].CODE in found
    torch.manual_seed(0)
    wells = {
        "rank_collapse": lambda: tokens(1.0, batch),
        "damped_skips": lambda: skipping(1.0, batch=batch),
        "saturated_attention": lambda: attending(1.0, batch),
    }
    assert not error_codes(wells.get(name, lambda: normalised(batch=batch))(), dtype)


@pytest.mark.parametrize(("skip", "blocks"), [(0.3, 6), (0.0, 6), (0.9, 40), (2.0, 6)])
def test_few_damped_skips_are_a_warning_and_lightly_damped_ones_nothing(skip: float, blocks: int) -> None:
    found = [f for f in diagnosed(skipping(skip, blocks)).findings if f.code == "VG107"]
    assert [f.severity for f in found] == ([Severity.WARNING] if skip < 0.7 else [])


@pytest.mark.parametrize(
    ("scale", "mean", "shift", "factor", "codes"),
    [
        (100.0, 0.0, 0.0, 0.01, []),
        (1.0, 1e3, -1e3, 0.5, []),
        (1.0, 1e3, 0.0, 1e-3, ["UP504"]),  # of the right size, and all alike
        (100.0, 0.0, 0.0, 0.5, ["UP504"]),
    ],
)
def test_what_the_model_itself_makes_of_its_input_counts(
    scale: float, mean: float, shift: float, factor: float, codes: list[str]
) -> None:
    x, y = scale * torch.randn(32, 64) + mean, torch.randint(10, (32,))
    shifted = [Apply(lambda x: x + shift)] if shift else []
    model = nn.Sequential(*shifted, Apply(lambda x: factor * x), *mlp(nn.ReLU, 3, HE))
    found = diagnosed((model, lambda m: functional.cross_entropy(m(x), y)))
    assert [f.code for f in found.findings if f.code == "UP504"] == codes


def test_a_normalisation_of_single_values_is_named_and_no_infinity_is_made_up() -> None:
    """LayerNorm over an axis of length 1: of each value its own mean is taken off."""
    layers = [*mlp(nn.ReLU, 3, HE)][:-1]
    model = nn.Sequential(*layers, nn.Unflatten(1, (-1, 1)), nn.LayerNorm(1), nn.Flatten(), nn.Linear(64, 10))
    told = check(*classified(model))
    (found,), said = told.errors, str(told)
    assert found.code == "VG101"
    assert found.sites[0].startswith(f"{len(layers) + 1} · normalisation")
    assert "normalises each value by itself" in found.cause
    assert "no gradient from the output to the input" in said
    assert "gives back nothing" in said
    assert "400" not in said


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_of_an_input_that_is_not_finite_no_scale_is_told(value: float) -> None:
    x, y = torch.randn(32, 64), torch.randint(10, (32,))
    x[3, 5] = value
    found = diagnosed((mlp(nn.ReLU, 3, HE), lambda m: functional.cross_entropy(m(x), y)))
    assert [f.code for f in found.findings] == ["NF401"]
    assert "not finite" in found.unexamined["UP504"]


def test_a_raw_input_is_an_error_where_it_saturates_the_first_activation() -> None:
    x, y = 1e3 * torch.randn(32, 64), torch.randint(10, (32,))
    for activation, severity in ((nn.ReLU, Severity.WARNING), (nn.Tanh, Severity.ERROR)):
        model, loss = mlp(activation, 3, 1.0), lambda m: functional.cross_entropy(m(x), y)
        found = [f.severity for f in diagnosed((model, loss)).findings if f.code == "UP504"]
        assert found == [severity]
        rx = repair(model, loss).prescription
        assert (rx is not None and rx.remedy == "standardise-input") is (severity is Severity.ERROR)


def test_inputs_that_are_all_alike_are_cured_by_their_standardisation_alone() -> None:
    x, y = torch.randn(32, 64) / 2 + 1e3, torch.randint(10, (32,))
    model = mlp(nn.ReLU, 3, HE)
    found = repair(model, lambda m: functional.cross_entropy(m(x), y))
    assert found.cured
    assert found.prescription is not None
    assert [edit.of for edit in found.prescription.edits] == ["modules.Standardised"]


def fed(x: Tensor, *first: nn.Module) -> Built:
    """A network of these first layers on these data."""
    y, width = torch.randint(10, (len(x),)), x.shape[1]
    model = nn.Sequential(*(first or (nn.Linear(width, 64), nn.ReLU())), *mlp(nn.ReLU, 2, HE))
    return model, lambda m: functional.cross_entropy(m(x), y)


@pytest.mark.parametrize(
    ("scale", "mean", "sick"),
    [(1.0, 15.0, False), (1.0, 40.0, True), (0.02, 1.0, True), (0.2, 1.0, False), (0.005, 0.0, True), (0.02, 0.0, False)],
)  # fmt: skip
def test_inputs_that_are_alike_or_tiny_drown_in_what_samples_have_in_common(
    scale: float, mean: float, sick: bool
) -> None:
    torch.manual_seed(0)
    x = scale * torch.randn(48, 64) + mean
    batched = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())
    layered = (nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU())
    told = {"UP504"} if sick else set[str]()
    assert {f.code for f in diagnosed(fed(x)).errors} == told
    assert "UP504" not in {f.code for f in diagnosed(fed(x, *batched)).errors}
    # What is common to all samples, the bias too, is as common behind a normalisation of each.
    assert ("UP504" in {f.code for f in diagnosed(fed(x, *layered)).errors}) is sick
    if sick:
        found = repair(*fed(x))
        assert found.cured
        assert found.prescription is not None
        assert found.prescription.remedy == "standardise-input"


def test_what_is_the_same_for_all_samples_or_of_length_one_is_no_sick_input() -> None:
    torch.manual_seed(0)
    assert not diagnosed(fed(functional.one_hot(torch.randint(2000, (48,)), 2000).float())).errors
    assert not diagnosed(fed(torch.ones(48, 64) + 1e-9)).errors


def test_a_normalisation_behind_a_whole_block_comes_too_late_for_a_raw_input() -> None:
    x, y = 1e4 * torch.randn(32, 64), torch.randint(10, (32,))
    first, block = nn.Linear(64, 64), Residual(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)))
    for norm_first in (True, False):
        between = [nn.LayerNorm(64), block] if norm_first else [block, nn.LayerNorm(64)]
        model = nn.Sequential(first, *between, nn.Linear(64, 10))
        codes = [f.code for f in diagnosed((model, lambda m: functional.cross_entropy(m(x), y))).findings]
        assert ("UP504" in codes) is not norm_first


def test_of_branches_that_were_not_measured_no_size_is_told() -> None:
    torch.manual_seed(0)
    model, head = nn.Transformer(32, 4, 1, 2, 64, 0.0, batch_first=True, norm_first=True), nn.Linear(32, 8)
    for name, parameter in model.decoder.named_parameters():
        if name.endswith(("out_proj.bias", "linear2.bias")):
            nn.init.normal_(parameter, 0, 3)
    x, y, wanted = torch.randn(16, 8, 32), torch.randn(16, 8, 32), torch.randint(8, (128,))
    both = nn.ModuleList([model, head])
    flow = measure(both, lambda m: functional.cross_entropy(m[1](m[0](x, y)).flatten(0, 1), wanted))  # pyright: ignore
    (told,) = (f for f in diagnose(replace(flow, splits={})).findings if f.code == "VG105")
    assert "nan" not in told.cause


def test_a_single_sample_has_nothing_to_be_compared_with() -> None:
    torch.manual_seed(0)
    diagnosis = diagnosed(tokens(0.0, batch=1))
    assert "nothing to be compared with" in diagnosis.unexamined["VG105"]


def zero_gammas() -> Built:
    """Every residual branch ends in a gain of zero (Goyal et al. 2017)."""
    blocks = [Residual(nn.Sequential(branch(32), nn.BatchNorm1d(32))) for _ in range(4)]
    for block in blocks:
        nn.init.zeros_(block.branch[1].weight)  # pyright: ignore
    return classified(nn.Sequential(nn.Linear(64, 32), *blocks, nn.Linear(32, 10)))


class Shifted(WrittenOut):
    """An RMS norm whose gain is 1 + weight, and whose weight is drawn near zero (Gemma)."""

    def __init__(self) -> None:
        super().__init__(64, 1e-6)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class ShiftedNorm(Shifted):
    pass


def test_gains_that_are_meant_to_be_near_zero_are_no_finding() -> None:
    torch.manual_seed(0)
    assert "VG106" in diagnosed(zero_gammas()).healthy
    chain = [nn.Sequential(nn.Linear(64, 64), ShiftedNorm(), nn.ReLU()) for _ in range(4)]
    diagnosis = diagnosed(classified(nn.Sequential(*chain, nn.Linear(64, 10))))
    assert len(diagnosis.flow.normalisations) == 4
    assert "VG106" in diagnosis.healthy


@pytest.mark.parametrize(
    ("weights", "norm", "told"),
    [
        (nn.init.normal_, nn.BatchNorm1d, {"sigma_w"}),
        (nn.init.normal_, nn.LayerNorm, {"sigma_w"}),
        (nn.init.uniform_, nn.BatchNorm1d, {"coherence", "sigma_w"}),
        (above_zero, nn.BatchNorm1d, {"coherence"}),
        (above_zero, nn.RMSNorm, {"coherence"}),
        (above_zero, lambda width: nn.Identity(), {"coherence"}),
        # All units are one, and stay one.
        (partial(nn.init.constant_, val=0.05), nn.BatchNorm1d, {"coherence"}),
        (above_zero, nn.LayerNorm, set[str]()),  # which takes the mean over the units away
        (nn.init.kaiming_normal_, nn.BatchNorm1d, set[str]()),
        (nn.init.orthogonal_, nn.RMSNorm, set[str]()),
    ],
)
def test_weights_whose_size_or_mean_normalisations_hide(
    weights: Callable[[Tensor], Tensor], norm: Callable[[int], nn.Module], told: set[str]
) -> None:
    torch.manual_seed(0)
    model, loss = normalised(weights=weights, norm=norm)
    found = [f for f in diagnosed((model, loss)).findings if f.code == "VG110"]
    assert {key for f in found for key in ("sigma_w", "coherence") if key in f.evidence} == told
    assert [f.severity.name for f in found if "sigma_w" in f.evidence] == ["WARNING"] * ("sigma_w" in told)
    if "coherence" in told:
        repaired = repair(model, loss)
        assert repaired.cured
        assert "VG110" in diagnosed((repaired.model, loss)).healthy


@pytest.mark.parametrize(
    ("norm", "scale", "severity"),
    [
        (nn.Identity, 10.0, "ERROR"),
        (nn.Identity, 3.0, "WARNING"),
        (nn.Identity, 0.1, ""),
        (partial(nn.BatchNorm1d, 64), 10.0, ""),  # which takes it off again
    ],
)
def test_biases_that_are_louder_than_what_the_weights_make_are_told_and_mended(
    norm: Callable[[], nn.Module], scale: float, severity: str
) -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(64, 64), norm(), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    for layer in model[:-1]:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.bias, std=scale)
    told = [f for f in diagnosed(classified(model)).findings if f.code == "VG111" and "bias" in f.evidence]
    assert [f.severity.name for f in told] == [severity] * bool(severity)
    if severity == "ERROR":
        found = repair(*classified(model))
        assert found.cured
        assert found.prescription is not None
        assert "zero-biases" in found.prescription.remedy


class Rows(nn.Module):
    """Eight rows of eight: (sample, step, feature), whatever the recurrence or the encoder was told."""

    def __init__(self, kind: type[nn.Module], batch_first: bool) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(8, 32), nn.Linear(32, 10)
        if issubclass(kind, nn.RNNBase):
            self.along: nn.Module = kind(32, 32, batch_first=batch_first)
        else:
            layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=batch_first)
            self.along = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.along(self.into(x.unflatten(1, (8, 8))))
        return self.head(out[0][:, -1] if isinstance(out, tuple) else out.mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.TransformerEncoder])
def test_samples_that_are_taken_for_steps_are_told_and_set_right(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, loss = classified(Rows(kind, False))
    found = repair(model, loss)
    assert found.before.verdict == "broken"
    assert [f.code for f in found.before.errors] == ["RN604"]
    assert (found.cured, found.prescription and found.prescription.remedy) == (True, "batch-first")
    x = torch.randn(32, 64)
    with torch.no_grad():  # and no sample of the copy depends on another
        changed = torch.cat([torch.randn(31, 64), x[-1:]])
        assert torch.allclose(found.model(x)[-1], found.model(changed)[-1], atol=1e-5)
        assert not torch.allclose(model(x)[-1], model(changed)[-1], atol=1e-5)


def test_steps_that_come_first_are_steps_where_the_model_means_it() -> None:
    """Transposed on the way in, one answer a step, or as many samples as steps: nothing is told."""
    torch.manual_seed(0)
    along, head = nn.GRU(8, 32), nn.Linear(32, 10)
    x, y = torch.randn(12, 6, 8), torch.randint(10, (12, 6))
    each = nn.ModuleList([along, head])
    losses: list[Callable[[nn.Module], Tensor]] = [
        lambda m: functional.cross_entropy(head(along(x)[0]).flatten(0, 1), y.flatten()),
        lambda m: functional.mse_loss(head(along(x)[0]), torch.zeros(12, 6, 10)),
        lambda m: functional.mse_loss(m.get_submodule("1")(along(x)[0]).mean(-1), torch.zeros(12, 6)),
        lambda m: functional.cross_entropy(head(along(x)[0][-1]), y[0]),
        lambda m: functional.cross_entropy(head(along(x[:6])[0][:, -1]), y[0]),
    ]
    for loss in losses:
        assert "RN604" in diagnosed((each, loss)).healthy


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda o, y: functional.mse_loss(o, y), "compares each of 32 outputs with all targets"),
        (lambda o, y: (o - y).square().mean(), "compares each of 32 outputs with all targets"),
        (lambda o, y: functional.smooth_l1_loss(o.squeeze(1), y), ""),
        (lambda o, y: functional.mse_loss(o, y[:, None]), ""),
        # All quantiles with all: both have the axes of the other on purpose.
        (lambda o, y: functional.huber_loss(o[:, :, None], y[:, None, None].expand(-1, 1, 5)), ""),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_outputs_that_are_each_compared_with_all_targets_are_told(
    loss: Callable[[Tensor, Tensor], Tensor], told: str
) -> None:
    torch.manual_seed(0)
    model, x, y = mlp(nn.ReLU, 2, HE, classes=1), torch.randn(32, 64), torch.randn(32)
    found = [f for f in diagnosed((model, lambda m: loss(m(x), y))).errors if f.code == "VG102"]
    assert [told in f.message for f in found] == [True] * bool(told)


@pytest.mark.parametrize(
    ("output", "loss", "told"),
    [
        (nn.LogSoftmax(0), functional.nll_loss, "sums to 1 over the 32 samples"),
        (nn.LogSoftmax(-1), functional.nll_loss, ""),
        (
            nn.Softmax(-1),
            lambda o, y: functional.kl_div(o, functional.one_hot(y, 10).float()),
            "log-probabilities",
        ),
        (nn.LogSoftmax(-1), lambda o, y: functional.kl_div(o, functional.one_hot(y, 10).float()), ""),
    ],
)
@pytest.mark.filterwarnings("ignore:reduction")
def test_a_softmax_along_the_wrong_axis_and_one_too_few_are_told(
    output: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], told: str
) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(*mlp(nn.ReLU, 2, HE), output), torch.randn(32, 64), torch.randint(10, (32,))
    found = [f for f in diagnosed((model, lambda m: loss(m(x), y))).errors if f.code == "VG102"]
    assert [told in f.message for f in found] == [True] * bool(told)


class Pressed(nn.Module):
    """Layers whose output is squeezed by a function that is given too much of it."""

    def __init__(self, squeeze: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(64, 64) for _ in range(4)), nn.Linear(64, 10)
        self.squeeze = squeeze

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.squeeze(layer(x))
        return self.head(x)


@pytest.mark.parametrize(
    ("squeeze", "title"),
    [
        (lambda x: x.clamp(-0.01, 0.01), "4 clamps left out"),
        (lambda x: torch.tanh(20 * x), "4 constant factors left out, 1.6e+05 in all"),
        (lambda x: functional.gelu(x).clamp(-5, 5), ""),
        (lambda x: x.clamp(min=1e-3), ""),  # of one bound: a rectifier
    ],
)
def test_clamps_and_factors_that_saturate_are_told_and_left_out(
    squeeze: Callable[[Tensor], Tensor], title: str
) -> None:
    torch.manual_seed(0)
    found = repair(*classified(Pressed(squeeze)))
    told = [f for f in found.before.findings if f.code == "SA301"]
    assert [f.severity.name for f in told] == ["ERROR"] * bool(title)
    if title:
        assert "test_symptoms.py" in told[0].remedies[0]
        assert found.cured
        assert found.prescription is not None
        assert found.prescription.title == title


@pytest.mark.parametrize(("p", "severity"), [(0.4, ""), (0.55, "WARNING"), (0.9, "ERROR"), (1.0, "ERROR")])
def test_dropouts_that_multiply_to_noise_are_told_and_lowered(p: float, severity: str) -> None:
    torch.manual_seed(0)
    model, loss = dropped(p)
    assert [f.severity.name for f in diagnosed((model, loss)).findings if f.code == "VG112"] == [
        severity
    ] * bool(severity)
    assert "VG112" in diagnosed((model.eval(), loss)).healthy
    if p == 0.9:
        found = repair(model.train(), loss)
        assert found.cured
        assert found.prescription is not None
        assert found.prescription.title == "dropout 0.1 for 4 layers"


def test_of_dropouts_in_branches_those_of_one_branch_multiply() -> None:
    torch.manual_seed(0)
    for p, sick in ((0.7, False), (0.9, True)):
        layer = nn.TransformerEncoderLayer(32, 4, 64, p, batch_first=True, norm_first=True)
        encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        model = nn.Sequential(
            nn.Unflatten(1, (8, 8)), nn.Linear(8, 32), encoder, nn.Flatten(), nn.Linear(256, 10)
        )
        assert ("VG112" in {f.code for f in diagnosed(classified(model)).errors}) is sick


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.parametrize(
    ("between", "sick"),
    [
        ([nn.Softmax(-1)], True),
        ([nn.Softmax(-1), nn.Dropout(0.1)], True),
        ([nn.Softmax(-1), Times(64.0)], False),  # which gives it its size back
        ([nn.Unflatten(1, (8, 8)), nn.Softmax(-1), nn.Flatten()], False),  # eight choices of eight
        ([nn.Softmax(-1), nn.LayerNorm(64)], False),
        ([nn.Sigmoid()], False),
    ],
)
def test_a_softmax_where_an_activation_was_meant_is_told_and_exchanged(
    between: list[nn.Module], sick: bool
) -> None:
    torch.manual_seed(0)
    built = classified(nn.Sequential(nn.Linear(64, 64), *between, nn.Linear(64, 10)))
    found = repair(*built)
    assert [f.code for f in found.before.errors] == ["SA301"] * sick
    if sick:
        assert found.cured
        assert found.prescription is not None
        assert found.prescription.title == "ELU in place of softmax (1)"


class Last(nn.Module):
    """The last step of a recurrence, read by a head."""

    def __init__(self, cell: type[nn.RNNBase], bias: float) -> None:
        super().__init__()
        self.cell, self.head = cell(8, 32, 2, batch_first=True), nn.Linear(32, 10)
        for name, parameter in self.cell.named_parameters():
            if name.startswith("bias_ih"):
                nn.init.constant_(parameter, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.unflatten(1, (8, 8)))[0][:, -1])


@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_recurrence_whose_biases_leave_nothing_of_the_samples_is_told_and_mended(
    cell: type[nn.RNNBase],
) -> None:
    torch.manual_seed(0)
    bias = -3.0 if cell is nn.GRU else 3.0
    (healthy, other), (model, loss) = classified(Last(cell, 0.0)), classified(Last(cell, bias))
    assert "VG111" in diagnosed((healthy, other)).healthy
    assert "VG111" in {f.code for f in diagnosed((model, loss)).errors}
    assert repair(model, loss).cured


class Separable(nn.Sequential):
    """Depthwise convolutions, whose filters have one channel each, between those that mix channels."""

    def __init__(self, weights: Callable[[Tensor], object], norm: Callable[[int], nn.Module]) -> None:
        super().__init__(nn.Conv2d(1, 16, 3, padding=1), norm(16), nn.ReLU())
        for _ in range(3):
            self.extend([nn.Conv2d(16, 16, 3, padding=1, groups=16), norm(16), nn.ReLU()])
            self.extend([nn.Conv2d(16, 16, 1), norm(16), nn.ReLU()])
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                weights(layer.weight)
        self.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)])


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d, partial(nn.GroupNorm, 4), lambda n: nn.LayerNorm([n, 8, 8])],
    ids=["batch norm", "group norm", "layer norm over pictures"],
)
def test_only_layers_that_add_up_channels_make_them_alike(norm: Callable[[int], nn.Module]) -> None:
    x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))

    def told(weights: Callable[[Tensor], object]) -> bool:
        torch.manual_seed(0)
        model = Separable(weights, norm)
        found = diagnosed((model, lambda m: functional.cross_entropy(m(x), y)))
        return any("coherence" in f.evidence for f in found.findings)

    assert told(lambda w: nn.init.uniform_(w, 0.0, 0.3))
    assert not told(lambda w: nn.init.uniform_(w, 0.0, 0.3) if w.shape[1] == 1 else w)


@pytest.mark.parametrize(("gain", "severity"), [(0.02, "ERROR"), (0.1, "WARNING"), (0.3, None)])
def test_gains_that_are_small_and_not_near_zero_are_a_warning(gain: float, severity: str | None) -> None:
    def small(norm: nn.Module) -> None:
        nn.init.constant_(norm.weight, gain)  # pyright: ignore[reportArgumentType]

    told = [f for f in diagnosed(normalised(small)).findings if f.code == "VG106"]
    assert [f.severity.name for f in told] == ([severity] if severity else [])


@pytest.mark.parametrize(("loud", "told"), [(100.0, True), (10.0, False), (1.0, False)])
def test_one_block_that_drowns_its_stream_is_a_warning_and_scaled_alone(loud: float, told: bool) -> None:
    torch.manual_seed(0)
    model, x = Transformer(Shape(4, width=32, heads=2, norm="pre", vocabulary=16)), torch.randint(16, (8, 12))
    with torch.no_grad():
        for layer in (m for m in model.blocks[1].modules() if isinstance(m, nn.Linear)):
            layer.weight.mul_(loud)

    def loss(m: nn.Module) -> Tensor:
        return functional.cross_entropy(m(x).flatten(0, 1), x.flatten())

    diagnosis = diagnosed((model, loss))
    assert [f.severity.name for f in diagnosis.findings if f.code == "EG202"] == (["WARNING"] if told else [])
    if told:
        rx = prescribe(diagnosis, model, loss)[0]
        assert rx.remedy == "rescale-weights"
        assert {edit.place.rpartition(".")[0].startswith("blocks.1") for edit in rx.edits} == {True}


class Chaotic(nn.Module):
    """A chaotic map between two layers: bounded forward, and a gradient that grows without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(400):
            x = torch.sin(100 * x)
        return self.head(x)


def test_seven_hundred_decades_between_two_layers_are_told() -> None:
    torch.manual_seed(0)
    diagnosis = diagnosed(classified(Chaotic()))
    assert diagnosis.verdict == "exploding"
    assert diagnosis.flow.lost > 2 * 308
    assert f"+{diagnosis.flow.lost:.1f} decades" in str(diagnosis)


def test_units_that_depth_alone_turns_off_are_no_finding() -> None:
    """In deep ReLU networks all samples come to look alike, so that a unit is on or off for all of them."""
    torch.manual_seed(0)
    diagnosis = diagnosed(classified(mlp(nn.ReLU, 16, HE)))
    assert 0.15 < max(a.dead for a in diagnosis.flow.activations) < 0.6
    assert "SA302" in diagnosis.healthy


def test_relu_chains_too_narrow_for_their_depth_are_dead_in_many_draws() -> None:
    """A layer of five ReLUs is off for all samples once in 32; sixteen of them two times in five (Lu et al. 2019)."""

    def narrow(activation: type[nn.Module], layers: int) -> Finding | None:
        torch.manual_seed(3)
        hidden = [part for _ in range(layers) for part in (nn.Linear(5, 5), activation())]
        for layer in hidden[::2]:
            nn.init.kaiming_normal_(layer.weight)
        seen = diagnosed(classified(nn.Sequential(nn.Linear(64, 5), *hidden, nn.Linear(5, 10))))
        return next((f for f in seen.findings if f.code == "SA302" and "stillborn" in f.evidence), None)

    deep = narrow(nn.ReLU, 16)
    assert deep is not None
    assert deep.severity is Severity.ERROR
    assert deep.evidence["stillborn"] == pytest.approx(1 - (31 / 32) ** 16)
    shorter = narrow(nn.ReLU, 6)
    assert shorter is not None
    assert shorter.severity is Severity.WARNING
    assert narrow(nn.ReLU, 2) is None
    assert narrow(nn.Tanh, 16) is None


def test_a_failed_backward_leaves_depth_unexamined() -> None:
    torch.manual_seed(0)
    diagnosis = diagnosed(PAIRS["failed_backward"].sick())
    assert [f.code for f in diagnosis.errors] == ["NF404"]
    assert {"VG101", "VG102", "EG201", "NF402", "UP501"} <= set(diagnosis.unexamined)


def test_without_an_optimizer_the_first_updates_are_unexamined_and_not_healthy() -> None:
    torch.manual_seed(0)
    diagnosis = diagnosed(relu_he())
    assert {"UP502", "UP503"} <= set(diagnosis.unexamined)
    assert not {"UP502", "UP503"} & set(diagnosis.healthy)


# -- what is lost besides the gradient -------------------------------------------------------------


def deep(activation: Callable[[], nn.Module], layers: int, gain: float, bias: float = 0.0) -> Built:
    model = mlp(activation, layers, gain)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.bias, bias)
    return classified(model)


@pytest.mark.parametrize("factor", [1.0, 1e-6])
def test_two_decades_are_an_error_where_the_samples_become_alike_too(factor: float) -> None:
    """Sigmoids and small weights lose as many decades; behind the sigmoids every sample gives nearly the same."""
    torch.manual_seed(0)
    (sigmoid, loss), (small, other) = deep(nn.Sigmoid, 4, 1.0), deep(nn.ReLU, 5, 0.45)
    alike, told = (diagnosed((m, lambda m, f=f: f(m) * factor)) for m, f in ((sigmoid, loss), (small, other)))
    (error,), (warning,) = ([f for f in d.findings if f.code == "VG101"] for d in (alike, told))
    assert -3 < alike.flow.lost < -2
    assert -3 < told.flow.lost < -2
    assert (error.severity, warning.severity) == (Severity.ERROR, Severity.WARNING)
    assert float(error.evidence["told_apart"]) < 0.01 < 0.1 < float(warning.evidence["told_apart"])


def test_what_differs_between_the_samples_is_told_from_what_they_share() -> None:
    x = torch.randn(64, 30, dtype=torch.float64)
    common = 3.0
    found = signal.varying(x + common)
    assert found is not None
    assert float(found) == pytest.approx(float(x.var(0, correction=0).mean().sqrt()), rel=1e-12)
    assert signal.varying(x[:1]) is None


@pytest.mark.parametrize(("width", "verdict"), [(64, "exploding"), (2, "healthy")])
def test_growth_behind_saturated_units_is_chaos_but_of_coordinates(width: int, verdict: str) -> None:
    """Of an input of a few features high frequencies are to be made."""
    torch.manual_seed(0)
    widths = [width, *[128] * 7]
    layers = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=6 * layer.in_features**-0.5)
    x, y = torch.randn(64, width), torch.randint(10, (64,))
    diagnosis = check(model, lambda m: functional.cross_entropy(m(x), y))
    assert 1.0 < diagnosis.flow.lost < 2.0
    assert diagnosis.verdict == verdict


class Tagger(nn.Module):
    """A label for each of 24 tokens, by a recurrence in both directions."""

    def __init__(self, kind: type[nn.RNNBase], **biases: float) -> None:
        super().__init__()
        self.token, self.kernel = nn.Embedding(12, 16), kind(16, 32, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 3)
        quarter = {"i": slice(0, 32), "f": slice(32, 64), "o": slice(96, 128), "z": slice(32, 64)}
        for name, parameter in self.kernel.named_parameters():
            for gate, value in biases.items():
                if name.startswith("bias_ih"):
                    nn.init.constant_(parameter.data[quarter[gate]], value)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.kernel(self.token(x))[0])


def tagging(kind: type[nn.RNNBase], **biases: float) -> Built:
    torch.manual_seed(0)
    model, x = Tagger(kind, **biases), torch.randint(12, (16, 24))
    return model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), x.flatten() % 3)


@pytest.mark.parametrize(
    "biases", [{"f": -6.0}, {"i": -8.0}, {"o": -8.0}], ids=["forgets", "lets nothing in", "lets nothing out"]
)
def test_closed_gates_of_a_layer_are_an_error_and_are_opened(biases: dict[str, float]) -> None:
    model, loss = tagging(nn.LSTM, **biases)
    diagnosis = check(model, loss)
    assert [f.code for f in diagnosis.errors] == ["RN603"]
    found = repair(model, loss)
    assert found.cured
    assert found.prescription is not None
    assert found.prescription.remedy in ("chrono-initialisation", "forget-bias")


def test_an_update_gate_that_keeps_everything_lets_nothing_in() -> None:
    assert [f.code for f in check(*tagging(nn.GRU, z=12.0)).errors] == ["RN603"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_gates_as_torch_draws_them_are_no_error(kind: type[nn.RNNBase]) -> None:
    assert check(*tagging(kind)).verdict == "healthy"


class Frames(nn.Module):
    """A ConvLSTM in a dozen lines: 12 pictures, of which the first two say something."""

    def __init__(self, forget: float) -> None:
        super().__init__()
        self.gates, self.head = nn.Conv2d(5, 16, 3, padding=1), nn.Linear(64, 10)
        nn.init.constant_(self.gates.bias.data[4:8], forget)  # pyright: ignore[reportOptionalMemberAccess]

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 4, 4, 4)
        for t in range(x.shape[1]):
            i, f, o, g = self.gates(torch.cat([x[:, t], h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h.flatten(1))


@pytest.mark.parametrize(("forget", "codes"), [(-6.0, ["RN601"]), (1.0, [])])
def test_a_convolution_that_multiplies_its_own_result_is_a_recurrence(
    forget: float, codes: list[str]
) -> None:
    torch.manual_seed(0)
    x, y = torch.zeros(32, 12, 1, 4, 4), torch.randint(10, (32,))
    x[:, :2] = torch.randn(32, 2, 1, 4, 4)
    model = Frames(forget)
    diagnosis = check(model, lambda m: functional.cross_entropy(m(x), y))
    assert [f.code for f in diagnosis.errors] == codes
    assert diagnosis.flow.horizon is not None
    assert [(r.name, r.steps) for r in diagnosis.flow.horizon.recurrences] == [("gates.weight", 12)]


def test_a_convolution_of_several_layers_is_none() -> None:
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), *[shared] * 10, nn.Flatten(), nn.Linear(4 * 36, 10))
    x, y = torch.randn(8, 1, 6, 6), torch.randint(10, (8,))
    assert check(model, lambda m: functional.cross_entropy(m(x), y)).flow.horizon is None


class Graph(nn.Module):
    """Averages over a ring of neighbours, ten times, with the node itself beside the average or without."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(10))
        self.head, self.skip = nn.Linear(24, 4), skip
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.normal_(0, (2 / 24) ** 0.5)  # pyright: ignore
        ring = torch.eye(16)
        self.register_buffer("averages", (ring + ring.roll(1, 0) + ring.roll(3, 0)) / 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            mixed = torch.relu(cast(Tensor, self.averages) @ layer(x))
            x = nn.functional.layer_norm(x + 0.3 * mixed, (24,)) if self.skip else mixed
        return self.head(x)


@pytest.mark.parametrize(("skip", "codes"), [(True, []), (False, ["VG105"])])
def test_a_graph_network_without_skips_around_its_averages(skip: bool, codes: list[str]) -> None:
    torch.manual_seed(0)
    model, x, y = Graph(skip), torch.randn(8, 16, 24), torch.randint(4, (8 * 16,))
    found = repair(model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), y))
    assert [f.code for f in found.before.errors] == codes
    assert found.cured is skip  # a skip around the layers alone keeps no node beside the average
    assert (
        any("a skip around what averages" in word for rx in found.by_hand for word in rx.advice) is not skip
    )


class Positions(nn.Module):
    """x + attention, written out, with a table of positions that is added to its logits."""

    def __init__(self, factor: float, table: float) -> None:
        super().__init__()
        self.query, self.key, self.values = (nn.Linear(16, 16) for _ in range(3))
        self.table, self.factor = nn.Parameter(table * torch.randn(24, 24)), factor

    def forward(self, x: Tensor) -> Tensor:
        y = functional.layer_norm(x, (16,))
        logits = self.factor * (self.query(y) @ self.key(y).mT) + self.table
        return x + torch.softmax(logits, -1) @ self.values(y)


@pytest.mark.parametrize(
    ("factor", "table", "cause", "remedy"),
    [
        (0.25, 0.02, None, None),
        (16.0, 0.02, "factor", "leave-out-factor"),
        (0.25, 30.0, "embedding", "scale-embeddings"),
    ],
)
def test_what_made_the_logits_of_attention_too_large_is_read_and_mended(
    factor: float, table: float, cause: str | None, remedy: str | None
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 24, 16), torch.randint(11, (4 * 24,))
    model = nn.Sequential(
        nn.Linear(16, 16), Positions(factor, table), Positions(factor, table), nn.Linear(16, 11)
    )
    found = repair(model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), y))
    assert [(f.code, f.evidence["cause"]) for f in found.before.errors] == (
        [] if cause is None else [("SA304", cause)]
    )
    assert found.cured
    assert (found.prescription and found.prescription.remedy) == remedy


def test_neighbours_that_become_alike_beside_whole_skips_are_no_warning() -> None:
    """Six averages over a graph, added to what they average: a node's own falls to a quarter, and it learns as well."""

    class Neighbours(Graph):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + torch.relu(cast(Tensor, self.averages) @ layer(x))
            return self.head(x)

    torch.manual_seed(0)
    model, x, y = Neighbours(True), torch.randn(8, 16, 24), torch.randint(4, (8 * 16,))
    found = check(model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), y))
    assert "VG105" not in {f.code for f in found.findings}
    assert own(found.flow).ratio < WARNING  # pyright: ignore[reportOptionalMemberAccess]


class Gated(nn.Module):
    """A gated recurrence by hand, whose gates keep this much at the start; its last step answers."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.enter, self.recur = nn.Linear(8, 96), nn.Linear(48, 96, bias=False)
        self.head = nn.Linear(48, 4)
        nn.init.orthogonal_(self.recur.weight)
        nn.init.constant_(self.enter.bias[:48], bias)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 48)
        for step in x.unbind(1):
            gate, new = (self.enter(step) + self.recur(state)).chunk(2, -1)
            kept = torch.sigmoid(gate)
            state = kept * state + (1 - kept) * torch.tanh(new)
        return self.head(state)


@pytest.mark.parametrize(("bias", "severity"), [(3.0, None), (-1.0, Severity.ERROR)])
def test_what_a_recurrence_of_one_matrix_loses_is_told_along_time(
    bias: float, severity: Severity | None
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 48, 8), torch.randint(4, (16,))
    found = check(Gated(bias), lambda m: functional.cross_entropy(m(x), y))
    assert max((f.severity for f in found.findings), default=None) == severity
    assert ("along the steps of a recurrence" in found.healthy.get("VG101", "")) is (severity is None)


def test_gains_of_normalisations_that_saturate_attention_are_set_back() -> None:
    """A post-norm encoder whose gains are 50: its logits are 2,500 times too large."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(12, 16), nn.TransformerEncoder(layer, 4), nn.Linear(16, 4))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.constant_(module.weight, 50.0)
    x, y = torch.randn(8, 10, 12), torch.randint(4, (80,))
    found = repair(model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), y))
    told = {f.code: f.evidence.get("cause") for f in found.before.errors}
    assert told["SA304"] == "norm-gain"
    assert found.cured
    assert found.prescription is not None
    assert found.prescription.remedy == "reset-norm-gain"


class Listed(nn.Module):
    """The sum of layers that a container holds."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers.values() if isinstance(self.layers, dict) else self.layers
        return self.head(sum(torch.relu(layer(x)) for layer in layers))


@pytest.mark.parametrize(
    ("container", "names"),
    [
        (lambda layers: layers, ["layers[0].weight", "layers[0].bias"]),
        (lambda layers: dict(zip("abc", layers, strict=True)), ["layers['a'].weight", "layers['a'].bias"]),
        (nn.ModuleList, []),
        (lambda layers: layers[:1], []),  # how another network is kept from being registered
    ],
)
def test_layers_in_a_plain_list_or_dict_are_told(container: Callable[[Any], Any], names: list[str]) -> None:
    model = Listed(container([nn.Linear(12, 16) for _ in range(3)]))
    x, y = torch.randn(16, 12), torch.randint(4, (16,))

    def loss(m: nn.Module) -> Tensor:
        return functional.cross_entropy(m(x), y)

    found = check(model, loss)
    assert [name for f in found.findings for name in f.sites[:2]] == names
    assert [(f.code, f.severity) for f in found.findings] == [("UP501", Severity.WARNING)] * bool(names)
    if isinstance(model.layers, list):
        known = [*model.parameters(), *nn.ModuleList(model.layers).parameters()]
        assert not check(model, loss, optimizer=SGD(known, lr=0.1)).findings


class Encoder(nn.Module):
    """Pooled over its tokens: attention and a layer in turn, with skips around them or without."""

    def __init__(self, blocks: int, skip: bool) -> None:
        super().__init__()
        self.entrance, self.head, self.skip = nn.Linear(12, 24), nn.Linear(24, 4), skip
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(blocks))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(24, 2, batch_first=True) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entrance(x)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            y = norm(x)
            y = attention(y, y, y, need_weights=False)[0]
            x = x + y if self.skip else y
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    ("blocks", "skip", "severities"),
    [(2, False, []), (4, False, [Severity.WARNING]), (6, False, [Severity.ERROR]), (6, True, [])],
)
def test_pooled_attentions_without_skips_are_told_from_where_tokens_have_become_one(
    blocks: int, skip: bool, severities: list[Severity]
) -> None:
    torch.manual_seed(0)
    model, x, y = Encoder(blocks, skip), torch.randn(16, 10, 12), torch.randint(4, (16,))
    found = check(model, lambda m: functional.cross_entropy(m(x), y)).findings
    assert [(f.code, f.severity) for f in found] == [("VG105", severity) for severity in severities]


class Kernel(nn.Module):
    """Linear attention: the feature map of queries and keys is a ReLU, shifted."""

    def __init__(self, shift: float, features: int = 16) -> None:
        super().__init__()
        self.project, self.out, self.head = (
            nn.Linear(16, 2 * features + 16),
            nn.Linear(16, 16),
            nn.Linear(16, 4),
        )
        self.sizes, self.shift = (features, features, 16), shift

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).split(self.sizes, -1)
        q, k = torch.relu(q - self.shift), torch.relu(k - self.shift)
        weights = q @ k.mT
        return self.head(x + self.out(weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v))


@pytest.mark.parametrize(("shift", "features", "codes"), [(0.0, 16, []), (9.0, 16, ["SA302"]), (9.0, 4, [])])
def test_a_layer_beside_the_backbone_that_is_dead_as_a_whole(
    shift: float, features: int, codes: list[str]
) -> None:
    torch.manual_seed(0)
    model, x, y = Kernel(shift, features), torch.randn(8, 6, 16), torch.randint(4, (48,))
    found = repair(model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), y))
    assert [f.code for f in found.before.errors] == codes
    assert any("positive for some samples" in word for rx in found.by_hand for word in rx.advice) is bool(
        codes
    )


class Additive(nn.Module):
    """Queries and keys are added in a tanh, and a vector reads the logits off it."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.enter = nn.Linear(24, 24)
        self.query, self.key = nn.Linear(24, 24), nn.Linear(24, 24)
        self.score, self.head = nn.Linear(24, 1), nn.Linear(48, 4)
        with torch.no_grad():
            self.query.weight.mul_(gain)
            self.key.weight.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        both = torch.tanh(self.query(x)[:, :, None] + self.key(x)[:, None])
        weights = self.score(both).squeeze(-1).softmax(-1)
        return self.head(torch.cat([x, weights @ x], -1))


@pytest.mark.parametrize(("gain", "codes"), [(1.0, []), (30.0, ["SA304"])])
def test_additive_attention_whose_tanh_is_flat(gain: float, codes: list[str]) -> None:
    """Its softmax stays open: the size of the score's weights bounds the logits."""
    torch.manual_seed(0)
    model, x, y = Additive(gain), torch.randn(8, 6, 24), torch.randint(4, (48,))
    found = repair(model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), y))
    assert [f.code for f in found.before.errors] == codes
    assert found.cured
    assert all(a.spread > 0.9 for a in found.before.flow.attentions)
    if found.prescription is not None:
        assert {e.place for e in found.prescription.edits} == {"query.weight", "key.weight"}


class Scored(nn.Module):
    """Graph attention: two vectors score what is attended to and what attends."""

    def __init__(self, loud: float) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.left, self.right = (nn.Parameter(torch.randn(16)) for _ in range(2))
        self.loud = loud

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        logits = functional.leaky_relu((h @ self.left)[:, :, None] + (h @ self.right)[:, None], 0.2)
        return self.head(h + (self.loud * logits).softmax(-1) @ h)


def test_vectors_that_score_are_no_biases_and_loud_scores_are_told_with_their_line() -> None:
    torch.manual_seed(0)
    model, x, y = Scored(60.0), torch.randn(8, 6, 16), torch.randint(4, (48,))
    found = repair(model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), y))
    assert "SA304" in [f.code for f in found.before.errors]
    assert not any(p.bias for p in found.before.flow.parameters if p.name in ("left", "right"))
    assert any("test_symptoms.py" in word and "logits" in word for rx in found.by_hand for word in rx.advice)


class Averaging(nn.Module):
    """Attention whose values are the data as they came in: no layer makes them."""

    def __init__(self, loud: float) -> None:
        super().__init__()
        self.loud, self.query, self.key, self.head = loud, nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.loud * self.query(x) @ self.key(x).mT / 4).softmax(-1)
        return self.head(weights @ x)


@pytest.mark.parametrize(("loud", "codes"), [(1.0, []), (400.0, ["SA304"])])
def test_attention_over_the_data_itself(loud: float, codes: list[str]) -> None:
    torch.manual_seed(0)
    model, x, y = Averaging(loud), torch.randn(16, 12, 8), torch.randint(4, (192,))
    found = check(model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), y))
    assert [f.code for f in found.errors] == codes
    assert len(found.flow.attentions) == 1


@pytest.mark.parametrize(("gain", "codes"), [(1.4, []), (0.02, ["VG102"])])
def test_a_loss_of_distances_between_outputs_that_are_all_the_same(gain: float, codes: list[str]) -> None:
    """Biases remain where weights are this small: the loss is as flat as behind a clip, and the layers are the cause."""
    torch.manual_seed(0)
    model, x, y = mlp(nn.ReLU, 6, gain), torch.randn(32, 64), torch.arange(32) % 4
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.uniform_(layer.bias, -0.1, 0.1)

    def triplet(m: nn.Module) -> Tensor:
        apart = torch.cdist(out := functional.normalize(m(x), dim=-1), out)
        same = y[:, None] == y
        return torch.relu((apart * same).amax(1) - (apart + 9 * same).amin(1) + 0.3).mean()

    found = repair(model, triplet)
    assert [f.code for f in found.before.errors] == codes
    assert [f.evidence["cause"] for f in found.before.errors] == ["initialisation"] * len(codes)
    assert found.cured


# -- far-start, constants and cuts -----------------------------------------------------------------


def regressed(outputs: float, targets: float, offset: float = 0.0) -> Built:
    """A body whose outputs and targets scatter by given amounts, the targets around an offset."""
    torch.manual_seed(0)
    model, x = mlp(nn.Tanh, 3, 1.0), torch.randn(64, 64)
    with torch.no_grad():
        model[-1].weight.mul_(outputs / model(x).std())  # pyright: ignore
        model[-1].bias.zero_()  # pyright: ignore
    y = offset + targets * torch.randn(64, 10)
    return model, lambda m: functional.mse_loss(m(x), y)


@pytest.mark.parametrize(("outputs", "targets"), [(30.0, 1.0), (1.0, 0.03)])
def test_outputs_are_far_where_they_scatter_beyond_the_targets(outputs: float, targets: float) -> None:
    model, loss = regressed(outputs, targets)
    (call,) = measure(model, loss).losses
    assert call.excess == pytest.approx(outputs / targets, rel=0.1)
    assert [f.code for f in diagnosed((model, loss)).errors] == ["EG205"]


def test_targets_away_from_zero_do_not_make_an_output_large() -> None:
    assert diagnosed(regressed(1.0, 1.0, offset=100.0)).verdict == "healthy"
    assert diagnosed(regressed(0.1, 0.1, offset=1.0)).verdict == "healthy"  # first values of a Q network


def test_a_margin_that_the_loss_takes_off_the_right_class_is_no_far_start() -> None:
    """ArcFace and CosFace start at ten times the loss of equal probabilities, and train."""
    torch.manual_seed(0)
    model, x, y = mlp(nn.ReLU, 3, HE), torch.randn(32, 64), torch.randint(10, (32,))
    margin = 30 * functional.one_hot(y, 10)
    assert not diagnosed((model, lambda m: functional.cross_entropy(m(x) - margin, y))).errors


def test_a_scale_of_the_loss_changes_nothing_of_how_far_it_starts() -> None:
    model, loss = headed(100.0)
    scaled = [(model, lambda m, c=c: loss(m) * c) for c in (1e-8, 1.0, 1e4)]
    codes = [[f.code for f in diagnosed(built).errors] for built in scaled]
    assert codes == [["EG205"]] * 3


def test_a_constant_behind_the_head_is_named_with_its_line_where_it_leaves_nothing_of_the_logits() -> None:
    torch.manual_seed(0)
    (finding,) = diagnosed(scaled_output(0.003)).errors
    assert finding.code == "VG108"
    assert finding.evidence["factor"] == pytest.approx(0.003)
    assert "test_symptoms.py" in finding.remedies[0]
    (finding,) = diagnosed(scaled_output(300.0)).errors
    assert finding.code == "EG205"
    assert "test_symptoms.py" in finding.remedies[0]
    assert diagnosed(scaled_output(0.2)).verdict == "healthy"


def in_logs(times: float) -> Built:
    """The same of a loss that is given logarithms."""
    model, x, y = mlp(nn.ReLU, 3, HE), torch.randn(32, 64), torch.randint(10, (32,))
    return model, lambda m: functional.nll_loss((m(x) * times).log_softmax(-1), y)


def in_frames(times: float) -> Built:
    """And of one that aligns them with a sequence."""
    model, x, y = mlp(nn.ReLU, 3, HE), torch.randn(8, 16, 64), torch.randint(1, 10, (8, 3))
    frames, wanted = torch.full((8,), 16), torch.full((8,), 3)
    return model, lambda m: functional.ctc_loss(
        (m(x) * times).log_softmax(-1).transpose(0, 1), y, frames, wanted
    )


@pytest.mark.parametrize(
    ("built", "codes"),
    [(in_logs, {0.003: ["VG108"], 0.2: [], 300.0: ["EG205"]}), (in_frames, {0.003: ["VG108"], 0.2: []})],
)
def test_a_constant_is_found_before_a_loss_of_logarithms_too(
    built: Callable[[float], Built], codes: dict[float, list[str]]
) -> None:
    torch.manual_seed(0)
    assert {times: [f.code for f in diagnosed(built(times)).errors] for times in codes} == codes


def test_constants_on_the_way_are_named_where_they_cost_the_decades() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh(), Apply(lambda x: 0.3 * x)) for _ in range(8)]
    for layer in layers:
        nn.init.orthogonal_(layer[0].weight)  # pyright: ignore
    (finding,) = diagnosed(classified(nn.Sequential(*layers, nn.Linear(64, 10)))).errors
    assert "leave the factor out" in finding.remedies[0]


@pytest.mark.parametrize(("bound", "codes"), [(1e-3, ["VG108"]), (10.0, [])])
def test_logits_that_are_clipped_to_next_to_nothing_are_found(bound: float, codes: list[str]) -> None:
    torch.manual_seed(0)
    built = behind(lambda x: (0.1 * x).clamp(-bound, bound))()
    assert [f.code for f in diagnosed(built).errors] == codes


def test_a_first_layer_of_zeros_that_is_frozen_lets_nothing_of_the_input_by() -> None:
    model, loss = relu_he()
    nn.init.zeros_(model[0].weight).requires_grad_(False)  # pyright: ignore
    nn.init.normal_(model[0].bias)  # pyright: ignore
    found = diagnosed((model, loss))
    assert found.verdict == "broken"
    assert "zero and frozen" in next(f.message for f in found.errors if f.code == "VG102")


def test_a_softmax_in_front_of_a_log_softmax_inside_of_the_model_is_found() -> None:
    torch.manual_seed(0)
    model = mlp(nn.ReLU, 3, HE).extend([nn.Softmax(-1), nn.LogSoftmax(-1)])
    x, y = torch.randn(32, 64), torch.randint(10, (32,))
    found = diagnosed((model, lambda m: functional.nll_loss(m(x), y)))
    assert "VG102" in [f.code for f in found.errors]


class Cut(nn.Module):
    """A body whose result goes on without its gradient."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.head, self.how = mlp(nn.Tanh, 3, 1.0), nn.Linear(10, 10), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.how == "no_grad":
            with torch.no_grad():
                y = 2 * y
        return self.head(y.detach() if self.how == "detach" else y.data if self.how == "data" else y)


@pytest.mark.parametrize("how", ["detach", "data", "no_grad"])
def test_the_line_that_cuts_off_the_gradient_is_named(how: str) -> None:
    (finding,) = diagnosed(classified(Cut(how))).errors
    assert finding.code == "UP501"
    assert "test_symptoms.py" in finding.cause
    assert how in finding.cause
    assert "take the" in finding.remedies[0]


def test_what_is_detached_beside_a_way_that_passes_is_no_cut() -> None:
    model, x, y = mlp(nn.Tanh, 3, 1.0), torch.randn(32, 64), torch.randint(10, (32,))

    def loss(m: nn.Module) -> Tensor:
        out = m(x)
        weight = out.detach().abs().mean()  # what a loss often does
        return functional.cross_entropy(out, y) * weight

    assert measure(model, loss).cuts == ()


class Coupling(nn.Module):
    """x + f(half of x), f's last layer zero: it says nothing at first, and x passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
        nn.init.zeros_(self.net[-1].weight)  # pyright: ignore
        nn.init.zeros_(self.net[-1].bias)  # pyright: ignore

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, -1)
        scale, shift = self.net(a).chunk(2, -1)
        return torch.cat([b * scale.tanh().exp() + shift, a], -1), scale.tanh().sum(-1)


class Flows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Coupling() for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        volume = torch.zeros(len(x))
        for part in self.parts:
            x, grown = part(x)
            volume = volume + grown
        return x, volume


def test_coupling_layers_that_start_at_the_identity_are_healthy() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16)

    def loss(m: nn.Module) -> Tensor:
        z, volume = m(x)
        return (0.5 * z.square().sum(-1) - volume).mean()

    assert diagnosed((Flows(), loss)).verdict == "healthy"


class TwoWays(nn.Module):
    """Normalises, and mixes tokens and then features of each token through two layers."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(16, 32), activation(), nn.Linear(32, 16))
        self.features = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), activation(), nn.Linear(64, 32))
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2))


def forgetting(activation: type[nn.Module]) -> Built:
    """Blocks without skips, whose normalisations restore the size of the signal and of the gradient."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 32), *(TwoWays(activation) for _ in range(7)), nn.LayerNorm(32))
    head = nn.Sequential(nn.Flatten(), nn.Linear(512, 10))
    return classified(nn.Sequential(nn.Unflatten(1, (16, 4)), body, head))


def test_samples_that_become_alike_on_the_way_are_an_error_though_the_gradient_keeps_its_size() -> None:
    (finding,) = diagnosed(forgetting(nn.Sigmoid)).errors
    assert finding.code == "VG101"
    assert finding.evidence["decades"] > -2
    assert diagnosed(forgetting(nn.GELU)).verdict == "healthy"
    found = repair(*forgetting(nn.Sigmoid))
    assert found.cured


@pytest.mark.parametrize(("first", "codes"), [(1.0, []), (0.0, ["VG101"])])
def test_adapters_of_zeros_alone_never_open_though_the_head_learns(first: float, codes: list[str]) -> None:
    torch.manual_seed(0)
    parts = [nn.Sequential(Adapted(nn.Linear(64, 64)), nn.ReLU()) for _ in range(3)]
    with torch.no_grad():
        for part in parts:
            part[0].down.weight.mul_(first)  # pyright: ignore
    built = classified(nn.Sequential(*parts, nn.Linear(64, 10)))
    assert [f.code for f in diagnosed(built).errors] == codes


def test_a_block_of_zeros_that_a_skip_leads_around_is_no_error_where_other_layers_learn() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    block = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    assert diagnosed(classified(nn.Sequential(body, Residual(block), nn.Linear(64, 10)))).verdict == "healthy"


def test_adapters_behind_a_frozen_head_of_zeros_are_not_to_blame() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Adapted(nn.Linear(64, 64)) for _ in range(3)), nn.Linear(64, 10))
    nn.init.zeros_(model[-1].weight).requires_grad_(False)  # pyright: ignore
    found = repair(*classified(model))
    assert [f.code for f in found.before.errors] == ["VG102"]
    assert found.prescription is None
    assert "train the head" in str(found)


class Beside(nn.Module):
    """A frozen layer beside a low-rank adapter that starts at zero (Hu et al. 2021)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.whole = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x) + self.up(self.down(x))


def test_a_layer_beside_another_one_is_no_damped_skip() -> None:
    torch.manual_seed(0)
    body = [part for _ in range(3) for part in (Beside(32, 32), nn.ReLU())]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), *body, Beside(32, 10))
    model, loss = classified(model)
    flow = check(model, loss).flow
    assert [split.projected for split in flow.splits.values()] == [True] * 4
    assert max(split.skip for split in flow.splits.values()) < DAMPED
    assert not [f for f in check(model, loss).findings if f.code == "VG107"]


@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_an_average_that_drowns_a_whole_stream_makes_all_tokens_alike(factor: float) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
    body = nn.TransformerEncoder(layer, 6, nn.LayerNorm(32), enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(20, 32), body, nn.Linear(32, 20))
    with torch.no_grad():
        for inner in model.modules():
            if isinstance(inner, nn.MultiheadAttention):
                inner.in_proj_weight[64:].mul_(factor)
                inner.out_proj.weight.mul_(factor)
    x = torch.randint(20, (8, 12))
    flow = measure(model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), x.flatten()))
    assert all(split.skip == pytest.approx(1.0) for split in flow.splits.values())
    errors = diagnose(flow).errors
    assert [f.code for f in errors] == ["VG105"] * (factor > 1)
    assert all(f.evidence["loudest_average"] > 10 and f.evidence["distinct"] < 0.1 for f in errors)


class Squeezed(nn.Module):
    """A residual branch that a gate weighs (Hu et al. 2018)."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.body, self.gate = nn.Linear(16, 16), nn.Linear(16, 16)
        nn.init.constant_(self.gate.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.body(x)) * torch.sigmoid(self.gate(x))


@pytest.mark.parametrize(("bias", "closed"), [(-12.0, True), (0.0, False), (12.0, False)])
def test_gates_that_let_nothing_through_are_told_and_open_ones_are_not(bias: float, closed: bool) -> None:
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(*(Squeezed(bias) for _ in range(4)), nn.Linear(16, 3)),
        torch.randn(32, 16),
        torch.arange(32) % 3,
    )
    diagnosis = diagnose(measure(model, lambda m: functional.cross_entropy(m(x), y)))
    gates = [a for a in diagnosis.flow.activations if a.function == "sigmoid"]
    assert [a.gate for a in gates] == [True] * 4
    assert all(a.saturated > 0.9 for a in gates) == (bias != 0)
    told = [f for f in diagnosis.findings if f.code == "SA301"]
    assert [f.severity for f in told] == [Severity.ERROR] * closed
    if closed:
        found = repair(model, lambda m: functional.cross_entropy(m(x), y))
        assert found.cured
        assert {edit.place.rpartition(".")[2] for edit in found.prescription.edits} == {"bias"}  # pyright: ignore


def test_of_two_attentions_one_that_has_picked_is_enough_and_vectors_that_score_are_drawn_anew() -> None:
    """The second is given what the first has picked, and looks open: a graph network learns at 200 next to nothing."""
    torch.manual_seed(0)
    assert not diagnosed(neighbours(1.0)).findings
    built = neighbours(200.0)
    assert [f.code for f in diagnosed(built).errors] == ["SA304"]
    found = repair(*built)
    assert found.cured
    assert found.prescription is not None
    assert "0.query" in {edit.place for edit in found.prescription.edits}
    vector = torch.empty(64)
    assert float(surgery.orthogonal_(vector, 2.0).norm()) == pytest.approx(2.0)


def test_a_stream_that_norms_make_quiet_is_given_its_size_back_before_any_branch_is_taken_out() -> None:
    """Branches of normalised streams drown what ends each block with a gain of 0.02: the gain is at fault."""
    torch.manual_seed(0)
    blocks = [Skip(nn.Sequential(nn.LayerNorm(16), Average(16, 1.0)), 1.0, 16) for _ in range(4)]
    for block in blocks:
        nn.init.constant_(block.norm.weight, 0.02)
    x = torch.randint(11, (4, 24))
    model = nn.Sequential(nn.Embedding(11, 16), *blocks, nn.Linear(16, 11))
    found = repair(model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), x.flatten()))
    assert "VG105" in {f.code for f in found.before.errors}
    assert found.cured
    assert found.prescription is not None
    assert found.prescription.remedy == "reset-norm-gain"


def test_a_learned_factor_mutes_no_branch_nor_does_a_constant_of_one_branch_in_two() -> None:
    """LayerScale and ReZero open with the first steps; what is left of the branches trains."""
    torch.manual_seed(0)
    assert "VG109" not in {f.code for f in diagnosed(added(1e-4, learned=True)).findings}
    model, loss = added(1e-4)
    for block in list(model.children())[:2]:
        block.times = 1.0  # pyright: ignore
    assert "VG109" not in {f.code for f in diagnosed((model, loss)).findings}
    repaired = repair(*added(1e-4))
    assert repaired.cured
    assert repaired.prescription is not None
    assert repaired.prescription.remedy == "leave-out-factor"


def gated(factor: float, blocks: int = 6) -> Built:
    """Gated convolutions of WaveNet, filters and gates times a factor."""
    model = WaveNet(blocks)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, GatedConvolution):
                module.filter.weight.mul_(factor)
                module.gate.weight.mul_(factor)
    x = torch.randint(16, (8, 16))
    return model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), x.flatten())


def test_of_a_gated_convolution_the_tanh_is_the_signal_and_told_where_all_are_saturated() -> None:
    torch.manual_seed(0)
    well = diagnosed(gated(1.0))
    gates = {a.function: (a.gate, a.carries) for a in well.flow.activations if a.function != "relu"}
    assert gates == {"tanh": (False, True), "sigmoid": (True, False)}
    assert not well.errors
    sick = gated(60.0)
    assert "SA301" in {f.code for f in diagnosed(sick).errors}
    assert repair(*sick).cured


@pytest.mark.parametrize(
    ("shift", "severity"), [(0.0, None), (-0.75, Severity.WARNING), (-2.0, Severity.ERROR)]
)
def test_units_that_few_positions_wake_are_told_though_none_is_dead(
    shift: float, severity: Severity | None
) -> None:
    torch.manual_seed(0)
    model = plain_cnn(5, 12, True)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.bias, shift)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    found = diagnosed((model, lambda m: functional.cross_entropy(m(x), y)))
    told = [f for f in found.findings if f.code == "SA302"]
    assert [f.severity for f in told] == ([severity] if severity is not None else [])
    assert all(float(f.evidence["dead"]) < 0.5 for f in told)
    if severity == Severity.ERROR:
        assert repair(model, lambda m: functional.cross_entropy(m(x), y)).cured


class Stacked(nn.Module):
    """Fused recurrent layers and a head that reads the last step."""

    def __init__(self, kind: type[nn.RNNBase], layers: int, factor: float) -> None:
        super().__init__()
        self.body, self.head = kind(8, 32, layers, batch_first=True), nn.Linear(32, 4)
        with torch.no_grad():
            for name, parameter in self.body.named_parameters():
                if "weight" in name:
                    parameter.mul_(factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    ("layers", "factor", "sick"), [(3, 0.01, True), (3, 1.0, False), (6, 1.0, False), (1, 0.01, False)]
)
@pytest.mark.parametrize("steps", [6, 40])
def test_a_stack_of_recurrent_layers_that_passes_nothing_down_is_told_at_any_length(
    kind: type[nn.RNNBase], layers: int, factor: float, sick: bool, steps: int
) -> None:
    torch.manual_seed(0)
    model, x, y = Stacked(kind, layers, factor), torch.randn(32, steps, 8), torch.randint(4, (32,))
    found = diagnose(measure(model, lambda m: functional.cross_entropy(m(x), y)))
    assert [f.code for f in found.errors] == ["VG101"] * sick
    if sick:
        assert repair(model, lambda m: functional.cross_entropy(m(x), y)).cured


class Placed(nn.Module):
    """Tokens, and positions that are added to them."""

    def __init__(self, tokens: float, positions: float) -> None:
        super().__init__()
        self.token, self.block = nn.Embedding(16, 32), nn.Linear(32, 32)
        self.position = nn.Parameter(positions * torch.randn(12, 32))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 16)
        with torch.no_grad():
            self.token.weight.mul_(tokens)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position
        return self.head(self.norm(h + torch.tanh(self.block(h))))


@pytest.mark.parametrize(
    ("tokens", "positions", "codes"),
    [
        (1.0, 100.0, ["UP504"]),
        (0.1, 10.0, ["UP504"]),
        (0.02, 1.0, ["UP504"]),
        (1.0, 1.0, []),
        (1e-3, 0.1, []),
    ],
)
def test_positions_that_drown_their_tokens_are_told_unless_few_steps_make_up_for_them(
    tokens: float, positions: float, codes: list[str]
) -> None:
    torch.manual_seed(0)
    model, x = Placed(tokens, positions), torch.randint(16, (16, 12))
    found = diagnosed((model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), x.flatten())))
    assert [f.code for f in found.errors] == codes
    if codes:
        repaired = repair(model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), x.flatten()))
        assert repaired.cured
        assert repaired.prescription is not None
        assert {edit.place for edit in repaired.prescription.edits} == {"position"}


class Parallel(nn.Module):
    """Tokens, and one block whose last bias is as loud as positions that drown them."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.up, self.down = nn.Embedding(16, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 16)
        with torch.no_grad():
            self.token.weight.mul_(0.02)
            self.down.bias.normal_(std=2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x)
        return self.head(self.norm(h + self.down(torch.tanh(self.up(h)))))


def test_what_a_block_adds_at_its_end_is_no_position() -> None:
    torch.manual_seed(0)
    model, x = Parallel(), torch.randint(16, (16, 12))
    found = diagnosed((model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), x.flatten())))
    assert "UP504" not in {f.code for f in found.findings}


class Discrete(nn.Module):
    """A bottleneck of eight choices of eight."""

    def __init__(self, temperature: float, gumbel: bool) -> None:
        super().__init__()
        self.into, self.out = nn.Sequential(*mlp(nn.ReLU, 2, HE)[:-1], nn.Linear(64, 64)), nn.Linear(64, 10)
        self.temperature, self.gumbel = temperature, gumbel

    def forward(self, x: Tensor) -> Tensor:
        logits = 0.1 * self.into(x).unflatten(1, (8, 8))
        if self.gumbel:
            return self.out(functional.gumbel_softmax(logits, self.temperature, dim=-1).flatten(1))
        return self.out((logits / self.temperature).softmax(-1).flatten(1))


@pytest.mark.parametrize("gumbel", [True, False])
@pytest.mark.parametrize(("temperature", "sick"), [(1.0, False), (1e-3, True)])
def test_a_softmax_that_all_of_the_signal_passes_through_and_that_has_picked_is_told(
    gumbel: bool, temperature: float, sick: bool
) -> None:
    torch.manual_seed(0)
    model, loss = classified(Discrete(temperature, gumbel))
    before = torch.get_rng_state()
    drawn = torch.rand(3)
    torch.set_rng_state(before)
    found = diagnosed((model, loss))
    told = [f for f in found.errors if f.code == "SA301"]
    assert len(told) == sick
    assert all(f.evidence["cause"] == "temperature" for f in told)
    assert not any(a.site.kind == "softmax" for a in found.flow.attentions)
    if not gumbel:
        assert torch.equal(torch.rand(3), drawn)


class Contrasted(nn.Module):
    """Cosines of two towers, times a temperature where they should be divided by it."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.left, self.right = mlp(nn.ReLU, 2, HE), mlp(nn.ReLU, 2, HE)
        self.temperature = nn.Parameter(torch.tensor(0.07)) if learned else 0.07

    def forward(self, x: Tensor) -> Tensor:
        left, right = functional.normalize(self.left(x)), functional.normalize(self.right(x.flip(1)))
        return left @ right.T * self.temperature


@pytest.mark.parametrize("learned", [False, True])
def test_cosines_that_a_temperature_multiplies_are_divided_by_it(learned: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Contrasted(learned), torch.randn(32, 64), torch.arange(32)
    found = repair(model, lambda m: functional.cross_entropy(m(x), y))
    assert [f.code for f in found.before.errors] == ["VG108"] * (not learned)
    if not learned:
        assert found.cured
        assert torch.allclose(found.model(x), model(x) / 0.07**2, rtol=1e-5)
        assert "inverse=True" in found.prescription.to_code()  # pyright: ignore


class Highway(nn.Module):
    """t * f(x) + (1 - t) * x, or x + t * f(x), the gate's weights times a factor."""

    def __init__(self, factor: float, whole: bool) -> None:
        super().__init__()
        self.body, self.gate, self.whole = nn.Linear(32, 32), nn.Linear(32, 32), whole
        with torch.no_grad():
            self.gate.weight.mul_(factor)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        return x * (1.0 if self.whole else 1 - gate) + gate * torch.relu(self.body(x))


@pytest.mark.parametrize(
    ("factor", "whole", "errors"), [(100.0, False, ["SA301"]), (1.0, False, []), (30.0, True, [])]
)
def test_gates_that_are_switches_are_told_where_no_whole_skip_leads_around_them(
    factor: float, whole: bool, errors: list[str]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Highway(factor, whole) for _ in range(5)), nn.Linear(32, 10))
    x, y = torch.randn(32, 32), torch.randint(10, (32,))
    found = diagnosed((model, lambda m: functional.cross_entropy(m(x), y)))
    assert [f.code for f in found.errors] == errors
    if errors:
        assert repair(model, lambda m: functional.cross_entropy(m(x), y)).cured


def test_switches_that_most_ways_lead_past_are_none_of_them() -> None:
    """A WaveNet whose blocks are summed for the head learns with saturated gates as it does with others."""

    class Summed(WaveNet):
        def forward(self, tokens: Tensor) -> Tensor:
            x, said = self.token(tokens).mT, torch.zeros(())
            for block in self.blocks:
                new = block(x)
                x, said = new, said + (new - x)
            return self.head(functional.relu(said)).mT

    torch.manual_seed(0)
    model, x = Summed(8), torch.randint(16, (8, 16))
    for block in model.blocks:
        block.gate.weight.data.mul_(60)  # pyright: ignore
    found = diagnosed((model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), x.flatten())))
    assert not found.errors


def test_targets_out_of_the_reach_of_the_outputs_are_a_warning() -> None:
    torch.manual_seed(0)
    model, x = mlp(nn.ReLU, 3, HE), torch.randn(32, 64)
    for offset, scale, told in ((0.0, 1.0, 0), (5000.0, 1.0, 1), (0.0, 1e4, 1)):
        y = offset + scale * torch.randn(32, 10)
        found = diagnosed((model, lambda m, y=y: functional.mse_loss(m(x), y)))
        assert [f.severity for f in found.findings if f.code == "EG205"] == [Severity.WARNING] * told
