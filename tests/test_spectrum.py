"""Singular values against the assembled matrix, closed forms and float64 products."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import isograd
from isograd.cli import main
from isograd.spectra import singular
from isograd.spectrum import SingularValues

Loss = Callable[[nn.Module], Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def probe(x: Tensor) -> Loss:
    """A loss whose gradient at the output is a fixed random one."""

    def loss(model: nn.Module) -> Tensor:
        out = model(x)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return (out * weights.to(out.dtype)).sum()

    return loss


class Block(nn.Module):
    """A pre-norm transformer block whose attention is fused."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 20), nn.ReLU(inplace=True), nn.Linear(20, 16)
    )


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 3))


def batchnorm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(32, 24)), (3, 32)),
    "mlp": (mlp, (3, 24)),
    "convolution": (convolution, (2, 2, 5, 5)),
    "batchnorm": (batchnorm, (3, 2, 4, 4)),
    "transformer": (lambda: Block(8, 2), (2, 5, 8)),
    "encoder-layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), (2, 4, 8)),
    "lstm": (Recurrent, (2, 4, 8)),
}


def without_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(singular, "LARGEST_DENSE", 0)


def every(model: nn.Module, loss: Loss, tolerance: float = 1e-6) -> list[SingularValues]:
    found = isograd.spectrum(model, loss, tolerance=tolerance)
    assert found.end_to_end is not None
    return [*found.segments, found.end_to_end]


@pytest.mark.parametrize("name", MODELS)
def test_the_iteration_agrees_with_the_dense_svd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape = MODELS[name]
    model, loss = build(), probe(torch.randn(shape))
    exact = every(model, loss)
    without_a_matrix(monkeypatch)
    iterated = every(model, loss)
    assert {e.method for e in exact} <= {"dense", "diagonal"}
    assert "golub-kahan" in {i.method for i in iterated}
    for e, i in zip(exact, iterated, strict=True):
        assert i.sigma_max == pytest.approx(e.sigma_max, rel=1e-4), e.site.name
        assert i.unexamined == ""
        # Some thirty draws are compared: one beyond three standard errors is no surprise, beyond five it is.
        assert abs(i.sigma_rms / e.sigma_rms - 1) <= 5 * i.rms_error + 1e-5, e.site.name


def test_the_standard_error_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over seeds, the distance from the exact RMS in standard errors has mean 0 and size 1."""
    model, loss = (
        nn.Sequential(nn.Linear(150, 150), nn.Tanh(), nn.Linear(150, 150)),
        probe(torch.randn(1, 150)),
    )
    exact = isograd.spectrum(model, loss, sites=["1"]).end_to_end
    assert exact is not None
    without_a_matrix(monkeypatch)
    distances: list[float] = []
    for seed in range(20):
        found = isograd.spectrum(model, loss, sites=["1"], seed=seed).end_to_end
        assert found is not None
        assert found.rms_error <= 0.01
        distances.append((found.sigma_rms / exact.sigma_rms - 1) / found.rms_error)
    assert abs(sum(distances) / 20) < 3 / 20**0.5
    assert 0.6 < (sum(d * d for d in distances) / 20) ** 0.5 < 1.6


def test_the_dense_svd_is_that_of_the_jacobian() -> None:
    model, x = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 16)), torch.randn(3, 24)
    per_sample = [torch.autograd.functional.jacobian(lambda row: model(row), row) for row in x]
    values = torch.stack([torch.linalg.svdvals(j.double()) for j in per_sample])
    found = isograd.spectrum(model, probe(x)).end_to_end
    assert found is not None
    assert found.method == "dense"
    assert found.sigma_max == pytest.approx(float(values.max()), rel=1e-5)
    assert found.sigma_rms == pytest.approx(float(values.square().mean().sqrt()), rel=1e-5)
    assert found.sigma_min == pytest.approx(float(values.min()), rel=1e-3)
    assert found.condition == pytest.approx(float((values[:, 0] / values[:, -1]).max()), rel=1e-3)


def test_batchnorm_couples_the_samples() -> None:
    norm, x = nn.BatchNorm1d(6), torch.randn(5, 6)
    whole = torch.autograd.functional.jacobian(nn.BatchNorm1d(6), x).reshape(30, 30)
    found = isograd.spectrum(nn.Sequential(norm), probe(x)).end_to_end
    assert found is not None
    assert found.sigma_max == pytest.approx(float(torch.linalg.svdvals(whole)[0]), rel=1e-4)
    assert found.sigma_min == 0, "the mean of a batch goes nowhere"
    assert found.condition == math.inf


def test_an_elementwise_segment_takes_one_backward_for_all() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 4)), torch.randn(4, 16)
    silu = isograd.spectrum(model, probe(x), sites=["1"]).segments
    assert [s.method for s in silu] == ["diagonal"]
    inside = model[0](x).detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(F.silu(inside).sum(), inside)
    assert silu[0].sigma_max == pytest.approx(float(slope.abs().max()), rel=1e-5)
    assert silu[0].sigma_rms == pytest.approx(float(slope.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("gain", [1.0, 0.9, 1.1])
def test_orthogonal_networks_are_isometries(gain: float) -> None:
    layers = [nn.Linear(16, 16) for _ in range(20)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain)
    found = isograd.spectrum(nn.Sequential(*layers), probe(torch.randn(2, 16))).end_to_end
    assert found is not None
    assert found.sigma_min is not None
    expected = 20 * math.log10(gain)
    for measured in (
        found.log10_sigma_max,
        found.log10_sigma_rms,
        math.log10(found.sigma_min),
        found.log10_gain,
    ):
        assert measured == pytest.approx(expected, abs=1e-5)
    assert found.alignment == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("matrix", [True, False])
def test_300_sigmoid_layers_agree_with_float64(matrix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    width = 8
    layers = [part for _ in range(300) for part in (nn.Linear(width, width, bias=False), nn.Sigmoid())]
    for layer in layers[::2]:
        nn.init.normal_(layer.weight, 0, width**-0.5)  # pyright: ignore[reportArgumentType]
    model, x = nn.Sequential(*layers), torch.randn(2, width)
    assert torch.autograd.grad(probe(x)(model), layers[0].weight)[0].count_nonzero() == 0  # pyright: ignore
    hidden, scale = x.double(), 0.0
    product = torch.eye(width, dtype=torch.float64).expand(2, width, width)
    for layer in copy.deepcopy(model).double():
        out = layer(hidden).detach()
        linear = isinstance(layer, nn.Linear)
        product = layer.weight.detach() @ product if linear else (out * (1 - out))[:, :, None] * product
        largest = float(product.abs().max())
        product, scale, hidden = product / largest, scale + math.log10(largest), out
    values = torch.linalg.svdvals(product)
    if not matrix:
        without_a_matrix(monkeypatch)
    found = isograd.spectrum(model, probe(x), sites=["0"], tolerance=1e-5).end_to_end
    assert found is not None
    assert found.method == ("dense" if matrix else "golub-kahan")
    assert found.log10_sigma_max == pytest.approx(float(values.max().log10()) + scale, abs=1e-3)
    assert found.log10_sigma_max < -150
    if matrix:
        rms = float(values.square().mean().sqrt().log10()) + scale
        assert found.log10_sigma_rms == pytest.approx(rms, abs=1e-3)


def test_the_gains_are_those_of_measure() -> None:
    model, loss = mlp(), probe(torch.randn(3, 24))
    measured = isograd.measure(model, loss)
    found = isograd.spectrum(model, loss)
    assert [s.site for s in found.segments] == [s for s in measured.sites if s.kind not in ("input", "loss")]
    decades = dict(zip(measured.sites, measured.column("decades").tolist(), strict=True))
    for segment in found.segments:
        assert segment.log10_gain == pytest.approx(decades[segment.site], abs=1e-5)
        assert segment.gain <= segment.sigma_max * (1 + 1e-5)


class Once(torch.autograd.Function):
    """A square whose author ruled out second derivatives."""

    @staticmethod
    def forward(ctx, x):  # pyright: ignore
        ctx.save_for_backward(x)
        return x * x.roll(1, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore
        (x,) = ctx.saved_tensors
        return grad * x.roll(1, -1) + (grad * x).roll(-1, -1)


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(self.linear(x))  # pyright: ignore


def test_what_cannot_be_differentiated_twice_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_matrix(monkeypatch)
    found = isograd.spectrum(Squares(), probe(torch.randn(2, 8))).end_to_end
    assert found is not None
    assert math.isnan(found.sigma_max)
    assert "cannot be differentiated" in found.unexamined
    assert found.sigma_rms > 0


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4))
    x = torch.randn(5, 6)
    probe(x)(model).backward()
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state = torch.get_rng_state()
    isograd.spectrum(model, probe(x))
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(after) == len(grads) == 6
    assert all(torch.equal(a, b) for a, b in zip(grads, after, strict=True))


def test_the_same_seed_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_matrix(monkeypatch)
    model, loss = Block(8, 2), probe(torch.randn(2, 5, 8))
    first, again, other = (isograd.spectrum(model, loss, seed=seed) for seed in (3, 3, 4))
    assert first.to_json() == again.to_json() != other.to_json()


def test_a_bfloat16_model_is_measured_in_float32_on_a_copy_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block, x = Block(8, 2).bfloat16(), torch.randn(2, 5, 8).bfloat16()
    exact = isograd.spectrum(copy.deepcopy(block).float(), probe(x.float())).end_to_end
    without_a_matrix(monkeypatch)
    half = isograd.spectrum(block, probe(x), tolerance=1e-6)
    assert exact is not None
    assert half.end_to_end is not None
    assert half.end_to_end.sigma_max == pytest.approx(exact.sigma_max, rel=1e-4)
    assert half.notes[0] == "the model's bfloat16 was computed in float32, on a copy"
    assert block.qkv.weight.dtype == torch.bfloat16
    assert not block._forward_pre_hooks


def test_a_loss_that_ignores_the_model_it_is_given_is_measured_in_half_precision() -> None:
    block, x = Block(8, 2).bfloat16(), torch.randn(2, 5, 8).bfloat16()
    found = isograd.spectrum(block, lambda m: block(x).sum())
    assert any("could not be computed in float32" in note for note in found.notes)
    assert any("computed in bfloat16" in note for note in found.notes)


def test_attention_says_its_backend() -> None:
    found = isograd.spectrum(Block(8, 2), probe(torch.randn(2, 5, 8)))
    assert any("MATH" in note for note in found.notes)
    assert "MATH" in repr(found)


def test_arguments_that_cannot_be() -> None:
    model, loss = mlp(), probe(torch.randn(3, 24))
    with pytest.raises(ValueError, match="no site is called 'fc9'"):
        isograd.spectrum(model, loss, sites=["fc9"])
    with pytest.raises(ValueError, match="must be positive"):
        isograd.spectrum(model, loss, tolerance=0)


# -- command -------------------------------------------------------------------------------------------

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(4, 8)
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "sigma_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield
    for name in [name for name in sys.modules if name.startswith("sigma_net")]:
        del sys.modules[name]


def run(line: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(line.split())
    return int(left.value.code or 0)


@pytest.mark.usefixtures("net")
def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("spectrum sigma_net.py:build --format json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target"] == "sigma_net.py:build"
    assert [s["kind"] for s in report["segments"]] == ["linear", "activation", "linear"]
    assert report["end_to_end"]["sigma_max"] > report["end_to_end"]["sigma_rms"] > 0


@pytest.mark.usefixtures("net")
def test_the_command_writes_text_and_names_an_unknown_site(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("spectrum sigma_net.py:build --sites 1 -o report.txt") == 0
    text = Path("report.txt").read_text(encoding="utf-8")
    assert all(said in text for said in ("1 · tanh", "end to end"))
    assert "2 · linear" not in text
    assert run("spectrum sigma_net.py:build --sites fc9") == 2
    assert "no site is called 'fc9'" in capsys.readouterr().err


@pytest.mark.usefixtures("net")
def test_the_command_measures_a_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("spectrum sigma_net.py:build --from 1 --to 2") == 0
    text = capsys.readouterr().out
    assert "1 to 2" in text
    assert "0 · linear" not in text
    assert run("spectrum sigma_net.py:build --from 2 --to 1") == 2
    assert "exchange the two" in capsys.readouterr().err


@pytest.mark.usefixtures("net")
def test_the_command_draws_pictures_that_need_no_other_file() -> None:
    pytest.importorskip("matplotlib")
    assert run("spectrum sigma_net.py:build --format svg -o a.svg") == 0
    picture = ElementTree.parse("a.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert [child.tag for child in picture] == [picture.tag] * 2, "along the depth, and the density"
    written = Path("a.svg").read_text(encoding="utf-8")
    assert all(said in written for said in ("largest", "RMS", "geometric mean", "share of them per decade"))
    assert run("spectrum sigma_net.py:build --format html -o a.html") == 0
    page = Path("a.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "end to end" in page
    assert not any(outside in page for outside in ("<script", 'src="http', "<link"))


def test_names_of_the_user_are_escaped_in_html() -> None:
    pytest.importorskip("matplotlib")
    model = nn.Sequential(OrderedDict({"<b>$x": nn.Linear(4, 4), "act": nn.Tanh()}))
    page = isograd.spectrum(model, probe(torch.randn(2, 4))).to_html()
    assert "<b>$x" not in page
    assert "&lt;b&gt;$x" in page


@pytest.mark.usefixtures("net")
def test_an_interrupt_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = singular.estimate
    calls: list[int] = []

    def interrupted(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(*args)  # pyright: ignore

    monkeypatch.setattr(sys.modules["isograd.spectrum"], "estimate", interrupted)
    assert run("spectrum sigma_net.py:build --format json") == 130
    report = json.loads(capsys.readouterr().out)
    assert len(report["segments"]) == 2
    assert report["end_to_end"] is None
    assert report["notes"] == ["interrupted before the end"]
