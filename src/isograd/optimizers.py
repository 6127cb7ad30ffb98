"""How large an optimizer's first step is, from its rule: nothing is stepped."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def first_update(
    optimizer: torch.optim.Optimizer | None,
    model: nn.Module,
    grads: dict[str, Tensor | None],
    scale: dict[str, float],
) -> dict[str, float]:
    """rms(first update) / rms(weight) of every parameter, by name.

    SGD moves by lr * g; the Adam family, bias-corrected, by lr * g / (|g| + eps), which is lr times the
    sign of g as long as |g| is far above eps and nothing when it is far below. `grads` are rescaled, the
    true gradient is 10**scale times as large. Other rules are not known in closed form: absent.
    """
    if optimizer is None:
        return {}
    rule = type(optimizer).__name__
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, float] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names.get(id(p))
            grad = grads.get(name) if name is not None else None
            weight = float(torch.linalg.vector_norm(p.detach(), dtype=torch.float64)) if p.numel() else 0.0
            if name is None or grad is None or name not in scale or not weight > 0:
                continue
            rate = float(group["lr"])
            if rule == "SGD":
                log = _log10_norm(grad) + scale[name]
                found[name] = rate * 10 ** min(log, 300.0) / weight
            elif rule in ("Adam", "AdamW", "NAdam", "Adamax", "RAdam"):
                eps = float(group.get("eps", 1e-8))
                size = grad.detach().double().abs()
                # g / (|g| + eps) with both divided by the scale, so that neither under- nor overflows
                moved = size / (size + eps * 10 ** min(max(-scale[name], -300.0), 300.0))
                moved = torch.where(size > 0, moved, torch.zeros_like(moved))
                found[name] = rate * float(torch.linalg.vector_norm(moved)) / weight
    return found


def _log10_norm(grad: Tensor) -> float:
    value = float(torch.linalg.vector_norm(grad.detach(), dtype=torch.float64))
    return math.log10(value) if value > 0 else -math.inf
