"""One forward and one backward, renormalised at every backbone node: model, loss -> Flow."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from isograd.flow import Flow
from isograd.graph.assembly import Assembly
from isograd.graph.backbone import Backbone, backbone
from isograd.graph.backward import Backward
from isograd.graph.preserve import drawn, preserved
from isograd.graph.strangers import held, strangers, told
from isograd.graph.traced import Loss, Traced, independent, traced
from isograd.statistics import Failure

DRAWS = 4
"""Further draws of dropout and of dropped branches that are looked at where one lets exactly nothing through: with two
samples, one that drops three tenths does so in three draws of eight, and no network is sick for it."""


def measure(model: nn.Module, loss: Loss, *, optimizer: torch.optim.Optimizer | None = None) -> Flow:
    """Measure the gradient along the backbone of `loss(model)` with one forward and one backward.

    Args:
        model: any module; `torch.compile` and data-parallel wrappers are taken off, and that is noted.
        loss: `loss(model)` returns a tensor with one element that depends on the model's parameters.
        optimizer: tells the size of the first update of every parameter; without it that is unmeasured.

    The model is left as it was: parameters, `.grad`, buffers, train/eval mode and random generators.
    A forward that raises is the caller's error and passes through; a backward that raises is a reading
    (`Flow.failure`).

    Raises:
        TypeError: the model is no module, or the loss returns no tensor.
        ValueError: the loss has more than one element or depends on nothing that can be trained.
    """
    flow, drew = _once(model, loss, optimizer)
    for seed in range(DRAWS if drew and _nothing(flow) else 0):
        with preserved(model):
            torch.manual_seed(seed)
            again, _ = _once(model, loss, optimizer)
        if not _nothing(again):
            return again
    return flow


def _nothing(flow: Flow) -> bool:
    """Does exactly nothing come through along one of the lines?"""
    return any(line.lost == -math.inf for line in (flow, *flow.towers))


def _once(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer | None) -> tuple[Flow, bool]:
    """What one forward and backward measure, and whether the forward drew random numbers."""
    before = drawn()
    with traced(model, loss) as run:
        drew = any(not torch.equal(a, b) for a, b in zip(before, drawn(), strict=False))
        trainable = {id(p) for p in run.model.parameters() if p.requires_grad}
        if not any(id(getattr(node, "variable", None)) in trainable for node in run.graph.order):
            raise ValueError(
                independent(
                    run.model, "it was computed from other weights; use the model that loss(model) is given"
                )
            )
        passed = Backward(run.graph, run.line, run.value.device)
        grads, failure = _gradients(run, passed)
        flow = Assembly(run, _towers(run), passed, grads, failure, optimizer).flow()
        groups = [] if optimizer is None else optimizer.param_groups
        known = {*map(id, run.model.parameters()), *(id(p) for group in groups for p in group["params"])}
        if found := strangers(run.graph.order, known):
            lost = held(run.model, found)
            flow = replace(flow, unregistered=tuple(lost.values()))
            found = [p for p in found if id(p) not in lost]
        if found:
            nobody = "no parameters of the model" + (" nor of the optimizer" if groups else "")
            flow = replace(flow, unexamined=flow.unexamined | {"parameters": told(found, nobody)})
        return flow, drew


def _towers(run: Traced) -> list[Backbone]:
    """Backbones of further inputs that lead through layers of their own."""
    found: list[Backbone] = []
    for sink in run.sinks[1:]:
        call = run.trace.made[sink].call
        if run.trace.given and not call.user_input and call.kind != "embedding":
            continue  # what the model made itself, such as a table of positions
        other = backbone(run.graph, run.trace, sink)
        if all(_adds(other, known) for known in (run.line, *found)):
            found.append(other)
    return found


def _adds(other: Backbone, main: Backbone) -> bool:
    """Does this input's backbone go through layers that the main one does not?"""
    known = {node for segment in main.segments for node in segment.nodes}
    own = [s for s in other.segments[other.exit :] if s.weighted and s.nodes[0] not in known]
    return len(own) >= 2


def _gradients(run: Traced, passed: Backward) -> tuple[dict[str, Tensor | None], Failure | None]:
    """Gradients of all parameters, rescaled."""
    named = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
    wanted = [p for _, p in named] + run.trace.opened
    made = run.trace.made
    found, failure = passed.run(run.value, wanted, lambda node: node in made and made[node].shape is not None)
    if failure is not None:
        # Where it stopped: the last operation whose gradient was read before it raised.
        sources = [made[n].call.source for n in reversed(passed.fired) if n in made]
        return {}, replace(failure, source=next(filter(None, sources), ""))
    return {name: grad for (name, _), grad in zip(named, found, strict=False)}, None
