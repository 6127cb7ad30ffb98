"""Which axis is time: at the input where the gradient is read, and at the output where it starts.

No shape says so by itself. What ran does: a recurrent kernel knows its layout, attention and convolutions
have an axis of a certain length, and a loop written by hand uses a parameter once a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from isograd.recurrent.unrolled import Unrolled

MAIN_OUTPUTS = ("logits", "last_hidden_state")
"""What a Hugging Face model is asked for, among all that it returns."""


@dataclass(frozen=True)
class End:
    """Where the gradient starts."""

    output: Tensor
    axis: int | None
    """None: the output has no steps, and all of it belongs to the last one."""
    step: int
    """Index along that axis."""
    at: int
    """The step of the input that it belongs to."""

    @property
    def words(self) -> str:
        shape = tuple(self.output.shape)
        if self.axis is None:
            return f"all of the output {shape}, which has no steps"
        return f"step {self.step} of the output {shape}"

    def alone(self, read: Tensor | None) -> bool:
        """Is the last step all of the output that the loss reads? `read`: its gradient by the output."""
        if self.axis is None:
            return True
        if read is None or read.shape != self.output.shape:
            return False
        before = read.narrow(self.axis, 0, read.shape[self.axis] - 1)
        return bool(read.any()) and not bool(before.any())

    def cotangent(self, generator: torch.Generator) -> Tensor:
        """Random direction of norm 1 at that step, zero elsewhere; of the shape and dtype of the output."""
        out = torch.zeros_like(self.output)
        chosen = out if self.axis is None else out.select(self.axis, self.step)
        direction = torch.randn(chosen.shape, generator=generator, dtype=torch.float64)
        chosen.copy_(direction / torch.linalg.vector_norm(direction))
        return out


@dataclass(frozen=True)
class Place:
    """A tensor of float values by which can be differentiated, and its axis of time."""

    name: str
    edge: GradientEdge
    shape: tuple[int, ...]
    axis: int

    @property
    def length(self) -> int:
        return self.shape[self.axis]

    def end(self, output: Tensor, at: int) -> End:
        """Output step `at`, and which input step that is: the last output step belongs to the last input.

        Raises:
            ValueError: the output has no such step.
        """
        shape, axis = tuple(output.shape), self._axis_of(tuple(output.shape))
        if axis is None:
            if at not in (-1, self.length - 1):
                raise ValueError(
                    f"the output of shape {shape} has no axis of {self.length} steps to choose step {at} "
                    "from: leave `at` as it is, the whole output then belongs to the last step"
                )
            return End(output, None, -1, self.length - 1)
        steps = shape[axis]
        if not -steps <= at < steps:
            raise ValueError(f"the output of shape {shape} has {steps} steps, and at={at} is none of them")
        step = at % steps
        stride = max(1, round(self.length / steps))
        return End(output, axis, step, max(0, self.length - 1 - (steps - 1 - step) * stride))

    def _axis_of(self, shape: tuple[int, ...]) -> int | None:
        same = len(shape) == len(self.shape)
        if same or len(shape) == len(self.shape) - 1:  # one value a step, without an axis of features
            if self.axis < len(shape) and shape[self.axis] == self.length:
                return self.axis
            others = [axis for axis, size in enumerate(shape) if size == self.length]
            if same and len(others) == 1:
                return others[0]
        # Convolutions without padding or with strides shorten it.
        if same and len(shape) > 2 and 1 < shape[self.axis] < self.length:
            return self.axis
        return None


def places(opened: Mapping[str, Tensor], seen: Unrolled, time: int | None) -> list[Place]:
    """Float inputs and the embeddings of integer inputs, each with its axis of time.

    Raises:
        ValueError: no axis of any of them is time as far as can be told.
    """
    found: list[Place] = []
    doubts: list[str] = []
    for name, edge, shape, tokens in _sources(opened, seen):
        try:
            found.append(Place(name, edge, shape, _chosen(shape, tokens, seen, time)))
        except ValueError as error:
            doubts.append(f"{name} of shape {shape[:-1] if tokens else shape}: {error}")
    if time is None:  # where the input is an image, say, what the recurrence is given has steps
        found += [Place("what runs along time", e.edge, e.shape, e.axis) for e in seen.entrances]
    if found:
        return found
    if doubts:
        raise ValueError(
            f"which axis is time? {'; '.join(doubts)}. Say it: time=1 (on the command line --time 1)"
        )
    raise ValueError(
        "no input can be differentiated: the model was given no float tensor, and no nn.Embedding looked up "
        "the integers it was given"
    )


def _sources(
    opened: Mapping[str, Tensor], seen: Unrolled
) -> list[tuple[str, GradientEdge, tuple[int, ...], bool]]:
    """Name, edge, shape, and whether the shape is that of embedded integers."""
    floats = [
        (name, get_gradient_edge(leaf), tuple(leaf.shape), False)
        for name, leaf in opened.items()
        if leaf.is_floating_point() and leaf.ndim
    ]
    integers = {name: t for name, t in opened.items() if not t.is_floating_point()}
    embedded: list[tuple[str, GradientEdge, tuple[int, ...], bool]] = []
    for lookup in seen.lookups:
        name = next((n for n, t in integers.items() if _same(t, lookup.indices)), None)
        if name is not None and lookup.edge is not None:
            embedded.append((f"embedding of {name}", lookup.edge, lookup.shape, True))
    return floats + embedded


def _same(given: Tensor, indices: Tensor) -> bool:
    """Are these the user's own integers, sliced, reshaped or shifted as they may be?"""
    if given.numel() < 2:
        return False
    return given.data_ptr() == indices.data_ptr() or sorted(given.shape) == sorted(indices.shape)


def _chosen(shape: tuple[int, ...], tokens: bool, seen: Unrolled, time: int | None) -> int:
    axes = range(len(shape) - 1 if tokens else len(shape))
    if time is not None:
        if not -len(axes) <= time < len(axes):
            raise ValueError(f"it has no axis {time}")
        return time % len(axes)
    if len(axes) == 1:
        return 0
    layouts = [kernel for kernel in seen.kernels if kernel[1] is not None] + seen.lengths
    for steps, axis in layouts:
        fitting = [a for a in axes if shape[a] == steps]
        if len(fitting) == 1:
            return fitting[0]
        # The layer's own layout decides where several axes have this length.
        if axis is not None and len(shape) == 3 and axis % 3 in fitting:
            return axis % 3
    packed = {steps for steps, axis in seen.kernels if axis is None}
    for counts in (packed, {n for n in seen.calls.values() if n > 2}):
        fitting = [a for a in axes if shape[a] in counts and shape[a] > 1]
        if len(fitting) == 1:
            return fitting[0]
        if len(fitting) > 1:
            raise ValueError(f"axes {' and '.join(map(str, fitting))} are as long as a loop in the model")
    if tokens:
        return axes[-1]
    raise ValueError("nothing in the model runs along an axis of it: no recurrence, attention, convolution")


def output_of(result: Any) -> Tensor:
    """The tensor that the model is there for, among all that it returns.

    Raises:
        TypeError: there is no float tensor.
    """
    if isinstance(result, Mapping):
        known = cast(Mapping[str, Any], result)
        result = next((known[name] for name in MAIN_OUTPUTS if isinstance(known.get(name), Tensor)), result)
    leaves: Sequence[Any] = pytree.tree_leaves(result, is_leaf=lambda x: isinstance(x, PackedSequence))
    tensors = [pad_packed_sequence(leaf)[0] if isinstance(leaf, PackedSequence) else leaf for leaf in leaves]
    floats = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    if floats:
        return next((t for t in floats if t.ndim), floats[0])
    raise TypeError(f"the model returned {type(result).__name__} without a float tensor to start from")
