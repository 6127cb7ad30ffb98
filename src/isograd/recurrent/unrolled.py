"""Recurrent kernels as loops over time, with the same numbers: what a fused kernel hides is then in the graph.

`nn.RNN`, `nn.LSTM` and `nn.GRU` are one autograd node each, whatever their layers and steps. While
`Unrolled` is entered each runs as a loop over single steps instead, as does every cell it always was one
of. Equations: the documentation of `torch.nn.RNN`, `LSTM` (with projections) and `GRU`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

PREFIX = 3
"""Steps over which each kernel is held against its loop, in float64. A chaotic recurrence multiplies its rounding in
each: weights a hundred times too large make of 1e-7 all there is within five."""

Weights = Sequence[Tensor]
State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Weights, bool], State]
"""(input of one step, state, weights of one layer, has biases) -> state; the output is its first tensor."""


@dataclass
class Use:
    """One matrix that multiplies a state again and again."""

    kind: str
    """LSTM, GRU, RNN, or 'loop' for what the user wrote."""
    weight: Tensor
    hidden: int
    steps: int = 0
    kernel: Kernel | None = None
    gates: list[Tensor] = field(default_factory=list[Tensor])
    """Mean openness of the gate that keeps the state, one value a unit, for each step."""
    passing: list[Tensor] = field(default_factory=list[Tensor])
    """What the other gates let into the state and out again, likewise."""


@dataclass
class Lookup:
    """An embedding of the user's own integers: where a gradient can still be taken."""

    indices: Tensor
    edge: GradientEdge | None
    shape: tuple[int, ...]


@dataclass
class Entrance:
    """What something that runs along time was given."""

    edge: GradientEdge
    shape: tuple[int, ...]
    axis: int


class Unrolled(TorchFunctionMode):
    """Runs fused recurrent kernels step by step, and remembers what runs along time.

    Attributes:
        uses: the recurrent matrices of kernels and cells, by the parameter's id.
        kernels: (steps, layout) of each kernel called; the axis of time is 0 or 1, None for packed input.
        lengths: (steps, axis) of attention, one-dimensional convolutions and loops over slices; None: unknown.
        calls: how often each parameter was used: the steps of a loop written by hand.
        lookups: embeddings of integers.
        entrances: what recurrent kernels and loops over slices were given, in the order in which they began.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters = {id(p): p for p in model.parameters()}
        self.uses: dict[int, Use] = {}
        self.kernels: list[tuple[int, int | None]] = []
        self.lengths: list[tuple[int, int | None]] = []
        self.calls: Counter[int] = Counter()
        self.lookups: list[Lookup] = []
        self.entrances: list[Entrance] = []
        self._first: dict[int, Node] = {}
        self._indexed: dict[tuple[tuple[int, ...], int], set[int]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in KERNELS:
            return self._kernel(name, func, args)
        out = func(*args, **kwargs)
        used = {id(a) for a in (*args, *kwargs.values()) if id(a) in self._parameters}
        self.calls.update(used)
        if name in PRODUCTS and isinstance(out, Tensor) and out.grad_fn is not None:
            for key in used:
                if (self._parameters[key].ndim < 2) == ("mul" in name and "mat" not in name):  # no biases
                    self._loop(key, out.grad_fn)
        match name:
            case "lstm_cell" | "gru_cell" | "rnn_tanh_cell" | "rnn_relu_cell":
                self._cell(name.removesuffix("_cell"), *args)
            case "embedding":
                given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
                indices = next(a for a in given if not a.is_floating_point())
                edge = get_gradient_edge(out) if out.requires_grad else None
                self.lookups.append(Lookup(indices, edge, tuple(out.shape)))
            case "scaled_dot_product_attention":
                self.lengths.append((args[0].shape[-2] if args else kwargs["query"].shape[-2], -2))
            case "multi_head_attention_forward":  # (step, batch, feature), whatever the module was given
                self.lengths.append(((args[0] if args else kwargs["query"]).shape[0], None))
            case "conv1d":  # padded on one side, its input is longer than time; unpadded, its output shorter
                self.lengths += [(args[0].shape[-1], -1), (out.shape[-1], -1)]
            case "unbind":
                axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
                self._slices(args[0], axis % args[0].ndim)
            case "__getitem__" | "select":
                self._index(args)
            case "softmax" if out.ndim > 2 and out.shape[-1] == out.shape[-2]:
                self.lengths.append((out.shape[-1], -2))
            case _:
                pass
        return out

    def _index(self, args: tuple[Any, ...]) -> None:
        """A loop that takes one step after the other: x[:, t], or x.select(1, t)."""
        tensor, *where = args
        if len(where) == 2:
            places = {where[0] % tensor.ndim: where[1]}
        else:
            key = where[0] if isinstance(where[0], tuple) else (where[0],)
            if Ellipsis in [k for k in key if not isinstance(k, Tensor)]:
                return
            places = {axis: k for axis, k in enumerate(key) if type(k) is int}
        for axis, index in places.items():
            steps = self._indexed.setdefault((tuple(tensor.shape), axis), set())
            steps.add(index % tensor.shape[axis])
            if len(steps) == tensor.shape[axis] > 1:
                self._slices(tensor, axis)

    def _slices(self, tensor: Tensor, axis: int) -> None:
        self.lengths.append((tensor.shape[axis], axis))
        self._enter(tensor, axis)

    def _enter(self, tensor: Tensor, axis: int) -> None:
        if tensor.requires_grad and id(tensor) not in self._parameters:
            self.entrances.append(Entrance(get_gradient_edge(tensor), tuple(tensor.shape), axis))

    def _loop(self, key: int, node: Node) -> None:
        """A parameter that multiplies what it has made itself is a recurrence, whoever wrote the loop."""
        weight = self._parameters[key]
        if key in self.uses:
            self.uses[key].steps += 1
        elif key not in self._first:
            self._first[key] = node
        elif self.calls[key] == 2 and _leads(node, self._first[key]):
            self.uses[key] = Use("loop", weight, weight.shape[0] if weight.ndim else 1, steps=2)

    # -- cells -------------------------------------------------------------------------------------

    def _cell(self, name: str, x: Tensor, state: Any, *weights: Tensor) -> None:
        with torch.no_grad():
            biased = len(weights) > 2 and weights[2] is not None  # pyright: ignore[reportUnnecessaryComparison]
            self._remember(name, x, _state(state), [w for w in weights if biased or w.ndim > 1], biased)

    def _remember(self, name: str, x: Tensor, state: State, weights: Weights, biased: bool) -> None:
        """A step of a recurrence, and how far its gates were open."""
        kernel, matrix = KERNELS[name], weights[1]
        use = self.uses.setdefault(
            id(matrix), Use(kernel.kind, matrix, matrix.shape[0] // kernel.blocks, kernel=kernel)
        )
        use.steps += 1
        if kernel.gate is not None:
            given = _linear(x, weights, 0, biased) + _linear(state[0], weights, 1, biased)
            blocks = given.sigmoid().chunk(kernel.blocks, -1)
            gate = blocks[kernel.gate]
            passing = blocks[0] * blocks[3] if kernel.blocks == 4 else 1 - gate
            use.gates.append(gate.reshape(-1, gate.shape[-1]).mean(0))
            use.passing.append(passing.reshape(-1, gate.shape[-1]).mean(0))

    # -- kernels -----------------------------------------------------------------------------------

    def _kernel(self, name: str, func: Callable[..., Any], args: Any) -> Any:
        """The arguments are those of `torch._VF.lstm`: padded, or packed with batch sizes in second place."""
        packed = isinstance(args[1], Tensor) and isinstance(args[3], list | tuple)
        if packed:
            data, sizes, state, weights, biased, _, dropout, training, both = args
            steps = list(data.split(sizes.tolist()))
            axis = None
        else:
            data, state, weights, biased, _, dropout, training, both, batch_first = args
            axis = 1 if batch_first else 0
            steps = list(data.unbind(axis))
            self._enter(data, axis)
        self.kernels.append((len(steps), axis))
        self._held_against_the_kernel(name, func, args, packed)

        output, final = self._layers(
            name, steps, _state(state), weights, biased, both, dropout if training else 0.0
        )
        joined = torch.cat(output) if packed else torch.stack(output, 0 if axis == 0 else 1)
        return (joined, *final)

    def _layers(
        self,
        name: str,
        steps: list[Tensor],
        state: State,
        weights: Weights,
        biased: bool,
        both: bool,
        dropout: float,
        remember: bool = True,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs by step and final states, layer upon layer; no tensor ever holds more than one step."""
        directions = 2 if both else 1
        matrices = len(weights) // len(state[0])
        finals: list[State] = []
        for layer in range(len(state[0]) // directions):
            if layer and dropout:
                steps = [functional.dropout(step, dropout) for step in steps]
            outputs: list[list[Tensor]] = []
            for direction in range(directions):
                number = layer * directions + direction
                mine = weights[number * matrices : (number + 1) * matrices]
                start = tuple(part[number] for part in state)
                out, final = self._along(name, steps, start, mine, biased, direction == 1, remember)
                outputs.append(out)
                finals.append(final)
            steps = [torch.cat(parts, -1) if both else parts[0] for parts in zip(*outputs, strict=True)]
        return steps, [torch.stack(parts) for parts in zip(*finals, strict=True)]

    def _along(
        self,
        name: str,
        steps: list[Tensor],
        start: State,
        weights: Weights,
        biased: bool,
        reverse: bool,
        remember: bool,
    ) -> tuple[list[Tensor], State]:
        """One layer in one direction. Packed sequences end, or in reverse begin, at different steps."""
        outputs: list[Tensor] = []
        rows = len(steps[-1] if reverse else steps[0])
        state, ended = tuple(part[:rows] for part in start), list[State]()
        for x in reversed(steps) if reverse else steps:
            if len(x) < len(state[0]):
                ended.append(tuple(part[len(x) :] for part in state))
                state = tuple(part[: len(x)] for part in state)
            elif len(x) > len(state[0]):
                known = len(state[0])
                state = tuple(torch.cat([p, s[known : len(x)]]) for p, s in zip(state, start, strict=True))
            if remember:
                with torch.no_grad():
                    self._remember(name, x, state, weights, biased)
            state = KERNELS[name].step(x, state, weights, biased)
            outputs.append(state[0])
        final = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
        return (outputs[::-1] if reverse else outputs), final

    def _held_against_the_kernel(self, name: str, func: Callable[..., Any], args: Any, packed: bool) -> None:
        """The loop gives the kernel's own numbers, or is no twin of it."""
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
            args = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, args)
            if packed:
                sizes = args[1][:PREFIX]
                data = args[0][: int(sizes.sum())]
                steps = list(data.split(sizes.tolist()))
                fused = func(data, sizes, *args[2:6], 0.0, *args[7:])[0]
                state, weights, biased, both = args[2], args[3], args[4], args[8]
            else:
                axis = 1 if args[8] else 0
                data = args[0].narrow(axis, 0, min(PREFIX, args[0].shape[axis]))
                steps = list(data.unbind(axis))
                fused = func(data, *args[1:5], 0.0, *args[6:])[0]
                state, weights, biased, both = args[1], args[2], args[3], args[7]
            output, _ = self._layers(name, steps, _state(state), weights, biased, both, 0.0, remember=False)
            ours = torch.cat(output) if packed else torch.stack(output, axis)  # pyright: ignore
            worst = float((ours - fused).abs().max()) if ours.numel() else 0.0
            allowed = math.sqrt(torch.finfo(ours.dtype).eps) * max(1.0, float(fused.abs().max()))
            assert not worst > allowed, f"the loop for {name} departs from the kernel by {worst:.1e}"


@dataclass(frozen=True)
class Kernel:
    """One recurrent kernel of torch."""

    kind: str
    blocks: int
    """Square blocks of its hidden-to-hidden matrix, one upon the other."""
    step: Step
    gate: int | None = None
    """The block whose sigmoid keeps the state: forget gate of the LSTM, update gate of the GRU."""
    candidate: int = 0
    """The block that makes the new state."""


def _rnn(act: Callable[[Tensor], Tensor]) -> Step:
    def step(x: Tensor, state: State, weights: Weights, biased: bool) -> State:
        return (act(_linear(x, weights, 0, biased) + _linear(state[0], weights, 1, biased)),)

    return step


def _lstm(x: Tensor, state: State, weights: Weights, biased: bool) -> State:
    h, c = state
    gates = _linear(x, weights, 0, biased) + _linear(h, weights, 1, biased)
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    if len(weights) % 2:  # proj_size
        h = functional.linear(h, weights[-1])
    return h, c


def _gru(x: Tensor, state: State, weights: Weights, biased: bool) -> State:
    (h,) = state
    given = _linear(x, weights, 0, biased).chunk(3, -1)
    held = _linear(h, weights, 1, biased).chunk(3, -1)
    r, z = (given[0] + held[0]).sigmoid(), (given[1] + held[1]).sigmoid()
    n = (given[2] + r * held[2]).tanh()
    return (n + z * (h - n),)


KERNELS = {
    "lstm": Kernel("LSTM", 4, _lstm, gate=1, candidate=2),
    "gru": Kernel("GRU", 3, _gru, gate=1, candidate=2),
    "rnn_tanh": Kernel("RNN", 1, _rnn(torch.tanh)),
    "rnn_relu": Kernel("RNN", 1, _rnn(torch.relu)),
}


CONVOLUTIONS = frozenset("conv1d conv2d conv3d".split())
PRODUCTS = CONVOLUTIONS.union("linear addmm mm mv matmul __matmul__ __rmatmul__ mul __mul__ __rmul__".split())
"""Calls by which a state is multiplied."""


def _leads(node: Node, to: Node) -> bool:
    """Is `to` below `node` in the autograd graph?"""
    stack, known = [node], {node}
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is to:
                return True
            if child is not None and child not in known:
                known.add(child)
                stack.append(child)
    return False


def _linear(x: Tensor, weights: Weights, which: int, biased: bool) -> Tensor:
    """By the input's matrix (0) or the state's (1)."""
    return functional.linear(x, weights[which], weights[2 + which] if biased else None)


def _state(state: Any) -> State:
    return (state,) if isinstance(state, Tensor) else tuple(state)
