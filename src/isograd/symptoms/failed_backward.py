"""NF404 failed-backward: the backward pass raised an error.

What it means
    The forward pass gave a loss, but its gradient could not be computed. No training step is possible.

Why it happens
    A tensor that the backward needs was changed in place after it was used; a graph is gone through twice, by a
    `.backward()` within the loss or a state kept from the batch before; an operation has no
    derivative for these inputs; a custom autograd function returns the wrong number of gradients.

Evidence
    The error text of torch, and the source line of the last operation that the gradient had reached.

What helps
    Replace the in-place operation (`x += y`, `relu_`, slices assigned to) by one that makes a new tensor; detach what
    is kept from batch to batch, and leave `.backward()` to the training loop;
    `torch.autograd.set_detect_anomaly(True)` names the forward call of the failing node.

References
    PyTorch notes, Autograd mechanics: in-place operations.
"""

from __future__ import annotations

from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.symptoms import Healthy, Outcome

CODE = "NF404"
NAME = "failed-backward"


def examine(flow: Flow) -> Iterator[Outcome]:
    """Did the backward finish?"""
    failure = flow.failure
    if failure is None:
        yield Healthy("the backward finished")
        return
    reached = f"; the gradient had reached {failure.source}" if failure.source else ""
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"the backward raised {failure.error}{reached}",
        cause=failure.traceback,
        sites=(failure.source,) if failure.source else (),
        evidence={"error": failure.error},
        remedies=tuple(_remedies(failure.traceback)),
    )


def _remedies(text: str) -> Iterator[str]:
    """By what torch says of it; source: the messages of torch's `SavedVariable` and autograd engine."""
    if "second time" in text:
        yield "leave .backward() out of loss(model): it is made of what the loss returns"
        yield "detach what the model keeps from the batch before: state = state.detach()"
    elif "inplace" in text or "in-place" in text:
        yield "avoid-in-place"
    else:
        yield "torch.autograd.set_detect_anomaly(True) names the forward call of the operation that raised"
