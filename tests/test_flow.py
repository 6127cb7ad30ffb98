"""What a flow says of itself: sums, layers and hidden sites, from flows made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isograd.flow import Flow
from isograd.statistics import Parameter, Site

NAN = math.nan


def flow_of(
    rows: Sequence[tuple[str, int, float]], *, rms: Sequence[float] = (), layers: int | None = None
) -> Flow:
    """A flow of (kind, width, decades) rows, input first; layers are the linear, convolution and recurrent ones."""
    shapes = [(8, width, 4, 4) if kind == "convolution" else (8, width) for kind, width, _ in rows]
    sites = tuple(
        Site(f"{i} · {kind}", kind, kind, str(i), "", shape, "float32", i)
        for i, ((kind, _, _), shape) in enumerate(zip(rows, shapes, strict=True))
    )
    weighted = [float(kind in ("linear", "convolution", "recurrent")) for kind, _, _ in rows]
    columns = {"decades": [d for *_, d in rows], "weighted": weighted}
    if rms:
        columns["activation_rms"] = list(rms)
    return Flow(
        sites,
        {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()},
        layers=int(sum(weighted)) if layers is None else layers,
    )


CHAIN = flow_of(
    [
        ("input", 64, NAN),
        ("linear", 16, -0.25),
        ("activation", 16, -0.5),
        ("linear", 16, -0.25),
        ("activation", 16, -0.5),
        ("linear", 16, -0.25),
        ("activation", 16, -0.5),
        ("linear", 4, -1.0),
        ("loss", 4, NAN),
    ],
    rms=[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, NAN],
)
"""Three hidden layers between an input layer and a head that change the width."""


def test_decades_and_sigma_are_the_sum_and_its_geometric_mean() -> None:
    assert CHAIN.decades == pytest.approx(-3.25)
    assert CHAIN.sigma == pytest.approx(10 ** (-3.25 / 4))


def test_what_was_not_measured_is_nan_and_never_zero() -> None:
    empty = flow_of([("input", 4, NAN), ("loss", 4, NAN)])
    assert empty.column("activation_rms").isnan().tolist() == [True, True]
    told = (empty.decades, empty.sigma, empty.lost, empty.growth, empty.typical)
    assert all(math.isnan(value) for value in told)
    assert empty.decades_by_layer.tolist() == []


def test_the_input_layer_and_the_head_are_left_out_where_they_change_the_width() -> None:
    assert [site.name for site in CHAIN.sites[CHAIN.hidden]] == [
        "2 · activation",
        "3 · linear",
        "4 · activation",
        "5 · linear",
        "6 · activation",
    ]
    assert CHAIN.lost == pytest.approx(-2.0)
    assert CHAIN.growth == pytest.approx(math.log10(64 / 4))


def test_layers_that_keep_the_width_are_all_hidden() -> None:
    flow = flow_of([("input", 16, NAN), ("linear", 16, -1.0), ("activation", 16, 0.0), ("linear", 16, -1.0)])
    assert flow.hidden == slice(1, 4)
    assert flow.lost == flow.decades == -2.0


def test_of_a_convolution_the_channels_are_the_width() -> None:
    flow = flow_of([("convolution", 8, NAN), ("convolution", 8, -1.0), ("convolution", 4, -1.0)])
    assert flow.hidden == slice(1, 2)


def test_without_a_layer_everything_behind_the_input_is_hidden() -> None:
    flow = flow_of([("input", 4, NAN), ("activation", 4, -1.0), ("elementwise", 4, -0.5)])
    assert flow.hidden == slice(1, 3)
    assert flow.lost == -1.5
    assert math.isnan(flow.sigma)
    assert math.isnan(flow.typical)


def test_a_factor_moved_into_the_input_layer_is_no_loss() -> None:
    """W_1 * c and W_2 / c compute the same: the hidden sites lose what the input layer gains."""
    flow = flow_of([("input", 64, NAN), ("linear", 16, 4.0), ("activation", 16, 0.0), ("linear", 16, -4.0), ("linear", 4, 0.0)])  # fmt: skip
    assert flow.lost == 0.0
    assert flow.lost_over == flow.layers == 3


def test_a_small_head_is_no_vanishing_gradient() -> None:
    flow = flow_of([("input", 64, NAN), ("linear", 16, 0.0), ("linear", 16, -0.5), ("linear", 4, -6.0)])
    assert flow.lost == -0.5
    assert flow.lost_over == 1
    assert flow.decades == -6.5


def test_a_gradient_that_is_exactly_zero_is_infinitely_lost() -> None:
    flow = flow_of(
        [("input", 16, NAN), ("linear", 16, -math.inf), ("activation", 16, -1.0), ("linear", 16, -1.0)]
    )
    assert flow.decades == flow.lost == -math.inf


def test_a_fused_recurrent_kernel_is_not_counted_as_depth() -> None:
    flow = flow_of([("input", 16, NAN), ("linear", 16, -1.0), ("recurrent", 16, -5.0), ("linear", 16, -1.0)])
    assert flow.lost == -2.0
    assert flow.decades == -7.0


def test_decades_by_layer_go_from_one_layer_to_the_next() -> None:
    flow = flow_of(
        [
            ("input", 16, NAN),
            ("activation", 16, -0.125),
            ("linear", 16, -0.25),
            ("activation", 16, -0.5),
            ("linear", 16, -1.0),
            ("normalisation", 16, 2.0),
            ("activation", 16, NAN),
            ("linear", 16, 0.25),
        ]
    )
    assert flow.decades_by_layer.tolist() == [-0.125 - 0.25 - 0.5, -1.0 + 2.0, 0.25]


def test_the_typical_layer_tells_exponential_growth_from_one_step() -> None:
    even = flow_of([("input", 16, NAN)] + [("linear", 16, 0.5)] * 9)
    one = flow_of([("input", 16, NAN)] + [("linear", 16, 0.0)] * 8 + [("linear", 16, 4.5)])
    assert even.lost == one.lost == 4.5
    assert even.typical == 4.5
    assert one.typical == 0.0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["linear", "activation", "residual add"]), st.floats(-5, 5)), min_size=1
    )
)
def test_layers_share_out_all_decades_of_the_hidden_sites(rows: list[tuple[str, float]]) -> None:
    flow = flow_of([("input", 16, NAN), *((kind, 16, d) for kind, d in rows), ("linear", 16, 0.0)])
    total = math.fsum(d for _, d in rows)
    assert math.fsum(flow.decades_by_layer.tolist()) == pytest.approx(total, abs=1e-9)
    assert flow.lost == pytest.approx(total, abs=1e-9)  # nothing here changes the width


@pytest.mark.parametrize("function", ["relu", "linear"])
def test_the_spread_is_that_of_critical_networks(function: str) -> None:
    """log10 of the gradient norm over 300 draws, with a sum of 5/width for ReLU and 2/width without."""
    layers, width, draws = 20, 32, 300
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rectified = function == "relu"
    x, g, logs = drawn(draws, width), drawn(draws, width), torch.zeros(draws, dtype=torch.float64)
    g /= g.norm(dim=1, keepdim=True)
    jacobians: list[Tensor] = []
    for _ in range(layers):
        w = drawn(draws, width, width) * ((2 if rectified else 1) / width) ** 0.5
        x = torch.einsum("dij,dj->di", w, x)
        slope = (x > 0).double() if rectified else torch.ones_like(x)
        x = x * slope
        jacobians.append(slope.unsqueeze(2) * w)
    for jacobian in reversed(jacobians):
        g = torch.einsum("dij,di->dj", jacobian, g)
        logs += g.norm(dim=1).log10()
        g /= g.norm(dim=1, keepdim=True)

    layer = [("linear", width, 0.0), (function, width, 0.0)]
    flow = flow_of([("input", width, NAN)] + (layer if rectified else layer[:1]) * layers)
    assert float(logs.std()) == pytest.approx(flow.spread, rel=0.15)


def test_a_place_is_a_name_and_a_line() -> None:
    site = Site("h.3 · residual add", "residual add", "add", "h.3", "gpt.py:112", (2, 4), "float32", 3)
    assert site.place == "h.3 · residual add · gpt.py:112"
    assert Site("input", "input", "input", "", "", (2, 4), "float32", 0).place == "input"


def test_the_ratio_of_a_parameter_is_gradient_over_weight() -> None:
    def parameter(log: float, norm: float) -> Parameter:
        return Parameter(
            name="w",
            shape=(2, 2),
            state="measured",
            grad_norm_log10=log,
            weight_norm=norm,
            zeros=0.0,
            nonfinite=0,
            depth=1.0,
        )

    assert parameter(-3.0, 100.0).ratio_log10 == pytest.approx(-5.0)
    assert parameter(-math.inf, 1.0).ratio_log10 == -math.inf
    assert math.isnan(parameter(-3.0, 0.0).ratio_log10)
