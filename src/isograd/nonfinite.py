"""Where the first NaN or Inf of a model comes from: one forward and one backward, and the operation by name."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from isograd.diagnosis import Finding, diagnose
from isograd.graph.traced import Loss
from isograd.measure import measure

CODES = ("NF401", "NF402", "NF404")


def find_nonfinite(model: nn.Module, loss: Loss) -> Finding | None:
    """Name the operation that made the first value that is not finite, forward or backward.

    Unlike torch's anomaly detection it looks at the forward pass too, names the line of the *forward* whose
    derivative is infinite, needs no mode switched on in the training, and takes no notice of values that are
    infinite on purpose (an attention mask) and never reach the loss.

    Args:
        model: any module. It is left bitwise as it was.
        loss: `loss(model)` returns the loss of the batch that failed, as a tensor with one element.

    Returns:
        None where the loss and all gradients are finite. Otherwise a finding whose `evidence` holds `operation`,
        `source` ("file:line") and `phase` ("forward" or "backward"); the first two are '' where the operation could not
        be told. A backward that raises is no answer about its gradients: that is returned as NF404.

    Raises:
        TypeError, ValueError: see `measure`. An error in the model's own forward passes through.

    Example:
        >>> found = isograd.find_nonfinite(model, lambda m: cross_entropy(m(x), y))
        >>> found and (found.evidence["phase"], found.evidence["operation"], found.evidence["source"])
        ('backward', 'sqrt', 'losses.py:31')
    """
    flow = measure(model, loss)
    found = next((f for f in diagnose(flow).findings if f.matches(CODES)), None)
    if found is None:
        return None
    phase = "forward" if found.code == "NF401" else "backward"
    return replace(found, evidence={"operation": "", "source": "", "phase": phase} | found.evidence)
