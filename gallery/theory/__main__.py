"""Print the tables of docs/theory.md: about three minutes of one core."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch

from gallery.theory.measured import beside, deeper
from gallery.theory.simulation import dense, simulate
from isograd import theory

INITIALISATIONS = {
    "default": 1 / math.sqrt(3),
    "Xavier": 1.0,
    "Kaiming": math.sqrt(2),
}
"""sigma_w of nn.Linear's default, Xavier on a square layer, and Kaiming for ReLU."""
ACTIVATIONS = (
    "sigmoid",
    "tanh",
    "relu",
    "elu",
    "selu",
    "gelu",
    "silu",
    "softplus",
    "mish",
    "hardtanh",
    "hardswish",
)


def noise(samples: int, width: int, seed: int, rms: float = 1.0) -> torch.Tensor:
    """Of exactly that rms: where q amplifies its deviations, as with GELU, a start that is 2% off is felt."""
    # Another seed than that of the weights, or the first of them would be x again.
    x = torch.randn(samples, width, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)
    return x * rms / x.square().mean().sqrt()


def critical() -> None:
    print(
        "\n## Critical initialisations\n\n| activation | sigma_w | sigma_b^2 | q | kind |\n|---|---|---|---|---|"
    )
    for phi in ("sigmoid", "tanh", "relu", "leaky_relu", "elu", "selu", "gelu", "gelu_tanh", "silu", "mish", "hardtanh",
                "hardswish", "softplus"):  # fmt: skip
        try:
            point = theory.critical(phi)
        except ValueError as none:
            print(f"| {phi} | | | | {none} |")
            continue
        q = "any" if math.isnan(point.q) else f"{point.q:.6f}"
        print(f"| {phi} | {point.sigma_w:.6f} | {point.sigma_b2:.8f} | {q} | {point.kind} |")
    start = time.perf_counter()
    theory.critical(torch.nn.GELU())  # a module is read anew: nothing of this is remembered
    print(f"\ncritical(GELU), nothing remembered: {time.perf_counter() - start:.2f} s")


def initialisations(width: int = 512, layers: int = 50, draws: int = 4) -> None:
    print(
        f"\n## Gain of common initialisations, {layers} layers of {width}, in decades; mean of {draws} draws\n"
    )
    print(
        "| activation | sigma_w | limit per layer | limit^50 | expected | drawn |\n|---|---|---|---|---|---|"
    )
    for phi in ACTIVATIONS:
        scales = dict(INITIALISATIONS)
        if phi == "tanh":
            scales["calculate_gain"] = 5 / 3
        for name, sigma_w in scales.items():
            limit = theory.gain(phi, sigma_w=sigma_w)
            chain = dense(phi, layers, width, sigma_w)
            expected = theory.expected(chain, rms=1.0)
            drawn = [simulate(chain, noise(1, width, seed), seed).total for seed in range(draws)]
            print(
                f"| {phi} | {name} | {limit:.5f} | {limit**layers:.1e} "
                f"| {expected.decades:.2f} ± {expected.spread / math.sqrt(draws):.2f} "
                f"| {statistics.mean(drawn):.2f} |",
                flush=True,
            )


def batch_norm(width: int = 1024, layers: int = 10, draws: int = 6) -> None:
    print(f"\n## BatchNorm without skips: gain per layer; drawn with {layers} layers of {width}\n")
    print("| activation | large batch | batch 256 | drawn | batch 32 | drawn |\n|---|---|---|---|---|---|")
    for phi in ("relu", "gelu", "silu", "tanh", "linear"):
        cells = [f"{theory.batch_norm_gain(phi):.4f}"]
        for batch in (256, 32):
            layer = [
                theory.Linear(width, width, width**-0.5),
                theory.BatchNorm(batch=batch),
                theory.Elementwise(phi),
            ]
            drawn = [
                sum(simulate(layer * layers, noise(batch, width, seed), seed).decades[3:-3]) / (layers - 2)
                for seed in range(draws)
            ]
            cells += [f"{theory.batch_norm_gain(phi, batch):.4f}", f"{10 ** statistics.mean(drawn):.4f}"]
        print(f"| {phi} | {' | '.join(cells)} |", flush=True)


def scatter(width: int = 64, layers: int = 20, draws: int = 200) -> None:
    print(
        f"\n## Scatter of the gain: c of Var log ||J'v||^2 = c layers / width; {draws} draws, {layers} layers of {width}\n"
    )
    print(
        "| chain | c of `spread` | c of `expected` | c drawn | mean decades expected | drawn |\n|---|---|---|---|---|---|"
    )

    def residual() -> Sequence[theory.Operation]:
        return theory.Elementwise("relu"), theory.Linear(width, width, 1.4 / math.sqrt(width))

    cases: list[tuple[str, list[theory.Operation], float, float]] = [
        (phi, dense(phi, layers, width, sigma_w, sigma_b2), q, theory.spread([width] * (layers + 1), phi, q))
        for phi, sigma_w, sigma_b2, q in [
            ("linear", 1.0, 0.0, 1.0), ("relu", math.sqrt(2), 0.0, 1.0), ("tanh", 1.467414, 0.150965, 1.0),
            ("sigmoid", 1.0, 0.0, 0.265), ("selu", 1.0, 0.0, 1.0), ("elu", 1.223429, 0.034660, 1.0),
            ("gelu", 1.408211, 0.17292239, 3.5616),
        ]
    ]  # fmt: skip
    cases.append(("relu, pre-norm", theory.pre_norm([residual()] * layers), 1.0, math.nan))
    cases.append(("relu, post-norm", theory.post_norm([residual()] * layers), 1.0, math.nan))
    for name, chain, q, still in cases:
        x = noise(1, width, 7, math.sqrt(q))
        expected = theory.expected(chain, rms=math.sqrt(q))
        drawn = [simulate(chain, x, seed).total for seed in range(draws)]
        still, moving, measured = (
            (2 * math.log(10) * sd) ** 2 * width / layers
            for sd in (still, expected.spread, statistics.stdev(drawn))
        )
        print(f"| {name} | {'' if math.isnan(still) else f'{still:.2f}'} | {moving:.2f} | {measured:.2f} | {expected.decades:.3f} "
              f"| {statistics.mean(drawn):.3f} |", flush=True)  # fmt: skip


def transformers(d: int = 64, positions: int = 16) -> None:
    print(
        f"\n## Decoders of width {d} at Xavier scale: total gain, positions independent ({positions}) ... alike\n"
    )
    print("| scheme | 12 blocks | 48 | 200 |\n|---|---|---|---|")

    def sublayers(
        blocks: int, share: float, inner: float = 1.0, outer: float = 1.0
    ) -> Sequence[Sequence[theory.Operation]]:
        one, wide = 1 / math.sqrt(d), math.sqrt(2 / (5 * d))
        attention = (
            theory.Linear(d, d, inner * one),
            theory.Averaging(share),
            theory.Linear(d, d, outer * one),
        )
        feed_forward = (
            theory.Linear(d, 4 * d, inner * wide),
            theory.Elementwise("relu"),
            theory.Linear(4 * d, d, outer * wide),
        )
        return [attention, feed_forward] * blocks

    def row(name: str, chain: dict[tuple[int, float], Sequence[theory.Operation]]) -> None:
        cells = []
        for blocks in (12, 48, 200):
            apart, alike = (theory.expected(chain[blocks, share], rms=1.0) for share in shares)
            cells.append(f"{10**apart.decades:.2f} ... {10**alike.decades:.2f} (x/ {10**alike.spread:.2f})")
        print(f"| {name} | {' | '.join(cells)} |")

    shares = (theory.causal_share(positions), 1.0)
    sizes = [(blocks, share) for blocks in (12, 48, 200) for share in shares]
    row("pre-norm", {(n, s): theory.pre_norm(sublayers(n, s)) for n, s in sizes})
    row(
        "pre-norm, branch / sqrt(2N)",
        {(n, s): theory.pre_norm(sublayers(n, s, outer=(2 * n) ** -0.5)) for n, s in sizes},
    )
    row("post-norm", {(n, s): theory.post_norm(sublayers(n, s)) for n, s in sizes})
    row("DeepNorm", {(n, s): theory.post_norm(sublayers(n, s, (8 * n) ** -0.25, (8 * n) ** -0.25), skip=(2 * n) ** 0.25)
                     for n, s in sizes})  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    for section in (critical, initialisations, batch_norm, scatter, transformers, beside, deeper):
        section()
