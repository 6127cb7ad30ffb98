"""Where the data comes in: the sink of the backbone is found for every kind of input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isograd import measure
from isograd.flow import Flow
from tests.models import Residual, Tied, branch, log10, mlp, projected

TOKENS = torch.arange(28).reshape(4, 7) % 11


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def first(flow: Flow) -> tuple[str, str]:
    """Kind and module of the site where the backbone begins."""
    return flow.sites[0].kind, flow.sites[0].module


class Language(nn.Module):
    """Tokens or their embeddings, as a transformers model takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 16)
        self.position = nn.Embedding(7, 16)
        self.blocks = nn.Sequential(*(Residual(branch()) for _ in range(3)))
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        x = self.token(tokens) if inputs_embeds is None else inputs_embeds
        x = x + self.position(torch.arange(x.shape[1]))
        return self.head(self.blocks(x))


def told(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> Flow:
    return measure(model, lambda m: functional.cross_entropy(call(m).flatten(0, -2), TOKENS.flatten()))


def test_a_float_input_is_the_sink_and_its_gradient_is_measured() -> None:
    model, x = mlp(nn.Tanh, 3, inputs=16, width=16).double(), torch.randn(8, 16, dtype=torch.float64)
    flow = measure(model, projected(x))
    leaf = x.clone().requires_grad_()
    assert first(flow) == ("input", "")
    assert flow.sites[0].name == "input"
    end = torch.autograd.grad(projected(leaf)(model), leaf)[0]
    assert float(flow.column("grad_norm_log10")[0]) == pytest.approx(log10(end), abs=1e-9)
    seen = flow.inputs["input"]
    expected = (x.mean(), x.square().mean().sqrt(), x.std(), x.abs().max())
    assert (seen.mean, seen.rms, seen.std, seen.largest) == pytest.approx([v.item() for v in expected])
    assert seen.varying == pytest.approx(x.var(0, correction=0).mean().sqrt().item())


def test_tokens_begin_at_their_embedding() -> None:
    flow = told(Language(), lambda m: m(TOKENS))
    assert first(flow) == ("embedding", "token")
    assert len(flow.splits) == 3


def test_tied_embeddings_begin_at_the_lookup_and_not_at_the_head() -> None:
    flow = told(Tied(), lambda m: m(TOKENS))
    assert first(flow) == ("embedding", "token")
    assert len(flow.splits) == 3


def test_embeddings_given_from_outside_are_the_sink() -> None:
    embedded = torch.randn(4, 7, 16)
    flow = told(Language(), lambda m: m(inputs_embeds=embedded))
    assert first(flow) == ("input", "")
    assert list(flow.inputs) == ["inputs_embeds"]
    assert len(flow.splits) == 3


def test_embeddings_looked_up_by_the_closure_reach_the_models_own_table() -> None:
    flow = told(Language(), lambda m: m(inputs_embeds=m.token(TOKENS)))  # pyright: ignore
    assert first(flow)[0] == "embedding"  # of the tokens or of the positions: both are added first
    assert len(flow.splits) == 3


def test_one_hot_integers_begin_at_the_first_layer() -> None:
    class OneHot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(11, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 11)
            )

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layers(functional.one_hot(tokens, 11).float())

    flow = told(OneHot(), lambda m: m(TOKENS))
    assert first(flow) == ("linear", "layers.0")
    assert [s.module for s in flow.sites[1:5]] == ["layers.1", "layers.2", "layers.3", "layers.4"]


class TwoInputs(nn.Module):
    """A deep tower and a shallow one."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = mlp(nn.Tanh, 4, inputs=16, width=16, classes=16)
        self.shallow = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, picture: Tensor, label: Tensor) -> Tensor:
        return self.head(self.deep(picture) * self.shallow(label))


def test_of_two_inputs_the_deeper_is_the_sink_and_both_are_named() -> None:
    a, b = torch.randn(8, 16), torch.randn(8, 16)
    for call in (lambda m: m(a, b), lambda m: m(label=b, picture=a)):
        flow = measure(TwoInputs(), lambda m, call=call: call(m).square().sum())
        assert {s.module for s in flow.sites} >= {f"deep.{i}" for i in range(9)}
        assert set(flow.inputs) == {"picture", "label"}


class Towers(nn.Module):
    """Two towers with layers of their own, compared at the end."""

    def __init__(self, small: float) -> None:
        super().__init__()
        self.left = mlp(nn.Tanh, 6, 1.0, inputs=16, width=16, classes=16)
        self.right = mlp(nn.Tanh, 5, small, inputs=16, width=16, classes=16)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) @ self.right(b).T


def test_the_other_tower_is_measured_too() -> None:
    a, b = torch.randn(8, 16, dtype=torch.float64), torch.randn(8, 16, dtype=torch.float64)
    model = Towers(0.05).double()

    def loss(m: nn.Module) -> Tensor:
        return functional.cross_entropy(m(a, b), torch.arange(8))

    flow = measure(model, loss)
    assert flow.sites[1].module == "left.0"
    (other,) = flow.towers
    assert other.sites[1].module == "right.0"
    assert other.layers == 6
    ends = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    value = functional.cross_entropy(model(*ends), torch.arange(8))
    expected = [log10(g) for g in torch.autograd.grad(value, ends)]
    readings = [float(line.column("grad_norm_log10")[0]) for line in (flow, other)]
    assert readings == pytest.approx(expected, abs=1e-9)
    assert other.lost < -3 < flow.lost


class EncoderDecoder(nn.Module):
    """Every decoder block reads the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 16)
        self.encoder = nn.Sequential(*(Residual(branch()) for _ in range(4)))
        self.reads = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.decoder = nn.ModuleList(Residual(branch()) for _ in range(3))
        self.head = nn.Linear(16, 11)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encoder(self.token(source))
        x = self.token(target)
        for read, block in zip(self.reads, self.decoder, strict=True):
            x = x + torch.tanh(read(memory)) * x.sigmoid()
            x = block(x)
        return self.head(x)


def test_an_encoder_decoder_is_measured_from_the_encoders_tokens() -> None:
    flow = told(EncoderDecoder(), lambda m: m(TOKENS, TOKENS.roll(1, 1)))
    assert first(flow) == ("embedding", "token")
    modules = [s.module for s in flow.sites if s.kind == "residual add"]
    assert modules == [*(f"encoder.{i}" for i in range(4)), "decoder.2"]


def test_a_siamese_model_is_called_twice() -> None:
    a, b = torch.randn(8, 16), torch.randn(8, 16)
    model = mlp(nn.Tanh, 4, 1.0, inputs=16, width=16)
    flow = measure(model, lambda m: (m(a) - m(b)).square().sum())
    assert flow.layers == 5
    assert [s.kind for s in flow.sites[:4]] == ["input", "linear", "activation", "linear"]
    assert {p.state for p in flow.parameters} == {"measured"}


def test_a_closure_may_call_submodules_only() -> None:
    model = nn.ModuleDict(
        {"body": mlp(nn.Tanh, 4, inputs=16, width=16, classes=16), "head": nn.Linear(16, 4)}
    )
    x = torch.randn(8, 16)
    flow = measure(model, lambda m: m["head"](m["body"](x)).square().sum())  # pyright: ignore
    assert flow.sites[0].module == "body.0"
    assert flow.layers >= 5
    assert flow.unexamined.get("backbone") is None


class Reversible(nn.Module):
    """Normalises by the statistics of its input, and multiplies them back: RevIN."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(nn.Tanh, 6, inputs=16, width=16, classes=16)

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        return self.body((x - mean) / deviation) * deviation + mean


def test_a_model_that_multiplies_its_inputs_scale_back_is_measured_through_its_layers() -> None:
    flow = measure(Reversible(), projected(torch.randn(8, 16)))
    assert flow.layers >= 6
    assert {f"body.{i}" for i in range(1, 13)} <= {s.module for s in flow.sites}
