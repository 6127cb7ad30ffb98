"""Singular values of a block's Jacobian: time and memory beside what people use for it today.

Every method runs in a process of its own, under attention's MATH backend, and goes for the same accuracy:
one percent of the largest singular value. Seconds are processor time, all threads together, which suffers
less than wall time when other programs use the same cores. `jacrev + svdvals` gives all of them; `svds` gives the largest and
nothing else; isograd gives the largest, the RMS and how they are distributed.

    python -m benchmarks spectrum
    python -m benchmarks.spectrum 'block 16 x 64' isograd 1     # one method on one case, as JSON
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import isograd
from benchmarks.memory import MB, ROOT, in_use
from benchmarks.report import progress, table
from benchmarks.timing import Sample
from benchmarks.workloads import Setting

TOLERANCE = 1e-2
ROUNDS, ENOUGH = 5, 4.0
"""Repetitions, unless this many seconds have gone by."""
LARGEST_MATRIX = 8e9
"""Bytes of the Jacobian and its decomposition together, beyond which the dense method is not tried."""
PATIENCE = 900.0
"""Seconds after which a method is given up."""


class Block(nn.Module):
    """One pre-norm block of GPT-2: attention and an MLP of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


@dataclass(frozen=True)
class Case:
    """A model and one input of it."""

    name: str
    shape: tuple[int, ...]
    layers: int = 1

    def built(self) -> tuple[nn.Module, Tensor]:
        """The same weights and data every time."""
        torch.manual_seed(0)
        if len(self.shape) == 2:
            model = Block(self.shape[1])
        else:
            chain = [(nn.Linear(self.shape[0], self.shape[0]), nn.Tanh()) for _ in range(self.layers)]
            for linear, _ in chain:
                nn.init.orthogonal_(linear.weight)
            model = nn.Sequential(*(part for pair in chain for part in pair))
        return model, torch.randn(1, *self.shape)

    @property
    def size(self) -> int:
        """Rows and columns of the Jacobian."""
        return math.prod(self.shape)


SIZES = [Case(f"block {t} x {d}", (t, d)) for t, d in ((8, 32), (16, 64), (32, 128), (256, 768))]
DEPTHS = [Case(f"{n} tanh layers of 1024", (1024,), n) for n in (4, 16, 64)]
QUICK = [Case("block 4 x 16", (4, 16)), Case("2 tanh layers of 64", (64,), 2)]


# -- methods -------------------------------------------------------------------------------------------


def ours(model: nn.Module, x: Tensor) -> float:
    """isograd by the method of its own choice: dense up to 512 outputs, without a matrix beyond."""
    weights = torch.randn_like(x)
    found = isograd.spectrum(model, lambda m: (m(x) * weights).sum(), sites=[], tolerance=TOLERANCE)
    assert found.end_to_end is not None
    return found.end_to_end.sigma_max


def dense(model: nn.Module, x: Tensor) -> float:
    """All of the matrix, all of its singular values."""
    with sdpa_kernel(SDPBackend.MATH):
        matrix = torch.func.jacrev(model)(x).reshape(x.numel(), x.numel())
    return float(torch.linalg.svdvals(matrix.detach())[0])


def svds(model: nn.Module, x: Tensor) -> float:
    """ARPACK on products by torch.func."""
    from scipy.sparse.linalg import LinearOperator
    from scipy.sparse.linalg import svds as arpack

    def vector(array: object) -> Tensor:
        return torch.as_tensor(array, dtype=x.dtype).reshape(x.shape)

    with sdpa_kernel(SDPBackend.MATH):
        _, pull = torch.func.vjp(model, x)
        operator = LinearOperator(
            (x.numel(), x.numel()),
            matvec=lambda v: torch.func.jvp(model, (x,), (vector(v),))[1].detach().numpy().ravel(),
            rmatvec=lambda u: pull(vector(u))[0].detach().numpy().ravel(),
            dtype="float32",
        )
        found = arpack(operator, k=1, tol=TOLERANCE, return_singular_vectors=False, random_state=0)
    return float(found[0])


METHODS: dict[str, Callable[[nn.Module, Tensor], float]] = {
    "isograd": ours,
    "jacrev + svdvals": dense,
    "scipy svds": svds,
}


# -- report --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What one process told of one method, or why there is nothing to tell."""

    seconds: Sample | None = None
    megabytes: float = math.nan
    """Highest resident memory over that of the model and the libraries."""
    value: float = math.nan
    why: str = ""


def run(setting: Setting) -> Iterator[str]:
    """The two tables, each once it is there."""
    for title, cases in (
        (
            "One pre-norm transformer block, one sequence; n = tokens x width.",
            QUICK[:1] if setting.quick else SIZES,
        ),
        ("Orthogonal tanh layers, one sample, end to end.", QUICK[1:] if setting.quick else DEPTHS),
    ):
        readings = {case.name: {m: reading(case, m, setting) for m in METHODS} for case in cases}
        header = ("case", "n", "method", "seconds", "MB on top", "largest", "off the dense value")
        rows = [row(case, m, readings[case.name]) for case in cases for m in METHODS]
        yield f"{title} Median processor seconds (smallest .. largest)."
        yield table(header, rows)
        yield growth(cases, [readings[case.name]["isograd"] for case in cases])


def row(case: Case, method: str, readings: dict[str, Reading]) -> tuple[str, ...]:
    """One method on one case."""
    mine, exact = readings[method], readings["jacrev + svdvals"].value
    if mine.seconds is None:
        return case.name, f"{case.size:,}", method, mine.why, "", "", ""
    off = "" if math.isnan(exact) or mine.value == exact else f"{mine.value / exact - 1:.1e}"
    return (
        case.name,
        f"{case.size:,}",
        method,
        mine.seconds.show(digits=3),
        f"{mine.megabytes:.0f}",
        f"{mine.value:.5g}",
        off,
    )


def growth(cases: list[Case], readings: list[Reading]) -> str:
    """Exponent of isograd's time over what is varied."""
    across = [case.size if len(case.shape) == 2 else case.layers for case in cases]
    seen = [(a, r.seconds.median) for a, r in zip(across, readings, strict=True) if r.seconds is not None]
    if len(seen) < 2:
        return "Too few sizes to fit how the cost grows."
    slope = statistics.linear_regression(
        *zip(*((math.log(a), math.log(s)) for a, s in seen), strict=True)
    ).slope
    return f"isograd: seconds = c x^{slope:.2f}, x = {'n' if len(cases[0].shape) == 2 else 'layers'}."


def reading(case: Case, method: str, setting: Setting) -> Reading:
    """A fresh process that does nothing else."""
    progress(f"spectrum: {case.name}, {method}")
    if method.startswith("jacrev") and (needed := 3 * 4.0 * case.size**2) > LARGEST_MATRIX:
        return Reading(why=f"needs {needed / 1e9:.0f} GB")
    command = [sys.executable, "-m", "benchmarks.spectrum", case.name, method, str(setting.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return Reading(why=f"more than {PATIENCE:.0f} s")
    if done.returncode:
        return Reading(why=f"fails: {done.stderr.strip().splitlines()[-1][:60]}")
    seconds, memory, value = json.loads(done.stdout.splitlines()[-1])
    return Reading(Sample(tuple(seconds)), memory * MB, value)


def main(name: str, method: str, threads: str) -> None:
    """Print seconds, bytes and the value found."""
    torch.set_num_threads(int(threads))
    case = next(case for case in (*SIZES, *DEPTHS, *QUICK) if case.name == name)
    warm = partial(METHODS[method], *QUICK[len(case.shape) == 1].built())
    warm()  # what a library loads when it is first used is no part of the method
    model, x = case.built()
    built, _ = in_use("cpu")
    seconds: list[float] = []
    value = math.nan
    while len(seconds) < ROUNDS and sum(seconds) < ENOUGH:
        started = time.process_time()
        value = METHODS[method](model, x)
        seconds.append(time.process_time() - started)
    print(json.dumps((seconds, in_use("cpu")[1] - built, value)))


if __name__ == "__main__":
    main(*sys.argv[1:])
