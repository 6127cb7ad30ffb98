"""Whatever a model returns, in whatever format and out of whichever parts of torch, it is read right."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gallery.handmade import Equilibrium
from isograd import diagnose, measure
from tests.models import Loss, log10, mlp, plain_gradients, projected

TOKENS = torch.arange(28).reshape(4, 7) % 11


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Returning(nn.Module):
    """Wraps what a body returns."""

    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.body, self.wrap = mlp(nn.Tanh, 3, inputs=16, width=16), wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.body(x))


@pytest.mark.parametrize(
    ("wrap", "take"),
    [
        (lambda x: x, lambda out: out),
        (lambda x: (x, None), lambda out: out[0]),
        (lambda x: {"logits": x, "hidden": [x]}, lambda out: out["logits"]),
        (lambda x: SimpleNamespace(logits=x), lambda out: out.logits),
    ],
    ids=["tensor", "tuple", "dict", "object"],
)
def test_whatever_the_model_returns_the_flow_is_the_same(
    wrap: Callable[[Tensor], object], take: Callable[[object], Tensor]
) -> None:
    x = torch.randn(8, 16)
    model = Returning(wrap)
    flow = measure(model, lambda m: take(m(x)).square().sum())
    plain = measure(model.body, lambda m: m(x).square().sum())
    assert flow.column("decades").tolist() == pytest.approx(plain.column("decades").tolist(), nan_ok=True)
    assert flow.layers == 4


def test_a_dataclass_of_transformers_is_an_output() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    x = torch.randn(8, 16)
    model = Returning(lambda x: outputs.CausalLMOutput(loss=x.square().mean(), logits=x))
    flow = measure(model, lambda m: m(x).loss)
    assert flow.layers == 4
    assert [s.kind for s in flow.sites[-2:]] == ["loss", "loss"]


def test_several_losses_are_summed() -> None:
    x, y = torch.randn(8, 16, dtype=torch.float64), torch.randint(4, (8,))

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(nn.Tanh, 3, inputs=16, width=16, classes=16)
            self.classes, self.values = nn.Linear(16, 4), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.body(x))
            return self.classes(h), self.values(h)

    model = Heads().double()

    def loss(m: nn.Module) -> Tensor:
        classes, values = m(x)
        return functional.cross_entropy(classes, y) + 0.1 * values.square().mean()

    flow = measure(model, loss)
    assert {f"body.{i}" for i in range(7)} <= {s.module for s in flow.sites}
    assert flow.layers >= 4
    leaf = x.clone().requires_grad_()
    classes, values = model(leaf)
    end = torch.autograd.grad(functional.cross_entropy(classes, y) + 0.1 * values.square().mean(), leaf)[0]
    assert float(flow.column("grad_norm_log10")[0]) == pytest.approx(log10(end), abs=1e-9)


class EveryStep(nn.Module):
    """A recurrence with an output at each step: no node but the first that all gradient passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.step, self.head = nn.Embedding(11, 16), nn.Linear(32, 16), nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x, h, out = self.embed(tokens), torch.zeros(len(tokens), 16), list[Tensor]()
        for t in range(tokens.shape[1]):
            h = torch.tanh(self.step(torch.cat([x[:, t], h], 1)))
            out.append(self.head(h))
        return torch.stack(out, 1)


def test_a_loss_on_every_step_is_measured_where_it_can_be() -> None:
    model = EveryStep()
    loss: Loss = lambda m: functional.cross_entropy(m(TOKENS).flatten(0, 1), TOKENS.flatten())  # noqa: E731
    flow = measure(model, loss)
    assert {p.name: p.grad_norm_log10 for p in flow.parameters} == pytest.approx(
        plain_gradients(model, loss), abs=1e-4
    )
    assert all(flow.ledgers[site.depth] for site in flow.sites[1:2])  # its inside is described


# -- number formats --------------------------------------------------------------------------------


def deep(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = mlp(nn.Tanh, 8, 1.0), torch.randn(32, 64)
    return model.to(dtype), x.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 1e-4)]
)
def test_other_formats_read_like_float32(dtype: torch.dtype, tolerance: float) -> None:
    model, x = deep(torch.float32)
    expected = measure(model, lambda m: m(x).float().square().mean())
    converted, inputs = deep(dtype)
    flow = measure(converted, lambda m: m(inputs).float().square().mean())
    name = str(dtype).removeprefix("torch.")
    assert {s.dtype for s in flow.sites[: 2 * 8 + 1]} == {name}
    assert flow.column("decades").tolist() == pytest.approx(
        expected.column("decades").tolist(), abs=tolerance, nan_ok=True
    )


def test_autocast_is_kept_and_told() -> None:
    model, x = deep(torch.float32)

    def mixed(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = m(x)
        return out.float().square().mean()

    flow = measure(model, mixed)
    plain = measure(model, lambda m: m(x).square().mean())
    assert {s.dtype for s in flow.sites[1 : 2 * 8 + 1] if s.kind == "linear"} == {"bfloat16"}
    assert flow.decades == pytest.approx(plain.decades, abs=0.05)
    assert flow.layers == plain.layers == 9


def test_a_view_or_a_cast_behind_a_layer_does_not_change_what_its_site_says() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.a(x).view(len(x), 4, 8).transpose(1, 2))
            return self.b(x.reshape(len(x), 32)).float()

    flow = measure(Cast().bfloat16(), projected(torch.randn(8, 64, dtype=torch.bfloat16)))
    layers = [(s.shape, s.dtype) for s in flow.sites if s.kind == "linear"]
    assert layers == [((8, 32), "bfloat16"), ((8, 16), "bfloat16")]


def test_a_gradient_below_float16_is_still_read() -> None:
    model, x = deep(torch.float16)
    flow = measure(model, lambda m: m(x).float().square().mean() * 1e-12)
    same_unit = measure(model, lambda m: m(x).float().square().mean())
    assert flow.decades == pytest.approx(same_unit.decades, abs=0.02)


# -- torch's own composites ------------------------------------------------------------------------


class Last(nn.Module):
    """The last step of a recurrent kernel."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x)[0][:, -1]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


COMPOSITES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "attention": (Attending, ["input", "attention"]),
    "lstm": (lambda: Last(nn.LSTM(16, 16, 2, batch_first=True)), ["input", "recurrent"]),
    "gru": (lambda: Last(nn.GRU(16, 16, batch_first=True)), ["input", "recurrent"]),
    "rnn": (lambda: Last(nn.RNN(16, 16, batch_first=True, bidirectional=True)), ["input", "recurrent"]),
    "encoder": (_encoder, ["input"] + ["residual add"] * 6),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_torchs_own_composites_are_read_right(name: str) -> None:
    build, kinds = COMPOSITES[name]
    model, x = build().double(), torch.randn(4, 6, 16, dtype=torch.float64)
    flow = measure(model, projected(x))
    assert [s.kind for s in flow.sites if s.kind != "loss"] == kinds
    leaf = x.clone().requires_grad_()
    end = torch.autograd.grad(projected(leaf)(model), leaf)[0]
    assert float(flow.column("grad_norm_log10")[0]) == pytest.approx(log10(end), abs=1e-9)
    assert {p.name: p.grad_norm_log10 for p in flow.parameters} == pytest.approx(
        plain_gradients(model, projected(x)), abs=1e-9
    )
    assert ("time" in flow.unexamined) == ("recurrent" in kinds)


class Twice(nn.Module):
    """A trunk, and two answers of it that the loss takes apart."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.trunk = mlp(activation, 12, 1.0 if activation is nn.Tanh else 0.3, classes=64)
        self.classes, self.value = nn.Linear(64, 10), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x)
        return self.classes(hidden), self.value(hidden)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid])
def test_what_one_loss_of_several_is_multiplied_by_is_no_gain(
    activation: type[nn.Module], factor: float
) -> None:
    model, x, y = Twice(activation), torch.randn(32, 64), torch.randint(10, (32,))

    def loss(m: nn.Module) -> Tensor:
        logits, value = m(x)
        return functional.cross_entropy(logits, y) + factor * value.square().mean()

    flow = measure(model, loss)
    sick = {f.code for f in diagnose(flow).errors}
    assert sick == ({"VG101"} if activation is nn.Sigmoid else set())
    answers = next(site.depth for site in flow.sites if site.operation == "outputs")
    assert abs(float(flow.column("decades")[answers])) < 1  # two linear layers, side by side


def test_a_spectrum_of_complex_numbers_is_read() -> None:
    """Neural operators and FNet pass through Fourier transforms; so does their gradient."""

    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(9, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.irfft(torch.fft.rfft(x) * self.weight)

    x = torch.randn(8, 16)
    model = nn.Sequential(nn.Linear(16, 16), Spectral(), nn.Linear(16, 3))
    loss = projected(x)
    flow = measure(model, loss)
    assert flow.failure is None
    loss(model).backward()
    plain = [
        p.grad.abs().square().sum().sqrt().log10().item() for p in model.parameters() if p.grad is not None
    ]
    assert [p.grad_norm_log10 for p in flow.parameters] == pytest.approx(plain, abs=1e-4)


def test_zeros_to_start_from_are_no_input() -> None:
    flow = measure(
        Equilibrium(), lambda m: functional.cross_entropy(m(torch.randn(32, 64)), torch.arange(32) % 3)
    )
    assert not flow.towers
    assert flow.sites[0].kind == "input"
    assert not diagnose(flow).errors
