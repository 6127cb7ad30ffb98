"""How far an optimizer moved its parameters, from its rule and its state: no copy of the weights is kept.

A rule is solved for the weights as they are after the step, p'. With decoupled weight decay c = lr * decay,
p' = (1 - c) p - s, so the parameter moved by d = p - p' = (c p' + s) / (1 - c). The norm is that of the
rule: before p' was rounded to the parameter's dtype. With c = 1 nothing is left of p in p': the norm is nan.
"""

# torch exports its multi-tensor functions under private names only.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from isograd.monitor.sharding import local
from isograd.monitor.statistics import chunks, norms

WINDOW = 4_194_304
"""Elements that are copied at once of a model whose optimizer's rule is not known, or an eighth of them if that is more."""

Group = dict[str, Any]


class Moved:
    """Norms of an optimizer's last update, by the closed form of its rule."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.taken = 0
        """Steps taken since the monitor was attached."""
        # A subclass that keeps the `step` of torch's optimizer is known, one with a step of its own is not.
        self._rule = next((rule for o, rule in RULES.items() if type(optimizer).step is o.step), None)
        self._steps: dict[int, int] = {}

    @property
    def known(self) -> bool:
        """The rule is one of those in `RULES`, and its learning rate is a number, here."""
        return self._rule is not None and all(
            not isinstance(group["lr"], Tensor) or group["lr"].device.type == "cpu"
            for group in self.optimizer.param_groups
        )

    def norms(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Norm by which the step that has just ended moved each of these parameters, all with a gradient."""
        assert self._rule is not None
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        lengths: list[Tensor] = []
        for chunk in chunks(parameters):
            lengths += self._rule(self, chunk, [groups[id(p)] for p in chunk])
        return lengths

    def restored(self) -> None:
        """The state was exchanged for an older one: steps that are counted on a device are read again."""
        self._steps.clear()

    def buffers(self, parameters: Sequence[Tensor], name: str) -> list[Tensor]:
        """A buffer of the optimizer for each parameter: what this process holds of it."""
        return [local(self.optimizer.state[p][name]) for p in parameters]

    def steps(self, parameters: Sequence[Tensor]) -> list[float]:
        """Steps each parameter has made.

        Fused optimizers count on the device: there the count is read once, and continued here.
        """
        counts = self.buffers(parameters, "step")
        if all(count.device.type == "cpu" for count in counts):
            return [number(count) for count in counts]
        new = [i for i, p in enumerate(parameters) if id(p) not in self._steps]
        if new:
            for i, value in zip(new, torch.stack([counts[i] for i in new]).tolist(), strict=True):
                self._steps[id(parameters[i])] = int(value) - self.taken
        return [float(self._steps[id(p)] + self.taken) for p in parameters]


def sgd(moved: Moved, parameters: Sequence[Tensor], groups: Sequence[Group]) -> list[Tensor]:
    """lr |b| with a momentum buffer b, which holds the decay; lr |g + c p' + m b| / (1 - lr c) without or
    with Nesterov's."""
    held = moved.optimizer.state  # makes what is looked up by []
    buffers = [held[p].get("momentum_buffer") if p in held else None for p in parameters]
    sign, of_gradient, of_weight, of_buffer, rate = [[0.0] * len(parameters) for _ in range(5)]
    for i, (group, buffer) in enumerate(zip(groups, buffers, strict=True)):
        sign[i] = -1.0 if group["maximize"] else 1.0
        rate[i] = number(group["lr"])
        if buffer is not None and not group["nesterov"]:
            of_buffer[i] = 1.0
            continue
        of_gradient[i], of_weight[i] = sign[i], float(group["weight_decay"])
        of_buffer[i] = float(group["momentum"]) if buffer is not None else 0.0
        rate[i] /= left(rate[i] * of_weight[i])
    terms = (
        ([local(p.grad) for p in parameters if p.grad is not None], of_gradient),
        ([local(p) for p in parameters], of_weight),
        ([local(p if b is None else b) for p, b in zip(parameters, buffers, strict=True)], of_buffer),
    )
    present = [(tensors, factors) for tensors, factors in terms if any(factors)]
    if len(present) == 1 and len({abs(f) for f in present[0][1]}) == 1:  # no sum to be formed
        return list(torch._foreach_mul(norms(present[0][0]), rate))
    (tensors, factors), *more = present
    total = torch._foreach_mul(tensors, factors)
    for tensors, factors in more:
        torch._foreach_add_(total, torch._foreach_mul(tensors, factors))
    return list(torch._foreach_mul(norms(total), rate))


def adam(moved: Moved, parameters: Sequence[Tensor], groups: Sequence[Group]) -> list[Tensor]:
    """r m / (sqrt(v) + e), r = lr sqrt(1 - b2^t) / (1 - b1^t), e = eps sqrt(1 - b2^t); decoupled decay or none."""
    rates: list[float] = []
    floors: list[float] = []
    decays: list[float] = []
    for group, step in zip(groups, moved.steps(parameters), strict=True):
        beta1, beta2 = (number(beta) for beta in group["betas"])
        correction = math.sqrt(1 - beta2**step)
        decoupled = group.get("decoupled_weight_decay", isinstance(moved.optimizer, AdamW))
        decay = number(group["lr"]) * float(group["weight_decay"]) if decoupled else 0.0
        rates.append(number(group["lr"]) * correction / (1 - beta1**step) / left(decay))
        floors.append(float(group["eps"]) * correction)
        decays.append(decay / left(decay))
    second = [
        local(moved.optimizer.state[p]["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
        for p, group in zip(parameters, groups, strict=True)
    ]
    first = moved.buffers(parameters, "exp_avg")
    below = torch._foreach_sqrt(second)
    torch._foreach_add_(below, floors)
    if not any(decays):
        return list(torch._foreach_mul(norms(torch._foreach_div(first, below)), rates))
    total = torch._foreach_mul([local(p) for p in parameters], decays)
    torch._foreach_addcdiv_(total, first, below, rates)
    return norms(total)


def muon(moved: Moved, parameters: Sequence[Tensor], groups: Sequence[Group]) -> list[Tensor]:
    """(lr c p' + a O) / (1 - lr c): O, the orthogonalised momentum, is formed again by torch's own function."""
    from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

    lengths: list[Tensor] = []
    for p, group in zip(parameters, groups, strict=True):
        update: Tensor = moved.optimizer.state[p]["momentum_buffer"]
        if group["nesterov"] and p.grad is not None:
            update = p.grad.lerp(update, group["momentum"])
        update = _zeropower_via_newtonschulz(
            update, group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        rate = number(group["lr"])
        decay = rate * float(group["weight_decay"])
        step = (p * decay).add_(update, alpha=_adjust_lr(rate, group["adjust_lr_fn"], p.shape))
        lengths.append(torch.linalg.vector_norm(step) / left(decay))
    return lengths


Rule = Callable[[Moved, Sequence[Tensor], Sequence[Group]], list[Tensor]]
RULES: dict[type[Optimizer], Rule] = {SGD: sgd, Adam: adam, AdamW: adam}
if hasattr(torch.optim, "Muon"):  # torch 2.9
    RULES[torch.optim.Muon] = muon


class Sampled:
    """Norms of the update of any optimizer: some weights are copied for the length of one step.

    Each time it is asked the next window of parameters is taken, of `WINDOW` elements or an eighth of the
    model, whichever is larger.
    """

    def __init__(self) -> None:
        self._next = 0
        self._copies: dict[int, Tensor] = {}

    def before(self, parameters: Sequence[Tensor]) -> None:
        """Copy the next window of these parameters."""
        weights = [local(p) for p in parameters]
        room = max(WINDOW, sum(w.numel() for w in weights) // 8)
        self._copies.clear()
        for offset in range(len(parameters)):
            i = (self._next + offset) % len(parameters)
            room -= weights[i].numel()
            if room < 0 and self._copies:
                self._next = i
                return
            self._copies[id(parameters[i])] = weights[i].clone()

    def norms(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Norm by which each parameter has moved since; NaN for one that was not copied."""
        lengths = [torch.full((), math.nan, device=p.device) for p in parameters]
        known = [i for i, p in enumerate(parameters) if id(p) in self._copies]
        if known:
            copies = [self._copies[id(parameters[i])] for i in known]
            torch._foreach_sub_(copies, [local(parameters[i]) for i in known])
            for i, length in zip(known, norms(copies), strict=True):
                lengths[i] = length
        self._copies.clear()
        return lengths


def left(decay: float) -> float:
    """Share of a weight that its decay leaves; nan where that is nothing."""
    return 1 - decay or math.nan


def number(value: float | Tensor) -> float:
    """A hyperparameter that may be a tensor on the CPU."""
    plain: Any = value.tolist() if isinstance(value, Tensor) else value
    return float(plain)
