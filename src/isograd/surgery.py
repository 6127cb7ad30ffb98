"""How a model is changed: the few operations that edits need beside those of torch.

Code that a prescription prints contains these functions in full, so that it runs where isograd is not
installed: everything here depends on torch and on other names of this file only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def drawing(model: nn.Module, seed: int) -> Iterator[None]:
    """What is drawn at random inside is always the same, and the user's generators go on as if nothing was."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def put(model: nn.Module, place: str, new: nn.Module) -> nn.Module:
    """`new` in the place of the module there, wherever it is registered, in its mode, device and number format.

    `new` may hold the old module, which is not changed. Returns the model; at the root, `new`.
    """
    old = model.get_submodule(place)
    kept = {id(part) for part in (*old.modules(), *old.parameters(), *old.buffers())}
    like = next(old.parameters(), next(model.parameters(), None))
    for module in new.modules():
        if id(module) not in kept:
            module.training = old.training
    for tensor in (*new.parameters(), *new.buffers()):
        if id(tensor) not in kept and like is not None:
            tensor.data = tensor.data.to(
                like.device, like.dtype if tensor.is_floating_point() else tensor.dtype
            )
    if not place:
        return new
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is old]:
        model.set_submodule(name, new)
    return model


def rebind(
    optimizers: Sequence[torch.optim.Optimizer],
    old: Mapping[str, Tensor],
    model: nn.Module,
    renamed: Mapping[str, str],
    refilled: set[str],
) -> list[str]:
    """Let optimizers train `model` in place of the model whose parameters were `old`.

    Each parameter takes the group of the one it comes from, and its state unless it was refilled; those that are gone
    are dropped. Groups are mostly split by the number of axes (weight decay, Muon): one that is new goes to the last
    group that holds such a parameter, else to the last group of all, if all of `old` is trained by these optimizers.

    Returns:
        Names of new parameters that no group is for.
    """
    new = dict(model.named_parameters())
    names = {id(p): name for name, p in new.items()}
    heirs = {id(p): (name, new.pop(renamed.get(name, name), None)) for name, p in old.items()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = {id(p) for group in groups for p in group["params"]}
    whole = all(id(p) in trained for p in old.values() if p.requires_grad)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            parameters: list[Tensor] = []
            for p, called in zip(group["params"], group.get("param_names", group["params"]), strict=True):
                name, heir = heirs.get(id(p), ("", p))  # not of this model: it stays
                state = optimizer.state.pop(p, None)
                if heir is not None:
                    parameters.append(heir)
                    names.setdefault(id(heir), str(called))
                    if state and name not in refilled and heir.shape == p.shape:
                        optimizer.state[heir] = state
            group["params"][:] = parameters  # LBFGS holds the list
        if isinstance(optimizer, torch.optim.LBFGS):  # what it knows is the curvature of another function
            optimizer.state.clear()
            optimizer._numel_cache = None
    left: list[str] = []
    for name, p in new.items():
        alike = [group for group in groups if any(q.ndim == p.ndim for q in group["params"])]
        group = next(reversed(alike), groups[-1] if whole else None)
        if group is not None and p.requires_grad:
            group["params"].append(p)
        elif p.requires_grad:
            left.append(name)
    for group in groups:
        if "param_names" in group:
            group["param_names"] = [names[id(p)] for p in group["params"]]
    return left


def orthogonal_(weight: Tensor, gain: float = 1.0, stacked: bool = False) -> Tensor:
    """As `nn.init.orthogonal_`, also in half precision and of a vector; of a stack of matrices (layer, in, out) each one."""
    for matrix in weight if stacked else (weight,):
        drawn = torch.empty(matrix.shape, dtype=torch.float32, device=weight.device)
        nn.init.orthogonal_(torch.atleast_2d(drawn), gain)
        matrix.copy_(drawn)
    return weight


def delta_orthogonal_(kernel: Tensor, gain: float = 1.0) -> Tensor:
    """Zero but for the centre tap, which is orthogonal over the channels. (out, in, *kernel), in <= out.

    Xiao et al. 2018, arXiv:1806.05393, Algorithm 1.
    """
    centre = torch.empty(kernel.shape[:2], dtype=torch.float32, device=kernel.device)
    nn.init.orthogonal_(centre, gain)
    with torch.no_grad():
        kernel.zero_()
        kernel[(slice(None), slice(None), *(size // 2 for size in kernel.shape[2:]))] = centre.to(
            kernel.dtype
        )
    return kernel


def chrono_(module: nn.Module, steps: int) -> None:
    """Biases of an LSTM or GRU (or a cell of either) for memories from 1 to `steps` steps.

    LSTM: b_f = log U(1, steps - 1), b_i = -b_f, the other gates 0. GRU: b_z = log U(1, steps - 1). torch adds bias_ih
    and bias_hh: bias_hh is zero. Tallec and Ollivier 2018, arXiv:1804.11188.
    """
    gates = 4 if isinstance(module, (nn.LSTM, nn.LSTMCell)) else 3
    for name, bias in module.named_parameters(recurse=False):
        if not name.startswith("bias") or not bias.requires_grad:
            continue
        width = len(bias) // gates
        bias.zero_()
        if name.startswith("bias_ih"):
            keep = torch.empty(width).uniform_(1.0, max(steps - 1.0, 2.0)).log().to(bias)
            bias[width : 2 * width] = keep
            if gates == 4:
                bias[:width] = -keep
