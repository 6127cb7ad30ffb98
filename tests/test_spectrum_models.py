"""Singular values of the models people use: architectures from their configuration, and what bends a graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import isograd
from isograd.spectra import singular
from isograd.spectrum import Spectrum

Loss = Callable[[nn.Module], Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def projected(call: Callable[[nn.Module], Tensor]) -> Loss:
    """A loss whose gradient at the output is a fixed random one."""

    def loss(model: nn.Module) -> Tensor:
        out = call(model)
        return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum()

    return loss


def on(x: Tensor) -> Loss:
    return projected(lambda model: model(x))


def measured(model: nn.Module, loss: Loss, sites: list[str] | None = None) -> Spectrum:
    found = isograd.spectrum(model, loss, sites=sites, tolerance=1e-6)
    assert found.end_to_end is not None
    return found


def agree(a: Spectrum, b: Spectrum, rel: float = 1e-4) -> None:
    assert len(a.examined) == len(b.examined) > 1
    for one, other in zip(a.examined, b.examined, strict=True):
        assert one.unexamined == other.unexamined == ""
        assert one.sigma_max == pytest.approx(other.sigma_max, rel=rel), one.site.name
        assert one.gain == pytest.approx(other.gain, rel=rel), one.site.name


# -- architectures -------------------------------------------------------------------------------------

TINY = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 2}


def transformers_model(name: str) -> tuple[nn.Module, Loss]:
    hf = pytest.importorskip("transformers")
    ids = torch.randint(40, (2, 6), generator=torch.Generator().manual_seed(0))
    image = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    match name:
        case "gpt2":
            model = hf.GPT2Model(hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=8))
        case "llama":
            model = hf.LlamaModel(hf.LlamaConfig(**TINY, vocab_size=40, num_key_value_heads=1))
        case "bert":
            model = hf.BertModel(hf.BertConfig(**TINY, vocab_size=40), add_pooling_layer=False)
        case "vit":
            model = hf.ViTModel(hf.ViTConfig(**TINY, **IMAGE), add_pooling_layer=False)
        case _:
            model = hf.ResNetModel(
                hf.ResNetConfig(num_channels=2, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
            )
    given = image if name in ("vit", "resnet") else ids
    return model, projected(lambda m: m(given).last_hidden_state)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "resnet"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_architectures_from_their_configuration(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout and BatchNorm in train mode: the same seed keeps the same mask in both methods."""
    model, loss = transformers_model(name)
    model.train(mode == "train")
    state = torch.get_rng_state()
    exact = measured(model, loss)
    assert torch.equal(state, torch.get_rng_state())
    assert len(exact.segments) >= 4
    assert all(s.unexamined == "" and s.gain <= s.sigma_max * 1.0001 for s in exact.segments)
    monkeypatch.setattr(singular, "LARGEST_DENSE", 0)
    iterated = measured(model, loss, sites=[]).end_to_end
    assert exact.end_to_end is not None
    assert iterated is not None
    assert iterated.method == "golub-kahan"
    assert iterated.sigma_max == pytest.approx(exact.end_to_end.sigma_max, rel=1e-4)
    assert abs(iterated.sigma_rms / exact.end_to_end.sigma_rms - 1) <= 4 * iterated.rms_error + 1e-4
    dropped = mode == "train" and name in ("gpt2", "bert")
    assert any("dropout kept the mask" in note for note in exact.notes) is dropped


# -- what bends a graph --------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Residual blocks, each of which may be recomputed in the backward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 24), nn.GELU(), nn.Dropout(0.2), nn.Linear(24, 12))
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (
                block(x)
                if self.how == "kept"
                else checkpoint(block, x, use_reentrant=self.how == "reentrant")
            )
        return x


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("largest_dense", [0, 512])
def test_recomputed_activations_change_nothing(
    how: str, largest_dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(singular, "LARGEST_DENSE", largest_dense)
    kept = Blocks("kept")
    recomputed = copy.deepcopy(kept)
    recomputed.how = how
    x = torch.randn(3, 12)
    torch.manual_seed(7)
    expected = measured(kept, on(x))
    torch.manual_seed(7)
    agree(expected, measured(recomputed, on(x)))


def test_activations_in_place_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(singular, "LARGEST_DENSE", 0)

    def build(inplace: bool) -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.ReLU(inplace), nn.Conv2d(6, 6, 3), nn.SiLU(inplace), nn.Conv2d(6, 3, 3)
        )

    x = torch.randn(2, 2, 9, 9)
    agree(measured(build(True), on(x)), measured(build(False), on(x)))


def test_a_compiled_model_is_unwrapped_and_that_is_said() -> None:
    model, x = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 6)), torch.randn(3, 10)
    found = measured(torch.compile(model), on(x))  # pyright: ignore[reportArgumentType]
    assert any("torch.compile" in note for note in found.notes)
    agree(found, measured(model, on(x)))


class Recurrence(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: bool | int) -> None:
        super().__init__()
        self.rnn = kind(6, 5, **options)
        self.head = nn.Linear(self.rnn.hidden_size * (1 + self.rnn.bidirectional), 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}])
def test_recurrences(
    kind: type[nn.RNNBase], options: dict[str, bool | int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Recurrence(kind, **options), torch.randn(7, 3, 6)
    exact = measured(model, on(x))
    enabled = torch.backends.cudnn.enabled
    monkeypatch.setattr(singular, "LARGEST_DENSE", 0)
    agree(exact, measured(model, on(x)))
    assert torch.backends.cudnn.enabled is enabled


def test_a_frozen_model_has_a_jacobian_too() -> None:
    model, x = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 6)), torch.randn(3, 10)
    before = measured(model, on(x))
    agree(before, measured(model.requires_grad_(False), on(x)))


# -- ranges --------------------------------------------------------------------------------------------


def sigmoids(layers: int, width: int) -> nn.Sequential:
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width, bias=False), nn.Sigmoid())]
    for linear in parts[::2]:
        nn.init.normal_(linear.weight, 0, width**-0.5)  # pyright: ignore[reportArgumentType]
    return nn.Sequential(*parts)


@pytest.mark.parametrize("largest_dense", [0, 512])
def test_a_range_is_the_product_of_its_segments_in_log_space(
    largest_dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(singular, "LARGEST_DENSE", largest_dense)
    width, model = 8, sigmoids(60, 8)
    x = torch.randn(1, width)
    found = isograd.spectrum(model, on(x), start="10", end="99", sites=["50"], tolerance=1e-6)
    assert found.whole == "10 to 99"
    assert [s.site.module for s in found.segments] == ["50"]
    hidden, product, scale = x.double(), torch.eye(width, dtype=torch.float64), 0.0
    for i, part in enumerate(copy.deepcopy(model).double()):
        out = part(hidden).detach()
        if 10 <= i <= 99:
            step = part.weight.detach() if isinstance(part, nn.Linear) else torch.diag((out * (1 - out))[0])
            product = step @ product
            scale += math.log10(float(product.norm()))
            product = product / product.norm()
        hidden = out
    values = torch.linalg.svdvals(product)
    assert found.end_to_end is not None
    assert found.end_to_end.log10_sigma_max == pytest.approx(float(values[0].log10()) + scale, abs=1e-3)
    assert found.end_to_end.log10_sigma_max < -25


def test_a_range_backwards_or_unknown_is_refused() -> None:
    model, loss = sigmoids(3, 4), on(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"'4' comes after '1' in the forward pass"):
        isograd.spectrum(model, loss, start="4", end="1")
    with pytest.raises(ValueError, match=r"no site is called 'h.9'; there are, from the input, '0 · linear'"):
        isograd.spectrum(model, loss, end="h.9")
    assert len(isograd.spectrum(model, loss, start="2", end="2").segments) == 1
    assert isograd.spectrum(model, loss, sites=[]).segments == ()


# -- laws ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 4])
def test_the_product_of_gaussian_matrices_has_its_closed_forms(layers: int) -> None:
    """E log|det W| = sum of digammas, E ||J||_F^2 / n = 1, and tr (JJ')^2 / n -> L + 1 (Fuss-Catalan)."""
    width = 256
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).double()
    for linear in model:
        nn.init.normal_(linear.weight, 0, width**-0.5)  # pyright: ignore[reportArgumentType]
    found = measured(model, on(torch.randn(1, width, dtype=torch.float64))).end_to_end
    assert found is not None
    degrees = torch.arange(1, width + 1, dtype=torch.float64) / 2
    expected = float((torch.digamma(degrees) + math.log(2 / width)).sum()) * layers / (2 * width)
    variance = float(torch.polygamma(1, degrees).sum()) * layers / (2 * width) ** 2
    assert abs(found.log10_sigma_mean * math.log(10) - expected) < 4 * math.sqrt(variance)
    # Var log ||J'u||^2 is about 2 L / width for one u; over all u it is smaller still.
    assert abs(2 * math.log(found.sigma_rms)) < 3 * math.sqrt(2 * layers / width)
    edge = math.sqrt((layers + 1) ** (layers + 1) / layers**layers)
    assert found.sigma_max == pytest.approx(edge, rel=0.1)


@pytest.mark.parametrize("shape", [(200, 200), (160, 240), (240, 160)])
def test_the_distribution_agrees_with_the_dense_one(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, outputs = shape
    model = nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh(), nn.LayerNorm(outputs))
    loss = on(torch.randn(2, inputs))
    exact = isograd.spectrum(model, loss, sites=["0"]).end_to_end
    monkeypatch.setattr(singular, "LARGEST_DENSE", 0)
    found = isograd.spectrum(model, loss, sites=["0"]).end_to_end
    assert exact is not None
    assert found is not None
    true, ours = exact.distribution, found.distribution
    assert true is not None
    assert ours is not None
    assert true.error == true.log10_mean_error == 0
    assert ours.zero is None
    known = [q for q in ours.quantiles if not math.isnan(q)]
    assert len(known) > 32
    grid, levels = torch.tensor(true.quantiles), (torch.arange(64) + 0.5) / 64
    for q, level in zip(ours.quantiles, levels.tolist(), strict=True):
        if not math.isnan(q):
            reached = float((grid <= q).float().mean())
            assert abs(reached - level) <= ours.error + 1 / 64
    if not math.isnan(ours.log10_mean):
        assert abs(ours.log10_mean - true.log10_mean) <= 3 * ours.log10_mean_error


def test_an_iteration_does_not_tell_the_smallest_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(128, 128), nn.ReLU())))
    monkeypatch.setattr(singular, "LARGEST_DENSE", 0)
    found = isograd.spectrum(model, on(torch.randn(1, 128)), sites=["0"]).end_to_end
    assert found is not None
    assert found.sigma_min is found.condition is None
    assert math.isnan(found.log10_sigma_mean), "the lower half of the spectrum is one Lanczos node"
    assert found.distribution is not None
    assert math.isnan(found.distribution.quantiles[0])
    assert not math.isnan(found.distribution.quantiles[-1])


def test_the_error_of_the_mean_logarithm_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = nn.Sequential(nn.Linear(60, 90)), on(torch.randn(1, 60))
    exact = isograd.spectrum(model, loss).segments[0].log10_sigma_mean
    monkeypatch.setattr(singular, "LARGEST_DENSE", 0)
    distances: list[float] = []
    for seed in range(10):
        (found,) = isograd.spectrum(model, loss, seed=seed).segments
        assert found.distribution is not None
        distances.append((found.log10_sigma_mean - exact) / found.distribution.log10_mean_error)
    assert max(map(abs, distances)) < 3
    assert 0.3 < (sum(d * d for d in distances) / 10) ** 0.5 < 1.4


def test_training_turns_the_gradient_towards_the_large_directions() -> None:
    model = nn.Sequential(
        *(part for _ in range(6) for part in (nn.Linear(64, 64), nn.Tanh())), nn.Linear(64, 4)
    )
    x, y = torch.randn(128, 64), torch.randint(4, (128,))

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(x), y)

    def alignment() -> float:
        """Mean over the layers of log10(gain / RMS)."""
        found = isograd.spectrum(model, loss).segments
        return sum(math.log10(s.alignment) for s in found) / len(found)

    before = alignment()
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for _ in range(20):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert abs(before) < 0.02
    assert alignment() > 0.04
