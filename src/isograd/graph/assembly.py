"""The flow of one measurement, put together from its numbers and its graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from isograd.flow import Flow
from isograd.graph.attending import attentions, choices
from isograd.graph.backbone import Backbone, Segment, step_site
from isograd.graph.backward import Backward
from isograd.graph.gates import abreast, gates
from isograd.graph.operations import STEPS, operation_of
from isograd.graph.origin import first_nonfinite
from isograd.graph.readings import Readings, log10
from isograd.graph.traced import Traced
from isograd.optimizers import first_update
from isograd.statistics import (
    Activation,
    Failure,
    InputStatistics,
    LossCall,
    ModuleSignal,
    Normalisation,
    Parameter,
    Site,
    Split,
    Step,
)


class Assembly:
    """One forward and backward that have run, and all that a `Flow` says about them."""

    def __init__(
        self,
        run: Traced,
        towers: Sequence[Backbone],
        passed: Backward,
        grads: dict[str, Tensor | None],
        failure: Failure | None,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self.run, self.towers, self.passed, self.grads, self.failure = run, towers, passed, grads, failure
        self.trace, self.main = run.trace, run.line
        self.read = Readings(run, passed, grads)
        self.logs, self.rms = self.read.logs, self.read.rms
        self._answering = _answering(run)
        self._felt = run.graph.below(run.graph.order[0], without=_steps(run))
        """Nodes that some gradient reaches which no step function has made zero."""
        self._accumulators = {id(n.variable): n for n in run.graph.order if hasattr(n, "variable")}  # pyright: ignore
        self._scales = self._parameter_scales()
        self._updates = first_update(optimizer, run.model, grads, self._scales)

    def flow(self) -> Flow:
        """Everything measured."""
        read, trace, segments = self.read, self.trace, self.main.segments
        depth = len(segments) - 1
        bad = any(not math.isfinite(length) for length, _ in read.gradients.values())
        return Flow(
            sites=_sites(self.main),
            columns=self._columns(self.main),
            splits={
                depth - i: Split(
                    _ratio(skip, self.passed.entering(i)),
                    _ratio(branch, self.passed.entering(i)),
                    self._forward_ratio(segments[i], segments[i + 1]),
                    segments[i].projected,
                )
                for i, (skip, branch) in read.splits.items()
            },
            ledgers={depth - i: steps for i, s in enumerate(segments[:-1]) if (steps := self._ledger(i, s))},
            activations=tuple(
                self._activation(a, values)
                for a, values in zip(trace.activations, read.activations, strict=True)
                if a.node in self.run.graph.children
            ),
            normalisations=self._normalisations(),
            attentions=attentions(self.run, self.read),
            choices=choices(self.run, self.read),
            parameters=self._parameters(),
            modules=self._modules(),
            layers=_layers(self.main),
            loss=read.loss,
            losses=tuple(
                self._loss(call, values) for call, values in zip(trace.losses, read.losses, strict=True)
            ),
            cuts=trace.cuts.of(self._lost()),
            cut=bool(trace.given) and not any(m.call.user_input for m in trace.made.values()),
            calls=max(trace.calls, 1),
            outputs=tuple(step_site(trace.made[n]) for n in dict.fromkeys(trace.results) if n in trace.made),
            towers=tuple(
                Flow(sites=_sites(other), columns=self._columns(other), layers=_layers(other))
                for other in self.towers
            ),
            inputs={name: InputStatistics(*values) for name, values in read.inputs.items()},
            nonfinite=first_nonfinite(self.run, self.passed, self.rms, reached=bad),
            failure=self.failure,
            notes=tuple(self.run.notes),
            unexamined=self._unexamined(),
        )

    def _columns(self, line: Backbone) -> dict[str, Tensor]:
        """Forward order: input first."""
        logs = [self._level(segment) for segment in line.segments]
        below = [*logs[1:], math.nan]
        decades = [
            math.nan if i < line.exit or math.isinf(a) else b - a
            for i, (a, b) in enumerate(zip(logs, below, strict=True))
        ]
        rms = [
            max((self.rms[n] for n in s.outlets if n in self.rms), default=math.nan)
            if s.outlets
            else next((self.rms[n] for n in s.nodes if n in self.rms), math.nan)
            for s in line.segments
        ]
        forward = [_ratio(a, b) for a, b in zip(rms, [*rms[1:], math.nan], strict=True)]
        columns = {
            "grad_norm_log10": logs,
            "gain": [math.inf if d >= 300 else 10**d for d in decades],
            "decades": decades,
            "activation_rms": rms,
            "distinct": self._shares(line, self.read.distinct),
            "varying": self._shares(line, self.read.varying),
            "forward_gain": forward,
            "weighted": [float(s.weighted and i >= line.exit) for i, s in enumerate(line.segments)],
        }
        return {name: torch.tensor(c[::-1], dtype=torch.float64) for name, c in columns.items()}

    def _shares(self, line: Backbone, sizes: Mapping[Node, float]) -> list[float]:
        """Of the signal at each site, how much of it a part of these sizes is."""
        return [
            next((_ratio(sizes[n], self.rms[n]) for n in segment.nodes if n in sizes), math.nan)
            for segment in line.segments
        ]

    def _level(self, segment: Segment) -> float:
        """log10 of the gradient norm at a segment's output; of several outlets, of their gradients together."""
        if not segment.outlets:
            return self.logs.get(segment.nodes[0], math.nan)
        levels = [self.logs[n] for n in segment.outlets if n in self.logs]
        top = max(levels, default=math.nan)
        if not math.isfinite(top):
            return top
        return top + 0.5 * math.log10(sum(10 ** (2 * (level - top)) for level in levels))

    def _forward_ratio(self, segment: Segment, following: Segment) -> float:
        """rms(branch) / rms(stream)."""
        stream = next((self.rms[n] for n in following.nodes if n in self.rms), math.nan)
        branch = math.nan
        for node in [segment.branch, *segment.spine] if segment.branch is not None else []:
            if node in self.rms:
                branch = self.rms[node]
                break
        return _ratio(branch, stream)

    def _ledger(self, index: int, segment: Segment) -> tuple[Step, ...]:
        """The calls inside a segment, output side first, with what each costs where that is one number."""
        top = self._level(segment)
        spine = [n for n in segment.spine if n in self.logs]
        chosen = spine or [n for n in segment.inside if n in self.logs and n in self.rms]
        if not chosen:
            return ()
        levels = [self.logs[n] - top for n in chosen]
        costs = [math.nan] * len(chosen)
        if spine and index in self.read.splits:
            last = log10(_ratio(self.read.splits[index][1], self.passed.entering(index)))
            costs = [b - a for a, b in zip(levels, [*levels[1:], last], strict=True)]
        return tuple(
            Step(step_site(self.trace.made[n]), level, cost, self.rms.get(n, math.nan), bool(spine))
            for n, level, cost in zip(chosen, levels, costs, strict=True)
        )

    def _activation(self, seen: Any, values: list[float]) -> Activation:
        mean, saturated, dead = values
        for segment in self.main.segments:
            if seen.node in segment.nodes:
                site = segment.site
                return Activation(site, seen.function, True, mean, saturated, dead, seen.units, seen.samples)
        site = step_site(self.trace.made[seen.node])
        spine = any(seen.node in s.spine for s in self.main.segments) or seen.node in self._answering
        spine = spine or any(seen.node in s.nodes for other in self.towers for s in other.segments)
        return Activation(
            site,
            seen.function,
            spine,
            mean,
            saturated,
            dead,
            seen.units,
            seen.samples,
            not spine and seen.node in self._abreast,
            seen.node in self._gates,
            self.rms.get(seen.node, math.nan),
        )

    @cached_property
    def _gates(self) -> set[Node]:
        return gates(self.run)

    @cached_property
    def _abreast(self) -> set[Node]:
        return abreast(self.run)

    def _normalisations(self) -> tuple[Normalisation, ...]:
        """In the order in which they ran."""
        on = {node: segment.site for segment in self.main.segments for node in segment.nodes}
        found: list[Normalisation] = []
        for seen, variance, given in zip(self.trace.norms, self.read.variances, self.read.given, strict=True):
            made = self.trace.made[seen.node]
            # Written out, its gain is multiplied after the root: the module's own output has it.
            end = self.trace.outputs.get(made.call.module) if made.call.leaf else None
            output = self.rms.get(end if end in self.rms else seen.node, math.nan)  # type: ignore[arg-type]
            site = on.get(seen.node) or step_site(made)
            found.append(Normalisation(site, seen.epsilon, variance, output, given, seen.weights))
        return tuple(found)

    def _parameter_scales(self) -> dict[str, float]:
        """log10 of true over rescaled gradient, by parameter name."""
        return {
            name: self.read.scale[self.passed.scale[self._accumulators[id(p)]]]
            for name, p in self.run.model.named_parameters()
            if id(p) in self._accumulators and self.passed.scale[self._accumulators[id(p)]] in self.read.scale
        }

    def _parameters(self) -> tuple[Parameter, ...]:
        found: list[Parameter] = []
        weights, last = self.trace.weights, len(self.main.segments) - 1
        for name, p in self.run.model.named_parameters():
            state, log, zeros, bad, where = "measured", math.nan, math.nan, 0, math.nan
            if not p.requires_grad:
                state = "frozen"
            elif self.failure is not None:
                state = "unmeasured"
            elif name not in self._scales and p.grad is not None:
                state = "inside"
            elif name not in self.read.gradients or name not in self._scales:
                module = name.rpartition(".")[0]
                closed = "no-grad" if module in self.trace.closed else "unused"
                state = "detached" if module in self.trace.ran else closed
            else:
                if self._accumulators[id(p)] not in self._felt:
                    state = "stepped"
                length, zeros = self.read.gradients[name]
                log = log10(length) + self._scales[name]
                if not math.isfinite(length) and (gradient := self.grads[name]) is not None:
                    bad = int((~torch.isfinite(gradient)).sum())
                key = self.passed.scale[self._accumulators[id(p)]]
                where = float(last - self.passed.first - self.passed.rescalings[key])
            found.append(
                Parameter(
                    name,
                    tuple(p.shape),
                    state,
                    log,
                    self.read.weights.get(name, 0.0),
                    zeros,
                    bad,
                    where,
                    weights.fan_in.get(id(p), 0),
                    id(p) in weights.biases,
                    3 if id(p) in weights.packed else 1,
                    weights.generated.get(id(p), 0),
                    self._updates.get(name, math.nan),
                    self.read.means.get(name, math.nan),
                )
            )
        return tuple(found)

    def _lost(self) -> set[int]:
        """Ids of the parameters that no gradient reaches."""
        return {id(p) for p in self.run.model.parameters() if p.requires_grad} - self._accumulators.keys()

    def _modules(self) -> tuple[ModuleSignal, ...]:
        signals: list[ModuleSignal] = []
        for path, module in self.run.model.named_modules():
            node = self.trace.outputs.get(path)
            rms = self.rms.get(node, math.nan) if node is not None else math.nan
            log = self.logs.get(node, math.nan) if node is not None else math.nan
            signals.append(ModuleSignal(path, type(module).__name__, rms, log))
        return tuple(signals)

    def _loss(self, call: Any, values: list[float]) -> LossCall:
        """Facts of a loss call, with the operation that made its input."""
        node = call.input_node
        while node is not None and node in self.trace.made and self.trace.made[node].call.kind == "reshape":
            node = next(
                (child for child in self.run.graph.children.get(node, []) if child in self.trace.made), None
            )
        maker = step_site(self.trace.made[node]) if node in self.trace.made else None
        source, over = (maker.operation, maker.over_samples) if maker is not None else ("", False)
        site, (rows, width) = step_site(self.trace.made[call.node]), call.shape
        low, high, error, spread, least, most, excess = values
        seen = LossCall(
            site, call.function, source, width, rows, low, high, error, spread, least, most, call.target
        )
        return replace(seen, excess=excess, pairs=call.pairs, over_samples=over)

    def _unexamined(self) -> dict[str, str]:
        found: dict[str, str] = {}
        fused = [s.site.name for s in self.main.segments if s.site.kind == "recurrent"]
        if fused:
            found["time"] = (
                f"{', '.join(fused)}: one fused kernel; its inside, layer by layer and step by step, is not seen"
            )
        return found


def _answering(run: Traced) -> set[Node]:
    """What all of one of the model's results passes through on its way from an input.

    Where the loss takes several of them, or differentiates the model itself, the backbone leads past its inside.
    """
    on = {node for segment in run.line.segments for node in segment.nodes}
    results = [n for n in dict.fromkeys(run.trace.results) if run.trace.made[n].shape]
    found = set[Node]()
    if not results or on & set(results):
        return found
    reached = [run.graph.below(result) for result in results]
    for sink in run.sinks:
        above = run.graph.above(sink)
        for below in reached:
            if sink in below:
                found.update(run.graph.dominators([node for node in above if node in below]))
    return found


def _steps(run: Traced) -> set[Node]:
    """Functions that are constant piece by piece."""
    return {node for node in run.graph.order if operation_of(node) in STEPS}


def _sites(line: Backbone) -> tuple[Site, ...]:
    return tuple(segment.site for segment in reversed(line.segments))


def _layers(line: Backbone) -> int:
    return sum(s.weighted for s in line.segments[line.exit : -1])


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else math.nan
