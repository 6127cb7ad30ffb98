"""The rules of today's tools, on the same readings: what their shipped thresholds say at each step.

Written from the thresholds as published (versions in the table of docs/detectors.md), not with the tools
themselves. Where a tool looks at single elements, the norm of a parameter over the root of its size stands
for their typical size. Each rule yields the steps at which it would speak.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

from torch import Tensor

from isograd.monitor.reading import Reading

Rule = Callable[[Iterable[Reading]], Iterator[int]]


def _loss(reading: Reading) -> float:
    return reading.scalars.get("loss", math.nan)


def _matrices(reading: Reading, name: str) -> Tensor:
    kept = [i for i, shape in enumerate(reading.shapes) if len(shape) > 1]
    return reading.columns[name][kept]


def _broken(reading: Reading) -> bool:
    return bool((reading.columns["nonfinite"] > 0).any()) or not math.isfinite(_loss(reading))


def _ratios(reading: Reading) -> Tensor:
    return _matrices(reading, "update_norm") / (_matrices(reading, "weight_norm") + 1e-9)


def sagemaker(readings: Iterable[Reading]) -> Iterator[int]:
    """VanishingGradient (mean |g| < 1e-7), ExplodingTensor (NaN, Inf), WeightUpdateRatio (1e-8 … 10)."""
    for reading in readings:
        sizes = [math.prod(shape) for shape in reading.shapes]
        typical = [float(g) / math.sqrt(n) for g, n in zip(reading.columns["grad_norm"], sizes, strict=True)]
        ratios = _ratios(reading)
        if _broken(reading) or min(typical) < 1e-7 or bool(((ratios > 10) | (ratios < 1e-8)).any()):
            yield reading.step


def loss_not_decreasing(readings: Iterable[Reading]) -> Iterator[int]:
    """LossNotDecreasing: no decrease over 10 steps."""
    last: deque[float] = deque(maxlen=11)
    for reading in readings:
        last.append(_loss(reading))
        if len(last) == 11 and last[-1] >= last[0]:
            yield reading.step


def autotrainer(readings: Iterable[Reading]) -> Iterator[int]:
    """First over last gradient < 1e-3 with the first < 1e-4, > 70, 70% zeros, NaN or a loss of 1000; each 20 steps."""
    for reading in readings:
        if reading.step % 20 and not _broken(reading):
            continue
        norms = _matrices(reading, "grad_norm")
        first, last = float(norms[0]), float(norms[-1])
        sizes = sum(math.prod(shape) for shape in reading.shapes)
        dying = float(reading.columns["zeros"].sum()) >= 0.7 * sizes
        vanishing = first < 1e-4 and first < 1e-3 * last
        if _broken(reading) or _loss(reading) >= 1e3 or vanishing or first > 70 * last > 0 or dying:
            yield reading.step


def torchlens(readings: Iterable[Reading]) -> Iterator[int]:
    """The norm of any parameter below 1e-7 or above 1e4, in 5 of 8 steps; values that are not finite at once."""
    window: deque[bool] = deque(maxlen=8)
    for reading in readings:
        norms = reading.columns["grad_norm"]
        window.append(bool(((norms < 1e-7) | (norms > 1e4)).any()))
        if _broken(reading) or sum(window) >= 5:
            yield reading.step


def traintools(readings: Iterable[Reading]) -> Iterator[int]:
    """Norms outside 1e-12 … 1e3, update ratios outside 1e-8 … 0.1."""
    for reading in readings:
        norms, ratios = reading.columns["grad_norm"], _ratios(reading)
        outside = bool(((norms < 1e-12) | (norms > 1e3)).any()) or bool(
            ((ratios < 1e-8) | (ratios > 0.1)).any()
        )
        if _broken(reading) or outside:
            yield reading.step


def torchdiag(readings: Iterable[Reading]) -> Iterator[int]:
    """The largest gradient of any parameter above 100 or below 1e-7."""
    for reading in readings:
        largest = reading.columns["grad_max"]
        if _broken(reading) or bool(((largest > 100) | (largest < 1e-7)).any()):
            yield reading.step


def tutorial(readings: Iterable[Reading]) -> Iterator[int]:
    """The global norm above 100."""
    for reading in readings:
        if _broken(reading) or reading.scalars["grad_norm"] > 100:
            yield reading.step


def arc(readings: Iterable[Reading]) -> Iterator[int]:
    """NaN or Inf, a loss above 100 or ten times its recent mean, a norm above 1e5."""
    recent: deque[float] = deque(maxlen=20)
    for reading in readings:
        loss = _loss(reading)
        mean = sum(recent) / len(recent) if len(recent) >= 5 else math.inf
        if _broken(reading) or loss > 100 or loss > 10 * mean or reading.scalars["grad_norm"] > 1e5:
            yield reading.step
        if math.isfinite(loss):
            recent.append(loss)


def lightning(readings: Iterable[Reading]) -> Iterator[int]:
    """SpikeDetection: the loss rose, and is farther from its running mean of 10 than twice that mean."""
    recent: deque[float] = deque(maxlen=10)
    for reading in readings:
        loss = _loss(reading)
        mean = sum(recent) / len(recent) if recent else math.nan
        rose = bool(recent) and loss > recent[-1]
        if not math.isfinite(loss) or (len(recent) > 1 and rose and abs(loss - mean) >= 2 * abs(mean)):
            yield reading.step
        if math.isfinite(loss):
            recent.append(loss)


def zclip(readings: Iterable[Reading]) -> Iterator[int]:
    """The norm 2.5 standard deviations above its exponential mean (0.97), after 25 steps; one NaN ends it."""
    first: list[float] = []
    mean = variance = math.nan
    for reading in readings:
        norm = reading.scalars["grad_norm"] if not _broken(reading) else math.nan
        if len(first) < 25:
            first.append(norm)
            mean = sum(first) / len(first)
            variance = sum((value - mean) ** 2 for value in first) / len(first)
            continue
        z = (norm - mean) / math.sqrt(variance + 1e-12)
        if z > 2.5:
            yield reading.step
            norm = mean + 2.5**2 * math.sqrt(variance) / z
        mean, variance = 0.97 * mean + 0.03 * norm, 0.97 * variance + 0.03 * (norm - mean) ** 2


def megatron(readings: Iterable[Reading]) -> Iterator[int]:
    """NaN or Inf, or a loss ten times the largest of the first 100."""
    largest = 0.0
    for count, reading in enumerate(readings):
        if _broken(reading) or (count >= 100 and _loss(reading) > 10 * largest):
            yield reading.step
        elif count < 100:
            largest = max(largest, _loss(reading))


RULES: dict[str, Rule] = {
    "SageMaker Debugger, gradients and updates": sagemaker,
    "SageMaker Debugger, LossNotDecreasing": loss_not_decreasing,
    "AutoTrainer": autotrainer,
    "TorchLens 2.36 checks": torchlens,
    "traintools 0.6": traintools,
    "torchdiag 0.1": torchdiag,
    "norm > 100 (tutorials)": tutorial,
    "ARC 5.2, loss and norm": arc,
    "Lightning SpikeDetection": lightning,
    "ZClip z > 2.5": zclip,
    "Megatron-LM spiky loss": megatron,
}


def first_after(steps: Iterable[int], onset: int) -> int | None:
    """The first step of an alarm from `onset` on."""
    return next((step for step in steps if step >= onset), None)


def episodes(steps: Iterable[int], quiet: int = 64) -> int:
    """Alarms, counting those less than `quiet` steps apart as one."""
    told = list(steps)
    return bool(told) + sum(b - a >= quiet for a, b in pairwise(told))
