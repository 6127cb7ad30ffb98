"""Expected beside measured: networks of many kinds, drawn at random, against what theory says of them."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import isograd
from gallery.nets import HE, mlp
from gallery.theory.measured import DIGITS, LABELS, NETWORKS, TOKENS, classifying, drawn
from isograd.flow import Flow
from isograd.statistics import Parameter, Site
from isograd.symptoms.vanishing_gradient import examine
from isograd.theory.network import Part


def part_of(flow: Flow) -> Part:
    part = flow.expected.over(slice(1, len(flow.sites)))
    assert part is not None
    return part


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_expected_is_what_is_drawn(name: str) -> None:
    parts = drawn(name, 6)
    assert all(part.whole for part in parts)
    missed = [part.measured - part.decades for part in parts]
    spread = statistics.mean(part.spread for part in parts)
    # Six draws; 0.04 for what is left out: higher orders in 1/width, samples that share their weights.
    assert abs(statistics.mean(missed)) < 3 * spread / math.sqrt(6) + 0.04
    assert statistics.pstdev(missed) < 2 * spread + 0.02


def test_transformers_of_the_library_are_seen_through() -> None:
    import transformers

    config = transformers.GPT2Config(n_layer=3, n_embd=64, n_head=4, vocab_size=64)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).train()
    part = part_of(isograd.measure(model, lambda m: m(input_ids=TOKENS, labels=TOKENS).loss))
    assert part.whole
    assert part.measured == pytest.approx(part.decades, abs=4 * part.spread)
    assert part.layers == 7


class Gated(nn.Module):
    """A gate that theory has no word for, between layers that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.gate, self.value, self.above = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.below(x)
        return self.above(torch.sigmoid(self.gate(h)) * self.value(h))


def test_where_theory_has_no_word_nothing_is_expected() -> None:
    torch.manual_seed(0)
    flow = isograd.measure(Gated(), lambda m: (m(DIGITS) * DIGITS).sum())
    expected = dict(zip((site.name for site in flow.sites), flow.expected.decades, strict=True))
    assert math.isfinite(expected["below · linear"])
    assert math.isfinite(expected["above · linear"])
    assert math.isnan(next(v for name, v in expected.items() if "mul" in name))
    assert not part_of(flow).whole


def test_weights_that_are_no_draws_are_not_taken_for_any() -> None:
    torch.manual_seed(0)
    model = mlp(nn.ReLU, 4, 64, HE)
    nn.init.constant_(model[4].weight, 0.05)
    flow = isograd.measure(model, lambda m: functional.cross_entropy(m(DIGITS.abs()), LABELS))
    expected = dict(zip((site.name for site in flow.sites), flow.expected.decades, strict=True))
    assert math.isnan(expected["4 · linear"])
    assert math.isfinite(expected["6 · linear"])


def test_recurrent_kernels_and_towers_expect_nothing() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(64, 64, batch_first=True)
    flow = isograd.measure(lstm, lambda m: m(DIGITS[:, None].repeat(1, 5, 1))[0].square().sum())
    assert flow.expected.over(slice(1, len(flow.sites))) is None


def test_the_expectation_neither_draws_nor_changes_anything() -> None:
    torch.manual_seed(0)
    flow = isograd.measure(mlp(nn.Tanh, 4, 64, None), classifying)
    state = torch.get_rng_state()
    first = flow.expected.decades
    assert torch.equal(torch.get_rng_state(), state)
    assert replace(flow).expected.decades == pytest.approx(first, nan_ok=True)


def test_a_narrow_critical_network_is_not_sick_for_its_luck() -> None:
    """Of 32-unit networks at the critical point that theory expects to keep their gradient, none is an error."""
    for seed in range(30):
        torch.manual_seed(seed)
        flow = isograd.measure(mlp(nn.ReLU, 40, 32, HE), classifying)
        (outcome,) = examine(flow)
        assert getattr(outcome, "severity", 0) < isograd.Severity.ERROR, (seed, flow.lost)


def test_the_evidence_carries_what_was_expected() -> None:
    torch.manual_seed(0)
    (finding,) = isograd.check(mlp(nn.Sigmoid, 20, 64, None), classifying, select=["VG101"]).findings
    evidence = finding.evidence
    assert float(evidence["decades"]) == pytest.approx(
        float(evidence["expected"]), abs=4 * float(evidence["expected_spread"])
    )


def test_a_padded_convolution_counts_the_taps_that_lie_on_its_input() -> None:
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
    flow = isograd.measure(
        nn.Sequential(conv, nn.Flatten(), nn.Linear(16 * 16, 10)),
        lambda m: functional.cross_entropy(m(torch.randn(4, 8, 8, 8)), LABELS[:4]),
    )
    response = flow.expected.responses[1]
    assert response is not None
    inside = torch.ones(1, 1, 8, 8)
    seen = functional.conv2d(inside, torch.ones(1, 1, 3, 3), stride=2, padding=1).mean() / 9
    scale = 72 * conv.weight.detach().square().mean()
    assert response.chi == pytest.approx(float(scale * seen), rel=1e-5)


def test_a_flow_without_its_parameters_expects_nothing() -> None:
    sites = tuple(
        Site(str(i), kind, kind, str(i), "", (4, 8), "float32", i)
        for i, kind in enumerate(("input", "linear"))
    )
    column = torch.tensor([math.nan, 0.1], dtype=torch.float64)
    columns = {"decades": column, "activation_rms": torch.ones(2), "weighted": torch.tensor([0.0, 1.0])}
    parameter = Parameter("w", (8, 8), "measured", 0.0, 1.0, 0.0, 0, 1.0, fan_in=8)
    assert Flow(sites, columns, parameters=(parameter,)).expected.over(slice(1, 2)) is None


def test_relu6_under_the_name_of_hardtanh() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(64, 64), nn.ReLU6())), nn.Linear(64, 1))
    x = torch.randn(32, 64)
    flow = isograd.measure(model, lambda m: m(x).square().mean())
    assert flow.activations[0].function == "relu6"
    assert isograd.diagnose(flow).flow.expected is not None
