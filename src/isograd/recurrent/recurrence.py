"""The matrices that multiply a state again and again: their spectral radius, and how far their gates are open."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isograd.recurrent.unrolled import Unrolled

LARGEST = 2048
"""Rows of a matrix whose eigenvalues are computed: a few seconds."""


@dataclass(frozen=True, slots=True)
class Recurrence:
    """One recurrent matrix of a model. What was not measured is NaN."""

    name: str
    """The parameter: `rnn.weight_hh_l0`."""
    kind: str
    """LSTM, GRU, RNN, or 'loop' for what the user wrote."""
    hidden: int
    steps: int
    """How often it was multiplied by."""
    radius: float
    """Largest magnitude of an eigenvalue. Of an LSTM or GRU, that of the block that makes the new state."""
    norm: float
    """Largest singular value of the same matrix."""
    gate: float
    """Mean of the gate that keeps the state: forget gate of an LSTM, update gate of a GRU."""
    gate_widest: float
    """That of the unit that keeps most, over batch and steps."""
    memory: float
    """Geometric mean over the steps of the gate: what one step leaves of the state of a typical unit."""
    passes_most: float
    """What the unit that lets most pass lets into the state and out again of what is new at a step, over batch and steps:
    input gate times output gate of an LSTM, 1 less the update gate of a GRU."""


def recurrences(model: nn.Module, seen: Unrolled) -> tuple[Recurrence, ...]:
    """Those that a forward pass under `Unrolled` has used, in the order in which they began."""
    names = {id(p): name for name, p in model.named_parameters()}
    lengths = {e.shape[e.axis] for e in seen.entrances}
    found: list[Recurrence] = []
    for key, use in seen.uses.items():
        weight = use.weight.detach()
        if (
            weight.ndim > 2 and use.steps not in lengths
        ):  # a convolution that is used for several layers, not for steps
            continue
        if use.kernel is not None:
            weight = weight.chunk(use.kernel.blocks)[use.kernel.candidate]
        gate, widest, memory, passing = math.nan, math.nan, math.nan, math.nan
        if use.gates:
            gates = torch.stack(use.gates).double()  # (step, unit)
            gate, widest = float(gates.mean()), float(gates.mean(0).max())
            memory = float(gates.log().mean().exp())
            passing = float(torch.stack(use.passing).double().mean(0).max())
        radius, norm = _spectrum(weight)
        name = names.get(key, "a matrix that is no parameter")
        found.append(
            Recurrence(name, use.kind, use.hidden, use.steps, radius, norm, gate, widest, memory, passing)
        )
    return tuple(found)


def _spectrum(weight: Tensor) -> tuple[float, float]:
    """Spectral radius and norm; a vector stands for a diagonal matrix."""
    if weight.ndim < 2:
        largest = float(weight.abs().max())
        return largest, largest
    if weight.ndim > 2:  # a convolution: what it multiplies by depends on the size of the picture
        return math.nan, math.nan
    rows, columns = weight.shape
    if rows != columns or rows > LARGEST:  # a projected state, or a matrix for state and input together
        return math.nan, math.nan
    exact = weight.double().cpu()
    return float(torch.linalg.eigvals(exact).abs().max()), float(torch.linalg.matrix_norm(exact, 2))
