"""Will the hooks fire? Tried when the monitor attaches, and asked of the watched parameters and optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def silent() -> str:
    """Why a hook on accumulation would not fire where this is called; '' where it does.

    Tried on a parameter of our own. Its gradient is accumulated by calling the graph's node, not by a backward:
    that would start the engine's threads, after which a process may no longer be forked.
    """
    fired: list[Tensor] = []
    parameter = nn.Parameter(torch.zeros(1, device="cpu"))
    parameter.register_post_accumulate_grad_hook(fired.append)
    node: Any = parameter.view_as(parameter).grad_fn
    if node is None:
        mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        return f"watch was called under torch.{mode}, where nothing that is computed has a gradient: leave it"
    ((accumulate, _),) = node.next_functions
    accumulate(torch.ones(1, device="cpu"))
    return "" if fired else "this torch calls no hooks when a gradient is accumulated: update it"


def deaf(parameters: Sequence[Tensor], optimizer: Optimizer | None) -> str:
    """Why nothing will be heard of these parameters or of this optimizer's steps; '' where all is well."""
    whose = "the model" if optimizer is None else type(optimizer).__name__
    inference = sum(p.is_inference() for p in parameters)
    if inference:
        return (
            f"{inference} of the {len(parameters)} parameters of {whose} are inference tensors, which no backward "
            "reaches: build the model outside of torch.inference_mode()"
        )
    if parameters and not any(p.requires_grad for p in parameters):
        return (
            f"none of the {len(parameters)} parameters of {whose} requires a gradient: call requires_grad_(True) "
            "before the forward"
        )
    if optimizer is not None and not getattr(type(optimizer).step, "hooked", False):
        return (
            f"the step of {whose} was replaced after torch had put its hooks into it: pass optimizer=None, and call "
            "monitor.step() after each step while the gradients are there"
        )
    return ""
