"""Diagnoses made by hand, so that the faces are tested without the measurement, and snapshots."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from isograd.diagnosis import Diagnosis, Effect, Finding, Severity
from isograd.flow import Flow
from isograd.statistics import ModuleSignal, Parameter, Site

# A shell starts what is in its background with Ctrl-C ignored, and children inherit that: tests of Ctrl-C need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SNAPSHOTS = Path(__file__).parent / "snapshots"
LAYERS = 6


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-snapshots", action="store_true", help="write tests/snapshots anew")


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """Trainings of the gallery and the benchmarks flush denormals in their process; here all tests share one."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def snapshot(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`snapshot(file, text)`: the text is what the file holds; `--write-snapshots` makes it so."""

    def compare(name: str, text: str) -> None:
        path = SNAPSHOTS / name
        if request.config.getoption("--write-snapshots"):
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")

    return compare


def flow_of(modules: tuple[ModuleSignal, ...] = (), *, gain: float = 0.1) -> Flow:
    """A backbone of `LAYERS` linear sites on an input, each with the same gain, in `src/net.py`."""
    sites = [Site("input", "input", "input", "", "", (8, 4), "float32", 0)]
    sites += [
        Site(f"fc{i} · linear", "linear", "addmm", f"fc{i}", f"src/net.py:{10 + i}", (8, 4), "float32", i)
        for i in range(1, LAYERS + 1)
    ]
    step = math.log10(gain)
    return Flow(
        sites=tuple(sites),
        columns={
            "grad_norm_log10": torch.arange(LAYERS, -1, -1, dtype=torch.float64) * step,
            "gain": torch.tensor([math.nan] + [gain] * LAYERS, dtype=torch.float64),
            "decades": torch.tensor([math.nan] + [step] * LAYERS, dtype=torch.float64),
            "activation_rms": torch.tensor([1.0, *[0.5] * LAYERS], dtype=torch.float64),
        },
        parameters=(
            Parameter("fc1.weight", (4, 4), "measured", -5.5, 1.25, 0.0, 0, 1.0),
            Parameter("fc1.bias", (4,), "measured", -math.inf, 0.0, 1.0, 0, 1.0),
            Parameter("extra.weight", (4, 4), "unused", math.nan, 1.5, math.nan, 0, math.nan),
        ),
        modules=modules
        or (
            ModuleSignal("", "Net", 0.5, 0.0),
            *(ModuleSignal(f"fc{i}", "Linear", 0.5, (LAYERS - i) * step) for i in range(1, LAYERS + 1)),
        ),
        layers=LAYERS,
        loss=2.3,
    )


@pytest.fixture
def sick() -> Diagnosis:
    """A vanishing gradient with its cause tested, a warning, and things left unexamined."""
    return Diagnosis(
        flow_of(),
        findings=(
            Finding(
                "VG101",
                "vanishing-gradient",
                Severity.ERROR,
                "−6.0 decades over 6 layers, sigma 0.10 per layer; the first layer receives 1e-06 of the "
                "gradient at the head",
                cause="the sigmoids cost 5.0 decades (measured by exchange), the initialisation 0.9",
                sites=tuple(f"fc{i} · linear" for i in range(1, LAYERS + 1)),
                evidence={"decades": -6.0, "threshold": -3.0, "layers": 6, "spread": math.nan},
                remedies=("orthogonal weights with gain 1", "ReLU in place of sigmoid, 100% of them"),
                effects=(
                    Effect("ReLU for sigmoid", "the sigmoid activations", -6.0, -1.0, 5.0),
                    Effect("skip connections", "missing residual", -6.0, math.nan, math.nan, "shapes differ"),
                ),
            ),
            Finding("UP501", "parameter-without-gradient", Severity.WARNING, "extra.weight gets no gradient"),
        ),
        healthy={"EG202": "activations stay within 0.3 decades of each other"},
        unexamined={"UP502": "no optimizer was given: --optimizer adamw:3e-4"},
        target="src/net.py:build",
    )


@pytest.fixture
def healthy() -> Diagnosis:
    """The same network with a gain of 1."""
    return Diagnosis(
        flow_of(gain=1.0), healthy={"VG101": "0.0 decades over 6 layers"}, target="src/net.py:build"
    )
