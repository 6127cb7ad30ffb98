"""UP501 parameter-without-gradient: parameters that the loss cannot change.

What it means
    A parameter that requires a gradient gets none, or exactly zero; or no optimizer knows of it. It stays as it was
    initialised.

Why it happens
    It is not used in this forward pass, its part was detached or run under `no_grad`, an expert of a
    mixture got no token, or everything above it is dead. Or all that the loss knows of it was rounded, or reduced to
    a sign: a step function has no derivative but zero. Otherwise exactly zero is by design behind a branch whose
    last layer starts at zero (ReZero, Fixup, LayerScale 0): there it is only noted. Layers in a plain list or dict are
    no parameters of the model, and `model.parameters()` leaves them out.

Evidence
    `None` (the loss does not depend on it) told from exact zeros, from a rescaled backward that does not
    underflow. Frozen parameters are not counted. It is an error where modules ran, none of their gradient
    comes back, and the model's input has no gradient path at all, and where weights are known to the loss through a
    step function alone; otherwise a part was left out on purpose.

What helps
    Use the module, remove it, or freeze it with `requires_grad_(False)`. `nn.ModuleList`, `nn.ModuleDict` and
    `nn.ParameterList` in the place of lists and dicts. A step is trained by the gradient of what it
    steps through: x + (x.round() - x).detach().

References
    PyTorch, DistributedDataParallel: `find_unused_parameters`; Bengio et al. 2013 (arXiv:1308.3432) on steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.statistics import Parameter
from isograd.symptoms import Healthy, Outcome, Unexamined

CODE = "UP501"
NAME = "parameter-without-gradient"
DETACHED = "detached: .detach(), .data, numpy or an argmax between them and the loss"


def examine(flow: Flow) -> Iterator[Outcome]:
    """Unused parameters, and those whose gradient is exactly zero."""
    if flow.failure is not None:
        yield Unexamined("the backward failed")
        return
    trainable = [p for p in flow.parameters if p.state != "frozen"]
    unused = [p for p in trainable if p.state in ("unused", "no-grad", "detached")]
    detached = [p for p in unused if p.state == "detached"]
    stepped = [p for p in trainable if p.state == "stepped"]
    zero = [p for p in trainable if p.grad_norm_log10 == -math.inf and p not in stepped]
    if flow.unregistered:
        yield _unregistered(flow.unregistered)
    elif not unused and not zero and not stepped:
        yield Healthy(f"all {len(trainable)} trainable parameters receive a gradient")
        return
    if unused:
        yield Finding(
            CODE,
            NAME,
            Severity.ERROR if detached and flow.cut else Severity.WARNING,
            f"the loss does not depend on {len(unused)} of {len(trainable)} trainable parameters"
            + (f"; the modules of {len(detached)} ran, and their gradient is cut off" if detached else "")
            + ("; no gradient path leads to the model's input" if detached and flow.cut else ""),
            cause=_why(flow, unused),
            sites=tuple(p.name for p in unused[:5]),
            evidence={"unused": len(unused), "detached": len(detached), "trainable": len(trainable)},
            remedies=(
                *(f"{_undo(cut)}, or freeze what lies before it" for cut in flow.cuts[:3]),
                "use-or-freeze",
            ),
        )
    if stepped:
        weights = any(len(p.shape) > 1 for p in stepped)
        yield Finding(
            CODE,
            NAME,
            Severity.ERROR if weights else Severity.WARNING,
            f"{len(stepped)} of {len(trainable)} trainable parameters are known to the loss through a step alone: their "
            "gradient is exactly zero, for good",
            cause="round, sign or another step function, whose derivative is zero everywhere",
            sites=tuple(p.name for p in stepped[:5]),
            evidence={"stepped": len(stepped), "trainable": len(trainable), "cause": "step-function"},
            remedies=("straight-through",),
        )
    if zero:
        yield Finding(
            CODE,
            NAME,
            Severity.INFO,
            f"the gradient of {len(zero)} of {len(trainable)} trainable parameters is exactly zero",
            cause="no gradient arrives: a branch that starts at zero, an expert without tokens, or dead units",
            sites=tuple(p.name for p in zero[:5]),
            evidence={"zero": len(zero), "trainable": len(trainable)},
        )


def _unregistered(names: tuple[str, ...]) -> Finding:
    lists = dict.fromkeys(name.partition("[")[0] for name in names)
    return Finding(
        CODE,
        NAME,
        Severity.WARNING,
        f"{len(names)} parameters that the loss depends on are not among model.parameters(): no optimizer made of those trains "
        "them, and neither model.to() nor state_dict() knows them",
        cause=f"{', '.join(lists)}: a plain list, tuple or dict, whose layers are not registered",
        sites=names[:5],
        evidence={"unregistered": len(names)},
        remedies=("nn.ModuleList, nn.ModuleDict or nn.ParameterList in its place",),
    )


def _why(flow: Flow, unused: list[Parameter]) -> str:
    """How the loss came not to depend on them, and where, if that was seen."""
    states, where = {p.state for p in unused}, ", ".join(flow.cuts[:3])
    if "detached" in states:
        return f"cut off by {where}" if where else DETACHED
    if "no-grad" in states:
        return f"their modules ran under no_grad{': ' if where else ''}{where}"
    return "their modules did not run in this forward pass"


def _undo(cut: str) -> str:
    """`net.py:17: take the detach() out`."""
    how, _, source = cut.partition(" at ")
    what = {"data": ".data", "no_grad": "torch.no_grad()"}.get(how, f".{how}()")
    return f"{source}: take the {what} out"
