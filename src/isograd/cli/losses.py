"""A loss for a model that brings none: one batch, and random weights on whatever comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from isograd.cli.errors import TargetError
from isograd.cli.inputs import FLOATS, InputSpec

Loss = Callable[[nn.Module], Tensor]


def random_inputs(
    model: nn.Module, specs: Sequence[InputSpec], seed: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Positional and keyword arguments, on the device and in the dtype of the model's parameters."""
    generator = torch.Generator().manual_seed(seed)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for spec in specs:
        dtype = cast(torch.dtype, getattr(torch, spec.dtype)) if spec.dtype else like.dtype
        if not spec.dtype or spec.dtype in FLOATS:
            value = torch.randn(spec.shape, generator=generator)
        else:
            value = torch.randint(spec.bound or 2, spec.shape, generator=generator)
        value = value.to(like.device, dtype)
        if spec.name:
            kwargs[spec.name] = value
        else:
            args.append(value)
    return args, kwargs


def of_batch(batch: Any, seed: int) -> Loss:
    """A tensor is passed as it is, a tuple or list as arguments, a mapping by keyword."""
    if isinstance(batch, Mapping):
        return of_call((), cast(Mapping[str, Any], batch), seed)
    if isinstance(batch, tuple | list):
        return of_call(cast(Sequence[Any], batch), {}, seed)
    return of_call((batch,), {}, seed)


def of_call(args: Sequence[Any], kwargs: Mapping[str, Any], seed: int) -> Loss:
    """The model's own `.loss` if it returns one, else a random cotangent on its outputs."""

    def loss(model: nn.Module) -> Tensor:
        output = model(*args, **kwargs)
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)  # pyright: ignore
        return own if isinstance(own, Tensor) and own.numel() == 1 else cotangent(output, seed)

    return loss


def cotangent(output: Any, seed: int) -> Tensor:
    """Sum of every differentiable float output times standard normal weights, the same at each call.

    Not a mean square: that of a normalised output is constant and has no gradient.

    Raises:
        TargetError: no output depends on the model's parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    total: Tensor | None = None
    for tensor in _tensors(output):
        if not tensor.requires_grad or not tensor.is_floating_point():
            continue
        weights = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        # At least float32: a sum of many float16 products would overflow, and that is our doing.
        term = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * weights).sum()
        total = term if total is None else total + term
    if total is None:
        raise TargetError(
            f"the model returned {type(output).__name__} without a tensor that a gradient could start from",
            why="a float output that depends on the parameters is needed: was it detached, or argmax taken?",
        )
    return total


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a tensor, tuple, list, mapping or dataclass, nested as they may be."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in cast(Mapping[str, Any], output).values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in cast(Sequence[Any], output):
            yield from _tensors(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name))
