"""One forward of a module, kept so that it can be repeated: its arguments, its random state, and what came back to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from isograd.graph.preserve import generators
from isograd.graph.traced import Loss


class Staying:
    """A forward hook that stays with its module.

    Copies of a watched model (an average of its weights, a target network) and files it is saved to get
    in its place a function of the standard library that takes the same three arguments and does nothing.
    """

    def __init__(self, hook: Callable[..., object]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> None:
        self._hook(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class Call:
    """A forward that has begun.

    Attributes:
        cotangents: the gradient of each output that has got one, by its place.
        name: of the module in the model; '' for the whole.
    """

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = ""
    ) -> None:
        self.name = name
        self.cotangents: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._args, self._kwargs = tree_map(_cut, (args, kwargs))
        self._drawing = generators()
        device = next((p.device.type for p in module.parameters()), "cpu")
        on = torch.is_autocast_enabled(device)
        self._precision = (device, torch.get_autocast_dtype(device)) if on else None

    def returned(self, output: object) -> None:
        """The forward has ended: hear of the gradients of what it returned."""
        for i, leaf in enumerate(_tensors(output)):
            if leaf.requires_grad:
                self._outputs[i] = leaf.detach()
                leaf.register_hook(_keep(i, self.cotangents))

    @property
    def finite(self) -> bool:
        """Was what it returned finite?"""
        return all(bool(out.isfinite().all()) for out in self._outputs.values())

    def loss(self) -> tuple[Loss, bool]:
        """The forward and what came back to it, as a loss, and whether that was not finite; such values count as 0."""
        cotangents = self.cotangents
        finite = {i: torch.nan_to_num(c, nan=0.0, posinf=0.0, neginf=0.0) for i, c in cotangents.items()}
        broken = any(not torch.equal(finite[i], cotangents[i]) for i in finite)

        def loss(model: nn.Module) -> Tensor:
            for restore, state in self._drawing:
                restore(state)
            with nullcontext() if self._precision is None else torch.autocast(*self._precision):
                outputs = _tensors(model(*self._args, **self._kwargs))
            direct = _direct({i: outputs[i] for i in finite}, finite)
            return torch.stack([(outputs[i] * sent).sum().float() for i, sent in direct.items()]).sum()

        return loss, broken


def _keep(place: int, cotangents: dict[int, Tensor]) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        cotangents[place] = gradient.detach()

    return hook


def _cut(value: object) -> object:
    """What another module made, without its graph: that is used up by the time of a repetition."""
    if isinstance(value, Tensor) and value.grad_fn is not None:
        return value.detach().requires_grad_()
    return value


def _tensors(output: object) -> list[Tensor]:
    """The tensors in what a model returns, each once: containers, dataclasses, and objects such as a distribution."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    waiting: list[object] = [output]
    while waiting:
        for leaf in tree_leaves(waiting.pop(0)):
            if isinstance(leaf, Tensor):
                found.setdefault(id(leaf), leaf)
            elif (
                hasattr(leaf, "__dict__") and id(leaf) not in seen and not isinstance(leaf, nn.Module | type)
            ):
                seen.add(id(leaf))
                waiting.append(list(vars(leaf).values()))
    return list(found.values())


def _direct(outputs: dict[int, Tensor], arrived: dict[int, Tensor]) -> dict[int, Tensor]:
    """What the loss itself sends to each: without what reaches a hidden state by way of an output that is made from it (the
    latent mean of an autoencoder beside the reconstruction), which would count twice."""
    inner = _inner(outputs.values())
    order = {i: -1 if out.grad_fn is None else out.grad_fn._sequence_nr() for i, out in outputs.items()}
    direct: dict[int, Tensor] = {}
    for i in sorted(outputs, key=lambda i: -order[i]):  # the last that was made comes first
        direct[i] = arrived[i]
        if len(direct) > 1 and (order[i] < 0 or outputs[i].grad_fn in inner):
            later = [j for j in direct if j != i]
            try:
                sent: Any = torch.autograd.grad(
                    [outputs[j] for j in later],
                    outputs[i],
                    [direct[j] for j in later],
                    retain_graph=True,
                    allow_unused=True,
                )
            except RuntimeError:  # a reentrant checkpoint has no such backward: what is left is not known
                sent = (arrived[i],)
            through = sent[0]
            if through is not None:
                left = torch.nan_to_num(arrived[i] - through, nan=0.0, posinf=0.0, neginf=0.0)
                rounding = 16 * torch.finfo(left.dtype).eps * through.abs().amax()
                direct[i] = torch.where(left.abs() <= rounding, 0.0, left)
    return direct


def _inner(outputs: Iterable[Tensor]) -> set[object]:
    """Nodes of the graph that one of these is made from."""
    inner: set[object] = set()
    nodes: list[Any] = [output.grad_fn for output in outputs]
    waiting = [edge for node in nodes if node is not None for edge, _ in node.next_functions]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in inner:
            inner.add(node)
            waiting += [edge for edge, _ in node.next_functions]
    return inner
