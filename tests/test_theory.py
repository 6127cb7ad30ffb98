"""Theory against closed forms, published numbers, and random networks drawn and differentiated."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gallery.theory.simulation import dense, simulate
from isograd import theory
from isograd.theory.quadrature import activation

# ---- Averages ---------------------------------------------------------------------------------


CLOSED_FORMS = {
    "relu": (lambda q: q / 2, lambda q: 0.5),
    "erf": (
        lambda q: 2 / math.pi * math.asin(2 * q / (1 + 2 * q)),
        lambda q: 4 / math.pi / math.sqrt(1 + 4 * q),
    ),
    "sin": (lambda q: (1 - math.exp(-2 * q)) / 2, lambda q: (1 + math.exp(-2 * q)) / 2),
    "linear": (lambda q: q, lambda q: 1.0),
}


@pytest.mark.parametrize("phi", CLOSED_FORMS)
@pytest.mark.parametrize("q", [1e-8, 0.01, 1.0, 45.6, 1e4, 1e12])
def test_averages_meet_closed_forms(phi: str, q: float) -> None:
    if (phi == "sin" and q > 100) or (phi == "erf" and q > 1e4):
        pytest.skip("too many periods for an activation; the closed form itself is rounded")
    square, slope = (f(q) for f in CLOSED_FORMS[phi])
    m = theory.moments(phi, q)
    assert m.square == pytest.approx(square, rel=1e-12)
    assert m.slope_square == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize("phi", sorted(theory.NAMES))
@pytest.mark.parametrize("q", [0.05, 1.0, 7.0])
def test_averages_meet_a_plain_sum_over_a_fine_grid(phi: str, q: float) -> None:
    z = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 200_000 * 12 - 12
    x = (math.sqrt(q) * z).requires_grad_()
    value = theory.NAMES[phi](x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    weight = torch.exp(-z * z / 2) * (12 / 200_000) / math.sqrt(2 * math.pi)
    m = theory.moments(phi, q)
    for got, integrand in [
        (m.mean, value),
        (m.square, value**2),
        (m.fourth, value**4),
        (m.slope_square, slope**2),
        (m.slope_fourth, slope**4),
        (m.joint, value**2 * slope**2),
    ]:
        if integrand.abs().max() * math.exp(-72) < 1e-12:  # the grid ends at 12 standard deviations
            assert got == pytest.approx(float((weight * integrand).sum().detach()), rel=4e-4, abs=1e-9)


@pytest.mark.parametrize("phi", sorted(theory.NAMES))
def test_growths_are_the_derivatives_in_log_q(phi: str) -> None:
    h = 1e-4
    below, at, above = (theory.moments(phi, math.exp(d)) for d in (-h, 0.0, h))
    for growth, name in [
        ("mean_growth", "mean"),
        ("square_growth", "square"),
        ("slope_growth", "slope_square"),
    ]:
        difference = (getattr(above, name) - getattr(below, name)) / (2 * h)
        assert getattr(at, growth) == pytest.approx(difference, abs=1e-6 * (1 + abs(difference)))


@settings(max_examples=30, deadline=None)
@given(c=st.floats(0.1, 10), q=st.floats(0.01, 20))
def test_averages_follow_the_scales(c: float, q: float) -> None:
    plain, stretched = theory.moments("gelu", c * c * q), theory.moments(lambda x: F.gelu(c * x), q)
    assert stretched.square == pytest.approx(plain.square, rel=1e-10)
    assert stretched.slope_square == pytest.approx(c * c * plain.slope_square, rel=1e-10)


@pytest.mark.parametrize(
    "phi",
    [
        torch.nn.PReLU(init=0.1),
        torch.nn.LeakyReLU(0.1, inplace=True),
        lambda x: torch.where(x > 0, x, 0.1 * x),
    ],
    ids=["module with a parameter", "in place", "function"],
)
def test_any_callable_is_an_activation(phi: theory.Phi) -> None:
    assert theory.moments(phi, 3.0).square == pytest.approx(3.0 * (1 + 0.01) / 2, rel=1e-7)


def test_a_trained_module_is_read_anew() -> None:
    phi = torch.nn.PReLU(init=0.0)
    assert theory.moments(phi, 1.0).square == pytest.approx(0.5)
    torch.nn.init.constant_(phi.weight, 1.0)
    assert theory.moments(phi, 1.0).square == pytest.approx(1.0)


@pytest.mark.parametrize("kink", [0.37, -2.123456, 150.0])
def test_kinks_are_found_where_nobody_told(kink: float) -> None:
    # E max(x, k) - k for x ~ N(0, q): q^1/2 density(k / q^1/2) - k (1 - cdf)
    q = kink * kink
    z = math.copysign(1.0, kink)
    expected = (
        math.sqrt(q) * (math.exp(-z * z / 2) / math.sqrt(2 * math.pi))
        - kink * math.erfc(z / math.sqrt(2)) / 2
    )
    m = theory.moments(lambda x: F.relu(x - kink), q)
    assert m.mean == pytest.approx(expected, rel=1e-12)
    assert m.slope_square == pytest.approx(math.erfc(z / math.sqrt(2)) / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("phi", "message"),
    [
        ("rellu", "did you mean relu"),
        ("banana", "the names are"),
        (lambda x: torch.softmax(x, 0), "not elementwise"),
        (lambda x: F.dropout(x, 0.5), "not elementwise and deterministic"),
        (lambda x: (x > 0).double(), "no derivative that autograd knows"),
        (lambda x: x.sign() * x.abs().sqrt(), "do not converge"),
    ],
)
def test_what_is_no_activation_is_refused(phi: theory.Phi, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        theory.moments(phi, 1.0)


@pytest.mark.parametrize("q", [0.0, -1.0, math.inf, math.nan])
def test_a_variance_is_positive_and_finite(q: float) -> None:
    with pytest.raises(ValueError, match="variance"):
        theory.moments("relu", q)


def test_inference_mode_and_other_defaults_change_nothing() -> None:
    theory.moments("tanh", 1.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            assert theory.moments("tanh", 1.000001).square == pytest.approx(0.394294, abs=2e-6)
    finally:
        torch.set_default_dtype(torch.float32)


# ---- The published tables ---------------------------------------------------------------------

# E phi^2, E phi'^2, forward gain, centred gain, backward gain at q = 1; sigma_b^2 and chi_q of the critical point there.
AT_ONE = {
    "sigmoid": (0.293379, 0.044836, 1.846229, 4.801313, 4.722646, None, None),
    "tanh": (0.394294, 0.464403, 1.592537, 1.592537, 1.467414, 0.150965, 0.39),
    "relu": (0.500000, 0.500000, 1.414214, 1.712859, 1.414214, 0.0, 1.0),
    "leaky_relu": (0.500050, 0.500050, 1.414143, 1.704832, 1.414143, 0.0, 1.0),
    "elu": (0.644945, 0.668102, 1.245198, 1.270843, 1.223429, 0.034660, 0.86),
    "selu": (1.000000, 1.071575, 1.000000, 1.000000, 0.966026, 0.066794, 0.73),
    "gelu": (0.425221, 0.455851, 1.533530, 1.700926, 1.481114, 0.067192, 1.067),
    "silu": (0.355776, 0.379482, 1.676532, 1.787187, 1.623320, 0.062472, 1.099),
    "softplus": (0.921246, 0.293379, 1.041867, 1.919126, 1.846229, None, None),
    "mish": (0.452342, 0.479084, 1.486848, 1.592025, 1.444755, 0.055818, 1.016),
    "hardtanh": (0.516059, 0.682689, 1.392036, 1.392036, 1.210287, 0.244080, 0.29),
    "hardswish": (0.331567, 0.358532, 1.736657, 1.813871, 1.670076, 0.075207, 1.132),
}


@pytest.mark.parametrize("phi", AT_ONE)
def test_moments_and_gains_at_one(phi: str) -> None:
    square, slope, forward, centred, backward, sigma_b2, chi_q = AT_ONE[phi]
    m = theory.moments(phi, 1.0)
    got = (m.square, m.slope_square, m.forward_gain, m.centred_gain, m.backward_gain)
    assert got == pytest.approx((square, slope, forward, centred, backward), abs=5.1e-7)
    if sigma_b2 is None or chi_q is None:
        with pytest.raises(ValueError, match="sigma_b\\^2 would have to be -"):
            theory.critical(phi, 1.0)
        return
    point = theory.critical(phi, 1.0)
    assert point.sigma_w == pytest.approx(backward, abs=5.1e-7)
    assert point.sigma_b2 == pytest.approx(sigma_b2, abs=5.1e-7)
    assert point.chi_q == pytest.approx(chi_q, abs=5.1e-3 if chi_q < 1 else 5.1e-4)
    assert (point.kind == "unstable") == (phi in {"gelu", "silu", "mish", "hardswish"})


CRITICAL = {
    "sigmoid": (10.149264, 0.0, 45.624278, "stable"),
    "tanh": (1.0, 0.0, 0.0, "drifting"),
    "relu": (1.414214, 0.0, math.nan, "scale-invariant"),
    "leaky_relu": (1.414143, 0.0, math.nan, "scale-invariant"),
    "elu": (1.223429, 0.034660, 1.0, "stable"),
    "selu": (0.966026, 0.066794, 1.0, "stable"),
    "gelu": (1.408211, 0.17292239, 3.56155281, "half-stable"),
    "gelu_tanh": (1.408151, 0.17289520, 3.55677284, "half-stable"),
    "silu": (1.409966, 0.55514317, 14.32017362, "half-stable"),
    "mish": (1.418987, 0.09452179, 1.67016913, "half-stable"),
    "hardtanh": (1.0, 0.0, 0.0, "drifting"),
    "hardswish": (1.404738, 0.50714585, 4.80385595, "half-stable"),
}


@pytest.mark.parametrize("phi", CRITICAL)
def test_critical_points(phi: str) -> None:
    sigma_w, sigma_b2, q, kind = CRITICAL[phi]
    point = theory.critical(phi)
    assert point.kind == kind
    assert point.sigma_w == pytest.approx(sigma_w, abs=5.1e-7)
    digits = 5.1e-9 if kind == "half-stable" else 5.1e-7
    assert point.sigma_b2 == pytest.approx(sigma_b2, abs=digits)
    assert point.q == pytest.approx(q, abs=digits * max(q, 1), nan_ok=True)


@pytest.mark.parametrize(("slope", "sigma_w"), [(0.01, 1.414143), (0.2, 1.386750)])
def test_critical_leaky_relu_of_any_slope(slope: float, sigma_w: float) -> None:
    assert theory.critical(lambda x: F.leaky_relu(x, slope)).sigma_w == pytest.approx(sigma_w, abs=5.1e-7)


@pytest.mark.parametrize("phi", CRITICAL)
def test_a_critical_point_is_a_fixed_point_that_keeps_the_gradient(phi: str) -> None:
    point = theory.critical(phi)
    q = point.q if point.q > 0 else 1e-9
    q = 1.0 if math.isnan(q) else q
    m = theory.moments(phi, q)
    assert point.sigma_w**2 * m.square + point.sigma_b2 == pytest.approx(q, rel=1e-8)
    assert point.sigma_w**2 * m.slope_square == pytest.approx(1, abs=1e-8)


def test_softplus_has_no_critical_point_and_says_what_helps() -> None:
    with pytest.raises(
        ValueError, match=r"softplus has no critical .* at any q: centre the weights .* normalisation"
    ):
        theory.critical("softplus")
    point = theory.critical("softplus", centred=True)
    assert (point.sigma_b2, point.kind) == (pytest.approx(0.074527, abs=5.1e-7), "stable")


@pytest.mark.parametrize(
    ("phi", "sigma_b2"),
    [
        ("sigmoid", 0.032501),
        ("softplus", 0.074527),
        ("relu", 0.318310),
        ("gelu", 0.241761),
        ("silu", 0.174973),
    ],
)
def test_centred_weights_make_every_activation_critical_at_one(phi: str, sigma_b2: float) -> None:
    point = theory.critical(phi, 1.0, centred=True)
    assert point.sigma_b2 == pytest.approx(sigma_b2, abs=5.1e-7)
    assert point.kind == "stable"


def test_the_sigmoid_is_critical_at_4_only_when_centred() -> None:
    assert theory.critical(lambda x: torch.sigmoid(x) - 0.5).sigma_w == pytest.approx(4.0, rel=1e-12)
    assert theory.gain("sigmoid", sigma_w=4.0) == pytest.approx(0.632, abs=5e-4)


# gain per layer, and to the power 50 as printed; sigma_b2 = 0
INITIALISATIONS = [
    ("sigmoid", 1 / math.sqrt(3), 0.14145, 3e-43), ("sigmoid", 1.0, 0.23605, 4.5e-32),
    ("sigmoid", math.sqrt(2), 0.31777, 1e-25), ("sigmoid", 4.0, 0.63157, 1e-10),
    ("tanh", 1 / math.sqrt(3), 0.57735, 1e-12), ("tanh", 1.0, 1.0, 1),
    ("tanh", math.sqrt(2), 1.05144, 12), ("tanh", 5 / 3, 1.09992, 117),
    ("relu", 1 / math.sqrt(3), 0.40825, 3.5e-20), ("relu", 1.0, 0.70711, 3e-08),
    ("relu", math.sqrt(2), 1.0, 1),
    ("elu", 1 / math.sqrt(3), 0.57735, 1e-12), ("elu", 1.0, 1.0, 1),
    ("selu", 1 / math.sqrt(3), 0.83615, 1.3e-4), ("selu", 1.0, 1.03517, 5.6),
    ("selu", math.sqrt(2), 1.0507, 12), ("selu", 0.75, 1.00183, 1),
    ("gelu", 1 / math.sqrt(3), 0.28868, 1e-27), ("gelu", 1.0, 0.5, 9e-16), ("gelu", math.sqrt(2), 0.70711, 3e-08),
    ("silu", 1 / math.sqrt(3), 0.28868, 1e-27), ("silu", 1.0, 0.5, 9e-16), ("silu", math.sqrt(2), 0.70711, 3e-08),
    ("softplus", 1 / math.sqrt(3), 0.29479, 3e-27), ("softplus", 1.0, 0.53733, 3e-14),
    ("mish", 1 / math.sqrt(3), 0.34641, 9.5e-24), ("mish", 1.0, 0.6, 8e-12), ("mish", math.sqrt(2), 0.84853, 3e-04),
]  # fmt: skip


@pytest.mark.parametrize(("phi", "sigma_w", "gain", "power"), INITIALISATIONS)
def test_what_common_initialisations_do(phi: str, sigma_w: float, gain: float, power: float) -> None:
    point = theory.fixed_point(phi, sigma_w=sigma_w)
    assert point.gain == pytest.approx(gain, abs=6e-6)
    assert point.gain**50 == pytest.approx(power, rel=0.2)
    assert theory.chi(phi, sigma_w=sigma_w) == pytest.approx(point.gain**2)
    assert theory.depth_scale(phi, sigma_w=sigma_w) == pytest.approx(point.depth_scale)


@pytest.mark.parametrize(("phi", "gain_after_100"), [("elu", 1.02255), ("softplus", 0.93766)])
def test_under_kaiming_elu_and_softplus_have_no_finite_fixed_point(phi: str, gain_after_100: float) -> None:
    point = theory.fixed_point(phi, sigma_w=math.sqrt(2))
    assert (point.q, point.gain) == (math.inf, pytest.approx(1.0, abs=1e-9))
    chain = dense(phi, 101, 10**9, math.sqrt(2))
    assert math.sqrt(2) * theory.expected(chain, rms=1.0).steps[-2].gain == pytest.approx(
        gain_after_100, abs=6e-6
    )


def test_the_depth_scale() -> None:
    assert theory.depth_scale("sigmoid", sigma_w=1.0) == pytest.approx(
        1 / abs(math.log(0.236052**2)), rel=1e-5
    )
    assert theory.depth_scale("relu", sigma_w=math.sqrt(2)) == math.inf
    assert theory.depth_scale("tanh", sigma_w=5 / 3) == pytest.approx(1 / math.log(1.099923**2), rel=1e-5)


def test_a_start_decides_between_fixed_points() -> None:
    point = theory.critical("gelu", 1.0)
    assert point.kind == "unstable"
    below = theory.fixed_point("gelu", sigma_w=point.sigma_w, sigma_b2=point.sigma_b2, q=0.99)
    above = theory.fixed_point("gelu", sigma_w=point.sigma_w, sigma_b2=point.sigma_b2, q=1.01)
    assert (below.q, below.gain) == (pytest.approx(0.25, abs=5e-3), pytest.approx(0.884, abs=5e-4))
    assert above.q == math.inf


@pytest.mark.parametrize("phi", ["mish", "hardswish"])
def test_a_half_stable_point_holds_what_comes_from_below(phi: str) -> None:
    point = theory.critical(phi)
    held = theory.fixed_point(phi, sigma_w=point.sigma_w, sigma_b2=point.sigma_b2, q=point.q / 3)
    assert held.q == pytest.approx(point.q, rel=1e-3)


def test_scale_invariant_chains_stay_where_they_start() -> None:
    assert theory.fixed_point("relu", sigma_w=math.sqrt(2), q=7.0).q == pytest.approx(7.0)


@pytest.mark.parametrize(("sigma_w", "sigma_b2"), [(0.0, 0.0), (-1.0, 0.0), (1.0, -0.1), (math.nan, 0.0)])
def test_scales_are_checked(sigma_w: float, sigma_b2: float) -> None:
    with pytest.raises(ValueError, match="sigma_w > 0 and sigma_b2 >= 0"):
        theory.fixed_point("tanh", sigma_w=sigma_w, sigma_b2=sigma_b2)


# ---- Chains against random networks -----------------------------------------------------------


W = 384


def linear(sigma_w: float, fan_out: int = W, fan_in: int = W, *, orthogonal: bool = False) -> theory.Linear:
    return theory.Linear(fan_in, fan_out, sigma_w / math.sqrt(fan_in), orthogonal=orthogonal)


RELU = (linear(0.7, 2 * W), theory.Elementwise("relu"), linear(1.3, W, 2 * W))
GELU = (linear(1.0, 2 * W), theory.Elementwise("gelu"), linear(1.3, W, 2 * W))
CHAINS: dict[str, tuple[list[theory.Operation], float]] = {
    "sigmoid": (dense("sigmoid", 30, W, 1.0), 1.0),
    "tanh, gain 5/3": (dense("tanh", 30, W, 5 / 3), 1.0),
    "relu, small": (dense("relu", 30, W, 1 / math.sqrt(3)), 5.0),
    "relu, critical": (dense("relu", 30, W, math.sqrt(2)), 0.01),
    "gelu, shrinking": (dense("gelu", 20, W, math.sqrt(2)), 1.0),
    "elu, critical": (dense("elu", 30, W, 1.223429, 0.03466), 0.3),
    "selu, LeCun": (dense("selu", 30, W, 1.0), 2.0),
    "softplus": (dense("softplus", 30, W, 1.0), 1.0),
    "hardswish": (dense("hardswish", 12, W, 1.404738, 0.507146), 2.2),
    "orthogonal tanh": ([linear(1.05, orthogonal=True), theory.Elementwise("tanh")] * 12, 1.0),
    "layer norm, before": ([linear(1.0), theory.LayerNorm(), theory.Elementwise("relu")] * 20, 1.0),
    "layer norm, after": ([linear(1.4), theory.Elementwise("gelu"), theory.LayerNorm()] * 20, 1.0),
    "rms norm": ([linear(1.4), theory.Elementwise("relu"), theory.RMSNorm(weight=0.8)] * 20, 1.0),
    "dropout": ([linear(1.2), theory.Elementwise("relu"), theory.Dropout(0.3)] * 20, 1.0),
    "residual": ([theory.Residual((theory.Elementwise("relu"), linear(1.4)), scale=0.5)] * 20, 1.0),
    "pre-norm": (theory.pre_norm([RELU, GELU] * 8), 1.0),
    "pre-norm, rms": (theory.pre_norm([RELU, GELU] * 8, theory.RMSNorm()), 3.0),
    "post-norm": (theory.post_norm([RELU, GELU] * 8), 1.0),
    "post-norm, weighted skip": (theory.post_norm([GELU] * 16, skip=2.2), 1.0),
    "zero branch": ([theory.Residual((theory.Elementwise("relu"), linear(0.0)))] * 4, 1.0),
    "narrowing": (
        [linear(1.2, 192), theory.Elementwise("tanh"), linear(1.2, 96, 192), theory.Elementwise("tanh")],
        1.0,
    ),
}


def close(measured: list[float], expected: theory.Expected) -> bool:
    """The mean of the draws lies within three standard errors, and 1% of a decade per operation for what is left out."""
    allowed = 3 * expected.spread / math.sqrt(len(measured)) + 0.01 * len(expected.steps) * 64 / W + 0.005
    return abs(statistics.mean(measured) - expected.decades) < allowed


@pytest.mark.parametrize("name", CHAINS)
def test_chains_do_what_theory_expects(name: str) -> None:
    chain, rms = CHAINS[name]
    draws = []
    for seed in range(4):
        x = rms * torch.randn(1, W, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)
        draws.append(simulate(chain, x, seed).total)
    assert close(draws, theory.expected(chain, rms=rms))


def test_the_comparison_can_fail() -> None:
    x = torch.randn(1, W, generator=torch.Generator().manual_seed(101), dtype=torch.float64)
    draws = [simulate(dense("sigmoid", 30, W, 1.0), x, seed).total for seed in range(2)]
    assert close(draws, theory.expected(dense("sigmoid", 30, W, 1.0), rms=1.0))
    # The textbook's 1/4 per layer is an upper bound, and 5% more weight is another net.
    assert not close(draws, theory.expected([linear(0.25)] * 30, rms=1.0))
    assert not close(draws, theory.expected(dense("sigmoid", 30, W, 1.05), rms=1.0))


def test_the_recursion_ends_at_the_fixed_point() -> None:
    steps = theory.expected(dense("tanh", 60, W, 5 / 3), rms=3.0).steps
    point = theory.fixed_point("tanh", sigma_w=5 / 3)
    assert steps[-1].signal.q == pytest.approx(point.q, rel=1e-9)
    assert steps[-2].gain * steps[-1].gain == pytest.approx(point.gain, rel=1e-9)
    assert steps[0].signal.q > 0.5, "it starts from the real input"


@pytest.mark.parametrize("phi", ["relu", "gelu", "tanh", "linear"])
def test_batch_norm_without_skips_explodes(phi: str) -> None:
    batch, depth = 64, 8
    layer = [theory.Linear(768, 768, 768**-0.5), theory.BatchNorm(batch=batch), theory.Elementwise(phi)]
    x = torch.randn(batch, 768, generator=torch.Generator().manual_seed(109), dtype=torch.float64)
    measured = simulate(layer * depth, x, 0)
    per_layer = sum(measured.decades[3:-3]) / (depth - 2)
    assert 10**per_layer == pytest.approx(theory.batch_norm_gain(phi, batch), rel=0.012)


@pytest.mark.parametrize(
    ("phi", "gain"), [("relu", 1.2111739), ("gelu", 1.1484098), ("tanh", 1.0852683), ("linear", 1.0)]
)
def test_batch_norm_gains_in_the_large_batch(phi: str, gain: float) -> None:
    assert theory.batch_norm_gain(phi) == pytest.approx(gain, abs=6e-8)
    if phi == "relu":
        assert gain == pytest.approx(math.sqrt(math.pi / (math.pi - 1)), abs=6e-8)


def test_batch_norm_takes_off_what_samples_share() -> None:
    layer = [linear(1.4), theory.Elementwise("relu")]
    chain = [*layer, *layer, linear(1.4), theory.BatchNorm(batch=64)]
    common = torch.randn(1, W, generator=torch.Generator().manual_seed(103), dtype=torch.float64)
    own = torch.randn(64, W, generator=torch.Generator().manual_seed(104), dtype=torch.float64)
    x = math.sqrt(0.5) * (common + own)
    expected = theory.expected(chain, rms=1.0, shared=0.5)
    assert expected.steps[-1].gain > 1.1 * theory.expected(chain, rms=1.0, shared=0.0).steps[-1].gain
    measured = statistics.mean(simulate(chain, x, seed).decades[-1] for seed in range(3))
    assert measured == pytest.approx(math.log10(expected.steps[-1].gain), abs=0.02)


@pytest.mark.parametrize("correlation", [-0.9, 0.0, 0.3, 0.9, 0.99, 1.0])
def test_correlated_pairs_meet_the_arc_cosine_kernel(correlation: float) -> None:
    angle = math.acos(correlation)
    kernel = (math.sin(angle) + (math.pi - angle) * correlation) / (2 * math.pi)
    assert activation("relu").kernel(3.0, correlation) == pytest.approx(3 * kernel, abs=3 * 0.5e-3)


def test_a_batch_too_small_for_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="over 3 values"):
        theory.batch_norm_gain("relu", 3)


# A decoder block as sublayers: attention that averages, then a feed-forward of 4 d, all at Xavier scale times beta.
def sublayers(
    blocks: int, share: float, beta: float = 1.0, d: int = 64
) -> Sequence[Sequence[theory.Operation]]:
    wide = beta * math.sqrt(2 / (5 * d))
    attention = [
        theory.Linear(d, d, beta / math.sqrt(d)),
        theory.Averaging(share),
        theory.Linear(d, d, beta / math.sqrt(d)),
    ]
    feed_forward = [theory.Linear(d, 4 * d, wide), theory.Elementwise("relu"), theory.Linear(4 * d, d, wide)]
    return [attention, feed_forward] * blocks


@pytest.mark.parametrize(("blocks", "total"), [(12, 3.57), (48, 7.30)])
def test_pre_norm_transformers_grow_like_a_root_of_depth(blocks: int, total: float) -> None:
    """Measured totals of a causal decoder, 16 positions: between positions that are independent and alike."""
    least, most = (
        10 ** theory.expected(theory.pre_norm(sublayers(blocks, share)), rms=1.0).decades
        for share in (theory.causal_share(16), 1.0)
    )
    assert least < total < most
    # sqrt(1 + L v): the closed form for branches of variance v, 1 + 0.32 a block here.
    assert most == pytest.approx(math.sqrt(1 + 1.32 * blocks), rel=0.02)


@pytest.mark.parametrize("blocks", [12, 48, 200])
def test_post_norm_keeps_the_gradient_and_deep_norm_every_gain(blocks: int) -> None:
    plain = theory.expected(theory.post_norm(sublayers(blocks, 0.5)), rms=1.0)
    assert plain.decades == pytest.approx(0.0, abs=0.01)
    alpha, beta = (2 * blocks) ** 0.25, (8 * blocks) ** -0.25
    deep = theory.expected(theory.post_norm(sublayers(blocks, 0.5, beta), skip=alpha), rms=1.0)
    assert deep.decades == pytest.approx(0.0, abs=0.01)
    assert deep.spread < 0.2 * plain.spread
    assert all(
        abs(math.log10(a.gain * b.gain)) < 0.01
        for a, b in zip(deep.steps[::2], deep.steps[1::2], strict=True)
    )


def test_the_input_must_have_a_size() -> None:
    with pytest.raises(ValueError, match="rms"):
        theory.expected([linear(1.0)], rms=0.0)
    with pytest.raises(ValueError, match="exactly zero"):
        theory.expected([linear(0.0), theory.Elementwise("relu")], rms=1.0)


# ---- Scatter over draws -----------------------------------------------------------------------


@pytest.mark.parametrize(("phi", "c"), [("linear", 2.0), ("relu", 5.0), ("sigmoid", 2.07)])
def test_the_scatter_of_a_chain_is_c_over_width_a_layer(phi: str, c: float) -> None:
    sd = theory.spread([64] * 51, phi, q=0.3)
    assert (sd * 2 * math.log(10)) ** 2 * 64 / 50 == pytest.approx(c, rel=0.01)


def test_fifty_relu_layers_of_64_scatter_by_almost_half_a_decade_each_way() -> None:
    assert (2 * math.log(10) * theory.spread([64] * 51, "relu")) == pytest.approx(2.0, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chain",
    [
        dense("linear", 20, 64, 1.0),
        dense("relu", 20, 64, math.sqrt(2)),
        dense("tanh", 20, 64, 1.467414, 0.150965),
        dense("selu", 20, 64, 1.0),
        [theory.Linear(64, 64, 0.175), theory.LayerNorm(), theory.Elementwise("relu")] * 20,
        theory.post_norm([[theory.Elementwise("relu"), theory.Linear(64, 64, 0.175)]] * 20),
    ],
    ids=["linear", "relu", "tanh", "selu", "layer norm", "post-norm"],
)
def test_draws_scatter_as_expected(chain: list[theory.Operation]) -> None:
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(5000), dtype=torch.float64)
    draws = [simulate(chain, x, seed).total for seed in range(400)]
    # The standard deviation of 400 draws is itself known to 3.5%; first order in 1/width is good to 10% here.
    assert statistics.stdev(draws) == pytest.approx(
        theory.expected(chain, rms=float(x.square().mean()) ** 0.5).spread, rel=0.2
    )


# ---- sigma^L ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "power"), [(0.9, 0.005154), (1.1, 117.391)])
def test_the_law_meets_the_textbook(sigma: float, power: float) -> None:
    fitted = theory.law([math.log10(sigma)] * 20)
    assert (fitted.sigma, fitted.error, fitted.r2) == (
        pytest.approx(sigma),
        pytest.approx(0, abs=1e-12),
        pytest.approx(1),
    )
    at_50 = fitted.extrapolate(50)
    assert at_50.factor == pytest.approx(sigma**50, rel=1e-12)
    assert f"{at_50.factor:.4g}" == f"{power:.4g}"
    assert at_50.error == pytest.approx(0, abs=1e-12)


def test_the_law_says_how_sure_it_is() -> None:
    """Of chains with independent layers, about 95% must end within two errors of what half of each foretells."""
    generator = torch.Generator().manual_seed(0)
    hits, n = 0, 400
    for _ in range(n):
        ledger = -0.05 + 0.1 * torch.randn(120, generator=generator, dtype=torch.float64)
        foretold = theory.law(ledger[:40]).extrapolate(80)
        hits += abs(float(ledger[40:].sum()) - foretold.decades) < 2 * foretold.error
    assert 0.92 < hits / n < 0.98


def test_the_law_says_when_one_sigma_does_not_describe_a_chain() -> None:
    even, broken = [-0.3] * 20, [0.0] * 19 + [-6.0]
    assert theory.law(even).sigma == pytest.approx(theory.law(broken).sigma)
    assert theory.law(even).r2 > 0.999 > 0.1 > theory.law(broken).r2


def test_the_law_of_an_isometric_chain_and_of_one_layer() -> None:
    assert theory.law([0.0] * 5).r2 == 1.0
    one = theory.law([-1.0])
    assert (one.sigma, one.layers) == (pytest.approx(0.1), 1)
    assert math.isnan(one.error)
    assert one.extrapolate(3).decades == pytest.approx(-3.0)


@pytest.mark.parametrize(
    ("decades", "message"), [([], "one number per layer"), ([-1.0, -math.inf, math.nan], r"layers \[1, 2\]")]
)
def test_a_ledger_must_be_finite(decades: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        theory.law(decades)
