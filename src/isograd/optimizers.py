"""How large an optimizer's first step is, from its rule: nothing is stepped."""

from __future__ import annotations

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
    sizes: dict[str, float] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names.get(id(p))
            grad = grads.get(name) if name is not None else None
            if name is None or grad is None or name not in scale:
                continue
            true = grad.detach().double() * 10 ** max(min(scale[name], 280.0), -280.0)
            if rule == "SGD":
                moved = true
            elif rule in ("Adam", "AdamW", "NAdam", "Adamax", "RAdam"):
                moved = torch.where(true == 0, true, true / (true.abs() + float(group.get("eps", 1e-8))))
            else:
                continue
            rate, weight = float(group["lr"]), torch.linalg.vector_norm(p.detach(), dtype=torch.float64)
            if weight > 0:
                sizes[name] = rate * float(torch.linalg.vector_norm(moved) / weight)
    return sizes
