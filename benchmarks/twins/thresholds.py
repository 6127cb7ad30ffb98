"""Where the faults that cost no decades start to hurt: python -m benchmarks.twins.thresholds [skip|epsilon|attention|gain]

Each row is a healthy twin with one property turned a little further: what is measured before training, and the
held-out accuracy after it, on seed 0. The thresholds of VG104, VG105, VG106 and SA304 stand on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median

import torch
from torch import nn

from benchmarks.twins import faults
from benchmarks.twins.case import Case, Plant, train
from benchmarks.twins.cases import cases
from benchmarks.twins.trial import model_of
from gallery.nets import Attention
from isograd.flow import Flow
from isograd.measure import measure
from isograd.symptoms.rank_collapse import own

SKIPS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.15, 0.0)
EPSILONS = (0.0, 1.0, 10.0, 100.0, 1000.0)
"""Times the variance of what is normalised."""
GAINS = (0.3, 0.1, 0.05, 0.02, 0.005)


def _skips() -> Iterator[tuple[str, str, Plant]]:
    for model in ("pre-norm decoder 3", "post-norm decoder 3", "pre-norm decoder 6", "post-norm decoder 6"):
        yield from ((model, f"skips x {skip:g}", faults.attribute("skip", skip)) for skip in SKIPS)


def _epsilons() -> Iterator[tuple[str, str, Plant]]:
    variances = {"pre-norm decoder 3": 1.0, "residual cnn 4": 0.3, "vit of transformers": 0.002}
    for model, variance in variances.items():
        for factor in EPSILONS:
            yield model, f"epsilon {factor:g} x variance", faults.epsilon(max(factor * variance, 1e-6))


def _gains() -> Iterator[tuple[str, str, Plant]]:
    for model in ("batch-normalised cnn 6", "post-norm decoder 3", "vit of transformers"):
        yield model, "gains 1", faults.unchanged
        for std in GAINS:
            yield model, f"gains N(0, {std:g})", faults.gains(lambda g, std=std: nn.init.normal_(g, std=std))


def _logits() -> Iterator[tuple[str, str, Plant]]:
    """Queries and keys alone: an attention here holds them in the first two thirds of one matrix."""
    for factor in (1.0, 2.0, 4.0, 8.0):

        def plant(model: nn.Module, factor: float = factor) -> None:
            for module in model.modules():
                if isinstance(module, Attention):
                    module.query_key_value.weight[: -module.out.in_features].mul_(factor)

        yield "pre-norm decoder 3", f"queries and keys x {factor:g}", plant


def _share(flow: Flow) -> float:
    found = own(flow)
    return found.ratio if found else float("nan")


GRIDS: dict[str, tuple[Callable[[], Iterator[tuple[str, str, Plant]]], Callable[[Flow], float]]] = {
    "skip": (_skips, _share),
    "epsilon": (_epsilons, lambda flow: median(n.kept for n in flow.normalisations)),
    "attention": (_logits, lambda flow: median(a.spread for a in flow.attentions)),
    "gain": (_gains, lambda flow: median(n.gain for n in flow.normalisations)),
}
"""The rows, and what is measured."""


def rows(grid: str) -> Iterator[str]:
    models: dict[str, Case] = {}
    for case in cases():
        models.setdefault(model_of(case), case)
    planted, measured = GRIDS[grid]
    for model, fault, plant in planted():
        case = replace(models[model], plant=plant)
        flow = measure(case.build(0, faulty=True).train(), case.loss(0))
        score = train(case, case.build(0, faulty=True), 0)
        yield (
            f"{model:24} {fault:24} measured {measured(flow):7.3f}  {flow.lost:+5.2f} decades  "
            f"accuracy {score:.3f} (guessing {case.task().chance:.3f})"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for grid in sys.argv[1:] or GRIDS:
        for row in rows(grid):
            print(row, flush=True)
