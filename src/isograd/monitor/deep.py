"""Now and then a step is looked at from inside: its flow along the backbone, with its own batch.

The loss is not known to the monitor, but its gradient at the model's outputs is: with that as cotangent the
backward is the user's own. So the step's forward and backward are repeated on the side, once, by
`isograd.measure`, with the random state of the first: the same dropout, the same gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from isograd.flow import Flow
from isograd.graph.operations import ACTIVATIONS
from isograd.measure import measure
from isograd.monitor.call import Call, Staying
from isograd.monitor.names import ADDED
from isograd.monitor.sharding import is_sharded
from isograd.statistics import Site

SAMPLES = 8
"""A unit that is off half of the time is off in 8 samples by chance once in 256."""


def repeatable(model: nn.Module) -> tuple[nn.Module, str]:
    """The module inside the wrappers of a model, and why its forward cannot be repeated on the side; '' where it can."""
    refused = "the model is compiled: hooks would compile it again" if hasattr(model, "_orig_mod") else ""
    while isinstance(inner := getattr(model, "module", None), nn.Module):  # DDP: no reduction on the side
        if isinstance(model, nn.DataParallel):
            refused = "replicas of a data-parallel model (DataParallel) cannot be looked at one by one"
        model = inner
    if any(is_sharded(p) for p in model.parameters()):
        refused = "the model is sharded"
    return model, refused


def in_parts(model: nn.Module) -> bool:
    """It has no forward of its own: a script calls what is in it."""
    return type(model).forward is nn.Module.forward


class Deep:
    """Keeps one step's batch and cotangent, and measures its flow.

    Attributes:
        every: measure every so many steps; None: none.
        last: the flow that was measured last.
        refused: why this model cannot be looked at; '' where it can.
    """

    def __init__(self, model: nn.Module, every: int | None = None) -> None:
        self.every = every
        self.last: Flow | None = None
        self._flow: Flow | None = None
        self._model, self.refused = repeatable(model)
        if not self.refused and in_parts(self._model):
            self.refused = "the script calls the parts one by one: there is no forward of the whole to repeat"
        self._handles: list[Any] = []
        self._call: Call | None = None

    def _due(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0

    def prepare(self, step: int) -> None:
        """Keep the batch of a step that is to be looked at."""
        if not self._due(step) or self.refused or self._handles:
            return
        self._handles = [
            self._model.register_forward_pre_hook(Staying(self._before), with_kwargs=True, prepend=True),
            self._model.register_forward_hook(Staying(self._after)),
        ]

    def stepping(self, step: int) -> None:
        """Look at the step from inside, if it is its turn."""
        if self._due(step) and self._flow is None:
            self._flow = self._measured()
            self.last = self._flow or self.last

    def taken(self) -> Flow | None:
        """What was seen in the step that ends."""
        seen, self._flow = self._flow, None
        return seen

    def _measured(self) -> Flow | None:
        """The flow of the step whose backward has ended; None if its batch was not seen."""
        call = self._call
        self.disarm()
        if call is None or not call.cotangents:
            return None
        with torch.enable_grad():
            return measure(self._model, call.loss()[0])

    def disarm(self) -> None:
        """Let go of the batch and of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._call = [], None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():  # no validation pass
            self._call = Call(module, args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled() and self._call is not None:
            self._call.returned(output)


def dead_units(flow: Flow) -> dict[str, float]:
    """Share of units whose derivative is zero for every sample, by the last parameter (its bias, mostly) of
    the layer that feeds them.

    Counted of functions that pass nothing on one side. Where a layer feeds several, the largest share is told.
    """
    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seen in flow.activations:
        if not ACTIVATIONS[seen.function].bounded and seen.samples >= SAMPLES:
            shares[seen.site.name, seen.site.source].append(seen.dead)
    found: dict[str, float] = {}
    feeding = ""
    for site in _forward(flow):
        if site.parameters:
            feeding = ".".join(part for part in site.parameters[-1].split(".") if part not in ADDED)
        waiting = shares.get((site.name, site.source))
        if waiting and feeding:
            found[feeding] = max(waiting.pop(0), found.get(feeding, 0.0))
    return found


def _forward(flow: Flow) -> Iterator[Site]:
    """The backbone from the input on, with what happens inside each segment before the site that ends it."""
    for depth, site in enumerate(flow.sites):
        for step in reversed(flow.ledgers.get(depth, ())):
            if step.site != site:
                yield step.site
        yield site
