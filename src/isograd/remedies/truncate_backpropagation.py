"""truncate-backpropagation: the gradient of a recurrence goes back k steps at most.

What it does
    Asks the training to cut sequences into chunks of k steps and to carry the state over detached. k is the number of
    steps after which the spectral radius r of the recurrent matrix leaves a hundredth of the gradient, or has made it
    a hundred times as large.

When it helps
    An exploding recurrence: growth is bounded by r^k. A fading one: steps beyond k contributed less than a hundredth
    and cost as much as the others.

Expected effect
    Growth along time of at most 2 decades; memory and time of a step fall from T to k.

Safety
    Safe for the model, which is not touched; the training changes: what lies more than k steps back is not learned.

References
    Williams and Peng 1990; Pascanu et al. 2013, arXiv:1211.5063, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from isograd.edit import Edit
from isograd.layers import steps_of
from isograd.prescription import Patient, Prescription, Reach, Safety, not_applicable

SLUG = "truncate-backpropagation"
TREATS = ("RN602",)
LEFT = 0.01
"""What counts as gone, or its inverse as too much."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Chunks of the length over which the plain recurrences of the model carry a gradient."""
    modules = {n: m for n, m in patient.model.named_modules() if isinstance(m, nn.RNN | nn.RNNCell)}
    if not modules:
        yield not_applicable(
            SLUG, "there is no nn.RNN or nn.RNNCell: what a gated step keeps depends on the data"
        )
        return
    radius, name = max((_radius(m), n) for n, m in modules.items())
    module = modules[name]
    steps = steps_of(patient.flow, name, module)
    if radius == 0:
        yield not_applicable(SLUG, "the recurrent matrix is nilpotent: nothing is carried over")
        return
    k = max(math.ceil(math.log(LEFT) / -abs(math.log(radius))), 1) if abs(math.log(radius)) > 1e-9 else steps
    if k >= steps:
        yield not_applicable(
            SLUG, f"a spectral radius of {radius:.3g} carries the gradient over all {steps} steps"
        )
        return
    yield Prescription(
        SLUG,
        f"back-propagation through {k} of {steps} steps",
        (Edit("truncate", "configure", arguments={"value": k}, before=f"{steps} steps"),),
        safety=Safety.SAFE,
        reach=Reach.TRAINING,
        treats=TREATS,
        expected=f"a factor of {radius**k:.2g} over {k} steps by the spectral radius {radius:.3g}",
        references=("Pascanu et al. 2013, arXiv:1211.5063",),
        advice=(f"for chunk in x.split({k}, time): output, h = rnn(chunk, h.detach())",),
    )


@torch.no_grad()
def _radius(module: nn.Module) -> float:
    weights = [p for n, p in module.named_parameters() if "weight_hh" in n and p.ndim == 2]
    return max((float(torch.linalg.eigvals(w.double()).abs().max()) for w in weights), default=0.0)
