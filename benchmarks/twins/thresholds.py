"""Where the faults that cost no decades start to hurt: python -m benchmarks.twins.thresholds [GRID …]

GRID is skip, loud, recurrence, epsilon, attention, gain, constant, saturated or shift; all without one.

Each row is a healthy twin with one property turned a little further: what is measured before training, and the
held-out accuracy after it, on seed 0. The thresholds of RN602, VG104, VG105, VG106 and SA304 stand on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from statistics import median

import torch
from torch import nn

from benchmarks.twins import faults
from benchmarks.twins.case import Case, Plant, train
from benchmarks.twins.cases import cases
from benchmarks.twins.trial import model_of
from gallery.nets import Attention
from isograd.check import along_time
from isograd.flow import Flow
from isograd.measure import measure
from isograd.symptoms.exploding_recurrence import growth
from isograd.symptoms.rank_collapse import own

SKIPS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.15, 0.0)
LOUDNESS = (1.0, 1.5, 2.0, 3.0, 5.0)
RECURRENCES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
EPSILONS = (0.0, 1.0, 10.0, 100.0, 1000.0)
"""Times the variance of what is normalised."""
GAINS = (0.3, 0.1, 0.05, 0.02, 0.005)


def _skips() -> Iterator[tuple[str, str, Plant]]:
    for model in ("pre-norm decoder 3", "post-norm decoder 3", "pre-norm decoder 6", "post-norm decoder 6"):
        yield from ((model, f"skips x {skip:g}", faults.attribute("skip", skip)) for skip in SKIPS)


def _branches() -> Iterator[tuple[str, str, Plant]]:
    for model in ("pre-norm decoder 6", "post-norm decoder 3", "post-norm decoder 6"):
        yield from (
            (model, f"branches x {factor:g}", faults.attribute("scale", factor)) for factor in LOUDNESS
        )


def _recurrences() -> Iterator[tuple[str, str, Plant]]:
    for model in (
        "tanh rnn on rows, T=16",
        "tanh rnn on rows, T=24",
        "lstm on rows, T=24",
        "gru on rows, T=64",
    ):
        for factor in RECURRENCES:
            yield model, f"recurrence x {factor:g}", faults.recurrent_weights(factor)


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


def _constants() -> Iterator[tuple[str, str, Plant]]:
    for model in ("pre-norm decoder 3", "pre-norm decoder 6", "residual mlp 20"):
        for value in (1.0, 0.1, 0.03, 0.01, 0.003, 0.001, 1e-4):
            yield model, f"branches x {value:g}", faults.attribute("scale", value)


def _saturations() -> Iterator[tuple[str, str, Plant]]:
    """Behind norms, which hold the signal: with skips and without, the first of two layers times a factor."""
    for model in ("residual mlp 10", "pre-norm decoder 6"):
        for activation in (nn.Tanh, nn.Sigmoid):
            for skip in (1.0, 0.0):
                for factor in (1.0, 4.0, 10.0, 30.0, 100.0):
                    name = f"{activation.__name__}, skips x {skip:g}, weights x {factor:g}"
                    yield model, name, _bounded(activation, skip, factor)


def _bounded(activation: type[nn.Module], skip: float, factor: float) -> Plant:
    def plant(model: nn.Module) -> None:
        faults.exchange((nn.ReLU, nn.GELU), activation)(model)
        faults.attribute("skip", skip)(model)
        for sequence in model.modules():
            if isinstance(sequence, nn.Sequential):
                for layer, following in pairwise(sequence):
                    if isinstance(following, activation):
                        layer.weight.mul_(factor)

    return plant


def _shifts() -> Iterator[tuple[str, str, Plant]]:
    for model in ("batch-normalised cnn 6", "batch-normalised cnn 10", "residual cnn 4"):
        for value in (0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0):

            def plant(model: nn.Module, value: float = value) -> None:
                for norm in faults.norms(model):
                    nn.init.constant_(norm.bias, value)

            yield model, f"shifts of {value:g}", plant


def _growth(flow: Flow) -> float:
    return growth(flow.horizon) if flow.horizon else float("nan")


def _share(flow: Flow) -> float:
    found = own(flow)
    return found.ratio if found else float("nan")


GRIDS: dict[str, tuple[Callable[[], Iterator[tuple[str, str, Plant]]], Callable[[Flow], float]]] = {
    "skip": (_skips, _share),
    "loud": (_branches, _share),
    "recurrence": (_recurrences, _growth),
    "epsilon": (_epsilons, lambda flow: median(n.kept for n in flow.normalisations)),
    "attention": (_logits, lambda flow: median(a.spread for a in flow.attentions)),
    "gain": (_gains, lambda flow: median(n.gain for n in flow.normalisations)),
    "constant": (_constants, lambda flow: median(s.forward_ratio for s in flow.splits.values())),
    "saturated": (_saturations, lambda flow: median(a.saturated for a in flow.activations)),
    "shift": (_shifts, lambda flow: median(a.mean_derivative for a in flow.activations)),
}
"""The rows, and what is measured."""


def rows(grid: str) -> Iterator[str]:
    models: dict[str, Case] = {}
    for case in cases():
        models.setdefault(model_of(case), case)
    planted, measured = GRIDS[grid]
    for name, fault, plant in planted():
        case = replace(models[name], plant=plant)
        model, loss = case.build(0, faulty=True).train(), case.loss(0)
        flow = along_time(measure(model, loss), model, loss)
        score = train(case, case.build(0, faulty=True), 0)
        yield (
            f"{name:24} {fault:24} measured {measured(flow):7.3f}  {flow.lost:+5.2f} decades  "
            f"accuracy {score:.3f} (guessing {case.task().chance:.3f})"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for grid in sys.argv[1:] or GRIDS:
        for row in rows(grid):
            print(row, flush=True)
