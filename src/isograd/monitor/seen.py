"""What the detectors look at: one reading in logarithms, and the short memory that all of them share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from statistics import median

import torch
from torch import Tensor

from isograd.monitor.reading import ADDED_UP, Reading

LARGEST_SCALE = 1e4
"""Inputs of a layer beyond this are not read off its gradients: before a batch normalisation the gradient of a
bias is zero up to rounding, and the quotient is noise."""


@dataclass(frozen=True)
class Seen:
    """One reading. Norms are log10, shape (matrix,); nan: not measured, -inf: exactly zero."""

    step: int
    loss: float
    grad_norm: float
    """log10 of the global norm."""
    update_norm: float
    """log10 of the length of the whole step that followed; nan: not measured."""
    names: tuple[str, ...]
    """The weight matrices, in the order of the model's parameters: input side first, mostly."""
    grad: Tensor
    weight: Tensor
    update: Tensor
    """log10 of update norm over weight norm."""
    scale: Tensor
    """log10 rms of what the layer multiplies, read off its gradients (see `Plan.scale`)."""
    sites: tuple[str, ...]
    dead: Tensor
    """Share of a layer's units without gradient, at the site of its bias, shape (site,); nan: not known."""
    counted: bool
    """Any share of dead units may be known."""
    inside: Tensor | None
    """Where that was counted by a look from inside, over all samples and positions; None: nowhere."""
    rest: Tensor
    """log10 of the gradients of the parameters that are no matrix."""
    rates: tuple[float, ...]
    """Learning rates, one an optimizer."""
    absent: Tensor
    """Parameters that got no gradient in this step, shape (site,); and"""
    missing: int
    """how many they are."""
    uncleared: bool
    """It began with the gradients of the step before."""
    idle: Tensor
    """Matrices among them that an optimizer holds for training: on a full reading their weight is known; (matrix,)."""
    chain: tuple[int, ...]
    """Places among the matrices of those that lie one behind the other."""
    passed: float
    """log10 of what the optimizer was left of the gradient norm, as by clipping; nan: not measured."""
    spoilt: str
    """A parameter that this step has left with values that are not finite; "": none."""

    @property
    def silent(self) -> bool:
        """Is there no gradient in any parameter but the matrices?"""
        return bool((self.rest.nan_to_num(-math.inf, neginf=-math.inf) == -math.inf).all())

    @property
    def elasticity(self) -> Tensor:
        """log10 of gradient norm times weight norm: the change of the loss with the relative change of a layer.

        Unchanged where a factor moves from one layer into the next (W c, W'/c through ReLU).
        """
        return self.grad + self.weight


def seen(readings: Sequence[Reading]) -> list[Seen]:
    """Readings that are `alike`, in logarithms: as many operations as for one. Only what is finite may come here."""
    if not readings:
        return []
    first = readings[0]
    plan = _plan(first.sites, first.shapes)
    missing = torch.full((len(first.sites),), math.nan)
    columns = [[reading.columns.get(name, missing) for reading in readings] for name in NORMS]
    stacked = torch.stack([torch.stack(column) for column in columns]).double()  # (norm, reading, site)
    # What has no gradient does not move; what was not measured leaves the whole unknown.
    lengths = stacked[2].square().masked_fill_(stacked[0].isnan(), 0.0).sum(1).tolist()
    absent = stacked[0].isnan()
    counts = absent.sum(1).tolist()
    there = torch.tensor(["weight_norm" in reading.columns for reading in readings])
    spoilt = stacked[0].isfinite() & ~stacked[1].isfinite() & there[:, None]  # (reading, site)
    places = torch.where(spoilt.any(1), spoilt.int().argmax(1), -1).tolist()
    norms = stacked.log10_()
    grad, (by_matrix, weight, update) = norms[0], norms[:, :, plan.matrices]
    idle = by_matrix.isnan() & ~weight.isnan()
    update = (update - weight).masked_fill_(idle, math.nan)
    rates = [name for name in first.scalars if RATE.fullmatch(name)]
    totals = [reading.scalars.get("grad_norm", math.nan) for reading in readings]
    rows = zip(
        readings,
        totals,
        lengths,
        grad,
        by_matrix,
        weight,
        update,
        plan.scale(grad),
        absent,
        counts,
        idle,
        places,
        strict=True,
    )
    return [
        Seen(
            reading.step,
            reading.scalars.get("loss", math.nan),
            math.log10(total) if total > 0 else _summed(all_grads),
            math.log10(length) / 2 if length > 0 else -math.inf if length == 0 else math.nan,
            plan.names,
            grads,
            weights,
            updates,
            scales,
            reading.sites,
            *_dead(reading, plan),
            all_grads[plan.rest],
            tuple(reading.scalars[name] for name in rates),
            none,
            count,
            ADDED_UP in reading.notes,
            waits,
            plan.chain,
            _passed(reading),
            reading.sites[bad] if bad >= 0 else "",
        )
        for reading, total, length, all_grads, grads, weights, updates, scales, none, count, waits, bad in rows
    ]


def alike(readings: Iterable[Reading]) -> Iterator[list[Reading]]:
    """Runs of readings with the same columns of the same parameters, and the same scalars."""
    for _, run in groupby(
        readings, lambda reading: (reading.sites, reading.shapes, *reading.columns, *reading.scalars)
    ):
        yield list(run)


RATE = re.compile(r"lr(_\d+)?")
"""Name of a learning rate among the scalars."""
NORMS = ("grad_norm", "weight_norm", "update_norm")


@dataclass(frozen=True)
class Plan:
    """Where in the columns what is: the same for every step of a run."""

    names: tuple[str, ...]
    matrices: Tensor
    """Sites of two dimensions and more; every site where the shapes are not known."""
    rest: Tensor
    biases: Tensor
    """Site of each matrix's bias; -1: it has none."""
    fan_in: Tensor
    """log10 of the root of the inputs that each output sums over."""
    units: Tensor
    """Length of the bias of a matrix, at its site; nan at all others."""
    chain: tuple[int, ...]
    """Among the matrices, the most that lie one behind the other, as far as names and shapes tell."""

    def scale(self, grad: Tensor) -> Tensor:
        """log10 rms of the inputs of each layer: ||dW|| / (||db|| sqrt(fan-in)); nan without a bias.

        dW is the sum of delta x^T over the samples and db that of delta, so that their quotient is the norm of x
        where the samples' deltas do not cancel. No activation is read.
        """
        values = grad[..., self.matrices] - grad[..., self.biases] - self.fan_in
        kept = (self.biases >= 0) & (values.abs() < math.log10(LARGEST_SCALE))
        return torch.where(kept, values, math.nan)


@lru_cache(maxsize=4)
def _plan(sites: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> Plan:
    kept = [i for i in range(len(sites)) if not shapes or len(shapes[i]) > 1]
    places = {name: i for i, name in enumerate(sites)} if shapes else {}
    biases = [places.get(sibling(sites[i]), -1) for i in kept]
    fed = set(biases)
    # Keras has the inputs of a kernel before its outputs.
    inputs = [slice(-1) if sites[i].endswith("kernel") else slice(1, None) for i in kept]
    fan_in = [math.prod(shapes[i][part]) if shapes else 1 for i, part in zip(kept, inputs, strict=True)]
    return Plan(
        tuple(sites[i] for i in kept),
        torch.tensor(kept, dtype=torch.long),
        torch.tensor(sorted(set(range(len(sites))) - set(kept)), dtype=torch.long),
        torch.tensor(biases, dtype=torch.long),
        torch.tensor(fan_in, dtype=torch.float64).log10() / 2,
        torch.tensor(
            [float(shapes[i][0]) if i in fed and len(shapes[i]) == 1 else math.nan for i in range(len(sites))]
        ),
        _chain([sites[i] for i in kept], [shapes[i] for i in kept] if shapes else []),
    )


def _chain(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest run of matrices without a second beginning.

    A network beside another, as an actor and its critic have it, is a module with a name of its own whose first matrix
    fits what the very first is fed with, and not what comes out of the one before it.
    """
    parts: list[list[int]] = [[]]
    for i, shape in enumerate(shapes):
        before = shapes[i - 1]
        if i and shape[1:] == shapes[0][1:] and shape[1] != before[0] and _apart(names[i - 1], names[i]):
            parts.append([])
        parts[-1].append(i)
    return tuple(max(parts, key=len)) if shapes else tuple(range(len(names)))


def _apart(one: str, other: str) -> bool:
    """Do these belong to different modules that have others within, and names that are no numbers?"""
    first, second = one.split("."), other.split(".")
    depth = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    return all(len(path) > depth + 2 and not path[depth].isdigit() for path in (first, second))


def sibling(name: str) -> str:
    """Name of the bias that belongs to a weight; "": it is no weight by its name."""
    head, _, last = name.rpartition(".")
    if last.endswith("/kernel"):
        return f"{head}{'.' * bool(head)}{last.removesuffix('kernel')}bias"
    return f"{head}{'.' * bool(head)}{last.replace('weight', 'bias')}" if "weight" in last else ""


def _passed(reading: Reading) -> float:
    """What is written to gradients after the backward is noticed, and its norm taken on steps that are read in full."""
    raw, clipped = (reading.scalars.get(name, math.nan) for name in ("grad_norm", "clipped_norm"))
    if math.isnan(clipped):
        return 0.0 if "update_norm" in reading.columns else math.nan
    if not clipped > 0 or not raw > 0:
        return -math.inf if raw > 0 else math.nan
    return min(math.log10(clipped / raw), 0.0)


def _dead(reading: Reading, plan: Plan) -> tuple[Tensor, bool, Tensor | None]:
    """A unit is dead where its bias gets a gradient of exactly zero; counted activations are better."""
    zeros = reading.columns.get("zeros")
    dead = torch.full_like(plan.units, math.nan) if zeros is None else zeros / plan.units
    counted = reading.columns.get("dead")
    if counted is None:
        return dead, zeros is not None, None
    inside = ~counted.isnan()
    return torch.where(inside, counted, dead), True, inside


def _summed(logs: Tensor) -> float:
    """log10 of the norm of all, from the log10 of the norm of each."""
    logs = logs[~logs.isnan()]
    if not len(logs) or not logs.max().isfinite():
        return -math.inf if len(logs) else math.nan
    return float(torch.logsumexp(2 * math.log(10) * logs, 0)) / (2 * math.log(10))


def spread(values: Sequence[float]) -> float:
    """1.4826 times the median absolute deviation: the standard deviation, were they normal."""
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values)


def finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def nonfinite(readings: Sequence[Reading]) -> list[Tensor | None]:
    """Of readings that are `alike`, the NaN or Inf elements of each gradient; None where all is finite, the loss too."""
    found: list[Tensor | None] = [
        None if math.isfinite(reading.scalars.get("loss", 0.0)) else torch.zeros(len(reading.sites))
        for reading in readings
    ]
    for name in ("grad_norm", "nonfinite"):
        if name not in readings[0].columns:
            continue
        values = torch.stack([reading.columns[name] for reading in readings])  # (reading, site)
        broken = values.isinf() if name == "grad_norm" else values > 0
        for i in broken.any(1).nonzero().flatten().tolist():
            found[i] = broken[i].float() if name == "grad_norm" else values[i].nan_to_num(0.0)
    return found
