"""The whole diagnosis in one call: measure, examine, and test the causes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from isograd.causes import explained
from isograd.diagnosis import Diagnosis, diagnose
from isograd.flow import Flow
from isograd.graph.traced import Loss, unwrapped
from isograd.measure import measure
from isograd.recurrent.along import horizon_of_loss
from isograd.symptoms.mixed_samples import mixing


def check(
    model: nn.Module,
    loss: Loss,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    select: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> Diagnosis:
    """Diagnose a model from one batch.

    One forward and one backward measure the gradient along the backbone; where something recurs in the
    model, one more of each, in which it runs step by step, measure it along time. For each error found, the
    candidate causes are then tried on a copy of the model, one forward and one backward each, and the
    decades that each gives back are reported.

    Args:
        model: any module. It is left bitwise as it was.
        loss: `loss(model)` returns the loss of one batch as a tensor with one element.
        optimizer: lets the size of the first updates be examined; without it they are unexamined.
        select: code prefixes or names of the findings to keep; all by default.
        ignore: code prefixes or names of the findings to drop.

    Raises:
        TypeError, ValueError: see `measure`. An error in the model's own forward passes through.

    Example:
        >>> diagnosis = isograd.check(model, lambda m: cross_entropy(m(x), y))
        >>> diagnosis.verdict
        'vanishing'
    """
    flow = along_time(measure(model, loss, optimizer=optimizer), model, loss)
    diagnosis = diagnose(flow).narrowed(select, ignore)
    return explained(diagnosis, unwrapped(model)[0], loss)


def along_time(flow: Flow, model: nn.Module, loss: Loss) -> Flow:
    """The flow with a horizon, where something recurs in the model and time can be told."""
    if not flow.loops or flow.failure is not None or flow.nonfinite is not None:
        return flow
    if mixing(flow):
        return replace(flow, unexamined=flow.unexamined | {"time": "it runs over the samples: see RN604"})
    try:
        found = horizon_of_loss(model, loss, probes=1)
    except (TypeError, ValueError, RuntimeError) as error:  # time is one part of the diagnosis, not all of it
        fused = "time" in flow.unexamined
        return replace(flow, unexamined=flow.unexamined | {"time": str(error)}) if fused else flow
    if not found.recurrences:  # a line of code that runs once for every layer
        return flow
    rest = {subject: why for subject, why in flow.unexamined.items() if subject != "time"}
    return replace(flow, horizon=found, unexamined=rest)
