"""What a watched training could not tell, and why: silence never looks like health."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from torch.nn.parallel import DataParallel

from isograd.diagnosis import Diagnosis
from isograd.monitor.deep import Deep
from isograd.monitor.names import clean
from isograd.monitor.selftest import deaf
from isograd.monitor.tap import Tap


def unexamined(
    model: nn.Module,
    taps: Sequence[Tap],
    steps: int,
    logged: set[str],
    deep: Deep,
    silent: str,
) -> dict[str, str]:
    """By subject: why it could not be examined. `silent`: why hooks did not fire where the monitor attached."""
    said: dict[str, str] = {}
    if not steps:
        said["training"] = (
            "no step was seen. A step that is replayed as a CUDA graph or compiled as a whole runs no Python: "
            "leave optimizer.step() out of it"
        )
        heard = (deaf(tap.parameters(), tap.optimizer) for tap in taps)
        if why := next(filter(None, (*heard, silent)), ""):
            said["hooks"] = why
    elif any(tap.captured for tap in taps):
        said["training"] = (
            "steps went into a CUDA graph, which runs no Python when it is replayed: only those before it were seen; "
            "capture forward and backward, and leave optimizer.step() out"
        )
    if "loss" not in logged:
        said["loss"] = "it was not logged: call monitor.log(loss=loss) once a step"
    if deep.every is None:
        said["activations"] = "watch(..., deep_every=1000) looks at every thousandth step from inside"
    elif deep.refused:
        said["activations"] = deep.refused
    held = {id(p) for tap in taps for p in tap.parameters()}
    strays = [clean(n, model) for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if strays:
        more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
        said["parameters"] = (
            f"{len(strays)} that can be trained are in no watched optimizer, which leaves them as they are: {', '.join(strays[:3])}{more}"
        )
    sampled = sorted(
        {type(tap.optimizer).__name__ for tap in taps if tap.optimizer is not None and not tap.exact}
    )
    if sampled:
        said["updates"] = (
            f"the step of {', '.join(sampled)} is not known in closed form: its size is measured on full "
            "readings, of some parameters at a time"
        )
    if any("_flat_param" in name for name, _ in model.named_parameters()):
        said["layers"] = "FSDP1 keeps parameters in flat pieces: only fully_shard (FSDP2) leaves them apart"
    if any(isinstance(module, DataParallel) for module in model.modules()):
        said["replicas"] = "DataParallel adds the gradients of its replicas before they are read"
    return said


def together(run: Diagnosis, inside: Diagnosis) -> Diagnosis:
    """The findings of the run and those of the step that was last looked at from inside."""
    findings = sorted((*run.findings, *inside.findings), key=lambda finding: -finding.severity)
    found = {finding.code for finding in findings}
    healthy = {code: words for code, words in (inside.healthy | run.healthy).items() if code not in found}
    unknown = {
        code: words
        for code, words in (inside.unexamined | run.unexamined).items()
        if code not in found and code not in healthy
    }
    return replace(inside, findings=tuple(findings), healthy=healthy, unexamined=unknown)
