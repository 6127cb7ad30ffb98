"""The gradient along time against what theory says it is, and what may run along time."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import isograd
from isograd import horizon
from isograd.cli import main
from isograd.diagnosis import Severity
from isograd.graph.scaled import ScaledBackward, log10_norms
from isograd.horizon import Horizon
from isograd.recurrent.along import horizon_of_loss
from isograd.recurrent.unrolled import KERNELS, Unrolled

KERNEL = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stacked and bidirectional": {"num_layers": 3, "bidirectional": True, "batch_first": True},
    "without biases": {"bias": False, "batch_first": True},
}


def scalar(w: float) -> nn.RNN:
    """h = relu(w h + x), of one unit."""
    model = nn.RNN(1, 1, nonlinearity="relu", bias=False, batch_first=True)
    with torch.no_grad():
        model.weight_ih_l0.fill_(1.0)
        model.weight_hh_l0.fill_(w)
    return model


def loop_of(kernel: nn.Module, *args: Any) -> tuple[list[Tensor], Unrolled]:
    with Unrolled(kernel) as seen:
        return [t for t in pytree.tree_leaves(kernel(*args)) if t.is_floating_point()], seen


# -- loops and kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KERNEL)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_loop_gives_the_numbers_of_the_kernel(kind: str, form: str, packed: bool) -> None:
    torch.manual_seed(0)
    kernel, x = KERNEL[kind](5, 7, **FORMS[form]).double(), torch.randn(4, 20, 5, dtype=torch.float64)
    args: tuple[Any, ...] = (x if kernel.batch_first else x.transpose(0, 1).contiguous(),)
    if packed:
        args = (pack_padded_sequence(args[0], [20, 3, 11, 8], kernel.batch_first, enforce_sorted=False),)
    fused = [t for t in pytree.tree_leaves(kernel(*args)) if t.is_floating_point()]
    looped, seen = loop_of(kernel, *args)
    assert [t.shape for t in looped] == [t.shape for t in fused]
    for ours, theirs in zip(looped, fused, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)
    assert seen.kernels[0][0] == 20


def test_a_loop_gives_the_gradients_of_the_kernel() -> None:
    torch.manual_seed(0)
    kernel = nn.LSTM(5, 7, 2, proj_size=3, batch_first=True).double()
    x = torch.randn(4, 20, 5, dtype=torch.float64, requires_grad=True)
    fused = torch.autograd.grad(kernel(x)[0].sum(), [x, *kernel.parameters()])
    looped = torch.autograd.grad(loop_of(kernel, x)[0][0].sum(), [x, *kernel.parameters()])
    for ours, theirs in zip(looped, fused, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_loop_that_departs_from_its_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "rnn_tanh", KERNELS["rnn_relu"])
    with pytest.raises(AssertionError, match="departs from the kernel"):
        loop_of(nn.RNN(3, 3), torch.randn(4, 2, 3))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_chaotic_kernel_is_no_other_kernel(kind: str) -> None:
    """Recurrent weights a hundred times too large make of the last digit all there is within a few steps."""
    torch.manual_seed(0)
    kernel = KERNEL[kind](8, 32, 2, bidirectional=True)
    with torch.no_grad():
        for weight in kernel.parameters():
            weight.mul_(100)
    model = Last(kernel)
    x, y = torch.randn(24, 16, 8), torch.arange(16) % 3
    assert isograd.check(model, lambda m: functional.cross_entropy(m(x), y)).flow.horizon is not None


class Last(nn.Module):
    """Classifies from the last step of a kernel."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel, self.head = kernel, nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.kernel(x)[0][-1])


def test_dropout_between_layers_keeps_its_rate() -> None:
    torch.manual_seed(0)
    kernel = nn.GRU(4, 64, 2, dropout=0.5, batch_first=True)
    x = torch.randn(2, 6, 4)
    assert not torch.equal(loop_of(kernel, x)[0][0], loop_of(kernel, x)[0][0])
    assert torch.allclose(loop_of(kernel.eval(), x)[0][0], kernel(x)[0], atol=1e-6)


# -- the scaled backward ------------------------------------------------------------------------------


def test_the_scaled_backward_is_autograds_where_that_does_not_underflow() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    y = layer(x) + x.mean(1, keepdim=True)  # a broadcast, whose gradient has to be summed
    cotangent = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
    (terms,) = ScaledBackward(get_gradient_edge(y), [get_gradient_edge(x)])(cotangent)
    assert torch.allclose(sum(t * 2.0**e for e, t in terms.items()), expected, rtol=1e-12)  # pyright: ignore
    logs = torch.linalg.vector_norm(expected, dim=(0, 2)).log10()
    assert torch.allclose(log10_norms(terms, 1, 5), logs, rtol=1e-12)


def test_slices_are_put_where_they_were_taken() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 2, dtype=torch.float64, requires_grad=True)
    y = x.tanh() + x[:, -1:] + x[:, 2, None] * x[:, -2, None] + x[1] + x.select(1, 4)[:, None] + x[:, 0, None]
    cotangent = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
    backward = ScaledBackward(get_gradient_edge(y), [get_gradient_edge(x)])
    for _ in range(2):  # nothing of the first is left in the second
        (terms,) = backward(cotangent)
        assert torch.allclose(sum(t * 2.0**e for e, t in terms.items()), expected, rtol=1e-12)  # pyright: ignore


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


def test_a_custom_function_is_passed() -> None:
    x = torch.ones(2, requires_grad=True)
    (terms,) = ScaledBackward(get_gradient_edge(y := Tripled.apply(x) * 2), [get_gradient_edge(x)])(
        torch.ones_like(y)
    )
    assert terms[0].tolist() == [6.0, 6.0]


# -- oracles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [0.12, 0.9, 1.0, 1.1, 3.0])
def test_a_scalar_recurrence_over_a_thousand_steps_is_w_to_the_lag(w: float) -> None:
    found = horizon(
        scalar(w), torch.rand(1, 1000, 1) + 0.01 if w <= 1.1 else torch.zeros(1, 1000, 1) + 1e-30, probes=1
    )
    lags = torch.arange(len(found.curve), dtype=torch.float64)
    finite = found.curve.isfinite()
    assert finite.all() or w == 3.0  # 3**1000 leaves the range in the forward pass itself
    assert torch.allclose(found.curve[finite], (lags * math.log10(w))[finite], atol=1e-4)
    assert found.factor == pytest.approx(w, rel=1e-6)
    expected = math.ceil(math.log(0.01) / math.log(w)) if w < 1 else math.inf
    assert found.steps == expected
    assert found.recurrences[0].radius == found.recurrences[0].norm == pytest.approx(w)


def test_an_orthogonal_linear_recurrence_is_flat() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 16)
            self.recurrent = nn.utils.parametrizations.orthogonal(nn.Linear(16, 16, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), 16)
            for step in self.inner(x).unbind(1):
                h = self.recurrent(h) + step
            return h

    torch.manual_seed(0)
    found = horizon(Linear(), torch.randn(2, 100, 3))
    assert found.factor == pytest.approx(1.0, abs=2e-3)
    assert found.steps == math.inf
    assert found.at_end


@pytest.mark.parametrize("bias", [-1.0, 0.5, 3.0])
def test_an_lstm_of_constant_gates_forgets_by_its_forget_gate(bias: float) -> None:
    """With no way from h to the gates, c is multiplied by sigmoid(b_f) at every step and by nothing else."""
    torch.manual_seed(0)
    kernel = nn.LSTM(3, 8, batch_first=True)
    with torch.no_grad():
        kernel.weight_hh_l0.zero_()
        kernel.weight_ih_l0[:16].zero_()  # input and forget gate
        kernel.bias_hh_l0.zero_()
        kernel.bias_ih_l0[8:16] = bias
    found = horizon(kernel, torch.randn(2, 300, 3) * 1e-2)
    gate = 1 / (1 + math.exp(-bias))
    assert found.factor == pytest.approx(gate, rel=1e-2)
    assert found.recurrences[0].gate == pytest.approx(gate, rel=1e-5)


class CausalConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(4, 4, 3, dilation=d) for d in (1, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(functional.pad(x, (2 * layer.dilation[0], 0))).tanh()  # pyright: ignore
        return x


def test_a_causal_convolution_ends_at_its_receptive_field() -> None:
    torch.manual_seed(0)
    model = CausalConvolution()
    found = horizon(model, torch.randn(2, 4, 50))
    assert (found.axis, found.reach) == (2, 14)
    assert (found.curve[15:] == -math.inf).all()
    assert any("exactly zero" in note for note in found.notes)
    middle = horizon(model, torch.randn(2, 4, 50), at=20)
    assert middle.at == 20
    assert (middle.ahead == -math.inf).all()


def test_the_horizon_is_the_gradient_that_autograd_gives() -> None:
    torch.manual_seed(0)
    model, x = nn.GRU(6, 6, 2, bidirectional=True).double(), torch.randn(12, 3, 6, dtype=torch.float64)
    found = horizon(model, x, at=5, probes=1, seed=3)
    assert found.axis == 0
    leaf = x.clone().requires_grad_()
    u = torch.randn(3, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (grad,) = torch.autograd.grad((model(leaf)[0][5] * u / u.norm()).sum(), leaf)
    logs = torch.linalg.vector_norm(grad, dim=(1, 2)).log10()
    assert torch.allclose(torch.cat([found.curve.flip(0), found.ahead]), logs, atol=1e-10)


# -- what may run along time ---------------------------------------------------------------------------


class Tokens(nn.Module):
    """A language model of one recurrent layer."""

    def __init__(self, kernel: nn.Module, width: int) -> None:
        super().__init__()
        self.embedding, self.kernel, self.head = nn.Embedding(50, 16), kernel, nn.Linear(width, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.kernel(self.embedding(ids))[0])


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        h = c = x.new_zeros(len(x), 16)
        out: list[Tensor] = []
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            out.append(h)
        return torch.stack(out, 1), None


class ByHand(nn.Module):
    """Input and state in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        h = x.new_zeros(len(x), 16)
        out: list[Tensor] = []
        for step in x.unbind(1):
            h = torch.tanh(self.both(torch.cat([step, h], 1)))
            out.append(h)
        return torch.stack(out, 1), None


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.causal = causal

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        return self.layer(x, src_mask=mask, is_causal=self.causal), None


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.GRU(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        packed = pack_padded_sequence(x, [x.shape[1]] * len(x), batch_first=True)
        return pad_packed_sequence(self.kernel(packed)[0], batch_first=True)[0], None


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, int, str]] = {
    "tokens, batch second": (lambda: Tokens(nn.GRU(16, 16), 16), torch.randint(50, (30, 3)), 0, "GRU"),
    "tokens, batch first": (
        lambda: Tokens(nn.LSTM(16, 16, 2, batch_first=True), 16), torch.randint(50, (3, 30)), 1, "LSTM"
    ),
    "tokens, square": (lambda: Tokens(nn.GRU(16, 16), 16), torch.randint(50, (8, 8)), 0, "GRU"),
    "cells": (lambda: Tokens(Cells(), 16), torch.randint(50, (3, 30)), 1, "LSTM"),
    "by hand": (lambda: Tokens(ByHand(), 16), torch.randint(50, (3, 30)), 1, "loop"),
    "attention": (lambda: Tokens(Attention(False), 16), torch.randint(50, (3, 30)), 1, ""),
    "causal attention": (lambda: Tokens(Attention(True), 16), torch.randint(50, (3, 30)), 1, ""),
    "floats": (lambda: nn.LSTM(4, 6), torch.randn(30, 2, 4), 0, "LSTM"),
    "without a batch": (lambda: nn.GRU(4, 6), torch.randn(30, 4), 0, "GRU"),
    "packed": (Packed, torch.randn(3, 30, 16), 1, "GRU"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_time_is_found_in(name: str) -> None:
    build, x, axis, kind = MODELS[name]
    torch.manual_seed(0)
    model = build()
    found = horizon(model, x, probes=2)
    assert found.axis == axis
    assert found.at == found.length - 1 == x.shape[axis] - 1
    assert {r.kind for r in found.recurrences} == ({kind} if kind else set())
    assert found.curve.isfinite().all()
    assert not found.at_end
    middle = horizon(model, x, at=3, probes=1)
    assert len(middle.curve) == 4
    assert (middle.ahead > -math.inf).all() == (name == "attention")
    assert ("not causal" in str(middle)) == (name == "attention")


def test_a_packed_batch_is_an_input_like_any_other() -> None:
    torch.manual_seed(0)
    x, kernel = torch.randn(3, 20, 4), nn.GRU(4, 8, batch_first=True)
    packed = pack_padded_sequence(x, [20, 20, 20], batch_first=True)
    assert torch.allclose(horizon(kernel, packed).curve, horizon(kernel, x).curve, atol=1e-4)


def test_attention_of_torchs_own_module_is_seen() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    torch.manual_seed(0)
    assert horizon(Attending(), torch.randn(3, 20, 16)).axis == 1


def test_attention_reaches_any_lag_and_a_default_lstm_does_not() -> None:
    torch.manual_seed(0)
    x = torch.randint(50, (2, 120))
    lstm = horizon(Tokens(nn.LSTM(16, 64, batch_first=True), 64), x)
    assert lstm.steps < 15
    assert lstm.factor == pytest.approx(0.62, abs=0.03)
    assert [f.code for f in lstm.findings] == ["RN601", "RN603"]
    attention = horizon(Tokens(Attention(True), 16), x)
    assert attention.steps == math.inf
    assert attention.factor == pytest.approx(1.0, abs=0.01)
    assert attention.findings == ()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MambaForCausalLM", "GPT2LMHeadModel"])
def test_shipped_language_models(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = {
        "MambaForCausalLM": lambda: transformers.MambaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4
        ),
        "GPT2LMHeadModel": lambda: transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2),
    }[kind]()
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config)
    found = horizon(model, {"input_ids": torch.randint(50, (2, 40))}, probes=2)
    assert (found.source, found.length) == ("embedding of input_ids", 40)
    assert found.findings == ()
    assert found.curve.isfinite().all()
    assert (horizon(model, torch.randint(50, (2, 40)), at=10, probes=1).ahead == -math.inf).all()


def test_strided_and_unpadded_convolutions_end_at_the_last_step() -> None:
    torch.manual_seed(0)
    found = horizon(
        nn.Sequential(nn.Conv1d(4, 4, 3), nn.Tanh(), nn.Conv1d(4, 4, 3)), torch.randn(2, 4, 30), at=-2
    )
    assert (found.at, found.reach) == (28, 4)


# -- what it leaves alone, and what it says ----------------------------------------------------------


def test_the_model_is_left_bit_by_bit() -> None:
    torch.manual_seed(0)
    model = Tokens(nn.LSTM(16, 16, 2, dropout=0.3, batch_first=True), 16)
    model.embedding.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    horizon(model, torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0)), probes=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [p.requires_grad for p in model.embedding.parameters()] == [False]
    assert all(p.grad is None for p in model.parameters())


def test_the_same_seed_gives_the_same_numbers_and_another_does_not() -> None:
    torch.manual_seed(0)
    model, x = nn.GRU(4, 8), torch.randn(20, 2, 4)
    a, b, c = horizon(model, x), horizon(model, x), horizon(model, x, seed=1)
    assert torch.equal(a.curve, b.curve)
    assert not torch.equal(a.curve, c.curve)
    assert (a.spread > 0).all()
    assert horizon(model, x, probes=1).spread.isnan().all()


@pytest.mark.parametrize(
    ("model", "x", "options", "words"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(3, 5, 4), {}, "which axis is time"),
        (nn.GRU(4, 4), torch.randn(5, 3, 4), {"at": 9}, "has 5 steps, and at=9 is none"),
        (nn.GRU(4, 4), torch.randn(5, 3, 4), {"time": 7}, "no axis 7"),
        (nn.GRU(4, 4), torch.randn(5, 3, 4), {"probes": 0}, "at least one"),
        (
            nn.Sequential(nn.Conv1d(4, 4, 3), nn.Flatten()),
            torch.randn(2, 4, 9),
            {"at": 2},
            "no axis of 9 steps",
        ),
    ],
)
def test_an_error_says_what_to_do(model: nn.Module, x: Tensor, options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        horizon(model, x, **options)


def test_time_can_be_said() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    assert horizon(model, torch.randn(3, 5, 4), time=1).reach == 0  # each step for itself


def test_steps_may_begin_behind_a_first_layer() -> None:
    """A recurrence over the columns of an image: no axis of the pixels is the recurrence's own."""

    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.see, self.read = nn.Conv2d(1, 4, 3, stride=2), nn.LSTM(28, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(self.see(x).permute(3, 0, 1, 2).flatten(2))[0]

    torch.manual_seed(0)
    found = horizon(Columns(), torch.randn(2, 1, 16, 64))
    assert (found.source, found.length, found.axis) == ("what runs along time", 31, 0)
    assert found.factor == pytest.approx(0.62, abs=0.05)


def test_the_loss_tells_whether_it_reads_the_end_alone() -> None:
    torch.manual_seed(0)
    model, x = nn.GRU(4, 8, batch_first=True), torch.randn(2, 10, 4)
    assert horizon_of_loss(model, lambda m: m(x)[0][:, -1].square().sum(), probes=1).at_end
    assert not horizon_of_loss(model, lambda m: m(x)[0].square().sum(), probes=1).at_end
    with pytest.raises(ValueError, match="does not call the model itself"):
        horizon_of_loss(nn.ModuleList([model]), lambda m: m[0](x)[0].sum())  # pyright: ignore


def test_check_names_a_default_lstm_over_two_hundred_steps() -> None:
    torch.manual_seed(0)
    model, x = Tokens(nn.LSTM(16, 32, batch_first=True), 32), torch.randint(50, (2, 200))
    found = isograd.check(model, lambda m: functional.cross_entropy(m(x).flatten(0, 1), x.flatten()))
    assert {"RN601", "RN603"} <= {f.code for f in found.findings}
    assert found.verdict == "healthy", "whether the task needs more is not known"
    assert "time" not in found.flow.unexamined


def test_check_calls_a_recurrence_that_explodes_exploding() -> None:
    torch.manual_seed(0)
    model, x = nn.RNN(4, 16, nonlinearity="relu", batch_first=True), torch.randn(2, 60, 4)
    nn.init.orthogonal_(model.weight_hh_l0, 3.0)
    found = isograd.check(model, lambda m: m(x)[0][:, -1].sum())
    assert "RN602" in {f.code for f in found.errors}
    assert found.verdict == "exploding"


# -- text, JSON, pictures, the command ----------------------------------------------------------------


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 8, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0]
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return "net.py:Net"


def run(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int | str | None, str]:
    with pytest.raises(SystemExit) as left:
        main(["horizon", *line])
    return left.value.code, capsys.readouterr().out


def test_the_command_prints_text(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, net, "--input", "2,60,4")
    assert status == 0
    assert "horizon  net.py:Net" in out
    assert "gru.weight_hh_l0" in out
    assert "RN601 short-horizon" in out


def test_the_command_prints_strict_json(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out = run(capsys, net, "--input", "2,60,4", "--format", "json", "--at", "30", "--probes", "2")
    report = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (report["at"], len(report["curve"]), len(report["ahead"]), report["probes"]) == (30, 31, 29, 2)
    assert set(report["ahead"]) == {None}
    assert report["recurrences"][0]["kind"] == "GRU"


@pytest.mark.parametrize("form", ["svg", "html"])
def test_the_command_draws(net: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    status, _ = run(capsys, net, "--input", "2,20,4", "--format", form, "-o", "out")
    picture = (tmp_path / "out").read_text(encoding="utf-8")
    assert status == 0
    assert "<svg" in picture
    assert "<script" not in picture


def test_an_interrupt_keeps_what_was_measured(
    net: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = ScaledBackward.__call__
    calls: list[int] = []

    def interrupted(self: ScaledBackward, cotangent: Tensor) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return once(self, cotangent)

    monkeypatch.setattr(ScaledBackward, "__call__", interrupted)
    status, out = run(capsys, net, "--input", "2,20,4")
    assert status == 130
    assert "interrupted after 2 of 4 probes" in out


def test_what_cannot_be_told_is_a_usage_error(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = run(capsys, net, "--input", "2,20,4", "--at", "50")
    assert status == 2


def test_names_are_escaped_in_html() -> None:
    found = horizon(nn.GRU(2, 2), torch.randn(5, 1, 2), probes=1)
    named = Horizon(**{**{k: getattr(found, k) for k in found.__dataclass_fields__}, "target": "<script>x"})
    assert "<script>" not in named.to_html()
    assert "<script>" not in named.to_svg()


class Asked(nn.Module):
    """A tanh RNN, asked after its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(4, 32, batch_first=True), nn.Linear(32, 3)
        nn.init.orthogonal_(self.rnn.weight_hh_l0, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize(("spoken", "severity"), [(8, Severity.ERROR), (40, Severity.WARNING)])
def test_steps_count_by_what_differs_between_the_samples(spoken: int, severity: Severity) -> None:
    """Half the gradient a step is enough for the last steps of a sequence, and not for what came before a silence."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(8, spoken, 4), torch.zeros(8, 40 - spoken, 4)], 1)
    found = horizon_of_loss(Asked(), lambda m: functional.cross_entropy(m(x), torch.arange(8) % 3))
    assert found.differing is not None
    assert (found.differing > 0).tolist() == [False] * (40 - spoken) + [True] * spoken
    share = min(found.steps, 40) - (40 - spoken)
    assert found.covered == pytest.approx(max(share, 0) / spoken, abs=0.1)
    assert next(f.severity for f in found.findings if f.code == "RN601") == severity


def test_a_single_sample_counts_all_steps_alike() -> None:
    torch.manual_seed(0)
    found = horizon_of_loss(Asked(), lambda m: m(torch.randn(1, 24, 4)).square().mean())
    assert found.differing is None
    assert found.covered == pytest.approx(found.steps / 24)
