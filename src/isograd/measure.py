"""One forward and one backward, renormalised at every backbone node: model, loss -> Flow."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parameter import is_lazy
from torch.utils import checkpoint

from isograd.backbone import Backbone, Graph, Segment, backbone, sinks, step_site
from isograd.backward import Backward
from isograd.flow import (
    Activation,
    Failure,
    Flow,
    InputStatistics,
    LossCall,
    ModuleSignal,
    NonFinite,
    Parameter,
    Site,
    Split,
    Step,
)
from isograd.optimizers import first_update
from isograd.preserve import preserved
from isograd.trace import Trace, norm

LOG2 = math.log10(2.0)
Loss = Callable[[nn.Module], Tensor]


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
    model, notes = unwrapped(model)
    if any(is_lazy(p) for p in [*model.parameters(), *model.buffers()]):
        raise ValueError("the model has lazy layers without a shape: run it once, then measure it")
    if any(hasattr(p, "placements") for p in model.parameters()):  # DTensor, without importing it
        raise ValueError(
            "the model's parameters are sharded over processes, and one process sees a part of each gradient: "
            "measure the model before fully_shard or parallelize_module"
        )
    trace = Trace(model)
    with preserved(model), _eager():
        with trace.recording():
            value = loss(model)
        _validate(value, model)
        return _Measurement(model, trace, value, notes, optimizer).flow()


def unwrapped(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The user's own module below `torch.compile` and data-parallel wrappers, and what was taken off."""
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected an nn.Module to measure, got {type(model).__name__}")
    notes: list[str] = []
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            notes.append("unwrapped from torch.compile: measured eagerly")
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
            notes.append(f"unwrapped from {type(model).__name__}: this process's batch, before any reduction")
        else:
            return model, notes
        model = inner


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled parts of the model run eagerly, so that their operations can be seen; grad mode is on."""
    # What is compiled has loaded dynamo; where nothing is, its import would cost seconds.
    compiled = "torch._dynamo" in sys.modules
    stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with stance, torch.enable_grad(), _open_checkpoints():
        yield


class _OpenCheckpoint:
    """Stands in for reentrant checkpointing, which refuses any backward but `.backward()` and hides its inside."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        if not any(isinstance(a, Tensor) and a.requires_grad for a in args):
            with torch.no_grad():  # as the reentrant form has it
                return function(*args)
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


@contextmanager
def _open_checkpoints() -> Iterator[None]:
    original = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _OpenCheckpoint  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = original


def _validate(value: Any, model: nn.Module) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the loss returned {type(value).__name__}, not a tensor: let loss(model) return the scalar itself, "
            "for example `lambda m: m(**batch).loss`"
        )
    if value.numel() != 1:
        raise ValueError(
            f"the loss has shape {tuple(value.shape)}, and a gradient starts at one number: "
            "reduce it, for example with .mean()"
        )
    if value.grad_fn is None:
        raise ValueError(_independent(model, "it was computed under no_grad, or detached"))


def _independent(model: nn.Module, why: str) -> str:
    """Why no gradient of the loss reaches the model, and what to do."""
    if not any(True for _ in model.parameters()):
        why = "the model has none"
    elif not any(p.requires_grad for p in model.parameters()):
        why = "all of them are frozen; give at least one back with requires_grad_(True)"
    return f"the loss does not depend on the model's parameters: {why}"


class _Measurement:
    """The backward pass with its readings, and the flow assembled from them."""

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        value: Tensor,
        notes: list[str],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self.model, self.trace, self.value, self.notes = model, trace, value, notes
        self.optimizer = optimizer
        assert value.grad_fn is not None
        self.graph = Graph(value.grad_fn)
        trainable = {id(p) for p in model.parameters() if p.requires_grad}
        if not any(id(getattr(node, "variable", None)) in trainable for node in self.graph.order):
            raise ValueError(
                _independent(
                    model, "it was computed from other weights; use the model that loss(model) is given"
                )
            )
        trace.keep(self.graph.children)
        found = sinks(self.graph, trace)
        self.main = backbone(self.graph, trace, found[0])
        self.others: list[Backbone] = []
        for sink in found[1:]:
            other = backbone(self.graph, trace, sink)
            if all(_adds(other, known) for known in (self.main, *self.others)):
                self.others.append(other)
        self.passed = Backward(self.graph, self.main, value.device)

    def _backward(self) -> tuple[dict[str, Tensor | None], Failure | None]:
        """Gradients of all parameters, rescaled."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        wanted = [p for _, p in named] + self.trace.opened
        made = self.trace.made
        found, failure = self.passed.run(
            self.value, wanted, lambda node: node in made and made[node].shape is not None
        )
        if failure is not None:
            return {}, replace(failure, source=self._where_it_stopped())
        return {name: grad for (name, _), grad in zip(named, found, strict=False)}, None

    def _where_it_stopped(self) -> str:
        """Source of the last operation whose gradient was read before the backward raised."""
        sources = [self.trace.made[n].call.source for n in self.passed.fired if n in self.trace.made]
        return next((source for source in reversed(sources) if source), "")

    # -- assembly ----------------------------------------------------------------------------------

    def flow(self) -> Flow:
        grads, failure = self._backward()
        scalars = _Scalars()
        norms = {node: scalars.add(value) for node, value in self.passed.norms.items()}
        exponents = {key: scalars.add(value) for key, value in self.passed.exponents.items()}
        rms = {n: scalars.add(made.rms) for n, made in self.trace.made.items() if made.rms is not None}
        splits = {i: (scalars.add(a), scalars.add(b)) for i, (a, b) in self.passed.splits.items()}
        inputs = {name: [scalars.add(v) for v in values] for name, values in self.trace.inputs.items()}
        weights = {name: scalars.add(norm([p])) for name, p in self.model.named_parameters() if p.numel()}
        gradients = {
            name: (scalars.add(norm([g])), scalars.add(1 - torch.count_nonzero(g) / max(g.numel(), 1)))
            for name, g in grads.items()
            if g is not None
        }
        activations = [[scalars.add(v) for v in a.values] for a in self.trace.activations]
        losses = [[scalars.add(v) for v in call.values] for call in self.trace.losses]
        value = scalars.add(self.value.detach().reshape(()))
        read = scalars.read()

        scale = {key: read[i] * LOG2 for key, i in exponents.items()}
        self.logs: dict[Node, float] = {}
        for node, i in norms.items():
            self.logs[node] = _log10(read[i]) + scale[self.passed.scale[node]]
        self.rms = {node: read[i] for node, i in rms.items()}
        self.updates = first_update(self.optimizer, self.model, grads, self._parameter_scale(scale))

        segments = self.main.segments
        depth = len(segments) - 1
        return Flow(
            sites=_sites(self.main),
            columns=self._columns(self.main),
            splits={
                depth - i: Split(
                    read[a] / self.passed.entering(i),
                    read[b] / self.passed.entering(i),
                    self._forward_ratio(segments[i], segments[i + 1]),
                )
                for i, (a, b) in splits.items()
            },
            ledgers={depth - i: steps for i, s in enumerate(segments[:-1]) if (steps := self._ledger(i, s))},
            activations=tuple(
                self._activation(a, [read[i] for i in values])
                for a, values in zip(self.trace.activations, activations, strict=True)
                if a.node in self.graph.children
            ),
            parameters=self._parameters(
                {k: read[v] for k, v in weights.items()},
                {k: (read[a], read[b]) for k, (a, b) in gradients.items()},
                grads,
                scale,
                failure,
            ),
            modules=self._modules(),
            layers=sum(s.weighted for s in segments[self.main.exit : -1]),
            loss=read[value],
            losses=tuple(
                self._loss(call, [read[i] for i in values])
                for call, values in zip(self.trace.losses, losses, strict=True)
            ),
            cut=bool(self.trace.given) and not any(m.call.user_input for m in self.trace.made.values()),
            outputs=tuple(
                step_site(self.trace.made[n])
                for n in dict.fromkeys(self.trace.results)
                if n in self.trace.made
            ),
            towers=tuple(
                Flow(
                    sites=_sites(other),
                    columns=self._columns(other),
                    layers=sum(s.weighted for s in other.segments[other.exit : -1]),
                )
                for other in self.others
            ),
            inputs={name: InputStatistics(*(read[i] for i in values)) for name, values in inputs.items()},
            nonfinite=self._nonfinite(any(not math.isfinite(read[i]) for i, _ in gradients.values())),
            failure=failure,
            notes=tuple(self.notes),
            unexamined=self._unexamined(),
        )

    def _columns(self, line: Backbone) -> dict[str, Tensor]:
        """Forward order: input first."""
        logs = [self.logs.get(node, math.nan) for node in line.tops]
        below = [*logs[1:], math.nan]
        decades = [
            math.nan if i < line.exit or math.isinf(a) else b - a
            for i, (a, b) in enumerate(zip(logs, below, strict=True))
        ]
        rms = [next((self.rms[n] for n in s.nodes if n in self.rms), math.nan) for s in line.segments]
        forward = [_ratio(a, b) for a, b in zip(rms, [*rms[1:], math.nan], strict=True)]
        columns = {
            "grad_norm_log10": logs,
            "gain": [math.inf if d >= 300 else 10**d for d in decades],
            "decades": decades,
            "activation_rms": rms,
            "forward_gain": forward,
            "weighted": [float(s.weighted and i >= line.exit) for i, s in enumerate(line.segments)],
        }
        return {name: torch.tensor(c[::-1], dtype=torch.float64) for name, c in columns.items()}

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
        top = self.logs.get(segment.nodes[0], math.nan)
        spine = [n for n in segment.spine if n in self.logs]
        chosen = spine or [n for n in segment.inside if n in self.logs and n in self.rms]
        if not chosen:
            return ()
        levels = [self.logs[n] - top for n in chosen]
        costs = [math.nan] * len(chosen)
        if spine and index in self.passed.splits:
            last = _log10(float(self.passed.splits[index][1]) / self.passed.entering(index))
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
        spine = any(seen.node in s.spine for s in self.main.segments)
        return Activation(site, seen.function, spine, mean, saturated, dead, seen.units, seen.samples)

    def _parameter_nodes(self) -> dict[int, Node]:
        return {id(n.variable): n for n in self.graph.order if hasattr(n, "variable")}  # pyright: ignore

    def _parameter_scale(self, scale: dict[int, float]) -> dict[str, float]:
        """log10 of true over rescaled gradient, by parameter name."""
        nodes = self._parameter_nodes()
        return {
            name: scale[self.passed.scale[nodes[id(p)]]]
            for name, p in self.model.named_parameters()
            if id(p) in nodes and self.passed.scale[nodes[id(p)]] in scale
        }

    def _parameters(
        self,
        weights: dict[str, float],
        readings: dict[str, tuple[float, float]],
        grads: dict[str, Tensor | None],
        scale: dict[int, float],
        failure: Failure | None,
    ) -> tuple[Parameter, ...]:
        nodes, scales = self._parameter_nodes(), self._parameter_scale(scale)
        found: list[Parameter] = []
        last = len(self.main.segments) - 1
        for name, p in self.model.named_parameters():
            state, log, zeros, bad, where = "measured", math.nan, math.nan, 0, math.nan
            if not p.requires_grad:
                state = "frozen"
            elif failure is not None:
                state = "unmeasured"
            elif name not in readings or name not in scales:
                state = "detached" if name.rpartition(".")[0] in self.trace.ran else "unused"
            else:
                length, zeros = readings[name]
                log = _log10(length) + scales[name]
                gradient = grads[name]
                if not math.isfinite(length) and gradient is not None:
                    bad = int((~torch.isfinite(gradient)).sum())
                where = float(
                    last - self.passed.first - self.passed.rescalings[self.passed.scale[nodes[id(p)]]]
                )
            found.append(
                Parameter(
                    name,
                    tuple(p.shape),
                    state,
                    log,
                    weights.get(name, 0.0),
                    zeros,
                    bad,
                    where,
                    self.trace.weights.get(id(p), 0),
                    id(p) in self.trace.biases,
                    self.updates.get(name, math.nan),
                )
            )
        return tuple(found)

    def _modules(self) -> tuple[ModuleSignal, ...]:
        signals: list[ModuleSignal] = []
        for path, module in self.model.named_modules():
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
                (child for child in self.graph.children.get(node, []) if child in self.trace.made), None
            )
        source = self.trace.made[node].call.operation if node in self.trace.made else ""
        site = step_site(self.trace.made[call.node])
        low, high, error, spread, target_low, target_high = values
        rows, width = call.shape
        return LossCall(
            site,
            call.function,
            source,
            width,
            rows,
            low,
            high,
            error,
            spread,
            target_low,
            target_high,
            call.target,
        )

    def _nonfinite(self, reached: bool) -> NonFinite | None:
        """The first operation, in order of execution, that made a non-finite value out of finite ones.

        `reached`: such a gradient reached a parameter. Where none did, a clamp or a mask has caught it.
        """
        if not math.isfinite(float(self.value.detach())):
            first = min(
                (n for n in self.graph.order if not math.isfinite(self.rms.get(n, 0.0))),
                key=lambda n: self.trace.made[n].call.order,
                default=None,
            )
            if first is not None:
                return self._made_nonfinite("forward", first, self.rms[first])
            return None
        order = {node: i for i, node in enumerate(self.passed.fired)}
        bad = [node for node in order if not math.isfinite(float(self.passed.norms[node]))]
        if not bad or not reached:
            return None
        # Its gradient is a sum: of those that contributed, the last made it what it is.
        feeding = [node for node in order if node not in bad and bad[0] in self._next_read(node)]
        origin = max(feeding, key=lambda node: order[node], default=bad[0])
        return self._made_nonfinite("backward", origin, math.nan)

    def _next_read(self, node: Node) -> set[Node]:
        """The nearest nodes below whose gradient was read."""
        found: set[Node] = set()
        stack, seen = list(self.graph.children[node]), set[Node]()
        while stack:
            child = stack.pop()
            if child in seen:
                continue
            seen.add(child)
            if child in self.passed.norms:
                found.add(child)
            else:
                stack.extend(self.graph.children[child])
        return found

    def _made_nonfinite(self, phase: str, node: Node, value: float) -> NonFinite:
        made = self.trace.made[node]
        elements = math.prod(made.shape or ())
        return NonFinite(phase, step_site(made), int(math.isnan(value)), int(math.isinf(value)), elements)

    def _unexamined(self) -> dict[str, str]:
        found: dict[str, str] = {}
        fused = [s.site.name for s in self.main.segments if s.site.kind == "recurrent"]
        if fused:
            found["time"] = (
                f"{', '.join(fused)}: one fused kernel; its inside, layer by layer and step by step, is not seen"
            )
        return found


class _Scalars:
    """Device scalars, read back together in one copy per device."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def add(self, value: Tensor) -> int:
        self._tensors.append(value.detach())
        return len(self._tensors) - 1

    def read(self) -> list[float]:
        result = [0.0] * len(self._tensors)
        for device in {t.device for t in self._tensors}:
            mine = [i for i, t in enumerate(self._tensors) if t.device == device]
            values: list[float] = torch.stack([self._tensors[i].double() for i in mine]).tolist()
            for i, value in zip(mine, values, strict=True):
                result[i] = value
        return result


def _sites(line: Backbone) -> tuple[Site, ...]:
    return tuple(segment.site for segment in reversed(line.segments))


def _adds(other: Backbone, main: Backbone) -> bool:
    """Does this input's backbone go through layers that the main one does not?"""
    known = {node for segment in main.segments for node in segment.nodes}
    own = [s for s in other.segments[other.exit :] if s.weighted and s.nodes[0] not in known]
    return len(own) >= 2


def _log10(value: float) -> float:
    if value > 0:
        return math.log10(value)
    return -math.inf if value == 0 else math.nan


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else math.nan
