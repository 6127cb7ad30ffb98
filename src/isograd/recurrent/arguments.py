"""The arguments that a model is called with, opened for a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from isograd.graph.trace import argument_names


def arguments(inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Positional and keyword arguments of the call."""
    if isinstance(inputs, Mapping):
        return (), cast(Mapping[str, Any], inputs)
    if isinstance(inputs, tuple | list) and not hasattr(inputs, "_fields"):
        return cast(Sequence[Any], inputs), {}
    return (inputs,), {}


def opened_for(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any], dict[str, Tensor]]:
    """Arguments of the call, float tensors among them replaced by clones that take a gradient."""
    opened: dict[str, Tensor] = {}

    def opening(path: Any, value: Any) -> Any:
        name = pytree.keystr(path)
        name = names.get(name, name.removeprefix("[1]").strip("[]'"))
        if isinstance(value, PackedSequence):
            padded, lengths = pad_packed_sequence(value, batch_first=True)
            opened[name] = padded.detach().requires_grad_()
            return pack_padded_sequence(
                opened[name], lengths, batch_first=True, enforce_sorted=value.sorted_indices is None
            )
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point() and "mask" not in name:
            leaf = value.detach().clone().requires_grad_()
            opened[name] = leaf
            return leaf * 1  # no leaf, so that operations in place stay allowed
        opened[name] = value
        return value

    names = argument_names(model, tuple(args))
    call = (tuple(args), dict(kwargs))
    return *pytree.tree_map_with_path(opening, call, is_leaf=_is_packed), opened


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """Frozen embeddings take a gradient too; what was frozen is frozen again afterwards."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
