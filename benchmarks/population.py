"""Many small networks trained at once: those of one structure share each operation, and nothing else.

Parameters are stacked over the members, (member, ...). Each member has its own initial weights, learning rate, rows
and order of rows, and ends where it would end alone (`tests/test_replay.py`); the networks of AutoTrainer's benchmark
are so small that forty cost little more than one.

Optimizers are those of Keras 2.3, for which the benchmark was written: epsilon 1e-7 is added to the root of the second
moment before the correction of its bias (torch adds it after), Adagrad begins at 0, and `clipnorm` is global.
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gallery.autotrainer import Data
from gallery.keras_net import Exponential, Spec, loss_of, network

EPSILON = 1e-7
ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Softplus, Exponential)  # fmt: skip
PLAIN = (bool, int, float, str, tuple, type(None))


@dataclass(frozen=True)
class Recipe:
    """A network in Keras terms, and how it is trained."""

    layers: list[Spec]
    loss: str
    optimizer: str = "adam"
    """'adam', 'sgd' or 'adagrad'."""
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0
    clip: float = math.inf
    """Largest absolute value of a gradient entry."""
    clip_norm: float = math.inf
    """Largest norm of the whole gradient."""
    batch: int = 128

    @classmethod
    def of(cls, fact: Spec) -> Recipe:
        """A published case."""
        said = fact["optimizer"]
        return cls(
            fact["layers"],
            fact["loss"],
            said["name"].lower(),
            said["learning_rate"],
            (said.get("beta_1", 0.9), said.get("beta_2", 0.999)),
            said.get("momentum", 0.0),
            clip_norm=said.get("clipnorm", math.inf),
            batch=fact["batch_size"],
        )


@dataclass(frozen=True)
class Member:
    """One training: a network, how it is trained, and the seed of the order of its rows."""

    model: nn.Module
    recipe: Recipe
    seed: int


def member(recipe: Recipe, data: Data, seed: int) -> Member:
    """The recipe's own network, drawn with the seed."""
    torch.manual_seed(seed)
    return Member(network(recipe.layers, data.x[:2]), recipe, seed)


@dataclass
class Run:
    """What one training came to: accuracy before it and after each epoch."""

    untrained: float = 0.0
    train: list[float] = field(default_factory=list[float])
    held_out: list[float] = field(default_factory=list[float])
    lost: int | None = None
    """Epoch in which the loss was not finite; the training ends there."""
    seconds: float = 0.0
    """Processor time: its share of that of the members trained with it."""

    @property
    def final(self) -> float:
        """Held-out accuracy at the end; of the last epoch that ended finite, if the loss was lost."""
        return self.held_out[-1] if self.held_out else self.untrained


Look = Callable[[int, Run, int, list[Tensor]], None]
"""look(member, run, epoch, gradients of its kernels): called on the first batch of every epoch."""


def trained(members: Sequence[Member], data: Data, epochs: int, look: Look | None = None) -> list[Run]:
    """Train all of them, those of one structure at once; in the order of the members."""
    runs = [Run() for _ in members]
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, one in enumerate(members):
        groups[structure(one.model), repr(replace(one.recipe, layers=[], lr=0.0))].append(number)
    for numbers in groups.values():
        chosen = [runs[i] for i in numbers]
        started = time.process_time()
        Population([members[i] for i in numbers], chosen, numbers, data).train(epochs, look)
        for run in chosen:
            run.seconds = (time.process_time() - started) / len(chosen)
    return runs


def structure(model: nn.Module) -> tuple[Any, ...]:
    """The same for two models exactly if they differ in nothing but the values of parameters and buffers."""
    return tuple(
        (name, type(module), tuple(_shapes(module)), tuple(_settings(module)))
        for name, module in model.named_modules()
    )


def _shapes(module: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield name, value.shape


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What else it holds; anything but a plain value equals only itself."""
    for name, value in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules", "training") and value not in ({}, set()):
            yield name, value if isinstance(value, PLAIN) else id(value)


class Population:
    """Members of one structure, of whom those whose loss is not finite drop out."""

    def __init__(
        self, members: Sequence[Member], runs: Sequence[Run], numbers: Sequence[int], data: Data
    ) -> None:
        self.base, self.recipe, self.data = copy.deepcopy(members[0].model), members[0].recipe, data
        self.runs, self.numbers = list(runs), list(numbers)
        self.orders = [torch.Generator().manual_seed(one.seed) for one in members]
        self.shapes = {name: p.shape for name, p in self.base.named_parameters()}
        vectors = [nn.utils.parameters_to_vector(one.model.parameters()).detach() for one in members]
        self.flat = torch.stack(vectors)  # (member, parameter)
        self.parameters = self._views(self.flat)
        self.first, self.second = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.rate = self.flat.new_tensor([[one.recipe.lr] for one in members])
        named = [dict(one.model.named_buffers()) for one in members]
        self.buffers = {name: torch.stack([own[name] for own in named]) for name in named[0]}
        self.loss = vmap(loss_of(self.recipe.loss))
        self.steps = 0

    def train(self, epochs: int, look: Look | None = None) -> None:
        for run, (_, held_out) in zip(self.runs, self.accuracies(), strict=True):
            run.untrained = held_out
        for epoch in range(epochs):
            self._epoch(epoch, look)
            if not self.runs:
                return
            for run, (seen, held_out) in zip(self.runs, self.accuracies(), strict=True):
                run.train.append(seen)
                run.held_out.append(held_out)

    def _epoch(self, epoch: int, look: Look | None) -> None:
        rows = len(self.data.x)
        order = torch.stack([torch.randperm(rows, generator=own) for own in self.orders])  # (member, row)
        for start in range(0, rows, self.recipe.batch):
            batch = order[:, start : start + self.recipe.batch]
            values, gradient = self._gradient(self.data.x[batch], self.data.y[batch])
            if look is not None and start == 0:
                kernels = [g for g in self._views(gradient).values() if g.ndim > 2]
                for i, (run, number) in enumerate(zip(self.runs, self.numbers, strict=True)):
                    look(number, run, epoch, [g[i] for g in kernels])
            finite = values.isfinite()
            if not finite.all():
                order, gradient = order[finite], gradient[finite]
                self._keep(finite.tolist(), epoch)
                if not self.runs:
                    return
            self._step(gradient)

    def _keep(self, finite: list[bool], epoch: int) -> None:
        for run, still in zip(self.runs, finite, strict=True):
            run.lost = run.lost if still else epoch
        kept = torch.tensor(finite)
        self.flat, self.first, self.second = self.flat[kept], self.first[kept], self.second[kept]
        self.parameters = self._views(self.flat)
        self.rate = self.rate[kept]
        self.buffers = {name: value[kept] for name, value in self.buffers.items()}
        self.runs, self.numbers = _among(self.runs, finite), _among(self.numbers, finite)
        self.orders = _among(self.orders, finite)

    # -- one step ------------------------------------------------------------------------------------

    def _gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Of a batch (member, row, feature): each member's loss, and its gradient (member, parameter)."""
        self.base.train()
        values = self.loss(self._answer(x), y)
        gradients = torch.autograd.grad(values.sum(), list(self.parameters.values()))
        return values.detach(), torch.cat([g.flatten(1) for g in gradients], 1)

    def _step(self, gradient: Tensor) -> None:
        recipe = self.recipe
        self.steps += 1
        if recipe.clip_norm < math.inf:
            gradient = gradient * (recipe.clip_norm / gradient.norm(dim=1, keepdim=True)).clamp(max=1.0)
        if recipe.clip < math.inf:
            gradient = gradient.clamp(-recipe.clip, recipe.clip)
        match recipe.optimizer:
            case "adam":
                one, two = recipe.betas
                self.first.mul_(one).add_(gradient, alpha=1 - one)
                self.second.mul_(two).addcmul_(gradient, gradient, value=1 - two)
                unbiased = math.sqrt(1 - two**self.steps) / (1 - one**self.steps)
                step = unbiased * self.first / (self.second.sqrt() + EPSILON)
            case "sgd":
                step = self.first.mul_(recipe.momentum).add_(gradient)
            case "adagrad":
                step = gradient / (self.second.addcmul_(gradient, gradient).sqrt() + EPSILON)
            case other:
                raise ValueError(f"unknown optimizer {other!r}")
        self.flat.sub_(self.rate * step)

    # -- forward -------------------------------------------------------------------------------------

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        """By name, (member, *shape): leaves that share the memory of `flat`."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()], 1)
        return {
            name: part.unflatten(1, shape).requires_grad_()
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def _answer(self, x: Tensor) -> Tensor:
        """Answers (member, row, output). Only what is the same for a stack as for one network goes without `vmap`."""
        named = self.parameters | self.buffers
        if type(self.base) is not nn.Sequential:
            return _mapped(self.base, named, x)
        x = x.mT.contiguous()  # (member, feature, row): products of few features with many rows are faster so
        for name, part in self.base.named_children():
            if type(part) is nn.Linear and part.bias is not None:
                x = torch.baddbmm(named[f"{name}.bias"].unsqueeze(2), named[f"{name}.weight"], x)
            elif type(part) in ELEMENTWISE:
                x = part(x)
            else:
                own = {key.removeprefix(f"{name}."): value for key, value in named.items() if key.startswith(f"{name}.")}  # fmt: skip
                x = _mapped(part, own, x.mT).mT
        return x.mT

    @torch.no_grad()
    def accuracies(self) -> list[tuple[float, float]]:
        """Of each member: on the rows it trains on, and on those held out."""
        self.base.eval()
        x, y = (
            torch.cat([self.data.x, self.data.held_x]),
            torch.cat([self.data.y, self.data.held_y]),
        )
        answer = self._answer(x.expand(len(self.runs), *x.shape))
        right = (answer > 0.5).float() == y if y.shape[-1] == 1 else answer.argmax(-1) == y.argmax(-1)
        right = right.float().flatten(1)  # (member, row)
        seen = len(self.data.x)
        return list(zip(right[:, :seen].mean(1).tolist(), right[:, seen:].mean(1).tolist(), strict=True))


def _mapped(module: nn.Module, own: dict[str, Tensor], x: Tensor) -> Tensor:
    return vmap(lambda own, rows: functional_call(module, own, (rows,)))(own, x)


def _among(items: Iterable[Any], kept: Sequence[bool]) -> list[Any]:
    return [item for item, still in zip(items, kept, strict=True) if still]
