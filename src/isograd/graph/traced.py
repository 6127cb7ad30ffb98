"""The set-up that every reading starts from: one watched forward of the user's own loss, and its graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parameter import is_lazy
from torch.utils import checkpoint

from isograd.graph.backbone import Backbone, Graph, backbone
from isograd.graph.preserve import preserved
from isograd.graph.sink import sinks
from isograd.graph.trace import Trace

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Traced:
    """A forward that has run, and the way its gradient will take back."""

    model: nn.Module
    """The user's own module, without wrappers."""
    notes: list[str]
    """What was taken off, for the user to read."""
    trace: Trace
    value: Tensor
    """The loss, one element."""
    graph: Graph
    sinks: list[Node]
    """Where data comes in, the deepest first."""
    line: Backbone
    """From the loss to the first sink."""


@contextmanager
def traced(model: nn.Module, loss: Loss) -> Iterator[Traced]:
    """Run `loss(model)` once, eagerly, and hold its autograd graph until the block ends.

    Then the model is as it was: parameters, `.grad`, buffers, train/eval mode and random generators. A
    forward that raises is the caller's error and passes through.

    Raises:
        TypeError: the model is no module, or the loss returns no tensor.
        ValueError: the model is lazy, sharded or without values (meta), or the loss has more than one element or no gradient.
    """
    model, notes = unwrapped(model)
    if any(is_lazy(p) for p in [*model.parameters(), *model.buffers()]):
        raise ValueError("the model has lazy layers without a shape: run it once, then measure it")
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise ValueError(
            "the model lies on the meta device, where weights have shapes and no values: build it on the CPU or a GPU, "
            "or load its weights, then measure it"
        )
    if any(hasattr(p, "placements") for p in model.parameters()):  # DTensor, without importing it
        raise ValueError(
            "the model's parameters are sharded over processes, and one process sees a part of each gradient: "
            "measure the model before fully_shard or parallelize_module"
        )
    trace = Trace(model)
    with preserved(model), _eager():
        with trace.recording():
            value = loss(model)
            trace.attribute_custom([value])
        _validate(value, model)
        assert value.grad_fn is not None
        graph = Graph(value.grad_fn)
        trace.keep(graph.children)
        found = sinks(graph, trace)
        yield Traced(model, notes, trace, value, graph, found, backbone(graph, trace, found[0]))


def unwrapped(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The user's own module below `torch.compile` and data-parallel wrappers, and what was taken off."""
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"expected an nn.Module to measure, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"the model is a {type(model).__name__} of torch.jit, whose operations are not seen from Python: measure the "
            "nn.Module that it was made from"
        )
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


def independent(model: nn.Module, why: str) -> str:
    """Why no gradient of the loss reaches the model, and what to do."""
    if not any(True for _ in model.parameters()):
        why = (
            "the model has none; layers in a plain list or dict are none of it, nn.ModuleList registers them"
        )
    elif not any(p.requires_grad for p in model.parameters()):
        why = "all of them are frozen; give at least one back with requires_grad_(True)"
    return f"the loss does not depend on the model's parameters: {why}"


def _validate(value: Any, model: nn.Module) -> None:
    if not isinstance(value, Tensor):
        given = "nothing" if value is None else f"{type(value).__name__}, not a tensor"
        raise TypeError(
            f"the loss returned {given}: let loss(model) return the scalar itself, {_scalar_of(value)}"
        )
    if value.numel() != 1:
        raise ValueError(
            f"the loss has shape {tuple(value.shape)}, and a gradient starts at one number: "
            "reduce it, for example with .mean()"
        )
    if value.is_complex():
        raise ValueError("the loss is complex, and no gradient starts there: take its .real or its .abs()")
    if value.grad_fn is None:
        why = "it was computed under no_grad or inference_mode, or detached"
        if not value.is_floating_point():
            why = f"it is of {value.dtype}, as what an argmax or a comparison makes, which has no derivative"
        raise ValueError(independent(model, why))


def _scalar_of(value: Any) -> str:
    """How to get at the tensor, by what came in its place."""
    if value is None:
        return "as its last line does"
    if isinstance(value, int | float):
        return "without .item()"
    found = {name: v for name, v in value.items() if _one(v)} if isinstance(value, dict) else {}
    if found:
        return f"here [{next((name for name in found if name == 'loss'), next(iter(found)))!r}]"
    if (
        isinstance(value, tuple | list)
        and (first := next((i for i, v in enumerate(value) if _one(v)), None)) is not None
    ):
        return f"here [{first}]"
    return "for example `lambda m: m(**batch).loss`"


def _one(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.grad_fn is not None


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
